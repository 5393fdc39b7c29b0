"""Committed clips as a torch `Dataset`, for networks of one's own.

    import torch
    from avsep.learning import ClipDataset
    clips = ClipDataset("out/clips", "train")
    batches = torch.utils.data.DataLoader(clips, batch_size=64, shuffle=True, num_workers=2)

The folder may be local or in an object store. What is read lazily are row groups of the shards' Parquet files, of some
200 clips; a process keeps the last ones. Where a set is larger than that, an order of `GroupSampler` reads each once.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from avsep import shards, storage
from avsep.factors import DataConfig
from avsep.model import Labelling
from avsep.records import SPLITS

Item = dict[str, Any]
_READERS = 16  # files looked at at the same time
_COLUMNS = ["segment_id", "bases", "activations", "activation_scale", "basis_energy", "labels", "image_logits"]


@dataclass(frozen=True)
class _Group:
    """A row group of a file, as it is read and kept."""

    bases: NDArray[np.float16]  # (clips, F, M)
    table: pa.Table  # the other columns

    @property
    def n_bytes(self) -> int:
        return self.bases.nbytes + int(self.table.nbytes)


@dataclass(frozen=True)
class _Facts:
    """What is known of a file before its clips are read."""

    digest: bytes  # of the configuration it was extracted with
    splits: NDArray[np.str_]  # (clips,)
    durations_s: NDArray[np.float64]  # (clips,)
    groups: NDArray[np.int32]  # (clips,): each one's row group
    rows: NDArray[np.int32]  # (clips,): its row there


class ClipDataset(Dataset[Item]):
    """The clips of one split, or with None of all, in the order of the shards.

    Item i is a dict, which `DataLoader` puts together to batches with B ahead of each shape:

        id            the clip's segment_id
        bases         float32 (F, M), each column's maximum one
        activations   float32 (M, N); zeros follow a clip that is shorter than N frames, a longer one is cut
        n_frames      how many of the N frames are the clip's
        basis_energy  float32 (M,), each basis's share of the clip's energy
        scores        float32 (L,), how well the pictures show each object, 0 to 1; NaN where nobody looked
        labels        float32 (L,), 1 for the weak labels: the given ones, else those that the scores give
        labelled      whether there are any to go by; without given ones or pictures `labels` are all zero

    Attributes:
        config: what the clips were made with: `.extraction.stft`, `.vocabulary.names` (the L objects), …
        n_frames: N.

    Args:
        clips: folder or URI that pipelines.extract wrote.
        split: train, val or test.
        n_frames: N; that of the longest clip, unless given.
        keep_bytes: of row groups that each process keeps, the last read.

    Raises:
        ValueError: nothing is committed in the folder, or nothing of that split, or what is there is mixed.
        OSError: a file is missing or damaged, here or when its clips are asked for.
    """

    def __init__(
        self,
        clips: storage.AnyPath,
        split: str | None = "train",
        *,
        n_frames: int | None = None,
        keep_bytes: int = 1 << 30,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}, or None for all")
        if n_frames is not None and n_frames < 1:
            raise ValueError(f"n_frames is {n_frames}; it must be at least 1")
        folder = storage.resolve(os.fspath(clips), ".")
        self._files = shards.clip_files(folder)
        with ThreadPoolExecutor(_READERS) as pool:
            facts = list(pool.map(_look_at, self._files))
        if len(digests := {f.digest for f in facts}) > 1:
            said = " and ".join(sorted(d.decode() for d in digests))
            raise ValueError(
                f"{folder} mixes clips extracted with settings {said}: pipelines.audit names them; "
                "extract all of them with one, to another folder"
            )
        taken = [np.flatnonzero(np.full(len(f.splits), split is None) | (f.splits == split)) for f in facts]
        if not sum(map(len, taken)):
            there = sorted({str(s) for f in facts for s in f.splits})
            raise ValueError(f"{folder} has no clip of split {split}; its clips are of {', '.join(there)}")
        self.config = DataConfig.from_dict(shards.configuration_in(self._files[0]))
        self._labelling = Labelling.of(self.config)
        self._file = np.repeat(np.arange(len(facts), dtype=np.int32), [len(t) for t in taken])
        self._group = np.concatenate([f.groups[t] for f, t in zip(facts, taken, strict=True)])
        self._row = np.concatenate([f.rows[t] for f, t in zip(facts, taken, strict=True)])
        stft, longest_s = (
            self.config.extraction.stft,
            max(f.durations_s[t].max(initial=0) for f, t in zip(facts, taken, strict=True)),
        )
        self.n_frames = n_frames or stft.n_frames(round(longest_s * stft.sample_rate))
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return several items, as `DataLoader` asks for a batch: each row group of theirs is read once."""
        if self._process != os.getpid():  # a worker, which must not use its parent's connections
            storage.forget_connections()
            self._process = os.getpid()
        wanted: dict[tuple[int, int], list[int]] = {}
        for place, i in enumerate(indices):
            if not -len(self) <= i < len(self):
                raise IndexError(f"there is no clip {i}: there are {len(self)}")
            wanted.setdefault(self._group_of(i), []).append(place)
        items: dict[int, Item] = {}
        for key, places in wanted.items():
            group = self._read(key)
            items |= {place: self._item(group, int(self._row[indices[place]])) for place in places}
        return [items[place] for place in range(len(indices))]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": OrderedDict()}

    def groups(self) -> list[NDArray[np.int64]]:
        """Return the indices of the clips by row group, in order."""
        changes = (np.diff(self._file) != 0) | (np.diff(self._group) != 0)
        return np.split(np.arange(len(self)), np.flatnonzero(changes) + 1)

    def _group_of(self, index: int) -> tuple[int, int]:
        return int(self._file[index]), int(self._group[index])

    def _read(self, key: tuple[int, int]) -> _Group:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        file, number = key
        with shards.open_table(self._files[file]) as parquet:
            table = parquet.read_row_group(number, columns=_COLUMNS)
        n_bins, n_bases = table.schema.field("bases").type.shape
        flat = table.column("bases").combine_chunks().storage.flatten().to_numpy(zero_copy_only=False)
        group = _Group(flat.reshape(-1, n_bins, n_bases), table.drop_columns(["bases"]))
        self._kept[key] = group
        n_bytes = sum(g.n_bytes for g in self._kept.values())
        while n_bytes > self._keep_bytes and len(self._kept) > 1:
            n_bytes -= self._kept.popitem(last=False)[1].n_bytes
        return group

    def _item(self, group: _Group, row: int) -> Item:
        fields = {name: group.table.column(name)[row] for name in group.table.column_names}
        n_bases = group.bases.shape[2]
        scale = np.float32(fields["activation_scale"].as_py())
        H = np.array(fields["activations"].values, np.float32).reshape(n_bases, -1)[:, : self.n_frames] * scale
        activations = torch.zeros(n_bases, self.n_frames)
        activations[:, : H.shape[1]] = torch.from_numpy(H)
        logits, n_objects = fields["image_logits"].values, len(self.config.vocabulary.names)
        marks = self._labelling.decide(fields["labels"].as_py(), logits)
        return {
            "id": fields["segment_id"].as_py(),
            "bases": torch.from_numpy(group.bases[row].astype(np.float32)),
            "activations": activations,
            "n_frames": H.shape[1],
            "basis_energy": torch.tensor(fields["basis_energy"].values.to_numpy()),
            "scores": torch.full((n_objects,), math.nan) if logits is None else self._labelling.scores_of(logits),
            "labels": torch.zeros(n_objects) if marks is None else marks.float(),
            "labelled": marks is not None,
        }


class GroupSampler(Sampler[int]):
    """A random order of a `ClipDataset` for sets larger than memory: clips that are read together come near each other.

    The row groups are shuffled, then the clips of as many of them together as hold `buffer_clips`: some 0.6 GB, which
    the dataset's `keep_bytes` must allow. Shards are random samples of all clips. Every epoch has another order, from
    torch's random numbers: `torch.manual_seed` gives the same again.
    """

    def __init__(self, clips: ClipDataset, buffer_clips: int = 4096) -> None:
        self._groups, self._buffer_clips = clips.groups(), buffer_clips

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __iter__(self) -> Iterator[int]:
        together: list[int] = []
        for number in torch.randperm(len(self._groups)).tolist():
            together += self._groups[number].tolist()
            if len(together) >= self._buffer_clips:
                yield from (together[i] for i in torch.randperm(len(together)).tolist())
                together = []
        yield from (together[i] for i in torch.randperm(len(together)).tolist())


def _look_at(path: str) -> _Facts:
    with shards.open_table(path) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        digest = parquet.schema_arrow.metadata[b"avsep.digest"]
        table = parquet.read(columns=["split", "duration_s"])
    return _Facts(
        digest,
        np.array(table.column("split").to_pylist(), np.str_),
        table.column("duration_s").to_numpy(),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]),
    )
