"""Clips that are the same recording."""

from __future__ import annotations

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


@dataclass(frozen=True, order=True)
class Pair:
    """Two clips of different splits that share something."""

    kind: str  # exact: the same excerpt of the same bytes; near: the same sound; source: other excerpts of one source
    one: str  # segment_id
    one_split: str
    other: str
    other_split: str
    similarity: float = 1.0


# ----------------------------------------------------------------------------------- duplicates


def frame_s(stft: STFT) -> float:
    """Return the seconds from one STFT frame to the next."""
    return stft.hop_length / stft.sample_rate


def fingerprint(record: ClipRecord, seconds_a_frame: float) -> NDArray[np.int8] | None:
    """Draw a clip's sound coarsely: log energy in 12 bands every 0.2 s of its first 10 s, `(600,)` int8.

    Neither gain nor coding nor NMF's random start change it much, since it comes from the product
    of bases and activations and is measured against its own loudest band, then against its means.
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


def _drawings(facts: pa.Table) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return (rows that have a fingerprint, their fingerprints `(n, bands, frames)`)."""
    column = facts.column("fingerprint").combine_chunks()
    rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    flat = np.frombuffer(b"".join(column.take(pa.array(rows)).to_pylist()), np.int8)
    return rows, flat.reshape(len(rows), BANDS, FRAMES).astype(np.float32)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = x.reshape(len(x), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _moved(x: NDArray[np.float32], shift: int) -> NDArray[np.float32]:
    moved = np.zeros_like(x)
    moved[:, :, max(0, shift) : FRAMES + min(0, shift)] = x[:, :, max(0, -shift) : FRAMES - max(0, shift)]
    return moved


def near_duplicates(facts: pa.Table, held_out: pa.Table) -> list[Pair]:
    """Find the clips of `held_out` (splits val and test) that sound like a clip of another split in `facts`.

    Every pair is compared, at shifts of up to 0.8 s: the similarity is the correlation of the two
    fingerprints. A pair of two held-out clips is found from one side.
    """
    pairs = []
    rows, drawings = _drawings(facts)
    held_rows, held = _drawings(held_out)
    if not len(rows) or not len(held_rows):
        return []
    a = facts.select(["segment_id", "split", "media_sha256"]).to_pydict()
    b = held_out.select(["segment_id", "split", "media_sha256"]).to_pydict()
    here = _unit(drawings).T
    best = np.full((len(held), here.shape[1]), -1.0, np.float32)
    for shift in range(-_SHIFT, _SHIFT + 1):
        moved = _moved(held, shift)
        np.maximum(best, _unit(moved) @ here, out=best)
        if shift < _SHIFT:  # and by half a frame
            np.maximum(best, _unit(moved + _moved(held, shift + 1)) @ here, out=best)
    for i, j in np.argwhere(best >= NEAR):
        p, q = int(held_rows[i]), int(rows[j])
        one, other = (b["split"][p], b["segment_id"][p]), (a["split"][q], a["segment_id"][q])
        twice = other[0] in ("val", "test") and one < other  # met again from the other side
        if one[0] != other[0] and not twice and b["media_sha256"][p] != a["media_sha256"][q]:
            pairs.append(Pair("near", one[1], one[0], other[1], other[0], round(float(best[i, j]), 3)))
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
