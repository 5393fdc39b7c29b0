"""A waveform's factors: magnitude spectrogram ≈ W · H."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import nmf
from avsep.limits import DecodeLimits
from avsep.looks import WAYS
from avsep.objects import Vocabulary
from avsep.stft import STFT

CLIPS_IN_FLIGHT = 4  # decoded clips that wait for their logits; also a labeller's batch
DEFAULT_FACTORIZER = "kl_nmf"


class Factorizer(Protocol):
    """How magnitudes V `(…, F, N)` become bases W `(…, F, M)` times activations H `(…, M, N)`, all non-negative.

    A module with these functions is one, as `avsep.nmf` is; `nmf.ends` has what most need at their start and end.
    """

    def factorize(self, V: Tensor, n_bases: int, *, n_iter: int, seeds: Sequence[int] | int) -> tuple[Tensor, Tensor]:
        """Return W, each column with maximum one or all zero, and H, float32, on V's device.

        `seeds` is one per clip, or one for all. A clip's factors follow from its seed, whatever the batch.
        Zeros give zeros. Raises ValueError for magnitudes that are negative or not finite.
        """

    def infer_activations(self, V: Tensor, W: Tensor, *, n_iter: int, H0: Tensor | None = None) -> Tensor:
        """Return H for bases held fixed, from `H0` or a start of its own. A basis of zeros gets zeros."""

    def divergence(self, V: Tensor, W: Tensor, H: Tensor) -> Tensor:
        """Return what it minimises, `(…,)`, zero where `V = WH`: records and data cards show it."""


# The factorisers by name, which an `ExtractionConfig` gives.
FACTORIZERS: dict[str, Factorizer] = {DEFAULT_FACTORIZER: nmf}


def get_factorizer(name: str) -> Factorizer:
    """Return a factoriser by name; ValueError lists the names."""
    if name not in FACTORIZERS:
        raise ValueError(f"unknown factorizer {name!r}; the factorizers are {', '.join(FACTORIZERS)}")
    return FACTORIZERS[name]


@dataclass(frozen=True)
class ExtractionConfig:
    """Everything that decides a clip's record."""

    stft: STFT = field(default_factory=STFT)
    n_bases: int = 25  # M
    n_iter: int = 200
    image_size: int = 320  # pixels, the pictures' short side
    looks: str = "tiles"  # where the picture network looks: a way of avsep.looks
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    factorizer: str = DEFAULT_FACTORIZER  # one of FACTORIZERS

    def __post_init__(self) -> None:
        get_factorizer(self.factorizer)
        if self.looks not in WAYS:
            raise ValueError(f"looks is {self.looks!r}; it is one of {', '.join(WAYS)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(F, M) of a record's bases."""
        return self.stft.n_bins, self.n_bases

    def as_dict(self) -> dict[str, Any]:
        """Return what is stored with clips and models.

        The limits decide no record. The default factoriser goes unsaid, so that the clips of before there was a
        choice keep their digest.
        """
        unsaid = {"limits"} | ({"factorizer"} if self.factorizer == DEFAULT_FACTORIZER else set())
        return {name: value for name, value in asdict(self).items() if name not in unsaid}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExtractionConfig:
        """Read what `as_dict` gave; TypeError or ValueError where it isn't that."""
        if missing := {f.name for f in fields(cls)} - {"limits", "factorizer"} - set(raw):
            raise ValueError(f"the extraction's configuration lacks {', '.join(sorted(missing))}")
        return cls(**{**raw, "stft": STFT(**raw["stft"])})


# Waveforms `(S,)`, a seed for each, and how → future Factors, one for each.
Factorize = Callable[[Sequence[NDArray[np.float32]], Sequence[int], ExtractionConfig], Future]


@dataclass(frozen=True)
class DataConfig:
    """What a folder of clips was made with: stored in each of its shards, and hashed into their digest."""

    extraction: ExtractionConfig
    vocabulary: Vocabulary
    labeller: str | None = None  # the picture network's architecture; None: no pictures were labelled
    labeller_sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {
            "extraction": self.extraction.as_dict(),
            "vocabulary": self.vocabulary.as_list(),
            "labeller": self.labeller,
            "labeller_sha256": self.labeller_sha256,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DataConfig:
        """Read what `as_dict` gave."""
        vocabulary = Vocabulary.from_list(raw["vocabulary"])
        return cls(ExtractionConfig.from_dict(raw["extraction"]), vocabulary, raw["labeller"], raw["labeller_sha256"])


def seed_of(segment_id: str) -> int:
    """Derive a clip's NMF start from its id, alike on every machine and in every batch."""
    return int.from_bytes(hashlib.sha256(segment_id.encode()).digest()[:4], "big")


@dataclass
class Factors:
    """A clip's factorisation `V ≈ W H`."""

    W: Tensor  # (F, M), maximum one a column
    H: Tensor  # (M, N)
    kl_divergence: float  # of another factoriser, what that minimises

    @property
    def basis_energy(self) -> Tensor:
        """Each basis's share of the clip's energy, `(M,)`, summing to one."""
        energy = (self.W**2).sum(0) * (self.H**2).sum(1)
        return energy / energy.sum().clamp_min(1e-30)


def factorize(waveform: NDArray[np.float32] | Tensor, seed: int, config: ExtractionConfig) -> Factors:
    """Factorise one waveform's magnitude spectrogram."""
    V = config.stft(torch.as_tensor(waveform)).abs()
    factorizer = get_factorizer(config.factorizer)
    W, H = factorizer.factorize(V, config.n_bases, n_iter=config.n_iter, seeds=seed)
    return Factors(W, H, float(factorizer.divergence(V, W, H)))


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
    factorizer = get_factorizer(config.factorizer)
    factors: dict[int, Factors] = {}
    by_length: dict[int, list[int]] = {}
    for i, waveform in enumerate(waveforms):
        by_length.setdefault(len(waveform), []).append(i)
    for rows in by_length.values():
        V = config.stft(torch.from_numpy(np.stack([waveforms[i] for i in rows])).to(device)).abs()
        W, H = factorizer.factorize(V, config.n_bases, n_iter=config.n_iter, seeds=[seeds[i] for i in rows])
        divergences = factorizer.divergence(V, W, H)
        for row, i in enumerate(rows):
            factors[i] = Factors(W[row].cpu(), H[row].cpu(), float(divergences[row]))
    return [factors[i] for i in range(len(waveforms))]
