"""Adaptation: a trained network learns some clips of one's own, and keeps what it knew.

No clip needs its sources. The labels and the start's own hearing teach. Invented bases keep the rest: to these the
network goes on answering as the start does. Two halves of the clips, crossed, say whether it brought anything.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from avsep import evidence
from avsep.learning import practice, steps, training
from avsep.learning.bags import Bags, bags_from_file, load_bags, shuffled_batches
from avsep.miml import (
    MIML,
    AnyMIML,
    MeanMIML,
    basis_posteriors,
    partial_label_loss,
    target_loss,
    warp_frequencies,
)
from avsep.model import Labelling, Model, ModelConfig

LEAST_CLIPS = 10  # with labels; fewer say nothing about whether an adaptation helps
_LOWEST, _HIGHEST, _TOP = 2.5, 200.0, 2400  # bins of invented fundamentals, at this many bins
_ENVELOPE_POINTS = 12
_COMPARED_CLIPS = 100  # whose bases join those that new sounds are compared with


@dataclass(frozen=True)
class AdaptingConfig:
    """How a network is adapted."""

    epochs: int = 8
    batch_size: int = 8  # clips
    learning_rate: float = 1e-3  # the highest, of one cycle
    warp: float = 0.06  # bases are stretched in frequency by up to this share, either way
    keep: float = 4.0  # weight of answering as the start does to invented bases
    n_invented: int = 2000
    invented_per_step: int = 200
    seed: int = 0


# ------------------------------------------------------------------------------------ the clips


def load_clips(
    start: Model, labelling: Labelling, files: Sequence[str], without: Set[str] = frozenset()
) -> tuple[Bags, evidence.LabelQuality] | None:
    """Read the clips of split train, with the start's own view of their bases as targets, and judge their labels.

    What the start hears, its context and the labels together give the targets. The clips of the ids `without` are
    left out. None where no clip has labels.
    """
    clips = load_bags(files, labelling, "train", without)
    if clips is None:
        return None
    quality = evidence.judge_labels(start.config.evidence, training.object_shares(start.network, clips), clips.labels)
    if start.context is None:
        return clips, quality
    teacher = practice.Teacher(start.network, start.context, quality)
    parts = [b for f in files if (b := bags_from_file(f, labelling, "train", teacher, without)) is not None]
    whole = Bags.join(parts)
    return whole.take(torch.tensor(sorted(range(len(whole)), key=whole.segment_ids.__getitem__))), quality


def halves(clips: Bags, seed: int = 0) -> tuple[Bags, Bags]:
    """Part the clips at random in two, of which each judges what was learned from the other."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    middle = len(clips) // 2
    return clips.take(order[:middle].sort().values), clips.take(order[middle:].sort().values)


def invent_bases(clips: Bags, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Make up bases, `(n, F)` with maximum one, and how they move, `(n, 15)`: combs of partials, noise, and clips' own.

    Each has an envelope of its own, and a movement of some basis of the clips; the clips' own are stretched by up to
    a factor of 2.5. They stand for all the sounds that a network may meet.
    """
    g = torch.Generator().manual_seed(seed)
    n_bins = clips.bases.shape[2]
    bins, scale = torch.arange(n_bins, dtype=torch.float32), (n_bins - 1) / _TOP
    fundamental = _LOWEST * scale * torch.exp(torch.rand(n, 1, generator=g) * math.log(_HIGHEST / _LOWEST))
    number = (bins / fundamental).round()
    width = scale * (0.6 + 1.2 * torch.rand(n, 1, generator=g))
    combs = torch.exp(-(((bins - number * fundamental) / width) ** 2)) * (number > 0)
    hollow = (torch.rand(n, 1, generator=g) < 0.2) & (number % 2 == 0)  # even partials are weak
    combs = torch.where(hollow, 0.1 * combs, combs)
    noise = torch.rand(n, n_bins, generator=g) ** 2
    kind = torch.rand(n, 1, generator=g)
    floor = 10 ** (-1 - 3 * torch.rand(n, 1, generator=g)) * torch.rand(n, n_bins, generator=g)
    made = torch.where(kind < 0.6, combs, noise) + floor
    own = clips.bases.reshape(-1, n_bins)[clips.valid.flatten()]
    some = torch.randint(len(own), (n,), generator=g)
    stretch = torch.exp((2 * torch.rand(n, generator=g) - 1) * 0.9)
    made = torch.where(kind > 0.8, warp_frequencies(own[some].float(), stretch), made)
    octaves = torch.log2((bins / scale + 2) / 2)
    level = (6 * torch.randn(n, _ENVELOPE_POINTS, generator=g)).cumsum(1)
    place = (octaves / octaves[-1] * (_ENVELOPE_POINTS - 1)).clamp(max=_ENVELOPE_POINTS - 1 - 1e-3)
    low, blend = place.long(), place - place.floor()
    envelope = (level[:, low] * (1 - blend) + level[:, low + 1] * blend) - octaves * 9 * torch.rand(n, 1, generator=g)
    made = made * 10 ** ((envelope - envelope.amax(1, keepdim=True)) / torch.where(kind > 0.8, 40.0, 20.0))
    made = made / made.amax(1, keepdim=True).clamp_min(1e-12)
    if clips.statistics is None:
        return made, None
    moves = clips.statistics.reshape(-1, clips.statistics.shape[2])[clips.valid.flatten()]
    return made, moves[torch.randint(len(moves), (n,), generator=g)]


# ------------------------------------------------------------------------------------- learning


def members(network: AnyMIML) -> list[MIML]:
    """Return the networks that a network is the mean of, or itself."""
    parts = network.members if isinstance(network, MeanMIML) else [network]
    return [m for m in parts if isinstance(m, MIML)]


def learn(
    start: Model, clips: Bags, quality: evidence.LabelQuality, config: AdaptingConfig
) -> tuple[AnyMIML, list[dict[str, Any]]]:
    """Go on from a model's networks with some clips; return the adapted network and a row of figures an epoch.

    Batch statistics stay those of the start. Everything follows from the clips and the seed.
    """
    torch.manual_seed(config.seed)
    network = copy.deepcopy(start.network).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    invented, moves = invent_bases(clips, config.n_invented, config.seed)
    answers = [_answers(m, invented, moves) for m in members(start.network)]
    optimiser = torch.optim.Adam(network.parameters(), config.learning_rate)
    n_steps = config.epochs * max(1, -(-len(clips) // config.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=n_steps + 1)
    rows = []
    for epoch in range(config.epochs):
        started, total = time.monotonic(), 0.0
        for batch in shuffled_batches(clips, config.batch_size, config.seed * 1_000_003 + epoch):
            some = torch.randint(len(invented), (config.invented_per_step,))
            loss = torch.zeros(())
            bases = _warped(batch.bases.float(), config.warp)
            for own, answer in zip(members(network), answers, strict=True):
                loss = loss + _own_loss(own, batch, bases, quality).mean()
                kept = None if moves is None else moves[some][None]
                relation = own.relation(invented[some][None], statistics=kept)
                kept_loss = target_loss(relation, answer[:, some][None], torch.ones(1, len(some)))
                loss = loss + config.keep * kept_loss.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        rows.append(
            {"pass": 1, "epoch": epoch, "train_loss": total / len(clips), "seconds": time.monotonic() - started}
        )
    return network.eval(), rows


def _own_loss(own: MIML, batch: Bags, bases: Tensor, quality: evidence.LabelQuality) -> Tensor:
    relation, weight = own.relation(bases, batch.valid, batch.statistics), batch.basis_energy.sqrt()
    missed, presence = quality.missed(), quality.presence(batch.labels)
    losses = partial_label_loss(relation, batch.labels, weight, missed=missed, target=presence)
    return losses if batch.targets is None else losses + target_loss(relation, batch.targets, weight)


@torch.no_grad()
def _answers(network: MIML, bases: Tensor, moves: Tensor | None) -> Tensor:
    return basis_posteriors(network.relation(bases[None], statistics=None if moves is None else moves[None]))[0]


def _warped(bases: Tensor, warp: float) -> Tensor:
    n_clips, n_bases, n_bins = bases.shape
    factors = 1 + warp * (2 * torch.rand(n_clips * n_bases) - 1)
    return warp_frequencies(bases.reshape(-1, n_bins), factors).reshape(bases.shape)


# -------------------------------------------------------------------------------------- judging


@torch.inference_mode()
def agreements(network: AnyMIML, clips: Bags) -> Tensor:
    """Say how well a network's hearing of each clip that has labels agrees with them, in [−1, 1], `(n,)`.

    It is the share of energy (square root) in bases whose best object is a labelled one, less what the other clips'
    labels would get. So having learned which objects are frequent counts for nothing. Below two such clips: none.
    """
    clips = clips.take(clips.labels.any(1).nonzero().flatten())
    if len(clips) < 2:
        return torch.zeros(0)
    relation = network.relation(clips.bases.float(), clips.valid, clips.statistics)
    weight = clips.basis_energy.sqrt() * clips.valid
    heard = torch.zeros(clips.labels.shape).scatter_add_(1, relation.argmax(1), weight)  # (n, L), of its best bases
    heard = heard / weight.sum(1, keepdim=True).clamp_min(1e-12)
    agree = heard @ clips.labels.float().T  # (n, n): each clip with each one's labels
    own = agree.diag()
    return own - (agree.sum(1) - own) / (len(clips) - 1)


@dataclass(frozen=True)
class Judgement:
    """What held-back clips say of an adaptation."""

    before: float  # mean agreement of the start, beyond chance
    after: float  # of the adapted networks
    error: float  # standard error of the gain
    clips: int

    @property
    def better(self) -> bool:
        """Whether the gain is beyond twice its standard error."""
        return self.clips >= LEAST_CLIPS and self.after - self.before > 2 * self.error

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Judgement:
        """Compare two networks on the same clips."""
        a, b = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
        if len(a) < 2:
            return cls(math.nan, math.nan, math.nan, len(a))
        return cls(float(a.mean()), float(b.mean()), float((b - a).std() / math.sqrt(len(a))), len(a))


def judge_half(
    start: Model, clips: Bags, quality: evidence.LabelQuality, config: AdaptingConfig, half: int
) -> tuple[list[float], list[float]]:
    """Learn from one half, 0 or 1, and return the other half's agreements before and after."""
    both = halves(clips, config.seed)
    network, _ = learn(start, both[half], quality, config)
    held = both[1 - half]
    return agreements(start.network, held).tolist(), agreements(network, held).tolist()


def adapt(
    start: Model, clips: Bags, quality: evidence.LabelQuality, config: AdaptingConfig
) -> tuple[Model, list[dict[str, Any]]]:
    """Return the model with its networks adapted to all the clips; context and calibrations stay."""
    network, rows = learn(start, clips, quality, config)
    return replace(start, network=network), rows


def remember(
    model: Model, config: ModelConfig, files: Sequence[str], facts: Mapping[str, Any], without: Set[str] = frozenset()
) -> Model:
    """Add to an adapted model what it learned from: counts, and bases with which new sounds are compared.

    `config` is the start's with the clips' picture network; `facts` are `clips`, `clips_by_label`, `sources` and more.
    """
    said = model.config.training
    added: dict[str, Any] = {}
    if said.get("clips_by_label") is not None:
        counts = Counter(said["clips_by_label"]) + Counter(facts["clips_by_label"])
        added["clips_by_label"] = {name: counts[name] for name in config.objects if counts[name]}
    if said.get("sources") is not None:
        added["sources"] = dict(Counter(said["sources"]) + Counter(facts["sources"]))
    if said.get("clips") is not None:
        added["clips"] = said["clips"] + facts["clips"]
    about = said.get("about") or f"recipe {model.config.recipe}"
    added["about"] = f"{about}; adapted with {facts['clips']} clips of one's own"
    if model.familiarity is not None:
        records = itertools.islice(steps.training_records(files, config, without), _COMPARED_CLIPS)
        factors = ((torch.from_numpy(W), torch.from_numpy(H)) for W, H in (r.factors() for r in records))
        model = replace(model, familiarity=model.familiarity.with_clips(factors))
    return replace(model, config=replace(config, training=dict(said) | added))
