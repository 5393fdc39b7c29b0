"""Clip shards as a torch `Dataset`: its rows are the shards', however they are read, and a network learns from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from avsep import shards, storage
from avsep.learning import ClipDataset, GroupSampler
from avsep.model import Labelling
from avsep.records import ClipRecord
from tests.support.clips import MADE_WITH, N_BASES, N_OBJECTS, SMALL, records, write
from tests.support.uris import upload


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Shards of 40 clips, in row groups of a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", 10_000)
        folder = write(tmp_path_factory.mktemp("clips"), records(120))
    with shards.open_table(shards.clip_files(str(folder))[0]) as parquet:
        assert parquet.num_row_groups > 3
    return folder


def check_item(item: dict, record: ClipRecord, n_frames: int) -> None:
    W, H = record.factors()
    labelling = Labelling.of(MADE_WITH)
    assert item["bases"].dtype == item["activations"].dtype == item["labels"].dtype == torch.float32
    np.testing.assert_array_equal(item["bases"], W)
    n = int(item["n_frames"])
    assert item["activations"].shape == (N_BASES, n_frames) and n == min(n_frames, H.shape[1])
    np.testing.assert_array_equal(item["activations"][:, :n], H[:, :n])
    assert not item["activations"][:, n:].any()
    np.testing.assert_array_equal(item["basis_energy"], record.basis_energy)
    marks = labelling.decide(record.labels, record.image_logits)
    assert bool(item["labelled"]) == (marks is not None)
    np.testing.assert_array_equal(item["labels"], np.zeros(N_OBJECTS) if marks is None else marks.numpy())
    seen = record.image_logits is not None
    scores = labelling.scores(torch.tensor(record.image_logits).float()) if seen else torch.full((4,), torch.nan)
    np.testing.assert_array_equal(item["scores"], scores)


def check_batches(batches: DataLoader, expected: dict[str, ClipRecord], n_frames: int) -> list[str]:
    """Every clip once, equal to its record; return the ids in order."""
    ids = []
    for batch in batches:
        ids += batch["id"]
        for i, segment_id in enumerate(batch["id"]):
            check_item({name: batch[name][i] for name in batch}, expected[segment_id], n_frames)
    assert sorted(ids) == sorted(expected)
    return ids


@pytest.mark.parametrize("split", ["train", "val", "test", None])
def test_items_are_the_shards_rows(clips: Path, split: str | None) -> None:
    dataset, expected = ClipDataset(clips, split), list(shards.read_clips(clips, split=split))
    assert len(dataset) == len(expected) and dataset.n_frames == 23
    for i, record in enumerate(expected):
        item = dataset[i]
        assert item["id"] == record.segment_id
        check_item(item, record, 23)
    kinds = {(bool(dataset[i]["labelled"]), bool(dataset[i]["scores"].isnan().any())) for i in range(len(dataset))}
    assert kinds == {(True, True), (True, False), (False, True)}
    assert dataset[-1]["id"] == expected[-1].segment_id
    with pytest.raises(IndexError, match=f"no clip {len(dataset)}: there are {len(dataset)}"):
        dataset[len(dataset)]


def test_frames_are_cut_where_fewer_are_asked_for(clips: Path) -> None:
    expected = {r.segment_id: r for r in shards.read_clips(clips, split="train")}
    check_batches(DataLoader(ClipDataset(clips, n_frames=22), batch_size=16), expected, 22)


start_methods = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


@start_methods
def test_workers_give_every_clip_once(clips: Path, method: str) -> None:
    expected = {r.segment_id: r for r in shards.read_clips(clips, split="train")}
    dataset = ClipDataset(clips, "train")
    dataset[0]  # what the parent has read and opened must not disturb them
    options = {"batch_size": 7, "num_workers": 2, "multiprocessing_context": method, "timeout": 60}
    torch.manual_seed(0)
    ids = check_batches(DataLoader(dataset, shuffle=True, **options), expected, 23)
    assert ids != sorted(ids)


@start_methods
def test_workers_read_from_an_object_store(clips: Path, store_folder: str, method: str) -> None:
    upload(clips, store_folder)
    expected = {r.segment_id: r for r in shards.read_clips(clips, split="val")}
    dataset = ClipDataset(store_folder, "val")
    dataset[0]
    options = {"batch_size": 10, "num_workers": 2, "multiprocessing_context": method, "timeout": 60}
    check_batches(DataLoader(dataset, **options), expected, 23)


def test_a_network_learns_from_it(clips: Path) -> None:
    torch.manual_seed(0)
    train, val = (ClipDataset(clips, split) for split in ("train", "val"))
    network = nn.Sequential(nn.Linear(SMALL.n_bins, 64), nn.ReLU(), nn.Linear(64, N_OBJECTS))
    optimiser = torch.optim.Adam(network.parameters(), 0.02)

    def loss_of(batch: dict) -> torch.Tensor:
        scores = network(batch["bases"].mT).amax(1)  # of each clip's bases, (B, M, L) → (B, L)
        loss = nn.functional.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")
        return loss[batch["labelled"]].mean()

    def figure() -> float:
        with torch.no_grad():
            return float(loss_of(next(iter(DataLoader(val, batch_size=len(val))))))

    before = figure()
    for _ in range(6):
        for batch in DataLoader(train, batch_size=32, shuffle=True):
            optimiser.zero_grad()
            loss_of(batch).backward()
            optimiser.step()
    assert figure() < 0.7 * before


def test_groups_are_read_once_in_the_samplers_order(clips: Path, monkeypatch) -> None:
    expected = {r.segment_id: r for r in shards.read_clips(clips, split="train")}
    dataset = ClipDataset(clips, "train", keep_bytes=80_000)  # some of the row groups
    n_groups, opened = len(dataset.groups()), []
    read = shards.open_table
    monkeypatch.setattr(shards, "open_table", lambda path: opened.append(path) or read(path))
    torch.manual_seed(0)
    orders = [check_batches(DataLoader(dataset, 8, sampler=GroupSampler(dataset, 10)), expected, 23)]
    assert len(opened) == n_groups
    check_batches(DataLoader(dataset, 8, shuffle=True), expected, 23)
    assert len(opened) > 2.5 * n_groups  # which is what that sampler is for
    orders += [list(GroupSampler(dataset, 10)), list(GroupSampler(dataset, 10))]
    assert orders[1] != orders[2] and sorted(orders[1]) == list(range(len(dataset)))


def test_what_cannot_be_used_is_named(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no committed clips; run pipelines.extract to it first"):
        ClipDataset(tmp_path / "nosuch")
    with pytest.raises(ValueError, match="split is 'valid'; it is one of train, val, test, or None for all"):
        ClipDataset(clips, "valid")
    with pytest.raises(ValueError, match="n_frames is 0; it must be at least 1"):
        ClipDataset(clips, n_frames=0)
    some = records(20)
    write(tmp_path / "held", [replace(r, split="test") for r in some])
    with pytest.raises(ValueError, match="has no clip of split train; its clips are of test"):
        ClipDataset(tmp_path / "held")
    mixed = write(tmp_path / "mixed", some[:10], 5)
    write(mixed, some[10:18], config=replace(MADE_WITH, labeller_sha256="1" * 64))
    with pytest.raises(ValueError, match=r"mixes clips extracted with settings \w{16} and \w{16}: pipelines.audit"):
        ClipDataset(mixed)
    gone = ClipDataset(write(tmp_path / "gone", some), keep_bytes=0)
    storage.delete_file(shards.clip_files(str(tmp_path / "gone"))[0])
    with pytest.raises(OSError, match=r"is missing or damaged .* pipelines.audit says what to do"):
        gone[0]
