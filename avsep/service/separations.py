"""The routes of separations: make one, follow it, and fetch what it found."""
# ruff: noqa: D103  (a route's summary says it)

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import soundfile
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from avsep.edits import Edits
from avsep.outputs import FORMATS, MIXTURE, lacks
from avsep.service import located, mixing, window
from avsep.service.answers import EditsBody, Job, LocationMaps, RelationMap
from avsep.service.archive import converted, zip
from avsep.service.editing import MOST_BYTES, sounds_of
from avsep.service.problems import (
    AUDIO,
    EDITS_SCHEMA,
    JSON,
    UPLOAD_SCHEMA,
    VIDEO,
    Problem,
    file_response,
    problems,
)
from avsep.service.requests import check_format, describe, preferences, wants_archive
from avsep.service.results import UPLOAD, NoSuchJob, StoreFull
from avsep.service.service import Service, service_of
from avsep.service.state import Outcome
from avsep.service.window import TRACKS

Served = Annotated[Service, Depends(service_of)]
router = APIRouter(prefix="/v1/separations", redirect_slashes=False)
_PNG = file_response(["image/png"], 404, 409)
_FRAME = file_response(["image/png"], 404, 409, 422)


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
    summary="One sound: an object's, _rest or _mixture; of two stems the rest is no_OBJECT",
)
async def track(job_id: str, track: str, kind: str, service: Served) -> Response:
    folder, result = _finished(service, job_id)
    names = {*_tracks(service, job_id, result).values(), MIXTURE}
    if track not in names or kind not in AUDIO:
        raise Problem(404, f"the sounds are {', '.join(sorted(names))}, each as .{', .'.join(AUDIO)}")
    if fact := lacks(kind, result.sample_rate, result.channels):
        raise Problem(404, f"{fact}; take .wav")
    path: Path | bytes = (folder / TRACKS if track == MIXTURE else sounds_of(folder, result)) / f"{track}.wav"
    if kind != "wav":
        path = await _of(service, job_id, converted, path, kind)
    if isinstance(path, bytes):
        return Response(path, media_type=AUDIO[kind])
    stat = await _of(service, job_id, path.stat)  # a job deleted since is a 404 here, and a 500 within the response
    return FileResponse(
        path, stat_result=stat, media_type=AUDIO[kind], filename=path.name, content_disposition_type="inline"
    )


_Gains = Annotated[
    str,
    Query(
        description=f"a gain for each sound, from 0 to {mixing.MOST_GAIN:g}, else 1; `_rest` is the rest",
        examples=["violin:0.5,_rest:0"],
    ),
]
_Format = Annotated[str, Query(json_schema_extra={"enum": ["wav", "flac", "mp3"]})]
_NOTE = "`Avsep-Note` says it, where the mix was made softer so that nothing clips, or has fewer channels"


@router.get(
    "/{job_id}/mix",
    response_class=Response,
    responses=file_response((AUDIO[k] for k in FORMATS), 404, 409, 422, 507),
    summary="The sounds mixed anew",
    description=_NOTE,
)
async def mix(job_id: str, service: Served, gains: _Gains = "", format: _Format = "wav") -> Response:
    folder, result = _finished(service, job_id)
    if fact := lacks(check_format(format), result.sample_rate, result.channels):
        raise Problem(422, f"{fact}; give another 'format'")
    made = await _mix(service, job_id, gains)
    return await _once(
        service, job_id, folder, format, made.n_bytes,
        lambda target: made.write(target, format, clips=format != "wav"),
    )  # fmt: skip


@router.get(
    "/{job_id}/mix.{kind}",
    response_class=Response,
    responses=file_response(VIDEO.values(), 404, 409, 422, 507),
    summary="The pictures as they were uploaded, with the sounds mixed anew",
    description=_NOTE,
)
async def mix_video(job_id: str, kind: str, service: Served, gains: _Gains = "") -> Response:
    folder, result = _finished(service, job_id)
    if kind != result.video:
        there = f"its pictures fit into mix.{result.video}" if result.video else "the file has no pictures"
        raise Problem(404, f"there is no mix.{kind[:40]}: {there}")
    made = await _mix(service, job_id, gains)
    limits = service.config.limits().decode
    limits = replace(limits, timeout_s=max(limits.timeout_s, result.duration_s))
    n_bytes = 2 * made.n_bytes + await _of(service, job_id, lambda: (folder / UPLOAD).stat().st_size)
    return await _once(
        service, job_id, folder, kind, n_bytes, lambda target: mixing.write_video(made, folder, target, limits)
    )


async def _mix(service: Service, job_id: str, text: str) -> mixing.Mix:
    """Return a finished job's mix; Problem (422) for gains that are none."""
    folder, result = _finished(service, job_id)
    tracks = _tracks(service, job_id, result)
    try:
        gains = mixing.parse_gains(text, [*tracks])
    except ValueError as error:
        raise Problem(422, str(error)) from None
    made: mixing.Mix = await _of(
        service, job_id, mixing.mix_of, sounds_of(folder, result), {tracks[n]: g for n, g in gains.items()}
    )
    return made


async def _once(
    service: Service, job_id: str, folder: Path, kind: str, n_bytes: int, write: Callable[[Path], str]
) -> Response:
    """Have a file of at most `n_bytes` written, send it with what `write` says of it, and remove it."""
    target = folder / f"mix.{secrets.token_hex(4)}.{kind}"
    async with service.mixing:
        await _of(service, job_id, service.store.make_room, job_id, n_bytes)
        try:
            note = await _of(service, job_id, write, target)
            stat = await _of(service, job_id, target.stat)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return _SentOnce(
        target, stat_result=stat, media_type={**AUDIO, **VIDEO}[kind], filename=f"mix-{job_id[:8]}.{kind}",
        headers={"Avsep-Note": note} if note else None,
    )  # fmt: skip


class _SentOnce(FileResponse):
    """A file that goes when it has been sent, or its client has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


@router.get(
    "/{job_id}/relation", response_model=RelationMap, responses=problems(404, 409),
    summary="The relation map as data",
)  # fmt: skip
async def relation(job_id: str, service: Served) -> Any:
    _, kept_in = _explained(service, job_id)
    return JSONResponse(await _of(service, job_id, window.relation, kept_in))


@router.get("/{job_id}/relation.png", response_class=Response, responses=_PNG, summary="The relation map as a picture")
async def relation_png(job_id: str, service: Served) -> Response:
    drawn = await _of(service, job_id, window.relation_png, *_explained(service, job_id))
    return Response(drawn, media_type="image/png")


@router.get("/{job_id}/frame.png", response_class=Response, responses=_FRAME, summary="A picture of the video")
async def frame(job_id: str, service: Served, marked: bool = True) -> Response:
    folder, result = _finished(service, job_id)
    if not result.has_image:
        raise Problem(404, "the file has no pictures")
    if marked and result.located:
        return Response(await _of(service, job_id, located.marked_png, folder), media_type="image/png")
    path = located.image_path(folder)
    return FileResponse(path, stat_result=await _of(service, job_id, path.stat), media_type="image/png")


@router.get(
    "/{job_id}/locations", response_model=LocationMaps, responses=problems(404, 409),
    summary="Where the objects are in the pictures",
)  # fmt: skip
async def locations(job_id: str, service: Served) -> Any:
    folder, result = _finished(service, job_id)
    if not result.located:
        raise Problem(404, "it isn't known where the objects are: nobody looked, or the picture network can't say")
    return JSONResponse(await _of(service, job_id, located.maps, folder))


@router.get(
    "/{job_id}/bases/{basis}.wav",
    response_class=Response,
    responses=file_response(["audio/wav"], 404, 409, 422),
    summary="One basis alone, in the first window",
)
async def basis(job_id: str, basis: int, service: Served) -> Response:
    folder, _ = _explained(service, job_id)
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


@router.get(
    "/{job_id}/edits", response_model=EditsBody, responses=problems(404, 409),
    summary="What was corrected by hand, to be used again",
)  # fmt: skip
async def edits(job_id: str, service: Served) -> Any:
    result = _editable(service, job_id)
    made = Edits() if result.edits is None else Edits.from_dict(result.edits)
    headers = {"Content-Disposition": f'attachment; filename="edits-{job_id[:8]}.json"'}
    return Response(replace(made, duration_s=result.duration_s).to_json(), 200, headers, JSON)


@router.patch(
    "/{job_id}", response_model=Job, responses=problems(404, 408, 409, 413, 422, 503, 507),
    openapi_extra=EDITS_SCHEMA, summary="Correct it by hand",
)  # fmt: skip
async def edit(job_id: str, request: Request, service: Served) -> Response:
    """Move bases, add objects or take them away, mark spans; the sounds are rendered again, and the result changes.

    The edits are all that are to be made, in place of earlier ones; `{}` brings the first sounds back.
    """
    _editable(service, job_id)
    if service.busy:
        raise Problem(503, f"{service.working} separations are in progress, no more are taken now", "busy")
    body = await service.read_small(request, MOST_BYTES)
    try:
        job = await service.edit(job_id, Edits.from_json(body))
    except ValueError as error:
        raise Problem(422, str(error), "edits") from None
    return Response(describe(job, service.config.results_ttl_s).model_dump_json(), 200, {}, JSON)


def _editable(service: Service, job_id: str) -> Outcome:
    """Give a finished job's result, where its bases were kept; else Problem (409)."""
    _, result = _finished(service, job_id)
    if not result.editable:
        raise Problem(409, "this separation can't be edited: its separator shares no bases among objects", "no_bases")
    return result


def _finished(service: Service, job_id: str) -> tuple[Path, Outcome]:
    """Give a finished job's folder and result; Problem (409) for one that isn't."""
    job = service.store.job(job_id)
    if job.result is None:
        raise Problem(409, f"the separation is {job.status}; it has no sounds{' yet' * (job.status != 'failed')}")
    return service.store.path(job_id), job.result


def _tracks(service: Service, job_id: str, result: Outcome) -> dict[str, str]:
    """Name a result's sounds and their files, as `Options.tracks`."""
    return service.store.job(job_id).options.tracks(o.name for o in result.objects)


def _explained(service: Service, job_id: str) -> tuple[Path, Path]:
    """Give a finished job's folder, and that of its first window as it is now; Problem (404) where none was kept."""
    folder, result = _finished(service, job_id)
    if not result.explained:
        raise Problem(
            404, "the separator that made these sounds doesn't explain them: it has no bases and no relation map"
        )
    return folder, folder / result.edited


async def _of(service: Service, job_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a job's files, which may be deleted meanwhile."""
    try:
        return await run_in_threadpool(function, *arguments)
    except Exception:
        service.store.path(job_id)
        raise


async def _archived(service: Service, job_id: str, status: int, headers: dict[str, str]) -> Response:
    folder, result = _finished(service, job_id)
    format = service.store.job(job_id).options.format
    files: dict[str, Path | bytes] = {}
    for name in (*_tracks(service, job_id, result).values(), MIXTURE):
        sound = (folder / TRACKS if name == MIXTURE else sounds_of(folder, result)) / f"{name}.wav"
        files[f"{name}.{format}"] = sound if format == "wav" else await _of(service, job_id, converted, sound, format)
    if result.explained:
        files["relation_map.png"] = await _of(service, job_id, window.relation_png, folder, folder / result.edited)
    if result.edits is not None:
        files["edits.json"] = Edits.from_dict(result.edits).to_json().encode()
    described = describe(service.store.job(job_id), service.config.results_ttl_s)
    files["separation.json"] = described.model_dump_json(indent=1).encode()
    named = {"Content-Disposition": f'attachment; filename="separation-{job_id[:8]}.zip"'}
    return StreamingResponse(zip(files), status, {**headers, **named}, "application/zip")
