"""From a mixture and its bases' owners to one waveform an object, and the rest."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import nmf, storage
from avsep.context import pair_features
from avsep.factors import Factors, factorize
from avsep.familiarity import deserved, familiarity
from avsep.limits import LOUDEST
from avsep.miml import basis_posteriors, energy_shares
from avsep.model import Model, SeparationConfig
from avsep.stft import STFT

REST = "_rest"
_SHOWN_S = 60  # of a sound in a notebook
_UNHEARD = "the model hardly hears it: it is taken to be there because it was named, so its sound is a guess"
_UNSURE = "the model is not sure that it sounds"
_FAINT = 1e-3  # of the loudest window: what a fainter one seems to hold doesn't count
_SURE = 0.99  # confidence from which a named object needs no least share
_LIFTS = 50  # at most, of shares that are too small; a few do
_FINE_ITERATIONS = 4  # of the bases at the masks' resolution; more change nothing


def ratio_masks(magnitudes: Tensor, power: float = 1.0) -> Tensor:
    """Divide each bin among its sources in proportion to `V_j ** power`; the masks sum to one.

    Where every source is zero the last one, the rest, takes the whole bin.

    Args:
        magnitudes: `(J, F, N)`, non-negative; the last source is the rest.

    Returns:
        masks `(J, F, N)` in [0, 1].
    """
    peak = magnitudes.amax(0, keepdim=True)
    masks = (magnitudes / torch.where(peak > 0, peak, 1.0)).pow_(power)  # no power under- or overflows
    total = masks.sum(0, keepdim=True)
    masks /= torch.where(total > 0, total, 1.0)
    masks[-1] = torch.where(total[0] > 0, masks[-1], 1.0)
    return masks


def separate(waveform: Tensor, masks: Tensor, stft: STFT) -> Tensor:
    """Apply masks to a waveform's complex spectrogram, keeping its phase, `(S,)` → `(J, S)`.

    The estimates add up to the mixture when the masks sum to one. Raises ValueError for masks that aren't
    `(J, F, N)` of that spectrogram.
    """
    X = stft(waveform)
    if masks.shape[1:] != X.shape:
        raise ValueError(
            f"masks are {tuple(masks.shape)}; they must be (J, {X.shape[0]}, {X.shape[1]}), as the spectrogram"
        )
    estimates = X.real.new_empty(len(masks), waveform.shape[-1])
    for mask, estimate in zip(masks, estimates, strict=True):  # one by one: a spectrogram is ten times its sound
        estimate[:] = stft.inverse(mask * X, len(estimate))
    return estimates


def basis_shares(relation: Tensor, objects: Sequence[int], config: SeparationConfig) -> Tensor:
    """Say how much of each basis goes to each object and, last, to the rest: `(L, M)` → `(J + 1, M)`.

    Soft assignment: each basis is shared among the objects that are there in proportion to their
    posteriors, whatever absent objects claim of it; only a basis of which they explain less than
    `rest_below` goes to the rest. A column sums to one. By threshold, as published: an object
    takes every basis of at least `threshold` times its largest score (two objects may take one
    basis), and there is no rest.
    """
    index = list(objects)
    if config.assignment == "threshold":
        own = relation[index]
        shares = (own >= config.threshold * own.amax(1, keepdim=True)).to(relation.dtype)
        return torch.cat([shares, torch.zeros_like(relation[:1])])
    posteriors = basis_posteriors(relation.unsqueeze(0))[0]
    explained = posteriors[index].sum(0, keepdim=True)  # (1, M)
    rest = (explained < config.rest_below).to(relation.dtype) if index else torch.ones_like(explained)
    own = relation[index].softmax(0) ** config.posterior_power  # = posteriors among the given objects
    own = (1 - rest) * own / own.sum(0, keepdim=True).clamp_min(1e-12)
    return torch.cat([own, rest])


def at_least(shares: Tensor, basis_energy: Tensor, least: Tensor) -> Tensor:
    """Raise objects' shares until each has `least`, `(J,)`, of the bases' energy, at the others' expense: `(J + 1, M)`.

    The last row, the rest, gets what it gets; columns keep their sums. An object takes first where its shares are
    the largest beside what they are elsewhere.
    """
    sums, weight = shares.sum(0), basis_energy / basis_energy.sum().clamp_min(1e-30)
    for _ in range(_LIFTS):
        had = shares[:-1] @ weight
        if (had >= 0.999 * least).all():
            break
        lift = torch.where(had < least, least / had.clamp_min(1e-9), 1.0)
        shares = torch.cat([shares[:-1] * lift.unsqueeze(1), shares[-1:]])
        shares = shares * (sums / shares.sum(0).clamp_min(1e-30))
    return shares


@dataclass
class Window:
    """One stretch of sound, factorised, with what the network makes of its bases."""

    factors: Factors
    relation: Tensor  # (L, M)
    sound_scores: Tensor  # (L,), each object's share of the sound
    energy: float  # of the magnitudes, so that windows can be averaged

    def first(self, n_bases: int) -> Window:
        """Return the first of several factorisations, of `n_bases` each, by itself: one to look at and listen to."""
        W, H = self.factors.W, self.factors.H
        count = max(1, W.shape[1] // n_bases)
        factors = Factors(W[:, :n_bases], count * H[:n_bases], self.factors.kl_divergence)
        return replace(self, factors=factors, relation=self.relation[:, :n_bases])


@dataclass(repr=False)
class Separation:
    """A separated waveform: `estimates` and `rest` add up to the mixture. In a notebook it shows players."""

    objects: tuple[str, ...]
    estimates: Tensor  # (J, S)
    rest: Tensor  # (S,)
    sound_scores: dict[str, float]  # every object's share of the sound
    confidence: dict[str, float]  # every object's probability of sounding, by sound and pictures
    silent: tuple[str, ...]  # asked for, but not heard: their estimates are zero
    first_window: Window
    stft: STFT  # the model's

    @property
    def sample_rate(self) -> int:
        """The waveforms' sample rate in Hz."""
        return self.stft.sample_rate

    def __repr__(self) -> str:
        """Say in a line what was found.

        >>> Separator.load("out/demo/model")("duet.mp4")           # doctest: +SKIP
        <Separation of 10.0 s at 48000 Hz: violin 45 %, dog 9 %, cat silent; the rest>
        """
        found = ", ".join(self._caption(name) for name in self.objects) or "no object"
        return f"<Separation of {len(self.rest) / self.sample_rate:.1f} s at {self.sample_rate} Hz: {found}; the rest>"

    def _caption(self, name: str) -> str:
        return f"{name} silent" if name in self.silent else f"{name} {100 * self.sound_scores[name]:.0f} %"

    def _repr_html_(self) -> str:
        """Show players and spectrograms of the sounds, of the first minute where they are longer."""
        from avsep import plots
        from avsep.report import players

        mixture = (self.estimates.sum(0) + self.rest).numpy()
        names = [*map(self._caption, self.objects), "the rest"]
        sounds = [("mixture", mixture), *zip(names, [*self.estimates.numpy(), self.rest.numpy()], strict=True)]
        shown = [(name, x[: _SHOWN_S * self.sample_rate]) for name, x in sounds]
        top_hz = min(8000.0, self.sample_rate / 2)
        figures = [plots.spectrogram(x, self.stft, top_hz=top_hz, beside=shown[0][1]) for _, x in shown]
        note = "" if len(self.rest) <= len(shown[0][1]) else f"The first {_SHOWN_S} s of {repr(self)[1:-1]}"
        return players([(*s, f) for s, f in zip(shown, figures, strict=True)], self.sample_rate, note)


class Separator:
    """Separate sounds with a trained model.

    >>> separator = Separator.load("out/demo/model")           # doctest: +SKIP
    >>> separation = separator(waveform, ["dog", "violin"])    # doctest: +SKIP
    >>> separation = separator("duet.mp4")                     # doctest: +SKIP
    """

    def __init__(self, model: Model, separation: SeparationConfig | None = None) -> None:
        self.model = model
        self.config = separation or model.config.separation
        self.stft = model.config.stft
        fine = self.config.fine_masks and self.config.bases == "own" and self.config.assignment == "soft"
        self.mask_stft = _finer(self.stft) if fine else self.stft
        self.extraction = model.config.extraction
        self.factorize: Callable[[Tensor, int], Factors] = functools.partial(factorize, config=self.extraction)
        self.factorize_all: Callable[[Tensor, Sequence[int]], Sequence[Factors]] | None = None  # one by one
        if self.config.bases != "own" and model.dictionary is None:
            raise ValueError(f"bases are {self.config.bases!r}, and the model has no dictionary: run pipelines.collect")

    @classmethod
    def load(cls, model_dir: storage.AnyPath) -> Separator:
        """Load the model directory that `pipelines.train` (and `collect`) wrote."""
        return cls(Model.load(model_dir))

    @torch.inference_mode()
    def analyse(self, waveform: Tensor, seed: int = 0) -> Window:
        """Factorise one window `(S,)`, as often as configured, and relate its bases to the objects.

        The factorisations' bases stand side by side, each factorisation's one after the other.
        """
        count = self.config.n_factorizations
        seeds = range(seed, seed + count)
        together = self.factorize_all
        runs = together(waveform, seeds) if together else [self.factorize(waveform, s) for s in seeds]
        divergence = sum(f.kl_divergence for f in runs) / count
        factors = Factors(torch.cat([f.W for f in runs], 1), torch.cat([f.H for f in runs]) / count, divergence)
        relation = self.model.network.relate(factors.W, factors.H)
        energy = factors.basis_energy
        if self.config.assignment == "soft":
            posteriors = basis_posteriors(relation.unsqueeze(0))
        else:  # the published network's scores: no noise class, the clip's best basis counts
            posteriors = torch.cat([relation.softmax(0), torch.zeros_like(relation[:1])]).unsqueeze(0)
        scores = energy_shares(posteriors, energy.unsqueeze(0))[0]
        total = float(((factors.W**2).sum(0) * (factors.H**2).sum(1)).sum().sqrt())
        return Window(factors, relation, scores, total)

    @torch.inference_mode()
    def shares(self, window: Window, objects: Sequence[int], least: Tensor | None = None) -> Tensor:
        """Say how much of each basis goes to each object and, last, to the rest, `(J + 1, M)`.

        Where the model has learned how a clip's bases belong together, they vote among the
        objects that are there and the rest; else each is taken by itself (`basis_shares`).
        `least` is what each object gets of the energy at least, `(J,)`.
        """
        shares = self._votes(window, objects)
        return shares if least is None else at_least(shares, window.factors.basis_energy, least)

    def _votes(self, window: Window, objects: Sequence[int]) -> Tensor:
        context = self.model.context
        if context is None or self.config.assignment == "threshold" or not len(objects):
            return basis_shares(window.relation, objects, self.config)
        index, n_runs = list(objects), window.factors.W.shape[1] // self.extraction.n_bases
        present = torch.zeros(n_runs, len(self.model.config.objects), dtype=torch.bool)
        present[:, index] = True
        W, H = (torch.stack(x.chunk(n_runs)) for x in (window.factors.W.T, window.factors.H))  # only those of
        energy = torch.stack(window.factors.basis_energy.chunk(n_runs))  # one factorisation vote on each other
        pairs = pair_features(W, H, energy / energy.sum(1, keepdim=True).clamp_min(1e-12))
        posteriors = torch.stack(basis_posteriors(window.relation[None])[0].chunk(n_runs, 1))
        refined = torch.cat(list(context(posteriors, pairs, present).exp()), 1)
        return refined[[*index, -1]] ** self.config.posterior_power

    @torch.inference_mode()
    def masks(self, waveform: Tensor, window: Window, objects: Sequence[int], least: Tensor | None = None) -> Tensor:
        """Return the objects' masks and, last, the rest's, `(J + 1, F, N)` of `mask_stft`, summing to one."""
        W, H = window.factors.W, window.factors.H
        shares = self.shares(window, objects, least)
        own = learned = None
        if self.config.bases != "learned":
            if self.config.assignment == "threshold":
                own = self._refit(self.stft(waveform).abs(), [W[:, s > 0] for s in shares])
            else:
                if self.mask_stft != self.stft:
                    W, H = self._finely(waveform, W, H)
                own = (W * shares[:, None]) @ H
            own = ratio_masks(own, self.config.mask_power)
        if self.config.bases != "own":
            assert self.model.dictionary is not None
            names = [self.model.config.objects[i] for i in objects]
            known = [self.model.dictionary.bases.get(n, W[:, s > 0.5]) for n, s in zip(names, shares[:-1], strict=True)]
            learned = self._refit(self.stft(waveform).abs(), [*known, W[:, shares[-1] > 0.5]])
            learned = ratio_masks(learned, self.config.mask_power)
        if own is None or learned is None:
            masks = learned if own is None else own
            assert masks is not None
            return masks
        return ratio_masks(own * learned.clamp_min(1e-3) ** self.config.dictionary_power)

    def _finely(self, waveform: Tensor, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Carry factors over to `mask_stft`, `(F, M), (M, N)` → `(F', M), (M, N')`, and fit its bases anew."""
        V = self.mask_stft(waveform).abs().T  # (N', F'): the activations are held fixed, as bases of the frames
        H = _resample(H, V.shape[0], self.mask_stft.hop_length / self.stft.hop_length)
        bins = _resample(W.T, V.shape[1], self.stft.n_fft / self.mask_stft.n_fft).clamp_min(1e-6)
        runs = zip(H.split(self.extraction.n_bases), bins.split(self.extraction.n_bases), strict=True)
        fitted = [nmf.infer_activations(V, h.T, H0=w, n_iter=_FINE_ITERATIONS) for h, w in runs]
        return torch.cat(fitted).T, H

    def _refit(self, V: Tensor, bases: Sequence[Tensor]) -> Tensor:
        """Hold stacked bases fixed, find their activations, and return each part's `W_j H_j`."""
        if not any(W.shape[1] for W in bases):
            return V.new_zeros(len(bases), *V.shape)
        H = nmf.infer_activations(V, torch.cat(list(bases), 1), n_iter=self.config.n_iter)
        parts = H.split([W.shape[1] for W in bases])
        return torch.stack([W @ h for W, h in zip(bases, parts, strict=True)])

    def fuse(self, seen: Sequence[int] | None, confidence: Tensor) -> list[int]:
        """Choose objects from what the pictures show and how sure it is that each sounds; None: no pictures.

        What is seen stays (silent, if it isn't heard); what surely sounds is added, the likeliest at
        least where nothing else is. The published method believes the pictures.
        """
        published = self.config.assignment == "threshold"
        heard = [] if published else (confidence >= self.config.least_confidence).nonzero().flatten().tolist()
        return list(dict.fromkeys([*(seen or ()), *heard])) or [int(confidence.argmax())]

    def __call__(
        self,
        waveform: NDArray[np.float32] | Tensor | storage.AnyPath,
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Separation:
        """Separate a mono waveform `(S,)` of any length, or the sound of a file; its pictures aren't looked at.

        `objects` are there for certain, and never silent; else `seen` are what pictures show, and the sound may add
        to it or find it silent; without either it is what is heard. Raises ValueError for an
        unknown object, or one named twice, and for a waveform that isn't `(S,)`, not finite, or above 1e10,
        ClipError for a file without usable sound.
        """
        if isinstance(waveform, (str, os.PathLike)):
            waveform = self._read(os.fspath(waveform))
        mixture = torch.as_tensor(waveform, dtype=torch.float32).detach()
        if mixture.ndim != 1:
            raise ValueError(f"the waveform is {tuple(mixture.shape)}; (S,) is needed: average the channels")
        if not (mixture.abs() <= LOUDEST).all():
            raise ValueError(f"the waveform holds NaN, infinity or samples above {LOUDEST:.0e}; full scale is 1")
        blocks = np.array_split(mixture.numpy(), max(1, len(mixture) // (1 << 20)))
        plan = self.plan(blocks, objects, seen)
        parts = list(plan.render(blocks))
        estimates = torch.from_numpy(np.concatenate(parts, 1))
        return Separation(
            plan.objects,
            estimates[:-1],
            estimates[-1],
            plan.sound_scores,
            plan.confidence,
            plan.silent,
            plan.first_window,
            self.stft,
        )

    def _read(self, file: str) -> NDArray[np.float32]:
        """Read a file's sound, or a URI's, `(S,)`."""
        from avsep import media  # nobody needs it who has waveforms

        rate = self.stft.sample_rate
        with storage.local_file(file) as path:
            listening, _ = media.listen(path)
            return np.concatenate(list(media.iter_audio(path, sample_rate=rate, block=1 << 20, listening=listening)))

    def plan(
        self,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Plan:
        """Listen to a whole sound, given in blocks `(S,)`, and decide what to separate from it.

        Its confidences are no higher than the model's training allows (`familiarity.deserved`).
        """
        plan = Plan(self, blocks, self._indices(objects), self._indices(seen))
        names, told = self.model.config.objects, self.model.config.training
        windows = ((w.factors.W, w.factors.H, basis_posteriors(w.relation[None])[0]) for w in plan.windows())
        familiar = familiarity(self.model.familiarity, windows, len(names))
        claimed = torch.tensor([plan.confidence[name] for name in names])
        claimed = deserved(claimed, familiar, names, told.get("clips_by_label"))
        plan.confidence = dict(zip(names, claimed.tolist(), strict=True))
        plan.familiarity = dict(zip(names, familiar.tolist(), strict=True))
        return plan

    def _indices(self, names: Sequence[str] | None) -> list[int] | None:
        if names is None:
            return None
        if isinstance(names, str):
            raise ValueError(f"objects are {names!r}; give a list of names")
        own = [self.model.config.vocabulary.find(name) for name in names]
        if len(set(own)) != len(own):
            raise ValueError(f"objects are {', '.join(names)}; name each once")
        return [self.model.config.vocabulary.index(name) for name in own]


class Plan:
    """A sound listened to once, in overlapping windows, ready to be rendered in a second pass.

    The objects are those of any window that isn't faint beside the loudest; each is silent where it isn't heard.
    One that was named and is heard nowhere is taken to be there throughout: the model doesn't know its sound.
    Memory stays constant whatever the length: the windows' factors wait in a temporary file
    (0.15 MB for ten seconds).
    """

    familiarity: dict[str, float]  # how like the model's training the bases are that each object claims, in [0, 1]

    def __init__(
        self,
        separator: Separator,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[int] | None,
        seen: Sequence[int] | None,
    ) -> None:
        self.separator = separator
        config, rate = separator.config, separator.stft.sample_rate
        self.length = max(int(config.window_s * rate), separator.stft.n_fft)
        self.overlap = min(int(config.overlap_s * rate), self.length // 2)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the plan)
        self.n_samples = 0
        self.window_scores: list[tuple[int, int, Tensor]] = []  # first and last sample of each, objects' shares (L,)
        energies: list[float] = []
        for number, (window, fresh, _) in enumerate(_windows(blocks, self.length, self.overlap)):
            self.n_samples += fresh
            start = self.n_samples - len(window)
            analysed = separator.analyse(torch.from_numpy(_padded(window, separator.stft)), seed=number)
            energies.append(analysed.energy)
            self.window_scores.append((start, self.n_samples, analysed.sound_scores))
            if number == 0:
                self.first_window = analysed
            self._store(analysed)
        if self.n_samples == 0:
            raise ValueError("there is no sample to separate")
        energy, shares = torch.tensor(energies), torch.stack([scores for _, _, scores in self.window_scores])  # (n, L)
        scores = (energy[:, None] * shares).sum(0) / energy.sum().clamp_min(1e-30)
        peaks = shares[energy >= _FAINT * energy.max()].amax(0)  # what sounds in one window sounds
        names = separator.model.config.objects
        self._shown = (
            None if seen is None else torch.isin(torch.arange(len(names)), torch.tensor(list(seen), dtype=torch.long))
        )
        confidence = separator.model.config.evidence.confidence(peaks, self._shown)
        self._doubted = False  # whether a window must make an object likely, too
        if objects is not None:
            self.indices = list(objects)
        else:
            self.indices = separator.fuse(seen, confidence) if scores.any() or seen else []
            self._doubted = config.assignment == "soft" and (len(self.indices) > 1 or bool(seen))
        self.named, self._sure = objects is not None, confidence
        self._unheard = torch.zeros(len(names), dtype=torch.bool)  # though it was named
        if self.named and scores.any():
            self._unheard[self.indices] = peaks[self.indices] < config.silent_share
        heard = self._heard(peaks)
        self.objects = tuple(names[i] for i in self.indices)
        self.doubts = {
            names[i]: _UNHEARD if self._unheard[i] else _UNSURE
            for i in self.indices
            if self.named and (self._unheard[i] or confidence[i] < config.least_confidence)
        }
        self.sound_scores = {n: float(s) for n, s in zip(names, scores, strict=True)}
        self.confidence = {n: float(c) for n, c in zip(names, confidence, strict=True)}
        self.silent = tuple(names[i] for i in self.indices if not heard[i])

    def _heard(self, shares: Tensor) -> Tensor:
        """Say which objects of such shares `(L,)` sound, boolean `(L,)`."""
        heard = shares >= self.separator.config.silent_share
        if self._doubted:
            confidence = self.separator.model.config.evidence.confidence(shares, self._shown)
            heard = heard & (confidence >= self.separator.config.least_confidence)
        return heard | self._unheard

    def least(self, window: Window, objects: Sequence[int]) -> Tensor | None:
        """Return what objects that were named get of a window's energy at least, `(J,)`; None where nobody named any.

        Where the model is sure of all of them it goes by what it hears; else an object that it takes for another
        would be left with nothing.
        """
        if not self.named or not objects or float(self._sure[list(objects)].min()) >= _SURE:
            return None
        return torch.full((len(objects),), self.separator.config.least_share / len(objects))

    def _store(self, window: Window) -> None:
        scale = float(window.factors.H.max()) or 1.0
        W, H = (x.numpy().astype(np.float16) for x in (window.factors.W, window.factors.H / scale))
        try:
            for x in (W, H, window.relation.numpy(), window.sound_scores.numpy(), np.float64(scale)):
                np.save(self._file, x)
            self._file.flush()  # what it can't write, it would say at the next seek
        except OSError as error:
            raise storage.full_disk(error, tempfile.gettempdir(), storage.TEMPORARY_REMEDY) from None

    def windows(self) -> Iterator[Window]:
        """Give the windows again, in order, before anything is rendered."""
        self._file.seek(0)
        for _ in self.window_scores:
            yield self._stored()

    def _stored(self) -> Window:
        W, H, relation, scores, scale = (torch.from_numpy(np.asarray(np.load(self._file))) for _ in range(5))
        return Window(Factors(W.float(), H.float() * scale.float(), 0.0), relation, scores, 0.0)

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`, of the same sound in order.

        Windows are cross-faded; what comes out adds up to what went in.
        """
        self._file.seek(0)
        tail = np.zeros((len(self.objects) + 1, 0), np.float32)
        fade_in = np.sin(np.linspace(0, np.pi / 2, self.overlap, endpoint=False, dtype=np.float32)) ** 2
        for window, _, last in _windows(blocks, self.length, self.overlap):
            padded = torch.from_numpy(_padded(window, self.separator.stft))
            analysed = self._stored()
            heard = self._heard(analysed.sound_scores)
            rows = [k for k, i in enumerate(self.indices) if heard[i] and self.objects[k] not in self.silent]
            estimates = np.zeros((len(self.objects) + 1, len(window)), np.float32)
            if rows:
                index = [self.indices[k] for k in rows]
                masks = self.separator.masks(padded, analysed, index, self.least(analysed, index))
                parts = separate(padded, masks[:-1], self.separator.mask_stft)
                estimates[rows] = parts.numpy()[:, : len(window)]
            estimates[-1] = window - estimates.sum(0)
            shared = tail.shape[1]
            estimates[:, :shared] = estimates[:, :shared] * fade_in[:shared] + tail * (1 - fade_in[:shared])
            done = len(window) if last else len(window) - self.overlap
            yield estimates[:, :done]
            tail = estimates[:, done:]


def _finer(stft: STFT) -> STFT:
    """Return the STFT of the masks: windows half as long again, which tell close partials apart, by quarters."""
    quarter = max(1, round(stft.n_fft * 3 / 8))
    return STFT(stft.sample_rate, 4 * quarter, quarter)


def _resample(x: Tensor, n: int, step: float) -> Tensor:
    """Interpolate the last axis at 0, step, 2 step, …: `(…, N)` → `(…, n)`."""
    at = (torch.arange(n) * step).clamp_max(x.shape[-1] - 1)
    left = at.long()
    return torch.lerp(x[..., left], x[..., (left + 1).clamp_max(x.shape[-1] - 1)], at - left)


def _padded(window: NDArray[np.float32], stft: STFT) -> NDArray[np.float32]:
    """Pad a window shorter than the STFT's own with zeros."""
    return np.pad(window, (0, max(0, stft.n_fft - len(window))))


def _windows(
    blocks: Iterable[NDArray[np.float32]], length: int, overlap: int
) -> Iterator[tuple[NDArray[np.float32], int, bool]]:
    """Cut a stream into overlapping windows: each with the number of its new samples, and whether it is the last.

    All have `length` samples but the last, which has half as many to one and a half times as
    many (or whatever there is), so that no window is too short to be factorised well.
    """
    held = np.zeros(0, np.float32)
    known = 0  # samples at the start of `held` that an earlier window had
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > length + length // 2:
            yield held[:length], length - known, False
            held, known = held[length - overlap :], overlap
    if len(held) > known:
        yield held, len(held) - known, True
