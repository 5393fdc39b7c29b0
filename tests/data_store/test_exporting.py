"""Clips exported for others: the sound, pictures and labels of real files, once each, whatever is interrupted."""

import datetime
import fnmatch
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from avsep import exporting, media, shards, stages, storage
from avsep.factors import DataConfig, ExtractionConfig
from avsep.objects import AUDIOSET_23, N_IMAGENET_CLASSES
from avsep.records import Segment
from deploy import pages
from pipelines import export
from tests.support.tones import RATE, SMALL

CONFIG = ExtractionConfig(stft=SMALL, n_bases=3, n_iter=3, image_size=24, looks="centre")
MADE_WITH = DataConfig(CONFIG, AUDIOSET_23, "resnet152", "0" * 64)
SLOPE = "geq=lum='2*X+Y+40*T'"  # which grows lighter
SOURCES = ("a", "b.v2", "c d")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 3 s, with a slope and a chirp each."""
    folder = tmp_path_factory.mktemp("media")
    for number, name in enumerate(SOURCES):
        command = [media.ffmpeg_executable(), "-loglevel", "error"]
        command += ["-f", "lavfi", "-i", f"nullsrc=size=64x48:rate=10,format=gray,{SLOPE}", "-f", "lavfi"]
        command += ["-i", f"aevalsrc=0.4*sin(2*PI*t*({200 + 100 * number}+40*t)):s=16000", "-t", "3"]
        subprocess.run([*command, "-c:v", "ffv1", "-c:a", "flac", str(folder / f"{name}.mkv")], check=True)
    return folder


def segments_of(folder: Path) -> list[Segment]:
    a, b, c = (str(folder / f"{name}.mkv") for name in SOURCES)
    return [
        Segment("a_0", a, 0.0, 2.0, "train", None, ("dog",)),
        Segment("b.v2", b, 0.5, 2.5, "train", ("dog", "cat"), ("dog", "cat")),
        Segment("seen", b, 1.0, 3.0, "train"),
        Segment("ünï/".replace("/", "~"), c, 0.0, 1.0, "test", (), ()),
    ]


@pytest.fixture(scope="module")
def exported(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Media, their clips, and these as archives: to read alone."""
    folder = tmp_path_factory.mktemp("exported")
    extract(folder / "clips", segments_of(recorded))
    assert run(folder / "clips", folder / "out") == 0
    return recorded, folder / "clips", folder / "out"


@pytest.fixture
def made(recorded: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Media, and their clips: two shards, of which one has two splits."""
    folder, clips = tmp_path / "media", tmp_path / "clips"
    shutil.copytree(recorded, folder)
    extract(clips, segments_of(folder))
    return folder, clips


def extract(clips: Path, segments: list[Segment], generation: int = 0, locate: stages.Locate | None = None) -> None:
    for number, some in enumerate((segments[:2], segments[2:])):
        given = [replace(s, labels=s.labels if s.labels is not None else ()) for s in some]
        records, rejections, _ = stages.extract_records(given, CONFIG, None, locate)
        assert not rejections
        for record, segment in zip(records, some, strict=True):
            if segment.labels is None:  # as if a network had seen the dog
                logits = np.full((2, N_IMAGENET_CLASSES), -20, np.float16)
                logits[:, 207] = 20  # a golden retriever
                record.labels, record.image_logits, record.label_source = None, logits, "pictures"
        options = {"configuration": MADE_WITH.as_dict(), "shape": CONFIG.shape, "replaces": generation > 0}
        shards.write_shard(str(clips), f"{number:05d}-abcd", generation, records, [], **options)


def run(clips: Path, out: object, *arguments: object) -> int:
    options = [] if "--format" in arguments else ["--format", "webdataset"]
    return export.main([*map(str, ["--clips", clips, "--out", out, "--in-process", *options, *arguments])])


def samples_of(out: Path) -> dict[str, dict[str, bytes]]:
    """The files of every clip in the archives, by id; fails where one is there twice."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((out / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                files = found.setdefault(urllib.parse.unquote(key), {})
                assert suffix not in files and member.mtime == 0
                files[suffix] = tar.extractfile(member).read()
                assert path.name.startswith(json.loads(files.get("json", b'{"split": ""}'))["split"])
    return found


def rejected(out: Path) -> dict[str, tuple[str, int]]:
    return {
        r["segment_id"]: (r["reason"], r["attempts"]) for r in pq.read_table(out / "rejections.parquet").to_pylist()
    }


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [*out.glob("data/*"), out / "README.md", out / "rejections.parquet"]}


def check_sound(data: bytes, segment: Segment, scale: float) -> None:
    clip = media.decode(Path(segment.source), segment.start_s, segment.end_s, sample_rate=RATE, image_size=24)
    sound, rate = soundfile.read(io.BytesIO(data))
    assert rate == RATE and scale == 1.0
    np.testing.assert_allclose(sound, clip.waveform, rtol=0, atol=1.01 / 32768)


def check_picture(data: bytes, segment: Segment, number: int) -> None:
    clip = media.decode(Path(segment.source), segment.start_s, segment.end_s, sample_rate=RATE, image_size=24)
    picture = np.asarray(Image.open(io.BytesIO(data)), float)
    assert picture.shape == (24, 32, 3)
    assert np.abs(picture - clip.images[number]).mean() < 5  # 40 from the next one


# -------------------------------------------------------------------------------------------------- what is written


def test_archives_hold_what_the_media_hold(exported) -> None:
    folder, _, out = exported
    found = samples_of(out)
    assert found.keys() == {s.segment_id for s in segments_of(folder)}
    labels = {"a_0": ["dog"], "b.v2": ["dog", "cat"], "seen": ["dog"], "ünï~": []}
    for s in segments_of(folder):
        files = found[s.segment_id]
        row = json.loads(files["json"])
        check_sound(files["flac"], s, row["audio_scale"])
        n = round(s.end_s - s.start_s)
        assert files.keys() == {"flac", "json", *(f"{i}.jpg" for i in range(n))}
        for i in range(n):
            check_picture(files[f"{i}.jpg"], s, i)
        assert (row["start_s"], row["end_s"], row["split"]) == (s.start_s, s.end_s, s.split)
        assert row["objects"] == (None if s.objects is None else list(s.objects))
        assert row["labels"] == labels[s.segment_id]
        assert row["label_source"] == ("pictures" if s.labels is None else "given")
        assert row["source"] == Path(s.source).name
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    patterns = pages.WRITES["export"]
    assert not [f for f in files if not any(fnmatch.fnmatch(f, p.removeprefix("?")) for p in patterns)]
    assert all(p[0] == "?" or fnmatch.filter(files, p) for p in patterns)


def test_tables_hold_what_the_archives_hold(exported, tmp_path, capfd) -> None:
    _, clips, tars = exported
    out = tmp_path / "out"
    assert run(clips, out, "--format", "parquet") == 0
    assert "4 clips exported and 0 rejected" in capfd.readouterr().out
    archived = samples_of(tars)
    rows = [row for p in (out / "data").glob("*.parquet") for row in pq.read_table(p).to_pylist()]
    assert sorted(r["segment_id"] for r in rows) == sorted(archived)
    for row in rows:
        files = archived[row["segment_id"]]
        assert row.pop("audio")["bytes"] == files["flac"]
        assert [i["bytes"] for i in row.pop("images")] == [files[f] for f in sorted(files) if f.endswith("jpg")]
        assert row == json.loads(files["json"])
    path = next((out / "data").glob("test-*.parquet"))
    features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert features["audio"] == {"sampling_rate": RATE, "_type": "Audio"}
    assert features.keys() == set(pq.read_schema(path).names)


def test_the_card_names_the_files_of_each_split(exported) -> None:
    _, _, out = exported
    header = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    files = {f["split"]: f["path"] for f in header["configs"][0]["data_files"]}
    assert {split: len(list(out.glob(path))) for split, path in files.items()} == {"train": 2, "test": 1}
    names = [f["name"] for f in header["dataset_info"]["features"]]
    assert {"flac", "json", "0.jpg", "1.jpg"} <= set(names) and "2.jpg" not in names


def test_croissant_names_every_file_and_every_column(exported, tmp_path) -> None:
    """By the specification of Croissant 1.0: what it requires is there, and whatever is referred to."""
    _, clips, tars = exported
    assert run(clips, tmp_path, "--format", "parquet") == 0
    for out, suffix in ((tars, "tar"), (tmp_path, "parquet")):
        said = json.loads((out / "croissant.json").read_text())
        required = "@context @type conformsTo name description url license creator datePublished distribution recordSet"
        assert set(required.split()) <= set(said)
        assert said["conformsTo"] == "http://mlcommons.org/croissant/1.0"
        assert said["@context"]["cr"] == "http://mlcommons.org/croissant/"
        datetime.date.fromisoformat(said["datePublished"])
        files = {d["contentUrl"]: d for d in said["distribution"] if d["@type"] == "cr:FileObject"}
        assert files.keys() == {f"data/{p.name}" for p in (out / "data").iterdir()}
        for name, file in files.items():
            data = (out / name).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest() and file["contentSize"] == f"{len(data)} B"
        sets = {d["@id"]: d for d in said["distribution"] if d["@type"] == "cr:FileSet"}
        assert len(files) + len(sets) == len(said["distribution"]) == len({d["@id"] for d in said["distribution"]})
        for held in sets.values():
            assert {"@id", "name", "encodingFormat", "includes"} <= set(held)
            assert {h["@id"] for h in held.get("containedIn", [])} in (set(), set(files))
        fields = [f for records in said["recordSet"] for f in records["field"]]
        assert len({f["@id"] for f in fields}) == len(fields)
        for field in fields:
            assert {"@type", "@id", "name", "description", "dataType", "source"} <= set(field)
            assert field["source"]["fileSet"]["@id"] in sets and len(field["source"]["extract"]) == 1
        names = {f["name"] for f in fields}
        if suffix == "parquet":
            assert names == set(pq.read_schema(next((out / "data").iterdir())).names)
        else:
            row = json.loads(samples_of(out)["a_0"]["json"])
            assert names == {*row, "key", "audio", "image"}


# ------------------------------------------------------------------------------------------- other people's models


def as_sample(flac: bytes, row: dict) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What a model of somebody else takes: id, the sound's mean spectrum, and its labels."""
    sound, _ = soundfile.read(io.BytesIO(flac), dtype="float32")
    spectrum = torch.stft(torch.from_numpy(sound), 256, window=torch.hann_window(256), return_complex=True)
    labels = torch.tensor([float(name in (row["labels"] or ())) for name in ("dog", "cat")])
    return row["segment_id"], spectrum.abs().mean(1).log1p(), labels


def learn(batches: Iterable) -> tuple[set[str], float, float]:
    """Train a small network for some epochs: the ids that it saw, and its loss before and after."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(129, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimiser, losses, ids = torch.optim.Adam(network.parameters(), 0.05), [], []
    for epoch in range(20):
        for some, spectra, labels in batches:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(spectra), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            ids += some if not epoch else []
    assert len(set(ids)) == len(ids)
    return set(ids), losses[0], losses[-1]


def test_a_network_learns_through_webdataset(exported) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder, _, out = exported
    archives = sorted(str(p) for p in (out / "data").glob("train-*"))
    samples = webdataset.WebDataset(archives, shardshuffle=False)
    found = {s["json"]["segment_id"]: s for s in samples.decode("pil")}
    segments = {s.segment_id: s for s in segments_of(folder) if s.split == "train"}
    assert found.keys() == segments.keys()
    for i, s in found.items():
        check_sound(s["flac"], segments[i], s["json"]["audio_scale"])
        jpeg = samples_of(out)[i]["0.jpg"]
        check_picture(jpeg, segments[i], 0)
        np.testing.assert_array_equal(np.asarray(s["0.jpg"]), read_picture(jpeg))
    stream = webdataset.WebDataset(archives, shardshuffle=False).decode().map(lambda s: as_sample(s["flac"], s["json"]))
    ids, before, after = learn(DataLoader(stream.batched(2), batch_size=None))
    assert ids == segments.keys() and after < 0.7 * before


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_a_network_learns_through_datasets(exported, tmp_path, monkeypatch, format: str) -> None:
    """It leaves the sound as bytes here: to decode it, and to read it out of archives, it wants torchcodec."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder, clips, tars = exported
    out = tmp_path / "out" if format == "parquet" else tars
    if format == "parquet":
        assert run(clips, out, "--format", format) == 0
    kept = {"path": str(out), "cache_dir": str(tmp_path / "cache")}
    features = datasets.load_dataset_builder(**kept).info.features  # which the card, or the file, says
    sound = "audio" if format == "parquet" else "flac"
    assert features[sound].sampling_rate == RATE
    if format == "webdataset":
        kept["features"] = datasets.Features({**features, "flac": datasets.Value("binary")})
    loaded = datasets.load_dataset(**kept)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 1}
    if format == "parquet":
        loaded = loaded.cast_column("audio", datasets.Audio(decode=False))
    segments = {s.segment_id: s for s in segments_of(folder)}
    for rows in loaded.values():
        for row in rows:
            flac, said, picture = opened(row)
            check_sound(flac, segments[said["segment_id"]], said["audio_scale"])
            files = samples_of(tars)[said["segment_id"]]
            np.testing.assert_array_equal(np.asarray(picture), read_picture(files["0.jpg"]))
            assert said["labels"] == json.loads(files["json"])["labels"]
    ids, before, after = learn(DataLoader(loaded["train"], 2, shuffle=True, collate_fn=together))
    assert ids == {i for i, s in segments.items() if s.split == "train"} and after < 0.7 * before


def opened(row: dict) -> tuple[bytes, dict, Image.Image]:
    """A row of `datasets`: its sound, what is said of it, its first picture."""
    if "json" in row:
        return row["flac"], row["json"], row["0.jpg"]
    return row["audio"]["bytes"], row, row["images"][0]


def together(rows: list[dict]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    ids, spectra, labels = zip(*(as_sample(*opened(row)[:2]) for row in rows), strict=True)
    return list(ids), torch.stack(spectra), torch.stack(labels)


def read_picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_keys_are_safe_and_distinct(ids: list[str]) -> None:
    ids = [i.encode(errors="replace").decode() for i in ids]
    keys = [exporting.key_of(i) for i in ids]
    assert [urllib.parse.unquote(k) for k in keys] == ids
    assert all(set(k) <= set("%-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for k in keys)


def test_sounds_beyond_full_scale_come_with_their_scale() -> None:
    waveform = np.float32([0.0, 2.5, -1.25, 1e-3])
    data, scale = exporting.encode_sound(waveform, 8000)
    assert scale == 2.5
    np.testing.assert_allclose(soundfile.read(io.BytesIO(data))[0] * scale, waveform, rtol=0, atol=1.01 * scale / 32768)


# -------------------------------------------------------------------------------------------- again, and interrupted


STEPS = [("data/train-0", False), ("data/train-0", True), ("exported/0", True), ("commits/0", True), ("README", False)]


@pytest.mark.parametrize(("place", "after"), STEPS)
def test_an_interrupted_export_goes_on(exported, tmp_path, monkeypatch, capfd, place: str, after: bool) -> None:
    """Before or after a write: what is whole in the end are the bytes of a run that nobody interrupted."""
    _, clips, whole = exported
    out = tmp_path / "out"
    write, n_hits = storage.write_bytes, 0

    def interrupted(path: str, data: bytes, **options: bool) -> bool:
        nonlocal n_hits
        hit = place in path
        n_hits += hit
        if hit and not after:
            raise KeyboardInterrupt
        result = write(path, data, **options)
        if hit:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", interrupted)
        assert run(clips, out) == 130 and n_hits == 1
    assert "interrupted; the same command goes on from here" in capfd.readouterr().err
    assert not (out / "README.md").exists()
    assert run(clips, out) == 0
    assert contents(out) == contents(whole)
    assert shards.read_ids(out / "_shards") == shards.read_ids(whole / "_shards")


def test_a_second_run_writes_nothing_but_what_is_gone(made, tmp_path, capfd) -> None:
    _, clips = made
    out = tmp_path / "out"
    assert run(clips, out) == 0
    before, times = contents(out), {p: p.stat().st_mtime_ns for p in out.glob("data/*")}
    assert run(clips, out) == 0
    assert "done before: 4 of 4" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.glob("data/*")} == times
    gone = next(out.glob("data/test-*"))
    gone.unlink()
    assert run(clips, out) == 0
    assert contents(out) == before
    assert {p for p, at in times.items() if p.stat().st_mtime_ns == at} == set(out.glob("data/*-00000-*"))


def test_missing_and_changed_media_are_rejections_until_they_are_back(made, recorded, tmp_path, capfd) -> None:
    folder, clips = made
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(clips, whole) == 0
    (folder / "a.mkv").rename(tmp_path / "a.mkv")
    shutil.copy(folder / "b.v2.mkv", folder / "c d.mkv")
    assert run(clips, out) == 0
    assert rejected(out) == {"a_0": ("missing", 1), "ünï~": ("changed", 1)}
    assert "2 clips exported and 2 rejected" in capfd.readouterr().out
    assert samples_of(out).keys() == {"b.v2", "seen"}
    assert run(clips, out) == 0
    assert rejected(out)["a_0"] == ("missing", 1)  # nothing came: not tried
    (tmp_path / "a.mkv").rename(folder / "a.mkv")
    assert run(clips, out) == 0
    assert rejected(out) == {"ünï~": ("changed", 1)}
    shutil.copyfile(recorded / "c d.mkv", folder / "c d.mkv")
    assert run(clips, out) == 0
    assert rejected(out) == {} and contents(out) == contents(whole)


def test_clips_extracted_again_replace_their_exports(made, tmp_path, capfd) -> None:
    folder, clips = made
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(clips, out) == 0
    extract(clips, [replace(s, split="val") for s in segments_of(folder)], generation=1)
    assert run(clips, out) == run(clips, whole) == 0
    assert "2 shards of clips were extracted again" in capfd.readouterr().out
    assert contents(out) == contents(whole)
    assert {p.name.split("-")[0] for p in out.glob("data/*")} == {"val"}
    assert not list(out.glob("_shards/*/*-g0-g0*"))


# ---------------------------------------------------------------------------------------------------- what is refused


def test_another_format_or_other_clips_are_refused(made, tmp_path, capfd) -> None:
    folder, clips = made
    out, others = tmp_path / "out", tmp_path / "others"
    assert run(clips, out) == 0
    before = contents(out)
    assert run(clips, out, "--format", "parquet") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{out} was exported with --format webdataset, now parquet; give another --out" in line
    records, _, _ = stages.extract_records(segments_of(folder)[:1], CONFIG, None)
    shards.write_shard(str(others), "00000-dcba", 0, records, [], configuration=MADE_WITH.as_dict(), shape=CONFIG.shape)
    assert run(others, out) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{out} was exported from other clips than those of {others}" in line
    assert contents(out) == before
    assert run(clips, clips) == 2 and "--clips names" in capfd.readouterr().err


def test_downloaded_media_are_taken_from_their_store(exported, tmp_path, capfd) -> None:
    folder, _, _ = exported
    store, fetched, out = tmp_path / "store", tmp_path / "fetched", tmp_path / "out"
    remote = [Segment(f"abcdefghij{n}_0", f"youtube:abcdefghij{n}", 0.0, 2.0, labels=("dog",)) for n in range(4)]
    store.mkdir()
    for s, name in zip(remote, (*SOURCES, SOURCES[0]), strict=True):
        shutil.copy(folder / f"{name}.mkv", store / f"{s.segment_id}.mkv")
    located = exporting_store(store, remote)
    extract(fetched, remote, locate=located)
    assert run(fetched, out) == 2 and "say with --media FOLDER" in capfd.readouterr().err
    assert run(fetched, out, "--media", tmp_path / "nosuch") == 2 and "doesn't exist" in capfd.readouterr().err
    (store / f"{remote[3].segment_id}.mkv").rename(tmp_path / "away.mkv")
    assert run(fetched, out, "--media", store) == 0
    assert rejected(out) == {remote[3].segment_id: ("missing", 1)}
    (tmp_path / "away.mkv").rename(store / f"{remote[3].segment_id}.mkv")
    assert run(fetched, out, "--media", store) == 0
    assert rejected(out) == {} and len(samples_of(out)) == 4
    check_sound(samples_of(out)[remote[0].segment_id]["flac"], replace(segments_of(folder)[0]), 1.0)


def exporting_store(store: Path, segments: list[Segment]) -> Callable[[Segment], Segment]:
    found = export.open_store(str(store), segments)
    assert found is not None
    return found.locate
