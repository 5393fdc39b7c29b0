"""Measure separators on mixtures whose sources are known: cases, what each separator makes of them, figures.

Floor (the mixture) and ceiling (the ideal mask) are separators like the others, made for each case.

    case = Case.load(segment, "references", separator.sample_rate)
    result = measure(case, {"default": separator, "mine": my_separator})   # any `separation.Separates`
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import soundfile
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from avsep import baselines, factors, media, metrics, storage
from avsep.objects import Vocabulary
from avsep.records import Segment
from avsep.separation import REST, Planned, Separates, Separator, Whole, Window, render_whole
from avsep.separation.assigned import AssignedWindow
from avsep.stft import STFT
from avsep.unet import UNetSeparator, is_unet

FIGURES = ("sdr", "sir", "sar", "si_sdr", "si_sar")
GAINS = tuple(f"{f}_improvement" for f in FIGURES)
LEAST_LEAK_DB = -60.0  # under the mixture, and less: nobody hears it
PERFECT_DB = 100.0  # an SDR above it has no errors but those of rounding
LOST_DB = -30.0  # what a sound that was lost altogether counts, instead of −inf
STRUCK_METHOD = "harmonic_percussive"
_ALONE_DB = 20.0  # an object sounds alone when whatever else there is stays this far below it
BESIDE = ("mixture", "nmf_clustering", STRUCK_METHOD, "oracle_assignment", "ideal_mask")  # what is always measured, too
_KEPT = 256  # factors, of 0.3 MB for ten seconds
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
    absent: str = ""  # what was asked for, and isn't there
    leak_db: dict[str, float] = field(default_factory=dict)  # separator → what that got, over the mixture's power
    error: str = ""


Cases = list[tuple[Segment, ...]]  # what is measured: a clip each, or a pair of them


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
    noisy: bool = False  # the rest holds noise for certain: to a blind method one source more
    vocabulary: Vocabulary = field(kw_only=True)
    absent: str = ""  # an object that isn't there, and is asked for

    @classmethod
    def load(cls, segment: Segment, folder: str | None, sample_rate: int, vocabulary: Vocabulary) -> Case:
        """Decode the clip and read its references; without any, a clip of one known object is its own."""
        if folder is None:
            with storage.local_file(segment.source) as path:
                sound = media.decode(path, segment.start_s, segment.end_s, sample_rate=sample_rate, images=False)
            heard, names = torch.from_numpy(sound.waveform), list(segment.objects or ())
            return cls(segment, heard, names, heard[None], torch.zeros_like(heard), vocabulary=vocabulary)
        waveforms, rate = references_of(folder, segment.segment_id)
        if rate != sample_rate:
            raise ValueError(f"references of {segment.segment_id} have {rate} Hz; the model works at {sample_rate} Hz")
        rest = waveforms.pop(REST, None)
        names = sorted(n for n, w in waveforms.items() if np.abs(w).max() > 1e-6)
        if unknown := set(names) - set(vocabulary.names):
            raise ValueError(
                f"references of {segment.segment_id} hold {sorted(unknown)}, which are none of {vocabulary}"
            )
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
            vocabulary=vocabulary,
        )

    @property
    def everything(self) -> Tensor:
        """The objects' references and, last, the rest: `(J + 1, S)`."""
        return torch.cat([self.references, self.rest.unsqueeze(0)])


def build_case(
    segments: Sequence[Segment],
    references: str | None,
    sample_rate: int,
    protocol: str,
    vocabulary: Vocabulary,
    objects: Sequence[str] = (),
) -> Case:
    """Load a clip, or make what the protocol says of clips; `absent` asks for one of `objects` that isn't there."""
    cases = [Case.load(s, references, sample_rate, vocabulary) for s in segments]
    if protocol == "absent":
        return replace(cases[0], absent=choose_absent(cases[0], objects))
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
        vocabulary=one.vocabulary,
    )


def add_noise(case: Case) -> Case:
    """Add white noise of the clip's own power, the same for the same clip."""
    rng = np.random.default_rng(factors.seed_of(case.segment.segment_id))
    noise = torch.from_numpy(rng.standard_normal(len(case.mixture)).astype(np.float32))
    noise *= case.mixture.square().mean().sqrt()
    return replace(case, mixture=case.mixture + noise, rest=case.rest + noise, noisy=True)


def choose_absent(case: Case, objects: Sequence[str]) -> str:
    """Return one of `objects` that isn't in a clip by its references or table, the same one for the same clip."""
    there = {*case.names, *(case.segment.objects or ()), *(case.segment.labels or ())}
    if not (others := [name for name in objects if name not in there]):
        raise ValueError(f"{case.segment.segment_id} has all of {', '.join(objects)}: none is absent")
    return others[factors.seed_of(case.segment.segment_id) % len(others)]


def alone(references: str | None, segment: Segment) -> tuple[str | None, str]:
    """Return the object that sounds alone in a clip, None when there isn't one, and why a clip can't be used.

    Its references say it, or where there are none, the table.
    """
    if references is None:
        return (segment.objects[0] if segment.objects and len(segment.objects) == 1 else None), ""
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


def measure(case: Case, separators: Mapping[str, Separates], given: str = "objects") -> ClipResult:
    """Run named separators on a case, floor, blind methods and ceilings beside them, and measure each.

    `given` says what they are told is there: the true `objects`, the table's `labels`, or `none`. An object that a
    separator wasn't told of and did not find gets the mixture: that is all its listener has. What is known of bases,
    and of how sure it is what sounds, is of the separator named `default`.
    """
    if wrong := set(separators) & set(BESIDE):
        raise ValueError(f"separators are named {', '.join(sorted(wrong))}, as floor, ceilings and blind methods are")
    default = separators.get("default")
    model = next((s for s in (default, *separators.values()) if isinstance(s, Separator)), None)
    window = model.analyse(case.mixture) if model else None
    plans: dict[str, Planned] = {}
    estimates: dict[str, Tensor] = {}
    leak_db = {}
    for name, separator in beside(case, separators, model, window).items():
        asked = {"objects": [*case.names, case.absent]} if case.absent and name in separators else told(case, given)
        plans[name], parts = render_whole(separator, case.mixture.numpy(), **asked)
        found = dict(zip(plans[name].objects, torch.from_numpy(parts[:-1]), strict=True))
        estimates[name] = torch.stack([found.get(n, case.mixture) for n in case.names])
        if case.absent and name in separators:
            leak_db[name] = leak(found[case.absent], case.mixture)
    result = ClipResult(case.segment.segment_id, case.names, figures_of(case, estimates))
    result.absent, result.leak_db = case.absent, leak_db
    if case.segment.labels is not None:
        result.visible = list(case.segment.labels)
    if default is not None:
        result.confidence = dict(plans["default"].confidence)
        result.sound_scores = dict(getattr(plans["default"], "sound_scores", {}))
    if isinstance(default, Separator) and window is not None:
        result.basis_energy, result.basis_right = whose_bases(case, default, window)
    return result


def leak(estimate: Tensor, mixture: Tensor) -> float:
    """Return an estimate's power over the mixture's in dB, at least LEAST_LEAK_DB; both `(S,)`.

    >>> leak(torch.full((8,), 0.1), torch.ones(8)), leak(torch.zeros(8), torch.ones(8))
    (-20.0, -60.0)
    """
    ratio = float(estimate.double().square().sum() / mixture.double().square().sum())
    return round(max(10 * math.log10(max(ratio, 1e-12)), LEAST_LEAK_DB), 6)


def figures_of(case: Case, estimates: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Measure estimates `(J, S)` by separator, the mixture among them: figures and gains, one value per object.

    Over a mixture that is perfect, as of an object that sounds alone, nothing can be gained: gains are NaN.
    """
    r, e = case.references.numpy(), np.stack([e.numpy() for e in estimates.values()])
    bss = metrics.bss_eval(r, e)
    measured = {"sdr": bss.sdr, "sir": bss.sir, "sar": bss.sar, "si_sdr": metrics.si_sdr(r, e)}
    measured["si_sar"] = metrics.si_sar(r, e)  # each (separators, J)
    floor = list(estimates).index("mixture")
    alone = bss.sdr[floor] > PERFECT_DB
    for figure, values in list(measured.items()):
        gains = metrics.improvement(bounded(values), bounded(values[floor]))
        measured[f"{figure}_improvement"] = np.where(alone, np.nan, gains)
    return {n: {f: v[i].tolist() for f, v in measured.items()} for i, n in enumerate(estimates)}


def beside(
    case: Case, separators: Mapping[str, Separates], model: Separator | None, window: Window | None
) -> dict[str, Separates]:
    """Put floor, blind methods and ceilings around separators, in the order of the results' tables.

    They know the case. They work on the factors of `window`, the whole mixture as `model` analyses it; without a
    model, on factors at a tenth of a second.
    """
    rate = next(iter(separators.values())).sample_rate
    if model is None or window is None:
        stft = STFT(rate, rate // 10, rate // 20)
        all_bases = single = factors.factorize(case.mixture, 0, factors.ExtractionConfig(stft))
    else:
        stft, all_bases, single = model.stft, window.factors, window.first(model.extraction.n_bases).factors
    mask_stft = stft if model is None else model.mask_stft

    def whole(estimate: Callable[[Tensor], Tensor]) -> Whole:
        return Whole(lambda mixture, _: estimate(mixture), rate, tuple(case.names))

    def clustered(mixture: Tensor) -> Tensor:
        grouped = case.everything if case.noisy else case.references  # noise is to it one source more
        return baselines.blind_clustering(mixture, grouped, single, stft)[: len(case.names)]

    def struck_or_not(mixture: Tensor) -> Tensor:
        lasting, striking = baselines.harmonic_percussive(mixture, stft)
        return torch.stack([striking if s else lasting for s in struck])

    sounds = {o.name: o.sound for o in case.vocabulary}
    struck = [sounds[n] == "struck" for n in case.names]
    two_kinds = sorted(sounds[n] for n in case.names) == ["pitched", "struck"]
    return {
        "mixture": whole(lambda x: baselines.mixture_as_estimate(x, len(case.names))),
        "nmf_clustering": whole(clustered),
        **({STRUCK_METHOD: whole(struck_or_not)} if two_kinds else {}),
        **separators,
        "oracle_assignment": whole(lambda _: truly_assigned(case, all_bases, stft, model)[:-1]),
        "ideal_mask": whole(lambda x: baselines.ideal_ratio_mask(x, case.everything, mask_stft)[:-1]),
    }


def truly_assigned(case: Case, bases: factors.Factors, stft: STFT, model: Separator | None) -> Tensor:
    """Give bases of a case's mixture to their true owners: `(J + 1, S)`, the rest last.

    By the masks that a model makes of a sound's own bases, and in as many looks as it has. So nothing but assignment
    differs from a model that shares these softly, in a clip of one window.
    """
    if model is None:
        return baselines.oracle_assignment(case.mixture, case.everything, bases, stft)[0]
    making, n_whole = model.making, bases.W.shape[1]

    def rendered(bases: factors.Factors) -> Tensor:
        owner = baselines.true_owners(case.everything, bases, stft)
        shares = torch.nn.functional.one_hot(owner, len(case.names) + 1).T.float()
        window = AssignedWindow(0, len(case.mixture), bases, shares, shares, n_whole)
        return torch.from_numpy(making.render(case.mixture.numpy(), window, [window.whole]))

    estimates = rendered(bases)
    if not model.looks_twice:
        return estimates
    parts = model.factorize_parts(estimates, range(len(estimates)))
    return rendered(model.with_parts(bases, list(parts.values())))


def whose_bases(case: Case, model: Separator, window: Window) -> tuple[list[float], list[bool]]:
    """Return the energies of the bases that truly belong to an object, and whether that claims most of each.

    Most among the objects, whatever the rest has, at the first look.
    """
    owner = baselines.true_owners(case.everything, window.factors, model.stft)
    guess = model.shares(window, [model.objects.index(n) for n in case.names])[:-1].argmax(0)
    belongs = owner < len(case.names)
    return window.factors.basis_energy[belongs].tolist(), (guess == owner)[belongs].tolist()


def once(
    factorize: Callable[[NDArray[np.float32], int, factors.ExtractionConfig], factors.Factors],
) -> factors.Factorize:
    """Factorise a waveform from a seed once, however many separators ask: the latest of them are kept."""
    kept: dict[tuple[int, factors.ExtractionConfig, bytes], factors.Factors] = {}

    def one(waveform: NDArray[np.float32], seed: int, how: factors.ExtractionConfig) -> factors.Factors:
        key = seed, how, hashlib.sha256(waveform.tobytes()).digest()
        found = kept.pop(key, None) or factorize(waveform, seed, how)
        kept[key] = found
        if len(kept) > _KEPT:
            del kept[next(iter(kept))]  # the oldest
        return found

    def factorize_once(
        waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], how: factors.ExtractionConfig
    ) -> Future:
        done: Future = Future()
        done.set_result([one(waveform, seed, how) for waveform, seed in zip(waveforms, seeds, strict=True)])
        return done

    return factorize_once


def load(directory: storage.AnyPath) -> Separator | UNetSeparator:
    """Load a model directory, or a U-Net's, by what its `config.json` says it is; raises as their own `load` do."""
    return UNetSeparator.load(directory) if is_unet(directory) else Separator.load(directory)


def together(models: Mapping[str, Separator | UNetSeparator]) -> dict[str, Separator | UNetSeparator]:
    """Return the same separators, trained models of one extraction factorising each window once between them."""
    factorize = once(factors.factorize)
    return {
        name: m if isinstance(m, UNetSeparator) else Separator(m.model, m.config, factorize)
        for name, m in models.items()
    }


def bounded(values: ArrayLike) -> NDArray[np.float64]:
    """A sound lost altogether counts −30 dB; what is undefined stays NaN."""
    return np.maximum(np.asarray(values, np.float64), LOST_DB)
