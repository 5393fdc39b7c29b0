"""The steps of a training beside its epochs: count clips, judge labels, mix solos, learn the context."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np
import torch

from avsep import evidence, plots, shards, stages, storage
from avsep.familiarity import Familiarity
from avsep.fetching.sources import origin
from avsep.learning import bags, practice, training
from avsep.learning.run import (
    MIXTURES_FILE,
    VAL_MIXTURES_FILE,
    TrainingRun,
    read_history,
    read_mixtures,
    write_mixtures,
)
from avsep.miml import basis_posteriors
from avsep.model import Model, ModelConfig
from avsep.records import SPLITS, ClipRecord, clips_from_table

SOLO_FILES = 200  # in which solos are looked for; each is a random sample of the clips
EVIDENCE_FILES = 20  # whose labels say how far labels can be believed; they are held in memory
VAL_MIXTURES = 64
_SOLOS_AN_OBJECT = 100  # that practice mixtures draw from
_COMPARED_CLIPS = 160  # whose bases go with the model
_MAPS = 4  # relation maps drawn
_AT_ONCE = 10  # practice mixtures of a task

Solos = dict[str, list[practice.Solo]]  # by split
Batch = tuple[list[practice.Solo], int, int, int, int, range, str]  # arguments of `mix_batch`


# --------------------------------------------------------------------------------------- clips


def by_split(counts: Sequence[Mapping[str, int]]) -> Counter[str]:
    """Add up files' counts of clips with labels."""
    return Counter({split: sum(c[split] for c in counts) for split in SPLITS})


def left_out(clips: str, counts: Counter[str], n_named: int = 0) -> str:
    """Say how many of the clips take no part in training, and why.

    `counts` are those with labels by split, without the `n_named` that lists leave out.
    """
    total = sum(len(c.clip_ids) for c in shards.read_commits(clips))
    reasons = {"named by --without": n_named, "without a label": total - n_named - counts.total()}
    reasons["of split test"] = counts["test"]
    parts = [f"{n} {reason}" for reason, n in reasons.items() if n]
    return f"; left out: {', '.join(parts)}" if parts else ""


def training_records(files: Sequence[str], config: ModelConfig, without: Set[str]) -> Iterator[ClipRecord]:
    """Read the training clips that have labels, but the ids `without`."""
    for file in files:
        for record in clips_from_table(shards.read_table(file, without=without)):
            labels = config.labelling.decide(record.labels, record.image_logits)
            if record.split == "train" and labels is not None and labels.any():
                yield record


@torch.inference_mode()
def bases_of(model: Model, record: ClipRecord) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a clip's factors and what the network makes of them: `(F, M)`, `(M, N)` and posteriors `(L + 1, M)`."""
    W, H = (torch.from_numpy(x) for x in record.factors())
    return W, H, basis_posteriors(model.network.relate(W, H)[None])[0]


def count_sources(files: Sequence[str], without: Set[str]) -> dict[str, int]:
    """Count the training clips of some files, but the ids `without`, by where they came from."""
    counts: Counter[str] = Counter()
    for file in files:
        table = shards.read_table(file, ["split", "source"], without)
        for split, source in zip(*(table.column(c).to_pylist() for c in ("split", "source")), strict=True):
            counts[origin(source)] += split == "train"
    return {kind: count for kind, count in counts.most_common() if count}


# ------------------------------------------------------------------------------ between epochs


def judge(model_dir: str, files: list[str], without: Set[str]) -> tuple[evidence.LabelQuality, float]:
    """Judge the labels of some files' training clips; return with it what share of the sounding objects they name."""
    model = Model.load(model_dir)
    clips = bags.load_bags(files, model.config.labelling, "train", without)
    if clips is None:
        return evidence.LabelQuality.good(len(model.config.objects)), 1.0
    shares = training.object_shares(model.network, clips)
    quality = evidence.judge_labels(model.config.evidence, shares, clips.labels)
    likely = quality.presence(clips.labels)
    return quality, float((likely * clips.labels).sum() / likely.sum())


def find_solos(
    model_dir: str, path: str, quality: evidence.LabelQuality, without: Set[str]
) -> dict[str, list[practice.Solo]]:
    """Find one file's clips, by split, in which an object plays alone."""
    model = Model.load(model_dir)
    solos: dict[str, list[practice.Solo]] = {"train": [], "val": []}
    for record in clips_from_table(shards.read_table(path, without=without)):
        labels = model.config.labelling.decide(record.labels, record.image_logits)
        if record.split in solos and labels is not None and labels.any():
            solo = practice.find_solo(model.network, record, labels, quality)
            solos[record.split] += [solo] if solo else []
    return solos


def plan_mixtures(parts: Sequence[Solos], split: str, wanted: int, config: ModelConfig) -> list[Batch]:
    """Divide a split's mixtures into batches for `mix_batch`; none where there are no solos of two objects."""
    solos = [s for part in parts for s in part[split]]
    objects = {s.object_index for s in solos}
    if len(objects) < 2:
        return []
    kept = [s for i in sorted(objects) for s in [t for t in solos if t.object_index == i][:_SOLOS_AN_OBJECT]]
    n_frames = int(np.median([s.activations.shape[1] for s in kept]))
    shape = (len(config.objects), *config.extraction.shape, n_frames)
    starts, factorizer = range(0, wanted, _AT_ONCE), config.extraction.factorizer
    return [(kept, *shape, range(i, min(i + _AT_ONCE, wanted)), factorizer) for i in starts]


def mix_batch(
    solos: list[practice.Solo], n_objects: int, n_bins: int, n_bases: int, n_frames: int, seeds: range, factorizer: str
) -> tuple[int, list[practice.Practice]]:
    """Make some practice mixtures; return them with the first one's number."""
    shape = n_objects, n_bins, n_bases, n_frames
    return seeds[0], [practice.mix_solos(solos, *shape, seed, factorizer=factorizer) for seed in seeds]


def keep_mixtures(out: str, made: Mapping[str, list[practice.Practice]]) -> list[practice.Practice]:
    """Write both splits' mixtures; return those to train on.

    Where split val holds no solos, the last tenth of the training clips' mixtures stands in.
    """
    train, val = made["train"], made.get("val", [])
    if not val:
        kept_back = max(1, len(train) // 10)
        train, val = train[:-kept_back], train[-kept_back:]
    write_mixtures(out, MIXTURES_FILE, train)
    write_mixtures(out, VAL_MIXTURES_FILE, val)
    return train


def fit_context(
    out: str,
    model: Model,
    practices: list[practice.Practice],
    files: list[str],
    epochs: int,
    seed: int,
    without: Set[str],
) -> tuple[Model, dict[str, float]]:
    """Train the context, and learn how far to believe sound and pictures, in one worker."""
    model.context, figures = practice.train_context(model.network, practices, epochs=epochs, seed=seed)
    mixtures = read_mixtures(out, VAL_MIXTURES_FILE) or practice.as_bags(practices)
    learned = evidence.fit_sound(training.object_shares(model.network, mixtures), mixtures.labels)
    clips = bags.load_bags(files, model.config.labelling, "train", without)
    if clips is not None:
        learned = evidence.fit_images(learned, training.object_shares(model.network, clips), clips.labels)
    model.config = replace(model.config, context=True, evidence=learned)
    return model, figures


# --------------------------------------------------------------------------------- at the end


def remember_training(run: TrainingRun) -> ModelConfig:
    """Add to the model what it was trained on, and bases of training clips, with which new sounds are compared."""
    model = Model.load(run.model)
    files = run.files[:SOLO_FILES]
    records = itertools.islice(training_records(files, model.config, run.without), _COMPARED_CLIPS)
    model.familiarity = Familiarity.learn(bases_of(model, record) for record in records)
    facts = {"clips": sum(run.counts), "sources": count_sources(files, run.without)}
    if run.without:
        facts["without"] = len(run.without)
    model.config = replace(model.config, training=model.config.training | facts)
    model.save(run.model)
    return model.config


def draw_figures(out: str, clips: str) -> None:
    """Draw the loss curves and some relation maps of validation clips (training clips without any)."""
    storage.write_bytes(storage.join(out, "loss.png"), plots.loss_curves(read_history(out)))
    model = Model.load(storage.join(out, "model"))
    shown: list[ClipRecord] = []
    for split in ("val", "train"):
        shown += itertools.islice(shards.read_clips(clips, split=split), _MAPS - len(shown))
    for record in shown:
        with torch.inference_mode():
            relation = model.network.relate(*(torch.from_numpy(x) for x in record.factors()))
        image = stages.middle_image(record.source, record.start_s, record.start_s + record.duration_s)
        figure = plots.relation_map(relation.numpy(), model.config.objects, record.basis_energy, image)
        storage.write_bytes(storage.join(out, "relation_maps", f"{record.segment_id}.png"), figure)
