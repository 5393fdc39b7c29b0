"""From clips' figures to the contract's `results.json` and `clips.csv`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from avsep import metrics
from avsep.evaluation import FIGURES, GAINS, LOST_DB, PERFECT_DB, STRUCK_METHOD, ClipResult, bounded
from avsep.records import Segment

HEARD = 0.01  # scores below it are no claim that an object is audible


def summarize(clips: Sequence[ClipResult]) -> dict[str, Any]:
    """Average clips into the contract's `results.json`."""
    struck = [c for c in clips if STRUCK_METHOD in c.figures]
    return {
        "separators": _separators(clips),
        "struck_beside_pitched": {"clips": len(struck), "separators": _separators(struck)},
        "clips": [{k: v for k, v in vars(c).items() if not k.startswith("basis_")} for c in clips],
        "basis_accuracy": basis_accuracy(clips),
        "basis_accuracy_by_sources": {str(k): basis_accuracy(g) for k, g in _by_sources(clips).items()},
        "silent_auc": silent_auc(clips),
        "map": clip_map(clips),
        "calibration": {
            "sound_score": _calibration(clips, [_claims(c) for c in clips]),
            "confidence": _calibration(clips, [c.confidence for c in clips]),
        },
    }


def _separators(clips: Sequence[ClipResult]) -> dict[str, Any]:
    """Average each separator's figures over the clips that it was run on."""
    names = list(dict.fromkeys(n for c in clips for n in c.figures))
    separators = {}
    for name in names:
        with_it = [c for c in clips if name in c.figures]
        groups = {str(k): g for k, g in _by_sources(with_it).items()}
        separators[name] = {
            "clips": len(with_it),
            "mean": _means(with_it, name),
            "interval_95": _interval(with_it, name),
            "default_ahead": _ahead(with_it, name),
            "by_sources": {k: _means(g, name) | {"interval_95": _interval(g, name)} for k, g in groups.items()},
            "leak_db": _leak([c.leak_db[name] for c in with_it if name in c.leak_db]),
            "by_object": {o: _means(with_it, name, only=o) for o in sorted({o for c in with_it for o in c.objects})},
        }
    return separators


def _leak(values: Sequence[float]) -> dict[str, Any] | None:
    """Average what got into objects that aren't there, with a 95 % interval; None where none was asked for."""
    if not values:
        return None
    return {"mean": float(np.mean(values)), "interval_95": bootstrap([np.array([v]) for v in values])}


def _by_sources(clips: Sequence[ClipResult]) -> dict[int, list[ClipResult]]:
    return {k: [c for c in clips if len(c.objects) == k] for k in sorted({len(c.objects) for c in clips})}


def _values(clips: Sequence[ClipResult], name: str, figure: str, only: str | None = None) -> list[NDArray[np.float64]]:
    return [
        bounded([v for v, o in zip(c.figures[name][figure], c.objects, strict=True) if only in (None, o)])
        for c in clips
    ]


def _means(clips: Sequence[ClipResult], name: str, only: str | None = None) -> dict[str, float]:
    means = {}
    for figure in (*FIGURES, *GAINS):
        values = np.concatenate([np.zeros(0), *_values(clips, name, figure, only)])
        finite = values[np.isfinite(values)]  # what is undefined, or perfect, has no place in a mean
        means[figure] = float(finite.mean()) if len(finite) else float("nan")
    return means


def _interval(clips: Sequence[ClipResult], name: str) -> list[float]:
    """Return a 95 % bootstrap interval of the mean SDR, over clips."""
    return bootstrap(_values(clips, name, "sdr"))


def _ahead(clips: Sequence[ClipResult], name: str) -> dict[str, Any]:
    """Return by how much the default's mean SDR is above a separator's on the same clips, with a 95 % interval.

    Sounds that the separator left without an error don't count: of one that sounds alone, the mixture is perfect.
    """
    clips = [c for c in clips if "default" in c.figures]
    ours, theirs = (_values(clips, n, "sdr") for n in ("default", name))
    gaps = [(a - b)[np.isfinite(a) & (b <= PERFECT_DB)] for a, b in zip(ours, theirs, strict=True)]
    all_gaps = np.concatenate([np.zeros(0), *gaps])
    return {"sdr": float(all_gaps.mean()) if len(all_gaps) else float("nan"), "interval_95": bootstrap(gaps)}


def bootstrap(values: Sequence[NDArray[np.float64]]) -> list[float]:
    """Return a 95 % interval of the mean over all values, clips drawn with replacement; NaN for a single clip."""
    values = [v for v in (v[np.isfinite(v)] for v in values) if len(v)]
    if len(values) < 2:
        return [float("nan")] * 2
    sums, counts = np.array([v.sum() for v in values]), np.array([len(v) for v in values])
    rows = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def _claims(clip: ClipResult) -> dict[str, float]:
    """Return the sound scores of objects that may be asked after: heard at all, or shown."""
    return {n: s for n, s in clip.sound_scores.items() if s >= HEARD or n in (clip.visible or ())}


def _calibration(clips: Sequence[ClipResult], claims: Sequence[dict[str, float]]) -> dict[str, Any] | None:
    """Compare claims that an object is audible, in [0, 1], with the truth; None where nothing is claimed."""
    pairs = [(n in c.objects, s) for c, own in zip(clips, claims, strict=True) for n, s in own.items()]
    return metrics.calibration(*zip(*pairs, strict=True)) if pairs else None


def basis_accuracy(clips: Sequence[ClipResult]) -> float:
    """Return the energy share of bases given to their true object, among bases that belong to one."""
    energy = np.concatenate([np.zeros(0), *(np.asarray(c.basis_energy) for c in clips)])
    right = np.concatenate([np.zeros(0, bool), *(np.asarray(c.basis_right, bool) for c in clips)])
    return float((energy * right).sum() / energy.sum()) if energy.sum() else float("nan")


def silent_auc(clips: Sequence[ClipResult]) -> float | None:
    """Return the AUC of telling visible objects that sound from silent ones; None when all are of one kind."""
    pairs = [(o in c.objects, c.sound_scores[o]) for c in clips for o in c.visible or () if o in c.sound_scores]
    if len({audible for audible, _ in pairs}) < 2:
        return None
    return float(roc_auc_score([a for a, _ in pairs], [s for _, s in pairs]))


def clip_map(clips: Sequence[ClipResult]) -> float:
    """Return the mean average precision of sound scores against what is audible."""
    scored = [c for c in clips if c.sound_scores]
    if not scored:
        return float("nan")
    names = list(scored[0].sound_scores)
    labels = [[n in c.objects for n in names] for c in scored]
    return metrics.mean_average_precision(labels, [[c.sound_scores.get(n, 0.0) for n in names] for c in scored])


def provenance(models: Mapping[str, str], segments: Sequence[Segment], settings: Mapping[str, str]) -> dict[str, str]:
    """Say what results are of: the models' hashes by name, that of the segments, and the settings."""
    digests = dict(models)
    return {
        "model": digests.pop("default"),
        "paper model": digests.pop("paper", ""),
        **{f"--compare {name}": sha256 for name, sha256 in digests.items()},
        "segments": hashlib.sha256(repr(segments).encode()).hexdigest(),
        **settings,
    }


def differing(written: bytes, source: Mapping[str, str]) -> str | None:
    """Return what a written `results.json` was made of that differs from `source` (`provenance`); None: nothing."""
    try:
        there = dict(json.loads(written).get("source", {}))
    except (ValueError, AttributeError, TypeError):
        there = {}
    return next((name for name in {**source, **there} if there.get(name) != source.get(name)), None)


def clip_table(clips: Sequence[ClipResult]) -> str:
    """Write the contract's `clips.csv`: a row per clip, separator and object; what is undefined is an empty cell.

    An object that was asked for and isn't there has `leak_db` alone.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["clip", "separator", "object", *FIGURES, *GAINS, "leak_db"])
    for clip in clips:
        for name, figures in clip.figures.items():
            for row, name_of_object in enumerate(clip.objects):
                values = [figures[f][row] for f in (*FIGURES, *GAINS)]
                table.writerow([clip.segment_id, name, name_of_object, *map(finite, values), None])
            if name in clip.leak_db:
                nothing = [None] * len((*FIGURES, *GAINS))
                table.writerow([clip.segment_id, name, clip.absent, *nothing, clip.leak_db[name]])
    return text.getvalue()


def finite(value: float) -> float | None:
    """None for what is undefined, −30 and 300 dB for nothing and everything: JSON has no NaN and no infinity.

    >>> finite(1.5), finite(float("nan")), finite(float("-inf"))
    (1.5, None, -30.0)
    """
    if np.isfinite(value):
        return value
    return None if np.isnan(value) else LOST_DB if value < 0 else 300.0


def without_nan(value: Any) -> Any:
    """Return nested results with every number as `finite` has it."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return finite(value) if isinstance(value, float) else value
