"""Clips that may teach something wrong are listed, each kind for its reason alone, and a training leaves them out."""

import csv
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from avsep import duplicates, media, model, shards, stages, suspects, synthetic
from avsep.factors import DataConfig, ExtractionConfig, factorize, seed_of
from avsep.objects import AUDIOSET_23
from avsep.records import Clip, ClipRecord, Segment
from avsep.vision import ImageLabeller
from pipelines import audit, collect, train
from tests.support import tones

CONFIG = tones.model().config.extraction  # 2 kHz, 6 bases
RATE, SECONDS = CONFIG.stft.sample_rate, 8.0
DOG, VIOLIN = tones.DOG, tones.VIOLIN


def pictures(*classes: int) -> np.ndarray:
    """Log-probabilities of pictures, each of which surely shows one ImageNet class."""
    rows = torch.zeros(len(classes), 1000)
    rows[range(len(classes)), list(classes)] = 12
    return rows.log_softmax(1).numpy()


def record_of(name: str, sound: Tensor | np.ndarray, images: np.ndarray | None = None, **fields: object) -> ClipRecord:
    """Record a sound at 2 kHz, as extraction would; `fields` are the segment's."""
    waveform = np.asarray(sound, np.float32)
    segment = Segment(name, f"/{name}.mp4", 0.0, len(waveform) / RATE)
    decoded = stages.Decoded(Clip(waveform, RATE, np.empty((0, 8, 8, 3), np.uint8)), f"{seed_of(name):064x}")
    factors = factorize(waveform, seed_of(name), CONFIG)
    return stages.to_record(replace(segment, **fields), decoded, factors, images, RATE)


def suspicions(record: ClipRecord, listener: suspects.Listener | None = None, way: str = "centre") -> dict:
    return dict(suspects.examine(record, way, None, listener))


def swell(seed: int, seconds: float = SECONDS) -> np.ndarray:
    """A level that comes and goes, of its own for each seed."""
    levels = np.random.default_rng(seed).random(40) ** 2
    return np.interp(np.arange(round(seconds * RATE)), np.linspace(0, seconds * RATE, 40), levels)


def noise(seed: int, seconds: float = SECONDS) -> np.ndarray:
    """Noise that comes and goes."""
    level = swell(seed, seconds)
    return 0.3 * (level * np.random.default_rng(seed).standard_normal(len(level))).astype(np.float32)


# ---------------------------------------------------------------------------------- still pictures


@pytest.mark.parametrize("way", ["tiles", "centre"])
def test_a_frozen_clip_is_still_and_a_rendered_one_is_not(way: str, tmp_path: Path) -> None:
    scene = synthetic.plan_scene(0, "train", 3)
    frames = synthetic.images(scene)
    height, width = frames.shape[1:3]
    labeller = ImageLabeller.load("efficientnet_lite0")
    changes = []
    for number, video in enumerate((frames, np.repeat(frames[:1], len(frames), 0))):
        path = tmp_path / f"{number}.mp4"
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "5", "-i", "pipe:"]
        command = [
            media.ffmpeg_executable(),
            "-loglevel",
            "error",
            *raw,
            "-c:v",
            "libx264",
            "-pix_fmt",
            "yuv420p",
            path,
        ]
        subprocess.run(command, input=video.tobytes(), check=True)
        images = media.decode(path, 0.0, 10.0, sound=False).images
        evidence = labeller.evidence(images, way).numpy()
        change = suspects.picture_change(record_of("c", noise(0), evidence), way)
        assert change is not None
        changes.append(change)
    moving, frozen = changes
    assert frozen < suspects.STILL[way] < moving / 2


def test_still_is_unknown_where_no_two_pictures_were_looked_at_alike() -> None:
    same = pictures(*[151] * 10)
    assert "changes by 0.000" in suspicions(record_of("a", noise(0), same))["still"]
    for images, way in ((None, "centre"), (same[:1], "centre"), (same[:8], "tiles")):
        assert suspicions(record_of("a", noise(0), images), way=way)["still"] is None
    assert "still" not in suspicions(record_of("a", noise(0), pictures(*[151] * 9, 889)))
    few = np.full((10, 1000), -np.inf)  # a network of three classes
    few[:, [1, 2, 3]] = np.log([0.2, 0.3, 0.5])
    assert suspicions(record_of("a", noise(0), few))["still"]
    few[5, [1, 2, 3]] = np.log([0.5, 0.2, 0.3])
    assert "still" not in suspicions(record_of("a", noise(0), few))


# ---------------------------------------------------------------------------------- sound that stops


def test_a_sound_that_stops_is_told_with_its_time() -> None:
    sound = noise(1)
    assert "stops" not in suspicions(record_of("a", sound))
    faint = np.where(np.arange(len(sound)) < 5 * RATE, sound, sound * 10 ** (-50 / 20))
    late = np.where(np.arange(len(sound)) < 6.3 * RATE, sound, 0)
    early = np.where(np.arange(len(sound)) < 5 * RATE, sound, 0)
    for heard in (faint, late, early[::-1].copy()):  # softly to the end, under two seconds, begins late
        assert "stops" not in suspicions(record_of("a", heard))
    assert suspicions(record_of("a", early))["stops"] == "no sound after 5.0 s of 8.0 s"
    assert suspects.sound_end_s(record_of("a", early)) == pytest.approx(5.0, abs=0.11)


def test_a_track_that_ends_before_the_pictures_or_the_excerpt_stops() -> None:
    short = noise(2, 5.0)
    assert "of 10.0 s" in suspicions(record_of("a", short, pictures(*range(970, 980))))["stops"]
    assert "stops" not in suspicions(
        record_of("a", short, pictures(*range(970, 975)), end_s=10.0)
    )  # as the pictures do
    assert "of 10.0 s" in suspicions(record_of("a", short, end_s=10.0))["stops"]


# ---------------------------------------------------------------------------------- pictures and sound


def test_pictures_and_sound_disagree_where_nothing_seen_is_heard() -> None:
    listener = suspects.Listener(tones.model())
    dog = record_of("a", tones.tone(DOG, SECONDS))

    def why(labels: Sequence[str] | None, seen: Sequence[str] | None = None) -> str | None:
        labelled = replace(dog, labels=None if labels is None else tuple(labels))
        return dict(suspects.examine(labelled, "centre", seen, listener)).get("disagree", "none")

    for names in (["violin"], ["violin", "cat"]):
        for given in ((names, None), (None, names)):
            said = why(*given)
            assert said is not None and "violin 0.0" in said and "heard: dog" in said
    for given in ((["dog"], None), (["violin"], ["dog"]), (["dog"], ["violin"]), (["dog", "violin"], None)):
        assert why(*given) == "none"
    for given in (([], []), (None, None), (["theremin"], None)):  # nothing seen, or what the model doesn't know
        assert why(*given) is None
    assert suspicions(replace(dog, labels=("violin",)))["disagree"] is None  # nobody listens
    assert not listener.takes(ExtractionConfig(stft=CONFIG.stft, n_bases=CONFIG.n_bases + 1))


# ---------------------------------------------------------------------------------- the same recording


def fact(name: str, start_s: float, split: str = "train", source: str = "/a.mp4", sha256: str = "0") -> dict:
    return {
        "segment_id": name, "split": split, "source": source, "media_sha256": sha256,
        "start_s": start_s, "end_s": None, "duration_s": 10.0,
    }  # fmt: skip


def test_excerpts_of_one_medium_are_the_same_where_they_share_more_than_half() -> None:
    def found(*facts: dict) -> set[tuple[str, str]]:
        return {(p.one, p.other) for p in duplicates.same_excerpts(facts)}

    assert found(fact("a", 0), fact("b", 4.9), fact("c", 5.1), fact("d", 10)) == {("a", "b")} | {("c", "d")}
    assert found(fact("a", 0), fact("z", 1, "val"), fact("y", 2, "test")) == {("y", "a"), ("y", "z")}
    remote = {"source": "youtube:abc"}
    assert found(fact("a", 0, **remote), fact("b", 30, **remote)) == {("a", "b")}  # the same bytes, cut out
    assert not found(fact("a", 0, **remote), fact("b", 30, sha256="1", **remote))


# ---------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen clips in two shards: seven dogs and violins as they should be, and suspects of every kind."""
    folder = tmp_path_factory.mktemp("suspects")
    moving = pictures(*range(970, 978))  # no object

    def tone(index: int, name: str, rhythm: float, **fields: object) -> ClipRecord:
        label = {DOG: ("dog",), VIOLIN: ("violin",)}[index]
        sound = tones.tone(index, SECONDS, rhythm).numpy() * (0.1 + swell(seed_of(name)))
        return record_of(name, sound, moving, **({"labels": label} | fields))

    good = [tone((DOG, VIOLIN)[i % 2], f"good{i}", 1 + 0.37 * i) for i in range(6)]
    good.append(tone(DOG, "val0", 2.2, split="val"))
    stopped = tone(DOG, "#stops", 1.7)
    before = np.arange(stopped.activations.shape[1]) < 60  # frames, 3 s
    stopped = replace(stopped, activations=stopped.activations * before)
    bad = [
        replace(good[0], segment_id="zagain", media_sha256="a" * 64),
        replace(good[6], segment_id="leak", split="train", media_sha256="b" * 64),
        replace(tone(DOG, 'still, "and" quoted', 2.9), image_logits=np.repeat(moving[:1], 8, 0).astype(np.float16)),
        stopped,
        tone(DOG, "disagree", 3.3, labels=("violin",)),
        tone(VIOLIN, "unseen", 3.9, labels=()),
        replace(tone(VIOLIN, "blind", 4.3), image_logits=None),
    ]
    write = {"configuration": DataConfig(replace(CONFIG, looks="centre"), AUDIOSET_23).as_dict(), "shape": CONFIG.shape}
    shards.write_shard(str(folder / "clips"), "a", 0, good, [], **write)
    shards.write_shard(str(folder / "clips"), "b", 0, bad, [], **write)
    tones.model().save(folder / "model")
    arguments = ["--clips", str(folder / "clips"), "--model", str(folder / "model"), "--out", str(folder / "audit")]
    assert audit.main(arguments) == 0
    return folder


LISTED = {
    "still": {'still, "and" quoted'}, "stops": {"#stops"}, "again": {"zagain", "leak"}, "disagree": {"disagree"},
}  # fmt: skip


def test_a_damaged_model_is_one_line(extraction: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Told before the clips are read: no worker says it again, with its stack."""
    tones.model().save(tmp_path / "model")
    (tmp_path / "model" / "miml.safetensors").write_bytes(b"cut")
    where = ["--clips", str(extraction / "clips"), "--out", str(tmp_path / "audit")]
    assert audit.main([*where, "--model", str(tmp_path / "model")]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "miml.safetensors" in told[0] and not (tmp_path / "audit").exists()


def test_an_audit_lists_and_counts_every_kind_and_nothing_else(extraction: Path) -> None:
    card = json.loads((extraction / "audit" / "card.json").read_text())
    (file,) = (c.clips.path for c in shards.read_commits(extraction / "clips") if c.shard == "b" and c.clips)
    for kind, ids in LISTED.items():
        with (extraction / "audit" / f"{kind}.csv").open(newline="") as f:
            rows = list(csv.DictReader(f))
        assert {row["segment_id"] for row in rows} == ids and len(rows) == len(ids)
        assert all(row["split"] == "train" and row["shard"] == file and row["why"] for row in rows)
        assert card["suspects"][kind]["clips"] == {"train": len(ids), "val": 0, "test": 0}
    assert {k: sum(one["unknown"].values()) for k, one in card["suspects"].items()} == {
        "still": 1, "stops": 0, "again": 0, "disagree": 1,
    }  # fmt: skip
    text = (extraction / "audit" / "card.md").read_text()
    assert "| the same recording under another id (`again.csv`) | 2 | 0 | 0 | 0 |" in text


def lists(extraction: Path, *kinds: str) -> list[str]:
    return ["--without", *(str(extraction / "audit" / f"{kind}.csv") for kind in kinds)]


def test_a_training_leaves_out_what_lists_name(extraction: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = extraction / "run"
    arguments = ["--clips", str(extraction / "clips"), "--out", str(out), "--recipe", "paper", "--in-process"]
    arguments += [*lists(extraction, "still", "stops"), *lists(extraction, "again", "disagree", "still")]
    assert train.main([*arguments, "--epochs", "1"]) == 0
    said = capfd.readouterr().out
    n_good = 6 + 1  # and `blind`; the one that shows nothing isn't for the published method
    assert f"train: {n_good} clips, 1 for validation" in said
    assert "left out: 5 named by --without, 1 without a label" in said
    facts = model.ModelConfig.read(out / "model").training
    assert (facts["clips"], facts["without"]) == (n_good, 5) and facts["clips_by_label"] == {"dog": 3, "violin": 4}
    # a resume is of the same clips
    assert train.main([*arguments[:6], "--epochs", "2", "--in-process", "--resume"]) == 2
    assert train.main([*arguments, "--epochs", "2", "--resume"]) == 0
    assert model.ModelConfig.read(out / "model").training["clips"] == n_good
    capfd.readouterr()
    command = ["--model", str(out / "model"), "--clips", str(extraction / "clips"), "--in-process"]
    assert collect.main([*command, *lists(extraction, "again")]) in (0, 1)  # perhaps no sure basis
    assert "collect: 2 of the clips are left out by --without" in capfd.readouterr().out


def test_lists_of_other_clips_are_refused_and_strangers_told(
    extraction: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--clips", str(extraction / "clips"), "--out", str(tmp_path / "run"), "--in-process"]
    mine = tmp_path / "mine.csv"
    for text, expected in (
        ("segment_id\nnosuch\n", "none of the 1 ids is a clip in"),
        ("id\nnosuch\n", "no column 'segment_id'"),
    ):
        mine.write_text(text)
        assert train.main([*arguments, "--without", str(mine)]) == 2
        error = capfd.readouterr().err
        assert expected in error and len(error.splitlines()) == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    mine.write_text("segment_id\nnosuch\ngood1\n")
    named, note = suspects.left_out([str(mine)], str(extraction / "clips"))
    assert named == {"good1"} and note.startswith("1 of the 2 ids of --without are no clips")
    assert suspects.left_out([], "nowhere") == (frozenset(), "")


def test_a_model_of_other_factors_is_refused(extraction: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changed = replace(tones.model().config, extraction=replace(CONFIG, n_bases=7))
    model.Model(changed, tones.model().network).save(extraction / "other")
    arguments = ["--clips", str(extraction / "clips"), "--out", str(extraction / "x")]
    assert audit.main([*arguments, "--model", str(extraction / "other")]) == 2
    assert "7 bases, the clips have" in capfd.readouterr().err


def test_an_id_may_be_a_number(tmp_path: Path) -> None:
    path = str(tmp_path / "ids.parquet")
    pq.write_table(pa.table({"segment_id": [0, 17]}), path)
    assert suspects.read_ids([path]) == {"0", "17"}
