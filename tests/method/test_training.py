import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from avsep.factors import DataConfig, ExtractionConfig
from avsep.learning import training
from avsep.learning.bags import Bags, TrainingClips, count_clips, load_bags, shuffled_batches
from avsep.learning.training import (
    LOSSES,
    History,
    TrainingConfig,
    assignment,
    batch_size_for,
    optimiser_for,
    train_epoch,
    validate,
)
from avsep.metrics import mean_average_precision
from avsep.miml import MIML, partial_label_loss, warp_frequencies
from avsep.model import LabelConfig, Labelling
from avsep.objects import AUDIOSET_23, multi_hot, object_index
from avsep.records import ClipRecord
from avsep.shards import clip_files, write_shard
from avsep.synthetic import planted_bases

CONFIGURATION = DataConfig(ExtractionConfig(), AUDIOSET_23).as_dict()
LABELLED = Labelling(LabelConfig(unlabelled=False), AUDIOSET_23)  # clips with labels alone
F, M = 12, 3
CONFIG = TrainingConfig(epochs=10, batch_size=32)


def planted(n_clips: int = 240) -> tuple[Bags, Tensor]:
    """Bags of planted bases, and which object each basis belongs to."""
    p = planted_bases(n_clips)
    energy = (p.W**2).sum(1) * (p.H**2).sum(2)
    energy = energy / energy.sum(1, keepdim=True)
    ids = [f"c{i:03d}" for i in range(n_clips)]
    return Bags(ids, p.W.mT.half().contiguous(), energy > 0, energy, p.labels), p.object_of_basis


def test_bags_move_between_devices_whole() -> None:
    bags, _ = planted(6)
    there = bags.to("meta")
    assert there.segment_ids == bags.segment_ids and there.statistics is None
    assert all(t.device.type == "meta" for t in (there.bases, there.valid, there.basis_energy, there.labels))


def network(**options: object) -> MIML:
    torch.manual_seed(0)
    return MIML(48, 4, 2, 64, **({"published_head": False, "square_root": True} | options))


def train(model: MIML, bags: Bags, config: TrainingConfig, epochs: range, state: bytes | None = None) -> bytes:
    """Train some epochs, from a checkpoint when there is one; return a checkpoint."""
    optimiser, schedule = optimiser_for(model, config)
    if state is not None:
        saved = torch.load(io.BytesIO(state), weights_only=True)
        for part, name in ((model, "model"), (optimiser, "optimiser"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
    for epoch in epochs:
        train_epoch(model, shuffled_batches(bags, config.batch_size or 32, epoch), optimiser, config, epoch)
        schedule.step()
    buffer = io.BytesIO()
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------- learning


def test_planted_bases_are_learnt_by_the_partial_label_loss() -> None:
    """From weak labels of whole clips alone, the bases of clips never seen find their objects."""
    bags, owner = planted()
    seen, unseen = bags.take(slice(0, 180)), bags.take(slice(180, 240))
    model = network()
    before = validate(model, [unseen], CONFIG)
    train(model, seen, CONFIG, range(10))
    figures = validate(model, [unseen], CONFIG)
    with torch.inference_mode():
        found = model.relation(unseen.bases.float()).argmax(1)
    assert float((found == owner[180:]).float().mean()) > 0.9
    assert figures["val_map"] > 0.95 and figures["val_agreement"] > 0.95
    assert figures["val_loss"] < before["val_loss"]
    assert figures["val_selection"] == pytest.approx((figures["val_map"] + figures["val_agreement"]) / 2)


def test_the_published_loss_learns_the_clips_labels() -> None:
    bags, _ = planted()
    config = replace(CONFIG, loss="multilabel_margin")
    model = network(published_head=True, square_root=False)
    train(model, bags.take(slice(0, 180)), config, range(10))
    assert validate(model, [bags.take(slice(180, 240))], config)["val_map"] > 0.9


# Regenerated on purpose only; the test prints the curve where it differs.
GOLDEN = [1.1547, 0.9809, 0.8126, 0.671, 0.5483]


def test_golden_loss_curve() -> None:
    bags, _ = planted(96)
    model, config = network(), replace(CONFIG, epochs=5, batch_size=16)
    optimiser, schedule = optimiser_for(model, config)
    curve = []
    for epoch in range(config.epochs):
        curve.append(train_epoch(model, shuffled_batches(bags, 16, epoch), optimiser, config, epoch)["train_loss"])
        schedule.step()
    assert [round(loss, 4) for loss in curve] == pytest.approx(GOLDEN, rel=0.01)


@pytest.mark.parametrize("schedule", ["step", "one_cycle"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(schedule: str) -> None:
    """Weights, optimiser and schedule are the whole state; the warp follows from seed and epoch."""
    bags, _ = planted(64)
    config = replace(CONFIG, epochs=4, batch_size=16, warp=0.1, schedule=schedule)
    whole = network()
    train(whole, bags, config, range(4))
    first, second = network(), network()
    state = train(first, bags, config, range(2))
    torch.rand(7)  # another process has another random state
    train(second, bags, config, range(2, 4), state)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )
    other = network()
    train(other, bags, replace(config, seed=1), range(4))  # another warp
    assert not torch.equal(other.shared[0].weight, whole.shared[0].weight)


def test_the_published_schedule() -> None:
    """Times 0.94 every 5 epochs, from 1e-3."""
    optimiser, schedule = optimiser_for(network(), TrainingConfig(schedule="step"))
    rates = []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([1e-3] * 5 + [1e-3 * 0.94] * 5 + [1e-3 * 0.94**2])


def test_losses_leave_out_bases_that_are_not_there() -> None:
    relation = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[True, False, False, True], [False, True, False, False]])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 4:] = False
    other = relation.clone()
    other[:, :, 4:] = 50.0
    for name, loss in LOSSES.items():
        assert torch.allclose(loss(relation, labels, valid, None), loss(other, labels, valid, None)), name
    margin = LOSSES["multilabel_margin"](relation, labels, valid, None)
    top = relation[:, :, :4].amax(-1)
    by_hand = sum(max(0.0, 1 - float(top[1, 1] - top[1, i])) for i in (0, 2, 3)) / 4
    assert float(margin[1]) == pytest.approx(by_hand)
    assert torch.equal(
        LOSSES["partial_label"](relation, labels, valid, None), partial_label_loss(relation, labels, valid)
    )


# ---------------------------------------------------------------------------------- warping


def test_warping_moves_what_was_at_f_over_the_factor_to_f() -> None:
    """A straight line a·f becomes a·f/factor up to where the input ends, and zero beyond."""
    line = 3.0 * torch.arange(40.0).expand(4, 40)
    factors = torch.tensor([1.0, 2.0, 1.25, 0.8])
    warped = warp_frequencies(line, factors)
    f = torch.arange(40.0)
    expected = 3 * f / factors[:, None] * (f / factors[:, None] <= 39)
    assert torch.allclose(warped, expected, atol=1e-4)
    assert torch.equal(warped[0], line[0])
    peaks = torch.zeros(2, 40)
    peaks[:, 10] = 1
    moved = warp_frequencies(peaks, torch.tensor([2.0, 0.5]))
    assert moved.argmax(1).tolist() == [20, 5] and moved.amax(1).tolist() == [1, 1]


# ---------------------------------------------------------------------------------- batches


def bags_of(n: int) -> Bags:
    return planted(n)[0]


@pytest.mark.parametrize(("n", "size"), [(1, 64), (5, 64), (64, 64), (65, 64), (79, 64), (80, 64), (130, 64), (7, 2)])
def test_batches_never_drop_a_clip(n: int, size: int) -> None:
    batches = list(shuffled_batches(bags_of(n), size, seed=1))
    assert sorted(i for b in batches for i in b.segment_ids) == bags_of(n).segment_ids
    assert all(len(b) >= max(1, min(n, size // 4)) for b in batches)  # none too small for batch norm
    assert all(len(b.bases) == len(b.labels) == len(b.valid) == len(b) for b in batches)


def test_batches_keep_rows_together_and_differ_by_seed() -> None:
    bags = bags_of(50)
    batches = list(shuffled_batches(bags, 16, seed=1))
    for batch in batches:
        for i, name in enumerate(batch.segment_ids):
            row = int(name[1:])
            assert torch.equal(batch.bases[i], bags.bases[row]) and torch.equal(batch.labels[i], bags.labels[row])
    again, other = (next(shuffled_batches(bags, 16, seed=s)).segment_ids for s in (1, 2))
    assert again == batches[0].segment_ids != other


def test_batch_sizes() -> None:
    """64 below 5,000 clips and 256 from there, smaller for few clips, never more than there are."""
    assert [batch_size_for(n, TrainingConfig()) for n in (1, 2, 4999, 5000, 190_000)] == [1, 2, 64, 256, 256]
    assert batch_size_for(100, TrainingConfig(batch_size=32)) == 32
    assert batch_size_for(10, TrainingConfig(batch_size=32)) == 10
    sizes = [batch_size_for(n, TrainingConfig()) for n in range(1, 600)]
    assert sizes == sorted(sizes) and all(1 <= s <= n for n, s in enumerate(sizes, 1))


# ----------------------------------------------------------------------------------- shards


def logits(*classes: int) -> np.ndarray:
    x = np.zeros((len(classes), 1000), np.float16)
    x[np.arange(len(classes)), list(classes)] = 30
    return x


def clip(number: int, **changes: object) -> ClipRecord:
    rng = np.random.default_rng(number)
    bases = rng.random((F, M)).astype(np.float16)
    bases /= bases.max(0)
    record = ClipRecord(
        f"c{number:03d}", "a.mp4", 0.0, None, "train", None, ("dog",), bases, np.ones((M, 4), np.float16), 1.0,
        np.full(M, 1 / M, np.float32), None, 0.0, 10.0, -20.0, "", "given",
    )  # fmt: skip
    return replace(record, **changes)


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    """Files of 20 training clips with labels, and some that take no part."""
    others = [
        clip(90, split="val", objects=("dog", "violin")),
        clip(91, labels=()),
        clip(92, labels=None),
        clip(93, labels=None, image_logits=logits(0, 0)),
    ]
    everything = [*(clip(i) for i in range(20)), *others]
    for number, start in enumerate(range(0, len(everything), 6)):
        part = everything[start : start + 6]
        write_shard(
            str(tmp_path),
            f"{number:05d}",
            0,
            part,
            [],
            configuration=CONFIGURATION,
            shape=(F, M),
        )
    return clip_files(str(tmp_path))


def test_bags_hold_what_the_records_hold(clips: list[str]) -> None:
    """In order of their ids, whatever the order of the files; bases as (M, F)."""
    bags = load_bags(reversed(clips), LABELLED, "train")
    assert bags is not None and bags.segment_ids == [f"c{i:03d}" for i in range(20)]
    assert bags.bases.shape == (20, M, F) and bags.bases.dtype == torch.float16
    for i in (0, 7, 19):
        assert np.array_equal(bags.bases[i].numpy(), clip(i).bases.T)
    assert bags.labels[:, object_index("dog")].all() and bags.labels.sum() == 20
    assert bags.valid.all()
    val = load_bags(clips, LABELLED, "val")
    assert val is not None and val.segment_ids == ["c090"]
    assert load_bags(clips, LABELLED, "test") is None


def training_clips(files: list[str], **options: Any) -> TrainingClips:
    return TrainingClips(files, [count_clips(f, LABELLED)[0]["train"] for f in files], LABELLED, **options)


def test_files_say_how_many_of_their_clips_have_labels(clips: list[str]) -> None:
    assert [count_clips(f, LABELLED)[0]["train"] for f in clips] == [6, 6, 6, 2]
    assert sum(count_clips(f, LABELLED)[0]["val"] for f in clips) == 1


def test_clips_without_a_label_teach_noise_and_absence(clips: list[str]) -> None:
    """Where somebody has looked, and in split train alone: validation asks what is found of what is there."""
    bags = load_bags(clips, Labelling(LabelConfig(), AUDIOSET_23), "train")
    assert bags is not None and bags.segment_ids == [*(f"c{i:03d}" for i in range(20)), "c091", "c093"]
    assert not bags.labels[20:].any()
    assert [count_clips(f, Labelling(LabelConfig(), AUDIOSET_23))[0]["train"] for f in clips] == [6, 6, 6, 4]
    val = load_bags(clips, Labelling(LabelConfig(), AUDIOSET_23), "val")
    assert val is not None and val.segment_ids == ["c090"]


def test_a_files_pictures_decide_as_each_clips_do(tmp_path: Path) -> None:
    """Clips of several numbers of pictures among those with given labels, and without either."""
    rng = np.random.default_rng(0)
    images = [None if i % 7 == 0 else 3 * rng.standard_normal(1000 * (1 + i % 3)).astype(np.float16) for i in range(21)]
    records = [clip(i, labels=("dog",) if i % 5 == 0 else None, image_logits=p) for i, p in enumerate(images)]
    write_shard(str(tmp_path), "00000", 0, records, [], configuration=CONFIGURATION, shape=(F, M))
    (file,) = clip_files(str(tmp_path))
    config = Labelling(LabelConfig(threshold=0.05, unlabelled=False), AUDIOSET_23)
    expected = [config.decide(r.labels, r.image_logits) for r in records]
    bags = load_bags([file], config, "train")
    assert bags is not None and torch.equal(
        bags.labels, torch.stack([m for m in expected if m is not None and m.any()])
    )
    assert len(bags) == count_clips(file, config)[0]["train"] == 19


@pytest.mark.parametrize("buffer_clips", [1, 7, 10_000])
def test_batches_cover_every_clip_once_whether_held_or_read_anew(clips: list[str], buffer_clips: int) -> None:
    held, read = (training_clips(clips, buffer_clips=buffer_clips, held=held) for held in (True, False))
    drawn = list(read.batches(4, 3))
    assert sorted(i for b in drawn for i in b.segment_ids) == [f"c{i:03d}" for i in range(20)]
    for again in (held.batches(4, 3), held.batches(4, 3), read.batches(4, 3)):
        for batch, first in zip(again, drawn, strict=True):
            assert batch.segment_ids == first.segment_ids and torch.equal(batch.bases, first.bases)
    assert [b.segment_ids for b in read.batches(4, 4)] != [b.segment_ids for b in drawn]


@pytest.mark.parametrize(("buffer_clips", "n_groups"), [(7, 2), (10_000, 1)])
def test_targets_come_with_the_bags_and_mixtures_are_spread_over_all(
    clips: list[str], buffer_clips: int, n_groups: int
) -> None:
    def teacher(W: Tensor, H: Tensor, energy: Tensor, labels: Tensor) -> Tensor:
        assert W.shape[1] == H.shape[0] == len(energy)
        return torch.cat([labels.float(), torch.zeros(1)])[:, None].expand(-1, W.shape[1])

    (taught,) = training_clips(clips, teacher=teacher).batches(100, 0)
    assert taught.targets is not None and taught.statistics is not None
    assert torch.equal(taught.targets[:, :-1, 0].bool(), taught.labels)
    more = replace(taught.take(slice(0, 4)), segment_ids=[f"practice-{i}" for i in range(4)])
    groups = list(training_clips(clips, teacher=teacher, mixtures=more, buffer_clips=buffer_clips).batches(100, 3))
    assert len(groups) == n_groups and all(b.targets is not None for b in groups)
    assert sorted(i for b in groups for i in b.segment_ids) == sorted([*taught.segment_ids, *more.segment_ids])
    assert {sum(i.startswith("practice") for i in b.segment_ids) for b in groups} == {4 // n_groups}


def test_targets_teach_what_weak_labels_leave_open() -> None:
    """All clips show all objects, so that only targets say which basis is whose."""
    bags, owner = planted(120)
    every = replace(bags, labels=torch.ones_like(bags.labels))
    targets = torch.nn.functional.one_hot(owner, 5).float().mT
    figures = {}
    for name, known in (("weak", None), ("taught", targets)):
        model, config = network(), replace(CONFIG, epochs=6)
        train(model, replace(every, targets=known), config, range(6))
        figures[name] = assignment(model.eval(), replace(bags, targets=targets, labels=torch.ones_like(bags.labels)))
    assert figures["taught"] > 0.95
    assert figures["weak"] < 0.8


def test_labels_are_the_given_ones_else_the_pictures() -> None:
    violin = logits(889, 0)
    assert torch.equal(LABELLED.decide(("dog",), violin), multi_hot(["dog"]))
    assert torch.equal(LABELLED.decide(None, violin.reshape(-1)), multi_hot(["violin"]))
    given = LABELLED.decide((), violin)
    assert given is not None and not given.any()  # an empty list is given, too
    assert LABELLED.decide(None, None) is None
    flat = LABELLED.decide(None, np.zeros((1, 1000), np.float16))  # a dog at 0.118 by its 118 breeds
    assert torch.equal(flat, multi_hot(["dog"]))
    strict = Labelling(LabelConfig(best_threshold=0.2), AUDIOSET_23).decide(None, np.zeros((1, 1000), np.float16))
    assert strict is not None and not strict.any()


# ---------------------------------------------------------------------------------- figures


def test_mean_average_precision_is_scikit_learns_over_objects_that_can_be_told() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random((30, 5)) < 0.4, rng.random((30, 5))
    labels[:, 1], labels[:, 3] = True, False  # always there, never there
    expected = np.mean([average_precision_score(labels[:, i], scores[:, i]) for i in (0, 2, 4)])
    found = mean_average_precision(torch.from_numpy(labels), torch.from_numpy(scores))
    assert found == pytest.approx(float(expected))
    assert math.isnan(mean_average_precision(torch.ones(3, 2, dtype=torch.bool), torch.rand(3, 2)))


def test_validation_does_not_depend_on_batches_and_changes_nothing() -> None:
    bags, model = bags_of(40), network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = validate(model, [bags], CONFIG)
    pieces = validate(model, [bags.take(slice(0, 7)), bags.take(slice(7, 40))], CONFIG)
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert validate(model, [], CONFIG) == {}


def test_the_best_epoch_is_that_of_the_highest_figure_else_the_last() -> None:
    def rows(*figures: float | None) -> History:
        return History([{} if f is None else {"val_selection": f} for f in figures])

    assert rows(0.1, 0.5, 0.3).best() == 1
    assert rows(math.nan, 0.2, math.nan).best() == 1
    assert rows(None, None).best() == 1 and rows(math.nan, math.nan, math.nan).best() == 2
    assert rows().best() == -1
    assert training.History().rows == []
