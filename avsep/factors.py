"""A waveform's factors: magnitude spectrogram ≈ W · H."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import nmf
from avsep.limits import DecodeLimits
from avsep.objects import IMAGENET_CLASSES
from avsep.stft import STFT

CLIPS_IN_FLIGHT = 4  # decoded clips that wait for their logits; also a labeller's batch
Factorize = Callable[[Sequence[NDArray[np.float32]], Sequence[int]], Future]  # waveforms, seeds → future Factors


@dataclass(frozen=True)
class ExtractionConfig:
    """Everything that decides a clip's record."""

    stft: STFT = field(default_factory=STFT)
    n_bases: int = 25  # M
    n_iter: int = 200
    image_size: int = 320  # pixels, the pictures' short side
    looks: str = "tiles"  # where the picture network looks: a way of avsep.looks
    limits: DecodeLimits = field(default_factory=DecodeLimits)

    @property
    def shape(self) -> tuple[int, int]:
        """(F, M) of a record's bases."""
        return self.stft.n_bins, self.n_bases

    def as_dict(self, labeller_sha256: str | None, labeller: str | None = None) -> dict[str, Any]:
        """Return what is stored with the data and hashed into its digest: no limit of time in it."""
        return {
            "stft": asdict(self.stft),
            "n_bases": self.n_bases,
            "n_iter": self.n_iter,
            "image_size": self.image_size,
            "looks": self.looks,
            "imagenet_classes": IMAGENET_CLASSES,
            "labeller": labeller,
            "labeller_sha256": labeller_sha256,
        }


def seed_of(segment_id: str) -> int:
    """Derive a clip's NMF start from its id, alike on every machine and in every batch."""
    return int.from_bytes(hashlib.sha256(segment_id.encode()).digest()[:4], "big")


@dataclass
class Factors:
    """A clip's factorisation `V ≈ W H`."""

    W: Tensor  # (F, M), maximum one a column
    H: Tensor  # (M, N)
    kl_divergence: float

    @property
    def basis_energy(self) -> Tensor:
        """Each basis's share of the clip's energy, `(M,)`, summing to one."""
        energy = (self.W**2).sum(0) * (self.H**2).sum(1)
        return energy / energy.sum().clamp_min(1e-30)


def factorize(waveform: NDArray[np.float32] | Tensor, seed: int, config: ExtractionConfig) -> Factors:
    """Factorise one waveform's magnitude spectrogram."""
    V = config.stft(torch.as_tensor(waveform)).abs()
    W, H = nmf.factorize(V, config.n_bases, n_iter=config.n_iter, seeds=seed)
    return Factors(W, H, float(nmf.kl_divergence(V, W, H)))


def factorize_clips(
    waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], config: ExtractionConfig, device: str
) -> list[Factors]:
    """Factorise several waveforms on a device, those of one length together; the factors are on the CPU."""
    if len(waveforms) > 1:
        try:
            return _factorize_together(waveforms, seeds, config, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return [f for w, s in zip(waveforms, seeds, strict=True) for f in factorize_clips([w], [s], config, device)]
    return _factorize_together(waveforms, seeds, config, device)


def _factorize_together(
    waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], config: ExtractionConfig, device: str
) -> list[Factors]:
    factors: dict[int, Factors] = {}
    by_length: dict[int, list[int]] = {}
    for i, waveform in enumerate(waveforms):
        by_length.setdefault(len(waveform), []).append(i)
    for rows in by_length.values():
        V = config.stft(torch.from_numpy(np.stack([waveforms[i] for i in rows])).to(device)).abs()
        W, H = nmf.factorize(V, config.n_bases, n_iter=config.n_iter, seeds=[seeds[i] for i in rows])
        divergences = nmf.kl_divergence(V, W, H)
        for row, i in enumerate(rows):
            factors[i] = Factors(W[row].cpu(), H[row].cpu(), float(divergences[row]))
    return [factors[i] for i in range(len(waveforms))]
