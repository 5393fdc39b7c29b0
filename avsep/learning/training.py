"""Training and validation in plain torch, over any iterable of batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from avsep.evidence import LabelQuality
from avsep.learning import parallel
from avsep.learning.bags import Bags, moved_to
from avsep.metrics import mean_average_precision
from avsep.miml import (
    MIML,
    AnyMIML,
    basis_posteriors,
    energy_shares,
    multilabel_margin,
    partial_label_loss,
    target_loss,
    warp_frequencies,
)


def _partial_label(relation: Tensor, labels: Tensor, weight: Tensor, quality: LabelQuality | None) -> Tensor:
    if quality is None:
        return partial_label_loss(relation, labels, weight)
    missed = quality.missed().to(relation.device)
    return partial_label_loss(relation, labels, weight, missed=missed, target=quality.presence(labels))


# relation (B, L, M), labels (B, L), root of the bases' energy (B, M), zero for padding, quality of the labels → (B,)
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, LabelQuality | None], Tensor]] = {
    "partial_label": _partial_label,
    "multilabel_margin": lambda relation, labels, weight, quality: multilabel_margin(
        relation.masked_fill(weight.unsqueeze(1) <= 0, -torch.inf).amax(-1), labels
    ),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How the network is trained."""

    loss: str = "partial_label"
    epochs: int = 20
    batch_size: int | None = None  # clips; None: by the number of clips, see batch_size_for
    learning_rate: float = 1e-3
    schedule: str = "step"  # step: × 0.94 every 5 epochs, as published; one_cycle: up, then down to zero
    warp: float = 0.0  # bases are stretched in frequency by up to this share, either way
    seed: int = 0


@dataclass
class History:
    """One row of figures an epoch."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def best(self) -> int:
        """Return the epoch of the highest validation figure, else of the last; −1 for none."""
        figures = [r.get("val_selection", math.nan) for r in self.rows]
        if not figures or all(math.isnan(f) for f in figures):
            return len(self.rows) - 1
        return int(np.nanargmax(figures))


def batch_size_for(n_clips: int, config: TrainingConfig) -> int:
    """Return the batch size: as configured, else 256 from 5,000 clips, 64 below, and an eighth of fewer than 512.

    Never below 8, so that batch statistics mean something, nor above `n_clips`.
    """
    wanted = config.batch_size or (256 if n_clips >= 5000 else max(8, min(64, n_clips // 8)))
    return max(1, min(wanted, n_clips))


def train_epoch(
    model: MIML,
    batches: Iterable[Bags],
    optimiser: torch.optim.Optimizer,
    config: TrainingConfig,
    epoch: int,
    quality: LabelQuality | None = None,
) -> dict[str, float]:
    """Train over the batches once; return the mean loss by clip. On a GPU matrices are multiplied in bfloat16.

    `quality` says how good the labels are; None takes them for good ones.

    Several workers of torch.distributed get their parts of the same batches (`Bags.share`) and the same random
    state, and end where one worker would, up to rounding, once `parallel.share_batch_norm(model)` was called.
    """
    model.train()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        n_bases, n_bins = batch.bases.shape[1:]
        n_clips = len(batch.share or batch)
        assert batch.share is not None or parallel.place()[1] == 1  # else it would be learned from several times
        count += n_clips
        factors = None
        if config.warp:
            factors = 1 + config.warp * (2 * torch.rand(n_clips * n_bases, generator=generator) - 1)
        if batch.share is not None:
            here = batch.share.rows >= 0
            model.noise_like = parallel.noise_of_part(here.repeat_interleave(batch.share.n_valid))
            factors = None if factors is None else factors.reshape(n_clips, n_bases)[here].flatten()
        bases = batch.bases.to(device).float()
        if factors is not None:
            bases = warp_frequencies(bases.reshape(-1, n_bins), factors.to(device)).reshape(bases.shape)
        weight = batch.basis_energy.to(device).sqrt()
        with torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
            relation = model.relation(bases, batch.valid.to(device), moved_to(device, batch.statistics))
        relation = relation.float()  # losses in bfloat16 end elsewhere
        losses = LOSSES[config.loss](relation, batch.labels.to(device), weight, quality)
        if batch.targets is not None:
            losses = losses + target_loss(relation, batch.targets.to(device), weight)
        optimiser.zero_grad(set_to_none=True)
        (losses.sum() / n_clips).backward()
        parallel.add_up_gradients(model)
        optimiser.step()
        total += losses.detach().sum()  # stays on the device: nothing waits for it
    return {"train_loss": float(parallel.add_up(total)) / max(count, 1)}


@torch.inference_mode()
def validate(
    model: MIML, batches: Iterable[Bags], config: TrainingConfig, mixtures: Bags | None = None
) -> dict[str, float]:
    """Return validation figures: loss, mAP of the clips' scores against their labels, agreement and assignment.

    Agreement is the share of energy (square root) in bases whose best object is a visible one. Assignment is measured
    on `mixtures` whose bases' owners are known: the share in bases whose best object, of those that are there, is
    their owner. `val_selection`, which picks the epoch, is the mean of what there is of mAP, agreement and assignment.
    All look at what the relation map is for; the loss alone is a poor guide.
    """
    model.eval()
    device = next(model.parameters()).device
    losses, scores, targets, agreements = [], [], [], []
    for batch in batches:
        valid, labels = batch.valid.to(device), batch.labels.to(device)
        relation = model.relation(batch.bases.to(device).float(), valid, moved_to(device, batch.statistics))
        weight = batch.basis_energy.to(device).sqrt()
        losses.append(LOSSES[config.loss](relation, labels, weight, None))
        if config.loss == "partial_label":
            scores.append(energy_shares(basis_posteriors(relation), batch.basis_energy.to(device)))
        else:
            scores.append(relation.amax(-1))
        best = labels.gather(1, relation.argmax(1))  # (B, M): is the basis's best object visible?
        agreements.append((best * weight).sum(-1) / weight.sum(-1).clamp_min(1e-12))
        targets.append(labels)
    if not losses:
        return {}
    mean_ap = mean_average_precision(torch.cat(targets).cpu(), torch.cat(scores).cpu())
    agreement = float(torch.cat(agreements).mean())
    row = {"val_loss": float(torch.cat(losses).mean()), "val_map": mean_ap, "val_agreement": agreement}
    if mixtures is not None:
        row["val_assignment"] = assignment(model, mixtures)
    return row | {"val_selection": float(np.nanmean([mean_ap, agreement, row.get("val_assignment", math.nan)]))}


@torch.inference_mode()
def assignment(model: MIML, mixtures: Bags) -> float:
    """Return the share of energy (square root) in bases that the relation map gives to their true owner."""
    assert mixtures.targets is not None
    device = next(model.parameters()).device
    statistics = moved_to(device, mixtures.statistics)
    relation = model.relation(mixtures.bases.to(device).float(), mixtures.valid.to(device), statistics).cpu()
    guess = relation.masked_fill(~mixtures.labels.unsqueeze(2), -torch.inf).argmax(1)
    owner = mixtures.targets.argmax(1)
    weight = mixtures.basis_energy.sqrt() * (owner < relation.shape[1])  # what is noise has no owner
    return float((weight * (guess == owner)).sum() / weight.sum())


@torch.inference_mode()
def object_shares(model: AnyMIML, bags: Bags, batch_size: int = 64) -> Tensor:
    """Return each object's share of each clip's sound, `(B, L)`."""
    model.eval()
    shares = []
    for i in range(0, len(bags), batch_size):
        part = bags.take(slice(i, i + batch_size))
        relation = model.relation(part.bases.float(), part.valid, part.statistics)
        shares.append(energy_shares(basis_posteriors(relation), part.basis_energy))
    return torch.cat(shares)


def optimiser_for(model: MIML, config: TrainingConfig) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adam and its schedule, stepped once an epoch."""
    optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
    schedules = {
        "step": lambda epoch: 0.94 ** (epoch // 5),
        "one_cycle": lambda epoch: _one_cycle(epoch, config.epochs),
    }
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, schedules[config.schedule])


def _one_cycle(epoch: int, epochs: int) -> float:
    """Rise over the first seventh of the run, then fall along a cosine; both ends above zero."""
    position, peak = (epoch + 0.5) / epochs, 0.15
    if position < peak:
        return max(position / peak, 0.1)
    return 0.5 * (1 + math.cos(math.pi * (position - peak) / (1 - peak)))
