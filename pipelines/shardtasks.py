"""Shards, of an extraction or of many files to separate, as Ray tasks.

How many are in flight, and what becomes of those that fail.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from avsep import extraction, fetching, lock, shards
from avsep.extraction import Done
from avsep.factors import DataConfig
from avsep.fetching import MediaStore
from avsep.records import Reason, Rejection, check_vocabularies
from avsep.work import Work
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.devices import Devices
from pipelines.downloads import Outlook
from pipelines.progress import Progress

_LEAST_CPU = 0.5  # that a task claims, however long it waits for a GPU: its process takes 0.8 GB


@dataclass(frozen=True)
class ShardTask:
    """The work on one shard, and what it needs."""

    job: Any  # what the run's shards have in common: an `Extraction`, …
    work: Work
    devices: Devices
    store: MediaStore | None = None  # its part for this shard


def extract_shard(task: ShardTask) -> Done:
    """Run one Ray task."""
    cluster.one_thread()
    devices = task.devices
    return extraction.extract_shard(task.job, task.work, devices.label, devices.factorize, task.store)


def extract_shards(
    works: Sequence[Work],
    job: Any,
    runner: runners.Runner,
    progress: Progress,
    *,
    function: Callable[[ShardTask], Done] = extract_shard,
    devices: Sequence[Devices] = (Devices(),),
    store: MediaStore | None = None,
    outlook: Outlook | None = None,
    locks: Sequence[lock.Lock] = (),
) -> None:
    """Have every shard done: the driver, which holds a bounded number of shards in flight.

    Tasks take the `devices` in turn; `function` is what each runs. Raises lock.Held when one of the locks was lost.
    """
    numbers = itertools.count()
    in_flight: dict[str, int] = {}

    def task(work: Work) -> tuple[ShardTask]:
        in_flight[work.shard] = work.n_segments if not work.probe else in_flight[work.shard]
        progress.in_flight = sum(in_flight.values())
        progress.add(0)
        whose = devices[next(numbers) % len(devices)]
        return (ShardTask(job, work, whose, store.of(work.segments) if store else None),)

    queue = runners.Queue(map(task, works))
    crashes = Crashes(queue, task, progress)
    elsewhere = any(d.factorize for d in devices)
    for done in runner.map(
        function, queue, crashes.recover, lambda: busy_share(progress.seconds) if elsewhere else 1.0
    ):
        for one in locks:
            one.check()
        work = done.work
        log_events(done)
        if work.probe:
            crashes.tried(work)
            continue
        del in_flight[work.shard]
        progress.in_flight = sum(in_flight.values())
        if outlook:
            outlook.settle(work.segments)
        progress.add(work.n_segments + len(work.culprits), rejected=done.rejected, seconds=done.seconds)


class Crashes:
    """Finds the segment that takes its worker along, and has the rest of its shard done without it.

    A shard whose worker died again and again is taken apart: its segments are tried one by one, and
    those whose worker dies are rejected. Where none does, they are too much together, and are done one after
    the other; where that fails, too, the run stops. A shard that can't be written is tried twice again, since
    an object store may have failed for a moment; then the run stops.
    """

    def __init__(self, queue: runners.Queue, task: Callable[[Work], tuple[ShardTask]], progress: Progress) -> None:
        self._queue, self._task, self._progress = queue, task, progress
        self._failed: Counter[str] = Counter()
        self._whole: dict[str, Work] = {}
        self._to_try: Counter[str] = Counter()
        self._culprits: dict[str, list[Rejection]] = {}

    def recover(self, item: tuple[ShardTask], error: Exception) -> None:
        """Deal with a task that failed, or raise."""
        (task,) = item
        work = task.work
        if isinstance(error, fetching.Stopped):
            fail(str(error))
        if isinstance(error, console.WorkerDied) and work.segments:
            self._progress.failed(work.shard, "worker_lost")
            if work.probe:
                segment_id = work.segments[0].segment_id
                detail = f"its worker died with it each time: {error}"
                self._culprits[work.shard].append(
                    Rejection(segment_id, "decode", Reason.CRASHED_DECODER, True, detail=detail)
                )
                self.tried(work)
                return
            text = f"shard {work.shard}: its worker died again and again; looking for the segment that does it"
            say(text, event="worker_lost", shard=work.shard, error=str(error))
            self._whole[work.shard], self._culprits[work.shard] = work, []
            self._to_try[work.shard] = len(work.segments)
            for s in work.segments:
                self._queue.add(self._task(replace(work, segments=(s,), probe=True)))
            return
        self._failed[work.shard] += 1
        self._progress.failed(work.shard, "not_written" if isinstance(error, OSError) else "error")
        if not isinstance(error, OSError) or self._failed[work.shard] > 2:
            raise error
        say(f"shard {work.shard}: {error}; trying again", event="not_written", shard=work.shard)
        self._queue.add(self._task(work))

    def tried(self, work: Work) -> None:
        """Take note that a probe has ended; after the last the shard is done without the culprits."""
        self._to_try[work.shard] -= 1
        if self._to_try[work.shard] == 0:
            whole, culprits = self._whole.pop(work.shard), self._culprits.pop(work.shard)
            ids = {r.segment_id for r in culprits}
            if not culprits and whole.apart:
                fail(
                    f"shard {work.shard}: its worker dies with its {len(whole.segments)} segments, though with none "
                    "of them alone; give workers more memory, or run fewer at once (AVSEP_CPUS)"
                )
            rest = tuple(s for s in whole.segments if s.segment_id not in ids)
            again = replace(
                whole, segments=rest, culprits=(*whole.culprits, *culprits), apart=whole.apart or not culprits
            )
            self._queue.add(self._task(again))


def busy_share(seconds: Mapping[str, float]) -> float:
    """Return what part of a task's time its CPU works, while GPUs do the rest, as measured so far: ½, ¾ or 1.

    >>> [busy_share({"decode": d, "factorize": 3.0, "label": 1.0}) for d in (0.0, 1.0, 2.0, 50.0)]
    [0.5, 0.5, 0.5, 1.0]
    """
    waiting = seconds.get("factorize", 0.0) + seconds.get("label", 0.0)
    busy = sum(seconds.values()) - waiting
    share = busy / (busy + waiting) if waiting > 0 else 1.0
    return max(_LEAST_CPU, math.ceil(4 * share) / 4)


def log_events(done: Done) -> None:
    """Log what became of a shard's segments, an event each, and of the shard."""
    shard = done.work.shard
    for event in done.events:
        text = f"{event['segment_id']} {event['event']} in {event['stage']}: {event['reason']}"
        console.log(text, shard=shard, **event)
    if not done.work.probe:
        n_rejected = done.rejected.total()
        console.log(
            f"shard {shard}: {done.n_clips} clips, {n_rejected} rejections",
            event="shard_done",
            shard=shard,
            generation=done.work.generation,
            clips=done.n_clips,
            rejected=n_rejected,
            seconds={stage: round(s, 3) for stage, s in done.seconds.items()},
        )


def check_digest(state: shards.State, made: extraction.Extraction) -> None:
    """Refuse to mix clips of two configurations, where the picture network's weights are known.

    They aren't in a dry run that would have to download them, and a fetch makes no clips.
    """
    if made.fetch_only or (made.made_with.labeller and not made.made_with.labeller_sha256):
        return
    out, digest = made.out, shards.configuration_digest(made.made_with.as_dict())
    if stale := {c.digest for c in state.commits if c.clips} - {digest}:
        before, now = DataConfig.from_dict(shards.read_configuration(out)), made.made_with
        check_vocabularies(out, before.vocabulary, "the segments", now.vocabulary)
        fail(f"{out} was extracted with another configuration (digest {stale.pop()}, now {digest}); give another --out")
