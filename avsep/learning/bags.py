"""Clip shards as bags for training: labels decided, files shared among workers, bases in memory or read anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from avsep import shards
from avsep.learning import parallel
from avsep.miml import (
    activation_statistics,
)
from avsep.model import Labelling
from avsep.objects import N_IMAGENET_CLASSES

# a clip's W (F, M), H (M, N), shares of energy (M,) and labels (L,) → whose its bases are, (L + 1, M)
Teacher = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bags_from_file(
    path: str, labels: Labelling, split: str, teacher: Teacher | None = None, without: Set[str] = frozenset()
) -> Bags | None:
    """Read one clip file's bags of a split that are used, with targets where there is a teacher; or None.

    The clips of the ids `without` are left out.
    """
    columns = ["segment_id", "split", "bases", "basis_energy", "labels", "image_logits"]
    columns += ["activations", "activation_scale"]
    table = shards.read_table(path, columns, without)
    n_bins, n_bases = table.schema.field("bases").type.shape
    table = table.filter(pc.equal(table.column("split"), split))
    marks = _decide_all(table, labels)
    rows = [i for i, m in enumerate(marks) if labels.takes(m, split)]
    if not rows:
        return None
    table, hot = table.take(rows), [marks[i] for i in rows]
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


def _decide_all(table: pa.Table, labels: Labelling) -> list[Any]:
    """Do what `Labelling.decide` does for each clip of a table; pictures only where needed, and together."""
    given = table.column("labels").to_pylist()
    marks = [None if names is None else labels.vocabulary.multi_hot(names) for names in given]
    by_number: dict[int, list[int]] = {}  # by their number
    for i in (i for i, names in enumerate(given) if names is None):
        if (logits := table.column("image_logits")[i].values) is not None:
            by_number.setdefault(len(logits), []).append(i)
    for rows in by_number.values():
        logits = np.stack([np.array(table.column("image_logits")[i].values, np.float32) for i in rows])
        scores = labels.scores(torch.from_numpy(logits.reshape(len(rows), -1, N_IMAGENET_CLASSES)))
        for i, mark in zip(rows, labels.choose(scores), strict=True):
            marks[i] = mark
    return marks


def count_clips(path: str, labels: Labelling, without: Set[str] = frozenset()) -> tuple[dict[str, int], dict[str, int]]:
    """Count one clip file's clips that are used by split, and those of split train by label, but the ids `without`."""
    table = shards.read_table(path, ["split", "labels"], without)
    if table.column("labels").null_count:  # the pictures' logits are 20 kB a clip
        table = shards.read_table(path, ["split", "labels", "image_logits"], without)
    counts, by_label = dict.fromkeys(("train", "val", "test"), 0), dict.fromkeys(labels.vocabulary.names, 0)
    for split, marks in zip(table.column("split").to_pylist(), _decide_all(table, labels), strict=True):
        if not labels.takes(marks, split):
            continue
        counts[split] += 1
        for i in marks.nonzero().flatten().tolist() if split == "train" else ():
            by_label[labels.vocabulary.names[i]] += 1
    return counts, by_label


def load_bags(files: Iterable[str], labels: Labelling, split: str, without: Set[str] = frozenset()) -> Bags | None:
    """Read the bags of a split from clip files into memory, but the ids `without`, in order of ids; None for none."""
    parts = [b for b in (bags_from_file(f, labels, split, None, without) for f in files) if b is not None]
    if not parts:
        return None
    whole = Bags.join(parts)
    return whole.take(torch.tensor(np.argsort(whole.segment_ids)))


class TrainingClips:
    """Clip files' bags of split `train`, with practice mixtures, as batches.

    The clips of as many files as have `buffer_clips` are shuffled together, and an epoch takes the files (each a
    random sample of the clips) in another order. The mixtures are spread over all. Of several workers of
    torch.distributed each reads and holds the files that are its own. The batches are the same however many workers
    there are, and whether bags are held in memory, that of `device`, or read anew each time.

    Args:
        files: clip files.
        counts: how many clips of each are used; files without any are not read.
        labels: how labels are decided.
        without: ids of clips that are left out.
        teacher: gives the bases' targets.
        mixtures: bags to train on, too; they have targets.
        held: whether bags are kept after they were read.
        device: where they are kept.
        buffer_clips: clips shuffled together; more may be where a file has more.
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        labels: Labelling,
        *,
        without: Set[str] = frozenset(),
        teacher: Teacher | None = None,
        mixtures: Bags | None = None,
        held: bool = False,
        device: str = "cpu",
        buffer_clips: int = 8192,
    ) -> None:
        used = [(f, n) for f, n in zip(files, counts, strict=True) if n]
        self._files, self._counts = [f for f, _ in used], [n for _, n in used]
        self._labels, self._teacher, self._mixtures, self._without = labels, teacher, mixtures, without
        self._held, self._device, self._buffer_clips = held, device, buffer_clips
        self._workers = parallel.share_out(self._counts)
        self._bags: dict[int, Bags] = {}
        self._known: dict[int, tuple[list[str], list[int]]] = {}  # every file's ids, and their bases with energy
        self._whole: Bags | None = None  # what one group holds that has all files
        self._none: Bags | None = None  # a worker without files needs the tensors' shapes

    def batches(self, batch_size: int, seed: int) -> Iterator[Bags]:
        """Yield an epoch's batches, of several workers each one's part of them."""
        groups = self._groups(seed)
        for number, files in enumerate(groups):
            yield from shuffled_batches(self._group(files, number, len(groups)), batch_size, seed + number)

    def _groups(self, seed: int) -> list[list[int]]:
        groups: list[list[int]] = []
        size = self._buffer_clips
        for file in torch.randperm(len(self._files), generator=torch.Generator().manual_seed(seed)).tolist():
            if size >= self._buffer_clips:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += self._counts[file]
        return groups

    def _group(self, files: list[int], number: int, n_groups: int) -> Bags:
        """Return the clips of some files, in order of their ids, then this group's mixtures; or this worker's part."""
        if self._whole is not None:
            return self._whole
        rank, n_workers = parallel.place()
        parts = {f: self._read(f, keep=self._held and n_groups > 1) for f in files if self._workers[f] == rank}
        self._meet(files, parts)
        keys = [((0, i), n) for f in files for i, n in zip(*self._known[f], strict=True)]
        own = [(0, i) for f in parts for i in self._known[f][0]]
        bags = list(parts.values())
        if self._mixtures is not None:
            n_valid = self._mixtures.valid.sum(1).tolist()
            some = range(number, len(n_valid), n_groups)
            keys += [((1, f"{i:09d}"), n_valid[i]) for i in some]
            some = some[rank::n_workers]
            own += [(1, f"{i:09d}") for i in some]
            bags.append(self._mixtures.take(torch.tensor(some, dtype=torch.long)))
        assert self._none is not None
        part = _join(bags) if bags else self._none
        if n_workers == 1:
            part = part.take(torch.tensor(sorted(range(len(own)), key=own.__getitem__)))
        else:
            row = {key: i for i, key in enumerate(own)}
            keys.sort()
            share = Share(torch.tensor([row.get(k, -1) for k, _ in keys]), torch.tensor([n for _, n in keys]))
            part = replace(part, share=share)
        if self._held and n_groups == 1:
            part = self._whole = part.to(self._device)
        return part

    def _read(self, file: int, keep: bool) -> Bags:
        if file in self._bags:
            return self._bags[file]
        bags = bags_from_file(self._files[file], self._labels, "train", self._teacher, self._without)
        assert bags is not None and len(bags) == self._counts[file]
        if keep:
            bags = self._bags[file] = bags.to(self._device)
        return bags

    def _meet(self, files: list[int], parts: dict[int, Bags]) -> None:
        """Learn what clips the other workers have read, when files are read for the first time."""
        if all(f in self._known for f in files):
            return
        facts = {f: (b.segment_ids, b.valid.sum(1).tolist()) for f, b in parts.items()}
        none = next((b.take(slice(0, 0)).to("cpu") for b in parts.values()), None)
        for theirs, like in parallel.gather((facts, none)):
            self._known |= theirs
            self._none = like if self._none is None else self._none  # an empty one is false


def _join(parts: Sequence[Bags]) -> Bags:
    return Bags.join([p.to(parts[0].bases.device) for p in parts])


@dataclass
class Bags:
    """Clips as the network sees them."""

    segment_ids: list[str]
    bases: Tensor  # (B, M, F), float16 until a batch needs them
    valid: Tensor  # boolean (B, M): bases with energy
    basis_energy: Tensor  # (B, M)
    labels: Tensor  # boolean (B, L): weak labels
    statistics: Tensor | None = None  # (B, M, 15): how each basis moves
    targets: Tensor | None = None  # (B, L + 1, M): how much of each basis is whose, noise last, where that is known
    share: Share | None = None  # where several workers hold a part each: what this one knows of the whole

    def __len__(self) -> int:
        return len(self.segment_ids)

    def take(self, rows: Tensor | slice) -> Bags:
        """Select clips that are held here."""
        ids = self.segment_ids[rows] if isinstance(rows, slice) else [self.segment_ids[i] for i in rows.tolist()]
        tensors: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else t[rows] for n in _TENSORS}
        return Bags(ids, **tensors)

    def take_of_whole(self, clips: Tensor) -> Bags:
        """Select clips of the whole, of which each worker gets those that it holds."""
        if self.share is None:
            return self.take(clips)
        held = self.share.rows[clips]
        here = held >= 0
        rows = torch.where(here, here.cumsum(0) - 1, -1)
        return replace(self.take(held[here]), share=Share(rows, self.share.n_valid[clips]))

    def to(self, device: torch.device | str) -> Bags:
        """Move the tensors to a device."""
        tensors: dict[str, Any] = {n: moved_to(device, getattr(self, n)) for n in _TENSORS}
        return Bags(self.segment_ids, **tensors, share=self.share)

    @staticmethod
    def join(parts: Sequence[Bags]) -> Bags:
        """Put bags one after the other; what one of them lacks, the whole lacks."""
        columns = {n: [getattr(p, n) for p in parts] for n in _TENSORS}
        whole: dict[str, Any] = {n: None if any(t is None for t in c) else torch.cat(c) for n, c in columns.items()}
        return Bags([i for p in parts for i in p.segment_ids], **whole)


@dataclass
class Share:
    """The whole of which a worker holds a part: B clips in an order that all workers agree on."""

    rows: Tensor  # (B,): the worker's row of each clip, −1 where another holds it
    n_valid: Tensor  # (B,): each clip's bases with energy

    def __len__(self) -> int:
        return len(self.rows)


_TENSORS = ("bases", "valid", "basis_energy", "labels", "statistics", "targets")


def shuffled_batches(bags: Bags, batch_size: int, seed: int) -> Iterator[Bags]:
    """Yield batches of a random order; none is dropped, and a last one too small for batch norm joins its neighbour.

    Of bags that workers share each gets its part of the same batches, which may be empty.
    """
    n_clips = len(bags.share or bags)
    order = torch.randperm(n_clips, generator=torch.Generator().manual_seed(seed))
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < batch_size // 4:
        batches[-2:] = [torch.cat(batches[-2:])]
    for clips in batches:
        yield bags.take_of_whole(clips)


def moved_to(device: torch.device | str, tensor: Tensor | None) -> Tensor | None:
    """Return the bags on another device."""
    return None if tensor is None else tensor.to(device)
