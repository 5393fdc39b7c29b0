"""The egress budget that a run's workers share, on Ray, and how its downloads go."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from avsep import fetching, storage
from avsep.console import duration
from avsep.fetching import EgressBudget, IdentityStatus, Lease, MediaStore, Stop, Wait, identities
from avsep.records import Reason, Segment
from pipelines import runners
from pipelines.actors import Caller
from pipelines.console import fail, say
from pipelines.progress import Progress

FETCH_LOCK = "fetch.lock"  # in a media store, and in --out, while a run downloads
EGRESS_FILE = "egress.json"  # in a media store: what each identity has spent
ASK_EVERY_S = 30.0  # between looks at how the downloads stand
_SAVE_EVERY_S = 5.0
_JOIN_S = 5.0
FOLLOW_S = 20.0  # between looks at what another run has downloaded


class BudgetKeeper:
    """The budget itself, in one place; what it has spent is kept beside the media store."""

    def __init__(
        self, proxies: Sequence[str], cookies: Sequence[str], per_hour: float, store: str, metrics: bool = False
    ) -> None:
        self.budget = EgressBudget(identities(proxies, cookies), per_hour=per_hour)
        self.path = storage.join(store, EGRESS_FILE)
        self._saved = self._shown = -math.inf
        self._metrics = EgressMetrics() if metrics else None
        with contextlib.suppress(FileNotFoundError):
            self.budget.restore(json.loads(storage.read_bytes(self.path)))

    def acquire(self, machine: str, source: str) -> Lease | Wait | Stop:
        """Give a lease, or say how long to wait, or to stop."""
        answer = self.budget.acquire(machine, source)
        self._keep(lease=isinstance(answer, Lease))
        return answer

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""
        self.budget.report(lease, outcome)
        if self._metrics:
            self._metrics.downloaded("ok" if outcome is None else str(outcome))
        self._keep(paused=outcome == Reason.EGRESS_BLOCKED)

    def outlook(self, downloads: int) -> tuple[float, list[IdentityStatus]]:
        """Say how long so many downloads more will take at the present rate, and how the identities are."""
        self._keep()
        return self.budget.seconds_left(downloads), self.budget.status()

    def _keep(self, *, lease: bool = False, paused: bool = False) -> None:
        """Write what was spent, and show it: a pause at once, all else now and then."""
        now = time.monotonic()
        if paused or (lease and now - self._saved > _SAVE_EVERY_S):
            self._saved = now
            storage.write_text(self.path, json.dumps(self.budget.state(), indent=1) + "\n")
        if self._metrics and (paused or now - self._shown > _SAVE_EVERY_S):
            self._shown = now
            self._metrics.show(self.budget)


@dataclass(frozen=True)
class SharedBudget:
    """The budget as a worker has it: each method calls the keeper's of that name."""

    call: Caller

    def acquire(self, machine: str = "", source: str = "") -> Lease | Wait | Stop:
        """Give a lease, or say how long to wait, or to stop."""
        return self.call(BudgetKeeper.acquire, machine, source).result()

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""
        self.call(BudgetKeeper.report, lease, outcome).result()

    def outlook(self, downloads: int) -> tuple[float, list[IdentityStatus]]:
        """Say how long so many downloads more will take at the present rate, and how the identities are."""
        return self.call(BudgetKeeper.outlook, downloads).result()


class EgressMetrics:
    """What an egress budget allows, among Ray's metrics; its holder shows it, so that pauses show, too."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._downloads = Counter("avsep_egress_downloads", "downloads tried, by outcome", ("outcome",))
        self._identities = Gauge("avsep_egress_identities", "egress identities, by state", ("state",))
        self._allowance = Gauge("avsep_egress_allowance", "downloads that may start in the next hour")

    def downloaded(self, outcome: str) -> None:
        """Count a download."""
        self._downloads.inc(1, {"outcome": outcome})

    def show(self, budget: EgressBudget) -> None:
        """Show where the identities stand; one on trial makes a download at a time until one succeeds."""
        states = Counter("paused" if i.paused_s > 0 else "on_trial" if i.strikes else "active" for i in budget.status())
        for state in ("active", "on_trial", "paused"):
            self._identities.set(states[state], {"state": state})
        self._allowance.set(budget.allowance())


class Outlook:
    """Shows how the downloads of a run go: now and then in its progress, and a pause of an identity when it begins.

    As a context it looks by itself, too: where every identity is paused, no shard ends that would let it look.
    """

    def __init__(self, store: MediaStore, budget: SharedBudget, progress: Progress) -> None:
        self.store, self.budget, self.progress = store, budget, progress
        self._asked = -math.inf
        self._paused: set[str] = set()  # identities whose pause was told
        self._looking, self._ended = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Outlook:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join(_JOIN_S)

    def settle(self, segments: Sequence[Segment]) -> None:
        """Take note that these segments are done with."""
        missing = self.store.missing
        missing -= {s.segment_id for s in segments}
        if not missing or time.monotonic() - self._asked >= ASK_EVERY_S:
            self.look()

    def look(self) -> None:
        """Ask the budget where it stands, and put that into the progress."""
        with self._looking:
            self._asked, n_missing = time.monotonic(), len(self.store.missing)
            left_s, accounts = self.budget.outlook(n_missing)
            self.progress.details["egress"] = {
                "to_fetch": n_missing,
                "seconds_left": round(left_s) if math.isfinite(left_s) else None,
                "identities": [asdict(a) for a in accounts],
            }
            paused = {a.name: a for a in accounts if a.paused_s > 0}
            for name in paused.keys() - self._paused:
                seconds = paused[name].paused_s
                say(
                    f"{name} pauses for {duration(seconds)}: blocked, rate-limited, or a proxy that fails",
                    event="identity_paused",
                    identity=name,
                    seconds=round(seconds),
                )
            self._paused = set(paused)
            self.progress.note = ""
            if n_missing:
                resting = f", {len(paused)} of {len(accounts)} identities paused" if paused else ""
                self.progress.note = f"{n_missing} to fetch, {duration(left_s)} at this rate{resting}"

    def _watch(self) -> None:
        while not self._ended.wait(ASK_EVERY_S):
            with contextlib.suppress(Exception):  # the budget's holder is gone: the tasks, which need it, say so
                self.look()
                self.progress.write_status()


def open_budget(arguments: argparse.Namespace, store: MediaStore, runner: runners.Runner) -> SharedBudget:
    """Make ready for downloads: check the tools, start the budget, say how long it will take."""
    try:
        for note in fetching.check_tools():
            say(f"note: {note}")
    except ModuleNotFoundError as error:
        fail(str(error))
    n_identities = max(1, len(identities(arguments.proxies, arguments.cookies)))
    left = duration(3600 * len(store.missing) / (arguments.rate * n_identities))
    say(f"{len(store.missing)} remote segments are to be fetched: {left} at the rate allowed")
    storage.sweep(store.uri, recursive=True)
    metrics = isinstance(runner, runners.OnRay)
    make = functools.partial(BudgetKeeper, arguments.proxies, arguments.cookies, arguments.rate, store.uri, metrics)
    return SharedBudget(runner.actors(make, 1, gpus=0)[0])
