"""Whose each basis of a separation is: kept, corrected by hand, and rendered again without factorising anew."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep.edits import Edits
from avsep.factors import Factors, get_factorizer
from avsep.miml import basis_posteriors
from avsep.objects import REST
from avsep.separation import windows
from avsep.separation.masks import at_least, ratio_masks, separate
from avsep.separation.windows import Explanation
from avsep.stft import STFT

_FINE_ITERATIONS = 4  # of the bases at the masks' resolution; more change nothing
_SECOND_WEIGHT = 2.0  # in masks: of the second look's bases, beside one factorisation's of the whole


@dataclass(frozen=True)
class Making:
    """How shares of bases become sounds."""

    stft: STFT  # of the factors
    mask_stft: STFT
    factorizer: str
    n_bases: int  # M of one factorisation; a window may have several, side by side
    mask_power: float
    least_share: float  # of an equal part of the sound: what each object gets at least that is said to be there
    length: int  # of a window, in samples
    overlap: int

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Making:
        """Read what `as_dict` gave."""
        return cls(**{**raw, "stft": STFT(**raw["stft"]), "mask_stft": STFT(**raw["mask_stft"])})

    def render(
        self, sound: NDArray[np.float32], window: AssignedWindow, pieces: Sequence[Piece]
    ) -> NDArray[np.float32]:
        """Render one window, `(S,)` → `(J + 1, S)`; the estimates add up to it."""
        if not any(p.shares[:-1].any() for p in pieces):
            return np.concatenate([np.zeros((len(pieces[0].shares) - 1, len(sound)), np.float32), sound[None]])
        waveform = windows.padded(sound, self.stft)
        masks = self.masks(*window.fine(waveform, self), pieces)
        parts = separate(waveform, masks[:-1], self.mask_stft).numpy()[:, : len(sound)]
        return np.concatenate([parts, (sound - parts.sum(0))[None]])

    def masks(self, W: Tensor, H: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Return the objects' masks and, last, the rest's, `(J + 1, F, N)` of `mask_stft`, summing to one.

        The factors are of `mask_stft`, as `finely` gives them.
        """
        hop = self.mask_stft.hop_length
        parts = [H[:, p.frames(H.shape[1], hop)].T @ (W.T * p.shares[:, :, None]) for p in pieces]  # (J + 1, N, F)
        return ratio_masks(torch.cat(parts, 1), self.mask_power).mT  # frame by frame in memory, as spectrograms are


def finely(waveform: Tensor, factors: Factors, how: Making, n_whole: int) -> tuple[Tensor, Tensor]:
    """Carry factors over to `mask_stft`, `(F, M), (M, N)` → `(F', M), (M, N')`, and fit their bases anew.

    The first `n_whole` bases are factorisations of the whole, fitted one by one; the others, of its
    parts, explain it together.
    """
    fine, coarse = how.mask_stft, how.stft
    weights = torch.ones(len(factors.H), 1)
    weights[n_whole:] = _SECOND_WEIGHT
    if fine == coarse:
        return factors.W, weights * factors.H
    V = fine(waveform).abs().T  # (N', F'): the activations are held fixed, as bases of the frames
    H = windows.resample(factors.H, V.shape[0], fine.hop_length / coarse.hop_length)
    bins = windows.resample(factors.W.T, V.shape[1], coarse.n_fft / fine.n_fft).clamp_min(1e-6)
    sizes = [how.n_bases] * (n_whole // how.n_bases) + [len(H) - n_whole] * (n_whole < len(H))
    infer = get_factorizer(how.factorizer).infer_activations
    runs = zip(H.split(sizes), bins.split(sizes), strict=True)
    return torch.cat([infer(V, h.T, H0=w, n_iter=_FINE_ITERATIONS) for h, w in runs]).T, weights * H


@dataclass(frozen=True)
class Piece:
    """A stretch of a window, in samples from its start, in which shares `(J + 1, M)` don't change."""

    start: int
    end: int
    shares: Tensor
    last: bool  # of the window

    def frames(self, n_frames: int, hop_length: int) -> slice:
        """Return the frames whose centres it holds; the last piece holds all that follow, too."""
        first, end = -(-self.start // hop_length), -(-self.end // hop_length)
        return slice(first, n_frames if self.last else end)


@dataclass(frozen=True)
class AssignedWindow:
    """One window's factors, and whose its bases are; `relation` `(L, M)` scores them for every object of a model."""

    start: int  # in samples
    end: int
    factors: Factors
    relation: Tensor
    shares: Tensor  # (J + 1, M): of objects that are silent here zero; the rest last
    n_whole: int  # of the bases: those of factorisations of the whole window; the others are of its parts
    _fine: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def fine(self, waveform: Tensor, how: Making) -> tuple[Tensor, Tensor]:
        """Return the factors at the masks' resolution: fitted to its sound once, however often it is rendered."""
        if not self._fine:
            self._fine.append(finely(waveform, self.factors, how, self.n_whole))
        return self._fine[0]

    @property
    def whole(self) -> Piece:
        """All of it, as it was assigned."""
        return Piece(0, self.end - self.start, self.shares, last=True)

    def energy(self, how: Making, piece: Piece) -> Tensor:
        """Return each basis's energy in a piece, `(M,)`."""
        H = self.factors.H[:, piece.frames(self.factors.H.shape[1], how.stft.hop_length)]
        return self.factors.W.square().sum(0) * H.square().sum(1)


class Windows(Protocol):
    """A separation's windows in order, as often as they are asked for."""

    def __iter__(self) -> Iterator[AssignedWindow]:
        """Give them from the first on."""

    def __len__(self) -> int:
        """Say how many there are."""


@dataclass(frozen=True)
class Assigned:
    """All that a separation's sounds are made of, but the sound itself."""

    objects: tuple[str, ...]  # J names, of the shares' rows but the last
    known: tuple[str, ...]  # L names, of the model
    confidence: Mapping[str, float]  # of the model's objects
    n_samples: int
    how: Making
    windows: Windows
    explanation: Explanation | None = None  # of the first window
    familiarity: Mapping[str, float] = field(default_factory=dict)  # of the model's objects, where it is known

    def edited(self, edits: Edits) -> EditedPlan:
        """Return a plan of the same sound with edits made; ValueError for those that can't be of this one."""
        self.check(edits)
        return EditedPlan(self, edits)

    def check(self, edits: Edits) -> None:
        """Raise ValueError for edits that can't be of this sound; no window is looked at."""
        if unknown := [n for n in edits.objects(self.objects) if n not in self.known]:
            raise ValueError(f"the edits name {unknown[0]}; the objects are {', '.join(self.known)}")
        n_bases = [self.how.n_bases] * len(self.windows)
        edits.check(self.objects, n_bases, self.n_samples / self.how.stft.sample_rate)

    def pieces(self, number: int, window: AssignedWindow, edits: Edits) -> list[Piece]:
        """Say whose a window's bases are when edits are made, from its start to its end."""
        rate, after = self.how.stft.sample_rate, edits.objects(self.objects)
        length, start_s = window.end - window.start, window.start / rate
        ends = {round(t * rate) - window.start for s in edits.spans for t in (s.start_s, s.end_s)}
        cuts = sorted({0, length} | {t for t in ends if 0 < t < length})
        bare = self._without_removed(window.shares, edits, after)
        moves = [m for m in edits.moves if m.window == number]
        follows = followed(window.factors, self.how.n_bases) if moves else None
        pieces = []
        for begin, end in pairwise(cuts):
            whole, piece = Piece(0, length, bare, True), Piece(begin, end, bare, end == length)
            spans = [s for s in edits.spans if s.overlaps(start_s + begin / rate, start_s + end / rate)]
            shares = self._with(bare, {*edits.add}, after, window, whole)
            shares = self._with(shares, {s.object for s in spans if s.present}, after, window, piece)
            if follows is not None:
                shares = _moved(shares, follows, {m.basis: _row(after, m.to) for m in moves})
            for span in (s for s in spans if not s.present and s.object in after):
                shares = _without(shares, after.index(span.object))
            pieces.append(replace(piece, shares=shares))
        return pieces

    def _without_removed(self, shares: Tensor, edits: Edits, after: Sequence[str]) -> Tensor:
        """Put shares in the rows of the objects that are there afterwards, `(J + 1, M)` → `(J' + 1, M)`."""
        for row, name in enumerate(self.objects):
            if name in edits.remove:
                shares = _without(shares, row)
        rows = [shares[self.objects.index(n)] if n in self.objects else torch.zeros_like(shares[-1]) for n in after]
        return torch.stack([*rows, shares[-1]])

    def _with(
        self, shares: Tensor, names: Collection[str], after: Sequence[str], window: AssignedWindow, piece: Piece
    ) -> Tensor:
        """Give some objects their least shares of a piece; those that have nothing, by how much their posteriors claim.

        `after` names the rows of `shares` `(J' + 1, M)`, but for the rest's.
        """
        named = torch.tensor([name in names for name in after], dtype=torch.bool)
        if not named.any():
            return shares
        there = shares[:-1].sum(1) > 0
        new = named & ~there
        posteriors = basis_posteriors(window.relation[None])[0][[self.known.index(n) for n in after]]
        own = posteriors[new].clamp_min(1e-9)
        claims = own / (own.sum(0) + posteriors[there].sum(0))
        shares = shares * (1 - claims.sum(0))
        shares[:-1][new] = claims
        least = named * (self.how.least_share / int((there | new).sum()))
        energy = window.energy(self.how, piece)
        return at_least(shares, energy / energy.sum().clamp_min(1e-30), least)

    def write(self, path: Path) -> None:
        """Keep it in a file: 1 MB for ten seconds of two objects. The explanation isn't kept."""
        with zipfile.ZipFile(path, "w") as archive:
            spans = []
            for number, w in enumerate(self.windows):
                scale = float(w.factors.H.max()) or 1.0
                arrays = (w.factors.W, w.factors.H / scale, w.relation.clamp(-6e4, 6e4))
                kept = {name: x.numpy().astype(np.float16) for name, x in zip(_HALVES, arrays, strict=True)}
                for name, array in {**kept, "shares": w.shares.numpy()}.items():
                    with archive.open(f"{name}{number}.npy", "w") as f:
                        np.lib.format.write_array(f, np.ascontiguousarray(array), allow_pickle=False)
                spans.append([w.start, w.end, scale, w.n_whole])
            about: dict[str, Any] = {"objects": self.objects, "known": self.known, "confidence": dict(self.confidence)}
            about |= {"familiarity": dict(self.familiarity), "n_samples": self.n_samples}
            about |= {"how": self.how.as_dict(), "windows": spans}
            archive.writestr(_ABOUT, json.dumps(about))

    def held(self) -> Assigned:
        """Return it with its windows in memory, 4 MB for ten seconds: rendered again, it takes half the time."""
        return replace(self, windows=tuple(self.windows))

    @classmethod
    def read(cls, path: Path) -> Assigned:
        """Read what `write` wrote; FileNotFoundError where there is none."""
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read(_ABOUT))
        about |= {"how": Making.from_dict(about["how"]), "windows": _Kept(path, tuple(map(tuple, about["windows"])))}
        return cls(**{**about, "objects": tuple(about["objects"]), "known": tuple(about["known"])})


_ABOUT = "about.json"
_HALVES = ("W", "H", "relation")  # in half precision


@dataclass(frozen=True)
class _Kept:
    """The windows of a file."""

    path: Path
    spans: tuple[tuple[Any, ...], ...]  # start, end, scale of the activations, `n_whole`

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[AssignedWindow]:
        with zipfile.ZipFile(self.path) as archive:
            for number, (start, end, scale, *more) in enumerate(self.spans):
                W, H, relation, shares = (_array(archive, f"{name}{number}.npy") for name in (*_HALVES, "shares"))
                n_whole = more[0] if more else shares.shape[1]  # kept before there was a second look
                yield AssignedWindow(start, end, Factors(W, H * scale, 0.0), relation, shares, n_whole)


def _array(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as f:
        return torch.from_numpy(np.lib.format.read_array(f, allow_pickle=False).astype(np.float32))


def followed(factors: Factors, n_bases: int) -> Tensor:
    """Say which basis of the first factorisation each basis goes with, `(M,)`: itself, or the likest."""
    W, H = (x / x.norm(dim=d, keepdim=True).clamp_min(1e-12) for x, d in ((factors.W, 0), (factors.H, 1)))
    alike = (W.T @ W[:, :n_bases]) * (H @ H[:n_bases].T)  # (M, n): cosines of their parts of the spectrogram
    found = alike.argmax(1)
    found[:n_bases] = torch.arange(len(found[:n_bases]))
    return found


def _moved(shares: Tensor, follows: Tensor, moves: Mapping[int, int]) -> Tensor:
    """Give bases, and those that go with them, to rows, as a whole."""
    shares = shares.clone()
    for basis, row in moves.items():
        columns = follows == basis
        shares[:, columns] = 0
        shares[row, columns] = 1
    return shares


def _without(shares: Tensor, row: int) -> Tensor:
    """Divide an object's shares among the others in proportion, or give them to the rest where nobody has any."""
    shares = shares.clone()
    sums = shares.sum(0)
    shares[row] = 0
    left = shares.sum(0)
    nobody = left <= 1e-6 * sums
    shares = torch.where(nobody, 0.0, shares * (sums / left.clamp_min(1e-30)))
    shares[-1] = torch.where(nobody, sums, shares[-1])
    return shares


def _row(objects: Sequence[str], name: str) -> int:
    return len(objects) if name == REST else list(objects).index(name)


@dataclass
class EditedPlan:
    """A separation with edits made, ready to be rendered: a `Planned`."""

    assigned: Assigned
    edits: Edits
    objects: tuple[str, ...] = field(init=False)
    silent: tuple[str, ...] = field(init=False)
    sound_scores: dict[str, float] = field(init=False)  # each of `objects`' share of the sound
    window_scores: list[tuple[int, int, Tensor]] = field(init=False)  # as Plan's, (L,) of `known`
    shares: list[Tensor] = field(init=False)  # of each window's bases, over time (J + 1, M)
    basis_energies: list[Tensor] = field(init=False)  # of each window, summing to one (M,)

    def __post_init__(self) -> None:
        assigned = self.assigned
        self.objects = self.edits.objects(assigned.objects)
        self.window_scores, self.shares, self.basis_energies = [], [], []
        total = torch.zeros(len(self.objects) + 1)
        rows = [assigned.known.index(name) for name in self.objects]
        for number, window in enumerate(assigned.windows):
            pieces = assigned.pieces(number, window, self.edits)
            energies = torch.stack([window.energy(assigned.how, p) for p in pieces])  # (pieces, M)
            weights = energies / energies.sum(0).clamp_min(1e-30)
            mean = torch.stack([p.shares for p in pieces])
            mean = torch.where(energies.sum(0) > 0, (weights[:, None] * mean).sum(0), mean[0])
            energy = energies.sum(0)
            total += mean @ energy
            scores = torch.zeros(len(assigned.known))
            scores[rows] = (mean @ energy)[:-1] / energy.sum().clamp_min(1e-30)
            self.window_scores.append((window.start, window.end, scores))
            self.shares.append(mean)
            self.basis_energies.append(energy / energy.sum().clamp_min(1e-30))
        shares = (total / total.sum().clamp_min(1e-30)).tolist()
        self.sound_scores = dict(zip(self.objects, shares, strict=False))
        self.silent = tuple(n for n in self.objects if not any(s[self.objects.index(n)].any() for s in self.shares))

    @property
    def confidence(self) -> Mapping[str, float]:
        """How sure the model is that an object sounds, whatever somebody says."""
        return self.assigned.confidence

    @property
    def familiarity(self) -> Mapping[str, float]:
        """How like the model's training the bases are that it gave each object itself."""
        return self.assigned.familiarity

    @property
    def explanation(self) -> Explanation | None:
        """What decided the first window, with the shares that its bases have now."""
        found = self.assigned.explanation
        return None if found is None else replace(found, audible=self.audible, shares=self.first_shares)

    @property
    def audible(self) -> tuple[str, ...]:
        """The objects that aren't silent."""
        return tuple(n for n in self.objects if n not in self.silent)

    @property
    def first_shares(self) -> Tensor:
        """Whose the first window's bases are, of its first factorisation, `(J + 1, M)` of the audible objects."""
        rows = [*map(self.objects.index, self.audible), len(self.objects)]
        return self.shares[0][rows][:, : self.assigned.how.n_bases]

    @torch.inference_mode()
    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`, of the same sound in order; they add up to it."""
        assigned = self.assigned
        cut = windows.cut(blocks, assigned.how.length, assigned.how.overlap)
        numbered = enumerate(zip(cut, assigned.windows, strict=True))
        parts = (
            (assigned.how.render(x, w, assigned.pieces(k, w, self.edits)), last) for k, ((x, _, last), w) in numbered
        )
        yield from windows.join(parts, assigned.how.overlap)


def assignments(shares: Tensor, basis_energy: Tensor, objects: Sequence[str], n_bases: int) -> list[dict[str, Any]]:
    """List a window's bases, the loudest first: each one's number, the object (or rest) with most of it, its share.

    `energy` is the basis's share of the window's, of those listed: the first factorisation's.
    """
    names = [*objects, REST]
    energy = basis_energy[:n_bases] / basis_energy[:n_bases].sum().clamp_min(1e-30)
    share, row = shares[:, :n_bases].max(0)
    return [
        {"basis": m, "object": names[row[m]], "share": round(float(share[m]), 3), "energy": round(float(energy[m]), 4)}
        for m in energy.argsort(descending=True, stable=True).tolist()
    ]
