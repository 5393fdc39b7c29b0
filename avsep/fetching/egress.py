"""Who may download when: identities, a token bucket for each, and pauses for those that were blocked."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from avsep import storage
from avsep.records import Reason

_PROXY = re.compile(r"(https?|socks4a?|socks5h?)://(?:[^@/\s]*@)?(\[[0-9A-Fa-f:.]+\]|[^:/@\s]+)(:\d+)?/?")
_UNANSWERED = (Reason.EGRESS_BLOCKED, Reason.TRANSIENT, Reason.TIMEOUT)  # the download comes again
_MACHINE = "machine"  # how identities are called that are machines
_TRIAL_POLL_S = 5.0
_SOURCE_POLL_S = 2.0
_WINDOW_S = 3600.0  # the present rate is that of the last hour …
_FEWEST = 20  # … once this many downloads have been seen
_OUTDATED_IN_A_ROW = 20  # downloads that fail as if yt-dlp no longer understood YouTube: no more are worth a try


@dataclass(frozen=True)
class EgressIdentity:
    """What a site counts requests by: a machine's address, a proxy, or an account's cookies."""

    name: str  # unique, without secrets
    proxy: str | None = field(default=None, repr=False)  # URL; may hold a password
    cookies: str | None = None  # path or URI of a cookie file, which is copied, never written to


@dataclass(frozen=True)
class Lease:
    """Leave to start one download as `identity`."""

    identity: EgressIdentity
    pauses: int = 0  # of this identity so far: tells late answers from new ones
    source: str = ""  # what is downloaded


@dataclass(frozen=True)
class Wait:
    """No leave yet: ask again after this time."""

    seconds: float


@dataclass(frozen=True)
class Stop:
    """No leave any more, to anybody: the run is to end, for this reason."""

    reason: str


@dataclass(frozen=True)
class IdentityStatus:
    """Where one identity stands."""

    name: str
    paused_s: float  # still to go; 0: it may download
    strikes: int  # pauses since its last success
    tokens: float
    outcomes: dict[str, int]  # downloads by outcome; `ok` are those that came


def identities(proxies: Sequence[str] = (), cookies: Sequence[str] = ()) -> tuple[EgressIdentity, ...]:
    """Make an identity of each proxy or cookie file; given both, the n-th file belongs to the n-th proxy.

    Nothing given is no identity: `EgressBudget` then takes each machine as one. Raises ValueError
    for what is no proxy, is given twice or doesn't pair, FileNotFoundError for a missing file.
    """
    names: list[str] = []
    for url in proxies:
        match = _PROXY.fullmatch(url)
        if not match:
            shown = re.sub(r"//.*@", "//…@", url)
            raise ValueError(f"proxy {shown!r}: give http://, https:// or socks5://[USER:PASSWORD@]HOST:PORT")
        names.append(f"{match[1]}://{match[2]}{match[3] or ''}")
    for path in cookies:
        if not storage.exists(path):
            raise FileNotFoundError(f"cookie file {path} doesn't exist")
    _each_once("proxy", proxies, names)
    _each_once("cookie file", cookies, cookies)
    if proxies and cookies:
        if len(proxies) != len(cookies):
            raise ValueError(f"{len(proxies)} proxies and {len(cookies)} cookie files are paired: give as many of each")
        made = [
            EgressIdentity(f"{name} with {storage.name(file)}", proxy, file)
            for name, proxy, file in zip(names, proxies, cookies, strict=True)
        ]
    else:
        made = [EgressIdentity(name, proxy=proxy) for name, proxy in zip(names, proxies, strict=True)]
        made += [EgressIdentity(f"cookies {file}", cookies=file) for file in cookies]
    if len({i.name for i in made}) < len(made):  # one proxy under several accounts
        made = [EgressIdentity(f"{i.name} #{n}", i.proxy, i.cookies) for n, i in enumerate(made, 1)]
    return tuple(made)


def _each_once(what: str, given: Sequence[str], shown: Sequence[str]) -> None:
    for n, one in enumerate(given):
        if one in given[:n]:
            raise ValueError(f"{what} {shown[n]} is given twice; each is one identity")


class TokenBucket:
    """Tokens that drip in at `per_hour`, and are kept up to `burst`.

    In any stretch of T hours at most `burst + per_hour · T` are taken. It starts with one token, so
    that a program that is restarted again and again doesn't get a burst each time.
    """

    def __init__(self, per_hour: float, burst: float = 1.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not (per_hour > 0 and burst >= 1):
            raise ValueError(f"rate {per_hour}/h, burst {burst}; the rate must be positive, the burst at least 1")
        self.per_hour, self.burst = per_hour, burst
        self._clock, self._level, self._at = clock, 1.0, clock()

    @property
    def level(self) -> float:
        """Tokens there now."""
        now = self._clock()
        self._level = min(self.burst, self._level + max(0.0, now - self._at) * self.per_hour / 3600)
        self._at = now
        return self._level

    @property
    def wait_s(self) -> float:
        """Seconds until there is a token."""
        missing = 1 - self.level
        return missing * 3600 / self.per_hour if missing > 1e-9 else 0.0

    def restore(self, level: float, past_s: float) -> None:
        """Go on from a level that was left some seconds ago."""
        self._level = min(self.burst, max(0.0, level) + past_s * self.per_hour / 3600)
        self._at = self._clock()

    def take(self) -> bool:
        """Take a token if there is one."""
        if self.wait_s:
            return False
        self._level = max(0.0, self._level - 1)
        return True


class EgressBudget:
    """What all workers together may download: a token bucket an identity, and pauses.

    `acquire` gives a lease or says how long to wait, and each lease is answered by `report`. A
    blocked identity starts nothing for `cooldown_s`, twice that the next time, up to
    `max_cooldown_s`, and after a pause one download at a time until one succeeds. Late answers of
    downloads that began before a pause change nothing, so many at once are one strike. Other
    identities go on. Without `identities` each machine that asks is one. Once many downloads in a
    row have failed as if YouTube had changed, `acquire` tells everybody to stop.

    A plain object with a lock: threads share it as it is, machines as a Ray actor.
    """

    def __init__(
        self,
        identities: Sequence[EgressIdentity] = (),
        *,
        per_hour: float = 250.0,  # an identity; YouTube allows a guest about 300
        burst: float = 5.0,
        cooldown_s: float = 600.0,
        max_cooldown_s: float = 7200.0,
        trial_s: float = 1800.0,  # a lease on trial that isn't answered is given up after this
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,  # which goes on between two runs
        jitter: Callable[[], float] = random.random,  # 0 … 1; a pause is up to a tenth longer
    ) -> None:
        self._per_hour, self._burst = per_hour, burst
        self._cooldown_s, self._max_cooldown_s, self._trial_s = cooldown_s, max_cooldown_s, trial_s
        self._clock, self._wall, self._jitter = clock, wall, jitter
        self._lock = threading.Lock()
        self._finished: deque[float] = deque()
        self._began: float | None = None
        self._by_machine = not identities
        self._accounts: dict[str, _Account] = {}
        self._absent: dict[str, _Account] = {}  # of earlier runs' identities, which may return
        for identity in identities:
            self._open(identity)
        self._busy: dict[str, float] = {}  # source → until when it surely is
        self._outdated_in_a_row = 0

    def acquire(self, machine: str = "", source: str = "") -> Lease | Wait | Stop:
        """Take an identity's token for a download of `source` from `machine`, or say to wait, or to stop.

        While one lease is out for a source there is no second: what comes of it may serve both. It is
        Stop once 20 downloads in a row were reported as `tool_outdated`, until one ends otherwise.
        """
        with self._lock:
            if (outdated := self._outdated_in_a_row) >= _OUTDATED_IN_A_ROW:
                failed = f"{outdated} downloads in a row failed as if YouTube had changed"
                return Stop(f"{failed}: update yt-dlp, then run this again")
            if source and self._busy.get(source, -math.inf) > self._clock():
                return Wait(_SOURCE_POLL_S)
            accounts = list(self._accounts.values())
            if self._by_machine:
                name = f"{_MACHINE} {machine}".strip()
                accounts = [self._accounts.get(name) or self._open(EgressIdentity(name))]
            now = self._clock()
            if self._began is None:
                self._began = now
            waits = [account.wait_s(now) for account in accounts]
            ready = [a for a, wait in zip(accounts, waits, strict=True) if wait <= 0]
            if not ready:
                return Wait(min(waits))
            account = max(ready, key=lambda a: (a.strikes == 0, a.bucket.level))
            account.bucket.take()
            if account.strikes:
                account.trial_until = now + self._trial_s
            if source:
                self._busy[source] = now + self._trial_s
            return Lease(account.identity, account.pauses, source)

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Answer a lease: None when the download came, else why it didn't."""
        with self._lock:
            # unknown after a restart
            account = self._accounts.get(lease.identity.name) or self._open(lease.identity)
            now = self._clock()
            self._busy.pop(lease.source, None)
            account.outcomes["ok" if outcome is None else str(outcome)] += 1
            self._outdated_in_a_row = self._outdated_in_a_row + 1 if outcome == Reason.TOOL_OUTDATED else 0
            if outcome not in _UNANSWERED:
                self._finished.append(now)
            if lease.pauses != account.pauses:
                return  # began before the latest pause
            account.trial_until = None
            if outcome is None:
                account.strikes = 0
            elif outcome == Reason.EGRESS_BLOCKED:
                pause_s = min(self._cooldown_s * 2**account.strikes, self._max_cooldown_s)
                account.paused_until = now + pause_s * (1 + 0.1 * self._jitter())
                account.strikes = min(account.strikes + 1, 32)
                account.pauses += 1

    def seconds_left(self, downloads: int) -> float:
        """Say how long `downloads` more will take: as the tokens come, or slower when the last hour was.

        Pauses count to their ends. Infinite while no machine has asked.
        """
        with self._lock:
            now = self._clock()
            if downloads <= 0:
                return 0.0
            pauses = sorted(a.paused_s(now) for a in self._accounts.values())
            # `k` identities work from their pauses' ends on: Σ rate · (T − pause) = downloads
            allowed_s, total_s = float("inf"), 0.0
            for k, pause_s in enumerate(pauses, 1):
                if pause_s >= allowed_s:
                    break
                total_s += pause_s
                allowed_s = (downloads * 3600 / self._per_hour + total_s) / k
            while self._finished and self._finished[0] < now - _WINDOW_S:
                self._finished.popleft()
            if len(self._finished) < _FEWEST or self._began is None:
                return allowed_s
            span_s = min(now - self._began, _WINDOW_S)
            return max(allowed_s, downloads * span_s / len(self._finished))

    def allowance(self, seconds: float = 3600.0) -> float:
        """Say how many downloads the budget lets start within `seconds` from now, pauses counted to their ends."""
        with self._lock:
            now = self._clock()
            return sum(a.allowance(now, seconds) for a in self._accounts.values())

    def status(self) -> list[IdentityStatus]:
        """Say where each identity stands."""
        with self._lock:
            now = self._clock()
            return [
                IdentityStatus(a.identity.name, a.paused_s(now), a.strikes, a.bucket.level, dict(a.outcomes))
                for a in self._accounts.values()
            ]

    def state(self) -> dict[str, Any]:
        """Return what a restarted program must know, for JSON: tokens, pauses, strikes, by identity.

        Identities of earlier runs, which this one was not given, stay in it.
        """
        with self._lock:
            now = self._clock()
            accounts = {
                name: {"tokens": a.bucket.level, "paused_s": a.paused_s(now), "strikes": a.strikes}
                for name, a in (self._absent | self._accounts).items()
            }
            return {"at": self._wall(), "identities": accounts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned some time ago; what it doesn't know starts anew."""
        with self._lock:
            past_s = max(0.0, self._wall() - state["at"])
            for name, spent in state["identities"].items():
                account = self._accounts.get(name)
                if account is None:
                    ours = self._by_machine and name.startswith(_MACHINE)
                    account = self._open(EgressIdentity(name)) if ours else self._remember(name)
                account.bucket.restore(spent["tokens"], past_s)
                account.paused_until = self._clock() + max(0.0, spent["paused_s"] - past_s)
                account.strikes = spent["strikes"]

    def _remember(self, name: str) -> _Account:
        bucket = TokenBucket(self._per_hour, self._burst, clock=self._clock)
        return self._absent.setdefault(name, _Account(EgressIdentity(name), bucket))

    def _open(self, identity: EgressIdentity) -> _Account:
        if identity.name in self._accounts:
            raise ValueError(f"two identities are called {identity.name}; names must be unique")
        bucket = TokenBucket(self._per_hour, self._burst, clock=self._clock)
        account = self._accounts[identity.name] = _Account(identity, bucket)
        return account


@dataclass
class _Account:
    identity: EgressIdentity
    bucket: TokenBucket
    paused_until: float = float("-inf")
    strikes: int = 0  # since its last success; while there are any, one download at a time
    pauses: int = 0
    trial_until: float | None = None
    outcomes: Counter[str] = field(default_factory=Counter)

    def paused_s(self, now: float) -> float:
        return max(0.0, self.paused_until - now)

    def allowance(self, now: float, seconds: float) -> float:
        pause_s = self.paused_s(now)
        if pause_s >= seconds:
            return 0.0
        bucket = self.bucket
        ready = min(bucket.burst, bucket.level + pause_s * bucket.per_hour / 3600)  # when the pause ends
        return ready + (seconds - pause_s) * bucket.per_hour / 3600

    def wait_s(self, now: float) -> float:
        trial_s = 0.0
        if self.trial_until is not None and now < self.trial_until:
            trial_s = min(_TRIAL_POLL_S, self.trial_until - now)  # its answer may come at any time
        return max(self.paused_s(now), trial_s, self.bucket.wait_s)
