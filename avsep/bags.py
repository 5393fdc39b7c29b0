"""Clip shards as bags for training: labels decided, bases in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsep import shards
from avsep.miml import activation_statistics
from avsep.model import LabelConfig
from avsep.objects import N_IMAGENET_CLASSES, multi_hot, object_scores, weak_labels
from avsep.training import Bags, shuffled_batches

# a clip's W (F, M), H (M, N), shares of energy (M,) and labels (L,) → whose its bases are, (L + 1, M)
Teacher = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bags_from_file(path: str, labels: LabelConfig, split: str, teacher: Teacher | None = None) -> Bags | None:
    """Read one clip file's bags of a split that have labels, with targets where there is a teacher; or None."""
    columns = ["segment_id", "split", "bases", "basis_energy", "labels", "image_logits"]
    columns += ["activations", "activation_scale"]
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
    H = [
        torch.from_numpy(np.array(h.values, np.float32)).reshape(n_bases, -1) * scale.as_py()
        for h, scale in zip(table.column("activations"), table.column("activation_scale"), strict=True)
    ]
    statistics = torch.stack([activation_statistics(h.unsqueeze(0))[0] for h in H])
    targets = None
    if teacher is not None:
        targets = torch.stack([teacher(bases[i].float().T, h, energy[i], hot[i]) for i, h in enumerate(H)])
    ids = table.column("segment_id").to_pylist()
    return Bags(ids, bases, energy > 0, energy, torch.stack(hot), statistics, targets)


def decide_labels(given: Sequence[str] | None, image_logits: Any, config: LabelConfig) -> Tensor | None:
    """Return a clip's weak labels, boolean `(L,)`: the given ones, else the pictures'; None without either."""
    if given is not None:
        return multi_hot(list(given))
    if image_logits is None:
        return None
    logits = torch.from_numpy(np.array(image_logits, np.float32)).reshape(-1, N_IMAGENET_CLASSES)
    return weak_labels(object_scores(logits), config.threshold, config.best_threshold)


def load_bags(
    files: Iterable[str], labels: LabelConfig, split: str, teacher: Teacher | None = None, more: Bags | None = None
) -> Bags | None:
    """Read the bags of a split from clip files into memory, in order of their ids, then `more`; None for none."""
    parts = [b for b in (bags_from_file(f, labels, split, teacher) for f in files) if b is not None]
    if not parts:
        return None
    whole = _join(parts)
    return whole if more is None else Bags.join([whole, more])


def _join(parts: Sequence[Bags]) -> Bags:
    whole = Bags.join(parts)
    return whole.take(torch.tensor(np.argsort(whole.segment_ids)))


def streamed_batches(
    files: Sequence[str],
    labels: LabelConfig,
    split: str,
    batch_size: int,
    seed: int,
    buffer_clips: int = 8192,
    teacher: Teacher | None = None,
    more: Bags | None = None,
) -> Iterator[Bags]:
    """Yield batches from more clips than fit in memory.

    Files (each a random sample of the clips) come in random order; `buffer_clips` at a time are
    shuffled together, the first of them with `more`.
    """
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[Bags] = [] if more is None else [more]
    for position, index in enumerate(order):
        bags = bags_from_file(files[index], labels, split, teacher)
        held += [bags] if bags is not None else []
        if held and (sum(map(len, held)) >= buffer_clips or position == len(order) - 1):
            yield from shuffled_batches(_join(held), batch_size, seed + position)
            held = []
    if held:
        yield from shuffled_batches(_join(held), batch_size, seed + len(order))
