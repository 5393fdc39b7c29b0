"""Euclidean NMF (Lee and Seung 2001) in plain torch: a factoriser that isn't the default."""

from collections.abc import Sequence

from torch import Tensor

from avsep.nmf.code import TINY
from avsep.nmf.ends import check_magnitudes, draw_start, normalise


def factorize(V: Tensor, n_bases: int, *, n_iter: int = 200, seeds: Sequence[int] | int = 0) -> tuple[Tensor, Tensor]:
    V = check_magnitudes(V)
    W, H = draw_start(V, n_bases, seeds)
    for _ in range(n_iter):
        W = W * (V @ H.mT) / (W @ (H @ H.mT)).clamp_min(TINY)
        H = _better(V, W, H)
    return normalise(W, H)


def infer_activations(V: Tensor, W: Tensor, *, n_iter: int = 100, H0: Tensor | None = None) -> Tensor:
    H = W.mT @ check_magnitudes(V) if H0 is None else H0
    for _ in range(n_iter):
        H = _better(V, W, H)
    return H


def divergence(V: Tensor, W: Tensor, H: Tensor) -> Tensor:
    return (V - W @ H).square().sum((-2, -1)) / 2


def _better(V: Tensor, W: Tensor, H: Tensor) -> Tensor:
    return H * (W.mT @ V) / (W.mT @ W @ H).clamp_min(TINY)
