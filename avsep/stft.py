"""Short-time Fourier transform with an exact inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class STFT:
    """Map waveforms to complex spectrograms and back, reconstructing to float32 accuracy.

    The fields are the whole configuration: a Hann window of `n_fft` samples moved by
    `hop_length` samples, centred, with zeros (not reflections, which fail on short input)
    beyond both ends. With the defaults ten seconds give exactly 2401 x 201.

    >>> stft = STFT()
    >>> X = stft(torch.randn(2, 480_000))
    >>> X.shape
    torch.Size([2, 2401, 201])
    >>> stft.inverse(X, 480_000).shape
    torch.Size([2, 480000])
    """

    sample_rate: int = 48_000
    n_fft: int = 4_800
    hop_length: int = 2_400

    def __post_init__(self) -> None:
        if self.sample_rate <= 0:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be above 0 Hz")
        if self.n_fft <= 0 or self.n_fft % 2:
            raise ValueError(f"n_fft is {self.n_fft}; it must be a positive even number of samples")
        if not 0 < self.hop_length <= self.n_fft // 2:
            raise ValueError(
                f"hop_length is {self.hop_length}; it must lie in 1…{self.n_fft // 2} samples "
                "(half of n_fft), or the windows leave gaps and no inverse exists"
            )

    @property
    def n_bins(self) -> int:
        """F, the number of frequency bins."""
        return self.n_fft // 2 + 1

    @property
    def frequencies_hz(self) -> Tensor:
        """Centre frequency of each bin in Hz, `(F,)`."""
        return torch.arange(self.n_bins) * (self.sample_rate / self.n_fft)

    def n_frames(self, n_samples: int) -> int:
        """N for a waveform of `n_samples`: the last frame is centred at or after the end."""
        return 1 + -(-n_samples // self.hop_length)

    def _window(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.hann_window(self.n_fft, dtype=dtype, device=device)

    def __call__(self, waveform: Tensor) -> Tensor:
        """Transform `(…, S)` real samples to `(…, F, N)` complex values; those of integers are as they are, in float32.

        Raises ValueError when S is less than half a window, or samples are complex.
        """
        if waveform.is_complex():
            raise ValueError(f"the waveform is {waveform.dtype}; the STFT takes real samples")
        if waveform.dtype != torch.float64:
            waveform = waveform.float()
        n_samples = waveform.shape[-1] if waveform.ndim else 0
        if n_samples < self.n_fft // 2:
            raise ValueError(
                f"the waveform has {n_samples} samples; the STFT needs at least half a window, "
                f"{self.n_fft // 2}: pad it with zeros"
            )
        window, half = self._window(waveform.dtype, waveform.device), self.n_fft // 2
        beyond = (self.n_frames(n_samples) - 1) * self.hop_length - n_samples + half
        frames = torch.nn.functional.pad(waveform, (half, beyond)).unfold(-1, self.n_fft, self.hop_length)
        return torch.fft.rfft(frames * window).mT

    def inverse(self, spectrogram: Tensor, length: int) -> Tensor:
        """Transform `(…, F, N)` complex values to the `(…, length)` samples they came from.

        Raises ValueError when the number of bins or frames doesn't belong to `length` samples, or
        values are real: magnitudes alone have no inverse.
        """
        if not spectrogram.is_complex():
            raise ValueError(f"the spectrogram is {spectrogram.dtype}; the inverse needs complex values")
        expected = (self.n_bins, self.n_frames(length))
        if tuple(spectrogram.shape[-2:]) != expected:
            raise ValueError(
                f"the spectrogram is {tuple(spectrogram.shape[-2:])}; {length} samples need "
                f"(F, N) = {expected}: pass the length of the waveform it came from"
            )
        window, half = self._window(spectrogram.real.dtype, spectrogram.device), self.n_fft // 2
        if not spectrogram.numel():  # an empty batch, which irfft refuses
            return spectrogram.real.new_zeros(*spectrogram.shape[:-2], length)
        sums = self._overlapped(torch.fft.irfft(spectrogram.mT, self.n_fft) * window)
        weights = self._overlapped(window.square().expand(expected[1], -1))
        kept = slice(half, half + length)
        return sums[..., kept] / weights[kept]

    def _overlapped(self, frames: Tensor) -> Tensor:
        """Add frames `(…, N, n_fft)` a hop apart, `(…, S)`, by stretches of a hop: five times as quickly as `istft`."""
        n_stretches = -(-self.n_fft // self.hop_length)
        frames = torch.nn.functional.pad(frames, (0, n_stretches * self.hop_length - self.n_fft))
        frames = frames.unflatten(-1, (n_stretches, self.hop_length))  # (…, N, stretches, hop)
        n_frames = frames.shape[-3]
        sums = frames.new_zeros(*frames.shape[:-3], n_frames + n_stretches - 1, self.hop_length)
        for k in range(n_stretches):
            sums[..., k : k + n_frames, :] += frames[..., k, :]
        return sums.flatten(-2)
