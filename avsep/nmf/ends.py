"""How every factorisation begins and ends: magnitudes checked, a start drawn, bases of maximum one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from avsep.nmf.code import TINY


def check_magnitudes(V: Tensor) -> Tensor:
    """Return magnitudes `(…, F, N)` as float32; ValueError where they are negative, infinite, NaN or no matrix."""
    if V.ndim < 2:
        raise ValueError(f"a matrix of shape {tuple(V.shape)} was given; (…, F, N) is needed")
    if 0 in V.shape[-2:]:
        raise ValueError(f"a matrix of shape {tuple(V.shape)} was given; it needs at least one row and one column")
    V = V.detach().to(torch.float32)
    low, high = (float(x) for x in V.aminmax()) if V.numel() else (0.0, 0.0)
    if not (low >= 0 and high < float("inf")):  # NaN fails both comparisons
        raise ValueError(
            f"magnitudes range from {low} to {high}; they must be finite and non-negative: pass abs() of a spectrogram"
        )
    return V


def whole_number(name: str, value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """Take an int, or a scalar of numpy or torch that is one."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
    return number


def scale_of(X: Tensor) -> Tensor:
    """Return the power of two, `(…, 1, 1)`, that brings each matrix's maximum to between a half and one, or nearer."""
    peak = X.amax((-2, -1), keepdim=True)
    return torch.ldexp(torch.ones_like(peak), -torch.frexp(peak).exponent.clamp(-120, 120))


_SEEDS = -(2**63), 2**64 - 1  # that torch takes


def draw_start(V: Tensor, n_bases: int, seeds: Sequence[int] | int | None) -> tuple[Tensor, Tensor]:
    """Draw positive W `(…, F, M)` and H `(…, M, N)` on the CPU: every device starts alike. `WH` has the mean of V."""
    *lead, n_bins, n_frames = V.shape
    n_clips = math.prod(lead)
    if not isinstance(seeds, Sized) or getattr(seeds, "ndim", 1) == 0:
        seeds = [whole_number("seeds", 0 if seeds is None else seeds, *_SEEDS)] * n_clips
    if len(seeds) != n_clips:
        raise ValueError(f"{len(seeds)} seeds for {n_clips} clips: give one a clip, or a single int")
    W = torch.empty(n_clips, n_bins, n_bases)
    H = torch.empty(n_clips, n_bases, n_frames)
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(whole_number("a seed", seed, *_SEEDS))
        W[i] = torch.rand(n_bins, n_bases, generator=generator) + 0.1
        H[i] = torch.rand(n_bases, n_frames, generator=generator) + 0.1
    level = (V.mean((-2, -1), keepdim=True) / n_bases).sqrt()
    W, H = W.reshape(*lead, n_bins, n_bases), H.reshape(*lead, n_bases, n_frames)
    return W.to(V.device) * level, H.to(V.device) * level


def checked_start(name: str, start: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a copy of a given start, on the device and in the shape of a drawn one; ValueError where it can't be."""
    if tuple(start.shape) != shape:
        raise ValueError(f"{name} is {tuple(start.shape)}; it must be {shape}")
    return check_magnitudes(start).to(like.device).reshape(like.shape).clone()


def normalise(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each basis to maximum one and its activations inversely; `WH` is unchanged."""
    peak = W.amax(-2, keepdim=True)
    used = (peak > TINY) & (H.amax(-1).unsqueeze(-2) > 0)
    W = torch.where(used, W / peak.clamp_min(TINY), 0.0)
    H = torch.where(used.mT, H * peak.mT, 0.0)
    return W, H
