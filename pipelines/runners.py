"""Where work runs: Ray on this machine or a cluster, or a plain loop."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from avsep.console import duration
from pipelines.actors import ActorBody, Caller, HereCaller, ThereCaller, nothing, without_cuda
from pipelines.cluster import join_ray, one_thread, start_ray
from pipelines.console import LOCAL_RUNNER, WorkerDied, fail, is_local, say, whole_number

Recover = Callable[[tuple[Any, ...], Exception], None]  # deals with an item that failed, or raises


class Queue(Iterator[tuple[Any, ...]]):
    """Items for `map`, to which more can be added while it runs."""

    def __init__(self, items: Iterable[tuple[Any, ...]]) -> None:
        self._items = iter(items)
        self._added: deque[tuple[Any, ...]] = deque()

    def add(self, item: tuple[Any, ...]) -> None:
        """Add an item, to be done before those that wait."""
        self._added.append(item)

    def __next__(self) -> tuple[Any, ...]:
        return self._added.popleft() if self._added else next(self._items)


def _raise(_: tuple[Any, ...], error: Exception) -> None:
    raise error


class InProcess:
    """Run everything in this process, one item after the other: for debuggers and small jobs."""

    n_workers = 1
    n_gpus = 0

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[tuple[Any, ...]],
        recover: Recover = _raise,
        cpus: Callable[[], float] = lambda: 1.0,
    ) -> Iterator[Any]:
        """Yield `function(*item)` for each item; `recover` deals with those that raise."""
        waiting = iter(items)
        while (item := next(waiting, None)) is not None:
            try:
                result = function(*item)
            except Exception as error:
                recover(item, error)
                continue
            yield result

    def share(self, value: Any) -> Any:
        """Return a value to pass to many items."""
        return value

    def actors(self, make: Callable[[], Any], count: int, *, gpus: float) -> list[Caller]:
        """Build one object and return its caller, whose futures are finished."""
        return [HereCaller(make())]


_LOOK_S = 5.0  # between looks at how large the cluster is
_GPUS_WAIT_S = 900.0
_FREED_S = 10.0  # in which a place that was given up is free again


class OnRay:
    """Run on Ray: a task an item, a bounded number of them in flight, results as they come."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._n_workers, self._looked = 1, -math.inf

    @property
    def n_gpus(self) -> int:
        """GPUs to use: those of `gpus` if torch can use them all. UsageError if not, and AVSEP_GPUS asks for them."""
        came = self.gpus()
        if not (without := sorted({where for where in came if where})):
            return len(came)
        import torch

        text = f"Ray counts a GPU on {', '.join(without)}, but torch {torch.__version__} finds no CUDA there"
        if whole_number("AVSEP_GPUS"):
            fail(f"AVSEP_GPUS: {text}; it needs a driver and a torch for CUDA, or AVSEP_GPUS=0")
        say(f"note: {text}; going on without GPUs")
        return 0

    def gpus(self) -> list[str]:
        """Take those GPUs that are there, or as many as AVSEP_GPUS says, for which an autoscaler is waited for.

        Gives each one's node where torch finds no CUDA with it, and nothing where it does.
        """
        ray = self._ray
        asked = whole_number("AVSEP_GPUS")
        wanted = int(ray.cluster_resources().get("GPU", 0)) if asked is None else asked
        if not wanted:
            return []
        place = ray.remote(ActorBody).options(num_cpus=0, num_gpus=1)
        places = [place.remote(nothing) for _ in range(wanted)]  # what waits is what an autoscaler sees
        answers = [p.call.remote(without_cuda) for p in places]
        came, late = ray.wait(answers, num_returns=wanted, timeout=_LOOK_S)
        if late:
            say(f"waits for {len(late)} of {wanted} GPUs, {duration(_GPUS_WAIT_S)} at most")
            came, late = ray.wait(answers, num_returns=wanted, timeout=_GPUS_WAIT_S)
        found = []
        for answer in came:
            with contextlib.suppress(ray.exceptions.RayActorError):  # its node is gone again
                found.append(ray.get(answer))
        if len(found) < wanted:
            say(f"{len(found)} of {wanted} GPUs came; going on with those")
        free = ray.available_resources().get("GPU", 0)
        for p in places:
            ray.kill(p)
        until = time.monotonic() + _FREED_S
        while ray.available_resources().get("GPU", 0) < free + len(found) and time.monotonic() < until:
            time.sleep(0.1)  # else an autoscaler brings as many again for whoever asks for them next
        return found

    @property
    def n_workers(self) -> int:
        """CPUs that the cluster has now: it may grow with what waits, and shrink."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            self._n_workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        return self._n_workers

    @property
    def n_nodes(self) -> int:
        """Nodes with CPUs that the cluster has now; one where they are still to come."""
        nodes = [n for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
        return max(1, len(nodes))

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[tuple[Any, ...]],
        recover: Recover = _raise,
        cpus: Callable[[], float] = lambda: 1.0,
    ) -> Iterator[Any]:
        """Yield `function(*item)` for each item, in the order they finish.

        A task whose worker died is tried twice again, then it is WorkerDied. `recover` gets the item
        with that, or with what it raised; without it both raise here. `cpus` says, whenever a task
        is started, what part of a CPU's time it takes: tasks that wait for a GPU share CPUs.
        """
        remote = self._ray.remote(function)
        task = functools.cache(lambda cpus: remote.options(num_cpus=cpus, max_retries=2))
        waiting = iter(items)
        pending: dict[Any, tuple[Any, ...]] = {}
        while True:
            while len(pending) < 2 * self.n_workers / cpus() and (item := next(waiting, None)) is not None:
                pending[task(cpus()).remote(*item)] = item
            if not pending:
                return
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_LOOK_S)
            if not ready:
                continue
            item = pending.pop(ready[0])
            try:
                result = self._get(ready[0])
            except Exception as error:
                recover(item, error)
                continue
            yield result

    def share(self, value: Any) -> Any:
        """Store a value once, to pass to many items."""
        return self._ray.put(value)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self._ray.exceptions.RayActorError):  # that it called died, again and again
                raise WorkerDied(" ".join(str(error.cause).split())[:200]) from None
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except _lost_errors(self._ray) as error:
            raise WorkerDied(" ".join(str(error).split())[:200]) from None

    def actors(self, make: Callable[[], Any], count: int, *, gpus: float) -> list[Caller]:
        """Start `count` actors, each with what `make` builds; return a caller for each, which can be sent to tasks.

        Each takes `gpus` of a GPU; of CPUs they claim none, since they work while the tasks that call them wait.
        """
        actor = self._ray.remote(ActorBody).options(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=3)
        return [ThereCaller(actor.remote(make)) for _ in range(count)]


def _lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    e = ray.exceptions
    return (e.WorkerCrashedError, e.OutOfMemoryError, e.NodeDiedError, e.ObjectLostError)


Runner = InProcess | OnRay


def map_in_order(runner: Runner, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Map over items and return the results in the items' order."""
    done = dict(runner.map(_numbered, ((i, function, item) for i, item in enumerate(items))))
    return [done[i] for i in range(len(items))]


def _numbered(number: int, function: Callable[..., Any], item: tuple[Any, ...]) -> tuple[int, Any]:
    return number, function(*item)


@contextlib.contextmanager
def session(in_process: bool = False) -> Iterator[Runner]:
    """Give a runner: a plain loop, the cluster that RAY_ADDRESS names, or Ray on this machine.

    Ray on this machine starts quietly and is stopped at the end; sessions nest, and an inner one
    uses the outer one's Ray. AVSEP_CPUS says how many workers this machine is to have, other than its cores.
    AVSEP_GPUS says how many of its GPUs are used. On a cluster that many are waited for.
    """
    if in_process:
        import torch

        threads = torch.get_num_threads()
        one_thread()
        try:
            yield InProcess()
        finally:
            torch.set_num_threads(threads)
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token file appears in the home folder
    os.environ.setdefault("RAY_task_oom_retries", "2")  # else a task that needs too much memory comes again for ever
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # else a variable that a job sets, too, is an error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about GPUs to come
    here = {
        "include_dashboard": False,
        "num_cpus": whole_number("AVSEP_CPUS", least=1),
        "num_gpus": whole_number("AVSEP_GPUS"),
    }
    import ray

    if ray.is_initialized():
        yield OnRay()
        return
    if address == "local":
        start_ray(here)
    else:
        join_ray(address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Ray's own aborts the process
    try:
        yield OnRay()
    finally:
        ray.shutdown()


def beam_options(arguments: list[str]) -> Any:
    """Turn arguments that aren't ours into Beam's options. Raises ValueError for what it doesn't know."""
    from apache_beam.options.pipeline_options import PipelineOptions

    if arguments and not arguments[0].startswith("--"):
        raise ValueError(f"unexpected argument {arguments[0]!r}; see --help")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):  # argparse would print all of Beam's options
            options = PipelineOptions([f"--runner={LOCAL_RUNNER}", *arguments])
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        raise ValueError(messages.getvalue().rsplit("error: ", 1)[-1].strip()) from None
    unknown = set(given) - set(PipelineOptions([]).get_all_options())
    if unknown and is_local(options):  # other runners bring options of their own
        option = next(a for a in arguments if a.split("=")[0].lstrip("-").replace("-", "_") in unknown)
        raise ValueError(f"unknown option {option}: neither ours (see --help) nor Beam's")
    return options
