"""Bases learned per object over the training clips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from avsep import storage
from avsep.miml import AnyMIML, basis_posteriors

if TYPE_CHECKING:
    from avsep.records import ClipRecord


def select_bases(posteriors: Tensor, objects: Tensor, threshold: float = 0.5) -> Tensor:
    """Mark the bases that belong to each present object, `(B, C, M)` and boolean `(B, L)` → `(B, L, M)`.

    A basis belongs to an object that the pictures show and whose posterior reaches `threshold`;
    above one half, to one object at most. `posteriors` may hold a noise class after the L objects.
    """
    n_objects = objects.shape[-1]
    return (posteriors[:, :n_objects] >= threshold) & objects.unsqueeze(-1)


@dataclass
class Candidate:
    """A basis offered to the dictionary: who it belongs to and how surely."""

    object_index: int
    score: float  # posterior × square root of its energy share
    segment_id: str
    basis: np.ndarray  # (F,) float16


@torch.inference_mode()
def candidate_bases(
    model: AnyMIML,
    record: ClipRecord,
    labels: Tensor,
    *,
    threshold: float = 0.8,
    per_clip: int = 5,
) -> list[Candidate]:
    """Offer a clip's best bases for each object that the picture and the relation map agree on.

    Args:
        labels: boolean `(L,)`.
        threshold: the least posterior.
        per_clip: how many of an object's bases one clip may offer, so that no clip dominates.
    """
    W, H = (torch.from_numpy(x) for x in record.factors())
    posteriors = basis_posteriors(model.relate(W, H).unsqueeze(0))
    chosen = select_bases(posteriors, labels.unsqueeze(0), threshold)[0]  # (L, M)
    chosen &= torch.from_numpy(record.basis_energy > 0)
    scores = posteriors[0, :-1] * torch.from_numpy(np.sqrt(record.basis_energy))
    candidates = []
    for index in labels.nonzero().flatten().tolist():
        own = [(float(scores[index, m]), m) for m in chosen[index].nonzero().flatten().tolist()]
        for score, m in sorted(own, reverse=True)[:per_clip]:
            candidates.append(Candidate(index, score, record.segment_id, record.bases[:, m]))
    return candidates


@dataclass
class BasisDictionary:
    """For each object the bases gathered over training clips, `(F, D)`, each with maximum one."""

    bases: dict[str, Tensor]

    @classmethod
    def collect(cls, candidates: Iterable[Candidate], objects: Sequence[str], per_object: int = 200) -> BasisDictionary:
        """Keep the `per_object` best candidates of each of the `objects`; the candidates' order means nothing."""
        best: dict[int, list[Candidate]] = {}
        for candidate in candidates:
            kept = best.setdefault(candidate.object_index, [])
            kept.append(candidate)
            if len(kept) > 4 * per_object:
                best[candidate.object_index] = _best(kept, per_object)
        return cls(
            {
                objects[i]: torch.from_numpy(
                    np.stack([c.basis for c in _best(best[i], per_object)], 1).astype(np.float32)
                )
                for i in sorted(best)
            }
        )

    def counts(self) -> Mapping[str, int]:
        """Return how many bases each object has."""
        return {name: W.shape[1] for name, W in self.bases.items()}

    def save(self, path: str) -> None:
        """Write as safetensors, one float16 `(F, D)` tensor an object."""
        data = safetensors.torch.save({n: W.half().contiguous() for n, W in self.bases.items()})
        storage.write_bytes(path, data)

    @classmethod
    def load(cls, path: str) -> BasisDictionary:
        """Read what `save` wrote; ValueError for anything but finite, non-negative bases `(F, D)`."""
        bases = {n: W.float() for n, W in safetensors.torch.load(storage.read_bytes(path)).items()}
        for name, W in bases.items():
            if W.ndim != 2 or not W.numel():
                raise ValueError(f"{name} is {tuple(W.shape)}; it must be (F, D ≥ 1)")
            if not (W.isfinite() & (W >= 0)).all():
                raise ValueError(f"{name} holds NaN, infinity or negative magnitudes")
        return cls(bases)


def _best(candidates: list[Candidate], count: int) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (-c.score, c.segment_id))[:count]
