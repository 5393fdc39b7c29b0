"""Other objects than the default's 23: from the manifest to the separated sound."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

import pipelines
from avsep import audioset, shards
from avsep.factors import DataConfig, ExtractionConfig
from avsep.model import Model, ModelConfig
from avsep.objects import AUDIOSET_23, SoundObject, Vocabulary
from avsep.records import ClipRecord, check_vocabularies, read_segments, read_vocabulary
from avsep.separation import Separator
from avsep.stft import STFT
from avsep.synthetic import performance, planted_bases
from pipelines import collect, evaluate, extract, manifest, train

RATE = 48_000
FIVE = """\
name,imagenet,audioset,aliases
flute,558,/m/0l14j_,
drum,541;542,/m/026t6,snare
violin,889,/m/07y_7,fiddle
tower_bell,442,,church_bell;bell
crowd,,,babble;people;lots of people;Crowd
"""
PLAYED = {"flute": "flute", "drum": "drum", "violin": "violin", "tower_bell": "bell", "crowd": "babble"}


def render(folder: Path, n_train: int, n_test: int, seconds: float = 4.0) -> Path:
    """Duets and solos of the five, with references of those of split test."""
    rows = []
    for number in range(n_train + n_test + 6):
        split = "train" if number < n_train else "val" if number < n_train + 6 else "test"
        rng = np.random.default_rng(number)
        names = list(rng.permutation(list(PLAYED))[: 2 if split == "test" else 1 + number % 2])
        sounds = {n: performance(PLAYED[n], rng, seconds) for n in names}
        clip = folder / f"{split}{number}.flac"
        folder.mkdir(exist_ok=True)
        soundfile.write(clip, 0.5 * sum(sounds.values()), RATE, subtype="PCM_24")
        if split == "test":
            (folder / "references" / clip.stem).mkdir(parents=True)
            for n, x in sounds.items():
                soundfile.write(folder / "references" / clip.stem / f"{n}.wav", 0.5 * x, RATE, subtype="FLOAT")
        rows.append({"source": clip.name, "split": split, "objects": ";".join(names), "labels": ";".join(names)})
    with (folder / "table.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    (folder / "five.csv").write_text(FIVE)
    return folder


@pytest.mark.slow
def test_five_objects_of_which_two_are_not_among_the_23_go_all_the_way(tmp_path: Path) -> None:
    media = render(tmp_path / "media", 60, 6)
    out = {name: str(tmp_path / name) for name in ("manifest", "clips", "train", "results")}
    table = ["--table", str(media / "table.csv"), "--objects", str(media / "five.csv"), "--out", out["manifest"]]
    assert manifest.main(table) == 0
    assert read_vocabulary(out["manifest"]).names == tuple(PLAYED)
    assert json.loads((tmp_path / "manifest" / "statistics.json").read_text())["objects"].keys() == PLAYED.keys()
    assert extract.main(["--segments", out["manifest"], "--out", out["clips"], "--in-process"]) == 0
    assert train.main(["--clips", out["clips"], "--out", out["train"], "--epochs", "12", "--in-process"]) == 0
    model = str(tmp_path / "train" / "model")
    assert Model.load(model).config.objects == tuple(PLAYED)
    assert collect.main(["--model", model, "--clips", out["clips"], "--in-process"]) == 0
    options = ["--segments", out["manifest"], "--references", str(media / "references"), "--out", out["results"]]
    assert evaluate.main(["--model", model, *options, "--in-process"]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())["separators"]
    sdr = {name: entry["mean"]["sdr"] for name, entry in results.items()}
    assert sdr["default"] > sdr["mixture"] + 5 and sdr["oracle_assignment"] > sdr["default"] - 1
    assert set(results["default"]["by_object"]) <= set(PLAYED)
    separated = Separator.load(model)(str(next(media.glob("test*.flac"))), ["church bell", "lots of people"])
    assert list(separated.objects) == ["tower_bell", "crowd"]


# --------------------------------------------------------------------------------- forty objects

FORTY = Vocabulary(tuple(SoundObject(f"thing_{i}", audioset=(f"/m/{i:03}",)) for i in range(40)))
SMALL = STFT(sample_rate=2000, n_fft=94, hop_length=47)  # F = 48, as the planted bases have


def write_clips(folder: Path, n_clips: int, vocabulary: Vocabulary) -> str:
    p = planted_bases(n_clips, n_bins=SMALL.n_bins, n_bases=4, n_objects=len(vocabulary), objects_a_clip=1)
    made_with = DataConfig(ExtractionConfig(stft=SMALL, n_bases=4, n_iter=30), vocabulary)
    records = []
    for i in range(n_clips):
        H = p.H[i].numpy()
        energy = (p.W[i] ** 2).sum(0) * (p.H[i] ** 2).sum(1)
        labels = tuple(n for n, on in zip(vocabulary.names, p.labels[i].tolist(), strict=True) if on)
        records.append(
            ClipRecord(
                segment_id=f"c{i:03}", source="x", start_s=0.0, end_s=1.0, split="val" if i % 8 == 0 else "train",
                objects=labels, labels=labels, bases=(p.W[i] / p.W[i].amax(0)).numpy().astype(np.float16),
                activations=(H / H.max()).astype(np.float16), activation_scale=float(H.max()),
                basis_energy=(energy / energy.sum()).numpy(), image_logits=None, kl_divergence=1.0, duration_s=1.0,
                rms_db=-20.0, media_sha256="0" * 64, label_source="given",
            )
        )  # fmt: skip
    options: dict[str, Any] = {"configuration": made_with.as_dict(), "shape": made_with.extraction.shape}
    shards.write_shard(str(folder), "s0", 0, records, [], **options)
    return str(folder)


def test_forty_objects_are_learned_and_separated(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 160, FORTY)
    command = ["--clips", clips, "--out", str(tmp_path / "out"), "--epochs", "2", "--in-process"]
    assert train.main(command) == 0
    separator = Separator.load(str(tmp_path / "out" / "model"))
    assert separator.model.config.objects == FORTY.names
    mix = torch.rand(6000, generator=torch.Generator().manual_seed(0)) - 0.5
    found = separator(mix, ["thing 39", "thing_2"])
    assert list(found.objects) == ["thing_39", "thing_2"]
    assert torch.allclose(found.estimates.sum(0) + found.rest, mix, atol=1e-4)


def test_more_objects_than_an_integer_has_bits_are_found_in_audioset_s_rows() -> None:
    masks = audioset.object_masks([{"id": "/m/039", "child_ids": ["/m/child"]}], vocabulary=FORTY)
    line = b'aaaaaaaaaaa, 0.000, 10.000, "/m/child,/m/002"\n'
    rows, bad, _ = audioset.parse_rows(line)
    segments = audioset.select_segments(rows, masks, None, FORTY)
    assert not bad and segments["objects"].to_pylist() == [["thing_2", "thing_39"]]


# ------------------------------------------------------------------------- two that don't go together


def test_a_model_and_clips_of_another_vocabulary_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = Vocabulary(FORTY.objects[:4])
    clips = {n: write_clips(tmp_path / n, 24, v) for n, v in (("forty", FORTY), ("few", few))}
    assert train.main(["--clips", clips["few"], "--out", str(tmp_path / "t"), "--epochs", "1", "--in-process"]) == 0
    capsys.readouterr()
    assert collect.main(["--model", str(tmp_path / "t" / "model"), "--clips", clips["forty"], "--in-process"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "40 objects (thing_0, thing_1, thing_2, …)" in line and "4 objects (thing_0, thing_1, thing_2, …)" in line
    with pytest.raises(ValueError, match=r"a has 4 objects .*, b 40 objects .*; only one has thing_10, "):
        check_vocabularies("a", few, "b", FORTY)


def test_segments_of_two_vocabularies_in_one_folder_are_refused(tmp_path: Path) -> None:
    from avsep.manifest import write_segments
    from avsep.records import SEGMENT_SCHEMA, Segment, segments_to_table

    for i, v in enumerate((FORTY, AUDIOSET_23)):
        table = segments_to_table([Segment(f"s{i}", "/x.wav", labels=(v.names[0],))]).cast(SEGMENT_SCHEMA)
        assert isinstance(table, pa.Table)
        write_segments(str(tmp_path / f"segments-{i}.parquet"), table, v)
    with pytest.raises(ValueError, match=r"mixes segments of 23 objects .* and 40 objects"):
        read_segments(str(tmp_path))


def test_a_table_takes_the_vocabulary_s_names_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "five.json").write_text(json.dumps(Vocabulary.parse(FIVE).as_list()))
    (tmp_path / "t.csv").write_text("source,labels\na.wav,Church bell;fiddle\nb.wav,dog\nc.wav,lots of people;crowd\n")
    options = ["--objects", str(tmp_path / "five.json"), "--out", str(tmp_path / "m")]
    assert manifest.main(["--table", str(tmp_path / "t.csv"), *options]) == 1  # a dog isn't in it
    first, last = read_segments(str(tmp_path / "m"))
    assert first.labels == ("tower_bell", "violin") and last.labels == ("crowd",)
    (letter,) = (tmp_path / "m" / "dead_letters.jsonl").read_text().splitlines()
    assert "unknown object 'dog'; the objects are flute, drum, violin, tower_bell, crowd" in letter


def test_a_table_beside_a_model_is_checked_by_the_model_s_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the program's imports, as afterwards: the table says no vocabulary of its own."""
    ModelConfig(vocabulary=Vocabulary.parse(FIVE)).write(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process goes on
    for name, label, refused in (("a", "church bell", ""), ("b", "dog", "unknown object 'dog'")):
        table = tmp_path / f"{name}.csv"
        table.write_text(f"source,labels\na.wav,{label}\n")
        parser = pipelines.arguments_of("x", None, "")
        parser.add_argument("--segments")
        parser.add_argument("--model")
        monkeypatch.setattr("sys.argv", ["x", "--segments", str(table), "--model", str(tmp_path)])
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            pipelines.begin(parser)
        assert refused in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("name\nFrench Horn\n", "object name 'French Horn': it must be lower-case letters"),
        ("name\nnone\n", "object name 'none'"),
        ("name,imagenet\ndog,1000\n", "dog: ImageNet index 1000; indices are 0 to 999"),
        ("name,imagenet\ndog,x\n", "dog: ImageNet index 'x'; write 889 or a span"),
        ("name,audioset\ndog,0bt9lr\n", "dog: AudioSet node '0bt9lr'"),
        ("name\ndog\ndog\n", "the objects dog and dog have one name"),
        ("name,aliases\ndog,cat\ncat,\n", "alias 'cat' of dog is the name of another object"),
        ("name,colour\ndog,red\n", "object 1 has colour; it may have name, imagenet"),
        ("objects\ndog\n", "a CSV table with a column name"),
        ("", "a CSV table with a column name"),
        ("[1]", "a list of objects with a name each"),
        ("[{", "is no JSON"),
    ],
)
def test_a_vocabulary_that_can_t_be_is_refused_with_the_rule(
    text: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").write_text(text)
    (tmp_path / "t.csv").write_text("source,labels\na.wav,dog\n")
    options = ["--objects", str(tmp_path / "v"), "--out", str(tmp_path / "m")]
    assert manifest.main(["--table", str(tmp_path / "t.csv"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--objects {tmp_path / 'v'}: " in line and rule in line
