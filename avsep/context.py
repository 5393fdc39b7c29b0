"""Bases of one clip seen together: those that start, swell and sound alike belong to one object."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

N_PAIR_FEATURES = 9
_N_BANDS, _N_CEPSTRAL = 96, 11
_SETTLED = 8  # mean-field updates after which the votes hardly change
TOP_SHARE = 2 / 3  # of the bins that are looked at, from the lowest: 16 kHz at the default STFT


class BasisContext(nn.Module):
    """Let a clip's bases vote on each other's object, given which objects are present, or for the rest.

    A conditional random field without classes of its own: `phi(m, n)`, a small network of how
    bases m and n relate, says how far m should follow n. Mean-field updates
    `q = a·z + phi (p − 1/(J + 1))` start from z, the relation map's log posteriors of the present
    objects and, for the rest, of everything else: noise and objects that aren't there. It learns from
    mixtures whose sources are known (`avsep.learning.practice`), so it works for any set of objects.

    Args:
        hidden: width of phi's two layers.
        n_iter: mean-field updates in training. Afterwards there are eight, and the votes have settled.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden: int = 32, n_iter: int = 3) -> None:
        super().__init__()
        n_inputs = N_PAIR_FEATURES + 4
        self.n_iter = n_iter
        self.phi = nn.Sequential(
            nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        for parameter in self.phi[-1].parameters():
            nn.init.zeros_(parameter)  # it starts as the identity
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.rest_scale = nn.Parameter(torch.tensor(1.0))
        self.rest_bias = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("mean", torch.zeros(n_inputs))
        self.register_buffer("deviation", torch.ones(n_inputs))

    def forward(self, posteriors: Tensor, pairs: Tensor, present: Tensor, settle: bool = True) -> Tensor:
        """Return log posteriors of the present objects and the rest, `(B, L + 1, M)`; absent ones get −inf.

        Args:
            posteriors: `(B, L + 1, M)` of the relation map, noise last (`miml.basis_posteriors`).
            pairs: `(B, M, M, features)` from `pair_features`.
            present: boolean `(B, L)`.
            settle: whether votes are counted until they hardly change, outside training. They grow surer by it,
                which is good for masks and bad for targets.
        """
        rest = _rest(posteriors, present).clamp_min(1e-4).log() * self.rest_scale + self.rest_bias
        z = torch.cat([posteriors[:, :-1].clamp_min(1e-9).log(), rest.unsqueeze(1)], 1)
        there = torch.cat([present, torch.ones_like(present[:, :1])], 1).unsqueeze(2)
        x = (self.inputs(posteriors, pairs, present) - self.mean) / self.deviation
        phi = self.phi(x).squeeze(-1) * (1 - torch.eye(pairs.shape[1], device=pairs.device))
        uniform = 1 / there.sum(1, keepdim=True)
        q = z
        for _ in range(_SETTLED if settle and not self.training else self.n_iter):
            p = q.masked_fill(~there, -torch.inf).softmax(1)
            q = self.scale * z + ((p - uniform) * there) @ phi.mT
        return q.masked_fill(~there, -torch.inf).log_softmax(1)

    @staticmethod
    def inputs(posteriors: Tensor, pairs: Tensor, present: Tensor) -> Tensor:
        """Append to the pairs' features both bases' uncertainty among the present objects, and their rest."""
        p = posteriors[:, :-1] * present.unsqueeze(2)
        p = p / p.sum(1, keepdim=True).clamp_min(1e-9)
        entropy, rest = -torch.special.xlogy(p, p).sum(1), _rest(posteriors, present)  # (B, M)
        shape = pairs.shape[:3]
        of_each = [x.unsqueeze(d).unsqueeze(3).expand(*shape, 1) for x in (entropy, rest) for d in (2, 1)]
        return torch.cat([pairs, *of_each], -1)


def _rest(posteriors: Tensor, present: Tensor) -> Tensor:
    """Return what neither of the present objects explains of each basis, `(B, M)`."""
    return (posteriors[:, :-1] * ~present.unsqueeze(2)).sum(1) + posteriors[:, -1]


def pair_features(bases: Tensor, activations: Tensor, basis_energy: Tensor) -> Tensor:
    """Describe how each two bases of a clip relate, `(B, M, M, 9)`.

    First correlations over time: of their levels, onsets, smoothed onsets and ends, and of one's ends with the
    other's onsets. Then cosines: of spectra, of cepstra and of levels. Last the energy of the second.

    Args:
        bases: `(B, M, F)`, maximum one. activations: `(B, M, N)`. basis_energy: `(B, M)`.
    """
    level = (activations / activations.amax(2, keepdim=True).clamp_min(1e-9)).sqrt()
    change = level.diff(dim=2) if level.shape[2] > 2 else torch.zeros_like(level)
    onset, end = _centred(change.clamp_min(0)), _centred((-change).clamp_min(0))
    smooth = _unit(onset[..., 1:] + onset[..., :-1])
    centred, crossed = _centred(level), end @ onset.mT
    top = int(bases.shape[2] * TOP_SHARE) + 1
    spectrum = bases[..., :top].float()
    bands, dct = (t.to(bases.device) for t in _cepstral_maps(top))
    log_bands = spectrum @ bands
    log_bands = (log_bands / log_bands.amax(2, keepdim=True).clamp_min(1e-9) + 1e-3).log()
    vectors = (centred, onset, smooth, end)
    spectra = (_unit(spectrum.sqrt()), _unit(log_bands @ dct), _unit(level))
    features = [v @ v.mT for v in vectors] + [(crossed + crossed.mT) / 2] + [v @ v.mT for v in spectra]
    energy = basis_energy.clamp_min(1e-5).log() / 5
    features.append(energy.unsqueeze(1).expand_as(features[0]))
    return torch.stack(features, -1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def _centred(x: Tensor) -> Tensor:
    return _unit(x - x.mean(-1, keepdim=True))


def _cepstral_maps(n_bins: int) -> tuple[Tensor, Tensor]:
    """Return maps to log-spaced bands, `(F, bands)`, and from their logarithms to cepstra, `(bands, 11)`."""
    centres = torch.linspace(np.log(4.0 * n_bins / 1601), np.log(n_bins - 1.0), _N_BANDS).exp()
    width = (centres * (centres[1] / centres[0] - 1)).clamp_min(1.0)
    weights = (1 - (torch.arange(n_bins).unsqueeze(1) - centres).abs() / width).clamp_min(0)
    angles = np.outer(np.arange(_N_BANDS) + 0.5, np.arange(1, _N_CEPSTRAL + 1)) * np.pi / _N_BANDS
    dct = np.sqrt(2 / _N_BANDS) * np.cos(angles)  # DCT-II, orthonormal, without its constant row
    return weights / weights.sum(0).clamp_min(1e-6), torch.from_numpy(dct.astype(np.float32))
