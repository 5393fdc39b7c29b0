"""Where work runs: Ray on this machine or a cluster, or a plain loop; and how programs talk."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import functools
import glob
import io
import json
import logging
import math
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from avsep import console, storage
from pipelines import INTERRUPTED, UNUSABLE, missing_input

DONE, SHORTFALL = 0, 1  # exit statuses, beside those of `pipelines`
PREVIOUS = "previous"  # folder of OUT for what --replace replaces
_SIOCGIFADDR = 0x8915  # Linux's number for "the interface's address"
_STARTS = 3  # of Ray on this machine, before giving up
_HEAD_S = 10.0  # in which a cluster's head answers
_SOCKET_BYTES = 107  # Linux's limit to a socket's path
LOCAL_RUNNER = "FnApiRunner"  # Beam's default one tries to download another runner first


class UsageError(Exception):
    """Arguments or input that can't be used: one line that names the value, the rule and the remedy."""


def absolute(arguments: argparse.Namespace, *names: str) -> None:
    """Make local paths among the arguments absolute: workers may have another working directory."""
    for name in names:
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, storage.resolve(path, "."))


def keep_apart(arguments: argparse.Namespace, *inputs: str, writes: Sequence[str] = ()) -> None:
    """Refuse an --out that is one of the inputs, or the folder of one that would be overwritten or deleted there.

    `writes` are patterns of the names that the program writes to --out.
    """
    out = arguments.out
    for name in inputs:
        given = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        for path in given if isinstance(given, list) else filter(None, [given]):
            if storage.same(path, out):
                fail(f"--out {out} is what {flag} names; give another folder")
            written = any(fnmatch.fnmatch(storage.name(path.rstrip("/")).lower(), pattern) for pattern in writes)
            if written and storage.same(storage.parent(path.rstrip("/")), out):
                fail(f"--out {out} would overwrite {flag} {path}; give another folder")


def run(
    main: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    after: str = "",
) -> int:
    """Parse arguments, check inputs, run a program's main function; what goes wrong is one line, as in `guarded`."""
    arguments = parser.parse_args(argv)

    def checked() -> int:
        if mistake := missing_input(arguments):
            fail(mistake)
        return main(arguments)

    return guarded(checked, parser.prog, after)


def guarded(main: Callable[[], int], program: str, after: str = "") -> int:
    """Turn a user's mistake, lost workers, Ctrl-C and SIGTERM into one line and an exit status.

    `after` says how to go on after an interruption.
    """
    console.prepare()
    log_as_asked()
    try:
        with interruptible():
            return main()
    except (UsageError, OSError, ValueError) as error:
        if os.environ.get("AVSEP_TRACEBACK"):
            raise
        hint = "" if isinstance(error, UsageError) else " (AVSEP_TRACEBACK=1 shows where)"
        complain(f"{program}: {error}{hint}")
        return UNUSABLE
    except WorkerLost as error:
        complain(f"{program}: a worker died again and again: {error} Run fewer at once, such as AVSEP_CPUS=1")
        return UNUSABLE
    except KeyboardInterrupt:
        complain(f"{program}: interrupted{'; ' if after else ''}{after}")
        return INTERRUPTED


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM interrupt the main thread, as Ctrl-C does; signals that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_free(out: str, files: Sequence[str], made: str, replace: bool) -> None:
    """Raise UsageError where one of `files` is in OUT and isn't to be replaced; `made` says what they are."""
    if not replace and any(storage.exists(storage.join(out, f)) for f in files):
        fail(f"{made}; --replace makes it anew and keeps the last one in {storage.join(out, PREVIOUS)}")


def put_aside(out: str, files: Sequence[str]) -> None:
    """Make room in OUT for new files: earlier ones go to OUT/previous, where the last finished ones are kept.

    They were finished if the first of them is there; else they are deleted.
    """
    there = [f for f in files if storage.exists(storage.join(out, f))]
    if not there or files[0] not in there:
        for file in there:
            storage.delete_file(storage.join(out, file))
        return
    kept = storage.join(out, PREVIOUS)
    for file in files:
        storage.delete_file(storage.join(kept, file))
    for file in there:
        place = storage.join(kept, file)
        storage.make_directory(storage.parent(place))
        storage.move(storage.join(out, file), place)
    say(f"note: what was there is kept in {kept}")


class WorkerLost(Exception):
    """The process that worked on an item died, more than once: of the item, or of the machine."""


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

    def actors(self, make: Callable[[], Any], count: int, *, gpus: float) -> list[Callable[..., Future]]:
        """Build one object and return a function that calls it and gives a finished future."""
        target = make()

        def call(*arguments: Any) -> Future:
            future: Future = Future()
            future.set_result(target(*arguments))
            return future

        return [call]


_LOOK_S = 5.0  # between looks at how large the cluster is
_GPUS_WAIT_S = 900.0
_FREED_S = 10.0  # in which a place that was given up is free again
_NOTICED_S = 30.0  # a node that is gone is noticed after 20


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
        if _whole_number("AVSEP_GPUS"):
            fail(f"AVSEP_GPUS: {text}; it needs a driver and a torch for CUDA, or AVSEP_GPUS=0")
        say(f"note: {text}; going on without GPUs")
        return 0

    def gpus(self) -> list[str]:
        """Take those GPUs that are there, or as many as AVSEP_GPUS says, for which an autoscaler is waited for.

        Gives each one's node where torch finds no CUDA with it, and nothing where it does.
        """
        ray = self._ray
        asked = _whole_number("AVSEP_GPUS")
        wanted = int(ray.cluster_resources().get("GPU", 0)) if asked is None else asked
        if not wanted:
            return []
        place = ray.remote(Held).options(num_cpus=0, num_gpus=1)
        places = [place.remote(NoCuda) for _ in range(wanted)]  # what waits is what an autoscaler sees
        answers = [p.call.remote() for p in places]
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

        A task whose worker died is tried twice again, then it is WorkerLost. `recover` gets the item
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
                raise WorkerLost(" ".join(str(error.cause).split())[:200]) from None
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except _lost_errors(self._ray) as error:
            raise WorkerLost(" ".join(str(error).split())[:200]) from None

    def actors(self, make: Callable[[], Any], count: int, *, gpus: float) -> list[Callable[..., Future]]:
        """Start `count` actors, each holding what `make` builds; return a caller for each.

        A caller can be sent to tasks. Each takes `gpus` of a GPU; of CPUs they claim none, since
        they work while the tasks that call them wait.
        """
        actor = self._ray.remote(Held).options(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=3)
        return [RemoteCall(actor.remote(make)) for _ in range(count)]


def _lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    e = ray.exceptions
    return (e.WorkerCrashedError, e.OutOfMemoryError, e.NodeDiedError, e.ObjectLostError)


class Held:
    """An actor's body: an expensive object, built once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        one_thread()
        self.target = make()

    def call(self, *arguments: Any) -> Any:
        """Call the object."""
        return self.target(*arguments)


class NoCuda:
    """Says of the node that it is on whether torch finds CUDA there."""

    def __call__(self) -> str:
        """Return the node's address if it doesn't, else nothing."""
        import ray
        import torch

        return "" if torch.cuda.is_available() else str(ray.util.get_node_ip_address())


class RemoteCall:
    """Call an actor's object from any task; the result is a future."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, *arguments: Any) -> Future:
        """Start the call."""
        return self.actor.call.remote(*arguments).future()


def train_workers(fit: Callable[[dict[str, Any]], None], job: dict[str, Any], out: str, runner: OnRay) -> None:
    """Run `fit(job)` in Ray Train's workers: one a GPU, else one a node.

    When one dies, they are all started again on what is there once the cluster has noticed, twice at most.
    """
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    base: Any = TorchConfig().backend_cls

    class Backend(base):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(meet_at_ray_s_address)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        backend_cls = Backend

    fs, folder = storage.filesystem(storage.join(out, "ray"))

    def train_once() -> None:
        n_gpus = runner.n_gpus
        trainer = TorchTrainer(
            fit,
            train_loop_config=job | {"device": "cuda" if n_gpus else "cpu"},  # Ray hides GPUs from nobody
            torch_config=Config(),
            scaling_config=ScalingConfig(
                num_workers=n_gpus or runner.n_nodes,
                use_gpu=n_gpus > 0,
                resources_per_worker={"CPU": 0, "GPU": 1} if n_gpus else {"CPU": 1},  # a GPU's node may offer no CPUs
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=f"train-{time.time_ns():x}",  # an old name would resume Ray's own record of an old run
                storage_path=folder,
                storage_filesystem=fs,
            ),
        )
        trainer.fit()

    for _ in range(2):
        with contextlib.suppress(TrainingFailedError):
            return train_once()
        time.sleep(_NOTICED_S)  # Ray's own restart would wait for a lost node, for ever
    train_once()


def meet_at_ray_s_address() -> None:
    """Have gloo use the interface of this node's address: else it takes the host's name, often that of the loopback."""
    import ray

    address = ray.util.get_node_ip_address()
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):  # it has none
            answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


Runner = InProcess | OnRay


def map_in_order(runner: Runner, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Map over items and return the results in the items' order."""
    done = dict(runner.map(_numbered, ((i, function, item) for i, item in enumerate(items))))
    return [done[i] for i in range(len(items))]


def _numbered(number: int, function: Callable[..., Any], item: tuple[Any, ...]) -> tuple[int, Any]:
    return number, function(*item)


def one_thread() -> None:
    """Keep a worker to one thread: processes are the parallelism, and busy threads get in each other's way."""
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def session(in_process: bool = False) -> Iterator[Runner]:
    """Give a runner: a plain loop, the cluster that RAY_ADDRESS names, or Ray on this machine.

    Ray on this machine starts quietly and is stopped at the end; sessions nest, and an inner one
    uses the outer one's Ray. AVSEP_CPUS says how many workers this machine is to have, other than its cores, and
    AVSEP_GPUS how many of its GPUs are used; on a cluster that many are waited for.
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
        "num_cpus": _whole_number("AVSEP_CPUS", least=1),
        "num_gpus": _whole_number("AVSEP_GPUS"),
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


def init_ray(address: str, **settings: Any) -> None:
    """Connect to Ray, or start it, without a word."""
    import ray

    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            **settings,
        )
    except SystemExit:  # Ray's answer to SIGTERM meanwhile
        raise KeyboardInterrupt from None


def join_ray(address: str) -> None:
    """Connect to the cluster that RAY_ADDRESS names."""
    where = re.fullmatch(r"(?:ray://)?\[?([^/]*?)\]?:(\d+)", address)
    until = time.monotonic() + _HEAD_S
    try:
        while where:  # Ray itself asks for minutes
            try:
                socket.create_connection((where[1], int(where[2])), timeout=_HEAD_S).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
        init_ray(address)
    except Exception as error:  # of many kinds
        why = str(error).strip().splitlines()[0].rstrip(".")
        fail(f"RAY_ADDRESS={address}: {why}; give HEAD:6379 of a cluster, or unset it to run on this machine")


def start_ray(settings: dict[str, Any]) -> None:
    """Start Ray on this machine.

    Its parts give each other 15 and 30 s, too little where much else runs: then it is tried again, with files in cache.
    """
    folder = ray_folder()
    for left in reversed(range(_STARTS)):
        before = _children()
        try:
            return init_ray("local", _temp_dir=folder, **settings)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of no kind of its own
            why = _why_no_ray(folder, _children() - before, error)
            _end(_children() - before)
        if left:
            say(f"Ray didn't start on this machine: {why}; trying again")
    fail(f"Ray didn't start on this machine in {_STARTS} tries: {why}; try again when less runs, or --in-process")


def ray_folder() -> str:
    """Choose the folder of Ray's files: RAY_TMPDIR's or TMPDIR's, or /tmp's, with a note, where that can't be used."""
    variable = next((v for v in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(v)), None)
    why = ""
    if variable:
        folder = os.path.join(os.path.abspath(os.environ[variable]), "ray")
        if not (why := _unfit(folder)):
            return folder
    for folder in ("/tmp/ray", f"/tmp/ray-{os.getuid()}"):
        if not (fallen := _unfit(folder)):
            if variable:
                say(f"note: {variable}={os.environ[variable]} {why}; Ray's files go to {folder}")
            return folder
    where = f"{variable}={os.environ[variable]} {why}" if variable else f"/tmp/ray {fallen}"
    fail(f"{where}; set RAY_TMPDIR to a short path that can be written to")


def _unfit(folder: str) -> str:
    """Say why Ray can't have its files in a folder; empty where it can."""
    socket_path = os.path.join(folder, f"session_2026-01-01_00-00-00_000000_{os.getpid()}", "sockets", "plasma_store")
    if over := max(0, len(os.fsencode(socket_path)) - _SOCKET_BYTES):
        return f"is {over} characters too long for Ray's sockets"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return "can't be written to"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "can't be written to"


def _children() -> set[int]:
    """List this process's children."""
    found: set[int] = set()
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as f:
            found |= set(map(int, f.read().split()))
    return found


def _why_no_ray(folder: str, started: set[int], error: Exception) -> str:
    """Say why Ray didn't start: its raylet's last words where that has ended."""
    for pid in started:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
            if "(raylet) Z" in f.read():
                logs = sorted(glob.glob(os.path.join(glob.escape(folder), f"session_*_{os.getpid()}/logs/raylet.out")))
                return f"its raylet ended{_last_words(logs[-1]) if logs else ''}"
    return f"{' '.join(str(error).split()).rstrip('.')} (it lives, but was given 30 s)"


def _last_words(log: str) -> str:
    """Quote the error by which a raylet ended, and the function that it ended in."""
    with open(log, errors="replace") as f:
        text = f.read()
    fatal = re.findall(r"^\[[^\]]* [CFE] [^\]]*\] \(raylet\) \S+ +(.*)$", text, re.M)
    if not fatal:
        return ""
    where = re.search(r"ray::raylet::(\w+::\w+)\(\)", text)
    words = fatal[-1].rpartition("work with you to fix it. ")[2]
    return f": {words[:200]}{f' in {where[1]}' if where else ''}"


def _end(processes: set[int]) -> None:
    """End what a failed start left running."""
    for number, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + wait_s
        while time.monotonic() < until and any(not _ended(pid) for pid in processes):
            time.sleep(0.05)


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _whole_number(variable: str, least: int = 0) -> int | None:
    text = os.environ.get(variable)
    if text and (not text.isdecimal() or int(text) < least):
        fail(f"{variable}={text}: it must be a whole number from {least} up, such as 4; or leave it out")
    return int(text) if text else None


class Progress:
    """Show how far a run is, over seconds or weeks.

    A bar with rate and time left on a terminal, a plain line now and then elsewhere. With `status` the
    same goes to a JSON file, and with `metrics` to Ray's metrics. The rate is that of the last hour.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        rejected: Mapping[str, int] | None = None,
        every_s: float = 5.0,
        status: str | None = None,
        metrics: bool = False,
    ) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.count = done
        self.rejected = Counter(rejected or {})
        self.in_flight = 0
        self.details: dict[str, Any] = {}  # more for the status file
        self.note = ""
        self._status = status
        self.seconds: Counter[str] = Counter()  # by stage
        self._at_start, self._started, self._said = done, time.monotonic(), time.monotonic()
        self._began, self._written = time.time(), -math.inf
        self._window: deque[tuple[float, int]] = deque([(self._started, done)])
        self._metrics = _Metrics(what) if metrics else None
        shown = sys.stderr.isatty() and not as_json()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit) if shown else None

    def add(
        self,
        count: int,
        note: str = "",
        *,
        rejected: Mapping[str, int] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Count finished items, those that were rejected by reason, and the worker-seconds of each stage."""
        self.count += count
        self.note = note or self.note
        self.rejected.update(rejected or {})
        self.seconds.update(seconds or {})
        now = time.monotonic()
        if now - self._window[-1][0] >= 1.0:
            self._window.append((now, self.count))
            while now - self._window[1][0] > _RATE_WINDOW_S:
                self._window.popleft()
        if self._metrics:
            n_rejected = sum((rejected or {}).values())
            self._metrics.add({"done": count - n_rejected, **(rejected or {})}, seconds or {})
        self._show()
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail())
            self._bar.update(count)
        elif now - self._said >= self._interval_s() or self.count == self.total:
            self._said = now
            tail = self._tail()
            say(
                f"{self.what}: {self.count}/{self.total} {self.unit}, {self.rate:.2f}/s, "
                f"{duration(self.seconds_left)} left{'; ' if tail else ''}{tail}",
                event="progress",
                pipeline=self.what,
                done=self.count,
                total=self.total,
                rejected=dict(self.rejected),
                rate_per_s=round(self.rate, 4),
            )
        self.write_status()

    def failed(self, shard: str, reason: str) -> None:
        """Count a failure that the run survives."""
        if self._metrics:
            self._metrics.failed(shard, reason)

    def _show(self) -> None:
        if self._metrics:
            self._metrics.show(self.in_flight, self.rate, self.total - self.count)

    @property
    def rate(self) -> float:
        """Items a second, in the last hour."""
        since, count = self._window[0]
        return (self.count - count) / max(time.monotonic() - since, 1e-3)

    @property
    def seconds_left(self) -> float:
        """How long the rest takes at that rate."""
        left = self.total - self.count
        return left / self.rate if self.rate else math.inf if left else 0.0

    def _interval_s(self) -> float:
        return self.every_s if time.monotonic() - self._started < 300 else 12 * self.every_s

    def _tail(self) -> str:
        parts = []
        if self.rejected.total():
            most = ", ".join(f"{reason} {n}" for reason, n in self.rejected.most_common(3))
            parts.append(f"{self.rejected.total()} rejected ({most})")
        if self.in_flight:
            parts.append(f"{self.in_flight} in flight")
        if stages := self._throughput():
            parts.append("a worker: " + ", ".join(f"{stage} {rate:.2g}/s" for stage, rate in stages.items()))
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)

    def _throughput(self) -> dict[str, float]:
        """Items a worker-second, by stage."""
        return {stage: (self.count - self._at_start) / s for stage, s in self.seconds.items() if s > 0}

    def write_status(self, state: str = "running") -> None:
        """Write the status file, at most every few seconds while the run lasts."""
        now = time.monotonic()
        if self._status is None or (state == "running" and now - self._written < _STATUS_EVERY_S):
            return
        self._written = now
        left = self.seconds_left
        stages = {
            stage: {"worker_seconds": round(self.seconds[stage], 1), "per_worker_second": round(rate, 3)}
            for stage, rate in self._throughput().items()
        }
        raw = {
            "what": self.what,
            "state": state,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began)),
            "total": self.total,
            "done": self.count,
            "rejected": dict(self.rejected.most_common()),
            "in_flight": self.in_flight,
            "rate_per_s": round(self.rate, 4),
            "seconds_left": round(left) if math.isfinite(left) else None,
            "stages": stages,
            **self.details,
        }
        with contextlib.suppress(OSError):  # a full disk stops the shards, with a better message
            storage.write_text(self._status, json.dumps(raw, indent=1) + "\n")

    def __enter__(self) -> Progress:
        self.write_status()
        self._show()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.in_flight = 0
        self._show()
        self.write_status("stopped" if kind else "finished")
        if self._bar is not None:
            self._bar.close()


_RATE_WINDOW_S = 3600.0
_STATUS_EVERY_S = 5.0


class _Metrics:
    """A run's figures among Ray's metrics, where Prometheus finds them with `ray_` before their names."""

    def __init__(self, what: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._pipeline = {"pipeline": what}
        self._items = Counter("avsep_items", "finished, by outcome", ("pipeline", "outcome"))
        self._stages = Counter("avsep_stage_seconds", "worker-seconds, by stage", ("pipeline", "stage"))
        self._failures = Counter("avsep_failures", "failures survived, by shard", ("pipeline", "shard", "reason"))
        self._in_flight = Gauge("avsep_in_flight", "items that workers have", ("pipeline",))
        self._rate = Gauge("avsep_rate", "items a second in the last hour", ("pipeline",))
        self._left = Gauge("avsep_left", "items still to do, those in flight among them", ("pipeline",))

    def add(self, outcomes: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        for counter, tag, values in ((self._items, "outcome", outcomes), (self._stages, "stage", seconds)):
            for name, value in values.items():
                if value > 0:
                    counter.inc(value, {**self._pipeline, tag: name})

    def failed(self, shard: str, reason: str) -> None:
        self._failures.inc(1, {**self._pipeline, "shard": shard, "reason": reason})

    def show(self, in_flight: int, rate: float, left: int) -> None:
        for gauge, value in ((self._in_flight, in_flight), (self._rate, rate), (self._left, left)):
            gauge.set(value, self._pipeline)


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it.

    >>> [duration(s) for s in (42, 600, 20_000, 2_300_000)]
    ['42 s', '10 min', '5.6 h', '26.6 days']
    """
    if not math.isfinite(seconds):
        return "an unknown time"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


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


def say(text: str, **fields: Any) -> None:
    """Print a line at once; with AVSEP_LOG=json it is an object with these fields, on stderr."""
    if as_json():
        _write("info", text, fields)
    else:
        console.say(text)


def log(text: str, **fields: Any) -> None:
    """Log what is for machines alone: nothing without AVSEP_LOG=json, which makes it an object on stderr."""
    if as_json():
        _write("info", text, fields)


def complain(text: str) -> None:
    """Print a line to stderr."""
    if as_json():
        _write("error", text, {})
    else:
        console.complain(text)


def as_json() -> bool:
    """Tell whether a log is wanted that machines read: AVSEP_LOG=json."""
    return os.environ.get("AVSEP_LOG") == "json"


def log_as_asked() -> None:
    """With AVSEP_LOG=json, make everything that this process logs one JSON object a line on stderr."""
    if as_json() and not any(isinstance(h, _JsonLines) for h in logging.getLogger().handlers):
        logging.getLogger().addHandler(_JsonLines(logging.WARNING))
        sys.excepthook = _log_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    _write("critical", f"{kind.__name__}: {error}", {"exception": text})


class _JsonLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = logging.Formatter().formatException(record.exc_info)
        _write(record.levelname.lower(), record.getMessage(), fields)


# user:password@ of URLs, and what signs them
_SECRETS = re.compile(
    r"(?<=://)[^/@\s\"]+(?=@)|(?<=[?&])[^?&=\s]*(?:sig|signature|token|credential|key)[^?&=\s]*=[^&\s\"]+", re.I
)


def _write(level: str, text: str, fields: Mapping[str, Any]) -> None:
    now = time.time()
    at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = _redacted({"time": at, "level": level, "message": text, **fields})
    console.complain(json.dumps(line, ensure_ascii=False, default=str))


def _redacted(value: Any) -> Any:
    """Hide secrets in a text, or in the texts of a mapping or list."""
    if isinstance(value, str):
        return _SECRETS.sub("…", storage.redact(value))
    if isinstance(value, Mapping):
        return {k: _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, (list, tuple)) else value


def fail(text: str) -> NoReturn:
    """Stop with status 2 and one line."""
    raise UsageError(text)
