"""The service's HTTP API and page, as a FastAPI application; `run` does the work, wherever that is."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import soundfile
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from avsep.objects import OBJECTS
from avsep.separation import REST
from avsep.service import window
from avsep.service.answers import (
    Example,
    Health,
    Job,
    Limits,
    ModelInfo,
    ObjectInfo,
    RelationMap,
)
from avsep.service.archive import converted, zip
from avsep.service.guard import FILES, Guard
from avsep.service.jobs import as_failure
from avsep.service.problems import AUDIO, JSON, UPLOAD_SCHEMA, Problem, file_response, problem, problems
from avsep.service.requests import describe, preferences, wants_archive
from avsep.service.results import NoSuchJob, StoreFull
from avsep.service.service import VERSION, Service, log
from avsep.service.uploads import BadUpload
from avsep.service.window import TRACKS
from avsep.videos import MIXTURE

PAGE = Path(__file__).parent / "page"


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> FastAPI:
    """Build the application."""
    config, store = service.config, service.store

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for job_id in store.unfinished():  # of an ingress that died
            service.start(job_id)
        sweeper = asyncio.create_task(service.sweep_forever())
        yield
        sweeper.cancel()

    app = FastAPI(
        title="avsep",
        version=VERSION,
        description="Separate a video's sound into its objects.",
        docs_url=None,  # FastAPI's own loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, service=service)

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(BadUpload)
    async def _bad_upload(_: Request, error: BadUpload) -> Response:
        return problem(error.status, error.detail, as_failure(error)["reason"])

    @app.exception_handler(NoSuchJob)
    async def _no_such_job(_: Request, error: NoSuchJob) -> Response:
        return problem(404, "there is no such separation; it may have expired")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(OSError)
    @app.exception_handler(StoreFull)
    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> Response:
        failure = as_failure(error)
        if failure["status"] == 500 and isinstance(error, OSError):  # others reach the server, which logs them
            log.error("%s %r", request.method, request.scope["path"], exc_info=error)
        return problem(**failure)

    @app.post(
        "/v1/separations",
        status_code=201,
        response_model=Job,
        responses={
            202: {"model": Job, "description": "Accepted; ask its Location"},
            **problems(400, 403, 406, 408, 413, 415, 422, 429, 503, 507),
        },
        openapi_extra=UPLOAD_SCHEMA,
        summary="Separate a video or sound",
    )
    async def create(request: Request) -> Response:
        """Answer with the result, or 202 when it takes longer than `Prefer: wait=N` (`respond-async`: at once)."""
        wait_s = preferences(request.headers.get("prefer", ""), config)
        zipped = wants_archive(request.headers.get("accept", ""))
        try:
            job_id, task = await service.receive(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        headers = {"Location": f"/v1/separations/{job_id}"}
        if wait_s:
            gone = asyncio.create_task(_until_gone(request))
            try:
                await asyncio.wait({task, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                with contextlib.suppress(NoSuchJob):
                    store.delete(job_id)
                raise
            finally:
                gone.cancel()
            if gone.done() and not gone.cancelled() and not task.done():
                store.delete(job_id)
                return Response(status_code=400)
        try:
            job = store.job(job_id)
        except NoSuchJob:  # nobody else knew its id
            raise StoreFull from None
        if job["status"] == "failed":
            store.delete(job_id)
            raise Problem(**job["error"])
        if zipped and job["status"] == "done":
            return await archived(job_id, 201, headers)
        body = describe(job, config.results_ttl_s).model_dump_json()
        return Response(body, 201 if job["status"] == "done" else 202, headers, JSON)

    @app.get(
        "/v1/separations/{job_id}", response_model=Job, responses=problems(404, 406), summary="Progress and result"
    )
    async def read(job_id: str, request: Request) -> Any:
        if wants_archive(request.headers.get("accept", "")):
            return await archived(job_id, 200, {})
        job = describe(store.job(job_id), config.results_ttl_s)
        headers = {} if job.status in ("done", "failed") else {"Retry-After": "1"}
        return Response(job.model_dump_json(), 200, headers, JSON)

    @app.delete("/v1/separations/{job_id}", status_code=204, responses=problems(404), summary="Stop and remove")
    async def remove(job_id: str) -> Response:
        await run_in_threadpool(store.delete, job_id)
        return Response(status_code=204)

    def finished(job_id: str) -> tuple[Path, dict[str, Any]]:
        job = store.job(job_id)
        if job["status"] != "done":
            raise Problem(
                409, f"the separation is {job['status']}; it has no sounds{' yet' * (job['status'] != 'failed')}"
            )
        return store.path(job_id), job["result"]

    async def of(job_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on a job's files, which may be deleted meanwhile."""
        try:
            return await run_in_threadpool(function, *arguments)
        except Exception:
            store.path(job_id)
            raise

    async def archived(job_id: str, status: int, headers: dict[str, str]) -> Response:
        folder, _ = finished(job_id)
        files: dict[str, Path | bytes] = {p.name: p for p in sorted((folder / TRACKS).glob("*.wav"))}
        files["relation_map.png"] = await of(job_id, window.relation_png, folder)
        described = describe(store.job(job_id), config.results_ttl_s)
        files["separation.json"] = described.model_dump_json(indent=1).encode()
        named = {"Content-Disposition": f'attachment; filename="separation-{job_id[:8]}.zip"'}
        return StreamingResponse(zip(files), status, {**headers, **named}, "application/zip")

    @app.get(
        "/v1/separations/{job_id}/tracks/{track}.{kind}",
        response_class=Response,
        responses=file_response(AUDIO.values(), 404, 409, 416),
        summary="One sound: an object's, _rest or _mixture",
    )
    async def track(job_id: str, track: str, kind: str) -> Response:
        folder, result = finished(job_id)
        names = {*(o["name"] for o in result["objects"]), REST, MIXTURE}
        if track not in names or kind not in AUDIO:
            raise Problem(404, f"the sounds are {', '.join(sorted(names))}, each as .wav, .flac and .ogg")
        path: Path | bytes = folder / TRACKS / f"{track}.wav"
        if kind != "wav":
            path = await of(job_id, converted, path, kind)
        if isinstance(path, bytes):
            return Response(path, media_type=AUDIO[kind])
        stat = await of(job_id, path.stat)  # a job deleted since is a 404 here, and a 500 within the response
        return FileResponse(
            path, stat_result=stat, media_type=AUDIO[kind], filename=path.name, content_disposition_type="inline"
        )

    @app.get(
        "/v1/separations/{job_id}/relation", response_model=RelationMap, responses=problems(404, 409),
        summary="The relation map as data",
    )  # fmt: skip
    async def relation(job_id: str) -> Any:
        folder, _ = finished(job_id)
        return JSONResponse(await of(job_id, window.relation, folder))

    png = file_response(["image/png"], 404, 409)

    @app.get(
        "/v1/separations/{job_id}/relation.png", response_class=Response, responses=png,
        summary="The relation map as a picture",
    )  # fmt: skip
    async def relation_png(job_id: str) -> Response:
        folder, _ = finished(job_id)
        return Response(await of(job_id, window.relation_png, folder), media_type="image/png")

    @app.get(
        "/v1/separations/{job_id}/frame.png", response_class=Response, responses=png, summary="A picture of the video"
    )
    async def frame(job_id: str) -> Response:
        folder, result = finished(job_id)
        if not result["has_frame"]:
            raise Problem(404, "the file has no pictures")
        path = window.frame_path(folder)
        return FileResponse(path, stat_result=await of(job_id, path.stat), media_type="image/png")

    @app.get(
        "/v1/separations/{job_id}/bases/{basis}.wav",
        response_class=Response,
        responses=file_response(["audio/wav"], 404, 409, 422),
        summary="One basis alone, in the first window",
    )
    async def basis(job_id: str, basis: int) -> Response:
        folder, _ = finished(job_id)
        try:
            sound, rate = await of(job_id, window.basis_sound, folder, basis)
        except IndexError:
            raise Problem(404, f"there is no basis {basis}") from None
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, rate, format="WAV", subtype="PCM_16")
        return Response(buffer.getvalue(), media_type="audio/wav", headers={"Cache-Control": "private, max-age=600"})

    @app.get(
        "/v1/separations/{job_id}/archive.zip",
        response_class=Response,
        responses=file_response(["application/zip"], 404, 409),
        summary="Everything in one file",
    )
    async def archive(job_id: str) -> Response:
        return await archived(job_id, 200, {})

    @app.get(
        "/v1/objects", response_model=list[ObjectInfo], responses=problems(503),
        summary="The objects, and which of them the model learned",
    )  # fmt: skip
    async def objects() -> Any:
        known = service.card()["learned"]
        return [
            ObjectInfo(name=o.name, learned=o.name in known, imagenet=list(o.imagenet), audioset=o.audioset[0])
            for o in OBJECTS
        ]

    @app.get("/v1/model", response_model=ModelInfo, responses=problems(503), summary="The model in use")
    async def model() -> Any:
        limits = {name: getattr(config, name) for name in Limits.model_fields if name != "free_bytes"}
        room = await run_in_threadpool(store.room)
        return {**service.card(), "limits": Limits(free_bytes=room, **limits)}

    @app.get("/v1/examples", response_model=list[Example], summary="Files to try")
    async def examples() -> Any:
        return [Example(name=n, url=f"/v1/examples/{n}") for n in await service.examples()]

    @app.get("/v1/examples/{name}", response_class=Response, responses=problems(404), summary="One of them")
    async def example(name: str) -> Response:
        files = await service.examples()
        if name not in files:
            raise Problem(404, "there is no such example")
        return FileResponse(files[name])

    @app.get("/healthz", response_model=Health, summary="Whether the service works")
    async def healthz() -> Any:
        return Health(status="ok", version=VERSION, pending=service.pending, busy=service.busy)

    @app.get("/metrics", response_class=Response, summary="For Prometheus")
    async def metrics() -> Response:
        text = await run_in_threadpool(service.metrics.expose)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def file(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            return FileResponse(PAGE / name, media_type=kind, headers={"Cache-Control": "no-cache"})

        return send

    for path, name, kind in FILES:
        app.add_api_route(path, file(name, kind), methods=["GET"], include_in_schema=False)
    return app
