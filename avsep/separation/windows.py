"""A sound in overlapping windows: how it is cut, what is kept of each, how the parts are joined again."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import storage
from avsep.factors import Factors
from avsep.stft import STFT


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Explanation(Window):
    """What decided a sound's first window: its bases, and how much of each went to whom.

    `relation` has a row per object of `objects`, L in all; `shares` sums to one over its rows.
    """

    objects: tuple[str, ...]  # L names
    audible: tuple[str, ...]  # J names: the objects that the sound was divided among
    shares: Tensor  # (J + 1, M), the rest last
    stft: STFT  # of the factors
    n_samples: int  # of the window


class ArrayFile:
    """Groups of arrays in a temporary file, read in any order, by one thread at a time.

    Raises OSError that names the temporary folder when its disk is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with its owner)
        weakref.finalize(self, self._file.close)
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, *arrays: NDArray | np.generic) -> None:
        """Keep one more group."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            for x in arrays:
                np.save(self._file, x)
            self._file.flush()  # what it can't write, it would say at the next seek
        except OSError as error:
            raise storage.full_disk(error, tempfile.gettempdir(), storage.TEMPORARY_REMEDY) from None
        self._starts.append(start)

    def read(self, number: int, count: int) -> list[Tensor]:
        """Read the first arrays of a group."""
        self._file.seek(self._starts[number])
        return [torch.from_numpy(np.asarray(np.load(self._file))) for _ in range(count)]

    def add_factors(self, factors: Factors, *arrays: NDArray | np.generic) -> None:
        """Keep factors in half precision, and what belongs to them; their divergence isn't kept."""
        scale = float(factors.H.max()) or 1.0
        W, H = (x.numpy().astype(np.float16) for x in (factors.W, factors.H / scale))
        self.add(W, H, np.float32(scale), *arrays)

    def read_factors(self, number: int, count: int) -> tuple[Factors, list[Tensor]]:
        """Read factors, and the `count` arrays after them."""
        W, H, scale, *arrays = self.read(number, 3 + count)
        return Factors(W.float(), H.float() * scale, 0.0), arrays


class WindowStore:
    """Analysed windows and their sounds in temporary files, in order: 1.5 MB for ten seconds.

    Divergence and energy aren't kept, and sounds in half precision.
    """

    def __init__(self) -> None:
        self._windows, self._sounds = ArrayFile(), ArrayFile()

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, window: Window, sound: NDArray[np.float32]) -> None:
        """Keep one more window and its sound `(S,)`."""
        self._windows.add_factors(window.factors, window.relation.numpy(), window.sound_scores.numpy())
        peak = float(np.abs(sound).max(initial=0.0)) or 1.0
        self._sounds.add((sound / peak).astype(np.float16), np.float32(peak))

    def __getitem__(self, number: int) -> Window:
        factors, (relation, scores) = self._windows.read_factors(number, 2)
        return Window(factors, relation, scores, 0.0)

    def __iter__(self) -> Iterator[Window]:
        return map(self.__getitem__, range(len(self)))

    def sound(self, number: int) -> NDArray[np.float32]:
        """Return a window's sound, `(S,)`."""
        sound, peak = self._sounds.read(number, 2)
        return (sound.float() * peak).numpy()


def cut(
    blocks: Iterable[NDArray[np.float32]], length: int, overlap: int
) -> Iterator[tuple[NDArray[np.float32], int, bool]]:
    """Cut a stream into overlapping windows: each with the number of its new samples, and whether it is the last.

    All have `length` samples but the last. That has half as many to one and a half times as many, or whatever there is:
    no window is too short to be factorised well.
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


def join(parts: Iterable[tuple[NDArray[np.float32], bool]], overlap: int) -> Iterator[NDArray[np.float32]]:
    """Cross-fade windows `(J, …)`, each with whether it is the last, into one stream `(J, …)`; levels are kept."""
    fade_in = np.sin(np.linspace(0, np.pi / 2, overlap, endpoint=False, dtype=np.float32)) ** 2
    tail: NDArray[np.float32] | None = None
    for part, last in parts:
        if tail is not None:
            shared = tail.shape[1]
            part[:, :shared] = part[:, :shared] * fade_in[:shared] + tail * (1 - fade_in[:shared])
        done = part.shape[1] if last else part.shape[1] - overlap
        yield part[:, :done]
        tail = part[:, done:]


def padded(window: NDArray[np.float32], stft: STFT) -> Tensor:
    """Pad a window shorter than the STFT's own with zeros."""
    return torch.from_numpy(np.pad(window, (0, max(0, stft.n_fft - len(window)))))


def resample(x: Tensor, n: int, step: float) -> Tensor:
    """Interpolate the last axis at 0, step, 2 step, …: `(…, N)` → `(…, n)`."""
    at = (torch.arange(n) * step).clamp_max(x.shape[-1] - 1)
    left = at.long()
    rows = x.reshape(-1, x.shape[-1]).T  # whole rows are taken twice as quickly
    found = torch.lerp(rows[left], rows[(left + 1).clamp_max(x.shape[-1] - 1)], (at - left)[:, None])
    return found.T.reshape(*x.shape[:-1], n).contiguous()
