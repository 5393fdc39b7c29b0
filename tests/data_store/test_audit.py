"""The audit of a real extraction: it finds every kind of planted damage, and nothing else."""

import csv
import hashlib
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from avsep import audit, duplicates, media, shards, stages, synthetic
from avsep.factors import DataConfig, ExtractionConfig, Factors, factorize, seed_of
from avsep.model import Labelling, label_config
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import Rejection, Segment, clips_from_table, clips_to_table
from pipelines import audit as program

CONFIG = ExtractionConfig(n_bases=12, n_iter=40)
CONFIGURATION = DataConfig(CONFIG, AUDIOSET_23).as_dict()


def logits(name: int | None) -> np.ndarray:
    """Log-probabilities of three pictures that surely show one ImageNet class, or nothing sure."""
    made = torch.zeros(3, 1000)
    if name is not None:
        made[:, name] = 20
    return made.log_softmax(1).numpy()


def record_of(sound: np.ndarray, segment: Segment, picture: int | None = None):
    folder = Path(segment.source).parent
    folder.mkdir(exist_ok=True)
    soundfile.write(segment.source, sound, 48_000, subtype="PCM_16")
    decoded = stages.decode(replace(segment, labels=()), CONFIG)
    factors = factorize(decoded.clip.waveform, seed_of(segment.segment_id), CONFIG)
    return stages.to_record(segment, decoded, factors, None if picture is None else logits(picture), 48_000)


def performance(name: str, number: int, seconds: float = 8.0) -> np.ndarray:
    return synthetic.performance(name, np.random.default_rng(number), seconds) / 2


@pytest.fixture(scope="module")
def extraction(tmp_path_factory) -> Path:
    """Two shards, of which one was retried: eleven clips in three splits, three standing rejections."""
    folder = tmp_path_factory.mktemp("audit")
    out = str(folder / "clips")
    rows = []
    for n, name in enumerate(("violin", "drum", "dog", "flute", "motorcycle", "acoustic_guitar", "violin", "drum")):
        split = "train" if n < 5 else "val" if n < 7 else "test"
        segment = Segment(f"c{n}", str(folder / "media" / f"c{n}.flac"), 0.0, 8.0, split, (name,), (name,))
        rows.append(record_of(performance(name, n), segment))
    both = Segment("seen", str(folder / "media" / "seen.flac"), 0.0, 8.0, "train", ("dog", "violin"))
    rows.append(record_of(performance("dog", 50), both, picture=151))
    wrong = Segment("wrong", str(folder / "media" / "wrong.flac"), 0.0, 8.0, "train", ("flute",))
    rows.append(record_of(performance("flute", 51), wrong, picture=151))

    def reject(*ids: str, attempts: int = 1) -> list[Rejection]:
        return [Rejection(i, "decode", "timed_out" if i == "t" else "missing", True, attempts) for i in ids]

    write = {"configuration": CONFIGURATION, "shape": CONFIG.shape}
    shards.write_shard(out, "a", 0, rows[:5], reject("t", "m"), **write)
    shards.write_shard(out, "b", 0, rows[5:], reject("m2", "late"), **write)
    late = Segment("late", str(folder / "media" / "late.flac"), 0.0, 8.0, "train", None, ())
    retried = [record_of(performance("violin", 60), late)]
    shards.write_shard(out, "b", 1, retried, reject("m2", attempts=2), retried=["m2", "late"], **write)
    return folder / "clips"


@pytest.fixture
def clips(extraction, tmp_path) -> Path:
    shutil.copytree(extraction, tmp_path / "clips")
    return tmp_path / "clips"


def run(clips: Path) -> tuple[int, dict]:
    out = clips.parent / "audit"
    status = program.main(["--clips", str(clips), "--out", str(out)])
    return status, json.loads((out / "card.json").read_text())


def test_a_whole_extraction_has_no_findings_and_true_counts(clips, capfd):
    status, card = run(clips)
    assert status == 0 and card["damage"] == [] and card["duplicates"] == []
    assert card["clips"] == {"train": 8, "val": 2, "test": 1}
    assert card["rejections"] == {"missing": 2, "timed_out": 1} and card["rejections_by_stage"] == {"decode": 3}
    assert card["objects"]["violin"] == {"train": 2, "val": 1, "test": 0}
    assert card["labels"]["dog"] == {"train": 3, "val": 0, "test": 0}
    assert card["unlabelled"] == card["labelled_none"] == {"train": 1, "val": 0, "test": 0}
    assert card["label_source"] == {"given": 9, "pictures": 2}
    assert card["cooccurrence"]["drum"] == {"drum": 2}
    pictures = card["agreement"]["pictures"]
    assert pictures["clips"] == 2
    dog = {"both": 1, "label_only": 1, "tag_only": 0, "precision": 0.5, "recall": 1.0}
    assert pictures["objects"]["dog"] == dog
    assert pictures["objects"]["violin"]["recall"] == 0 and pictures["objects"]["violin"]["precision"] is None
    assert card["agreement"]["given"]["clips"] == 8  # one clip's tags aren't known
    assert sum(card["duration_s"]["counts"]) == sum(card["rms_db"]["counts"]) == 11
    assert card["duration_s"]["counts"][16] == 11  # from 8.0 to 8.5 s
    text = (clips.parent / "audit" / "card.md").read_text()
    assert "| violin |" in text and "n_bases" in text
    for plot in ("cooccurrence.png", "distributions.png"):
        assert plot in text and (clips.parent / "audit" / plot).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (clips.parent / "audit").iterdir()} == {
        *("card.md", "card.json", "cooccurrence.png", "distributions.png"),
        *("still.csv", "stops.csv", "again.csv", "disagree.csv"),
    }
    for kind, unknown in (("still", 11), ("stops", 0), ("again", 0), ("disagree", 11)):  # the starter has 25 bases
        assert not any(card["suspects"][kind]["clips"].values())
        assert sum(card["suspects"][kind]["unknown"].values()) == unknown
    assert "Traceback" not in capfd.readouterr().err


def commit_path(clips: Path, name: str) -> Path:
    return clips / "commits" / f"{name}.json"


def data_path(clips: Path, name: str, kind: str = "clips") -> Path:
    return clips / json.loads(commit_path(clips, name).read_text())[kind]["path"]


def edit_commit(clips: Path, name: str, **changes) -> None:
    path = commit_path(clips, name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(clips: Path, name: str, change, metadata: dict[bytes, bytes] | None = None) -> str:
    """Write a clip file anew after `change(records)`, hash and all, as a program with a bug would."""
    path = data_path(clips, name)
    table = pq.read_table(path)
    kept = table.schema.metadata | (metadata or {})
    records = clips_from_table(table)
    table = change(records) if change else table
    if isinstance(table, list):
        table = clips_to_table(table, *CONFIG.shape)
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata((table.schema.metadata or {}) | kept), sink)
    path.write_bytes(sink.getvalue())
    commit = json.loads(commit_path(clips, name).read_text())
    commit["clips"]["sha256"] = hashlib.sha256(sink.getvalue()).hexdigest()
    commit_path(clips, name).write_text(json.dumps(commit))
    return f"clips/{path.name}"


def flipped(clips):
    path = data_path(clips, "a-g0")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return [("hash", f"clips/{path.name}")]


def truncated(clips):
    path = data_path(clips, "b-g0")
    path.write_bytes(path.read_bytes()[:-100])
    return [("hash", f"clips/{path.name}")]


def missing(clips):
    path = data_path(clips, "b-g1", "rejections")
    path.unlink()
    return [("missing", f"rejections/{path.name}")]


def orphan(clips):
    shutil.copy(data_path(clips, "a-g0"), clips / "clips" / "z-g0-0123456789ab.parquet")
    return [("orphan", "clips/z-g0-0123456789ab.parquet")]


def temporary(clips):
    names = ["commits/a-g1.json.7.ab.tmp", "rejections/a-g1-0123.parquet.h.7.ab.tmp"]
    for name in names:
        (clips / name).write_text("{")
    return [("temporary", name) for name in names]


def without_commit(clips):
    names = [data_path(clips, "b-g0", kind) for kind in ("clips", "rejections")]
    commit_path(clips, "b-g0").unlink()
    return [("orphan", f"{p.parent.name}/{p.name}") for p in names]


def not_a_number(clips):
    def change(records):
        records[1].bases = records[1].bases.copy()
        records[1].bases[5, 2] = np.nan
        return records

    return [("record", rewrite(clips, "a-g0", change))]


def not_normalised(clips):
    def change(records):
        records[0].bases = records[0].bases * np.float16(0.5)
        return records

    return [("record", rewrite(clips, "a-g0", change))]


def infinite_level(clips):
    def change(records):
        records[0].rms_db = -np.inf
        return records

    return [("record", rewrite(clips, "b-g1", change))]


def unknown_split(clips):
    def change(records):
        records[0].split = "dev"
        return records

    return [("record", rewrite(clips, "b-g1", change))]


def row_lost(clips):
    return [("ids", rewrite(clips, "a-g0", lambda records: records[1:]))]


def row_twice(clips):
    return [("ids", rewrite(clips, "a-g0", lambda records: [*records, records[0]]))]


def column_lost(clips):
    def change(records):
        return clips_to_table(records, *CONFIG.shape).drop_columns(["rms_db"])

    return [("schema", rewrite(clips, "a-g0", change))]


def other_version(clips):
    return [("schema", rewrite(clips, "a-g0", None, {b"avsep.schema_version": b"99"}))]


def other_version_of_the_commit(clips):
    edit_commit(clips, "a-g0", schema_version=1)
    return [("schema", "commits/a-g0.json")]


def other_configuration(clips):
    changed = json.dumps(CONFIGURATION | {"n_iter": 41}).encode()
    return [("digest", rewrite(clips, "a-g0", None, {b"avsep.configuration": changed}))]


def wrong_digest(clips):
    path = data_path(clips, "a-g0", "rejections")
    edit_commit(clips, "a-g0", digest="0" * 16)
    return [
        ("digest", "commits/a-g0.json"),
        ("digest", f"clips/{data_path(clips, 'a-g0').name}"),
        ("digest", f"rejections/{path.name}"),
    ]


def broken_commit(clips):
    commit_path(clips, "b-g1").write_text('{"shard": ')
    return [("commit", "commits/b-g1.json")]


def renamed_commit(clips):
    commit_path(clips, "a-g0").rename(commit_path(clips, "c-g0"))
    return [("commit", "commits/c-g0.json")]


def clip_and_rejection(clips):
    with_clip = shards.Rejection("c0", "decode", "missing")
    shards.write_shard(str(clips), "x", 0, [], [with_clip], configuration=CONFIGURATION, shape=CONFIG.shape)
    return [("twice", "commits/x-g0.json")]


def rejected_after_it_was_a_clip(clips):
    again = shards.Rejection("c0", "decode", "missing")
    kept = [Rejection(i, "decode", "missing") for i in ("t", "m")]
    shards.write_shard(str(clips), "a", 1, [], [again, *kept], configuration=CONFIGURATION, shape=CONFIG.shape)
    return [("twice", "commits/a-g1.json")]


def clip_twice(clips):
    (record, *_) = clips_from_table(pq.read_table(data_path(clips, "a-g0")))
    shards.write_shard(str(clips), "x", 0, [record], [], configuration=CONFIGURATION, shape=CONFIG.shape)
    return [("twice", "commits/x-g0.json")]


def rejection_twice(clips):
    again = [Rejection("m", "decode", "missing")]
    shards.write_shard(str(clips), "x", 0, [], again, configuration=CONFIGURATION, shape=CONFIG.shape)
    return [("twice", "commits/x-g0.json")]


DAMAGE = [
    *(flipped, truncated, missing, orphan, temporary, without_commit, not_a_number, not_normalised, infinite_level),
    *(unknown_split, row_lost, row_twice, column_lost, other_version, other_version_of_the_commit),
    *(other_configuration, wrong_digest, broken_commit, renamed_commit, clip_and_rejection),
    *(rejected_after_it_was_a_clip, clip_twice, rejection_twice),
]


def check(clips: Path) -> list[tuple[str, str]]:
    """What the program maps over the files, without Beam."""
    commits, findings = audit.check_commits(str(clips))
    for work in program.plan(commits):
        findings += audit.check_file(str(clips), *work)[0].damage
    return sorted((f.kind, f.path) for f in findings)


@pytest.mark.parametrize("plant", DAMAGE)
def test_planted_damage_is_found_and_nothing_else(clips, plant):
    assert check(clips) == []
    planted = plant(clips)
    assert check(clips) == sorted(planted)


def test_damage_of_many_kinds_together_ends_with_status_1_and_names_the_files(clips, capfd):
    planted = [*flipped(clips), *orphan(clips), *temporary(clips), *infinite_level(clips), *missing(clips)]
    status, card = run(clips)
    assert status == 1
    assert sorted((f["kind"], f["path"]) for f in card["damage"]) == sorted(planted)
    said = capfd.readouterr().out
    assert all(f"damaged: {path}" in said for _, path in planted)
    assert card["clips"]["train"] == 8 - 5 - 1  # what is damaged isn't counted


def test_another_vocabulary_is_counted_though_the_first_file_is_damaged(extraction, tmp_path):
    own, out = Vocabulary.of(("theremin",)), tmp_path / "clips"
    write = {"configuration": DataConfig(CONFIG, own).as_dict(), "shape": CONFIG.shape}
    (record,) = clips_from_table(pq.read_table(data_path(extraction, "b-g1")))
    for shard in ("a", "b"):
        named = replace(record, segment_id=shard, objects=own.names, labels=own.names)
        shards.write_shard(str(out), shard, 0, [named], [], **write)
    data_path(out, "a-g0").write_bytes(b"")
    status, card = run(out)
    assert status == 1 and card["labels"] == {"theremin": {"train": 1, "val": 0, "test": 0}}


def test_a_retry_in_another_shard_is_no_damage(clips):
    """The manifest grew: shard x holds what shard b had rejected, made a clip or rejected again."""
    (record, *_) = clips_from_table(pq.read_table(data_path(clips, "a-g0")))
    record.segment_id = "m2"
    write = {"configuration": CONFIGURATION, "shape": CONFIG.shape, "retried": ["m2", "m"]}
    shards.write_shard(str(clips), "x", 0, [record], [Rejection("m", "decode", "missing", attempts=2)], **write)
    assert check(clips) == []


def reencoded(sound: np.ndarray, path: Path, gain_db: float) -> np.ndarray:
    wav, mp3 = path.with_suffix(".wav"), path.with_suffix(".mp3")
    soundfile.write(wav, sound * 10 ** (gain_db / 20), 48_000)
    subprocess.run([media.ffmpeg_executable(), "-loglevel", "error", "-i", wav, "-b:a", "48k", mp3], check=True)
    return media.decode(mp3).waveform


def test_planted_duplicates_across_splits_are_found_and_nothing_else(clips, tmp_path):
    """The same file; the same sound re-encoded at another gain; shifted; another excerpt of one file."""
    folder = tmp_path / "copies"
    folder.mkdir()

    def segment(name: str, split: str, source: str | None = None, start_s: float = 0.0) -> Segment:
        return Segment(name, source or str(folder / f"{name}.flac"), start_s, start_s + 8.0, split, None, ("drum",))

    long = performance("drum", 90, 9.0)
    rows = [
        record_of(performance("violin", 0), segment("copy", "test")),
        record_of(reencoded(performance("dog", 2), folder / "quiet", -9), segment("quiet", "val")),
        record_of(reencoded(performance("flute", 51), folder / "loud", 3), segment("loud", "test")),
        record_of(performance("violin", 70), segment("train-only", "train")),
        record_of(performance("violin", 70) * 0.5, segment("train-again", "train")),
        record_of(long[: 8 * 48_000], segment("early", "train")),
        record_of(long[16_000 : 16_000 + 8 * 48_000], segment("shifted", "val")),
    ]
    (original, *_) = clips_from_table(pq.read_table(data_path(clips, "a-g0")))
    rows[0].media_sha256 = original.media_sha256
    other = performance("motorcycle", 80, 20.0)
    whole = str(folder / "whole.flac")
    rows.append(record_of(other, segment("part", "train", whole)))
    rows.append(record_of(other, segment("another-part", "test", whole, 10.0)))
    shards.write_shard(str(clips), "x", 0, rows, [], configuration=CONFIGURATION, shape=CONFIG.shape)
    status, card = run(clips)
    assert status == 0 and card["damage"] == []  # leakage is told, and is no damage
    found = {(p["kind"], frozenset((p["one"], p["other"]))) for p in card["duplicates"]}
    assert found == {
        ("exact", frozenset(("copy", "c0"))),
        ("near", frozenset(("quiet", "c2"))),
        ("near", frozenset(("loud", "wrong"))),
        ("near", frozenset(("shifted", "early"))),
        ("source", frozenset(("part", "another-part"))),
    }
    assert len(card["duplicates"]) == 5
    with (clips.parent / "audit" / "again.csv").open(newline="") as f:  # what is held out is kept
        again = {row["segment_id"]: row["why"] for row in csv.DictReader(f)}
    assert again["c0"] == "the same excerpt as copy (test)" and again["c2"].startswith("the same sound as quiet (val)")
    assert set(again) == {"c0", "c2", "wrong", "early", "train-only"}


def test_fingerprints_tell_the_same_sound_from_its_likes():
    """Twelve performances, two an object: each is nearest to its own noisy, quieter self."""

    def drawn(sound: np.ndarray, name: str) -> np.ndarray:
        factors = factorize(torch.from_numpy(sound.astype(np.float32)), seed_of(name), CONFIG)
        decoded = stages.Decoded(stages.Clip(sound.astype(np.float32), 48_000, np.empty((0, 8, 8, 3), np.uint8)), "")
        record = stages.to_record(Segment(name, "x"), decoded, factors, None, 48_000)
        print_ = duplicates.fingerprint(record, 0.05)
        assert print_ is not None and print_.shape == (600,)
        return print_ / np.linalg.norm(print_.astype(float))

    rng = np.random.default_rng(0)
    sounds = [performance(name, 100 + n, 10.0) for n in range(2) for name in synthetic.OBJECTS]
    clean = np.stack([drawn(s, f"a{i}") for i, s in enumerate(sounds)])
    noisy = np.stack([drawn(s / 3 + 3e-4 * rng.standard_normal(len(s)), f"b{i}") for i, s in enumerate(sounds)])
    similarity = noisy @ clean.T
    assert np.diag(similarity).min() > duplicates.NEAR
    assert (similarity - 2 * np.eye(12)).max() < duplicates.NEAR


def test_labels_follow_from_the_evidence_as_it_was_gathered():
    """Several looks' log-probabilities stand as they are: a violin of .35 beside a dog of .9 is a label."""
    row = np.full((1, 1000), np.log(1e-5), np.float32)
    row[0, [151, 889]] = np.log([0.9, 0.35])
    waveform = np.zeros(4800, np.float32)
    factors = Factors(torch.ones(2401, 1), torch.ones(1, 3), 0.0)
    decoded = stages.Decoded(stages.Clip(waveform, 48_000, np.empty((0, 8, 8, 3), np.uint8)), "")
    record = stages.to_record(Segment("x", "x"), decoded, factors, row, 48_000)
    tiles, centre = (Labelling(label_config(None, way), AUDIOSET_23) for way in ("tiles", "centre"))
    assert audit.seen_labels(record, tiles) == ("dog", "violin")
    assert audit.seen_labels(record, centre) == ("dog",)  # a softmax makes it .28
    assert audit.seen_labels(replace(record, image_logits=None), tiles) is None


def test_clips_without_events_or_too_short_have_no_fingerprint():
    t = np.arange(8 * 48_000) / 48_000
    hum = np.sin(2 * np.pi * 100 * t).astype(np.float32)
    for sound in (hum, performance("drum", 0)[: 2 * 48_000].astype(np.float32)):
        factors = factorize(sound, 0, CONFIG)
        decoded = stages.Decoded(stages.Clip(sound, 48_000, np.empty((0, 8, 8, 3), np.uint8)), "")
        record = stages.to_record(Segment("x", "x"), decoded, factors, None, 48_000)
        assert duplicates.fingerprint(record, 0.05) is None


@pytest.mark.parametrize("arguments", [[], ["--clips", "nowhere", "--out", "x"], ["--clips", ".", "--out", "x", "--k"]])
def test_unusable_arguments_end_with_status_2(arguments, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = program.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capfd.readouterr().err
    assert error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
