"""How like a model's training a sound is, and how far it may therefore claim to be sure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from torch import Tensor

from avsep import storage
from avsep.miml import activation_statistics

_N_BANDS = 32
_NEIGHBOURS = 5
_AUDIBLE = 0.005  # share of a clip's amplitude from which a basis is kept
_PRESENT = 0.15  # share of a clip's amplitude from which an object's distance counts
_UNTOLD = 0.8  # familiarity where a model has nothing to compare with


@dataclass
class Familiarity:
    """Bases of training clips, and how far the bases of one clip's object lie from those of the other clips.

    A basis is described by its level in bands and by how it moves. Its distance is that to the fifth nearest basis,
    after each feature was scaled to a deviation of one.
    """

    features: Tensor  # (n, D), scaled
    mean: Tensor  # (D,)
    deviation: Tensor  # (D,)
    spread: Tensor  # (2,): median and 95 % quantile of the distances of training clips' objects

    @classmethod
    def learn(cls, clips: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Familiarity | None:
        """Learn from some clips' `W (F, M)`, `H (M, N)` and posteriors `(L + 1, M)`; None for fewer than two clips."""
        kept, owners, rows = [], [], []
        for number, (W, H, posteriors) in enumerate(clips):
            amplitude = _amplitude(W, H)
            audible = amplitude > _AUDIBLE * amplitude.sum()
            kept.append(_features(W, H)[audible])
            owners.append(torch.full((len(kept[-1]),), number))
            rows.append((posteriors[:-1] * amplitude)[:, audible] / amplitude.sum().clamp_min(1e-12))
        if len(kept) < 2:
            return None
        features, owner = torch.cat(kept), torch.cat(owners)
        if len(features) <= _NEIGHBOURS:
            return None
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-3)
        scaled = (features - mean) / deviation
        distances = []
        for number, weight in enumerate(rows):
            own = owner == number
            if len(scaled) - int(own.sum()) < _NEIGHBOURS:
                return None
            d = _to_neighbours(scaled[own], scaled[~own])
            distances += [float((w * d).sum() / w.sum()) for w in weight if w.sum() >= _PRESENT]
        if not distances:
            return None
        spread = torch.tensor(distances).quantile(torch.tensor([0.5, 0.95]))
        return cls(scaled.half(), mean, deviation, spread)

    def with_clips(self, clips: Iterable[tuple[Tensor, Tensor]]) -> Familiarity:
        """Return it with the audible bases of more clips, each `W (F, M)` and `H (M, N)`; the scales stay."""
        added = [self.features]
        for W, H in clips:
            amplitude = _amplitude(W, H)
            own = _features(W, H)[amplitude > _AUDIBLE * amplitude.sum()]
            added.append(((own - self.mean) / self.deviation).half())
        return replace(self, features=torch.cat(added))

    def distance(self, W: Tensor, H: Tensor) -> Tensor:
        """Return the distance of each basis to those of training, `(F, M)` and `(M, N)` → `(M,)`."""
        return _to_neighbours((_features(W, H) - self.mean) / self.deviation, self.features.float())

    def of(self, distance: Tensor) -> Tensor:
        """Turn distances into [0, 1]: 1 where most of training lies, 0.8 at its 95 % quantile, and less beyond."""
        typical, far = self.spread
        z = (distance - typical) / (far - typical).clamp_min(0.02)
        return ((3 - z) / 2.5).clamp(0, 1)

    def save(self, path: str) -> None:
        """Write it as safetensors."""
        storage.write_bytes(path, safetensors.torch.save({k: v.contiguous() for k, v in vars(self).items()}))

    @classmethod
    def load(cls, path: str) -> Familiarity:
        """Read what `save` wrote. Raises ValueError for other content."""
        found = cls(**safetensors.torch.load(storage.read_bytes(path)))
        width = found.mean.shape
        if not (found.features.ndim == 2 and found.features.shape[1:] == found.deviation.shape == width):
            raise ValueError("its features don't fit together")
        if len(found.features) < _NEIGHBOURS or found.spread.shape != (2,):
            raise ValueError("it holds too few bases")
        if not all(v.isfinite().all() for v in vars(found).values()):
            raise ValueError("it holds NaN or infinity")
        return found


def familiarity(known: Familiarity | None, windows: Iterable[tuple[Tensor, Tensor, Tensor]], n_objects: int) -> Tensor:
    """Say how like its training the bases are that each object claims of a sound, `(L,)` in [0, 1].

    Args:
        known: what to compare with; without it, nobody knows: 0.8.
        windows: the sound's `W (F, M)`, `H (M, N)` and posteriors `(L + 1, M)`.
        n_objects: L.
    """
    if known is None:
        return torch.full((n_objects,), _UNTOLD)
    total, weight = torch.zeros(n_objects), torch.full((n_objects,), 1e-12)
    for W, H, posteriors in windows:
        claimed = posteriors[:-1] * _amplitude(W, H)
        total += claimed @ known.distance(W, H)
        weight += claimed.sum(1)
    return known.of(total / weight)


def deserved(
    confidence: Tensor, familiar: Tensor, objects: Sequence[str], clips_by_label: Mapping[str, int] | None
) -> Tensor:
    """Bring confidences `(L,)` nearer to one half, by how `familiar` `(L,)` the sound is and how much was learned.

    From n clips of an object at most `(n + 1) / (n + 2)` is claimed (Laplace's rule of succession), and of an object
    without any clip one half. That an object doesn't sound is doubted only by what is unfamiliar.
    """
    learned = torch.ones_like(confidence)
    if clips_by_label is not None:
        counts = torch.tensor([float(clips_by_label.get(name, 0)) for name in objects])
        learned = counts / (counts + 2)
    trust = torch.where(confidence > 0.5, familiar * learned, familiar)
    return 0.5 + (confidence - 0.5) * trust


def _amplitude(W: Tensor, H: Tensor) -> Tensor:
    return ((W**2).sum(0) * (H**2).sum(1)).sqrt()


def _features(W: Tensor, H: Tensor) -> Tensor:
    """Describe bases by level in bands and by how they move, `(F, M)` and `(M, N)` → `(M, D)`."""
    spectrum = W.T / W.T.amax(-1, keepdim=True).clamp_min(1e-12)
    level = spectrum @ _bands(W.shape[0])
    level = level / level.amax(-1, keepdim=True).clamp_min(1e-12)
    return torch.cat([(level + 1e-4).log() / 4 + 1, activation_statistics(H.unsqueeze(0))[0]], -1)


def _bands(n_bins: int) -> Tensor:
    """Triangular bands, evenly spaced in log frequency, `(F, bands)`."""
    centres = torch.linspace(math.log(n_bins / 1200), math.log(0.8 * n_bins), _N_BANDS).exp()
    width = (centres * (centres[1] / centres[0] - 1)).clamp_min(1.0)
    weights = (1 - (torch.arange(n_bins, dtype=torch.float32).unsqueeze(1) - centres).abs() / width).clamp_min(0)
    return weights / weights.sum(0).clamp_min(1e-6)


def _to_neighbours(x: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each of `x` `(m, D)` to its fifth nearest of `others` `(n, D)`, by feature → `(m,)`."""
    distances = torch.cdist(x, others) / math.sqrt(x.shape[1])
    return distances.topk(_NEIGHBOURS, largest=False).values[:, -1]
