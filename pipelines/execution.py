"""Where work runs: Ray on this machine or a cluster, or a plain loop; and how programs talk."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from avsep import storage

DONE, SHORTFALL, UNUSABLE = 0, 1, 2  # exit statuses
LOCAL_RUNNER = "FnApiRunner"  # Beam's default one tries to download another runner first


class UsageError(Exception):
    """Arguments or input that can't be used: one line that names the value, the rule and the remedy."""


def absolute(arguments: argparse.Namespace, *names: str) -> None:
    """Make local paths among the arguments absolute: workers may have another working directory."""
    for name in names:
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, storage.resolve(path, "."))


def run(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse arguments, run a program's main function, and turn a user's mistake into one line and status 2."""
    arguments = parser.parse_args(argv)
    return guarded(lambda: main(arguments), parser.prog)


def guarded(main: Callable[[], int], program: str) -> int:
    """Turn a user's mistake into one line and status 2."""
    try:
        return main()
    except (UsageError, OSError, ValueError) as error:
        if os.environ.get("AVSEP_TRACEBACK"):
            raise
        hint = "" if isinstance(error, UsageError) else " (AVSEP_TRACEBACK=1 shows where)"
        print(f"{program}: {error}{hint}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


class InProcess:
    """Run everything in this process, one item after the other: for debuggers and small jobs."""

    n_workers = 1
    n_gpus = 0

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield `function(*item)` for each item."""
        for item in items:
            yield function(*item)

    def share(self, value: Any) -> Any:
        """Return a value to pass to many items."""
        return value

    def actors(self, make: Callable[[], Any], count: int, *, gpu: bool) -> list[Callable[..., Future]]:
        """Build one object and return a function that calls it and gives a finished future."""
        target = make()

        def call(*arguments: Any) -> Future:
            future: Future = Future()
            future.set_result(target(*arguments))
            return future

        return [call]


class OnRay:
    """Run on Ray: a task an item, a bounded number of them in flight, results as they come."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        resources = ray.cluster_resources()
        self.n_workers = max(1, int(resources.get("CPU", 1)))
        self.n_gpus = int(resources.get("GPU", 0))

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield `function(*item)` for each item, in the order they finish.

        A task whose worker died is tried again; one that raises, raises here.
        """
        task = self._ray.remote(function).options(num_cpus=1, max_retries=3)
        waiting = iter(items)
        pending: list[Any] = []
        while True:
            while len(pending) < 2 * self.n_workers and (item := next(waiting, None)) is not None:
                pending.append(task.remote(*item))
            if not pending:
                return
            ready, pending = self._ray.wait(pending, num_returns=1)
            yield self._get(ready[0])

    def share(self, value: Any) -> Any:
        """Store a value once, to pass to many items."""
        return self._ray.put(value)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def actors(self, make: Callable[[], Any], count: int, *, gpu: bool) -> list[Callable[..., Future]]:
        """Start `count` actors, each holding what `make` builds; return a caller for each.

        A caller can be sent to tasks. With `gpu` each takes one; of CPUs they claim none, since
        they work while the tasks that call them wait.
        """
        actor = self._ray.remote(Held).options(num_cpus=0, num_gpus=int(gpu), max_restarts=3, max_task_retries=3)
        return [RemoteCall(actor.remote(make)) for _ in range(count)]


class Held:
    """An actor's body: an expensive object, built once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        one_thread()
        self.target = make()

    def call(self, *arguments: Any) -> Any:
        """Call the object."""
        return self.target(*arguments)


class RemoteCall:
    """Call an actor's object from any task; the result is a future."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, *arguments: Any) -> Future:
        """Start the call."""
        return self.actor.call.remote(*arguments).future()


Runner = InProcess | OnRay


def map_in_order(runner: Runner, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Map over items and return the results in the items' order."""
    done = dict(runner.map(_numbered, ((i, function, item) for i, item in enumerate(items))))
    return [done[i] for i in range(len(items))]


def _numbered(number: int, function: Callable[..., Any], item: tuple[Any, ...]) -> tuple[int, Any]:
    return number, function(*item)


def one_thread() -> None:
    """Keep a worker to one thread: processes are the parallelism, and busy threads get in each other's way."""
    torch.set_num_threads(1)


@contextlib.contextmanager
def session(in_process: bool = False) -> Iterator[Runner]:
    """Give a runner: a plain loop, the cluster that RAY_ADDRESS names, or Ray on this machine.

    Ray on this machine starts quietly and is stopped at the end; sessions nest, and an inner one
    uses the outer one's Ray.
    """
    if in_process:
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
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about GPUs to come
    import ray

    if ray.is_initialized():
        yield OnRay()
        return
    ray.init(
        address=address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        **({"include_dashboard": False} if address == "local" else {}),
    )
    try:
        yield OnRay()
    finally:
        ray.shutdown()


class Progress:
    """Show how far a run is: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, every_s: float = 5.0) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.count = done
        self._at_start, self._started, self._said = done, time.monotonic(), time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit) if sys.stderr.isatty() else None

    def add(self, count: int, note: str = "") -> None:
        """Count finished items."""
        self.count += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note)
            self._bar.update(count)
        elif time.monotonic() - self._said >= self.every_s or self.count == self.total:
            self._said = time.monotonic()
            rate = (self.count - self._at_start) / max(self._said - self._started, 1e-9)
            left = (self.total - self.count) / rate if rate else float("inf")
            tail = f", {note}" if note else ""
            print(
                f"{self.what}: {self.count}/{self.total} {self.unit}, {rate:.2f}/s, {left:.0f} s left{tail}",
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


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


def is_local(options: Any) -> bool:
    """Tell our default Beam runner from others."""
    from apache_beam.options.pipeline_options import StandardOptions

    return options.view_as(StandardOptions).runner == LOCAL_RUNNER


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def fail(text: str) -> NoReturn:
    """Stop with status 2 and one line."""
    raise UsageError(text)
