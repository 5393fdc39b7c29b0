"""Clips that are the same recording, or share a source."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avsep import fetching
from avsep.records import (
    SPLITS,
    ClipRecord,
    Segment,
)
from avsep.stft import STFT

NEAR = 0.89  # similarity from which two clips count as the same sound
BANDS, FRAMES = 12, 50  # of a fingerprint
_LOW_HZ, _HIGH_HZ = 100.0, 10_000.0
_FRAME_S, _WINDOW_S = 0.2, 0.4
_FLOOR = math.exp(-3)  # of the loudest band: what is below is silence
_SHIFT = 4  # frames, at most
_STILL = 0.05  # standard deviation over time of the log energy: below it nothing happens
_SHORTEST_S = 3.0  # shorter clips are too alike to compare
_PAIRS_A_GROUP = 1000
_AT_ONCE = 4096  # clips compared with a file's at a time


@dataclass(frozen=True, order=True)
class Pair:
    """Two clips that share something; `one` ranks before `other`."""

    kind: str  # exact: the same excerpt of the same bytes; near: the same sound; source: other excerpts of one source
    one: str  # segment_id
    one_split: str
    other: str
    other_split: str
    similarity: float = 1.0


def rank(split: str, segment_id: str) -> tuple[int, str]:
    """Order clips: test before val before train, then by id. Of a recording the first one is kept.

    >>> sorted([("train", "a"), ("test", "b"), ("val", "c")], key=lambda clip: rank(*clip))
    [('test', 'b'), ('val', 'c'), ('train', 'a')]
    """
    return -SPLITS.index(split), segment_id


# ----------------------------------------------------------------------------------- duplicates


def frame_s(stft: STFT) -> float:
    """Return the seconds from one STFT frame to the next."""
    return stft.hop_length / stft.sample_rate


def fingerprint(record: ClipRecord, seconds_a_frame: float) -> NDArray[np.int8] | None:
    """Draw a clip's sound coarsely: log energy in 12 bands every 0.2 s of its first 10 s, `(600,)` int8.

    It comes from the product of bases and activations, against its own loudest band and then against its means. So
    neither gain nor coding nor NMF's random start change it much.
    None for clips under 3 s, and for those in which nothing happens: they are alike without being the same.
    """
    if record.duration_s < _SHORTEST_S or seconds_a_frame > _FRAME_S:
        return None
    W, H = record.bases.astype(np.float32), record.activations.astype(np.float32)
    energy = _band_sums(W) @ H  # (bands, N)
    level = np.log(energy / max(energy.max(), 1e-30) + _FLOOR)
    step, window = (round(s / seconds_a_frame) for s in (_FRAME_S, _WINDOW_S))
    starts = np.arange(0, level.shape[1] - window + 1, step)[:FRAMES]
    sums = np.concatenate([np.zeros((BANDS, 1)), level.cumsum(1, dtype=np.float64)], 1)
    level = (sums[:, starts + window] - sums[:, starts]) / window
    if np.sqrt(np.var(level, axis=1).mean()) < _STILL:
        return None
    level = level - (level.mean(1, keepdims=True) + level.mean()) / 2  # how it sounds counts, how it moves more
    drawn = np.zeros((BANDS, FRAMES), np.float32)
    drawn[:, : len(starts)] = level
    return np.round(drawn * (127 / np.abs(drawn).max())).astype(np.int8).reshape(-1)


def _band_sums(W: NDArray[np.float32], highest_hz: float = 24_000.0) -> NDArray[np.float32]:
    edges = np.geomspace(_LOW_HZ, _HIGH_HZ, BANDS + 1) / highest_hz * (len(W) - 1)
    starts = np.round(edges).astype(int)
    return np.stack([W[a : max(b, a + 1)].sum(0) for a, b in pairwise(starts)])


def ranked(facts: pa.Table) -> pa.Table:
    """Return what `near_duplicates` compares clips with: those that have a fingerprint, in order of rank."""
    facts = facts.select(["segment_id", "split", "media_sha256", "fingerprint"])
    facts = facts.filter(facts.column("fingerprint").is_valid())
    clips = zip(facts.column("split").to_pylist(), facts.column("segment_id").to_pylist(), strict=True)
    ranks = [rank(*clip) for clip in clips]
    return facts.take(pa.array(sorted(range(len(ranks)), key=ranks.__getitem__), pa.int64())).combine_chunks()


def _drawings(facts: pa.Table, start: int, stop: int) -> NDArray[np.float32]:
    """Return the fingerprints of some rows, `(n, bands, frames)`."""
    flat = np.frombuffer(b"".join(facts.column("fingerprint")[start:stop].to_pylist()), np.int8)
    return flat.reshape(-1, BANDS, FRAMES).astype(np.float32)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = x.reshape(len(x), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _moved(x: NDArray[np.float32], shift: int) -> NDArray[np.float32]:
    moved = np.zeros_like(x)
    moved[:, :, max(0, shift) : FRAMES + min(0, shift)] = x[:, :, max(0, -shift) : FRAMES - max(0, shift)]
    return moved


def near_duplicates(facts: pa.Table, others: pa.Table) -> list[Pair]:
    """Find the clips of `facts` that sound like one of `others` that ranks before them; those are `ranked`.

    Every pair is compared, at shifts of up to 0.8 s: the similarity is the correlation of the two
    fingerprints. Of one split a clip comes back with the first in rank alone, of other splits with all.
    Clips of the same bytes aren't compared.
    """
    own = ranked(facts)
    if not len(own) or not len(others):
        return []
    here = _shifted(_drawings(own, 0, len(own)))  # (shifts, n, bands · frames)
    a, b = (t.select(["segment_id", "split", "media_sha256"]).to_pydict() for t in (own, others))
    ranks = [rank(*clip) for clip in zip(a["split"], a["segment_id"], strict=True)]
    pairs: list[Pair] = []
    met = set()  # clips that have a pair of one split
    for start in range(0, len(others), _AT_ONCE):
        first = bisect.bisect_right(ranks, rank(b["split"][start], b["segment_id"][start]))
        if first == len(ranks):  # what follows ranks behind all
            break
        there = _unit(_drawings(others, start, start + _AT_ONCE)).T
        best = functools.reduce(np.maximum, (shift[first:] @ there for shift in here))
        for i, j in np.argwhere(best >= NEAR):
            p, q = first + int(i), start + int(j)
            one, other = (b["split"][q], b["segment_id"][q]), (a["split"][p], a["segment_id"][p])
            if rank(*one) >= ranks[p] or b["media_sha256"][q] == a["media_sha256"][p]:
                continue
            if one[0] == other[0]:
                if p in met:
                    continue
                met.add(p)
            pairs.append(Pair("near", one[1], one[0], other[1], other[0], round(float(best[i, j]), 3)))
    return pairs


def _shifted(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return fingerprints at all shifts, whole and half, each of length one."""
    moved = [_moved(x, shift) for shift in range(-_SHIFT, _SHIFT + 1)]
    return np.stack([_unit(m) for m in (*moved, *(a + b for a, b in pairwise(moved)))])


def same_excerpts(facts: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Find the clips that are the same excerpt as one that ranks before them, among those of equal media or source.

    They have the same bytes, of a medium that was cut out, or share more than half of the shorter one's time.
    """
    kept: list[tuple[float, float, str, str, str]] = []  # start and end, bytes, id and split
    pairs = []
    for fact in sorted(facts, key=lambda f: rank(f["split"], f["segment_id"])):
        start, end, sha256 = fact["start_s"], fact["start_s"] + fact["duration_s"], fact["media_sha256"]
        cut_out = fetching.is_remote(Segment("", fact["source"]))
        for other_start, other_end, other_sha256, segment_id, split in kept:
            shorter = min(end - start, other_end - other_start)
            if (cut_out and sha256 == other_sha256) or min(end, other_end) - max(start, other_start) > shorter / 2:
                pairs.append(Pair("exact", segment_id, split, fact["segment_id"], fact["split"]))
                break
        else:
            kept.append((start, end, sha256, fact["segment_id"], fact["split"]))
    return pairs


def shared_media(what: str, facts: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Find pairs of clips in different splits among those of equal `sha256`, or equal `source`.

    `exact`: the same excerpt (media in a store are one excerpt a file); `source`: others. Of a large
    group the first thousand pairs come back.
    """
    found: list[Pair] = []
    for n, one in enumerate(facts):
        for other in facts[:n]:
            same_bytes = one["media_sha256"] == other["media_sha256"]
            if one["split"] == other["split"] or (what == "source" and same_bytes):  # these come by their bytes
                continue
            overlap = min(_end(one), _end(other)) > max(one["start_s"], other["start_s"])
            remote = fetching.is_remote(Segment("", one["source"]))
            a, b = sorted((one, other), key=lambda f: -SPLITS.index(f["split"]))
            kind = "exact" if same_bytes and (remote or overlap) else "source"
            found.append(Pair(kind, a["segment_id"], a["split"], b["segment_id"], b["split"]))
            if len(found) == _PAIRS_A_GROUP:
                return found
    return found


def _end(fact: Mapping[str, Any]) -> float:
    return math.inf if fact["end_s"] is None else fact["end_s"]
