"""What is kept of a separation's first window, where its separator explains itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avsep import plots, storage
from avsep.model import ModelConfig
from avsep.separation import REST, Planned
from avsep.service.located import marked_image
from avsep.stft import STFT

TRACKS = "tracks"  # a result's folder of WAVs
_WINDOW = "window.npz"


_HEADS, _NAME = 4096, 4 * 64  # bytes beside the numbers; of an object's name


def most_bytes(config: ModelConfig, duration_s: float, n_objects: int) -> int:
    """Return how many bytes a `KeptWindow` writes at most, of a sound that lasts so long and has so many objects."""
    stft, n_names = config.stft, len(config.objects) + n_objects
    longest = max(1.5 * config.separation.window_s * stft.sample_rate, 1.5 * stft.n_fft)  # as `windows.cut` has it
    n_samples = math.ceil(min(stft.sample_rate * duration_s, longest))
    rows = stft.n_bins + stft.n_frames(max(n_samples, stft.n_fft)) + n_names + 3
    return 4 * (n_samples + config.extraction.n_bases * rows) + _NAME * n_names + _HEADS


@dataclass(frozen=True)
class KeptWindow:
    """The first window's M bases, and what became of them: to be drawn, and listened to one by one."""

    objects: tuple[str, ...]  # L names
    relation: NDArray[np.float32]  # (L, M), scores
    audible: tuple[str, ...]  # J names
    shares: NDArray[np.float32]  # (J + 1, M): how much of each basis went to each audible object and, last, to the rest
    W: NDArray[np.float32]  # (F, M)
    H: NDArray[np.float32]  # (M, N)
    energy: NDArray[np.float32]  # (M,), summing to one
    mixture: NDArray[np.float32]  # (S,), what was taken apart: one channel at the separator's sample rate
    stft: STFT

    @classmethod
    def of(cls, plan: Planned, mixture: NDArray[np.float32]) -> KeptWindow | None:
        """Take from a plan what is to be kept, beside the window's sound; None where it explains nothing."""
        found = plan.explanation
        if found is None:
            return None
        return cls(
            objects=found.objects,
            relation=found.relation.numpy(),
            audible=found.audible,
            shares=found.shares.numpy(),
            W=found.factors.W.numpy(),
            H=found.factors.H.numpy(),
            energy=found.factors.basis_energy.numpy(),
            mixture=mixture,
            stft=found.stft,
        )

    def changed(self, audible: tuple[str, ...], shares: NDArray[np.float32]) -> KeptWindow:
        """Return it with other shares, `(J + 1, M)`, of J audible objects: as somebody corrected them."""
        return replace(self, audible=audible, shares=shares)

    def write(self, folder: Path) -> None:
        """Write it into a job's folder."""
        with storage.aside(folder / _WINDOW) as part, part.open("wb") as f:
            np.savez(
                f,
                objects=np.array(self.objects, dtype=str),
                audible=np.array(self.audible, dtype=str),
                stft=np.array([self.stft.sample_rate, self.stft.n_fft, self.stft.hop_length]),
                **{name: getattr(self, name) for name in ("relation", "shares", "W", "H", "energy", "mixture")},
            )

    @classmethod
    def read(cls, folder: Path) -> KeptWindow:
        """Read what `write` wrote."""
        with np.load(folder / _WINDOW) as arrays:
            found: dict[str, Any] = dict(arrays)
        found |= {name: tuple(found[name].tolist()) for name in ("objects", "audible")}
        return cls(**{**found, "stft": STFT(*found["stft"].tolist())})

    def map(self) -> dict[str, Any]:
        """Say how the bases relate to the objects, the loudest basis first, as `answers.RelationMap`.

        `posteriors` `(L + 1, M)` is each basis's softmax over the objects and, last, noise.
        """
        order = np.argsort(-self.energy, kind="stable")
        scores = np.concatenate([self.relation, np.zeros_like(self.relation[:1])])
        scores = np.exp(scores - scores.max(0))
        return {
            "objects": [*self.objects, "noise"],
            "posteriors": np.round((scores / scores.sum(0))[:, order], 4).tolist(),
            "audible": [*self.audible, REST],
            "shares": np.round(self.shares[:, order], 4).tolist(),
            "basis": order.tolist(),
            "energy": np.round(self.energy[order], 5).tolist(),
            "start_s": 0.0,
            "duration_s": len(self.mixture) / self.stft.sample_rate,
        }

    @torch.inference_mode()
    def sound(self, basis: int) -> NDArray[np.float32]:
        """Filter one basis alone out of the window's mixture, `(S,)`; all of them add up to it.

        Raises IndexError for a basis that there isn't.
        """
        if not 0 <= basis < self.W.shape[1]:
            raise IndexError(basis)
        waveform = torch.from_numpy(np.pad(self.mixture, (0, max(0, self.stft.n_fft - len(self.mixture)))))
        V = torch.from_numpy(self.W @ self.H)
        part = torch.from_numpy(np.outer(self.W[:, basis], self.H[basis]))
        mask = torch.where(V > 0, part / V.clamp_min(1e-30), 1.0 / self.W.shape[1])
        return self.stft.inverse(mask * self.stft(waveform), len(waveform)).numpy()[: len(self.mixture)]


def relation(folder: Path) -> dict[str, Any]:
    """Read a job's relation map, as data."""
    return KeptWindow.read(folder).map()


def relation_png(folder: Path, kept_in: Path) -> bytes:
    """Draw a job's relation map, of the window kept in one of its folders, beside its marked picture."""
    kept = KeptWindow.read(kept_in)
    image, marks = marked_image(folder)
    return plots.relation_map(kept.relation, kept.objects, kept.energy, image, kept.audible, marks=marks)


def basis_sound(folder: Path, basis: int) -> tuple[NDArray[np.float32], int]:
    """Filter one basis alone out of a job's first window, `(S,)`, and give the sample rate; IndexError for none."""
    kept = KeptWindow.read(folder)
    return kept.sound(basis), kept.stft.sample_rate
