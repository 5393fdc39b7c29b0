"""How good separated sounds are, in dB. Every function takes the reference first."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import fast_bss_eval
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

_SILENCE = 1e-12  # mean power, full scale = 1: below −120 dB there is no signal to measure


@dataclass(frozen=True)
class BSSEval:
    """BSS-eval figures in dB, each `(J,)` float64 in the order of the references."""

    sdr: NDArray[np.float64]
    sir: NDArray[np.float64]
    sar: NDArray[np.float64]


def si_sdr(reference: ArrayLike, estimate: ArrayLike) -> NDArray[np.float64]:
    """Return the scale-invariant signal-to-distortion ratio in dB, `(…, S), (…, S)` → `(…,)`.

    With `a = <e, r> / <r, r>`: `10 log10(|a r|² / |e − a r|²)` (Le Roux et al. 2019, without
    removing means). NaN where the reference is silent: nothing can be said. −inf where only
    the estimate is silent: the sound was lost.

    >>> r = np.array([1.0, 0.0, -1.0, 0.0]); e = r + 0.1 * np.array([0.0, 1.0, 0.0, 1.0])
    >>> round(float(si_sdr(r, e)), 6)
    20.0
    """
    r, e = _pair(reference, estimate)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = ((e * r).sum(-1) / (r * r).sum(-1))[..., None] * r
        ratio = (target**2).sum(-1) / ((e - target) ** 2).sum(-1)
        value = 10 * np.log10(ratio)
    return _mark_silence(value, r, e)


def bss_eval(references: ArrayLike, estimates: ArrayLike, *, filter_length: int = 512) -> BSSEval:
    """Return BSS-eval v3 SDR, SIR and SAR of estimates in the references' order, `(J, S)` each.

    Computed by `fast_bss_eval`, which agrees with mir_eval to 1e-5 dB (Vincent et al. 2006;
    Scheibler 2022). A silent reference gives NaN and takes no part in the others' SIR; a silent
    estimate of a sounding reference gives −inf. Where references are filtered copies of each other
    the figures exist only in the limit, and are those of a diagonal loaded by 1e-10.

    Raises ValueError for other than `(J, S)`, or less than `filter_length` samples.
    """
    r, e = _pair(references, estimates)
    if r.ndim != 2:
        raise ValueError(f"references are {r.shape}; (J, S) is needed")
    if r.shape[1] < filter_length:
        raise ValueError(
            f"the signals have {r.shape[1]} samples; BSS-eval's filter of {filter_length} taps needs at least as many: "
            "give longer ones or a smaller filter_length"
        )
    values = np.full((3, len(r)), np.nan)
    audible = (r**2).mean(-1) > _SILENCE
    measured = audible & ((e**2).mean(-1) > _SILENCE)
    values[:, audible & ~measured] = -np.inf
    if measured.any():
        # A silent estimate still leaves its reference in the others' interference: order the measured first.
        order = np.concatenate([np.flatnonzero(measured), np.flatnonzero(audible & ~measured)])
        guesses = np.where(measured[order, None], e[order], r[order])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute = functools.partial(
                fast_bss_eval.bss_eval_sources,
                torch.from_numpy(r[order]),
                torch.from_numpy(guesses),
                filter_length=filter_length,
                compute_permutation=False,
            )
            try:
                figures = compute()
            except torch.linalg.LinAlgError:  # the references are linearly dependent
                figures = compute(load_diag=1e-10)
        kept = int(measured.sum())
        for row, figure in zip(values, figures[:3], strict=True):
            row[order[:kept]] = figure.numpy()[:kept]
    return BSSEval(*values)


def improvement(of_estimate: ArrayLike, of_mixture: ArrayLike) -> NDArray[np.float64]:
    """Return a figure's gain over the mixture as estimate, in dB; NaN where either is undefined."""
    return np.asarray(of_estimate, np.float64) - np.asarray(of_mixture, np.float64)


def _pair(reference: ArrayLike, estimate: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r, e = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    if r.shape != e.shape or r.ndim == 0 or r.shape[-1] == 0:
        raise ValueError(f"reference {r.shape} and estimate {e.shape} must have one non-empty shape (…, S)")
    if not (np.isfinite(r).all() and np.isfinite(e).all()):
        raise ValueError("reference or estimate holds NaN or infinity; metrics need finite samples")
    return r, e


def _mark_silence(value: NDArray, r: NDArray, e: NDArray) -> NDArray[np.float64]:
    value = np.where((e**2).mean(-1) > _SILENCE, value, -np.inf)
    return np.where((r**2).mean(-1) > _SILENCE, value, np.nan)
