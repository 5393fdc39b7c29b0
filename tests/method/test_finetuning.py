"""Fine-tuning the picture network: closed forms, then generated pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avsep import media, shards, synthetic, vision
from avsep.fetching import MediaStore
from avsep.learning import finetuning
from avsep.learning.albums import album_name, keep_images, open_images, read_album, write_album
from avsep.learning.finetuning import FinetuningConfig
from avsep.looks import Looking
from avsep.miml import MIML, partial_label_loss
from avsep.model import Model, ModelConfig
from avsep.objects import AUDIOSET_23, OBJECTS, multi_hot
from avsep.records import Segment
from pipelines import finetune

SIZE = 64  # pixels
NAMES = ("drum", "flute", "violin")


def model() -> Model:
    return Model(ModelConfig(), MIML(9, len(OBJECTS), 1, 4))


def test_a_networks_outputs_are_grouped_into_objects_and_none() -> None:
    groups = finetuning.class_groups(None, AUDIOSET_23)
    assert groups.shape == (1000, len(OBJECTS) + 1) and torch.equal(groups.sum(1), torch.ones(1000))
    assert groups[:, 1].nonzero().flatten().tolist() == list(range(151, 269))  # dog
    assert finetuning.class_groups((889, finetuning.BACKGROUND), AUDIOSET_23)[:, [18, -1]].tolist() == [[1, 0], [0, 1]]


def logits_for(pictures: list[list[str]], groups: torch.Tensor, classes: tuple[int, ...]) -> torch.Tensor:
    """One clip's logits, sure of what each picture shows, shared equally where it shows several."""
    logits = torch.full((1, len(pictures), len(classes)), -8.0)
    for i, names in enumerate(pictures):
        for name in names:
            logits[0, i, classes.index(next(o for o in OBJECTS if o.name == name).imagenet[0])] = 8.0
    return logits


def test_every_picture_needs_a_label_and_every_label_a_picture() -> None:
    classes = finetuning.untrained("squeezenet1_1", 0, AUDIOSET_23).classes
    assert classes is not None
    groups, labels = finetuning.class_groups(classes, AUDIOSET_23), multi_hot(["drum", "flute"])[None]

    def loss(*pictures: list[str]) -> float:
        return float(finetuning.image_loss(logits_for(list(pictures), groups, classes), labels, groups, 8.0))

    each = loss(["drum"], ["flute"], ["drum"], ["flute"])
    assert each < loss(["drum"], ["drum"], ["drum"], ["drum"]) - 0.5  # the flute is nowhere
    assert each < loss(["drum"], ["flute"], ["dog"], ["flute"]) - 0.5  # nobody labelled a dog
    assert loss(["drum", "flute"], ["drum", "flute"]) < loss(["drum"], ["drum"]) - 0.5


def test_pictures_are_a_bag_like_bases() -> None:
    torch.manual_seed(0)
    relation = torch.randn(2, 23, 5)
    probabilities = torch.cat([relation, torch.zeros(2, 1, 5)], 1).softmax(1).transpose(1, 2)  # (B, P, L + 1)
    labels = torch.rand(2, 23) < 0.2
    found = finetuning.image_loss(probabilities.log(), labels, torch.eye(24), 3.0)
    torch.testing.assert_close(found, partial_label_loss(relation, labels, presence=3.0))


def test_targets_weigh_three_voices() -> None:
    given, none = multi_hot(["drum", "dog"]), torch.zeros(len(OBJECTS))
    scores, shares = none.clone(), none.clone()
    for name, score, share in (("drum", 0.1, 0.5), ("dog", 0.1, 0.0), ("flute", 0.9, 0.3), ("cat", 0.9, 0.01)):
        scores[multi_hot([name])], shares[multi_hot([name])] = score, share
    assert finetuning.targets("labels", given, shares, scores, model()) is given
    expected = {
        "agreement": ["drum", "flute"],  # both heard for sure, and 0.1 and 0.9 are above 0.05
        "both": ["drum", "flute"],  # given and heard; seen and heard; the dog is only given, the cat only seen
    }
    for kind, names in expected.items():
        found = finetuning.targets(kind, given, shares, scores, model())
        assert found is not None and torch.equal(found, multi_hot(names))
    unseen = finetuning.targets("agreement", given, shares, None, model())
    assert unseen is not None and torch.equal(unseen, multi_hot(["drum", "flute"]))
    kept = finetuning.targets("both", given, shares, None, model())
    assert kept is not None and torch.equal(kept, multi_hot(["drum"]))
    assert finetuning.targets("labels", None, shares, scores, model()) is None


@pytest.fixture(scope="module")
def albums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Generated videos' pictures by split, and what each clip shows."""
    folder = tmp_path_factory.mktemp("albums")
    config = synthetic.SceneConfig(objects=NAMES, hidden_share=0, silent_share=0, images_per_s=1)
    found = {}
    for split, count in (("train", 40), ("val", 20)):
        clips, labels = [], {}
        for number in range(count):
            plan = synthetic.plan_scene(number, split, 3, config)
            pictures = [
                np.asarray(Image.fromarray(f).crop((40, 0, 280, 240)).resize((SIZE, SIZE)))
                for f in synthetic.images(plan)
            ]
            clips.append((plan.segment_id, np.stack(pictures)))
            labels[plan.segment_id] = multi_hot(list(plan.visible))
        path = str(folder / f"{split}.parquet")
        write_album(path, clips)
        found[split] = path, labels
    return found


def test_an_epoch_has_every_clip_once_and_ranks_share_it(albums) -> None:
    path, labels = albums["train"]
    config = FinetuningConfig(batch_clips=10, images_a_clip=4)
    whole = list(finetuning.batches([path], labels, config, 0))
    assert [p.shape for p, _ in whole] == [(10, 4, SIZE, SIZE, 3)] * 4
    seen = sorted(map(tuple, torch.cat([y for _, y in whole]).tolist()))
    assert seen == sorted(map(tuple, torch.stack(list(labels.values())).tolist()))
    parts = [list(finetuning.batches([path], labels, config, 0, rank, 2)) for rank in (0, 1)]
    for (pictures, _), (a, _), (b, _) in zip(whole, *parts, strict=True):
        assert torch.equal(pictures[0::2], a) and torch.equal(pictures[1::2], b)
    other = next(iter(finetuning.batches([path], labels, config, 1)))
    assert not torch.equal(other[0], whole[0][0])


def test_a_weak_start_learns_from_labels_of_whole_clips(albums) -> None:
    """It saw four drawings an object; no picture of the clips is labelled, only each clip as a whole."""
    rng = np.random.default_rng(0)
    drawn = [synthetic.draw(n, rng).resize((SIZE, SIZE)) for n in (*NAMES, None) for _ in range(4)]
    index = {o.name: o.imagenet[0] for o in OBJECTS if o.imagenet}
    classes = [*(index[n] for n in NAMES), finetuning.BACKGROUND]
    pixels = np.stack([np.asarray(d) for d in drawn])
    labeller = synthetic.train_small_labeller(pixels, np.repeat(range(4), 4).tolist(), classes, epochs=3, batch_size=8)
    before = finetuning.agreement(finetuning.score_album(labeller, albums["val"][0], AUDIOSET_23), albums["val"][1])

    config = FinetuningConfig(epochs=10, batch_clips=6, learning_rate=3e-3)
    path, labels = albums["train"]
    optimiser = torch.optim.AdamW(labeller.network.parameters(), config.learning_rate, weight_decay=1e-2)
    rate = finetuning.one_cycle(config.learning_rate)
    losses = []
    for epoch in range(config.epochs):
        parts = finetuning.batches([path], labels, config, epoch)
        losses.append(finetuning.train_epoch(labeller, parts, optimiser, config, rate, 8, epoch, AUDIOSET_23))
    after = finetuning.agreement(finetuning.score_album(labeller, albums["val"][0], AUDIOSET_23), albums["val"][1])
    assert losses[-1] < losses[0]
    assert after["map"] > before["map"] + 0.05 and after["agreement"] > before["agreement"] + 0.05


def test_dropout_leaves_names_and_answers_alone() -> None:
    torch.manual_seed(0)
    network = vision.build_network("shufflenet_v2_x0_5", 5).eval()
    x, names = torch.randn(2, 3, 64, 64), list(network.state_dict())
    plain = network(x)
    finetuning.add_dropout(network, 0.5)
    assert list(network.state_dict()) == names and torch.equal(network(x), plain)
    network.fc.train()
    assert not torch.equal(network(x), plain)


def test_what_cannot_be_had_is_counted(tmp_path: Path) -> None:
    """Damaged where it is, or in the store of media."""
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 12)
    noise = str(tmp_path / "noise.mp4")
    segments = [Segment("a", noise, 0.0, 1.0), Segment("b", "youtube:abcdefghijk", 0.0, 1.0)]
    store = MediaStore(str(tmp_path), {"b": noise}, set(), {})
    assert keep_images(str(tmp_path / "album"), Looking("centre", SIZE), segments, store) == (0, 2)


def test_the_middle_of_each_picture_is_kept_at_the_networks_size(rendered: Path, tmp_path: Path) -> None:
    path, album = min((rendered / "clips").iterdir()), str(tmp_path / "album")
    assert keep_images(album, Looking("centre", SIZE), [Segment("a", str(path), 0.0, 2.0)], None) == (1, 0)
    ((name, jpegs),) = read_album(album)
    kept = open_images(jpegs).astype(int)
    assert name == "a" and kept.shape == (2, SIZE, SIZE, 3)
    height, width = (images := media.decode(path, 0.0, 2.0).images).shape[1:3]
    side = round(7 / 8 * height)  # they are wider than high
    top, left = (height - side) // 2, (width - side) // 2
    for picture, found in zip(images, kept, strict=True):
        middle = Image.fromarray(picture[top : top + side, left : left + side])
        assert np.abs(found - np.asarray(middle.resize((SIZE, SIZE), Image.Resampling.BICUBIC))).mean() < 4


def test_pictures_of_another_excerpt_of_the_same_id_are_decoded_anew() -> None:
    """Not so where only its labels were corrected."""

    def name(**changes: object) -> str:
        (shard,) = shards.plan([replace(Segment("a", "/a.mp4", 0.0, 1.0, "train", None, ("dog",)), **changes)])
        return album_name("train", shard)

    assert name() == name(labels=("cat",), split="val") != name(end_s=2.0) != name(source="/b.mp4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "agreement"], ["--clips", "--model"]),
        (["--targets", "labels", "--epochs", "0"], ["--epochs 0"]),
        (["--targets", "labels", "--weights", "nowhere.pth"], ["nowhere.pth"]),
        (["--targets", "labels", "--architecture", "nosuchnet"], ["nosuchnet"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(rendered: Path, tmp_path: Path, capfd, arguments, words) -> None:
    command = ["--segments", str(rendered / "segments.csv"), "--out", str(tmp_path), "--in-process", *arguments]
    assert finetune.main(command) == 2
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pipelines.finetune:")]
    for word in words:
        assert word in message


def test_clips_that_lists_name_are_left_out_of_learning_and_choosing(rendered: Path, tmp_path: Path, capfd) -> None:
    video = min((rendered / "clips").iterdir())
    rows = [f"{i},{video},0,1,{'train' if i < 'n' else 'val'},drum" for i in ("a", "b", "c", "v", "w")]
    (tmp_path / "clips.csv").write_text("\n".join(["segment_id,source,start_s,end_s,split,labels", *rows, ""]))
    command = ["--segments", str(tmp_path / "clips.csv"), "--targets", "labels", "--architecture", "squeezenet1_1"]

    def finetuned(out: str, *without: str) -> tuple[int, str]:
        (tmp_path / "list.csv").write_text("\n".join(["segment_id", *without, ""]))
        lists = ["--without", str(tmp_path / "list.csv"), "--epochs", "1", "--in-process"]
        status = finetune.main([*command, "--out", str(tmp_path / out), *lists])
        told = capfd.readouterr()
        return status, told.out + told.err

    status, told = finetuned("some", "b", "w", "nobody")
    assert status in (0, 1) and "2 clips to learn from, 1 for validation" in told, told
    assert "finetune: 2 of the clips are left out by --without" in told
    assert "1 of the 3 ids of --without are no clips" in told
    status, told = finetuned("others", "nobody")
    assert status == 2 and "none of the 1 ids is a clip" in told
    status, told = finetuned("nothing", "v", "w")
    assert status == 2 and "--without leaves nothing of split val" in told
