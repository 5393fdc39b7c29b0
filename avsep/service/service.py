"""The queue of separations and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib.metadata
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool

from avsep.edits import Edits
from avsep.service import editing, hotmodel, jobs
from avsep.service.answers import Card
from avsep.service.config import ServiceConfig
from avsep.service.elsewhere import Busy, OutOfTime, WorkerLost
from avsep.service.failures import as_failure
from avsep.service.problems import Problem
from avsep.service.requests import parse_options
from avsep.service.results import UPLOAD, NoSuchJob, StoreFull
from avsep.service.state import Options, State
from avsep.service.uploads import Uploads, client_of, receive_multipart

_SWEEP_S = 15.0
_PROBES = 4  # files whose headers are read together
_MIXES = 2  # made at a time
USUAL_OBJECTS = 2  # of a file, where a client names none; room for more is kept once they are found
VERSION = importlib.metadata.version("avsep")
log = logging.getLogger("avsep.service")


class Metrics:
    """What Prometheus is told."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("avsep_requests", "HTTP requests", ["method", "route", "status"], registry=registry)
        self.seconds = Histogram(
            "avsep_request_seconds", "HTTP requests' duration", ["route"], registry=registry,
            buckets=(0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
        )  # fmt: skip
        self.separations = Counter("avsep_separations", "Finished separations", ["outcome"], registry=registry)
        self.stages = Histogram(
            "avsep_stage_seconds", "Stages of separations", ["stage"], registry=registry,
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
        )  # fmt: skip
        self.sound = Counter("avsep_sound_seconds", "Separated sound", registry=registry)
        pending = Gauge("avsep_pending", "Unfinished separations", registry=registry)
        pending.set_function(lambda: service.working)
        uploads = Gauge("avsep_uploads", "Unfinished uploads", registry=registry)
        uploads.set_function(lambda: len(service.uploads))
        limit = Gauge("avsep_pending_limit", "How many are taken at once", registry=registry)
        limit.set(service.config.max_pending)
        self._stored = Gauge("avsep_stored_jobs", "Jobs in the store", ["status"], registry=registry)
        self._bytes = Gauge("avsep_stored_bytes", "Bytes in the store", registry=registry)

    def count(self, job: State) -> None:
        """Count a job that is finished."""
        self.separations.labels(job.error.reason if job.error else job.status).inc()
        if job.result:
            self.sound.inc(job.result.duration_s)
            for stage, seconds in job.result.timings.items():
                self.stages.labels(stage.removesuffix("_s")).observe(seconds)

    def expose(self) -> bytes:
        """Return the text format."""
        counts = self._service.store.usage()
        self._bytes.set(counts.pop("bytes"))
        for status, count in counts.items():
            self._stored.labels(status).set(count)
        return generate_latest(self.registry)


class Service:
    """Jobs in progress, and the store they end in.

    `run` does a job of the store, wherever that is. `describe` reads the model's card; without it, it is the card of
    the directory `config.model`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        run: Callable[[str], Awaitable[None]],
        describe: Callable[[], Card] | None = None,
    ) -> None:
        self.config, self.store, self._run = config, config.store(), run
        self._describe = describe or (lambda: hotmodel.model_card(config.model))
        self.working = 0  # jobs that wait or are done
        self.uploads = Uploads(
            config.max_uploads,
            config.max_uploads_per_client,
            config.min_upload_rate,
            config.upload_grace_s,
            config.max_upload_s,
        )
        self._probing, self._reserving = asyncio.Semaphore(_PROBES), asyncio.Lock()
        self.mixing = asyncio.Semaphore(_MIXES)
        self._editing = asyncio.Lock()
        self.metrics = Metrics(self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._card: Card | None = None
        with contextlib.suppress(OSError, ValueError):
            self._card = self._describe()
        self._examples: list[Path] | None = None
        self._examples_lock = asyncio.Lock()

    def card(self) -> Card:
        """Describe the model; as it last was while its directory holds none, as in training. Problem (503) before."""
        try:
            self._card = self._describe()
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
                card = self.card()
                options = parse_options(fields, has_file=upload.exists(), urls=self.config.allow_urls, card=card)
                await self._reserve(job_id, options, card)
                self.store.update(job_id, status="queued", options=options, queued=time.time())
            except BaseException:
                with contextlib.suppress(NoSuchJob):
                    self.store.delete(job_id)
                raise
            return job_id, self.start(job_id)

    async def _reserve(self, job_id: str, options: Options, card: Card) -> None:
        """Keep the room that a job will need, as far as that is known before it is begun."""
        n_objects = 1 if options.two_stems else USUAL_OBJECTS if options.objects is None else len(options.objects)
        if not options.url:
            async with self._probing:
                await run_in_threadpool(jobs.measure, self.config, self.store, job_id)
        async with self._reserving:
            try:
                if options.url:
                    await run_in_threadpool(self.store.reserve, job_id, self.config.max_upload_bytes)
                else:  # with the rest and the mixture
                    await run_in_threadpool(jobs.reserve, self.store, job_id, n_objects + 2, card, options.mono)
            except StoreFull:
                self.store.delete(job_id)  # before the next one asks
                raise

    async def edit(self, job_id: str, edits: Edits) -> State:
        """Correct a finished job, one at a time; raises as `editing.edit`."""
        self.working += 1
        try:
            async with self._editing:
                find = self.card().vocabulary.find
                return await run_in_threadpool(editing.edit, self.store, job_id, edits, find)
        finally:
            self.working -= 1

    async def read_small(self, request: Request, most: int) -> bytes:
        """Read a body of up to `most` bytes. Problem: 413 for more, 408 for one that doesn't come."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.upload_grace_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise Problem(413, f"the body has more than {most} bytes")
        except TimeoutError:
            raise Problem(408, f"the body did not come within {self.config.upload_grace_s:g} s") from None
        return bytes(body)

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
        except (Busy, WorkerLost) as error:
            failure = as_failure(error)
        except TimeoutError:
            failure = as_failure(OutOfTime())
        except Exception as error:
            log.exception("job %s", job_id)
            failure = as_failure(error)
        finally:
            self.working -= 1
        with contextlib.suppress(NoSuchJob, OSError):
            if failure is not None and not self.store.job(job_id).is_finished:
                jobs.fail(self.store, job_id, failure)
            self.metrics.count(self.store.job(job_id))

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


async def service_of(request: Request) -> Service:
    """Return the service that an application answers for."""
    service: Service = request.app.state.service
    return service


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
