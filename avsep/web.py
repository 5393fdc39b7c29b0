"""The service's HTTP API and page, as a FastAPI application; `run` does the work, wherever that is."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hmac
import http
import importlib.metadata
import io
import logging
import secrets
import shutil
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import soundfile
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avsep import jobs
from avsep.answers import (
    PROBLEM,
    Audio,
    Example,
    Health,
    Job,
    Limits,
    ModelInfo,
    ObjectInfo,
    ProblemBody,
    Relation,
    RelationMap,
    Result,
    SeparatedObject,
)
from avsep.jobs import TRACKS, ServiceConfig, as_failure
from avsep.objects import OBJECTS, find
from avsep.results import UPLOAD, NoSuchJob, StoreFull
from avsep.separation import REST
from avsep.uploads import BadUpload, Uploads, client_of, receive_multipart
from avsep.videos import MIXTURE

PAGE = Path(__file__).parent / "page"
_BODY_SLACK = 1 << 20  # of a multipart body, beside its file
_SWEEP_S = 15.0
_RETRY_S = 2
_MAX_WAIT_S = 60.0
_FILE_CHUNK = 1 << 18
_VORBIS_BLOCK = 4096  # libvorbis puts what it is given on the stack
_PROBES = 4  # files whose headers are read together
_LONGEST_NAME = 40  # of an object
_USUAL_OBJECTS = 2  # of a file, where a client names none; room for more is kept once they are found
VERSION = importlib.metadata.version("avsep")
_JSON = "application/json"
_ZIP = "application/zip"
_PROBLEM = "application/problem+json"
log = logging.getLogger("avsep.web")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Busy(Exception):
    """There is too much work in progress to take more."""


class WorkerLost(Exception):
    """Whoever did the work died, again and again."""


class Problem(Exception):
    """An answer that isn't what was asked for (RFC 9457)."""

    def __init__(self, status: int, detail: str, reason: str = "", cause: str = "") -> None:
        super().__init__(detail)
        self.status, self.detail, self.reason, self.cause = status, detail, reason, cause

    def response(self) -> JSONResponse:
        """Return the answer."""
        return problem(self.status, self.detail, self.reason, self.cause)


def problem(
    status: int, detail: str, reason: str = "", cause: str = "", headers: dict[str, str] | None = None
) -> JSONResponse:
    """Answer with `application/problem+json`."""
    body = {"title": http.HTTPStatus(status).phrase, "status": status, "detail": detail}
    body |= {name: text for name, text in (("reason", reason), ("cause", cause)) if text}
    headers = dict(headers or {})
    if status in (429, 503, 507):
        headers.setdefault("Retry-After", str(_RETRY_S))
    return JSONResponse(body, status, headers, media_type=_PROBLEM)


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {
        code: {"description": http.HTTPStatus(code).phrase, "content": {_PROBLEM: {"schema": _PROBLEM_SCHEMA}}}
        for code in codes
    }


def _file(kinds: Iterable[str], *codes: int) -> dict[int | str, dict[str, Any]]:
    return {
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}},
        **_problems(*codes),
    }


_PROBLEM_SCHEMA = {**ProblemBody.model_json_schema(), "examples": [PROBLEM]}
_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "a video or sound"},
                        "url": {"type": "string", "description": "instead of a file, where the operator allows it"},
                        "objects": {"type": "string", "description": "comma-separated names; else they are found"},
                        "bases": {"type": "string", "enum": ["own", "learned", "both"]},
                    },
                }
            }
        },
    }
}


# ------------------------------------------------------------------------------- the service


class Metrics:
    """What Prometheus is told."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "avsep_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "avsep_request_seconds",
            "HTTP requests' duration",
            ["route"],
            buckets=(0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.separations = Counter("avsep_separations", "Finished separations", ["outcome"], registry=self.registry)
        self.stages = Histogram(
            "avsep_stage_seconds",
            "Stages of separations",
            ["stage"],
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=self.registry,
        )
        self.sound = Counter("avsep_sound_seconds", "Separated sound", registry=self.registry)
        pending = Gauge("avsep_pending", "Unfinished separations", registry=self.registry)
        pending.set_function(lambda: service.working)
        uploads = Gauge("avsep_uploads", "Unfinished uploads", registry=self.registry)
        uploads.set_function(lambda: len(service.uploads))
        limit = Gauge("avsep_pending_limit", "How many are taken at once", registry=self.registry)
        limit.set(service.config.max_pending)
        stored = Gauge("avsep_stored_jobs", "Jobs in the store", ["status"], registry=self.registry)
        bytes_ = Gauge("avsep_stored_bytes", "Bytes in the store", registry=self.registry)

        def usage() -> None:
            counts = service.store.usage()
            bytes_.set(counts.pop("bytes"))
            for status, count in counts.items():
                stored.labels(status).set(count)

        self.usage = usage

    def expose(self) -> bytes:
        """Return the text format."""
        self.usage()
        return generate_latest(self.registry)


class Service:
    """Jobs in progress, and the store they end in."""

    def __init__(self, config: ServiceConfig, run: Callable[[str], Awaitable[None]]) -> None:
        self.config, self.store, self._run = config, config.store(), run
        self.working = 0  # jobs that wait or are done
        self.uploads = Uploads(
            config.max_uploads,
            config.max_uploads_per_client,
            config.min_upload_rate,
            config.upload_grace_s,
            config.max_upload_s,
        )
        self._probing, self._reserving = asyncio.Semaphore(_PROBES), asyncio.Lock()
        self.metrics = Metrics(self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._card: dict[str, Any] | None = None
        with contextlib.suppress(OSError, ValueError):
            self._card = jobs.model_card(config.model)
        self._examples: list[Path] | None = None
        self._examples_lock = asyncio.Lock()

    def card(self) -> dict[str, Any]:
        """Describe the model; as it last was while its directory holds none, as in training. Problem (503) before."""
        try:
            self._card = jobs.model_card(self.config.model)
        except (OSError, ValueError) as error:
            log.warning("the model can't be described: %s", error)
            if self._card is None:
                raise Problem(503, "the model can't be read now; try again later", "model") from None
        return self._card

    @property
    def pending(self) -> int:
        """Uploads and jobs in progress."""
        return len(self.uploads) + self.working

    @property
    def busy(self) -> bool:
        """Whether there is too much work to begin another upload."""
        return self.working >= self.config.max_pending

    async def receive(self, request: Request) -> tuple[str, asyncio.Task[None]]:
        """Make a job of a request's body and have it done, as `start` does; what raises leaves nothing behind."""
        if self.busy:  # an upload that was begun before is taken all the same
            raise Problem(503, f"{self.working} separations are in progress, no more are taken now", "busy")
        client = client_of(request.client.host if request.client else "")
        async with self.uploads.take(client, request.stream()) as body:
            job_id = self.store.create()
            try:
                n_bytes = int(request.headers.get("content-length", self.config.max_upload_bytes))
                await run_in_threadpool(self.store.reserve, job_id, n_bytes)
                upload = self.store.path(job_id) / UPLOAD
                kind = request.headers.get("content-type", "")
                fields = await receive_multipart(body, kind, upload, self.config.max_upload_bytes)
                options = parse_options(
                    fields,
                    has_file=upload.exists(),
                    urls=self.config.allow_urls,
                    dictionary=self.card()["dictionary"],
                )
                await self._reserve(job_id, options)
                self.store.update(job_id, status="queued", options=options, queued=time.time())
            except BaseException:
                with contextlib.suppress(NoSuchJob):
                    self.store.delete(job_id)
                raise
            return job_id, self.start(job_id)

    async def _reserve(self, job_id: str, options: dict[str, Any]) -> None:
        """Keep the room that a job will need, as far as that is known before it is begun."""
        n_tracks = len(options.get("objects", range(_USUAL_OBJECTS))) + 2  # with the rest and the mixture
        if "url" not in options:
            async with self._probing:
                await run_in_threadpool(jobs.measure, self.config, self.store, job_id)
        async with self._reserving:
            try:
                if "url" in options:
                    await run_in_threadpool(self.store.reserve, job_id, self.config.max_upload_bytes)
                else:
                    await run_in_threadpool(jobs.reserve, self.config, self.store, job_id, n_tracks)
            except StoreFull:
                self.store.delete(job_id)  # before the next one asks
                raise

    def start(self, job_id: str) -> asyncio.Task[None]:
        """Have a job done; the task ends when its state says how it ended."""
        self.working += 1
        # in a context of its own: the request may be cancelled, and the job still be wanted
        task = asyncio.get_running_loop().create_task(self._do(job_id), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _do(self, job_id: str) -> None:
        failure = None
        try:
            await asyncio.wait_for(self._run(job_id), self.config.max_work_s + 30)
        except Busy:
            failure = {"status": 503, "reason": "busy", "detail": "too many separations wait; try again later"}
        except WorkerLost:
            failure = {"status": 503, "reason": "worker_lost", "detail": "the work was lost; try again later"}
        except TimeoutError:
            failure = as_failure(jobs.OutOfTime())
        except Exception as error:
            log.exception("job %s", job_id)
            failure = as_failure(error)
        finally:
            self.working -= 1
        with contextlib.suppress(NoSuchJob, OSError):
            if failure is not None and self.store.job(job_id)["status"] not in ("done", "failed"):
                jobs.fail(self.store, job_id, failure)
            self._count(self.store.job(job_id))

    def _count(self, job: dict[str, Any]) -> None:
        self.metrics.separations.labels(job["error"]["reason"] if "error" in job else job["status"]).inc()
        if "result" in job:
            self.metrics.sound.inc(job["result"]["duration_s"])
            for stage, seconds in job["result"]["timings"].items():
                self.metrics.stages.labels(stage.removesuffix("_s")).observe(seconds)

    async def sweep_forever(self) -> None:
        """Let results expire."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            with contextlib.suppress(Exception):
                await run_in_threadpool(self.store.sweep)

    async def examples(self) -> dict[str, Path]:
        """Return the files that the page offers; without a folder of them two are rendered at first need."""
        async with self._examples_lock:
            if self._examples is None:
                folder = Path(self.config.examples or Path(self.store.root, "examples"))
                if self.config.examples is None:
                    await run_in_threadpool(render_examples, folder)
                self._examples = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        return {p.stem: p for p in self._examples}


def render_examples(folder: Path) -> None:
    """Render two clips, a duet and a trio, with drawn pictures."""
    from avsep import synthetic

    folder.mkdir(exist_ok=True)
    for number, n_objects in enumerate((2, 3)):
        scene = synthetic.render_scene(number, "test", 11, synthetic.SceneConfig(), n_objects)
        work = folder / ".work"
        segment = synthetic.write_scene(scene, work)
        name = "-and-".join(n.replace("_", "-") for n in scene.plan.audible)
        (work / segment.source).rename(folder / f"{name}.mp4")
        shutil.rmtree(work)


def describe(job: dict[str, Any], ttl_s: float) -> Job:
    """Turn a job's state into what clients get: links in place of files, nothing of the server."""
    base = f"/v1/separations/{job['id']}"

    def audio(track: str) -> Audio:
        return Audio(**{kind: f"{base}/{TRACKS}/{track}.{kind}" for kind in _AUDIO})

    result = None
    if job["status"] == "done":
        r = job["result"]
        result = Result(
            objects=[SeparatedObject(found=o["from"], audio=audio(o["name"]), **o) for o in r["objects"]],
            rest=audio(REST),
            mixture=audio(MIXTURE),
            relation=Relation(data=f"{base}/relation", png=f"{base}/relation.png"),
            frame=f"{base}/frame.png" if r["has_frame"] else None,
            archive=f"{base}/archive.zip",
            **{k: v for k, v in r.items() if k not in ("objects", "rest")},
        )
    error = job.get("error")
    finished = job.get("finished")
    return Job(
        id=job["id"],
        status=job["status"],
        stage=job.get("stage"),
        progress=job["progress"],
        created=datetime.fromtimestamp(job["created"], UTC),
        expires=datetime.fromtimestamp(finished + ttl_s, UTC) if finished else None,
        error=None if error is None else ProblemBody(title=http.HTTPStatus(error["status"]).phrase, **error),
        result=result,
    )


def parse_options(fields: dict[str, list[str]], *, has_file: bool, urls: bool, dictionary: bool) -> dict[str, Any]:
    """Check a request's fields; Problem says what is wrong with them."""
    known = {"url", "objects", "bases"}
    for name, values in fields.items():
        if name not in known:
            raise Problem(422, f"unknown field {name[:40]!r}; there are file, {', '.join(sorted(known))}")
        if len(values) > 1 and name != "objects":
            raise Problem(422, f"the field {name!r} is there {len(values)} times")
    options: dict[str, Any] = {}
    url = fields.get("url", [""])[0].strip()
    if has_file == bool(url):
        raise Problem(422, "send either a 'file' or a 'url'" if url else "send a video or sound as the field 'file'")
    if url:
        if not urls:
            raise Problem(403, "this service takes files only, no URLs")
        if not url.startswith(("http://", "https://", "youtube:")):
            raise Problem(422, "a 'url' is http://…, https://… or youtube:ID")
        options["url"] = url
    if "objects" in fields:
        names = [n.strip() for value in fields["objects"] for n in value.split(",")]
        try:
            options["objects"] = list(dict.fromkeys(find(n[:_LONGEST_NAME]) for n in names if n))
        except ValueError as error:
            raise Problem(422, str(error)) from None
        if not options["objects"]:
            raise Problem(422, "'objects' names none; leave it out to have them found")
    bases = fields.get("bases", [""])[0]
    if bases:
        if bases not in ("own", "learned", "both"):
            raise Problem(422, f"'bases' is {bases[:40]!r}; it is own, learned or both")
        if bases != "own" and not dictionary:
            raise Problem(422, "this model has learned no bases; leave 'bases' out")
        options["bases"] = bases
    return options


def wants_archive(accept: str) -> bool:
    """Tell whether a client would rather have the sounds than a description; Problem (406) for neither."""
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    if kinds & {"", "*/*", "application/*", _JSON}:
        return False
    if _ZIP in kinds:
        return True
    raise Problem(406, f"the answer is {_JSON} or {_ZIP}")


def preferences(header: str, config: ServiceConfig) -> float:
    """Read how many seconds a client waits (RFC 7240: `respond-async`, `wait=N`)."""
    wait_s = config.answer_within_s
    for token in header.split(","):
        name, _, value = token.strip().partition("=")
        if name.lower() == "respond-async":
            return 0.0
        if name.lower() == "wait" and value.strip('" ').isdecimal():
            wait_s = min(float(value.strip('" ')), _MAX_WAIT_S)
    return wait_s


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _converted(path: Path, kind: str) -> Path | bytes:
    """Convert a WAV once; on a full disk for this once, in memory."""
    target = path.with_suffix(f".{kind}")
    if target.exists():
        return target
    part = target.with_suffix(f".{secrets.token_hex(4)}.part")  # others may be asking for it too
    try:
        _encode(path, part, kind)
        part.replace(target)
    except (OSError, soundfile.LibsndfileError) as error:
        if not path.exists() or as_failure(error)["status"] != 507:
            raise
        memory = io.BytesIO()
        _encode(path, memory, kind)
        return memory.getvalue()
    finally:
        part.unlink(missing_ok=True)
    return target


def _encode(path: Path, target: Path | io.BytesIO, kind: str) -> None:
    subtype, block = {"flac": ("PCM_24", _FILE_CHUNK), "ogg": ("VORBIS", _VORBIS_BLOCK)}[kind]
    with (
        soundfile.SoundFile(path) as source,
        soundfile.SoundFile(target, "w", source.samplerate, source.channels, subtype, format=kind) as encoded,
    ):
        for samples in source.blocks(block, dtype="float32"):
            encoded.write(samples)


class _Outlet(io.RawIOBase):
    """A stream that a ZIP is written to and read from in turns."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)

    def take(self) -> bytes:
        data, self.data = bytes(self.data), bytearray()
        return data


def _zip(files: dict[str, Path | bytes]) -> Iterator[bytes]:
    """Write a ZIP as it is sent: nothing on disk, little in memory."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            with (
                archive.open(name, "w", force_zip64=True) as member,
                io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source,
            ):
                while data := source.read(_FILE_CHUNK):
                    member.write(data)
                    yield outlet.take()
    yield outlet.take()


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
    app.add_middleware(_Guard, service=service)

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
            **_problems(400, 403, 406, 408, 413, 415, 422, 429, 503, 507),
        },
        openapi_extra=_UPLOAD_SCHEMA,
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
        return Response(body, 201 if job["status"] == "done" else 202, headers, _JSON)

    @app.get(
        "/v1/separations/{job_id}", response_model=Job, responses=_problems(404, 406), summary="Progress and result"
    )
    async def read(job_id: str, request: Request) -> Any:
        if wants_archive(request.headers.get("accept", "")):
            return await archived(job_id, 200, {})
        job = describe(store.job(job_id), config.results_ttl_s)
        headers = {} if job.status in ("done", "failed") else {"Retry-After": "1"}
        return Response(job.model_dump_json(), 200, headers, _JSON)

    @app.delete("/v1/separations/{job_id}", status_code=204, responses=_problems(404), summary="Stop and remove")
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
        files["relation_map.png"] = await of(job_id, jobs.relation_png, folder)
        described = describe(store.job(job_id), config.results_ttl_s)
        files["separation.json"] = described.model_dump_json(indent=1).encode()
        named = {"Content-Disposition": f'attachment; filename="separation-{job_id[:8]}.zip"'}
        return StreamingResponse(_zip(files), status, {**headers, **named}, "application/zip")

    @app.get(
        "/v1/separations/{job_id}/tracks/{track}.{kind}",
        response_class=Response,
        responses=_file(_AUDIO.values(), 404, 409, 416),
        summary="One sound: an object's, _rest or _mixture",
    )
    async def track(job_id: str, track: str, kind: str) -> Response:
        folder, result = finished(job_id)
        names = {*(o["name"] for o in result["objects"]), REST, MIXTURE}
        if track not in names or kind not in _AUDIO:
            raise Problem(404, f"the sounds are {', '.join(sorted(names))}, each as .wav, .flac and .ogg")
        path: Path | bytes = folder / TRACKS / f"{track}.wav"
        if kind != "wav":
            path = await of(job_id, _converted, path, kind)
        if isinstance(path, bytes):
            return Response(path, media_type=_AUDIO[kind])
        stat = await of(job_id, path.stat)  # a job deleted since is a 404 here, and a 500 within the response
        return FileResponse(
            path, stat_result=stat, media_type=_AUDIO[kind], filename=path.name, content_disposition_type="inline"
        )

    @app.get(
        "/v1/separations/{job_id}/relation", response_model=RelationMap, responses=_problems(404, 409),
        summary="The relation map as data",
    )  # fmt: skip
    async def relation(job_id: str) -> Any:
        folder, _ = finished(job_id)
        return JSONResponse(await of(job_id, jobs.relation, folder))

    png = _file(["image/png"], 404, 409)

    @app.get(
        "/v1/separations/{job_id}/relation.png", response_class=Response, responses=png,
        summary="The relation map as a picture",
    )  # fmt: skip
    async def relation_png(job_id: str) -> Response:
        folder, _ = finished(job_id)
        return Response(await of(job_id, jobs.relation_png, folder), media_type="image/png")

    @app.get(
        "/v1/separations/{job_id}/frame.png", response_class=Response, responses=png, summary="A picture of the video"
    )
    async def frame(job_id: str) -> Response:
        folder, result = finished(job_id)
        if not result["has_frame"]:
            raise Problem(404, "the file has no pictures")
        path = jobs.frame_path(folder)
        return FileResponse(path, stat_result=await of(job_id, path.stat), media_type="image/png")

    @app.get(
        "/v1/separations/{job_id}/bases/{basis}.wav",
        response_class=Response,
        responses=_file(["audio/wav"], 404, 409, 422),
        summary="One basis alone, in the first window",
    )
    async def basis(job_id: str, basis: int) -> Response:
        folder, _ = finished(job_id)
        try:
            sound, rate = await of(job_id, jobs.basis_sound, folder, basis)
        except IndexError:
            raise Problem(404, f"there is no basis {basis}") from None
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, rate, format="WAV", subtype="PCM_16")
        return Response(buffer.getvalue(), media_type="audio/wav", headers={"Cache-Control": "private, max-age=600"})

    @app.get(
        "/v1/separations/{job_id}/archive.zip",
        response_class=Response,
        responses=_file(["application/zip"], 404, 409),
        summary="Everything in one file",
    )
    async def archive(job_id: str) -> Response:
        return await archived(job_id, 200, {})

    @app.get(
        "/v1/objects", response_model=list[ObjectInfo], responses=_problems(503),
        summary="The objects, and which of them the model learned",
    )  # fmt: skip
    async def objects() -> Any:
        known = service.card()["learned"]
        return [
            ObjectInfo(name=o.name, learned=o.name in known, imagenet=list(o.imagenet), audioset=o.mid) for o in OBJECTS
        ]

    @app.get("/v1/model", response_model=ModelInfo, responses=_problems(503), summary="The model in use")
    async def model() -> Any:
        limits = {name: getattr(config, name) for name in Limits.model_fields if name != "free_bytes"}
        room = await run_in_threadpool(store.room)
        return {**service.card(), "limits": Limits(free_bytes=room, **limits)}

    @app.get("/v1/examples", response_model=list[Example], summary="Files to try")
    async def examples() -> Any:
        return [Example(name=n, url=f"/v1/examples/{n}") for n in await service.examples()]

    @app.get("/v1/examples/{name}", response_class=Response, responses=_problems(404), summary="One of them")
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

    for path, name, kind in _FILES:
        app.add_api_route(path, file(name, kind), methods=["GET"], include_in_schema=False)
    return app


_AUDIO = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg"}
_FILES = (
    ("/", "index.html", "text/html"),
    ("/docs", "docs.html", "text/html"),
    ("/static/page.js", "page.js", "text/javascript"),
    ("/static/docs.js", "docs.js", "text/javascript"),
    ("/static/page.css", "page.css", "text/css"),
    ("/static/icon.svg", "icon.svg", "image/svg+xml"),
)
_OPEN = {"/healthz", *(path for path, *_ in _FILES)}  # without a token: they tell nothing


class _Guard:
    """Around everything: the token, other sites' requests, declared lengths, headers, counts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # whoever asked leaves the body out

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                extra = HEADERS if b"cache-control" in present else {**HEADERS, "cache-control": "no-store"}
                if (status >= 400 and unbounded) or status in (408, 429):
                    extra = {**extra, "connection": "close"}  # else the rest of the body would be waited for
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in present),
                ]
            await send(message)

        request = Request(scope)
        unbounded = "transfer-encoding" in request.headers
        try:
            refused = self._refuse(request)
            await (refused or self._app)(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = 499  # the client is gone
            raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
            self._service.metrics.requests.labels(method, path, str(status)).inc()
            self._service.metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _refuse(self, request: Request) -> ASGIApp | None:
        config = self._service.config
        if config.token and request.scope["path"] not in _OPEN:  # not the URL's: a Host header is in that
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), config.token.encode()):
                return problem(401, "send the service's token as 'Authorization: Bearer …'",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if request.method not in ("GET", "HEAD") and request.headers.get("sec-fetch-site") == "cross-site":
            return problem(403, "other sites' pages may not use this service")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal():
            return problem(400, "the content length is no number")
        if int(length[:20]) > config.max_upload_bytes + _BODY_SLACK:
            return problem(413, f"the body may have {config.max_upload_bytes} bytes", headers={"Connection": "close"})
        return None
