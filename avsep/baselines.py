"""Floors, ceilings and blind methods: ordinary separators beside the model's."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import median_filter
from sklearn.cluster import KMeans
from torch import Tensor

from avsep.factors import Factors
from avsep.metrics import si_sdr
from avsep.separation import ratio_masks, separate
from avsep.stft import STFT


def mixture_as_estimate(mixture: Tensor, n_sources: int) -> Tensor:
    """The floor: hand back the mixture `(S,)` for every source, `(J, S)`."""
    return mixture.expand(n_sources, -1)


def ideal_ratio_mask(mixture: Tensor, references: Tensor, stft: STFT, power: float = 2.0) -> Tensor:
    """The ceiling of masking: ratio masks from the true sources, `(S,), (J, S)` → `(J, S)`."""
    n = len(mixture)
    mixture, references = (torch.nn.functional.pad(x, (0, max(0, stft.n_fft - n))) for x in (mixture, references))
    return separate(mixture, ratio_masks(stft(references).abs(), power), stft)[:, :n]


def oracle_assignment(
    mixture: Tensor, references: Tensor, factors: Factors, stft: STFT, power: float = 1.5
) -> tuple[Tensor, Tensor]:
    """The ceiling of assignment: give each basis to the source that has most of its energy.

    Args:
        mixture: `(S,)`.
        references: `(J, S)`, the true sources.
        factors: the mixture's factorisation.

    Returns:
        estimates `(J, S)`, and each basis's true owner `(M,)` as an index into the references.
    """
    owner = true_owners(references, factors, stft)
    parts = torch.stack([(factors.W * (owner == j)) @ factors.H for j in range(len(references))])
    return separate(mixture, ratio_masks(parts, power), stft), owner


def true_owners(references: Tensor, factors: Factors, stft: STFT) -> Tensor:
    """Say which of the true sources `(J, S)` has most of each basis's energy, `(M,)`."""
    V = stft(references).abs()  # (J, F, N)
    WH = (factors.W @ factors.H).clamp_min(1e-12)
    total = (V**2).sum(0).clamp_min(1e-12)
    # the energy that basis m takes from source j: Σ_fn (W_m H_m / WH) · V² · V_j² / Σ V²
    share = torch.stack([factors.W.T @ (v**2 / total * (WH**2) / WH) for v in V])  # (J, M, N)
    return (share * factors.H).sum(-1).argmax(0)


def blind_clustering(mixture: Tensor, references: Tensor, factors: Factors, stft: STFT) -> Tensor:
    """NMF bases grouped by k-means on their MFCCs, in the best order: `(S,)` → `(J, S)`.

    Blind to pictures and training; only the order of the outputs is told by the references.
    """
    n_sources = len(references)
    features = mfcc(factors.W, stft)
    used = features[factors.basis_energy > 0]
    if len(used) < n_sources:
        return mixture_as_estimate(mixture / n_sources, n_sources)
    clusters = KMeans(n_sources, n_init=10, random_state=0).fit(used.numpy()).predict(features.numpy())
    parts = torch.stack([(factors.W * torch.from_numpy(clusters == j)) @ factors.H for j in range(n_sources)])
    estimates = separate(mixture, ratio_masks(parts, 1.5), stft)
    return _best_order(references, estimates)


def mfcc(W: Tensor, stft: STFT, n_bands: int = 40, n_coefficients: int = 13) -> Tensor:
    """Mel-frequency cepstral coefficients 1… of bases, `(F, M)` → `(M, n_coefficients)`."""
    mel = 2595 * np.log10(1 + stft.frequencies_hz.numpy() / 700)
    centres = np.linspace(mel[0], mel[-1], n_bands + 2)
    width = centres[1] - centres[0]
    bands = np.maximum(0, 1 - np.abs(mel[None] - centres[1:-1, None]) / width)
    log_energy = np.log(bands @ (W.numpy() ** 2) + 1e-6)
    return torch.from_numpy(dct(log_energy, axis=0, norm="ortho")[1 : n_coefficients + 1].T.astype(np.float32))


def harmonic_percussive(mixture: Tensor, stft: STFT, size: int = 17) -> Tensor:
    """Separate what lasts from what strikes by median filters over time and over frequency (FitzGerald 2010).

    `(S,)` → `(2, S)`: harmonic, percussive. `size` is in frames and in bins.
    """
    V = stft(mixture).abs().numpy()
    parts = torch.from_numpy(np.stack([median_filter(V, (1, size)), median_filter(V, (size, 1))]))
    return separate(mixture, ratio_masks(parts, 2.0), stft)


def _best_order(references: Tensor, estimates: Tensor) -> Tensor:
    r, e = references.numpy(), estimates.numpy()
    figures = np.array([[float(np.nan_to_num(si_sdr(a, b), neginf=-99)) for b in e] for a in r])
    order = max(
        itertools.permutations(range(len(e))),
        key=lambda o: sum(figures[j, k] for j, k in enumerate(o)),
    )
    return estimates[list(order)]
