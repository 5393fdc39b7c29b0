"""The multi-instance multi-label network: which NMF basis sounds like which object."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_N_LOG_BANDS = 192
_LOG_BANDS_BINS = (4.0, 1600.0)  # centres of the lowest and highest; 40 Hz and 16 kHz at the default STFT
_LOG_HIDDEN = 384
_PITCH = 1.06  # from one of `relate_at_pitches` to the next
N_STATISTICS = 15
_STATISTICS_HIDDEN, _STATISTICS_NOISE = 64, 0.1


class MIML(nn.Module):
    """Map a clip's bag of bases to a basis–object relation map and to clip scores.

    A shared layer per basis (F → hidden, batch norm, ReLU), then hidden → K·L. The maximum over the K sub-concepts
    gives the relation map, the maximum over the bases the clip's scores. The source is Gao, Feris and Grauman 2018,
    section 4.2. With the default options this is the published
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
        statistics: a third reads how the basis moves over time (`activation_statistics`), so that
            struck sounds differ from blown ones; training adds a little noise to it.
        dropout: share of the shared layers' outputs dropped in training.

    >>> bag = torch.rand(2, 25, 2401)  # two clips of 25 bases
    >>> relation = MIML(2401, 23, hidden=8).eval().relation(bag)
    >>> relation.shape, relation.amax(2).shape  # the relation map, the clips' scores
    (torch.Size([2, 23, 25]), torch.Size([2, 23]))
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
        statistics: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_bins, self.n_objects, self.n_subconcepts = n_bins, n_objects, n_subconcepts
        self.square_root = square_root
        self.linear_bins = min(linear_bins or n_bins, n_bins)
        self.shared = _layer(self.linear_bins, hidden)
        self.register_buffer("bands", _log_bands(n_bins) if log_bands else None, persistent=False)
        self.shared_log = _layer(_N_LOG_BANDS, _LOG_HIDDEN) if log_bands else None
        self.statistics_norm = nn.BatchNorm1d(N_STATISTICS) if statistics else None
        self.shared_statistics = _layer(N_STATISTICS, _STATISTICS_HIDDEN) if statistics else None
        self.noise_like: Callable[[Tensor], Tensor] = torch.randn_like  # of several workers each draws its part
        self.dropout = nn.Dropout(dropout)
        n_outputs = n_subconcepts * n_objects
        width = hidden + (_LOG_HIDDEN if log_bands else 0) + (_STATISTICS_HIDDEN if statistics else 0)
        self.subconcepts = nn.Linear(width, n_outputs)
        self.head = nn.Sequential(nn.BatchNorm1d(n_outputs), nn.ReLU()) if published_head else nn.Identity()

    def relation(self, bases: Tensor, valid: Tensor | None = None, statistics: Tensor | None = None) -> Tensor:
        """Score every basis for every object, `(B, M, F)` → `(B, L, M)`.

        `valid`, boolean `(B, M)`, marks the bases that are there: padding gets zeros and takes
        no part in batch statistics. `statistics`, `(B, M, 15)` from `activation_statistics`, are
        read by a network that was built to. Raises ValueError when the last axis isn't F, there is no
        basis, `valid` is of another shape or type, or statistics are needed and missing.
        """
        if self.shared_statistics is not None and statistics is None:
            raise ValueError("this network also reads the activations' statistics: pass them, or call `relate`")
        if bases.ndim != 3 or bases.shape[-1] != self.n_bins or bases.shape[1] == 0:
            raise ValueError(f"bases are {tuple(bases.shape)}; the network takes (B, M ≥ 1, F = {self.n_bins})")
        if valid is not None and (valid.shape != bases.shape[:2] or valid.dtype != torch.bool):
            raise ValueError(
                f"valid is {tuple(valid.shape)}, {valid.dtype}; it must be boolean, {tuple(bases.shape[:2])}"
            )
        n_clips, n_bases, _ = bases.shape
        flat = bases.reshape(-1, self.n_bins)
        rows = slice(None) if valid is None else valid.reshape(-1)
        moves = None if statistics is None else statistics.reshape(-1, N_STATISTICS)[rows]
        scores = self._score(flat[rows], moves)
        if valid is not None:
            padded = scores.new_zeros(len(flat), self.n_objects)
            padded[rows] = scores
            scores = padded
        return scores.reshape(n_clips, n_bases, self.n_objects).mT

    def relate(self, W: Tensor, H: Tensor) -> Tensor:
        """Relate one clip's factors, `(F, M)` and `(M, N)` → `(L, M)`."""
        statistics = activation_statistics(H.unsqueeze(0)) if self.shared_statistics is not None else None
        return self.relation(W.T.unsqueeze(0), statistics=statistics)[0]

    def _score(self, bases: Tensor, statistics: Tensor | None = None) -> Tensor:
        """`(n, F)`, `(n, 15)` → `(n, L)`."""
        x = bases.float()
        x = x / x.amax(-1, keepdim=True).clamp_min(1e-12)
        linear = x[:, : self.linear_bins]
        features = [self.shared(linear.sqrt() if self.square_root else linear)]
        if self.shared_log is not None and isinstance(self.bands, Tensor):
            level = x @ self.bands
            level = level / level.amax(-1, keepdim=True).clamp_min(1e-12)
            features.append(self.shared_log((level + 1e-4).log() / 4 + 1))  # 80 dB, as about −1.3 … 1
        if self.shared_statistics is not None and self.statistics_norm is not None and statistics is not None:
            moves = self.statistics_norm(statistics)
            if self.training:
                moves = moves + _STATISTICS_NOISE * self.noise_like(moves)
            features.append(self.shared_statistics(moves))
        x = self.head(self.subconcepts(self.dropout(torch.cat(features, -1))))
        return x.reshape(-1, self.n_objects, self.n_subconcepts).amax(-1)

    def forward(self, bases: Tensor, valid: Tensor | None = None, statistics: Tensor | None = None) -> Tensor:
        """Score every object in each clip by its best basis, `(B, M, F)` → `(B, L)`."""
        relation = self.relation(bases, valid, statistics)
        if valid is not None:
            relation = relation.masked_fill(~valid.unsqueeze(1), -torch.inf)
        return relation.amax(-1)


class MeanMIML(nn.Module):
    """Several networks as one, whose relation map is the mean of theirs; it can't be trained.

    The networks are of the same objects and bases. As a module its weights are `members.0. …`, `members.1. …`.
    """

    def __init__(self, members: Sequence[MIML]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.n_bins, self.n_objects = members[0].n_bins, members[0].n_objects

    def relation(self, bases: Tensor, valid: Tensor | None = None, statistics: Tensor | None = None) -> Tensor:
        """Score every basis for every object, `(B, M, F)` → `(B, L, M)`, as `MIML.relation` does."""
        return torch.stack([m.relation(bases, valid, statistics) for m in self._networks()]).mean(0)

    def relate(self, W: Tensor, H: Tensor) -> Tensor:
        """Relate one clip's factors, `(F, M)` and `(M, N)` → `(L, M)`."""
        return torch.stack([m.relate(W, H) for m in self._networks()]).mean(0)

    def _networks(self) -> list[MIML]:
        return [m for m in self.members if isinstance(m, MIML)]


AnyMIML = MIML | MeanMIML  # whatever relates bases to objects


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


def activation_statistics(activations: Tensor) -> Tensor:
    """Describe how each basis moves over time, `(B, M, N)` → `(B, M, 15)`; its level means nothing.

    Eight are of the root of the activations, maximum one. They are the mean and deviation, how long it is above 10 and
    50 %, the largest rise and fall and the roots of their sums of squares. Four are its autocorrelations: at 1, 2, 4
    and 8 frames. Three are of the logarithm, while it sounds: mean fall and rise, and how often it is steady.
    """
    h = activations / activations.amax(2, keepdim=True).clamp_min(1e-12)
    level = h.sqrt()
    change = _diff(level)
    rise, fall = change.clamp_min(0), (-change).clamp_min(0)
    centred = level - level.mean(2, keepdim=True)
    power = centred.square().sum(2).clamp_min(1e-6)
    slope, sounding = _diff((h + 1e-3).log()), (h[..., : change.shape[2]] > 0.05).float()
    duration = sounding.sum(2).clamp_min(1)
    return torch.stack(
        [
            level.mean(2),
            centred.square().mean(2).sqrt(),
            (h > 0.1).float().mean(2),
            (h > 0.5).float().mean(2),
            rise.amax(2),
            fall.amax(2),
            rise.square().sum(2).sqrt(),
            fall.square().sum(2).sqrt(),
            *((centred[..., lag:] * centred[..., :-lag]).sum(2) / power for lag in (1, 2, 4, 8)),
            3 * (slope.clamp(max=0) * sounding).sum(2) / duration,
            3 * (slope.clamp(min=0) * sounding).sum(2) / duration,
            ((slope.abs() < 0.1) * sounding).sum(2) / duration,
        ],
        -1,
    )


def _diff(x: Tensor) -> Tensor:
    """Return differences in time; of a single frame, none: zero."""
    return x.diff(dim=2) if x.shape[2] > 1 else torch.zeros_like(x)


def multilabel_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the multi-label hinge loss of each clip, `(B, L)` scores and boolean labels → `(B,)`.

    For each true label y and each class i that is none, `max(0, 1 − (x[y] − x[i])) / L`, summed.
    Its mean over a batch equals `torch.nn.MultiLabelMarginLoss`, which takes index lists instead.

    >>> multilabel_margin(torch.tensor([[2.0, 0.5, 0.0]]), torch.tensor([[True, False, False]]))
    tensor([0.])
    >>> multilabel_margin(torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([[True, False, False]]))  # (1.5 + 1) / 3
    tensor([0.8333])
    """
    margins = (1 - scores.unsqueeze(2) + scores.unsqueeze(1)).clamp_min(0)  # (B, y, i)
    counted = labels.unsqueeze(2) & ~labels.unsqueeze(1)
    return (margins * counted).sum((1, 2)) / scores.shape[1]


def basis_posteriors(relation: Tensor) -> Tensor:
    """Turn a relation map into `p(object or noise | basis)`, `(B, L, M)` → `(B, L + 1, M)`.

    A softmax over the objects and a noise class of score zero, which comes last.

    >>> basis_posteriors(torch.zeros(1, 3, 1)).flatten()  # three objects alike, and noise
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return torch.cat([relation, torch.zeros_like(relation[:, :1])], 1).softmax(1)


def warp_frequencies(bases: Tensor, factors: Tensor) -> Tensor:
    """Stretch bases `(n, F)` along frequency, each by its factor `(n,)`, or all by one `(1,)`.

    Bin f gets what was at f / factor.
    """
    n_bins = bases.shape[-1]
    position = torch.arange(n_bins, device=bases.device) / factors.unsqueeze(1)
    low = position.floor().clamp(0, n_bins - 1).long()
    high = (low + 1).clamp(max=n_bins - 1)
    blend = (position - low).clamp(0, 1)
    if len(factors) == 1:
        below, above = bases[:, low[0]], bases[:, high[0]]
    else:
        below, above = bases.gather(1, low), bases.gather(1, high)
    return (below * (1 - blend) + above * blend) * (position <= n_bins - 1)


def relate_at_pitches(network: AnyMIML, W: Tensor, H: Tensor, n_pitches: int) -> Tensor:
    """Relate one clip's factors as `network.relate`, in the mean over bases stretched along frequency: `(L, M)`.

    Another player's bases lie between those of the training. Of the stretched ones some are more like them.

    Args:
        network: takes bases `(F, M)` and activations `(M, N)`.
        W, H: `(F, M)`, `(M, N)`.
        n_pitches: how many, 6 % apart; an even number counts as the next odd one, as the bases lie in the middle.
    """
    reach = n_pitches // 2
    pitches = [_PITCH**k for k in range(-reach, reach + 1)]
    bases = torch.stack([warp_frequencies(W.T, torch.tensor([p])) for p in pitches])
    return network.relation(bases, statistics=activation_statistics(H[None]).expand(len(bases), -1, -1)).mean(0)


def partial_label_loss(
    relation: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    missed: float | Tensor = 0.05,
    noise: float = 0.3,
    presence: float = 0.5,
    target: Tensor | None = None,
) -> Tensor:
    """Return each clip's partial-label loss, `(B, L, M)` map and boolean `(B, L)` labels → `(B,)`.

    Every basis is explained by one of the visible objects (weight 1), by an object that the
    picture missed (`missed`, one for all or `(L,)`) or by noise (`noise`): `−mean over bases of log
    Σ_c w_c p(c|m)`. To it comes `presence` times the cross-entropy between `1 − exp(−8 · mean over
    bases of p(c|m))` and `target`, how likely each object sounds, `(B, L)`: where that isn't given
    `0.9 · visible + 0.02`. It keeps an object from explaining everything or nothing.
    The means weigh the bases by `weight`, `(B, M)`, for instance the root of their energy; 0 for padding.
    """
    p = basis_posteriors(relation)
    weights = torch.where(labels, torch.ones((), device=labels.device), missed)
    weights = torch.cat([weights, torch.full_like(weights[:, :1], noise)], 1)
    counted = torch.ones_like(p[:, 0]) if weight is None else weight.to(p.dtype)  # (B, M)
    counted = counted / counted.sum(-1, keepdim=True).clamp_min(1e-12)
    explained = -((p * weights.unsqueeze(2)).sum(1).clamp_min(1e-8).log() * counted).sum(-1)
    present = 1 - (-8 * (p[:, :-1] * counted.unsqueeze(1)).sum(-1)).exp()
    target = 0.9 * labels + 0.02 if target is None else target
    present = present.clamp(1e-6, 1 - 1e-6)
    entropy = -(target * present.log() + (1 - target) * (1 - present).log()).mean(1)
    return explained + presence * entropy


def target_loss(relation: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return each clip's cross-entropy between `p(object or noise | basis)` and known shares of its bases → `(B,)`.

    Args:
        relation: `(B, L, M)`.
        targets: `(B, L + 1, M)`, noise last; a basis's column sums to one.
        weight: `(B, M)`, 0 for padding.
    """
    log_p = torch.cat([relation, torch.zeros_like(relation[:, :1])], 1).log_softmax(1)
    return -((targets * log_p).sum(1) * weight).sum(-1) / weight.sum(-1).clamp_min(1e-12)


def energy_shares(posteriors: Tensor, basis_energy: Tensor) -> Tensor:
    """Score each object by its share of the clip, `Σ_m √e_m p(c|m) / Σ_m √e_m`: `(B, L)` in [0, 1].

    Args:
        posteriors: `(B, L + 1, M)` from `basis_posteriors`.
        basis_energy: `(B, M)`, each basis's share of the clip's energy.

    >>> posteriors = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # a basis each for two objects
    >>> energy_shares(posteriors, torch.tensor([[0.9, 0.1]]))  # as their amplitudes, 3 to 1
    tensor([[0.7500, 0.2500]])
    """
    weight = basis_energy.clamp_min(0).sqrt()
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return (posteriors[:, :-1] * weight.unsqueeze(1)).sum(-1)
