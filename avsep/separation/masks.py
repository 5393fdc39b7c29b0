"""Masks, and whose bases they are made of: pure functions of a spectrogram's bins and a clip's bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from avsep.miml import basis_posteriors
from avsep.model import SeparationConfig
from avsep.stft import STFT

_LIFTS = 50  # at most, of shares that are too small; a few do
_LEVELLINGS, _STEP, _LONGEST, _NEAR = 7, 0.7, 1.5, 0.01  # rounds; what part of the way each goes, and at most, as logs


def ratio_masks(magnitudes: Tensor, power: float = 1.0) -> Tensor:
    """Divide each bin among its sources in proportion to `V_j ** power`; the masks sum to one.

    Where every source is zero the last one, the rest, takes the whole bin.

    Args:
        magnitudes: `(J, F, N)`, non-negative; the last source is the rest.

    Returns:
        masks `(J, F, N)` in [0, 1].

    >>> ratio_masks(torch.tensor([[[1.0]], [[3.0]]]), power=2.0).flatten()
    tensor([0.1000, 0.9000])
    """
    peak = magnitudes.amax(0, keepdim=True)
    masks = (magnitudes / torch.where(peak > 0, peak, 1.0)).pow_(power)  # no power under- or overflows
    total = masks.sum(0, keepdim=True)
    masks /= torch.where(total > 0, total, 1.0)
    masks[-1] = torch.where(total[0] > 0, masks[-1], 1.0)
    return masks


def separate(waveform: Tensor, masks: Tensor, stft: STFT) -> Tensor:
    """Apply masks to a waveform's complex spectrogram, keeping its phase, `(S,)` → `(J, S)`.

    The estimates add up to the mixture when the masks sum to one. Raises ValueError for masks that aren't
    `(J, F, N)` of that spectrogram.

    >>> stft, x = STFT(8000, 256, 64), torch.randn(1000)
    >>> estimates = separate(x, torch.full((2, *stft(x).shape), 0.5), stft)
    >>> estimates.shape, bool(torch.allclose(estimates.sum(0), x, atol=1e-5))
    (torch.Size([2, 1000]), True)
    """
    X = stft(waveform)
    if masks.shape[1:] != X.shape:
        raise ValueError(
            f"masks are {tuple(masks.shape)}; they must be (J, {X.shape[0]}, {X.shape[1]}), as the spectrogram"
        )
    estimates = X.real.new_empty(len(masks), waveform.shape[-1])
    for mask, estimate in zip(masks, estimates, strict=True):  # one by one: a spectrogram is ten times its sound
        estimate[:] = stft.inverse(mask * X, len(estimate))
    return estimates


def basis_shares(relation: Tensor, objects: Sequence[int], config: SeparationConfig) -> Tensor:
    """Say how much of each basis goes to each object and, last, to the rest: `(L, M)` → `(J + 1, M)`.

    Soft assignment: each basis is shared among the objects that are there in proportion to their posteriors, whatever
    absent objects claim of it. Only a basis of which they explain less than `rest_below` goes to the rest. A column
    sums to one. By threshold, as published: an object takes every basis of at least `threshold` times its largest score
    (two objects may take one basis), and there is no rest.
    """
    index = list(objects)
    if config.assignment == "threshold":
        own = relation[index]
        shares = (own >= config.threshold * own.amax(1, keepdim=True)).to(relation.dtype)
        return torch.cat([shares, torch.zeros_like(relation[:1])])
    posteriors = basis_posteriors(relation.unsqueeze(0))[0]
    explained = posteriors[index].sum(0, keepdim=True)  # (1, M)
    rest = (explained < config.rest_below).to(relation.dtype) if index else torch.ones_like(explained)
    own = relation[index].softmax(0) ** config.posterior_power  # = posteriors among the given objects
    own = (1 - rest) * own / own.sum(0, keepdim=True).clamp_min(1e-12)
    return torch.cat([own, rest])


def rest_at_most(shares: Tensor, basis_energy: Tensor, most: float) -> Tensor:
    """Lower the last row, the rest, until it has at most `most` of the bases' energy: `(J + 1, M)`.

    The objects divide what it loses of a basis as they divide the basis; columns keep their sums.

    >>> shares = torch.tensor([[0.3], [0.1], [0.6]])  # of one basis: two objects, the rest
    >>> rest_at_most(shares, torch.tensor([1.0]), 1 / 3).flatten()
    tensor([0.5000, 0.1667, 0.3333])
    """
    has = float(shares[-1] @ basis_energy / basis_energy.sum().clamp_min(1e-30))
    if has <= most:
        return shares
    rest, own = shares[-1:] * (most / has), shares[:-1].clamp_min(1e-12)
    return torch.cat([own / own.sum(0) * (shares.sum(0) - rest), rest])


def levelled(
    votes: Callable[[Tensor], Tensor], basis_energy: Tensor, n_objects: int, pull: float
) -> tuple[Tensor, Tensor]:
    """Weigh objects' claims until their parts of the sound are more alike.

    An object that a model hardly knows claims too little of everything. So its claims are raised before the bases
    vote, towards parts of the objects' energy in proportion to `p ** (1 - pull)`, `p` being what it is at first.

    Args:
        votes: gives the shares when log weights `(J,)` are added to the objects' claims.
        basis_energy: `(M,)`.
        n_objects: J.
        pull: 0 leaves the parts as they are; 1 makes them equal.

    Returns:
        the shares `(J + 1, M)`, and the log weights `(J,)` that brought them about.

    >>> def votes(log_weights):  # on one basis, of which the rest gets nothing
    ...     own = (torch.tensor([0.9, 0.1]).log() + log_weights).softmax(0)
    ...     return torch.cat([own, torch.zeros(1)]).unsqueeze(1)
    >>> [round(x, 2) for x in levelled(votes, torch.ones(1), 2, pull=0.5)[0].flatten().tolist()]
    [0.75, 0.25, 0.0]
    """
    weights, step = torch.zeros(n_objects), _STEP
    shares = votes(weights)
    best = shares, weights
    parts = _parts(shares, basis_energy)
    wanted = parts.clamp_min(1e-3) ** (1 - pull)
    wanted = wanted / wanted.sum()
    nearest = math.inf
    for _ in range(_LEVELLINGS):
        short = (wanted / parts.clamp_min(1e-4)).log()
        if (off := float(short.abs().max())) < nearest:
            nearest, best = off, (shares, weights)
        else:
            step /= 2  # votes may tip over, and back
        if nearest < _NEAR:
            break
        change = (step * short).clamp(-_LONGEST, _LONGEST)
        weights = weights + change - change.mean()
        shares = votes(weights)
        parts = _parts(shares, basis_energy)
    return best


def _parts(shares: Tensor, basis_energy: Tensor) -> Tensor:
    """Return each object's part of what all of them have, `(J + 1, M)` → `(J,)`."""
    had = shares[:-1] @ basis_energy
    return had / had.sum().clamp_min(1e-30)


def at_least(shares: Tensor, basis_energy: Tensor, least: Tensor) -> Tensor:
    """Raise objects' shares until each has `least`, `(J,)`, of the bases' energy, at the others' expense: `(J + 1, M)`.

    The last row, the rest, gets what it gets; columns keep their sums. An object takes first where its shares are
    the largest beside what they are elsewhere.

    >>> shares = torch.tensor([[0.8, 0.9], [0.1, 0.0], [0.1, 0.1]])  # of two bases: two objects, the rest
    >>> raised = at_least(shares, torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.2]))
    >>> round(float(raised[1].mean()), 2), [round(x, 2) for x in raised.sum(0).tolist()]
    (0.2, [1.0, 1.0])
    """
    sums, weight = shares.sum(0), basis_energy / basis_energy.sum().clamp_min(1e-30)
    for _ in range(_LIFTS):
        had = shares[:-1] @ weight
        if (had >= 0.999 * least).all():
            break
        lift = torch.where(had < least, least / had.clamp_min(1e-9), 1.0)
        shares = torch.cat([shares[:-1] * lift.unsqueeze(1), shares[-1:]])
        shares = shares * (sums / shares.sum(0).clamp_min(1e-30))
    return shares
