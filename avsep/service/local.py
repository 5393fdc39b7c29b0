"""The whole service in one process: its workers are threads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from avsep.service import connections
from avsep.service.api import make_app
from avsep.service.config import ServiceConfig, UnusableSettings
from avsep.service.jobs import JobWorker
from avsep.service.service import Service


class Threads:
    """Workers with a thread each. A call does one job, as `Service` asks for it."""

    def __init__(self, workers: Sequence[JobWorker]) -> None:
        self._free = list(workers)
        self._pool = ThreadPoolExecutor(len(workers))

    async def __call__(self, job_id: str) -> None:
        """Have a worker do a job of the store; it waits for one that is free."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._work, job_id)

    def _work(self, job_id: str) -> None:
        worker = self._free.pop()
        try:
            worker(job_id)
        finally:
            self._free.append(worker)

    def close(self, wait: bool = True) -> None:
        """End; work that is under way ends by itself, or when its job's folder goes."""
        self._pool.shutdown(wait=wait, cancel_futures=not wait)


@contextlib.contextmanager
def listening(config: ServiceConfig, port: int) -> Iterator[None]:
    """Serve from this process alone, with as many workers as `config.replicas` says, or one, until the block ends.

    Raises UnusableSettings where the server doesn't start.
    """
    threads = Threads([JobWorker(config) for _ in range(config.replicas or 1)])
    server = connections.server(make_app(Service(config, threads)))
    listener = socket.create_server((config.host, port), backlog=1024)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        if not server.started:
            raise UnusableSettings(f"--port {port}: the server didn't start; its message is above")
        yield
    finally:
        server.should_exit = True
        thread.join()
        threads.close(wait=False)
