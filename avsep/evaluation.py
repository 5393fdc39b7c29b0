"""Measure separators on mixtures whose sources are known: cases, what each separator makes of them, figures.

Floor (the mixture) and ceiling (the ideal mask) are separators like the others.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from avsep import baselines, factors, media, metrics, storage
from avsep.objects import OBJECT_NAMES
from avsep.records import Segment
from avsep.separation import REST, Separation, Separator, Window

FIGURES = ("sdr", "sir", "sar", "si_sdr")
GAINS = tuple(f"{f}_improvement" for f in FIGURES)
STRUCK = {"drum"}
UNPITCHED = STRUCK | {"cat", "dog", "chicken", "frog", "car", "train", "plane", "motorcycle"}
LOST_DB = -30.0  # what a sound that was lost altogether counts, instead of −inf
HEARD = 0.01  # scores below it are no claim that an object is audible
_STRUCK_METHOD = "harmonic_percussive"
_ALONE_DB = 20.0  # an object sounds alone when whatever else there is stays this far below it
_SLACK_S = 1.0  # a clip may end this much before or after its references, as codecs pad and files end early


@dataclass
class ClipResult:
    """One clip's figures."""

    segment_id: str  # of a pair: both, with " + " between
    objects: list[str]  # audible, with a reference
    figures: dict[str, dict[str, list[float]]]  # separator → figure → one value an object
    basis_energy: list[float] = field(default_factory=list)  # of bases that belong to an object
    basis_right: list[bool] = field(default_factory=list)
    sound_scores: dict[str, float] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)  # of the objects separated, where the separator says it
    visible: list[str] | None = None  # as the table's labels say
    error: str = ""


def references_of(folder: str, segment_id: str) -> tuple[dict[str, NDArray[np.float32]], int]:
    """Read `folder/segment_id/OBJECT.flac` (or .wav); return waveforms by name and their rate.

    Raises ValueError when there is none, one is damaged or there twice, or rates or lengths differ.
    """
    waveforms: dict[str, NDArray[np.float32]] = {}
    shapes = set()
    for path in storage.list_files(storage.join(folder, segment_id)):
        stem, _, kind = storage.name(path).rpartition(".")
        if kind in ("flac", "wav"):
            try:
                samples, rate = soundfile.read(io.BytesIO(storage.read_bytes(path)), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise ValueError(f"{path} is no sound that can be read: {error.error_string}") from None
            if not len(samples) or not np.isfinite(samples).all():
                raise ValueError(f"{path} has no samples, or some that are not finite numbers")
            if stem in waveforms:
                raise ValueError(f"{path}: there is a .flac and a .wav of this object; remove one")
            waveforms[stem] = samples.mean(1)
            shapes.add((len(samples), rate))
    if len(shapes) != 1:
        what = (
            "no references (OBJECT.flac or .wav)"
            if not shapes
            else f"references of several lengths or rates {sorted(shapes)}"
        )
        raise ValueError(f"{storage.join(folder, segment_id)}: {what}")
    return waveforms, shapes.pop()[1]


@dataclass
class Case:
    """A mixture with its true sources, all `(S,)`."""

    segment: Segment
    mixture: Tensor
    names: list[str]
    references: Tensor  # (J, S)
    rest: Tensor

    @classmethod
    def load(cls, segment: Segment, folder: str, sample_rate: int) -> Case:
        """Decode the clip and read its references."""
        waveforms, rate = references_of(folder, segment.segment_id)
        if rate != sample_rate:
            raise ValueError(f"references of {segment.segment_id} have {rate} Hz; the model works at {sample_rate} Hz")
        rest = waveforms.pop(REST, None)
        names = sorted(n for n, w in waveforms.items() if np.abs(w).max() > 1e-6)
        if unknown := set(names) - set(OBJECT_NAMES):
            raise ValueError(f"references of {segment.segment_id} hold {sorted(unknown)}, which are no objects")
        if not names:
            raise ValueError(f"references of {segment.segment_id} hold no audible object")
        with storage.local_file(segment.source) as path:
            clip = media.decode(path, segment.start_s, segment.end_s, sample_rate=sample_rate)
        length = len(waveforms[names[0]])
        if abs(length - len(clip.waveform)) > _SLACK_S * sample_rate:
            raise ValueError(
                f"references of {segment.segment_id} last {length / sample_rate:.2f} s, the clip "
                f"{len(clip.waveform) / sample_rate:.2f} s: give references of the excerpt, aligned with it"
            )
        mixture = np.pad(clip.waveform[:length], (0, max(0, length - len(clip.waveform))))
        return cls(
            segment,
            torch.from_numpy(mixture),
            names,
            torch.from_numpy(np.stack([waveforms[n] for n in names])),
            torch.from_numpy(rest if rest is not None else np.zeros(length, np.float32)),
        )

    @property
    def everything(self) -> Tensor:
        """The objects' references and, last, the rest: `(J + 1, S)`."""
        return torch.cat([self.references, self.rest.unsqueeze(0)])


def build_case(segments: Sequence[Segment], references: str, sample_rate: int, protocol: str) -> Case:
    """Load a clip, or mix what the protocol says of clips in which one object is alone."""
    cases = [Case.load(s, references, sample_rate) for s in segments]
    if protocol == "pairs":
        return mix_pair(*cases)
    return add_noise(cases[0]) if protocol == "denoising" else cases[0]


def mix_pair(one: Case, other: Case) -> Case:
    """Mix two clips as they are, the longer cut to the shorter."""
    first, second = sorted((one, other), key=lambda c: c.names)
    length = min(len(one.mixture), len(other.mixture))
    segment = replace(first.segment, segment_id=f"{one.segment.segment_id} + {other.segment.segment_id}", labels=None)
    return Case(
        segment,
        first.mixture[:length] + second.mixture[:length],
        [*first.names, *second.names],
        torch.cat([first.references[:, :length], second.references[:, :length]]),
        first.rest[:length] + second.rest[:length],
    )


def add_noise(case: Case) -> Case:
    """Add white noise of the clip's own power, the same for the same clip."""
    rng = np.random.default_rng(factors.seed_of(case.segment.segment_id))
    noise = torch.from_numpy(rng.standard_normal(len(case.mixture)).astype(np.float32))
    noise *= case.mixture.square().mean().sqrt()
    return Case(case.segment, case.mixture + noise, case.names, case.references, case.rest + noise)


def alone(references: str, segment: Segment) -> tuple[str | None, str]:
    """Return the object that sounds alone in a clip, None when there isn't one, and why a clip can't be used."""
    try:
        waveforms, _ = references_of(references, segment.segment_id)
    except ValueError as error:
        return None, str(error)
    power = {n: float(np.square(w, dtype=np.float64).mean()) for n, w in waveforms.items()}
    rest = power.pop(REST, 0.0)
    audible = [n for n, p in power.items() if p > 1e-12]
    is_alone = len(audible) == 1 and rest <= power[audible[0]] * 10 ** (-_ALONE_DB / 10)
    return (audible[0] if is_alone else None), ""


def told(case: Case, given: str) -> dict[str, list[str]]:
    """Return the arguments by which a separator is told what is there."""
    if given == "objects":
        return {"objects": case.names}
    if given == "labels" and case.segment.labels is not None:
        return {"seen": list(case.segment.labels)}
    return {}


def measure(case: Case, separator: Separator, paper: Separator | None, given: str, noisy: bool) -> ClipResult:
    """Run every separator on a case and measure it; arguments as of `separate_case`."""
    estimates, analysis = separate_case(case, separator, paper, given, noisy)
    r, e = case.references.numpy(), np.stack([e.numpy() for e in estimates.values()])
    bss = metrics.bss_eval(r, e)
    measured = {"sdr": bss.sdr, "sir": bss.sir, "sar": bss.sar, "si_sdr": metrics.si_sdr(r, e)}  # (separators, J)
    floor = list(estimates).index("mixture")
    for figure, values in list(measured.items()):
        measured[f"{figure}_improvement"] = metrics.improvement(bounded(values), bounded(values[floor]))
    figures = {n: {f: v[i].tolist() for f, v in measured.items()} for i, n in enumerate(estimates)}
    labels = case.segment.labels
    visible = None if labels is None else list(labels)
    return ClipResult(case.segment.segment_id, case.names, figures, visible=visible, **analysis)


def separate_case(
    case: Case, separator: Separator, paper: Separator | None, given: str, noisy: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return each separator's estimates of the case's objects, `(J, S)`, and what the default made of its bases.

    An object that a separator was not told of and did not find gets the mixture: that is all
    its listener has. `noisy` says that there is noise for certain: to the blind method it is
    one source more.
    """
    known = told(case, given)
    n_sources = len(case.names)
    separator = copy.copy(separator)
    separator.factorize = _once(separator.factorize)
    if paper is not None and paper.extraction == separator.extraction:
        paper = copy.copy(paper)
        paper.factorize = separator.factorize
    separation = separator(case.mixture, **known)
    window = whole_window(separator, separation, case)
    oracle, owner = baselines.oracle_assignment(case.mixture, case.everything, window.factors, separator.stft)
    grouped = case.everything if noisy else case.references
    single = window.first(separator.extraction.n_bases).factors
    estimates = {
        "mixture": baselines.mixture_as_estimate(case.mixture, n_sources),
        "nmf_clustering": baselines.blind_clustering(case.mixture, grouped, single, separator.stft)[:n_sources],
    }
    struck = [n in STRUCK for n in case.names]
    if n_sources == 2 and sum(struck) == 1 and sum(n in UNPITCHED for n in case.names) == 1:
        lasting, striking = baselines.harmonic_percussive(case.mixture, separator.stft)
        estimates[_STRUCK_METHOD] = torch.stack([striking if s else lasting for s in struck])
    if paper is not None:
        estimates["paper"] = _matched(case, paper(case.mixture, **known))
    estimates["default"] = _matched(case, separation)
    estimates["oracle_assignment"] = oracle[:-1]
    estimates["ideal_mask"] = baselines.ideal_ratio_mask(case.mixture, case.everything, separator.stft)[:-1]
    index = [OBJECT_NAMES.index(n) for n in case.names]
    guess = separator.shares(window, index)[:-1].argmax(0)
    belongs = owner < n_sources
    energy = window.factors.basis_energy
    return estimates, {
        "basis_energy": energy[belongs].tolist(),
        "basis_right": (guess == owner)[belongs].tolist(),
        "sound_scores": separation.sound_scores,
        "confidence": dict(getattr(separation, "confidence", None) or {}),
    }


def _once(factorize: Callable[[Tensor, int], factors.Factors]) -> Callable[[Tensor, int], factors.Factors]:
    """Keep the factors of windows, which several separators ask for."""
    kept: dict[tuple[int, bytes], factors.Factors] = {}

    def factorize_once(waveform: Tensor, seed: int) -> factors.Factors:
        key = seed, hashlib.sha256(waveform.numpy().tobytes()).digest()
        if key not in kept:
            kept[key] = factorize(waveform, seed)
        return kept[key]

    return factorize_once


def whole_window(separator: Separator, separation: Separation, case: Case) -> Window:
    """Return the analysis of the whole sound at once: the first window, where there is no other."""
    window = separation.first_window
    if window.factors.H.shape[1] == separator.stft.n_frames(len(case.mixture)):
        return window
    return separator.analyse(case.mixture)


def _matched(case: Case, separation: Any) -> Tensor:
    found = dict(zip(separation.objects, separation.estimates, strict=True))
    return torch.stack([found.get(n, case.mixture) for n in case.names])


def bounded(values: ArrayLike) -> NDArray[np.float64]:
    """A sound lost altogether counts −30 dB; what is undefined stays NaN."""
    return np.maximum(np.asarray(values, np.float64), LOST_DB)


def summarise(clips: Sequence[ClipResult]) -> dict[str, Any]:
    """Average clips into the contract's `results.json`."""
    struck = [c for c in clips if _STRUCK_METHOD in c.figures]
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
            "by_object": {o: _means(with_it, name, only=o) for o in sorted({o for c in with_it for o in c.objects})},
        }
    return separators


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
    return _bootstrap(_values(clips, name, "sdr"))


def _ahead(clips: Sequence[ClipResult], name: str) -> dict[str, Any]:
    """Return by how much the default's mean SDR is above a separator's on the same clips, with a 95 % interval."""
    ours, theirs = (_values(clips, n, "sdr") for n in ("default", name))
    gaps = [(a - b)[np.isfinite(a) & np.isfinite(b)] for a, b in zip(ours, theirs, strict=True)]
    all_gaps = np.concatenate([np.zeros(0), *gaps])
    return {"sdr": float(all_gaps.mean()) if len(all_gaps) else float("nan"), "interval_95": _bootstrap(gaps)}


def _bootstrap(values: Sequence[NDArray[np.float64]]) -> list[float]:
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
    pairs = [(o in c.objects, c.sound_scores[o]) for c in clips if c.visible for o in c.visible]
    if len({audible for audible, _ in pairs}) < 2:
        return None
    return float(roc_auc_score([a for a, _ in pairs], [s for _, s in pairs]))


def clip_map(clips: Sequence[ClipResult]) -> float:
    """Return the mean average precision of sound scores against what is audible."""
    scored = [c for c in clips if c.sound_scores]
    labels = torch.tensor([[n in c.objects for n in OBJECT_NAMES] for c in scored])
    scores = torch.tensor([[c.sound_scores[n] for n in OBJECT_NAMES] for c in scored])
    return metrics.mean_average_precision(labels, scores) if scored else float("nan")
