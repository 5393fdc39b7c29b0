"""The multi-instance multi-label network: which NMF basis sounds like which object."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_N_LOG_BANDS = 192
_LOG_BANDS_BINS = (4.0, 1600.0)  # centres of the lowest and highest; 40 Hz and 16 kHz at the default STFT
_LOG_HIDDEN = 384


class MIML(nn.Module):
    """Map a clip's bag of bases to a basis–object relation map and to clip scores.

    A shared layer per basis (F → hidden, batch norm, ReLU), then hidden → K·L; the maximum over
    the K sub-concepts gives the relation map, the maximum over the bases the clip's scores (Gao,
    Feris and Grauman 2018, section 4.2). With the default options this is the published
    network. Every basis is scaled to maximum one on entry, so its level means nothing.

    Args:
        n_bins: F.
        n_objects: L.
        n_subconcepts: K.
        hidden: width of the shared layer.
        published_head: end in batch norm and ReLU, as published; off, scores are logits of either sign.
        linear_bins: how many bins, from the lowest, the shared layer reads; None: all F.
        square_root: take the square root of each basis, which lifts its weak partials.
        log_bands: a second shared layer reads the basis in dB on a logarithmic frequency axis,
            where a change of pitch is a shift.
        dropout: share of the shared layers' outputs dropped in training.
    """

    def __init__(
        self,
        n_bins: int = 2401,
        n_objects: int = 23,
        n_subconcepts: int = 4,
        hidden: int = 1024,
        *,
        published_head: bool = True,
        linear_bins: int | None = None,
        square_root: bool = False,
        log_bands: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_bins, self.n_objects, self.n_subconcepts = n_bins, n_objects, n_subconcepts
        self.square_root = square_root
        self.linear_bins = min(linear_bins or n_bins, n_bins)
        self.shared = _layer(self.linear_bins, hidden)
        self.register_buffer("bands", _log_bands(n_bins) if log_bands else None, persistent=False)
        self.shared_log = _layer(_N_LOG_BANDS, _LOG_HIDDEN) if log_bands else None
        self.dropout = nn.Dropout(dropout)
        n_outputs = n_subconcepts * n_objects
        self.subconcepts = nn.Linear(hidden + (_LOG_HIDDEN if log_bands else 0), n_outputs)
        self.head = nn.Sequential(nn.BatchNorm1d(n_outputs), nn.ReLU()) if published_head else nn.Identity()

    def relation(self, bases: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score every basis for every object, `(B, M, F)` → `(B, L, M)`.

        `valid`, boolean `(B, M)`, marks the bases that are there: padding gets zeros and takes
        no part in batch statistics. Raises ValueError when the last axis isn't F.
        """
        if bases.ndim != 3 or bases.shape[-1] != self.n_bins:
            raise ValueError(f"bases are {tuple(bases.shape)}; the network takes (B, M, F = {self.n_bins})")
        n_clips, n_bases, _ = bases.shape
        flat = bases.reshape(-1, self.n_bins)
        rows = slice(None) if valid is None else valid.reshape(-1)
        scores = self._score(flat[rows])
        if valid is not None:
            padded = scores.new_zeros(len(flat), self.n_objects)
            padded[rows] = scores
            scores = padded
        return scores.reshape(n_clips, n_bases, self.n_objects).mT

    def _score(self, bases: Tensor) -> Tensor:
        """`(n, F)` → `(n, L)`."""
        x = bases.float()
        x = x / x.amax(-1, keepdim=True).clamp_min(1e-12)
        linear = x[:, : self.linear_bins]
        features = [self.shared(linear.sqrt() if self.square_root else linear)]
        if self.shared_log is not None and isinstance(self.bands, Tensor):
            level = x @ self.bands
            level = level / level.amax(-1, keepdim=True).clamp_min(1e-12)
            features.append(self.shared_log((level + 1e-4).log() / 4 + 1))  # 80 dB, as about −1.3 … 1
        x = self.head(self.subconcepts(self.dropout(torch.cat(features, -1))))
        return x.reshape(-1, self.n_objects, self.n_subconcepts).amax(-1)

    def forward(self, bases: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score every object in each clip by its best basis, `(B, M, F)` → `(B, L)`."""
        relation = self.relation(bases, valid)
        if valid is not None:
            relation = relation.masked_fill(~valid.unsqueeze(1), -torch.inf)
        return relation.amax(-1)


def _layer(n_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_inputs, width), nn.BatchNorm1d(width), nn.ReLU())


def _log_bands(n_bins: int) -> Tensor:
    """Triangular bands, evenly spaced in log frequency and at least one bin wide either way, `(F, bands)`."""
    lowest, highest = (math.log(b * (n_bins - 1) / 2400) for b in _LOG_BANDS_BINS)
    centres = torch.linspace(lowest, highest, _N_LOG_BANDS).exp()
    width = (centres * (centres[1] / centres[0] - 1)).clamp_min(1.0)
    bins = torch.arange(n_bins, dtype=torch.float32).unsqueeze(1)
    weights = (1 - (bins - centres).abs() / width).clamp_min(0)
    return weights / weights.sum(0).clamp_min(1e-6)


def multilabel_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the multi-label hinge loss of each clip, `(B, L)` scores and boolean labels → `(B,)`.

    For each true label y and each class i that is none, `max(0, 1 − (x[y] − x[i])) / L`, summed.
    Its mean over a batch equals `torch.nn.MultiLabelMarginLoss`, which takes index lists instead.
    """
    margins = (1 - scores.unsqueeze(2) + scores.unsqueeze(1)).clamp_min(0)  # (B, y, i)
    counted = labels.unsqueeze(2) & ~labels.unsqueeze(1)
    return (margins * counted).sum((1, 2)) / scores.shape[1]


def basis_posteriors(relation: Tensor) -> Tensor:
    """Turn a relation map into `p(object or noise | basis)`, `(B, L, M)` → `(B, L + 1, M)`.

    A softmax over the objects and a noise class of score zero, which comes last.
    """
    return torch.cat([relation, torch.zeros_like(relation[:, :1])], 1).softmax(1)


def partial_label_loss(
    relation: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    missed: float = 0.05,
    noise: float = 0.3,
    presence: float = 0.5,
) -> Tensor:
    """Return each clip's partial-label loss, `(B, L, M)` map and boolean `(B, L)` labels → `(B,)`.

    Every basis is explained by one of the visible objects (weight 1), by an object that the
    picture missed (`missed`) or by noise (`noise`): `−mean over bases of log Σ_c w_c p(c|m)`. To
    it comes `presence` times the cross-entropy between `1 − exp(−8 · mean over bases of p(c|m))`
    and `0.9 · visible + 0.02`, which keeps an object from explaining everything or nothing.
    The means weigh the bases by `weight`, `(B, M)`, for instance the root of their energy; 0 for padding.
    """
    p = basis_posteriors(relation)
    weights = torch.where(labels, 1.0, missed)
    weights = torch.cat([weights, torch.full_like(weights[:, :1], noise)], 1)
    counted = torch.ones_like(p[:, 0]) if weight is None else weight.to(p.dtype)  # (B, M)
    counted = counted / counted.sum(-1, keepdim=True).clamp_min(1e-12)
    explained = -((p * weights.unsqueeze(2)).sum(1).clamp_min(1e-8).log() * counted).sum(-1)
    present = 1 - (-8 * (p[:, :-1] * counted.unsqueeze(1)).sum(-1)).exp()
    target = 0.9 * labels + 0.02
    present = present.clamp(1e-6, 1 - 1e-6)
    entropy = -(target * present.log() + (1 - target) * (1 - present).log()).mean(1)
    return explained + presence * entropy


def energy_shares(posteriors: Tensor, basis_energy: Tensor) -> Tensor:
    """Score each object by its share of the clip, `Σ_m √e_m p(c|m) / Σ_m √e_m`: `(B, L)` in [0, 1].

    Args:
        posteriors: `(B, L + 1, M)` from `basis_posteriors`.
        basis_energy: `(B, M)`, each basis's share of the clip's energy.
    """
    weight = basis_energy.clamp_min(0).sqrt()
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return (posteriors[:, :-1] * weight.unsqueeze(1)).sum(-1)
