"""The service: an HTTP API and a page that separate uploaded videos, on Ray Serve.

One process takes requests (`avsep.service.api`), others each separate one job at a time (`avsep.service.jobs`);
they meet in the store of results. Environment variables set its limits: AVSEP_SERVE_TOKEN,
AVSEP_SERVE_ALLOW_URLS, AVSEP_SERVE_MAX_UPLOAD_BYTES … (the fields of `avsep.service.config.ServiceConfig`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.serve --model out/demo/model
  AVSEP_SERVE_HOST=0.0.0.0 AVSEP_SERVE_TOKEN=secret python -m pipelines.serve --model out/demo/model --port 8080
  python -m pipelines.serve --model out/demo/model --in-process    # ready in seconds, one job at a time
  curl -F file=@duet.mp4 http://127.0.0.1:8000/v1/separations
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("serve", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, help="the model folder that pipelines.train wrote; may be replaced later")
    p.add_argument("--port", type=int, default=8000, help="on AVSEP_SERVE_HOST, else on this machine alone")
    p.add_argument("--in-process", action="store_true", help="all in one process without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np
import torch

from avsep.factors import Factors, factorize_clips
from avsep.service import connections, hotmodel
from avsep.service.config import ENVIRONMENT, ServiceConfig, log
from avsep.service.hotmodel import HotModel
from avsep.service.jobs import JobWorker
from avsep.vision import LabellerUnavailable
from pipelines import cluster, console, runners
from pipelines.console import fail, say

_LOST_AFTER = 3  # workers that died at one job
_TAKEN = 2  # jobs that a replica has: one in work, and one that waits beside it
_TOGETHER = 16  # requests that a device does at once
_WORKER = {  # its environment
    "OMP_NUM_THREADS": "1",
    # glibc gives each thread an arena and large blocks back to the system: 9,000 page faults a clip, and growth
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
}
_INGRESS = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
_PATIENCE = {  # on a machine full of work Serve's own processes answer late; else it kills them
    "RAY_worker_niceness": "0",  # clients wait; Ray's 15 is for batch work
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}


class Separating:
    """A Serve replica that separates: one job at a time, while the next one waits beside it."""

    def __init__(self, config: ServiceConfig, on_device: Any = None) -> None:
        console.log_as_asked()
        cluster.one_thread()
        self._on_device = on_device
        self._worker = JobWorker(config, None if on_device is None else self._ask)

    async def __call__(self, job_id: str) -> None:
        """Do a job of the store."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._worker, job_id)

    def _ask(self, stage: str, *arguments: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(self._asked(stage, arguments), self._loop)

    async def _asked(self, stage: str, arguments: tuple[Any, ...]) -> Any:
        """Have a device do a stage; one that died is begun anew."""
        from ray import exceptions

        for left in reversed(range(_LOST_AFTER)):
            response = self._on_device.remote(stage, *arguments)
            try:
                result = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except exceptions.RayActorError:
                if not left:
                    raise
            else:
                break
        if isinstance(result, Exception):
            raise result
        return result


class OnDevice:
    """The Serve replica that labels and factorises on a GPU, what several replicas ask for together."""

    def __init__(self, config: ServiceConfig) -> None:
        console.log_as_asked()
        cluster.one_thread()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            log.warning("Ray gives a GPU, but torch finds none: it is done on the CPU")
        self._model = HotModel(config.model, config.weights, config.limits(), self.device)
        self.sizes: dict[str, Counter[int]] = {"label": Counter(), "factorize": Counter()}
        self._stages = {"label": self._together("label", self.label)}
        self._stages["factorize"] = self._together("factorize", self.factorize)

    async def __call__(self, stage: str, *request: Any) -> Any:
        """Do a stage; an exception is returned."""
        return await self._stages[stage](request)

    def check_health(self) -> None:
        """Have Serve begin this replica anew where an error of the GPU's spoils all that follows."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    async def batch_sizes(self) -> dict[str, Counter[int]]:
        """Say of how many requests each stage's batches were."""
        return self.sizes

    def _together(self, stage: str, function: Callable[[list[Any]], list[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """Take requests one by one and do them in batches: what comes during one is the next."""
        from ray import serve

        free = asyncio.Lock()

        async def work(requests: list[Any]) -> list[Any]:
            async with free:
                self.sizes[stage][len(requests)] += 1
                return await asyncio.to_thread(each, function, requests)

        batched = serve.batch(work, max_batch_size=_TOGETHER)

        async def ask(request: Any) -> Any:
            async with free:  # Serve closes a batch 10 ms after its first request, whether or not it can begin
                pass
            return await batched(request)

        return ask

    def label(self, requests: list[Any]) -> list[Any]:
        """Classify each request's pictures; None for another network than the present model's."""
        labeller = self._model().labeller
        mine = [p for p, sha256 in requests if not isinstance(labeller, str) and sha256 == labeller.sha256]
        if not mine or isinstance(labeller, str):
            return [None] * len(requests)
        logits = iter(labeller(np.concatenate(mine)).split([len(p) for p in mine]))
        return [next(logits).numpy() if sha256 == labeller.sha256 else None for _, sha256 in requests]

    def factorize(self, requests: list[Any]) -> list[Any]:
        """Factorise each request's waveform with its seeds, those of one configuration together."""
        found: dict[int, list[Factors]] = {}
        for extraction in {c for _, _, c in requests}:  # two where a model is being replaced
            rows = [i for i, r in enumerate(requests) if r[2] == extraction]
            waveforms = [requests[i][0] for i in rows for _ in requests[i][1]]
            seeds = [seed for i in rows for seed in requests[i][1]]
            factors = iter(factorize_clips(waveforms, seeds, extraction, self.device))
            found |= {i: [next(factors) for _ in requests[i][1]] for i in rows}
        return [found[i] for i in range(len(requests))]


def each(function: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
    """Do requests together; where that fails, each by itself: nobody's fails for another's fault."""
    try:
        return function(requests)
    except Exception as error:
        return [error] if len(requests) == 1 else [each(function, [r])[0] for r in requests]


class Ingress:
    """The Serve replica that answers requests, which Serve's proxies bring."""

    def __init__(self, config: ServiceConfig, separating: Any) -> None:
        console.log_as_asked()
        self._config, self._separating = config, separating

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application; Serve asks for it."""
        from avsep.service.api import make_app
        from avsep.service.service import Service

        return make_app(Service(self._config, self._run))

    async def _run(self, job_id: str) -> None:
        """Have a replica do a job; one whose replica died is given to another."""
        from ray import exceptions
        from ray.serve.exceptions import BackPressureError

        from avsep.service.work import Busy, WorkerLost

        for _ in range(_LOST_AFTER):
            try:
                await self._separating.remote(job_id)
                return
            except BackPressureError:
                raise Busy from None
            except exceptions.RayActorError:
                continue
        raise WorkerLost


class Listening(Ingress):
    """The same where one machine is all: it listens itself, so that no byte goes through a proxy."""

    async def __init__(self, config: ServiceConfig, separating: Any, port: int) -> None:  # type: ignore[misc]
        from avsep.service.api import make_app
        from avsep.service.service import Service

        super().__init__(config, separating)
        self._slots = asyncio.Semaphore(_TAKEN * replicas(config))
        listener = socket.create_server((config.host, port), backlog=1024)
        self._server = connections.server(make_app(Service(config, self._run)))
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(0.02)
            await self.check_health()

    async def _run(self, job_id: str) -> None:
        """The same, but what no replica can take yet waits here: Serve would ask them again and again."""
        async with self._slots:
            await super()._run(job_id)

    async def check_health(self) -> None:
        """Have Serve begin this replica anew where it listens no more."""
        if self._serving.done():
            raise RuntimeError("the server ended")

    async def __del__(self) -> None:
        """Answer what has come; Serve waits for it."""
        self._server.should_exit = True
        await self._serving


def replicas(config: ServiceConfig) -> int:
    """Say how many processes are to separate, unless an operator's `serve.yaml` does."""
    return config.replicas or max(1, len(os.sched_getaffinity(0)))


def devices(config: ServiceConfig) -> int:
    """Say how many processes are to label and factorise on GPUs."""
    import ray

    if config.devices >= 0 or not ray.is_initialized():
        return max(0, config.devices)
    return int(ray.cluster_resources().get("GPU", 0))


def build(arguments: dict[str, Any], port: int | None = None) -> Any:
    """Build the Serve application, for `serve run` and `deploy/serve.yaml`: ServiceConfig's fields by name.

    With a port it listens there itself, for one machine; else requests come through Serve's proxies.
    """
    from ray import serve

    config = ServiceConfig.from_environment(os.environ, **arguments)
    separating = serve.deployment(
        Separating,
        name="separating",
        num_replicas=replicas(config),
        max_ongoing_requests=_TAKEN,
        max_queued_requests=config.max_pending + config.max_uploads,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": _WORKER}},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
    )
    shared = []
    if n_devices := devices(config):
        on_device = serve.deployment(
            OnDevice,
            name="on_device",
            num_replicas=n_devices,
            max_ongoing_requests=200,
            ray_actor_options={"num_cpus": 0, "num_gpus": 1},
        )
        shared.append(on_device.bind(config))
    ingress = serve.deployment(
        serve.ingress()(Ingress) if port is None else Listening,
        name="ingress",
        max_ongoing_requests=200,
        max_queued_requests=200,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _INGRESS}},
        graceful_shutdown_timeout_s=20,
    )
    return ingress.bind(config, separating.bind(config, *shared), *([] if port is None else [port]))


@contextlib.contextmanager
def results_folder(given: str, port: int) -> Iterator[str]:
    """Give the folder of results: the operator's, or one of this port that is emptied before and after."""
    if given:
        os.makedirs(given, mode=0o700, exist_ok=True)
        yield os.path.abspath(given)
        return
    # of a fixed name, so that what a killed service left is found by the next one
    folder = Path(tempfile.gettempdir(), f"avsep-serve-{os.getuid()}-{port}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        fail(f"{folder} isn't ours; remove it or set {ENVIRONMENT}RESULTS to another folder")
    try:
        empty(folder)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove what an earlier service left."""
    for entry in folder.iterdir():
        shutil.rmtree(entry, ignore_errors=True)


def start(config: ServiceConfig, port: int, results: str) -> None:
    """Start Serve and the application; it takes requests when this returns."""
    from ray import exceptions, serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it names a proxy's port, on which nobody listens here
    try:
        serve.start(proxy_location="Disabled")
        serve.run(
            build({"model": config.model, "results": results}, port),
            name="avsep",
            route_prefix="/",
            logging_config={
                "log_level": "WARNING",
                "enable_access_log": False,
                "encoding": "JSON" if console.as_json() else "TEXT",
            },
        )
    except (exceptions.RayError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        fail(f"Ray Serve didn't start: {why}; try again when less runs, or --in-process")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    console.absolute(arguments, "model")
    config = ServiceConfig.from_environment(os.environ, model=arguments.model)
    check_address(config.host, arguments.port)
    try:
        hotmodel.check_model(config)  # a mistake is one line, before anything is started
    except LabellerUnavailable as error:
        fail(f"the picture network of {config.model}, or {ENVIRONMENT}WEIGHTS: {error}")
    with results_folder(config.results, arguments.port) as results:
        serve = serve_here if arguments.in_process else serve_on_ray
        serve(replace(config, results=results), arguments.port)
    return console.DONE


def check_address(host: str, port: int) -> None:
    """Raise UsageError where nobody can listen."""
    if not 0 < port < 1 << 16:
        fail(f"--port {port}: it must lie in 1…65535")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            fail(f"--port {port}: only administrators may use it; give one from 1024 up")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                fail(f"--port {port}: another program uses it; give a free one")
            fail(f"{ENVIRONMENT}HOST={host}: {error.strerror}; give an IPv4 address of this machine, or 0.0.0.0")


def serve_on_ray(config: ServiceConfig, port: int) -> None:
    """Serve until interrupted, on Ray on this machine."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    say("starting Ray Serve on this machine …")
    with runners.session():
        start(config, port, config.results)
        wait_for_the_end(config, port)
        from ray import serve

        serve.shutdown()


def serve_here(config: ServiceConfig, port: int) -> None:
    """Serve until interrupted, from this process alone: jobs are done in threads, one unless config.replicas says."""
    from avsep.service.api import make_app
    from avsep.service.service import Service

    spare_memory()
    cluster.one_thread()
    workers = [JobWorker(config) for _ in range(config.replicas or 1)]
    pool = ThreadPoolExecutor(len(workers))

    def work(job_id: str) -> None:
        worker = workers.pop()
        try:
            worker(job_id)
        finally:
            workers.append(worker)

    async def run_job(job_id: str) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, work, job_id)

    server = connections.server(make_app(Service(config, run_job)))
    listener = socket.create_server((config.host, port), backlog=1024)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if not server.started:
            fail(f"--port {port}: the server didn't start; its message is above")
        wait_for_the_end(config, port)
    finally:
        server.should_exit = True
        thread.join()
        pool.shutdown(wait=False, cancel_futures=True)  # what is at work ends when its folder goes


def wait_for_the_end(config: ServiceConfig, port: int) -> None:
    """Say that the service is ready, and return on Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
        signal.signal(number, lambda *_: stop.set())
    say(f"http://{config.host}:{port}/ is ready; Ctrl-C ends it")
    stop.wait()
    say("stopping")


def spare_memory() -> None:
    """Set this process's allocator as _WORKER sets a replica's."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        for option, name in (
            (-8, "MALLOC_ARENA_MAX"), (-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_"),
        ):  # fmt: skip
            ctypes.CDLL(None).mallopt(option, int(_WORKER[name]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which other processes can import, and not its copy here
    from pipelines.serve import main as run_main

    sys.exit(run_main())
