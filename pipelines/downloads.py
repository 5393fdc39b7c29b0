"""The media store and the shared egress budget, on Ray."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from avsep import fetching, storage
from avsep.fetching import EgressBudget, IdentityStatus, Lease, identities
from avsep.records import (
    ClipError,
    Reason,
    Rejection,
    Segment,
)
from pipelines import runners
from pipelines.console import fail, say
from pipelines.progress import Progress, duration

FETCH_LOCK = "fetch.lock"  # in a media store, and in --out, while a run downloads
EGRESS_FILE = "egress.json"  # in a media store: what each identity has spent
_ASK_EVERY_S = 30.0
_SAVE_EVERY_S = 5.0
FOLLOW_S = 20.0  # between looks at what another run has downloaded
_OUTDATED_IN_A_ROW = 20  # downloads that fail as if yt-dlp no longer understood YouTube


@dataclass
class MediaStore:
    """Where remote segments' media are, and how missing ones get there."""

    uri: str
    known: dict[str, str]  # segment_id → path, as listed at the start
    missing: set[str]  # remote segments that aren't there
    siblings: dict[str, tuple[Segment, ...]]  # source → its missing segments, where there are several
    budget: SharedBudget | None = None  # None: somebody else downloads
    retried: list[dict[str, Any]] = field(default_factory=list)  # downloads that failed and were tried again
    _asked: float = -math.inf

    def of(self, segments: Sequence[Segment]) -> MediaStore:
        """Return the part that a task with these segments needs."""
        ids, sources = {s.segment_id for s in segments}, {s.source for s in segments}
        return MediaStore(
            self.uri,
            {i: self.known[i] for i in ids & self.known.keys()},
            ids & self.missing,
            {s: self.siblings[s] for s in sources & self.siblings.keys()},
            self.budget,
        )

    def locate(self, segment: Segment) -> Segment:
        """Return the segment as it is in the store, fetched when it isn't there; ClipError says why it can't be."""
        if not fetching.is_remote(segment):
            return segment
        path = self.known.get(segment.segment_id)
        if path is None:
            if self.budget is None:
                raise ClipError(Reason.MISSING, f"not in {self.uri} yet", transient=True)

            def tell(attempt: int, error: ClipError) -> None:
                self.retried.append(
                    {
                        "event": "retried",
                        "segment_id": segment.segment_id,
                        "stage": "fetch",
                        "reason": str(error.reason),
                        "attempt": attempt,
                        "detail": error.detail,
                    }
                )

            siblings = self.siblings.get(segment.source, ())
            path = fetching.fetch(segment, self.uri, self.budget, siblings=siblings, tell=tell).path
        return fetching.within(segment, path)

    def fetch_all(self, segments: Sequence[Segment]) -> list[Rejection]:
        """Bring segments' media into the store; return those that can't be had."""
        rejections = []
        for s in segments:
            try:
                self.locate(s)
            except ClipError as error:
                rejections.append(Rejection(s.segment_id, "fetch", error.reason, error.transient, detail=error.detail))
        return rejections

    def settle(self, segments: Sequence[Segment], progress: Progress) -> None:
        """Take note that these segments are done with, and now and then show how downloads go."""
        self.missing -= {s.segment_id for s in segments}
        if self.budget is None or (self.missing and time.monotonic() - self._asked < _ASK_EVERY_S):
            return
        self._asked = time.monotonic()
        left_s, identities = self.budget.outlook(len(self.missing))
        progress.details["egress"] = {
            "to_fetch": len(self.missing),
            "seconds_left": round(left_s) if math.isfinite(left_s) else None,
            "identities": [asdict(i) for i in identities],
        }
        progress.note = ""
        if self.missing:
            paused = sum(i.paused_s > 0 for i in identities)
            resting = f", {paused} of {len(identities)} identities paused" if paused else ""
            progress.note = f"{len(self.missing)} to fetch, {duration(left_s)} at this rate{resting}"


@dataclass
class SharedBudget:
    """An egress budget that all workers share: calls go to the one that holds it."""

    call: Callable[..., Future]

    def acquire(self, machine: str = "", source: str = "") -> Lease | float:
        """Give a lease, or the seconds to wait; stop the run where YouTube has changed."""
        outdated, answer = self.call("acquire", machine, source).result()
        if outdated >= _OUTDATED_IN_A_ROW:
            fail(f"{outdated} downloads in a row failed as if YouTube had changed: update yt-dlp, then run this again")
        return answer

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""
        self.call("report", lease, outcome).result()

    def outlook(self, downloads: int) -> tuple[float, list[IdentityStatus]]:
        """Say how long so many downloads more will take at the present rate, and how the identities are."""
        return self.call("seconds_left", downloads).result()[1], self.call("status").result()[1]


class HeldBudget:
    """The budget itself, behind one callable; what it has spent is kept beside the media store."""

    def __init__(
        self, proxies: Sequence[str], cookies: Sequence[str], per_hour: float, store: str, metrics: bool = False
    ) -> None:
        self.budget = EgressBudget(identities(proxies, cookies), per_hour=per_hour)
        self.path = storage.join(store, EGRESS_FILE)
        self._saved = self._shown = -math.inf
        self._metrics = EgressMetrics() if metrics else None
        with contextlib.suppress(FileNotFoundError):
            self.budget.restore(json.loads(storage.read_bytes(self.path)))

    def __call__(self, method: str, *arguments: Any) -> tuple[int, Any]:
        """Call a method; the number of 'tool outdated' answers in a row comes with its result."""
        result = getattr(self.budget, method)(*arguments)
        paused = method == "report" and arguments[1] == Reason.EGRESS_BLOCKED
        if paused or (isinstance(result, Lease) and time.monotonic() - self._saved > _SAVE_EVERY_S):
            self._saved = time.monotonic()
            storage.write_text(self.path, json.dumps(self.budget.state(), indent=1) + "\n")
        if self._metrics:
            if method == "report":
                self._metrics.downloaded("ok" if arguments[1] is None else str(arguments[1]))
            if paused or time.monotonic() - self._shown > _SAVE_EVERY_S:
                self._shown = time.monotonic()
                self._metrics.show(self.budget)
        return self.budget.outdated_in_a_row, result


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


def open_store(uri: str, segments: Sequence[Segment]) -> MediaStore | None:
    """List what the media store holds; None where no segment needs one."""
    remote = [s for s in segments if fetching.is_remote(s)]
    if not remote:
        return None
    known = fetching.find_media(uri, remote)
    missing = {s.segment_id for s in remote if s.segment_id not in known}
    by_source: dict[str, list[Segment]] = {}
    for s in remote:
        if s.segment_id in missing:
            by_source.setdefault(s.source, []).append(s)
    siblings = {source: tuple(several) for source, several in by_source.items() if len(several) > 1}
    return MediaStore(uri, known, missing, siblings)


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
    make = functools.partial(HeldBudget, arguments.proxies, arguments.cookies, arguments.rate, store.uri, metrics)
    return SharedBudget(runner.actors(make, 1, gpus=0)[0])
