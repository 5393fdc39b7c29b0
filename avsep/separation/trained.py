"""From a sound to one waveform per object, and the rest: the separator that a trained model makes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import starter, storage
from avsep.context import pair_features
from avsep.factors import ExtractionConfig, Factorize, Factors, factorize, get_factorizer
from avsep.familiarity import deserved, familiarity
from avsep.limits import LOUDEST
from avsep.miml import basis_posteriors, energy_shares, relate_at_pitches
from avsep.model import Model, SeparationConfig
from avsep.objects import Vocabulary
from avsep.separation import windows
from avsep.separation.assigned import Assigned, AssignedWindow, Making
from avsep.separation.masks import at_least, basis_shares, levelled, ratio_masks, rest_at_most, separate
from avsep.separation.separates import Separation
from avsep.separation.windows import Explanation, Window, WindowStore
from avsep.stft import STFT

_UNHEARD = "the model hardly hears it: it is taken to be there because it was named, so its sound is a guess"
_UNSURE = "the model is not sure that it sounds"
_FAINT = 1e-3  # of the loudest window: what a fainter one seems to hold doesn't count
_SURE = 0.99  # confidence from which a named object needs no least share
_LOYALTY = 2.0  # log odds that a basis of an object's part, factorised by itself, belongs to that object
_EMPTY = 1e-4  # of a window's power: a part that has less isn't factorised again


@dataclass(frozen=True)
class Bounds:
    """What objects get of a window's energy at least, `(J,)`, and the rest at most."""

    least: Tensor | None
    most_rest: float


class Separator:
    """Separate sounds with a trained model.

    >>> separator = Separator.load("out/demo/model")           # doctest: +SKIP
    >>> separation = separator(waveform, ["dog", "violin"])    # doctest: +SKIP
    >>> separation = separator("duet.mp4")                     # doctest: +SKIP

    `separation` overrides the model's own settings. `factorize` has waveforms factorised elsewhere: it takes them,
    their seeds and an `ExtractionConfig`, and gives a future of their factors, those of `factors.factorize`.
    """

    def __init__(
        self, model: Model, separation: SeparationConfig | None = None, factorize: Factorize | None = None
    ) -> None:
        self.model = model
        self.config = separation or model.config.separation
        self.stft = model.config.stft
        self.mask_stft = _finer(self.stft) if self.config.fine_masks and self.is_editable else self.stft
        self.extraction = model.config.extraction
        self._factorizer = get_factorizer(self.extraction.factorizer)
        self._factorize = factorize
        if self.config.bases != "own" and model.dictionary is None:
            raise ValueError(f"bases are {self.config.bases!r}, and the model has no dictionary: run pipelines.collect")

    @classmethod
    def load(cls, model_dir: storage.AnyPath | None = None) -> Separator:
        """Load the model directory that `pipelines.train` (and `collect`) wrote; None: the starter model."""
        return cls(Model.load(starter.PATH if model_dir is None else model_dir))

    @property
    def sample_rate(self) -> int:
        """The sounds' sample rate in Hz."""
        return self.stft.sample_rate

    @property
    def objects(self) -> tuple[str, ...]:
        """The model's objects, in the order of its relation maps' rows."""
        return self.model.config.objects

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's objects, and what people call them."""
        return self.model.config.vocabulary

    @property
    def is_editable(self) -> bool:
        """Whether whose a basis is can be corrected: bases are shared softly, and are the sound's own."""
        return self.config.assignment == "soft" and self.config.bases == "own"

    @property
    def looks_twice(self) -> bool:
        """Whether `assign` looks again at each part of a first separation."""
        config = self.config
        return config.second_look and config.assignment == "soft" and config.bases != "learned"

    @functools.cached_property
    def making(self) -> Making:
        """How shares of bases become sounds, where bases are shared softly and are a sound's own."""
        config = self.config
        length = max(int(config.window_s * self.sample_rate), self.stft.n_fft)
        overlap = min(int(config.overlap_s * self.sample_rate), length // 2)
        return Making(
            self.stft, self.mask_stft, self.extraction.factorizer, self.extraction.n_bases, config.mask_power,
            config.least_share, length, overlap,
        )  # fmt: skip

    @torch.inference_mode()
    def analyse(self, waveform: Tensor, seed: int = 0) -> Window:
        """Factorise one window `(S,)`, as often as configured, and relate its bases to the objects.

        The factorisations' bases stand side by side, each factorisation's one after the other.
        """
        count = self.config.n_factorizations
        runs = self._factors([waveform] * count, range(seed, seed + count), self.extraction)
        divergence = sum(f.kl_divergence for f in runs) / count
        factors = Factors(torch.cat([f.W for f in runs], 1), torch.cat([f.H for f in runs]) / count, divergence)
        relation = self.model.network.relate(factors.W, factors.H)
        energy = factors.basis_energy
        if self.config.assignment == "soft":
            posteriors = basis_posteriors(relation.unsqueeze(0))
            relation = relate_at_pitches(self.model.network, factors.W, factors.H, self.config.n_pitches)
        else:  # the published network's scores: no noise class, the clip's best basis counts
            posteriors = torch.cat([relation.softmax(0), torch.zeros_like(relation[:1])]).unsqueeze(0)
        scores = energy_shares(posteriors, energy.unsqueeze(0))[0]
        total = float(((factors.W**2).sum(0) * (factors.H**2).sum(1)).sum().sqrt())
        return Window(factors, relation, scores, total)

    def _factors(self, waveforms: Sequence[Tensor], seeds: Sequence[int], how: ExtractionConfig) -> Sequence[Factors]:
        if self._factorize is None:
            return [factorize(x, seed, how) for x, seed in zip(waveforms, seeds, strict=True)]
        return self._factorize([x.numpy() for x in waveforms], list(seeds), how).result()

    @torch.inference_mode()
    def assign(
        self, waveform: Tensor, window: Window, objects: Sequence[int], bounds: Bounds | None = None
    ) -> AssignedWindow:
        """Say whose a window's bases are, and look again where the configuration has it.

        The first look's masks take the window `(S,)` apart. Each part is factorised by itself, so that a basis which
        two objects shared is divided, and its bases are judged again. Those of a part vote together. An object's lean
        towards it, the rest's nowhere; claims that were raised stay so. They stand beside the first ones, and both make
        the masks.
        """
        shares, raised = self._claims(window, objects, bounds)
        n_whole = shares.shape[1]
        first = AssignedWindow(0, len(waveform), window.factors, window.relation, shares, n_whole)
        if not (self.looks_twice and objects):
            return first
        masks = self.making.masks(*first.fine(waveform, self.making), [first.whole])
        parts = separate(waveform, masks, self.mask_stft)
        seeds = [*objects, len(self.objects)]  # whatever the objects' order
        looks = [first]
        for owner, factors in self.factorize_parts(parts, seeds).items():
            relation = relate_at_pitches(self.model.network, factors.W, factors.H, self.config.n_pitches)
            loyal = _LOYALTY * (torch.arange(len(objects)) == owner)
            shares = self._votes(replace(window, factors=factors, relation=relation), objects, raised + loyal)
            looks.append(AssignedWindow(0, len(waveform), factors, relation, shares, 0))
        factors = self.with_parts(first.factors, [w.factors for w in looks[1:]])
        relation, shares = (torch.cat(x, 1) for x in zip(*((w.relation, w.shares) for w in looks), strict=True))
        shares = _bounded(shares, factors.basis_energy, bounds)
        return AssignedWindow(0, len(waveform), factors, relation, shares, n_whole)

    def factorize_parts(self, parts: Tensor, seeds: Sequence[int]) -> dict[int, Factors]:
        """Factorise each of a window's parts `(J, S)` by itself: by its row; one that is next to empty has none.

        Half the iterations do: more change nothing.
        """
        loud = (parts.square().sum(1) > _EMPTY * parts.sum(0).square().sum()).nonzero().flatten().tolist()
        how = replace(self.extraction, n_iter=max(1, self.extraction.n_iter // 2))
        found = self._factors([parts[j] for j in loud], [seeds[j] for j in loud], how)
        return dict(zip(loud, found, strict=True))

    def with_parts(self, factors: Factors, parts: Sequence[Factors]) -> Factors:
        """Put the bases of a window's parts beside its own; together they have one factorisation's energy."""
        scale = 1 / self.config.n_factorizations
        W, H = [factors.W, *(f.W for f in parts)], [factors.H, *(scale * f.H for f in parts)]
        return Factors(torch.cat(W, 1), torch.cat(H), factors.kl_divergence)

    @torch.inference_mode()
    def shares(self, window: Window, objects: Sequence[int], bounds: Bounds | None = None) -> Tensor:
        """Say how much of each basis goes to each object and, last, to the rest, `(J + 1, M)`.

        Where the model has learned how a clip's bases belong together, they vote among the
        objects that are there and the rest; else each is taken by itself (`basis_shares`).
        With `bounds` the model isn't sure: its claims are levelled first, and the bounds kept whatever the votes say.
        """
        return self._claims(window, objects, bounds)[0]

    def _claims(self, window: Window, objects: Sequence[int], bounds: Bounds | None) -> tuple[Tensor, Tensor]:
        """Return the shares, and by how much each object's claims were raised for them, as log weights `(J,)`."""
        raised = torch.zeros(len(objects))
        if bounds is None:
            return self._votes(window, objects), raised
        energy = window.factors.basis_energy
        if self.config.assignment == "soft":
            pairs = None if self.model.context is None else self._pairs(window)
            votes = functools.partial(self._votes, window, objects, pairs=pairs)
            shares, raised = levelled(votes, energy, len(objects), self.config.levelling)
        else:
            shares = self._votes(window, objects)
        return _bounded(shares, energy, bounds), raised

    def _votes(
        self,
        window: Window,
        objects: Sequence[int],
        log_weights: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """Return the shares by votes, `(J + 1, M)`, after log weights `(J,)` were added to the objects' scores."""
        context, index, relation = self.model.context, list(objects), window.relation
        if log_weights is not None:
            relation = relation.index_add(0, torch.tensor(index), log_weights[:, None].expand(-1, relation.shape[1]))
        if context is None or self.config.assignment == "threshold" or not index:
            return basis_shares(relation, index, self.config)
        pairs = self._pairs(window) if pairs is None else pairs
        n_runs = len(pairs)
        present = torch.zeros(n_runs, len(self.model.config.objects), dtype=torch.bool)
        present[:, index] = True
        posteriors = basis_posteriors(relation[None])[0]
        posteriors = torch.cat([posteriors[:-1], self.config.noise_weight * posteriors[-1:]])
        posteriors = torch.stack((posteriors / posteriors.sum(0)).chunk(n_runs, 1))
        refined = torch.cat(list(context(posteriors, pairs, present).exp()), 1)
        return refined[[*index, -1]] ** self.config.posterior_power

    def _pairs(self, window: Window) -> Tensor:
        """Describe how each two bases of one factorisation relate: only those vote on each other."""
        n_runs = window.factors.W.shape[1] // self.extraction.n_bases
        W, H = (torch.stack(x.chunk(n_runs)) for x in (window.factors.W.T, window.factors.H))
        energy = torch.stack(window.factors.basis_energy.chunk(n_runs))
        return pair_features(W, H, energy / energy.sum(1, keepdim=True).clamp_min(1e-12))

    @torch.inference_mode()
    def masks(self, waveform: Tensor, window: Window, objects: Sequence[int], bounds: Bounds | None = None) -> Tensor:
        """Return the objects' masks and, last, the rest's, `(J + 1, F, N)` of `mask_stft`, summing to one."""
        W = window.factors.W
        own = learned = None
        if self.config.bases != "learned":
            if self.config.assignment == "threshold":
                own = self._refit(
                    self.stft(waveform).abs(), [W[:, s > 0] for s in self.shares(window, objects, bounds)]
                )
                own = ratio_masks(own, self.config.mask_power)
            else:
                assigned = self.assign(waveform, window, objects, bounds)
                own = self.making.masks(*assigned.fine(waveform, self.making), [assigned.whole])
        if self.config.bases != "own":
            assert self.model.dictionary is not None
            names = [self.model.config.objects[i] for i in objects]
            shares = self._votes(window, objects)  # bounds would leave the rest no basis of its own
            known = [self.model.dictionary.bases.get(n, W[:, s > 0.5]) for n, s in zip(names, shares[:-1], strict=True)]
            learned = self._refit(self.stft(waveform).abs(), [*known, W[:, shares[-1] > 0.5]])
            learned = ratio_masks(learned, self.config.mask_power)
        if own is None or learned is None:
            masks = learned if own is None else own
            assert masks is not None
            return masks
        return ratio_masks(own * learned.clamp_min(1e-3) ** self.config.dictionary_power)

    def _refit(self, V: Tensor, bases: Sequence[Tensor]) -> Tensor:
        """Hold stacked bases fixed, find their activations, and return each part's `W_j H_j`."""
        if not any(W.shape[1] for W in bases):
            return V.new_zeros(len(bases), *V.shape)
        H = self._factorizer.infer_activations(V, torch.cat(list(bases), 1), n_iter=self.config.n_iter)
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
        estimates = torch.from_numpy(np.concatenate(list(plan.render(blocks)), 1))
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
        scores: Mapping[str, float] | None = None,
    ) -> Plan:
        """Listen to a whole sound, given in blocks `(S,)`, and decide what to separate from it.

        `scores` are how surely pictures show each object, in [0, 1]: what isn't among `seen` may be there, too.

        The objects are those of any window that isn't faint beside the loudest; each is silent where it isn't heard.
        One that was named and is heard nowhere is taken to be there throughout: the model doesn't know its sound.
        Confidences are no higher than the training allows (`Evidence.claim`, `familiarity.deserved`).
        """
        named, shown = self._indices(objects), self._indices(seen)
        heard = _listen(self, blocks)
        shares, peaks = heard.shares()
        names, config = self.objects, self.config
        marks = None if shown is None else torch.isin(torch.arange(len(names)), torch.tensor(shown, dtype=torch.long))
        looks = torch.tensor([scores.get(name, 0.0) for name in names]) if scores else None
        evidence = self.model.config.evidence
        believe = functools.partial(evidence.confidence, shown=marks, scores=looks)
        sure, claimed = believe(peaks), evidence.claim(peaks, marks, looks)
        if named is None:
            indices = self.fuse(shown, sure) if shares.any() or shown else []
        else:
            indices = named
        unheard = torch.zeros(len(names), dtype=torch.bool)
        if named is not None and shares.any():
            unheard[indices] = peaks[indices] < config.silent_share
        familiar = familiarity(
            self.model.familiarity,
            ((w.factors.W, w.factors.H, basis_posteriors(w.relation[None])[0]) for w in heard.windows),
            len(names),
        )
        claimed = deserved(claimed, familiar, names, self.model.config.training.get("clips_by_label"))
        return Plan(
            self,
            heard,
            indices,
            named=named is not None,
            believe=believe,
            sure=sure,
            unheard=unheard,
            doubted=named is None and config.assignment == "soft" and (len(indices) > 1 or bool(shown)),
            sound_scores=dict(zip(names, shares.tolist(), strict=True)),
            confidence=dict(zip(names, claimed.tolist(), strict=True)),
            familiarity=dict(zip(names, familiar.tolist(), strict=True)),
        )

    def _indices(self, names: Sequence[str] | None) -> list[int] | None:
        if names is None:
            return None
        if isinstance(names, str):
            raise ValueError(f"objects are {names!r}; give a list of names")
        own = [self.vocabulary.find(name) for name in names]
        if len(set(own)) != len(own):
            raise ValueError(f"objects are {', '.join(names)}; name each once")
        return [self.vocabulary.index(name) for name in own]


@dataclass
class _Heard:
    """What a first pass over a sound gave."""

    length: int  # of a window, in samples
    overlap: int
    first_window: Window
    windows: WindowStore
    scores: list[tuple[int, int, Tensor]]  # first and last sample of each window, objects' shares of it (L,)
    energies: list[float]  # of each window

    def shares(self) -> tuple[Tensor, Tensor]:
        """Return the objects' shares of the whole sound, and their largest of a window that isn't faint, `(L,)`."""
        energy, shares = torch.tensor(self.energies), torch.stack([scores for _, _, scores in self.scores])  # (n, L)
        whole = (energy[:, None] * shares).sum(0) / energy.sum().clamp_min(1e-30)
        return whole, shares[energy >= _FAINT * energy.max()].amax(0)  # what sounds in one window sounds


def _listen(separator: Separator, blocks: Iterable[NDArray[np.float32]]) -> _Heard:
    """Analyse a sound window by window; ValueError for one without a sample."""
    length, overlap = separator.making.length, separator.making.overlap
    store, first = WindowStore(), None
    scores: list[tuple[int, int, Tensor]] = []
    energies: list[float] = []
    end = 0
    for number, (window, fresh, _) in enumerate(windows.cut(blocks, length, overlap)):
        end += fresh
        analysed = separator.analyse(windows.padded(window, separator.stft), seed=number)
        first = first or analysed
        energies.append(analysed.energy)
        scores.append((end - len(window), end, analysed.sound_scores))
        store.add(analysed, window if separator.is_editable else window[:0])  # others never look twice from here
    if first is None:
        raise ValueError("there is no sample to separate")
    return _Heard(length, overlap, first, store, scores, energies)


@dataclass(repr=False)
class Plan:
    """A sound that a model listened to once, in overlapping windows, ready to be rendered in a second pass.

    Memory stays constant whatever the length: the windows' factors and sounds wait in temporary files.
    """

    separator: Separator
    heard: _Heard
    indices: Sequence[int]  # of the objects
    named: bool  # the objects are there for certain
    believe: Callable[[Tensor], Tensor]  # how sure pictures and some shares of the sound make it, (L,) → (L,)
    sure: Tensor  # (L,), by sound and pictures, whatever the training allows
    unheard: Tensor  # boolean (L,): hardly heard, though it was named
    doubted: bool  # a window must make an object likely, too
    sound_scores: dict[str, float]  # every object's share of the sound
    confidence: dict[str, float]  # every object's probability of sounding
    familiarity: dict[str, float]  # how like the model's training the bases are that each object claims, in [0, 1]
    objects: tuple[str, ...] = field(init=False)
    silent: tuple[str, ...] = field(init=False)
    doubts: dict[str, str] = field(init=False)  # of objects that were named, by name
    _made: windows.ArrayFile = field(init=False, default_factory=windows.ArrayFile)  # assigned windows

    def __post_init__(self) -> None:
        names, config = self.separator.objects, self.separator.config
        sounds = self._sounds(self.heard.shares()[1])
        self.objects = tuple(names[i] for i in self.indices)
        self.silent = tuple(names[i] for i in self.indices if not sounds[i])
        self.doubts = {
            names[i]: _UNHEARD if self.unheard[i] else _UNSURE
            for i in self.indices
            if self.named and (self.unheard[i] or self.sure[i] < config.least_confidence)
        }

    @property
    def n_samples(self) -> int:
        """How long the sound is."""
        return self.heard.scores[-1][1]

    @property
    def window_scores(self) -> list[tuple[int, int, Tensor]]:
        """The first and last sample of each window, and the objects' shares of its sound, `(L,)`."""
        return self.heard.scores

    @property
    def first_window(self) -> Window:
        """The first window's factors and their relation to the objects."""
        return self.heard.first_window

    @functools.cached_property
    def explanation(self) -> Explanation:
        """What decided the first window, by the first of its factorisations."""
        separator = self.separator
        window = self.first_window.first(separator.extraction.n_bases)
        indices = [i for i, name in zip(self.indices, self.objects, strict=True) if name not in self.silent]
        start, end, _ = self.heard.scores[0]
        return Explanation(
            **vars(window),
            objects=separator.objects,
            audible=tuple(separator.objects[i] for i in indices),
            shares=separator.shares(window, indices, self._bounds(indices)),
            stft=separator.stft,
            n_samples=end - start,
        )

    def _sounds(self, shares: Tensor) -> Tensor:
        """Say which objects of such shares `(L,)` sound, boolean `(L,)`."""
        config = self.separator.config
        if self.doubted:
            return self.believe(shares) >= config.least_confidence
        return (shares >= config.silent_share) | self.unheard

    def _bounds(self, objects: Sequence[int]) -> Bounds | None:
        """Say what objects, and the rest beside them, get of any window's energy; None where the votes decide alone.

        They do where the model is sure of all. Else an object that it takes for another would be left with nothing, if
        it was named; and of several objects the rest may hold a part. A single one is there to be taken out of
        something else.
        """
        config, own = self.separator.config, self.sure[list(objects)]
        if not objects or float(own.min()) >= _SURE or not (self.named or self.doubted):
            return None
        least = torch.full((len(objects),), config.least_share / len(objects)) if self.named else None
        return Bounds(least, config.most_rest / (len(objects) + 1) if len(objects) > 1 else 1.0)

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`, of the same sound in order.

        Windows are cross-faded; what comes out adds up to what went in.
        """
        cut = windows.cut(blocks, self.heard.length, self.heard.overlap)
        if self.is_editable:
            making = self.separator.making
            assigned = zip(cut, self._assigned_windows, strict=True)
            parts = ((making.render(x, window, [window.whole]), last) for (x, _, last), window in assigned)
        else:
            analysed = zip(cut, self.heard.windows, strict=True)
            parts = ((self._part(x, window), last) for (x, _, last), window in analysed)
        return windows.join(parts, self.heard.overlap)

    @property
    def _assigned_windows(self) -> _AssignedWindows:
        return _AssignedWindows(self, self._made)  # not kept: it refers to the plan, whose files are to go with it

    @property
    def is_editable(self) -> bool:
        """Whether `assigned` is to be had."""
        return self.separator.is_editable

    @property
    def assigned(self) -> Assigned:
        """Whose each basis is, to be corrected; ValueError where the plan isn't editable."""
        separator, config = self.separator, self.separator.config
        if not self.is_editable:
            how = f"it assigns {config.bases} bases {'by threshold' if config.assignment != 'soft' else 'softly'}"
            raise ValueError(
                f"this separation can't be edited: {how}; take a model of the default recipe, and own bases"
            )
        return Assigned(
            self.objects, separator.objects, self.confidence, self.n_samples, separator.making, self._assigned_windows,
            self.explanation, self.familiarity,
        )  # fmt: skip

    def audible_in(self, analysed: Window) -> list[int]:
        """Return the places among `objects` of those that sound in a window."""
        sounds = self._sounds(analysed.sound_scores)
        return [k for k, i in enumerate(self.indices) if sounds[i] and self.objects[k] not in self.silent]

    def assign(self, number: int) -> AssignedWindow:
        """Say how much of each basis of a window goes to each of `objects` and, last, to the rest."""
        separator, analysed, (start, end, _) = self.separator, self.heard.windows[number], self.window_scores[number]
        rows = self.audible_in(analysed)
        if rows:
            index = [self.indices[k] for k in rows]
            waveform = windows.padded(self.heard.windows.sound(number), separator.stft)
            found = separator.assign(waveform, analysed, index, self._bounds(index))
        else:
            n_bases = analysed.relation.shape[1]
            nobody = torch.ones(1, n_bases)
            found = AssignedWindow(start, end, analysed.factors, analysed.relation, nobody, n_bases)
        shares = torch.zeros(len(self.objects) + 1, found.shares.shape[1])
        shares[[*rows, -1]] = found.shares
        return replace(found, start=start, end=end, shares=shares)

    def _part(self, window: NDArray[np.float32], analysed: Window) -> NDArray[np.float32]:
        """Separate one window, `(S,)` → `(J + 1, S)`."""
        rows = self.audible_in(analysed)
        estimates = np.zeros((len(self.objects) + 1, len(window)), np.float32)
        if rows:
            index = [self.indices[k] for k in rows]
            waveform = windows.padded(window, self.separator.stft)
            masks = self.separator.masks(waveform, analysed, index, self._bounds(index))
            parts = separate(waveform, masks[:-1], self.separator.mask_stft)
            estimates[rows] = parts.numpy()[:, : len(window)]
        estimates[-1] = window - estimates.sum(0)
        return estimates


class _AssignedWindows:
    """A plan's windows with their assignment, made when first asked for and kept in a file."""

    def __init__(self, plan: Plan, made: windows.ArrayFile) -> None:
        self._plan, self._made = plan, made

    def __len__(self) -> int:
        return len(self._plan.window_scores)

    def __iter__(self) -> Iterator[AssignedWindow]:
        for number, (start, end, _) in enumerate(self._plan.window_scores):
            if number == len(self._made):
                w = self._plan.assign(number)
                self._made.add_factors(w.factors, w.relation.numpy(), w.shares.numpy(), np.int64(w.n_whole))
            factors, (relation, shares, n_whole) = self._made.read_factors(number, 3)
            yield AssignedWindow(start, end, factors, relation, shares, int(n_whole))


def _bounded(shares: Tensor, basis_energy: Tensor, bounds: Bounds | None) -> Tensor:
    if bounds is None:
        return shares
    shares = rest_at_most(shares, basis_energy, bounds.most_rest)
    return shares if bounds.least is None else at_least(shares, basis_energy, bounds.least)


def _finer(stft: STFT) -> STFT:
    """Return the STFT of the masks: windows half as long again, which tell close partials apart, by quarters."""
    quarter = max(1, round(stft.n_fft * 3 / 8))
    return STFT(stft.sample_rate, 4 * quarter, quarter)
