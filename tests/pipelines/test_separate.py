"""Many files: names, rows, rejections and what a second run does, with a network that knows dogs and violins."""

import fnmatch
import functools
import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from avsep import many, shards, storage
from avsep.factors import ExtractionConfig
from avsep.model import LABELLER_FILE
from avsep.outputs import AS_IT_IS
from avsep.records import Segment
from avsep.stages import DeviceStages
from avsep.work import Work
from deploy import pages
from pipelines import runners, separate
from pipelines.devices import Devices, open_devices, open_stages
from pipelines.shardtasks import ShardTask
from tests.support.loopback import S3
from tests.support.planted import add_labeller, grey, planted_labeller, write_painted
from tests.support.serving import write_model
from tests.support.tones import DOG, RATE, UNSEEN, VIOLIN, model, tone
from tests.support.uris import everything


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model(UNSEEN).save(folder)
    return str(folder)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two files of one name, one of another, one that is damaged."""
    folder = tmp_path / "videos"
    for name in ("a/duet.wav", "b/duet.wav", "b/solo.wav"):
        write(folder / name)
    (folder / "b" / "bad.mp4").write_text("no media")
    return folder


def write(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = tone(DOG, seconds) / 4 + tone(VIOLIN, seconds, 2.0) / 4
    soundfile.write(path, sound.numpy(), RATE, format="WAV")


def run(model_dir: str, out: object, *arguments: object) -> int:
    return separate.main([*map(str, ["--model", model_dir, "--out", out, "--in-process", "--videos", *arguments])])


def rows(out: object, table: str = many.RESULTS) -> list[dict]:
    with storage.open_input(f"{out}/{table}") as f:
        return pq.read_table(f).to_pylist()


def written(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*.wav")}


def test_each_file_has_its_folder_and_rows_or_a_rejection(model_dir, videos, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert run(model_dir, out, videos / "a", videos / "b") == 0
    found = rows(out)
    assert [(r["folder"], r["object"]) for r in found] == [
        (folder, name) for folder in ("a-duet.wav", "b-duet.wav", "solo") for name in ("dog", "violin")
    ]
    for r in found:
        report = json.loads((out / r["folder"] / "separation.json").read_text())
        entry = next(o for o in report["objects"] if o["name"] == r["object"])
        assert r["share"] == entry["sound_score"] and r["confidence"] == entry["confidence"]
        assert (r["file"], r["found_from"], r["duration_s"]) == (report["source"], "sound", 1.0)
        assert (out / r["folder"] / r["sound"]).exists()
    sounds = [soundfile.read(p)[0] for p in (out / "solo").glob("*.wav")]
    np.testing.assert_allclose(sum(sounds), soundfile.read(videos / "b" / "solo.wav")[0], atol=1e-3)
    (rejected,) = rows(out, many.REJECTIONS)
    assert rejected["file"] == str(videos / "b" / "bad.mp4")
    assert (rejected["folder"], rejected["reason"], rejected["attempts"]) == ("bad", "unreadable", 1)
    patterns = pages.WRITES["separate"]
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    assert not [f for f in files if not any(fnmatch.fnmatch(f, p.removeprefix("?")) for p in patterns)]
    assert all(p[0] == "?" or fnmatch.filter(files, p) for p in patterns)
    assert "3 files separated and 1 rejected of 4" in capfd.readouterr().out
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_a_second_run_does_only_what_changed(model_dir, videos, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert run(model_dir, out, videos / "a", videos / "b") == 0
    before, first = written(out), rows(out)
    assert run(model_dir, out, videos / "a", videos / "b") == 0
    assert written(out) == before and rows(out) == first
    write(videos / "b" / "bad.mp4")  # mended
    write(videos / "b" / "solo.wav", 2.0)
    shutil.rmtree(out / "a-duet.wav")
    capfd.readouterr()
    assert run(model_dir, out, videos / "a", videos / "b") == 0
    assert "done again: 3 files" in capfd.readouterr().out
    after = written(out)
    assert {name.split("/")[0] for name in after if after[name] != before.get(name)} == {"a-duet.wav", "bad", "solo"}
    assert {r["duration_s"] for r in rows(out) if r["folder"] == "solo"} == {2.0}
    assert len(rows(out)) == 8 and rows(out, many.REJECTIONS) == []
    assert shards.read_ids(out / "_shards") == (["a-duet.wav", "b-duet.wav", "bad", "solo"], [])


def test_a_file_keeps_its_name_whatever_comes_beside_it(model_dir, videos, tmp_path) -> None:
    out = tmp_path / "out"
    assert run(model_dir, out, videos / "a") == 0
    before = written(out)
    assert run(model_dir, out, f"{videos}/[ab]/duet.wav") == 0
    assert {r["folder"]: r["file"] for r in rows(out)} == {
        "duet": str(videos / "a" / "duet.wav"),
        "duet.wav": str(videos / "b" / "duet.wav"),
    }
    assert before.items() <= written(out).items()


def test_names_follow_from_the_paths_alone() -> None:
    files = ["/a/x.mp4", "/b/X.mp4", "/b/results.parquet.mp4", "/c/_shards.wav", "/c/y.wav"]
    named = many.name_files(files, [Segment("y", "/t/y.wav")], None, {})
    names = [s.segment_id for s in named]
    assert names == ["y", "a-x.mp4", "b-X.mp4", "results.parquet.mp4", "_shards.wav", "y.wav"]
    before = {s.segment_id: s for s in named}
    assert many.name_files(files, named[:1], None, before) == named
    assert many.name_files(files[1:2], [], None, before)[0].segment_id == "b-X.mp4"  # though nothing collides now


def test_a_tables_rows_are_excerpts_with_objects_of_their_own(model_dir, videos, tmp_path, capfd) -> None:
    out, table = tmp_path / "out", videos / "table.csv"
    table.write_text(
        "segment_id,source,start_s,end_s,objects\nwhole,a/duet.wav,,,\npart,a/duet.wav,0.5,1,violin\n"
        "nothing,b/solo.wav,,,none\nremote,youtube:abc,0,10,\nlater,b/solo.wav,5,6,dog\n"
    )
    assert run(model_dir, out, table, "--objects", "dog") == 0
    assert [(r["folder"], r["object"], r["found_from"], r["duration_s"]) for r in rows(out)] == [
        ("nothing", None, None, 1.0),
        ("part", "violin", "given", 0.5),
        ("whole", "dog", "given", 1.0),
    ]
    whole, part = (soundfile.read(p)[0] for p in (videos / "a" / "duet.wav", out / "nothing" / "_rest.wav"))
    np.testing.assert_allclose(part, soundfile.read(videos / "b" / "solo.wav")[0], atol=1e-3)
    cut = sum(soundfile.read(out / "part" / name)[0] for name in ("violin.wav", "_rest.wav"))
    np.testing.assert_allclose(cut, whole[RATE // 2 :], atol=1e-3)
    assert {r["folder"]: r["reason"] for r in rows(out, many.REJECTIONS)} == {"remote": "missing", "later": "past_end"}
    table.write_text(table.read_text().replace("1,violin", "1,dog"))
    before = written(out)
    assert run(model_dir, out, table, "--objects", "dog") == 0
    assert [r["object"] for r in rows(out) if r["folder"] == "part"] == ["dog"]
    assert {name.split("/")[0] for name, at in written(out).items() if at != before.get(name)} == {"part"}
    table.write_text("segment_id,source\nwhole,b/solo.wav\n")
    assert run(model_dir, out, table, "--objects", "dog") == 2
    assert f"whole holds the sounds of {videos}/a/duet.wav" in capfd.readouterr().err


def test_another_model_or_other_options_are_refused(model_dir, videos, tmp_path, capfd) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    model(UNSEEN, overlap_s=0.2).save(other)
    assert run(model_dir, out, videos / "a") == 0
    before = written(out)
    for folder, options, words in (
        (model_dir, ["--format", "flac"], "another --format (wav, now flac)"),
        (model_dir, ["--objects", "dog"], "another --objects (none, now dog)"),
        (model_dir, ["--two-stems", "dog"], "another --two-stems (none, now dog)"),
        (str(other), [], "another --model"),
    ):
        assert run(folder, out, videos / "a", *options) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{out} was separated with {words}" in line and "give another --out" in line
    assert written(out) == before


def test_mistakes_are_one_line_and_make_nothing(model_dir, videos, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (videos / "table.csv").write_text("source,start_s\na/duet.wav,0.5\n")
    (videos / "reserved.csv").write_text("segment_id,source\n_shards,a/duet.wav\n")
    for arguments, words in (
        (["nosuch.wav"], "nosuch.wav doesn't exist"),
        ([tmp_path / "empty"], "is a folder without videos or sounds"),
        ([f"{videos}/*.mp4"], "matches no file"),
        ([videos / "a", "--objects", "oboe"], "unknown object 'oboe'"),
        ([videos / "table.csv", "--track", "2"], "excerpts, such as duet, are of the first track"),
        ([videos / "reserved.csv"], "'_shards' is a name of --out's own"),
    ):
        assert run(model_dir, out, *arguments) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert words in line
    model().save(tmp_path / "seeing")
    assert run(str(tmp_path / "seeing"), out, videos / "a", "--weights", videos / "table.csv") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "table.csv doesn't fit" in line and not out.exists()
    assert run(model_dir, videos, videos / "a") == 2 and "is to be separated" in capfd.readouterr().err
    assert run(model_dir, videos / "a" / "duet.wav", videos / "b") == 2 and "is a file" in capfd.readouterr().err


def test_sounds_that_cannot_be_written_as_asked_are_rejected(model_dir, videos, tmp_path) -> None:
    """A rate that mp3 lacks; somebody else's files in the folder."""
    out = tmp_path / "out"
    assert run(model_dir, out / "mp3", videos / "a", "--format", "mp3", "--mono") == 0
    (out / "duet").mkdir()
    (out / "duet" / "mine.wav").write_text("mine")
    assert run(model_dir, out, videos / "a") == 0
    for folder, words in ((out / "mp3", "2000 Hz, which mp3 can't hold"), (out, "mine.wav, which no separation wrote")):
        (rejected,) = rows(folder, many.REJECTIONS)
        assert rejected["reason"] == "refused" and words in rejected["detail"]
    assert [p.name for p in (out / "duet").iterdir()] == ["mine.wav"]


def test_windows_factorised_elsewhere_give_the_same_rows(model_dir, videos, tmp_path) -> None:
    """As a GPU's actor does it, here on the CPU."""
    assert run(model_dir, tmp_path / "here", videos / "a") == 0
    job = many.prepare(str(tmp_path / "there"), model_dir, None, None, 1, AS_IT_IS)
    make = functools.partial(open_stages, None, None)
    (actor,) = runners.InProcess().actors(make, 1, gpus=0.5)
    work = Work("shard", 0, tuple(many.name_files([str(videos / "a" / "duet.wav")], [], None, {})))
    task = ShardTask(job, work, Devices(None, functools.partial(actor, DeviceStages.factorize)))
    assert separate.separate_shard(task).n_clips == 1
    (commit,) = shards.read_commits(job.root)
    there = rows(job.root, commit.clips.path if commit.clips else "")
    for mine, theirs in zip(there, rows(tmp_path / "here"), strict=True):
        assert mine == {k: pytest.approx(v, rel=1e-3) if isinstance(v, float) else v for k, v in theirs.items()}


def test_a_gpu_says_where_objects_are_as_the_worker_itself_does(tmp_path, monkeypatch) -> None:
    """A CPU stands for it; whoever asks for logits alone gets no cells."""
    folder = write_model(tmp_path / "model")
    add_labeller(folder)
    video = write_painted(tmp_path / "duet.mp4", {"dog": (0.05, 0.2, 0.35, 0.7), "violin": (0.6, 0.3, 0.95, 0.8)}, 2.0)
    assert run(folder, tmp_path / "here", video) == 0
    monkeypatch.setattr(runners.InProcess, "n_gpus", 1)
    assert run(folder, tmp_path / "there", video) == 0
    reports = [json.loads((tmp_path / out / "duet" / "separation.json").read_text()) for out in ("here", "there")]
    here, there = ([(o["name"], o["visible"], o["boxes"]) for o in r["objects"]] for r in reports)
    assert [name for name, visible, boxes in here if visible and boxes] == ["dog", "violin"]
    assert there == here
    (devices,) = open_devices(runners.InProcess(), ExtractionConfig(), planted_labeller(), f"{folder}/{LABELLER_FILE}")
    assert devices.label and devices.label.classify(grey(64, 64)).result().cells is None


def test_results_go_to_an_object_store(model_dir, videos, s3: S3, s3_folder) -> None:
    for path in videos.rglob("*.*"):
        os.utime(path, (time.time() - 60,) * 2)  # the store tells times in whole seconds
    assert run(model_dir, s3_folder, videos / "a", videos / "b" / "bad.mp4", f"{s3_folder}-none/x.wav") == 0
    files = everything(s3_folder)
    assert {"duet/dog.wav", "duet/separation.json", "results.parquet", "rejections.parquet"} <= files.keys()
    assert [r["object"] for r in rows(s3_folder)] == ["dog", "violin"]
    assert {r["reason"] for r in rows(s3_folder, many.REJECTIONS)} == {"unreadable", "missing"}
    assert not [name for name in files if name.endswith((".lock", ".tmp"))]
    assert run(model_dir, s3_folder, videos / "a", videos / "b" / "bad.mp4", f"{s3_folder}-none/x.wav") == 0
    assert everything(s3_folder).keys() == files.keys()


def test_a_disk_that_is_full_stops_the_run_and_loses_nothing(model_dir, videos, tmp_path, capfd) -> None:
    """A limit on the size of files stands for it: what is committed stands, and the next run goes on."""
    write(videos / "a" / "vast.wav", 10.0)
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    try:
        assert run(model_dir, out, videos / "a") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out}/vast can't be written: System error. Is the disk full?" in capfd.readouterr().err
    assert run(model_dir, out, videos / "a") == 0
    assert {r["folder"] for r in rows(out)} == {"duet", "vast"}
