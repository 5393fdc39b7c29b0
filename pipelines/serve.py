"""The service: an HTTP API and a page that separate uploaded videos, on Ray Serve.

One process takes requests (`avsep.service.api`), others each separate one job at a time (`avsep.service.jobs`);
they meet in the store of results. Environment variables set its limits: AVSEP_SERVE_TOKEN,
AVSEP_SERVE_ALLOW_URLS, AVSEP_SERVE_MAX_UPLOAD_BYTES … (the fields of `avsep.service.config.ServiceConfig`).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from avsep import starter
from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.serve
  python -m pipelines.serve --model out/demo/model
  AVSEP_SERVE_HOST=0.0.0.0 AVSEP_SERVE_TOKEN=secret python -m pipelines.serve --model out/demo/model --port 8080
  python -m pipelines.serve --model out/demo/model --in-process    # ready in seconds, one job at a time
  curl -F file=@duet.mp4 http://127.0.0.1:8000/v1/separations
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("serve", __doc__, EXAMPLES)
    p.add_argument("--model", default=starter.PATH, help="what pipelines.train wrote (default: the starter model)")
    p.add_argument("--port", type=int, default=8000, help="8000 unless said; on AVSEP_SERVE_HOST, else here alone")
    p.add_argument("--in-process", action="store_true", help="all in one process without Ray")
    return p


if __name__ == "__main__":
    begin(parser(), loads="model")  # what follows takes seconds

from avsep.service import connections, hotmodel, place
from avsep.service.config import ServiceConfig, UnusableSettings
from avsep.service.device import Device, Together
from avsep.service.elsewhere import Busy, WorkerLost
from avsep.service.jobs import JobWorker
from avsep.service.memory import ANSWERING, SEPARATING, spare_memory
from pipelines import cluster, console, runners
from pipelines.console import fail, say

_LOST_AFTER = 3  # workers that died at one job
_TAKEN = 2  # jobs that a replica has: one in work, and one that waits beside it
_DEVICE = {"num_cpus": 0, "num_gpus": 1}
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
        stages = () if on_device is None else (on_device.label, on_device.factorize)
        label, factorize = [functools.partial(self._begun, stage) for stage in stages] or (None, None)
        self._worker = JobWorker(config, label, factorize)

    async def __call__(self, job_id: str) -> None:
        """Do a job of the store."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._worker, job_id)

    def _begun(self, method: Any, *arguments: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(_asked(method, *arguments), self._loop)


async def _asked(method: Any, *arguments: Any) -> Any:
    """Have a replica do something; where it dies, another is asked. Raises Busy, WorkerLost, or what it returned."""
    from ray import exceptions
    from ray.serve.exceptions import BackPressureError

    for _ in range(_LOST_AFTER):
        response = method.remote(*arguments)
        try:
            result = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise Busy from None
        except exceptions.RayActorError:
            continue
        if isinstance(result, Exception):
            raise result
        return result
    raise WorkerLost


class OnDevice:
    """The Serve replica that labels and factorises on a GPU, what several replicas ask for together."""

    def __init__(self, config: ServiceConfig) -> None:
        console.log_as_asked()
        cluster.one_thread()
        self._device = Device(config)
        self._label, self._factorize = Together(self._device.label), Together(self._device.factorize)

    async def label(self, *request: Any) -> Any:
        """Classify pictures, as `LabelBy`; an exception is returned."""
        return await self._label(*request)

    async def factorize(self, *request: Any) -> Any:
        """Factorise waveforms, as `factors.Factorize`; an exception is returned."""
        return await self._factorize(*request)

    def check_health(self) -> None:
        """Have Serve begin this replica anew where an error of the GPU's spoils all that follows."""
        self._device.check()

    async def batch_sizes(self) -> dict[str, Counter[int]]:
        """Say of how many requests each stage's batches were."""
        return {"label": self._label.sizes, "factorize": self._factorize.sizes}


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
        """Have a replica do a job."""
        await _asked(self._separating, job_id)


class Listening(Ingress):
    """The same where one machine is all: it listens itself, so that no byte goes through a proxy."""

    async def __init__(self, config: ServiceConfig, separating: Any, port: int) -> None:  # type: ignore[misc]
        super().__init__(config, separating)
        self._slots = asyncio.Semaphore(_TAKEN * config.n_replicas)
        listener = socket.create_server((config.host, port), backlog=1024)
        self._server = connections.server(self.__serve_build_asgi_app__())
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


def build(arguments: dict[str, Any], port: int | None = None) -> Any:
    """Build the Serve application, for `serve run` and `deploy/serve.yaml`: ServiceConfig's fields by name.

    With a port it listens there itself, for one machine; else requests come through Serve's proxies.
    """
    import ray
    from ray import serve

    config = ServiceConfig.from_environment(os.environ, **arguments)
    separating = serve.deployment(
        Separating,
        name="separating",
        num_replicas=config.n_replicas,
        max_ongoing_requests=_TAKEN,
        max_queued_requests=config.max_pending + config.max_uploads,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": SEPARATING}},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
    )
    shared, n_devices = [], config.devices
    if n_devices < 0:
        n_devices = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    if n_devices:
        on_device = serve.deployment(
            OnDevice, name="on_device", num_replicas=n_devices, max_ongoing_requests=200, ray_actor_options=_DEVICE
        )
        shared.append(on_device.bind(config))
    ingress = serve.deployment(
        serve.ingress()(Ingress) if port is None else Listening,
        name="ingress",
        max_ongoing_requests=200,
        max_queued_requests=200,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": ANSWERING},
        },
        graceful_shutdown_timeout_s=20,
    )
    return ingress.bind(config, separating.bind(config, *shared), *([] if port is None else [port]))


def start(config: ServiceConfig, port: int, results: str) -> None:
    """Start Serve and the application; it takes requests when this returns."""
    from ray import exceptions, serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it names a proxy's port, on which nobody listens here
    encoding = "JSON" if console.as_json() else "TEXT"
    try:
        serve.start(proxy_location="Disabled")
        serve.run(
            build({"model": config.model, "results": results}, port),
            name="avsep",
            route_prefix="/",
            logging_config={"log_level": "WARNING", "enable_access_log": False, "encoding": encoding},
        )
    except (exceptions.RayError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        fail(f"Ray Serve didn't start: {why}; try again when less runs, or --in-process")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    console.absolute(arguments, "model")
    config, port = ServiceConfig.from_environment(os.environ, model=arguments.model), arguments.port
    try:
        place.check_address(config.host, port)
        with place.results_folder(config.results, port) as results:
            hotmodel.check_model(config)  # a mistake is one line, before anything is started
            serve = serve_here if arguments.in_process else serve_on_ray
            serve(replace(config, results=results), port)
    except UnusableSettings as error:
        fail(str(error))
    return console.DONE


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
    """Serve until interrupted, from this process alone."""
    from avsep.service.local import listening

    spare_memory()
    cluster.one_thread()
    with listening(config, port):
        wait_for_the_end(config, port)


def wait_for_the_end(config: ServiceConfig, port: int) -> None:
    """Say that the service is ready, and return on Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets its own
        signal.signal(number, lambda *_: stop.set())
    say(f"http://{config.host}:{port}/ is ready; Ctrl-C ends it")
    stop.wait()
    say("stopping")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which other processes can import, and not its copy here
    from pipelines.serve import main as run_main

    sys.exit(run_main())
