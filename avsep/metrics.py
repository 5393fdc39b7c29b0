"""How good separated sounds are, in dB, and how far scores can be believed. The reference comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

_EPSILON = 1e-15  # of an estimate's energy: what rounding leaves of a perfect one
_SILENCE = 1e-12  # mean power, full scale = 1: below −120 dB there is no signal to measure


@dataclass(frozen=True)
class BSSEval:
    """BSS-eval figures in dB, each `(…, J)` float64 in the order of the references."""

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


def si_sar(references: ArrayLike, estimates: ArrayLike) -> NDArray[np.float64]:
    """Return the scale-invariant signal-to-artefacts ratio in dB, `(J, S), (…, J, S)` → `(…, J)`.

    Of an estimate's error `e − a r`, with a as in `si_sdr`, the part that no sum of the references gives is artefacts;
    the value is `10 log10(|a r|² / |artefacts|²)` (Le Roux et al. 2019). What is left of the error is interference,
    and `10^(−SI-SDR/10) = 10^(−SI-SIR/10) + 10^(−SI-SAR/10)`: SI-SAR is never below SI-SDR, but by rounding.

    NaN where the reference is silent, −inf where only the estimate is, as for `si_sdr`. Raises ValueError for
    references other than `(J, S)`.

    >>> r = np.array([[1.0, 0, 0], [0, 1.0, 0]]); e = np.array([[1.0, 0.5, 0.1], [0.1, 1.0, 1.0]])
    >>> si_sar(r, e).round(6).tolist()
    [20.0, 0.0]
    """
    r, e = _pair(references, estimates)
    if r.ndim != 2:
        raise ValueError(f"references are {r.shape}; (J, S) is needed")
    basis, sizes, _ = np.linalg.svd(r.T, full_matrices=False)
    q = basis[:, sizes > 1e-10 * max(sizes.max(), _SILENCE)]  # what the references span, (S, ≤ J)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = ((e * r).sum(-1) ** 2) / (r * r).sum(-1)
        artefacts = ((e - (e @ q) @ q.T) ** 2).sum(-1)
        value = 10 * np.log10(target / np.maximum(artefacts, _EPSILON * (e**2).sum(-1)))
    return _mark_silence(value, r, e)


def bss_eval(references: ArrayLike, estimates: ArrayLike, *, filter_length: int = 512) -> BSSEval:
    """Return BSS-eval v3 SDR, SIR and SAR of estimates in the references' order, `(J, S), (…, J, S)` → `(…, J)`.

    Each estimate is projected on its reference, and on all of them, delayed by 0 … `filter_length`
    − 1 samples (Vincent et al. 2006). The normal equations are those of the references alone, so
    that many sets of estimates cost little more than one. Agrees with mir_eval to 1e-5 dB.

    A silent reference gives NaN and takes no part in the others' SIR; a silent estimate of a
    sounding reference gives −inf; SIR is NaN where only one reference sounds. Where references
    are filtered copies of each other the figures exist only in the limit, and are those of a
    diagonal loaded by 1e-10.

    Raises ValueError for other than `(J, S)`, or less than `filter_length` samples, or no tap.

    >>> references = np.random.default_rng(0).standard_normal((2, 48000))
    >>> estimates = references + 0.1 * references[::-1]  # a tenth of the other one's amplitude is left
    >>> bss_eval(references, estimates).sdr.round()
    array([20., 20.])
    """
    r, e = _pair(references, estimates)
    if r.ndim != 2:
        raise ValueError(f"references are {r.shape}; (J, S) is needed")
    if filter_length < 1:
        raise ValueError(f"filter_length is {filter_length}; a filter has at least one tap")
    if r.shape[1] < filter_length:
        raise ValueError(
            f"the signals have {r.shape[1]} samples; BSS-eval's filter of {filter_length} taps needs at least as many: "
            "give longer ones or a smaller filter_length"
        )
    values = np.full((3, *e.shape[:-1]), np.nan)
    audible = np.flatnonzero((r**2).mean(-1) > _SILENCE)
    values[..., audible] = -np.inf
    if len(audible):
        heard = r[audible] / np.linalg.norm(r[audible], axis=-1, keepdims=True)
        measured = e[..., audible, :]
        energy = (measured**2).sum(-1)  # (…, J)
        target, everything = _projections(heard, measured, filter_length)
        with np.errstate(divide="ignore", invalid="ignore"):
            figures = [
                10 * np.log10(part / np.maximum(whole - part, _EPSILON * energy))
                for part, whole in ((target, energy), (target, everything), (everything, energy))
            ]
        sounds = energy / e.shape[-1] > _SILENCE
        if len(audible) == 1:
            figures[1][:] = np.nan
        for row, figure in zip(values, figures, strict=True):
            row[..., audible] = np.where(sounds, figure, -np.inf)
    return BSSEval(*values)


def _projections(r: NDArray, e: NDArray, taps: int) -> tuple[NDArray, NDArray]:
    """Return the energy of each estimate's projection on its reference's delays and on everyone's.

    `(J, S), (…, J, S)` → `(…, J)` twice.
    """
    n_sources = len(r)
    flat = e.reshape(-1, e.shape[-1])
    lagged = _correlate(r, np.concatenate([r, flat]), taps)  # [i, k, a] = Σ_t r_i(t) x_k(t + a)
    own, cross = lagged[:, :n_sources], lagged[:, n_sources:].swapaxes(0, 1)
    gram = np.block([[scipy.linalg.toeplitz(own[i, k], own[k, i]) for k in range(n_sources)] for i in range(n_sources)])
    everything = _solved_energy(gram, cross.reshape(len(flat), -1))
    target = np.empty(len(flat))
    for j in range(n_sources):
        block = slice(j * taps, (j + 1) * taps)
        target[j::n_sources] = _solved_energy(gram[block, block], cross[j::n_sources, j])
    return target.reshape(e.shape[:-1]), everything.reshape(e.shape[:-1])


def _solved_energy(gram: NDArray, right: NDArray) -> NDArray:
    """Return `b G⁻¹ b` for each row b."""
    try:
        factor = scipy.linalg.cho_factor(gram)
    except np.linalg.LinAlgError:  # linearly dependent
        factor = scipy.linalg.cho_factor(gram + 1e-10 * np.eye(len(gram)))
    return np.einsum("kn,nk->k", right, scipy.linalg.cho_solve(factor, right.T, overwrite_b=False))


def _correlate(r: NDArray, x: NDArray, taps: int) -> NDArray:
    """Return `Σ_t r_i(t) x_k(t + a)` for a = 0 … taps − 1, `(I, S), (K, S)` → `(I, K, taps)`.

    Block by block, so that the transforms stay in cache; their products add up in frequency.
    """
    size = 1 << max(12, (4 * taps - 1).bit_length())
    step = size - taps + 1
    n_blocks = -(-r.shape[1] // step)
    total = np.zeros((size // 2 + 1, len(r), len(x)), complex)
    group = max(1, (1 << 21) // (size * (len(r) + len(x))))  # blocks at a time: 16 MB of them
    r = np.pad(r, ((0, 0), (0, n_blocks * step - r.shape[1])))
    x = np.pad(x, ((0, 0), (0, (n_blocks - 1) * step + size - x.shape[1])))
    for first in range(0, n_blocks, group):
        starts = np.arange(first, min(first + group, n_blocks)) * step
        there = np.stack([x[:, s : s + size] for s in starts])
        here = np.stack([r[:, s : s + step] for s in starts])
        spectra = scipy.fft.rfft(there, axis=-1).transpose(2, 0, 1)  # (bins, blocks, K)
        kernels = scipy.fft.rfft(here, size, axis=-1).conj().transpose(2, 1, 0)  # (bins, I, blocks)
        total += kernels @ spectra
    return scipy.fft.irfft(total.transpose(1, 2, 0), size)[..., :taps]


def improvement(of_estimate: ArrayLike, of_mixture: ArrayLike) -> NDArray[np.float64]:
    """Return a gain over the mixture as estimate, in dB; NaN where either figure is undefined or both are infinite.

    >>> improvement([10.0, np.inf], [2.0, np.inf])
    array([ 8., nan])
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(of_estimate, np.float64) - np.asarray(of_mixture, np.float64)


def calibration(happened: ArrayLike, scores: ArrayLike, *, n_bins: int = 10) -> dict[str, Any]:
    """Compare scores in [0, 1] with how often what they announce is so, `(n,)` boolean, `(n,)`.

    Returns `expected_calibration_error`, the mean over scores of |share that happened − mean score|
    of their bin (Naeini et al. 2015), and the `bins`, equally wide, those without a score left out:
    `score` and `share` (means), `count`.

    >>> found = calibration([True, True, False, False], [0.9, 0.9, 0.9, 0.1])
    >>> round(found["expected_calibration_error"], 3)
    0.2
    """
    y, x = np.asarray(happened, bool), np.asarray(scores, np.float64)
    place = np.clip((x * n_bins).astype(int), 0, n_bins - 1)
    bins = [
        {"score": float(x[here].mean()), "share": float(y[here].mean()), "count": int(here.sum())}
        for here in (place == b for b in range(n_bins))
        if here.any()
    ]
    gaps = sum(b["count"] * abs(b["share"] - b["score"]) for b in bins)
    return {"expected_calibration_error": float(gaps / len(x)) if len(x) else float("nan"), "bins": bins}


def _pair(reference: ArrayLike, estimate: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r, e = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    if e.shape[max(0, e.ndim - r.ndim) :] != r.shape or r.ndim == 0 or r.shape[-1] == 0:
        raise ValueError(f"reference {r.shape} and estimate {e.shape} must have one non-empty shape (…, S)")
    if not (np.isfinite(r).all() and np.isfinite(e).all()):
        raise ValueError("reference or estimate holds NaN or infinity; metrics need finite samples")
    return r, e


def _mark_silence(value: NDArray, r: NDArray, e: NDArray) -> NDArray[np.float64]:
    value = np.where((e**2).mean(-1) > _SILENCE, value, -np.inf)
    return np.where((r**2).mean(-1) > _SILENCE, value, np.nan)


def mean_average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the mean over objects of average precision, `(B, L)` each; objects always or never there don't count.

    >>> mean_average_precision([[1, 0], [0, 1], [0, 1]], [[0.9, 0.1], [0.2, 0.8], [0.1, 0.7]])
    1.0
    """
    from sklearn.metrics import average_precision_score

    there, scores = np.asarray(labels, bool), np.asarray(scores)
    usable = there.any(0) & ~there.all(0)
    if not usable.any():
        return float("nan")
    return float(average_precision_score(there[:, usable], scores[:, usable], average="macro"))
