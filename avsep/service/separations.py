"""The routes of separations: make one, follow it, and fetch what it found."""
# ruff: noqa: D103  (a route's summary says it)

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import soundfile
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from avsep.outputs import MIXTURE
from avsep.separation import REST
from avsep.service import window
from avsep.service.answers import Job, RelationMap
from avsep.service.archive import converted, zip
from avsep.service.problems import AUDIO, JSON, UPLOAD_SCHEMA, Problem, file_response, problems
from avsep.service.requests import describe, preferences, wants_archive
from avsep.service.results import NoSuchJob, StoreFull
from avsep.service.service import Service, service_of
from avsep.service.state import Outcome
from avsep.service.window import TRACKS

Served = Annotated[Service, Depends(service_of)]
router = APIRouter(prefix="/v1/separations", redirect_slashes=False)
_PNG = file_response(["image/png"], 404, 409)


@router.post(
    "",
    status_code=201,
    response_model=Job,
    responses={
        202: {"model": Job, "description": "Accepted; ask its Location"},
        **problems(400, 403, 406, 408, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra=UPLOAD_SCHEMA,
    summary="Separate a video or sound",
)
async def create(request: Request, service: Served) -> Response:
    """Answer with the result, or 202 when it takes longer than `Prefer: wait=N` (`respond-async`: at once)."""
    wait_s = preferences(request.headers.get("prefer", ""), service.config)
    zipped = wants_archive(request.headers.get("accept", ""))
    try:
        job_id, task = await service.receive(request)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    if wait_s and not await _waited(request, service, job_id, task, wait_s):
        return Response(status_code=400)
    try:
        job = service.store.job(job_id)
    except NoSuchJob:  # nobody else knew its id
        raise StoreFull from None
    if job.error:
        service.store.delete(job_id)
        raise Problem.of(job.error)
    headers = {"Location": f"/v1/separations/{job_id}"}
    if zipped and job.status == "done":
        return await _archived(service, job_id, 201, headers)
    body = describe(job, service.config.results_ttl_s).model_dump_json()
    return Response(body, 201 if job.status == "done" else 202, headers, JSON)


async def _waited(request: Request, service: Service, job_id: str, task: asyncio.Task[None], wait_s: float) -> bool:
    """Wait for a job with its client; False where the client has gone, and the job with it."""
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        with contextlib.suppress(NoSuchJob):
            service.store.delete(job_id)
        raise
    finally:
        gone.cancel()
    if gone.done() and not gone.cancelled() and not task.done():
        service.store.delete(job_id)
        return False
    return True


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/{job_id}", response_model=Job, responses=problems(404, 406), summary="Progress and result")
async def read(job_id: str, request: Request, service: Served) -> Any:
    if wants_archive(request.headers.get("accept", "")):
        return await _archived(service, job_id, 200, {})
    job = describe(service.store.job(job_id), service.config.results_ttl_s)
    headers = {} if job.status in ("done", "failed") else {"Retry-After": "1"}
    return Response(job.model_dump_json(), 200, headers, JSON)


@router.delete("/{job_id}", status_code=204, responses=problems(404), summary="Stop and remove")
async def remove(job_id: str, service: Served) -> Response:
    await run_in_threadpool(service.store.delete, job_id)
    return Response(status_code=204)


@router.get(
    "/{job_id}/tracks/{track}.{kind}",
    response_class=Response,
    responses=file_response(AUDIO.values(), 404, 409, 416),
    summary="One sound: an object's, _rest or _mixture",
)
async def track(job_id: str, track: str, kind: str, service: Served) -> Response:
    folder, result = _finished(service, job_id)
    names = {*(o.name for o in result.objects), REST, MIXTURE}
    if track not in names or kind not in AUDIO:
        raise Problem(404, f"the sounds are {', '.join(sorted(names))}, each as .wav, .flac and .ogg")
    path: Path | bytes = folder / TRACKS / f"{track}.wav"
    if kind != "wav":
        path = await _of(service, job_id, converted, path, kind)
    if isinstance(path, bytes):
        return Response(path, media_type=AUDIO[kind])
    stat = await _of(service, job_id, path.stat)  # a job deleted since is a 404 here, and a 500 within the response
    return FileResponse(
        path, stat_result=stat, media_type=AUDIO[kind], filename=path.name, content_disposition_type="inline"
    )


@router.get(
    "/{job_id}/relation", response_model=RelationMap, responses=problems(404, 409),
    summary="The relation map as data",
)  # fmt: skip
async def relation(job_id: str, service: Served) -> Any:
    return JSONResponse(await _of(service, job_id, window.relation, _explained(service, job_id)))


@router.get("/{job_id}/relation.png", response_class=Response, responses=_PNG, summary="The relation map as a picture")
async def relation_png(job_id: str, service: Served) -> Response:
    drawn = await _of(service, job_id, window.relation_png, _explained(service, job_id))
    return Response(drawn, media_type="image/png")


@router.get("/{job_id}/frame.png", response_class=Response, responses=_PNG, summary="A picture of the video")
async def frame(job_id: str, service: Served) -> Response:
    folder, result = _finished(service, job_id)
    if not result.has_image:
        raise Problem(404, "the file has no pictures")
    path = window.image_path(folder)
    return FileResponse(path, stat_result=await _of(service, job_id, path.stat), media_type="image/png")


@router.get(
    "/{job_id}/bases/{basis}.wav",
    response_class=Response,
    responses=file_response(["audio/wav"], 404, 409, 422),
    summary="One basis alone, in the first window",
)
async def basis(job_id: str, basis: int, service: Served) -> Response:
    folder = _explained(service, job_id)
    try:
        sound, rate = await _of(service, job_id, window.basis_sound, folder, basis)
    except IndexError:
        raise Problem(404, f"there is no basis {basis}") from None
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format="WAV", subtype="PCM_16")
    return Response(buffer.getvalue(), media_type="audio/wav", headers={"Cache-Control": "private, max-age=600"})


@router.get(
    "/{job_id}/archive.zip",
    response_class=Response,
    responses=file_response(["application/zip"], 404, 409),
    summary="Everything in one file",
)
async def archive(job_id: str, service: Served) -> Response:
    return await _archived(service, job_id, 200, {})


def _finished(service: Service, job_id: str) -> tuple[Path, Outcome]:
    """Give a finished job's folder and result; Problem (409) for one that isn't."""
    job = service.store.job(job_id)
    if job.result is None:
        raise Problem(409, f"the separation is {job.status}; it has no sounds{' yet' * (job.status != 'failed')}")
    return service.store.path(job_id), job.result


def _explained(service: Service, job_id: str) -> Path:
    """Give a finished job's folder, where its first window was kept; else Problem (404)."""
    folder, result = _finished(service, job_id)
    if not result.explained:
        raise Problem(
            404, "the separator that made these sounds doesn't explain them: it has no bases and no relation map"
        )
    return folder


async def _of(service: Service, job_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a job's files, which may be deleted meanwhile."""
    try:
        return await run_in_threadpool(function, *arguments)
    except Exception:
        service.store.path(job_id)
        raise


async def _archived(service: Service, job_id: str, status: int, headers: dict[str, str]) -> Response:
    folder, result = _finished(service, job_id)
    files: dict[str, Path | bytes] = {p.name: p for p in sorted((folder / TRACKS).glob("*.wav"))}
    if result.explained:
        files["relation_map.png"] = await _of(service, job_id, window.relation_png, folder)
    described = describe(service.store.job(job_id), service.config.results_ttl_s)
    files["separation.json"] = described.model_dump_json(indent=1).encode()
    named = {"Content-Disposition": f'attachment; filename="separation-{job_id[:8]}.zip"'}
    return StreamingResponse(zip(files), status, {**headers, **named}, "application/zip")
