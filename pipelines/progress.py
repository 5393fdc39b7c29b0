"""Progress of long runs."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from avsep import storage
from avsep.console import duration
from pipelines.console import as_json, say


class Progress:
    """Show how far a run is, over seconds or weeks.

    A bar with rate and time left on a terminal, a plain line now and then elsewhere. With `status` the
    same goes to a JSON file, and with `metrics` to Ray's metrics. The rate is that of the last hour.
    The status file is written for the last time at the end of the context; threads may write it till then.
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
        self._status, self._writing, self._ended = status, threading.Lock(), False
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
        spent = self.seconds.total()  # a stage that took next to none of it, without pictures say, tells nothing
        if stages := {stage: r for stage, r in self._throughput().items() if self.seconds[stage] > 1e-3 * spent}:
            parts.append("a worker: " + ", ".join(f"{stage} {rate:.2g}/s" for stage, rate in stages.items()))
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)

    def _throughput(self) -> dict[str, float]:
        """Items a worker-second, by stage."""
        return {stage: (self.count - self._at_start) / s for stage, s in self.seconds.items() if s > 0}

    def write_status(self, state: str = "running") -> None:
        """Write the status file, at most every few seconds while the run lasts; nothing follows another state."""
        with self._writing:  # a slow write of a thread's ends before the last one begins
            now = time.monotonic()
            early = state == "running" and now - self._written < _STATUS_EVERY_S
            if self._status is None or self._ended or early:
                return
            self._written, self._ended = now, state != "running"
            with contextlib.suppress(OSError):  # a full disk stops the shards, with a better message
                storage.write_text(self._status, json.dumps(self._as_dict(state), indent=1) + "\n")

    def _as_dict(self, state: str) -> dict[str, Any]:
        """Return what the status file holds."""
        left = self.seconds_left
        stages = {
            stage: {"worker_seconds": round(self.seconds[stage], 1), "per_worker_second": round(rate, 3)}
            for stage, rate in self._throughput().items()
        }
        return {
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
