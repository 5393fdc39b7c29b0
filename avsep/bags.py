"""Clip shards as bags for training: labels decided, bases in memory or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsep import shards
from avsep.model import LabelConfig
from avsep.objects import N_IMAGENET_CLASSES, multi_hot, object_scores, weak_labels
from avsep.training import Bags, shuffled_batches


def bags_from_file(path: str, labels: LabelConfig, split: str) -> Bags | None:
    """Read one clip file's bags of a split that have labels; None when there are none."""
    columns = ["segment_id", "split", "bases", "basis_energy", "labels", "image_logits"]
    table = shards.read_table(path, columns)
    n_bins, n_bases = table.schema.field("bases").type.shape
    rows, hot = [], []
    for i in range(len(table)):
        if table.column("split")[i].as_py() != split:
            continue
        marks = decide_labels(table.column("labels")[i].as_py(), table.column("image_logits")[i].values, labels)
        if marks is not None and marks.any():
            rows.append(i)
            hot.append(marks)
    if not rows:
        return None
    table = table.take(rows)
    flat = table.column("bases").combine_chunks().storage.flatten().to_numpy(zero_copy_only=False)
    bases = torch.from_numpy(flat.reshape(-1, n_bins, n_bases).swapaxes(1, 2).copy())
    energy = torch.tensor(np.stack(table.column("basis_energy").to_pylist()), dtype=torch.float32)
    return Bags(table.column("segment_id").to_pylist(), bases, energy > 0, energy, torch.stack(hot))


def decide_labels(given: Sequence[str] | None, image_logits: Any, config: LabelConfig) -> Tensor | None:
    """Return a clip's weak labels, boolean `(L,)`: the given ones, else the pictures'; None without either."""
    if given is not None:
        return multi_hot(list(given))
    if image_logits is None:
        return None
    logits = torch.from_numpy(np.array(image_logits, np.float32)).reshape(-1, N_IMAGENET_CLASSES)
    return weak_labels(object_scores(logits), config.threshold, config.best_threshold)


def load_bags(files: Iterable[str], labels: LabelConfig, split: str) -> Bags | None:
    """Read the bags of a split from clip files into memory, in order of their ids; None when there are none."""
    parts = [b for b in (bags_from_file(f, labels, split) for f in files) if b is not None]
    return _join(parts) if parts else None


def _join(parts: Sequence[Bags]) -> Bags:
    whole = Bags(
        [i for p in parts for i in p.segment_ids],
        torch.cat([p.bases for p in parts]),
        torch.cat([p.valid for p in parts]),
        torch.cat([p.basis_energy for p in parts]),
        torch.cat([p.labels for p in parts]),
    )
    return whole.take(torch.tensor(np.argsort(whole.segment_ids)))


def streamed_batches(
    files: Sequence[str],
    labels: LabelConfig,
    split: str,
    batch_size: int,
    seed: int,
    buffer_clips: int = 8192,
) -> Iterator[Bags]:
    """Yield batches from more clips than fit in memory.

    Files (each a random sample of the clips) come in random order; `buffer_clips` at a time are
    shuffled together.
    """
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[Bags] = []
    for position, index in enumerate(order):
        bags = bags_from_file(files[index], labels, split)
        held += [bags] if bags is not None else []
        if held and (sum(map(len, held)) >= buffer_clips or position == len(order) - 1):
            yield from shuffled_batches(_join(held), batch_size, seed + position)
            held = []
    if held:
        yield from shuffled_batches(_join(held), batch_size, seed + len(order))
