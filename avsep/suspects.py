"""Clips that may teach a network something wrong: what an audit lists, and a training can leave out.

Everything follows from what a clip's record holds; no media are opened. What a record can't say is unknown, and
counted as that.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avsep import looks, shards, storage, tables
from avsep.duplicates import Pair, rank
from avsep.factors import ExtractionConfig
from avsep.miml import basis_posteriors, energy_shares
from avsep.model import Model, ModelConfig
from avsep.records import SPLITS, ClipRecord

KINDS = {  # also the names of the lists
    "still": "the pictures don't change",
    "stops": "the sound stops before the clip ends",
    "again": "the same recording under another id",
    "disagree": "nothing that is seen is heard",
}
COLUMNS = ("segment_id", "split", "shard", "why")
# Change of what the picture network says, by the way of looking, below which pictures count as the same. Stills have up
# to 0.36 by `tiles` and 0.26 by `centre`, most half of it; rendered scenes and panned photos from 0.48 and 0.29.
STILL = {"tiles": 0.35, "centre": 0.25}
QUIET_DB = -60.0  # under the clip's mean power: below it there is no sound
STOPPED_S = 2.0  # without sound, at the end
UNHEARD = 0.05  # probability by the sound alone, below which an object isn't heard
_HEARD = 0.5


@dataclass(frozen=True, order=True)
class Suspect:
    """A clip that may teach something wrong."""

    kind: str  # one of KINDS
    segment_id: str
    split: str
    shard: str  # its file, under the extraction's folder
    why: str


def examine(
    record: ClipRecord, way: str, seen: Sequence[str] | None, listener: Listener | None
) -> Iterator[tuple[str, str | None]]:
    """Yield the kinds a clip is suspect of, each with the reason, and those that can't be told, with None.

    Whether it is the same recording as another one takes all clips: see `same_recordings`.

    Args:
        record: the clip.
        way: how its pictures were looked at, one of `looks.WAYS`.
        seen: what its pictures show, None where nobody looked.
        listener: what listens to it; None: nobody does.
    """
    change = picture_change(record, way)
    if change is None:
        yield "still", None
    elif change < STILL[way]:
        yield (
            "still",
            f"what the picture network says changes by {change:.3f}; of other pictures by {STILL[way]} or more",
        )
    if why := _stops(record):
        yield "stops", why
    shown = tuple(dict.fromkeys([*(seen or ()), *(record.labels or ())]))
    heard = listener.confidences(record) if listener is not None and shown else None
    if heard is None or not set(shown) <= set(heard):
        yield "disagree", None
    elif max(heard[name] for name in shown) < UNHEARD:
        others = ", ".join(f"{name} {p:.2f}" for name, p in heard.items() if p >= _HEARD) or "nothing that it knows"
        looked = ", ".join(f"{name} {heard[name]:.2f}" for name in shown)
        yield "disagree", f"seen: {looked}; heard: {others}"


def picture_change(record: ClipRecord, way: str) -> float | None:
    """Return how much the pictures differ as the picture network sees them; None where that can't be told.

    The network's log-probabilities of two pictures are compared, of which it was shown the same parts: all pictures
    by the way `centre`, those eight seconds apart by `tiles`. It is the RMS difference, relative to the deviation
    over the classes, of the two that differ most. Zero means the same picture, about √2 pictures of other things.
    """
    if record.image_logits is None:
        return None
    rows = record.image_logits.astype(np.float64)
    first: dict[tuple[looks.Box, ...], int] = {}
    changes = []
    for i, parts in enumerate(looks.boxes(way, len(rows), 1, 1)):
        if (j := first.setdefault(tuple(parts), i)) == i:
            continue
        both = np.isfinite(rows[i]) & np.isfinite(rows[j])
        x, y = (row[both] - row[both].mean() for row in (rows[i], rows[j]))
        deviation = math.sqrt((x.var() + y.var()) / 2) if both.any() else 0.0
        if deviation > 0:
            changes.append(math.sqrt(np.mean((x - y) ** 2)) / deviation)
    return max(changes, default=None)


def sound_end_s(record: ClipRecord) -> float:
    """Return when the last sound ends, in seconds from the clip's start.

    The level of each STFT frame follows from bases and activations. Sound is what lies above -60 dB of the clip's
    mean power.
    """
    W, H = record.factors()
    power = np.einsum("mn,mk,kn->n", H, W.T @ W, H, optimize=True)  # of each frame
    loud = np.flatnonzero(power > power.mean() * 10 ** (QUIET_DB / 10))
    return record.duration_s * (loud[-1] + 1) / len(power) if len(loud) else 0.0


def _stops(record: ClipRecord) -> str:
    """Say that the sound stops before the pictures do, or before the end that was asked for; else nothing."""
    end_s = sound_end_s(record)
    if record.image_logits is not None:
        whole_s = max(record.duration_s, float(len(record.image_logits)))
    else:
        whole_s = max(record.duration_s, (record.end_s or 0.0) - record.start_s)
    return f"no sound after {end_s:.1f} s of {whole_s:.1f} s" if whole_s - end_s >= STOPPED_S else ""


def is_heard(config: ModelConfig, extraction: ExtractionConfig) -> bool:
    """Tell whether a model is calibrated on clips of such factors: of the same STFT, and as many bases."""
    return (config.stft, config.extraction.n_bases) == (extraction.stft, extraction.n_bases)


@dataclass(frozen=True)
class Listener:
    """A model that says what sounds in clips, from the factors that they hold."""

    model: Model

    @classmethod
    def load(cls, model_dir: storage.AnyPath) -> Listener:
        """Read a model directory; raises as `Model.load` does."""
        return cls(Model.load(model_dir))

    def takes(self, extraction: ExtractionConfig) -> bool:
        """Tell whether it can listen to clips that were extracted in this way."""
        return is_heard(self.model.config, extraction)

    @torch.inference_mode()
    def confidences(self, record: ClipRecord) -> dict[str, float]:
        """Return the probability that each object of the model sounds in a clip, by the sound alone."""
        relation = self.model.network.relate(*(torch.from_numpy(x) for x in record.factors()))
        shares = energy_shares(basis_posteriors(relation[None]), torch.from_numpy(record.basis_energy)[None])[0]
        p = self.model.config.evidence.confidence(shares)
        return dict(zip(self.model.config.objects, p.tolist(), strict=True))


def same_recordings(pairs: Iterable[Pair], files: dict[str, str]) -> list[Suspect]:
    """List the clips that are the same recording as one that ranks before them, by pairs of (one, other).

    Of a recording the first in rank is not listed: of split test, then val, then train, by id. In a chain, of which
    the first and the last aren't alike, all but the first are listed.
    `files` maps ids to those of their clips.
    """
    best: dict[str, Pair] = {}
    for pair in pairs:
        known = best.get(pair.other)
        if known is None or rank(pair.one_split, pair.one) < rank(known.one_split, known.one):
            best[pair.other] = pair
    return [
        Suspect("again", p.other, p.other_split, files[p.other], f"{_SAME[p.kind]} {p.one} ({p.one_split}){_how(p)}")
        for p in best.values()
    ]


_SAME = {"exact": "the same excerpt as", "near": "the same sound as"}


def _how(pair: Pair) -> str:
    return f", similarity {pair.similarity:.2f}" if pair.kind == "near" else ""


# --------------------------------------------------------------------------------------- lists


def list_file(kind: str) -> str:
    """Name the list of a kind of suspects."""
    return f"{kind}.csv"


def write_lists(out: str, found: Iterable[Suspect]) -> None:
    """Write one CSV per kind to a folder, ordered by split and id; a kind without a clip gets a header alone."""
    rows: dict[str, list[Suspect]] = {kind: [] for kind in KINDS}
    for suspect in found:
        rows[suspect.kind].append(suspect)
    for kind, suspects in rows.items():
        text = io.StringIO(newline="")
        table = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")  # ids may begin as comments do
        table.writerow(COLUMNS)
        ordered = sorted(suspects, key=lambda s: (SPLITS.index(s.split), s.segment_id))
        table.writerows([getattr(s, column) for column in COLUMNS] for s in ordered)
        storage.write_text(storage.join(out, list_file(kind)), text.getvalue())


def left_out(uris: Sequence[str], clips: str) -> tuple[frozenset[str], str]:
    """Return which of the clips in `clips` some lists name, and what else is to be told of the lists; see `read_ids`.

    Raises ValueError where they name something, and none of the clips.
    """
    return left_out_of(uris, shards.read_ids(clips)[0] if uris else (), clips)


def left_out_of(uris: Sequence[str], ids: Iterable[str], place: str) -> tuple[frozenset[str], str]:
    """Return which of the ids in `place` some lists name, as `left_out`."""
    listed = read_ids(uris)
    named = frozenset(i for i in ids if i in listed or i.strip() in listed)  # tables' cells are stripped
    if listed and not named:
        raise ValueError(f"{', '.join(uris)}: none of the {len(listed):,} ids is a clip in {place}; give its own lists")
    n_others = len(listed) - len(named)
    return named, f"{n_others:,} of the {len(listed):,} ids of --without are no clips in {place}" if n_others else ""


def read_ids(uris: Iterable[str]) -> frozenset[str]:
    """Return the ids of some lists: tables, CSV or Parquet, with a column `segment_id`.

    Raises ValueError for a table without it or with a row that can't be read, FileNotFoundError for none.
    """
    ids: set[str] = set()
    for uri in uris:
        for row in tables.read_rows(tables.read_layout(uri, COLUMNS, ("segment_id",)), texts=False):
            if row.comment:
                continue
            if row.problem or row.cells["segment_id"] in (None, ""):
                raise ValueError(f"{uri}, row {row.line}: {row.problem or 'segment_id is empty'}")
            ids.add(str(row.cells["segment_id"]))
    return frozenset(ids)
