"""Estimates made of a file's mono mix, carried over to its own channels and sample rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from avsep.separation import resample
from avsep.stft import STFT

_WINDOW_S = 0.15  # of the gains, where a separator has none of its own
_FRAMES = 32  # taken at a time, of up to 8 channels; fewer of more
_TOP = 0.5, 0.9  # of the estimates' band: what decides about the file's sound above it
_STRETCH = 8  # times as many frames, ten seconds: from them follows where in the stereo picture each object is
_LOUDEST = 1024  # bins of every fourth of `_FRAMES`
_PURE = 64  # of so many of them one tells where an object is: those of which it has most
_DIFFUSE = 1e-3  # of an object's power at least, alike in both channels


def gains_stft(separator: object, sample_rate: int) -> STFT:
    """Return the resolution of the gains: that of a separator's masks, else windows of 0.15 s by quarters."""
    own = getattr(separator, "mask_stft", None)
    if isinstance(own, STFT):
        return own
    quarter = max(1, round(_WINDOW_S * sample_rate / 4))
    return STFT(sample_rate, 4 * quarter, quarter)


def window_length(stft: STFT, sample_rate: int) -> int:
    """Return how many of a file's samples a frame has: even, as long as one of `stft` or a little longer.

    It has no large prime factor: with one a Fourier transform takes three times as long.
    """
    return 2 * next_fast_len(max(1, round(stft.n_fft * sample_rate / stft.sample_rate / 2)))


class _Stream:
    """A sound that comes in blocks `(R, S)`, of which any stretch that isn't forgotten can be had."""

    def __init__(self, blocks: Iterable[NDArray[np.float32]]) -> None:
        self._blocks = iter(blocks)
        self._held = next(self._blocks)
        self._start = 0  # of what is held
        self.n_channels = len(self._held)
        self.ended = False

    @property
    def end(self) -> int:
        """How many samples have come."""
        return self._start + self._held.shape[1]

    def take(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return samples `start … stop`, `(R, stop - start)`, with zeros beyond both ends of the sound."""
        more: list[NDArray[np.float32]] = []
        while not self.ended and self.end + sum(m.shape[1] for m in more) < stop:
            block = next(self._blocks, None)
            self.ended = block is None
            more += [] if block is None else [block]
        if more:
            self._held = np.concatenate([self._held, *more], 1)
        first, last = max(start, 0), max(0, min(stop, self.end))
        part = self._held[:, first - self._start : max(first, last) - self._start]
        return np.pad(part, ((0, 0), (first - start, stop - max(first, last))))

    def forget(self, before: int) -> None:
        """Hold no more of what comes before a sample."""
        drop = min(max(0, before - self._start), self._held.shape[1])
        self._held, self._start = self._held[:, drop:], self._start + drop

    def finish(self) -> None:
        """Take what is left, for its own sake."""
        for _ in self._blocks:
            pass


def carry_over(
    estimates: Iterable[NDArray[np.float32]], channels: Iterable[NDArray[np.float32]], sample_rate: int, stft: STFT
) -> Iterator[NDArray[np.float32]]:
    """Divide a file's channels as its mono mix was: blocks of objects and, last, the rest, `(J + 1, C, S)`.

    `estimates` `(J + 1, …)`, the rest last, are at `stft.sample_rate` Hz, `channels` `(C, …)` at
    `sample_rate`. In each bin of `stft` an object gets |estimate| / Σ |estimates|, more in the channels where it is
    louder. Two channels are filtered by where in the stereo picture each object is (`places`). Frames of both sounds
    are equally long and centred at the same times. What lies above the estimates' band is divided as the upper part
    of the band. What the objects leave of a channel is the rest, so that all add up to the channel. Memory doesn't
    grow with the length.
    """
    mono, sound = _Stream(estimates), _Stream(channels)
    ratio = sample_rate / stft.sample_rate
    n_fft = window_length(stft, sample_rate)
    windows = torch.hann_window(stft.n_fft), torch.hann_window(n_fft)
    tail = torch.zeros(1, 1, 0), torch.zeros(0)  # what earlier frames add to later samples
    done, frame = 0, 0  # samples that have been given, and the next frame
    taken = max(2, _FRAMES * 8 // max(8, sound.n_channels))
    points: list[tuple[Tensor, Tensor]] = []  # of this stretch and the one before
    where = None  # in the stereo picture objects are
    while not (sound.ended and done >= sound.end):
        if sound.n_channels == 2 and frame % (_STRETCH * taken) == 0:
            ahead = range(frame, frame + _STRETCH * taken, taken)
            points = points[-_STRETCH:]
            points += [_loudest(mono, sound, range(k, k + taken, 4), stft, sample_rate, windows) for k in ahead]
            where = places(torch.cat([x for x, _ in points], 1), torch.cat([g for _, g in points], 1))
        start = frame * stft.hop_length - stft.n_fft // 2
        held = mono.take(start, start + (taken - 1) * stft.hop_length + stft.n_fft)
        mono.forget(start + taken * stft.hop_length)
        frames = torch.from_numpy(held).unfold(1, stft.n_fft, stft.hop_length)  # (J + 1, B, n)
        gains = _gains(frames * windows[0], n_fft // 2 + 1, ratio * stft.n_fft / n_fft)

        starts = [_centre(k, stft, sample_rate) - n_fft // 2 for k in range(frame, frame + taken + 1)]
        own = torch.from_numpy(sound.take(starts[0], starts[-2] + n_fft))  # (C, S)
        sums, weights = _masked(own, [s - starts[0] for s in starts[:-1]], gains, windows[1], where)
        sums[..., : tail[0].shape[-1]] += tail[0]
        weights[: len(tail[1])] += tail[1]
        ready = starts[-1] - starts[0]  # later frames add nothing to what comes before
        tail = sums[..., ready:].clone(), weights[ready:].clone()
        new = slice(done - starts[0], min(ready, sound.end - starts[0]))
        if new.stop > new.start:
            objects = sums[..., new] / weights[new].clamp_min(1e-6)
            yield torch.cat([objects, own[None, :, new] - objects.sum(0, keepdim=True)]).numpy()
        sound.forget(starts[-1])
        done, frame = max(done, starts[-1]), frame + taken
    mono.finish()


def _gains(frames: Tensor, n_bins: int, step: float) -> Tensor:
    """Return each object's part, and the rest's, of windowed frames `(J + 1, B, n)` in the file's bins, `(…, B, F)`."""
    found = _power(torch.fft.rfft(frames)).sqrt()
    gains = found / found.sum(0).clamp_min(1e-9)
    n_own = found.shape[-1]
    if (n_bins - 1) * step > n_own - 1:  # the file has a band above
        low, high = (int(part * n_own) for part in _TOP)
        top = found[..., low:high].square().sum(-1).sqrt()
        above = (top / top.sum(0).clamp_min(1e-9))[..., None]
        n_below = int((high - 1) / step) + 1
        return torch.cat([resample(gains, n_below, step), above.expand(-1, -1, n_bins - n_below)], -1)
    return resample(gains, n_bins, step)


def _masked(
    own: Tensor, starts: Sequence[int], gains: Tensor, window: Tensor, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply gains `(J + 1, B, F)` to channels `(C, S)` → the frames' sums `(J, C, S)`, the windows' squares `(S,)`."""
    n, squared = len(window), window.square()
    spectra = torch.fft.rfft(torch.stack([own[:, s : s + n] for s in starts], 1) * window)  # (C, B, F)
    found = _panned(gains, spectra) * spectra if where is None else _filtered(gains, spectra, where)
    parts = torch.fft.irfft(found, n) * window
    sums, weights = own.new_zeros(len(parts), *own.shape), own.new_zeros(own.shape[1])
    for k, start in enumerate(starts):
        sums[..., start : start + n] += parts[:, :, k]
        weights[start : start + n] += squared
    return sums, weights


def _panned(gains: Tensor, spectra: Tensor) -> Tensor:
    """Give each object its own gains in each channel, `(J, C, B, F)`: in what it is louder there, it gets more of.

    Its levels there are those of what the common gains `(J + 1, B, F)` take of the channels `(C, B, F)`.
    """
    levels = torch.einsum("jbf,cbf->jc", gains.square(), _power(spectra))
    levels = (levels / levels.mean(1, keepdim=True).clamp_min(1e-20)).sqrt()
    for_each = levels[..., None, None] * gains[:, None]
    return for_each[:-1] / for_each.sum(0).clamp_min(1e-9)


def _loudest(
    mono: _Stream, sound: _Stream, frames: range, stft: STFT, sample_rate: int, windows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loudest bins of some frames: two channels' values `(2, K)`, and the gains `(J + 1, K)`."""
    first, n = frames[0] * stft.hop_length - stft.n_fft // 2, len(windows[1])
    held = mono.take(first, first + (frames[-1] - frames[0]) * stft.hop_length + stft.n_fft)
    estimates = torch.from_numpy(held).unfold(1, stft.n_fft, frames.step * stft.hop_length)
    starts = [_centre(k, stft, sample_rate) - n // 2 for k in frames]
    own = torch.from_numpy(np.stack([sound.take(start, start + n) for start in starts], 1))
    spectra = torch.fft.rfft(own * windows[1]).flatten(1)
    gains = _gains(estimates * windows[0], n // 2 + 1, sample_rate / n / (stft.sample_rate / stft.n_fft)).flatten(1)
    loudest = _power(spectra).sum(0).topk(min(_LOUDEST, spectra.shape[1])).indices
    return spectra[:, loudest], gains[:, loudest]


def places(values: Tensor, gains: Tensor) -> Tensor:
    """Say where in the stereo picture each object and the rest are: real covariances of the channels `(J + 1, 2, 2)`.

    Each has trace one. `[[1, 0], [0, 0]]` is on the left, `[[.5, .5], [.5, .5]]` in the middle, `[[.5, 0], [0, .5]]`
    everywhere. They are those of the bins of which each has most, of `values` `(2, K)` and `gains` `(J + 1, K)`: nearly
    all of them, where it sounds alone somewhere.
    """
    pure = gains.topk(max(1, gains.shape[1] // _PURE)).indices  # (J + 1, K')
    found = values[:, pure] / _power(values)[:, pure].sum(0).clamp_min(1e-20).sqrt()
    found = torch.einsum("cjk,djk->jcd", found, found.conj()).real
    traces = found.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-20)
    return (1 - _DIFFUSE) * found / traces + _DIFFUSE * torch.eye(2) / 2


def _filtered(gains: Tensor, spectra: Tensor, where: Tensor) -> Tensor:
    """Filter two channels `(2, B, F)` by what each object has of them and where it is, `(J, 2, B, F)`.

    It is the Wiener filter of sounds with such powers and covariances; those of all objects and the rest add up to one.
    """
    left, both, right = torch.einsum("jbf,jk->kbf", gains, where.flatten(1)[:, [0, 1, 3]])
    inverse = (left * right - both.square()).clamp_min(1e-12).reciprocal()
    x, y = spectra
    x, y = inverse * (right * x - both * y), inverse * (left * y - both * x)
    return torch.stack([
        torch.stack([g * (w[0, 0] * x + w[0, 1] * y), g * (w[1, 0] * x + w[1, 1] * y)])
        for g, w in zip(gains[:-1], where[:-1], strict=True)
    ])  # fmt: skip


def _power(spectra: Tensor) -> Tensor:
    """Return |X|² by its parts, twice as quickly as `abs`, which minds overflow."""
    return spectra.real.square() + spectra.imag.square()


def _centre(frame: int, stft: STFT, sample_rate: int) -> int:
    """Return the sample of the file nearest to a frame's centre."""
    return (2 * frame * stft.hop_length * sample_rate + stft.sample_rate) // (2 * stft.sample_rate)
