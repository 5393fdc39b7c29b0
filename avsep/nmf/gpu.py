"""KL-NMF's updates as one Triton kernel a half-iteration: V/(WH) never leaves the GPU's registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from avsep.nmf.code import FLOOR, TINY

MAX_BASES = 128  # more don't fit into a block's registers


@triton.jit
def _half(  # type: ignore[no-untyped-def]
    V, X, Y, n_x, n_y, n_bases,
    v_clip, v_x, v_y, x_clip, x_x, x_basis, y_clip, y_y, y_basis,
    FLOOR: tl.constexpr, TINY: tl.constexpr,
    SIZE_X: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_M: tl.constexpr,
):  # fmt: skip
    """`X ← X ∘ ((V/(XY)) Yᵀ) / (1 Yᵀ)` for one block of X's rows, X `(n_x, M)` and Y `(M, n_y)`, of one clip."""
    clip = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * SIZE_X + tl.arange(0, SIZE_X)
    bases = tl.arange(0, SIZE_M)
    there = (rows < n_x)[:, None] & (bases < n_bases)[None, :]
    place = X + clip * x_clip + rows[:, None] * x_x + bases[None, :] * x_basis
    x = tl.load(place, mask=there, other=0.0)
    total = tl.zeros((SIZE_X, SIZE_M), tl.float32)
    sums = tl.zeros((SIZE_M,), tl.float32)
    for start in range(0, n_y, SIZE_Y):
        columns = start + tl.arange(0, SIZE_Y)
        inside = (bases < n_bases)[:, None] & (columns < n_y)[None, :]
        y = tl.load(Y + clip * y_clip + bases[:, None] * y_basis + columns[None, :] * y_y, mask=inside, other=0.0)
        inside = (rows < n_x)[:, None] & (columns < n_y)[None, :]
        v = tl.load(V + clip * v_clip + rows[:, None] * v_x + columns[None, :] * v_y, mask=inside, other=0.0)
        product = tl.dot(x, y, input_precision="tf32x3")  # three products of halves: float32's precision
        total += tl.dot(v / tl.maximum(product, FLOOR), tl.trans(y), input_precision="tf32x3")
        sums += tl.sum(y, 1)
    tl.store(place, x * (total / tl.maximum(sums, TINY)[None, :]), mask=there)


def iterate(V: Tensor, W: Tensor, H: Tensor, n_iter: int, *, update_bases: bool = True) -> None:
    """Run the updates in place on `(B, F, N)`, `(B, F, M)`, `(B, M, N)`, M at most `MAX_BASES`."""
    (n_clips, n_bins, n_frames), n_bases = V.shape, H.shape[1]
    size_m = max(16, triton.next_power_of_2(n_bases))
    sizes = {"SIZE_X": 64, "SIZE_Y": 64 if size_m <= 64 else 32, "SIZE_M": size_m, "FLOOR": FLOOR, "TINY": TINY}
    V_t, W_t, H_t = V.mT, W.mT, H.mT

    def half(v: Tensor, x: Tensor, y: Tensor, n_x: int, n_y: int) -> None:
        strides = (*v.stride(), *x.stride(), y.stride(0), y.stride(2), y.stride(1))
        _half[(triton.cdiv(n_x, sizes["SIZE_X"]), n_clips)](v, x, y, n_x, n_y, n_bases, *strides, **sizes)

    for _ in range(n_iter):
        if update_bases:
            half(V, W, H, n_bins, n_frames)
        half(V_t, H_t, W_t, n_frames, n_bins)
