"""What is left to do of an extraction."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from avsep import fetching, shards, storage
from avsep.records import (
    Rejection,
    Segment,
    definition,
)


@dataclass(frozen=True)
class Work:
    """What is left to do of one shard."""

    shard: str
    generation: int
    segments: tuple[Segment, ...]
    kept: tuple[Rejection, ...] = ()  # which stand
    culprits: tuple[Rejection, ...] = ()  # which took their workers along, in this run
    attempts: dict[str, int] = field(default_factory=dict)  # earlier ones, of segments that were rejected
    relabelled: tuple[Segment, ...] = ()  # of clips whose sound and pictures stay as they are
    replaced: tuple[shards.Commit, ...] = ()  # the shard's, where clips change: its next generation holds all of it
    asked: dict[str, str] = field(default_factory=dict)  # of what is kept as rejected: id → definition
    probe: bool = False  # only try whether the worker survives: commit nothing
    apart: bool = False  # one segment after the other, which takes the least memory

    @property
    def n_segments(self) -> int:
        """How many segments it deals with."""
        return len(self.segments) + len(self.relabelled)


@dataclass(frozen=True)
class Changes:
    """What differs between what was done and what is asked for now, as ids of segments."""

    again: frozenset[str] = frozenset()  # clips to be decoded again, as far as their media differ
    elsewhere: frozenset[str] = frozenset()  # of `again`: another source, or other times
    relabelled: frozenset[str] = frozenset()  # clips whose split, objects or labels alone differ
    rejected: frozenset[str] = frozenset()  # rejections to be tried again
    touched: frozenset[str] = frozenset()  # of `again`: only the media file is newer than the clip

    def lines(self) -> list[str]:
        """Say it, a line each."""
        lines = []
        if changed := len(self.again - self.touched) + len(self.relabelled) + len(self.rejected):
            only = f" ({len(self.relabelled)} only in split, objects or labels)" if self.relabelled else ""
            lines.append(f"{changed} segments changed since they were extracted{only}: done again")
        if self.touched:
            lines.append(f"{len(self.touched)} media files are newer than their clips: done again if they differ")
        return lines


def find_changes(out: str, state: shards.State, segments: Sequence[Segment]) -> Changes:
    """Compare segments, and the age of their media, with what was extracted."""
    then = shards.changed_clips(out, state.commits, segments)
    wanted = {s.segment_id: s for s in segments}
    elsewhere = {i for i, old in then.items() if _excerpt(old) != _excerpt(wanted[i])}
    touched = shards.newer_media(out, state.commits, [s for s in segments if s.segment_id not in elsewhere])
    unlabelled = {i for i, old in then.items() if old.labels is not None and wanted[i].labels is None}
    again = elsewhere | touched | shards.without_logits(out, state.commits, unlabelled)
    return Changes(
        frozenset(again),
        frozenset(elsewhere),
        frozenset(then.keys() - again),
        frozenset(state.changed_rejections(segments)),
        frozenset(touched - then.keys()),
    )


def _excerpt(segment: Segment) -> tuple[str, float, float | None]:
    return segment.source, segment.start_s, segment.end_s


def forget_media(media: str | None, segments: Sequence[Segment]) -> None:
    """Delete what was downloaded for remote segments that ask for another excerpt now; users' own files stay."""
    for s in segments:
        if media and fetching.is_remote(s):
            storage.delete_file(fetching.store_path(media, s.segment_id))


def plan_work(
    state: shards.State,
    segments: Sequence[Segment],
    retry_reasons: Sequence[str] | None = None,
    changes: Changes = Changes(),
    shard_size: int | None = None,
) -> list[Work]:
    """Say what is left to do. `retry_reasons` None retries nothing, an empty list every rejection.

    `shard_size` None is that of an extraction (`shards.default_shard_size`).

    Changed clips are done again where they are: in the next generation of their own shard, which replaces it.
    """
    rejections = state.rejections
    retried = {
        i
        for i, r in rejections.items()
        if i in changes.rejected or (retry_reasons is not None and (not retry_reasons or r.reason in retry_reasons))
    }
    done = state.clip_ids | (rejections.keys() - retried)
    parts = {
        shard.name: tuple(s for s in shard.segments if s.segment_id not in done)
        for shard in shards.plan(segments, shard_size)
    }
    by_id = {s.segment_id: s for s in segments if s.segment_id in changes.again | changes.relabelled}
    changed: dict[str, list[Segment]] = {}
    for c in state.commits:
        if found := [by_id[i] for i in c.clip_ids if i in by_id]:
            changed.setdefault(c.shard, []).extend(found)
    names = sorted({name for name, todo in parts.items() if todo} | changed.keys())
    planner = _Planner(state, done, changes.again)
    return [planner.work(name, parts.get(name, ()), changed.get(name, [])) for name in names]


class _Planner:
    """What the work on every shard needs to know of what is committed."""

    def __init__(self, state: shards.State, done: Set[str], again: Set[str]) -> None:
        self._rejections, self._done, self._again = state.rejections, done, again
        self._commits: dict[str, list[shards.Commit]] = {}
        self._rejected_in: dict[str, int] = {}  # the generation: a retry, perhaps in another shard, comes after it
        for c in sorted(state.commits, key=lambda c: c.generation):
            self._commits.setdefault(c.shard, []).append(c)
            self._rejected_in |= dict.fromkeys(c.rejection_ids, c.generation)

    def work(self, shard: str, todo: Sequence[Segment], changed: Sequence[Segment]) -> Work:
        """Describe what is left of a shard."""
        commits = self._commits.get(shard, [])
        own = commits[-1].rejection_ids if commits else ()
        kept = tuple(self._rejections[i] for i in own if i in self._done and i in self._rejections)
        ids = [s.segment_id for s in todo]
        attempts = {i: self._rejections[i].attempts for i in ids if i in self._rejections}
        generations = [c.generation + 1 for c in commits] + [self._rejected_in[i] + 1 for i in attempts]
        asked = {i: c.asked[i] for r in kept if (i := r.segment_id) for c in commits if i in c.asked}
        return Work(
            shard,
            max(generations, default=0),
            (*todo, *(s for s in changed if s.segment_id in self._again)),
            kept,
            attempts=attempts,
            relabelled=tuple(s for s in changed if s.segment_id not in self._again),
            replaced=tuple(commits) if changed else (),
            asked=asked | {s.segment_id: definition(s) for s in (*todo, *changed)},
        )
