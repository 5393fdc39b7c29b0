"""Bases with known owners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# -------------------------------------------------------------------------------------- bases


@dataclass(frozen=True)
class PlantedBases:
    """Matrices whose factors are known: `V = W H`, and which object each basis belongs to."""

    V: Tensor  # (B, F, N)
    W: Tensor  # (B, F, M), each column's maximum one
    H: Tensor  # (B, M, N)
    object_of_basis: Tensor  # (B, M), int64 in 0…L-1
    labels: Tensor  # (B, L), bool: the objects that have a basis in the clip


def planted_bases(
    n_clips: int,
    *,
    n_bins: int = 48,
    n_bases: int = 6,
    n_frames: int = 40,
    n_objects: int = 4,
    objects_a_clip: int = 2,
    variation: float = 0.2,
    seed: int = 0,
) -> PlantedBases:
    """Draw clips whose bases vary around two spectra an object, common to all clips.

    Each clip holds `objects_a_clip` different objects, its bases shared out among them evenly, in
    random order; activations are zero half of the time. With `variation` 0 the bases of
    one kind are equal. Raises ValueError when the objects of a clip don't all get a basis.

    >>> planted = planted_bases(3)
    >>> planted.V.shape, planted.object_of_basis.shape, planted.labels.sum(1).tolist()
    (torch.Size([3, 48, 40]), torch.Size([3, 6]), [2, 2, 2])
    """
    if not 1 <= objects_a_clip <= min(n_objects, n_bases):
        raise ValueError(f"objects_a_clip is {objects_a_clip}; it must lie in 1…{min(n_objects, n_bases)}")
    rng = np.random.default_rng(seed)
    spectra = rng.exponential(size=(n_objects, 2, n_bins)) ** 2  # a few bins stand out in each
    shape = (n_clips, n_bases)
    present = np.argsort(rng.random((n_clips, n_objects)))[:, :objects_a_clip]
    order = np.argsort(rng.random(shape)) % objects_a_clip
    owner = np.take_along_axis(present, order, 1)
    W = spectra[owner, rng.integers(2, size=shape)] * np.exp(variation * rng.standard_normal((*shape, n_bins)))
    W = (W / W.max(-1, keepdims=True)).swapaxes(1, 2).astype(np.float32)
    H = (rng.exponential(size=(*shape, n_frames)) * (rng.random((*shape, n_frames)) < 0.5)).astype(np.float32)
    labels = np.zeros((n_clips, n_objects), bool)
    np.put_along_axis(labels, present, True, 1)
    return PlantedBases(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (W @ H, W, H, owner, labels)))
