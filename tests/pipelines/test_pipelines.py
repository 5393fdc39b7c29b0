"""The pipelines on real files, as a user runs them."""

import csv
import fnmatch
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsep import cli, commands, evaluation, media, records, shards, storage, synthetic, vision
from avsep import results as statistics
from avsep.factors import DataConfig, ExtractionConfig
from avsep.model import Model
from avsep.objects import AUDIOSET_23, OBJECT_NAMES, object_index, object_scores, weak_labels
from avsep.vision import ImageLabeller, build_network
from deploy import cost, pages
from pipelines import audit, collect, demo, downloads, evaluate, extract, finetune, manifest, serve, train
from tests.support.processes import marked

RATE = 48_000


def table_of(folder: Path, rows: list[dict]) -> str:
    path = folder / "table.csv"
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def run(rendered, tmp_path_factory) -> Path:
    """The whole chain, in this process: OUT/manifest, clips, run/model, paper/model, results."""
    out = tmp_path_factory.mktemp("run")
    model, clips = str(out / "run" / "model"), str(out / "clips")
    here = ["--in-process"]
    assert manifest.main(["--table", str(rendered / "segments.csv"), "--out", str(out / "manifest")]) == 0
    assert extract.main(["--segments", str(out / "manifest"), "--out", clips, *here]) == 0
    assert train.main(["--clips", clips, "--out", str(out / "run"), "--epochs", "12", *here]) == 0
    paper = ["--recipe", "paper", "--epochs", "4", *here]
    assert train.main(["--clips", clips, "--out", str(out / "paper"), *paper]) == 0
    assert collect.main(["--model", model, "--clips", clips, *here]) in (0, 1)  # few clips: perhaps no sure basis
    arguments = ["--model", model, "--paper-model", str(out / "paper" / "model"), *here]
    arguments += ["--segments", str(out / "manifest"), "--references", str(rendered / "references")]
    assert evaluate.main([*arguments, "--out", str(out / "results")]) == 0
    return out


@pytest.mark.parametrize("program", ["manifest", "extract", "audit", "train", "finetune", "evaluate"])
def test_programs_write_the_files_that_their_page_names(run, tmp_path, program):
    folder = run / {"manifest": "manifest", "extract": "clips", "train": "run", "evaluate": "results"}.get(program, "")
    patterns = pages.WRITES[program]
    if program == "train":  # the same folder's model got its dictionary
        patterns = patterns | {f"?model/{p.removeprefix('?')}": what for p, what in pages.WRITES["collect"].items()}
    elif program == "audit":
        folder = tmp_path
        assert audit.main(["--clips", str(run / "clips"), "--out", str(folder)]) == 0
    elif program == "finetune":
        folder = tmp_path
        command = ["--segments", str(run / "manifest"), "--targets", "labels", "--epochs", "1", "--in-process"]
        assert finetune.main([*command, "--out", str(folder)]) in (0, 1)
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    unknown = [f for f in found if not any(fnmatch.fnmatch(f, p.removeprefix("?")) for p in patterns)]
    missing = [p for p in patterns if p[0] != "?" and not fnmatch.filter(found, p)]
    assert found and not unknown and not missing


def test_costs_reckon_with_an_extractions_own_seconds(run, tmp_path):
    recorded, own = cost.read_rates(None), cost.read_rates(str(run / "clips"))
    commits = shards.read_commits(str(run / "clips"))
    assert own["decode"] == pytest.approx(sum(c.timings_s["decode"] for c in commits) / 14)
    assert own["train"] == recorded["train"] and own.keys() == recorded.keys()
    with pytest.raises(ValueError, match="holds no clips yet"):
        cost.read_rates(str(tmp_path))


def test_every_segment_becomes_a_clip_with_its_given_labels(run, rendered):
    clips, rejections = shards.read_ids(str(run / "clips"))
    segments = records.read_segments(str(rendered / "segments.csv"))
    assert clips == sorted(s.segment_id for s in segments)
    assert rejections == []
    by_id = {r.segment_id: r for r in shards.read_clips(str(run / "clips"))}
    for segment in segments:
        record = by_id[segment.segment_id]
        assert (record.labels, record.objects) == (segment.labels, segment.objects)
        assert record.label_source == "given"
        assert record.image_logits is None  # no weights here
        assert record.duration_s == pytest.approx(6, abs=0.05)
        assert record.bases.shape == (2401, 25)


def test_model_directory_holds_what_the_contract_names(run):
    model = run / "run" / "model"
    files = {"config.json", "miml.safetensors", "dictionary.safetensors", "familiarity.safetensors"}
    assert files - {"dictionary.safetensors"} <= {p.name for p in model.iterdir()} <= files
    config = json.loads((model / "config.json").read_text())
    assert (config["extraction"]["stft"]["n_fft"], config["extraction"]["n_bases"], config["recipe"]) == (
        4800,
        25,
        "default",
    )
    assert len(config["vocabulary"]) == len(OBJECT_NAMES)
    for figure in ("loss.png", "relation_maps"):
        assert (run / "run" / figure).exists()
    assert any((run / "run" / "relation_maps").iterdir())


def test_results_hold_floor_and_ceiling_in_order(run):
    results = json.loads((run / "results" / "results.json").read_text())
    sdr = {n: e["mean"]["sdr"] for n, e in results["separators"].items()}
    assert {"mixture", "nmf_clustering", "paper", "default", "oracle_assignment", "ideal_mask"} <= set(sdr)
    assert sdr["mixture"] < sdr["oracle_assignment"] < sdr["ideal_mask"]
    assert abs(results["separators"]["mixture"]["mean"]["sdr_improvement"]) < 1e-9
    assert set(results["separators"]["default"]["by_sources"]) == {"2"}
    for figure in ("basis_accuracy", "basis_accuracy_by_sources", "silent_auc", "map", "clips"):
        assert figure in results
    entry = results["separators"]["mixture"]
    assert entry["default_ahead"]["sdr"] == pytest.approx(sdr["default"] - sdr["mixture"])
    assert entry["interval_95"][0] <= sdr["mixture"] <= entry["interval_95"][1]
    assert statistics.bootstrap([np.zeros(3)]) == pytest.approx([math.nan] * 2, nan_ok=True)  # nothing to draw from
    curve = results["calibration"]["sound_score"]
    assert 0 <= curve["expected_calibration_error"] <= 1 and sum(b["count"] for b in curve["bins"]) >= 6
    assert len(results["clips"]) == 3
    page = (run / "results" / "report.html").read_text()
    assert "<audio" in page and "ideal mask" in page and "http://" not in page and "https://" not in page


@pytest.fixture(scope="module")
def solos(tmp_path_factory) -> Path:
    """Three objects alone, four seconds each, with references: REFERENCES/ID and table.csv."""
    folder = tmp_path_factory.mktemp("solos")
    for name in ("drum", "flute", "violin"):
        sound = synthetic.performance(name, np.random.default_rng(2), 4.0)[: 4 * RATE] / 4
        (folder / "references" / name).mkdir(parents=True)
        for file in (folder / f"{name}.flac", folder / "references" / name / f"{name}.flac"):
            soundfile.write(file, sound, RATE, subtype="PCM_24")
    table_of(folder, [{"segment_id": n, "source": f"{n}.flac", "split": "test"} for n in ("drum", "flute", "violin")])
    return folder


@pytest.mark.parametrize("protocol", ["pairs", "denoising"])
def test_the_published_protocols(run, solos, tmp_path, protocol):
    arguments = ["--model", str(run / "run" / "model"), "--segments", str(solos / "table.csv"), "--in-process"]
    arguments += ["--references", str(solos / "references"), "--out", str(tmp_path), "--protocol", protocol]
    assert evaluate.main([*arguments, "--given", "none"]) == 2
    assert evaluate.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    separators, ids = results["separators"], [c["segment_id"] for c in results["clips"]]
    assert separators["mixture"]["mean"]["sdr"] == pytest.approx(0, abs=1.5)
    assert separators["ideal_mask"]["mean"]["sdr_improvement"] > 8
    if protocol == "pairs":
        assert ids == ["drum + flute", "drum + violin", "flute + violin"]
        struck = results["struck_beside_pitched"]
        assert struck["clips"] == 2 == separators["harmonic_percussive"]["clips"]
        assert struck["separators"]["mixture"]["clips"] == 2
        assert struck["separators"]["harmonic_percussive"]["mean"]["sdr_improvement"] > 0.5
    else:
        assert ids == ["drum", "flute", "violin"]
        assert set(separators["default"]["by_sources"]) == {"1"}
        assert separators["default"]["mean"]["sir"] is None  # nothing else sounds that has a reference
        again = evaluation.add_noise(
            evaluation.Case.load(
                segment := records.read_segments(str(solos / "table.csv"))[0],
                str(solos / "references"),
                RATE,
                AUDIOSET_23,
            )
        )
        assert torch.equal(
            again.mixture,
            evaluation.build_case([segment], str(solos / "references"), RATE, protocol, AUDIOSET_23).mixture,
        )
        noise = again.rest.square().mean() / again.references[0].square().mean()
        assert 10 * math.log10(noise) == pytest.approx(0, abs=0.05)


def test_pairs_are_written_and_the_same_ones_measured_again(run, solos, tmp_path, capsys):
    """Without references, too: a clip of which the table knows one object is its own."""
    shutil.copytree(solos, tmp_path / "solos")
    names = ("drum", "flute", "violin")
    rows = [{"segment_id": n, "source": f"{n}.flac", "split": "test", "objects": n} for n in names]
    table_of(tmp_path / "solos", rows)
    command = ["--model", str(run / "run" / "model"), "--segments", str(tmp_path / "solos" / "table.csv")]
    command += ["--in-process", "--protocol", "pairs"]
    assert evaluate.main([*command, "--out", str(tmp_path / "a")]) == 0
    listed = tmp_path / "a" / "pairs.csv"
    assert listed.read_text() == "one,other\ndrum,flute\ndrum,violin\nflute,violin\n"
    listed.write_text("one,other\nviolin,drum\n")
    with_references = [*command, "--references", str(solos / "references"), "--pairs", str(listed)]
    assert evaluate.main([*with_references, "--out", str(tmp_path / "b")]) == 0
    a, b = (json.loads((tmp_path / n / "results.json").read_text()) for n in "ab")
    (clip,) = b["clips"]
    assert clip["segment_id"] == "violin + drum" and (tmp_path / "b" / "pairs.csv").read_text() == listed.read_text()
    (same,) = (c for c in a["clips"] if c["segment_id"] == "drum + violin")
    for figure in ("sdr", "si_sdr", "si_sar"):  # references are the clips themselves
        assert clip["figures"]["mixture"][figure] == pytest.approx(same["figures"]["mixture"][figure], abs=0.01)
    capsys.readouterr()
    for text, said in (("one,other\ndrum,dog\n", "drum and dog are not two clips"), ("a,b\n", "is no list of pairs")):
        listed.write_text(text)
        assert evaluate.main([*with_references, "--out", str(tmp_path / "c")]) == 2
        assert said in capsys.readouterr().err
    assert evaluate.main([*command[:-1], "mixtures", "--out", str(tmp_path / "c")]) == 2
    assert "--references is missing" in capsys.readouterr().err


def test_what_leaks_into_an_object_that_is_not_there(run, solos, tmp_path):
    rows = [
        {"segment_id": n, "source": f"{n}.flac", "split": "test", "objects": n} for n in ("drum", "flute", "violin")
    ]
    shutil.copytree(solos, tmp_path / "solos")
    table_of(tmp_path / "solos", rows)
    command = ["--model", str(run / "run" / "model"), "--segments", str(tmp_path / "solos" / "table.csv")]
    command += ["--in-process", "--protocol", "absent", "--out", str(tmp_path / "out")]
    assert evaluate.main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for clip in results["clips"]:
        assert clip["absent"] in {"drum", "flute", "violin"} - set(clip["objects"])
        assert set(clip["leak_db"]) == {"default"} and -60 <= clip["leak_db"]["default"] < 0
    leak = results["separators"]["default"]["leak_db"]
    assert leak["mean"] == pytest.approx(np.mean([c["leak_db"]["default"] for c in results["clips"]]))
    assert results["separators"]["mixture"]["leak_db"] is None
    lines = (tmp_path / "out" / "clips.csv").read_text().splitlines()
    assert sum(line.split(",")[-1] not in ("", "leak_db") for line in lines) == 3
    assert "gave an object that isn" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("given", ["labels", "none"])
def test_evaluation_without_being_told(run, rendered, tmp_path, given):
    arguments = ["--model", str(run / "run" / "model"), "--segments", str(rendered / "segments.csv"), "--in-process"]
    arguments += ["--references", str(rendered / "references"), "--out", str(tmp_path), "--given", given]
    assert evaluate.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert math.isfinite(results["separators"]["default"]["mean"]["sdr"])


def test_references_that_do_not_fit_are_named(run, solos, tmp_path, capfd):
    """A clip at a time, and what is told of them when none is left; labels that nobody gave are asked for."""
    shutil.copytree(solos, tmp_path, dirs_exist_ok=True)
    drum = tmp_path / "references" / "drum" / "drum.flac"
    sound, _ = soundfile.read(drum)
    segment = records.read_segments(str(tmp_path / "table.csv"))[0]

    def damage(write, message):
        shutil.copy(solos / "references" / "drum" / "drum.flac", drum)
        write()
        with pytest.raises(ValueError, match=message):
            evaluation.Case.load(segment, str(tmp_path / "references"), RATE, AUDIOSET_23)

    damage(lambda: drum.write_bytes(b"junk"), r"drum.flac is no sound that can be read: ")
    damage(lambda: soundfile.write(drum, sound, 16_000), r"references of drum have 16000 Hz; the model works at 48000")
    damage(lambda: soundfile.write(drum, sound[: 2 * RATE], RATE), r"last 2.00 s, the clip 4.00 s: give references")
    damage(lambda: soundfile.write(drum.with_suffix(".wav"), sound, RATE), r"drum.wav: there is a .flac and a .wav")
    wav = drum.with_suffix(".wav")
    nan = np.full(4 * RATE, np.nan)
    damage(lambda: (drum.unlink(), soundfile.write(wav, nan, RATE, subtype="FLOAT")), r"drum.wav has no samples, or")
    arguments = ["--model", str(run / "run" / "model"), "--segments", str(tmp_path / "table.csv"), "--in-process"]
    arguments += ["--references", str(tmp_path / "references"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--given", "labels"]) == 2
    assert "gives none; add a column `labels`, or say --given none" in capfd.readouterr().err


def test_a_damaged_model_is_named_by_each_program_that_loads_one(run, rendered, tmp_path, capfd):
    damaged = shutil.copytree(run / "run" / "model", tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    segments, out, model = str(rendered / "segments.csv"), str(tmp_path / "out"), str(damaged)
    evaluation_of = ["--segments", segments, "--references", str(rendered / "references"), "--out", out]
    programs = {
        "avsep separate": lambda: cli.main(["separate", segments, "--model", model, "--out", out]),
        "avsep inspect": lambda: cli.main(["inspect", model]),
        "pipelines.evaluate": lambda: evaluate.main(["--model", model, *evaluation_of]),
        "pipelines.collect": lambda: collect.main(["--model", model, "--clips", str(run / "clips")]),
        "pipelines.serve": lambda: serve.main(["--model", model]),
    }
    for setting, reason in (
        ({"extraction": config["extraction"] | {"n_iter": -1}}, "extraction.n_iter is -1; it must lie in 1…100000"),
        ({"vocabulary": [{"name": "dog"}, {"name": "dog"}]}, "the objects dog and dog have one name"),
    ):
        (damaged / "config.json").write_text(json.dumps(config | setting))
        for program, main in programs.items():
            capfd.readouterr()
            assert main() == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert line.startswith(f"{program}: {model} is no model of format 4: config.json: {reason}"), line

    (damaged / "config.json").write_text(json.dumps(config))
    weights = (damaged / "miml.safetensors").read_bytes()
    for name, content in (("miml.safetensors", weights[:-1]), ("labeller.safetensors", weights)):
        (damaged / name).write_bytes(content)
        capfd.readouterr()
        assert serve.main(["--model", model]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("pipelines.serve: ") and f"{damaged}" in line and name in line
        (damaged / "miml.safetensors").write_bytes(weights)
    video = str(next((rendered / "clips").glob("*test*")))
    assert cli.main(["separate", video, "--model", model, "--out", out]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"avsep separate: weights {damaged}/labeller.safetensors doesn't fit resnet152: ")

    extraction = config["extraction"] | {"stft": config["extraction"]["stft"] | {"sample_rate": RATE // 2}}
    (damaged / "config.json").write_text(json.dumps(config | {"extraction": extraction}))
    assert evaluate.main(["--model", str(run / "run" / "model"), "--paper-model", model, *evaluation_of]) == 2
    assert f"--paper-model {model} works at {RATE // 2} Hz and --model at {RATE} Hz; give" in capfd.readouterr().err


def test_evaluation_takes_clips_longer_than_a_window(run, rendered, tmp_path):
    rng = np.random.default_rng(1)
    folder = tmp_path / "references" / "long"
    folder.mkdir(parents=True)
    sounds = [synthetic.performance(n, rng, 17.0)[: 17 * RATE] / 4 for n in ("drum", "violin")]
    for name, sound in zip(("drum", "violin"), sounds, strict=True):
        soundfile.write(folder / f"{name}.flac", sound, RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "long.flac", sum(sounds), RATE, subtype="PCM_24")
    rows = [{"segment_id": i, "source": "long.flac", "split": "test", "labels": "drum"} for i in ("long", "missing")]
    arguments = ["--model", str(run / "run" / "model"), "--segments", table_of(tmp_path, rows), "--in-process"]
    arguments += ["--references", str(tmp_path / "references"), "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 1  # one clip has no references, and is told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sdr = {n: e["mean"]["sdr"] for n, e in results["separators"].items()}
    assert sdr["mixture"] < sdr["oracle_assignment"] < sdr["ideal_mask"]


def test_a_refused_training_leaves_the_earlier_model(run, tmp_path, rendered, capfd):
    out = tmp_path / "run"
    shutil.copytree(run / "run", out)
    before = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    test_only = [
        {"segment_id": "t", "source": str(next((rendered / "clips").iterdir())), "split": "test", "labels": "none"}
    ]
    clips = str(tmp_path / "clips")
    assert extract.main(["--segments", table_of(tmp_path, test_only), "--out", clips, "--in-process"]) == 0
    assert train.main(["--clips", clips, "--out", str(out), "--in-process"]) == 2
    again = ["--clips", str(run / "clips"), "--out", str(out), "--in-process"]
    assert train.main([*again, "--epochs", "1"]) == 2
    said = capfd.readouterr().err
    assert "holds a training of 12 epochs; --resume goes on with it" in said and "--replace makes it anew" in said
    assert train.main([*again, "--resume", "--replace"]) == 2
    resume = ["--clips", str(run / "clips"), "--out", str(out), "--in-process", "--resume", "--recipe", "paper"]
    assert train.main(resume) == 2
    assert "'default'" in capfd.readouterr().err
    assert sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()) == before


def test_clips_that_show_nothing_teach_nothing(rendered, tmp_path, capfd):
    clip = {"segment_id": "t", "source": str(next((rendered / "clips").iterdir())), "split": "train", "labels": "none"}
    clips = str(tmp_path / "clips")
    assert extract.main(["--segments", table_of(tmp_path, [clip]), "--out", clips, "--in-process"]) == 0
    assert train.main(["--clips", clips, "--out", str(tmp_path / "run"), "--in-process"]) == 2
    assert "has no clip of split train with labels" in capfd.readouterr().err and not (tmp_path / "run").exists()


def wavs(folder: Path) -> dict[str, np.ndarray]:
    return {p.stem: soundfile.read(p, dtype="float32")[0] for p in folder.glob("*.wav")}


def test_separate_gives_wavs_that_add_up(run, rendered, tmp_path):
    video = sorted((rendered / "clips").glob("*test*"))[0]
    out = tmp_path / "out"
    command = ["separate", str(video), "--model", str(run / "run" / "model"), "--out", str(out)]
    assert cli.main([*command, "--objects", "drum, violin"]) == 0
    sounds = wavs(out)
    assert set(sounds) == {"drum", "violin", "_rest"}
    assert soundfile.info(out / "drum.wav").subtype == "FLOAT"
    whole = media.decode(video).waveform
    error = sum(sounds.values()) - whole
    assert np.sqrt(np.mean(error**2)) < 1e-5 * np.sqrt(np.mean(whole**2))
    report = json.loads((out / "separation.json").read_text())
    assert [o["name"] for o in report["objects"]] == ["drum", "violin"]
    assert report["objects_from"] == "given"

    # again into the same folder, told nothing: the clips had no picture network, so one looks that needs no download
    assert cli.main(command) == 0
    report = json.loads((out / "separation.json").read_text())
    assert report["objects_from"] == "pictures" and report["labeller"] == "efficientnet_lite2"
    assert set(wavs(out)) == {o["name"] for o in report["objects"]} | {"_rest"}
    assert (out / "relation_map.png").read_bytes().startswith(b"\x89PNG")


def test_separate_reads_and_writes_where_a_uri_says(run, rendered, tmp_path, memory_folder):
    """The same as locally; what an earlier separation left there goes."""
    video = sorted((rendered / "clips").glob("*test*"))[0]
    storage.write_bytes(f"{memory_folder}/clip.flac", video.read_bytes())
    command = ["separate", f"{memory_folder}/clip.flac", "--model", str(run / "run" / "model")]
    out = f"{memory_folder}/out"
    assert cli.main([*command, "--out", out, "--objects", "flute"]) == 0
    assert cli.main([*command, "--out", out, "--objects", "drum,violin"]) == 0
    assert cli.main([*command, "--out", str(tmp_path), "--objects", "drum,violin"]) == 0
    names = ["_rest.wav", "drum.wav", "relation_map.png", "separation.json", "violin.wav"]
    assert [storage.name(f) for f in storage.list_files(out)] == names == sorted(os.listdir(tmp_path))
    for name, samples in wavs(tmp_path).items():
        with storage.local_file(f"{out}/{name}.wav") as path:
            assert np.array_equal(soundfile.read(path, dtype="float32")[0], samples)


def test_separate_covers_a_long_file_in_windows(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(commands, "SAY_EVERY_S", 0.0)
    rng = np.random.default_rng(0)
    sound = np.concatenate([synthetic.performance(n, rng, 9.0) for n in ("drum", "flute", "violin")])[: 26 * RATE]
    soundfile.write(tmp_path / "long.flac", sound, RATE, subtype="PCM_24")
    arguments = ["separate", str(tmp_path / "long.flac"), "--model", str(run / "run" / "model")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--objects", "drum,flute"]) == 0
    sounds = wavs(tmp_path / "out")
    assert len(sounds["drum"]) == len(sound)
    assert np.abs(sum(sounds.values()) - sound).max() < 1e-5
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("listening: ", "separating: "))]
    shares = [int(line.split()[1].rstrip("%")) for line in told]
    assert shares == sorted(shares) and shares[-1] == 100


def test_a_failed_separation_leaves_the_earlier_one_whole(run, rendered, tmp_path):
    video, out = str(sorted((rendered / "clips").glob("*test*"))[0]), tmp_path / "out"
    command = ["--model", str(run / "run" / "model"), "--out", str(out)]
    assert cli.main(["separate", video, *command, "--objects", "drum"]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "text.mp4").write_text("no media")
    assert cli.main(["separate", str(tmp_path / "text.mp4"), *command]) == 2
    assert cli.main(["separate", video, *command, "--weights", str(tmp_path / "text.mp4")]) == 2
    assert cli.main(["separate", str(tmp_path / "text.mp4"), *command[:3], str(tmp_path / "new")]) == 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_told_in_one_line(run, rendered, tmp_path, capfd):
    video = str(sorted((rendered / "clips").glob("*test*"))[0])
    command = ["separate", video, "--model", str(run / "run" / "model"), "--out", str(tmp_path)]
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))  # bases that wait need less
        assert cli.main([*command, "--objects", "drum"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert f"avsep separate: {tmp_path} can't be written: " in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_silence_is_nobodys_sound(run, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE, np.float32), RATE)
    arguments = ["separate", str(tmp_path / "silent.wav"), "--model", str(run / "run" / "model")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert set(wavs(tmp_path / "out")) == {"_rest"}
    assert cli.main([*arguments, "--out", str(tmp_path / "no"), "--weights", "nowhere.pth"]) == 2  # needed or not


def test_separate_says_what_its_model_never_heard(run, rendered, tmp_path):
    with (rendered / "segments.csv").open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["split"] == "train"]
    labels = Counter(name for r in rows for name in r["labels"].split(";") if name != "none")
    model = str(run / "run" / "model")
    training = Model.load(model).config.training
    assert training["clips_by_label"] == labels
    assert (training["clips"], training["sources"]) == (sum(bool(r["labels"]) for r in rows), {"files": len(rows)})
    unknown = next(name for name in OBJECT_NAMES if name not in labels)
    report = commands.separate_file(str(rendered / rows[0]["source"]), model, str(tmp_path), [unknown], None)
    assert report["note"].startswith(f"the model was trained on no clip of {unknown}")
    written = json.loads((tmp_path / "separation.json").read_text())
    assert written["note"] == report["note"]
    assert written["model"] == {
        "path": model,
        "recipe": "default",
        "clips": training["clips"],
        "clips_by_label": labels,
        "sources": {"files": len(rows)},
        "about": None,
    }


def test_a_model_is_not_sure_of_sounds_unlike_its_training(run, rendered, tmp_path, capfd):
    """Neither are programs: what a model learned, and from how much, is printed and shown with its answers."""
    model, rng, t = str(run / "run" / "model"), np.random.default_rng(1), np.arange(5 * RATE) / RATE
    strange = {
        "babble": synthetic.performance("babble", rng, 5.0),
        "bell": synthetic.performance("bell", rng, 5.0),
        "noise": 0.1 * rng.standard_normal(5 * RATE),
        "sweep": 0.1 * np.sin(2 * np.pi * (50 * t + 800 * t**2)),
    }
    for name, sound in strange.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, RATE)
    own = [str(p) for p in sorted((rendered / "clips").glob("*test*"))]
    files = [*own, *(str(tmp_path / f"{name}.wav") for name in strange)]
    assert cli.main(["separate", *files, "--model", model, "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    assert re.search(r"this model learned 3 objects from \d clips \(files; recipe default\): drum \d, flute \d", said)
    found = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*/separation.json")}
    for name in strange:
        assert all(0.1 <= o["confidence"] <= 0.9 for o in found[name]["objects"])
        assert all(f"{o['confidence']:.0%} sure" in said for o in found[name]["objects"] if not o["silent"])
    assert min(o["familiarity"] for o in found["sweep"]["objects"]) < 0.3
    assert "the sound is unlike what the model was trained on: " in found["sweep"]["note"]
    heard = [o for p in own for o in found[Path(p).stem]["objects"] if not o["silent"]]
    assert np.mean([o["familiarity"] for o in heard]) > 0.8
    assert cli.main(["inspect", model]) == 0
    assert "this model learned 3 objects from" in capfd.readouterr().out


def test_separate_knows_its_own_after_a_failure(run, rendered, tmp_path):
    video = str(next((rendered / "clips").glob("*test*")))
    command = ["separate", video, "--model", str(run / "run" / "model"), "--out", str(tmp_path), "--objects", "drum"]
    (tmp_path / "relation_map.png").mkdir()
    assert cli.main(command) == 2
    (tmp_path / "relation_map.png").rmdir()
    assert cli.main(command) == 0 and (tmp_path / "drum.wav").exists()


def test_separate_leaves_foreign_wavs_alone(run, rendered, tmp_path):
    soundfile.write(tmp_path / "mine.wav", np.zeros(10, np.float32), RATE)
    video = str(sorted((rendered / "clips").glob("*test*"))[0])
    assert cli.main(["separate", video, "--model", str(run / "run" / "model"), "--out", str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.wav"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["separate", "missing.mp4", "--model", "MODEL", "--out", "OUT"], ["missing.mp4", "check the path"]),
        (["separate", "VIDEO", "--model", "MODEL", "--out", "VIDEO"], ["--out", "is a file; give a folder"]),
        (["separate", __file__, "--model", "MODEL", "--out", "OUT"], [__file__, "unreadable"]),
        (["separate", "VIDEO", "--model", "nowhere", "--out", "OUT"], ["nowhere", "pipelines.train"]),
        (["separate", "VIDEO", "--model", "MODEL", "--out", "OUT", "--objects", "kazoo"], ["kazoo", "violin"]),
        (["separate", "VIDEO", "--model", "MODEL", "--out", "OUT", "--objects", ","], ["--objects"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["label", "VIDEO", "--weights", "nowhere.pth"], ["nowhere.pth", "no such file"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(run, rendered, tmp_path, capfd, arguments, words):
    known = {"MODEL": str(run / "run" / "model"), "OUT": str(tmp_path / "out")}
    known["VIDEO"] = str(sorted((rendered / "clips").glob("*test*"))[0])
    assert cli.main([known.get(a, a) for a in arguments]) == 2
    message = [line for line in capfd.readouterr().err.splitlines() if line.startswith("avsep ")]
    assert len(message) == 1
    for word in words:
        assert word in message[0]


def test_factors_are_kept_for_the_same_sound_alone():
    """Other windows of a clip, and other clips, have the same seeds and lengths."""
    asked = []

    def factorize(waveform, seed, how):
        asked.append(seed)
        return 1 + waveform.sum() + seed

    once = evaluation.once(factorize)
    a, b = np.ones(10), np.zeros(10)
    assert once([a, b, a, a.copy()], [0, 0, 1, 0], ExtractionConfig()).result() == [11, 1, 12, 11]
    assert asked == [0, 0, 1]
    assert once([a], [0], ExtractionConfig(n_iter=9)).result() == [11] and asked == [0, 0, 1, 0]


def test_inspect_knows_models_extractions_and_shards(run, capsys):
    assert cli.main(["inspect", str(run / "run" / "model")]) == 0
    assert "parameters" in capsys.readouterr().out
    assert cli.main(["inspect", str(run / "clips")]) == 0
    assert "14 clips and 0 rejections" in capsys.readouterr().out
    assert cli.main(["inspect", shards.clip_files(str(run / "clips"))[0]]) == 0
    assert "bases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        (train, ["--clips", "A"], "--clips"),
        (audit, ["--clips", "A"], "--clips"),
        (evaluate, ["--model", "A", "--segments", "T", "--references", "R"], "--model"),
        (evaluate, ["--model", "M", "--segments", "T", "--references", "A"], "--references"),
        (evaluate, ["--model", "M", "--segments", "A/clips.csv", "--references", "R"], "--segments"),
        (extract, ["--segments", "A"], "--segments"),
        (extract, ["--segments", "T", "--media", "A"], "--media"),
        (finetune, ["--segments", "T", "--clips", "A", "--model", "M"], "--clips"),
        (finetune, ["--segments", "T", "--targets", "labels", "--weights", "A/labeller.safetensors"], "--weights"),
        (manifest, ["--table", "A/segments.parquet"], "--table"),
        (manifest, ["--audioset", "T", "--ontology", "A/statistics.json"], "--ontology"),
    ],
)
def test_an_input_is_no_output(tmp_path, capfd, program, arguments, named):
    """By whatever name: the output is a link to the folder of an input."""
    for folder in ("A", "M", "R"):
        (tmp_path / folder / "commits").mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    table_of(tmp_path, [{"segment_id": "a", "source": "/a.wav", "split": "train"}])
    for name in ("A/clips.csv", "T.csv", "A/segments.parquet"):
        shutil.copy(tmp_path / "table.csv", tmp_path / name)
    for name in ("A/labeller.safetensors", "A/statistics.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "A")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    known = {"T": "T.csv"}
    words = [a if a.startswith("--") or a == "labels" else str(tmp_path / known.get(a, a)) for a in arguments]
    assert program.main([*words, "--out", str(tmp_path / "link")]) == 2
    complaint = capfd.readouterr().err
    assert f"--out {tmp_path / 'link'} " in complaint and named in complaint and "give another folder" in complaint
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("program", [demo, manifest, extract, audit, train, finetune, collect, evaluate, serve])
def test_no_argument_may_be_empty(program, capfd):
    """An unset variable in quotes is no place, and no name."""
    options = [a for a in program.parser()._actions if a.option_strings and a.nargs != 0 and a.type is None]
    assert options
    for action in options:
        with pytest.raises(SystemExit) as stop:
            program.parser().parse_args([action.option_strings[0], ""])
        assert stop.value.code == 2
        complaint = capfd.readouterr().err.splitlines()
        assert len(complaint) == 1 and f"argument {action.option_strings[0]}: its value is empty" in complaint[0]


def same_records(one: str, other: str) -> None:
    a, b = ({r.segment_id: r for r in shards.read_clips(out)} for out in (one, other))
    assert a.keys() == b.keys()
    for i, x in a.items():
        np.testing.assert_allclose(x.bases.astype(float), b[i].bases.astype(float), atol=2e-3)
        assert x.kl_divergence == pytest.approx(b[i].kl_divergence, rel=1e-4)
        assert x.media_sha256 == b[i].media_sha256


def test_ray_and_a_plain_loop_write_the_same(run, rendered, tmp_path):
    segments, out = str(rendered / "segments.csv"), str(tmp_path / "clips")
    command = [sys.executable, "-m", "pipelines.extract", "--segments", segments, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    same_records(str(run / "clips"), out)
    names = [sorted(p.name for p in (Path(o) / "clips").iterdir()) for o in (run / "clips", out)]
    assert [n.rsplit("-", 1)[0] for n in names[0]] == [n.rsplit("-", 1)[0] for n in names[1]]
    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=60)
    assert "14 done, 0 to do" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_run_on_ray_as_commands(run, rendered, tmp_path):
    """`python -m` makes the program `__main__`, which Ray's workers can't import."""
    weights = tmp_path / "small.safetensors"
    ImageLabeller("shufflenet_v2_x0_5", build_network("shufflenet_v2_x0_5", 1000).eval(), "").save(weights)
    segments, clips, model = str(rendered / "segments.csv"), str(tmp_path / "clips"), str(run / "run/model")
    commands = [
        ["extract", "--segments", segments, "--out", clips, "--weights", str(weights)],
        ["evaluate", "--model", model, "--segments", segments, "--references", str(rendered / "references"),
         "--out", str(tmp_path / "results")],
    ]  # fmt: skip
    for program, *arguments in commands:
        ran = subprocess.run(
            [sys.executable, "-m", f"pipelines.{program}", *arguments], capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, f"{program}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    assert all(r.image_logits is not None for r in shards.read_clips(clips))
    assert (tmp_path / "results/report.html").exists()


def test_bad_clips_are_counted_rejections_and_can_be_retried(rendered, tmp_path):
    good = sorted((rendered / "clips").glob("*train*"))[:2]
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "empty.mp4").touch()
    rows = [{"segment_id": "good", "source": str(good[0]), "labels": "drum"}]
    rows += [{"segment_id": s, "source": f"{s}.mp4", "labels": "drum"} for s in ("text", "empty", "late")]
    soundfile.write(tmp_path / "silent.flac", np.zeros(RATE, np.float32), RATE)
    rows += [{"segment_id": "silent", "source": "silent.flac", "labels": "drum"}]
    segments, out = table_of(tmp_path, rows), str(tmp_path / "out")
    assert extract.main(["--segments", segments, "--out", out, "--in-process"]) == 0
    reasons = {r.segment_id: (r.reason, r.attempts) for r in shards.read_rejections(out)}
    expected = {"text": "unreadable", "empty": "empty", "late": "missing", "silent": "silent"}
    assert reasons == {i: (r, 1) for i, r in expected.items()}
    assert shards.read_ids(out)[0] == ["good"]

    shutil.copy(good[1], tmp_path / "late.mp4")
    retry = ["--segments", segments, "--out", out, "--in-process", "--retry-rejected"]
    assert extract.main([*retry, "missing", "empty"]) == 0
    assert shards.read_ids(out) == (["good", "late"], ["empty", "silent", "text"])
    attempts = {r.segment_id: r.attempts for r in shards.read_rejections(out)}
    assert attempts == {"text": 1, "empty": 2, "silent": 1}
    assert extract.main([*retry, "nonsense"]) == 2


def test_pictures_decide_where_no_labels_are_given(rendered, tmp_path, capfd):
    """A network that calls everything a dog; its logits are kept, and it goes with the clips and the model."""
    names, index = ("dog", "violin"), [151, 889]
    network = vision.build_network("squeezenet1_1", len(names))
    with torch.no_grad():
        network.classifier[1].weight.zero_()
        network.classifier[1].bias.copy_(torch.tensor([3.0, 0.0]))
    weights = tmp_path / "small.safetensors"
    vision.ImageLabeller("squeezenet1_1", network.eval(), "", tuple(index)).save(weights)
    clips = sorted((rendered / "clips").glob("*train*"))[:3]
    told = [{"segment_id": "told", "source": str(clips[0]), "labels": "violin"}]
    seen = [{"segment_id": f"seen{i}", "source": str(c)} for i, c in enumerate(clips)]
    (tmp_path / "a").mkdir()
    for name, rows in (("told", told), ("seen", seen)):
        command = ["--segments", table_of(tmp_path / "a", rows), "--out", str(tmp_path / name), "--in-process"]
        assert extract.main([*command, "--weights", str(weights), "--profile"]) == 0
        printed = capfd.readouterr().out
        assert "clips/s that the stages together allow" in printed
        assert {"decode", "factorize", "label"} <= {line.split(":")[0].strip() for line in printed.splitlines()}
    configuration = shards.read_configuration(str(tmp_path / "told"))
    made_with = DataConfig.from_dict(configuration)
    assert made_with.vocabulary == AUDIOSET_23
    assert (made_with.labeller, made_with.extraction.looks) == ("squeezenet1_1", "tiles")
    (given,) = shards.read_clips(str(tmp_path / "told"))
    assert (given.label_source, given.labels) == ("given", ("violin",))
    assert given.image_logits.shape == (6, 1000)
    assert np.isfinite(given.image_logits[0]).nonzero()[0].tolist() == index
    pictured = list(shards.read_clips(str(tmp_path / "seen")))
    assert [p.label_source for p in pictured] == ["pictures"] * 3 and pictured[0].labels is None
    scores = object_scores(torch.from_numpy(pictured[0].image_logits.astype(np.float32)), joined=True)
    assert weak_labels(scores).nonzero().flatten().tolist() == [object_index("dog")]

    run = tmp_path / "run"
    arguments = ["--clips", str(tmp_path / "seen"), "--out", str(run), "--epochs", "1", "--in-process"]
    assert train.main(arguments) == 0
    assert (run / "model" / "labeller.safetensors").read_bytes() == weights.read_bytes()
    assert cli.main(["separate", str(clips[0]), "--model", str(run / "model"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "separation.json").read_text())
    assert report["objects_from"] == "pictures" and report["labeller"] == "squeezenet1_1"
    assert report["objects"][0]["name"] == "dog" and report["objects"][0]["picture_score"] > 0.9


def test_a_fine_tuned_network_goes_with_the_model(run, rendered, tmp_path, capsys):
    model, out = str(shutil.copytree(run / "run" / "model", tmp_path / "model")), tmp_path / "out"
    command = ["--segments", str(run / "manifest"), "--clips", str(run / "clips"), "--model", model, "--in-process"]
    status = finetune.main([*command, "--out", str(out), "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "from scratch" in printed and "before: mAP" in printed
    rows = json.loads((out / "history.json").read_text())
    assert [r["epoch"] for r in rows] == [0, 1] and {"map", "agreement", "train_loss"} <= set(rows[0])
    if status == 1:  # two epochs on nine clips may bring nothing: then nothing is written
        assert "nothing was written" in printed and not (out / "labeller.safetensors").exists()
        weights = out / "start.safetensors"
    else:
        assert status == 0 and "after mAP" in printed
        weights = tmp_path / "model" / "labeller.safetensors"
        labeller = vision.ImageLabeller.load(weights=weights)
        entry = json.loads((tmp_path / "model" / "config.json").read_text())["labeller"]
        assert entry == {"architecture": labeller.architecture, "sha256": labeller.sha256, "looks": "centre"}
        assert Model.load(model).context is not None or Model.load(str(run / "run" / "model")).context is None
    video = str(sorted((rendered / "clips").glob("*val*"))[0])
    assert cli.main(["label", video, "--weights", str(weights)]) == 0
    rows = [{"segment_id": "again", "source": video, "labels": "drum"}]
    again = ["--segments", table_of(tmp_path, rows), "--out", str(tmp_path / "again"), "--in-process"]
    assert extract.main([*again, "--weights", str(weights)]) == 0
    (record,) = shards.read_clips(str(tmp_path / "again"))
    assert np.isfinite(record.image_logits[0]).sum() == 24


def test_segments_without_labels_or_weights_stop_at_the_start(rendered, tmp_path, capfd):
    rows = [{"segment_id": "a", "source": str(next((rendered / "clips").iterdir()))}]
    out = tmp_path / "out"
    assert extract.main(["--segments", table_of(tmp_path, rows), "--out", str(out), "--in-process"]) == 2
    error = capfd.readouterr().err
    assert "--weights" in error and "--labeller efficientnet_lite2" in error and error.count("\n") == 1
    assert not out.exists()


def history(out: Path) -> list[dict]:
    path = out / "history.json"
    return json.loads(path.read_text()) if path.exists() else []


def wait_for(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def ray_processes(mark: str) -> list[str]:
    """Ray's own processes among those that were started with a mark in their environment."""
    return [title for title in marked(mark).values() if "raylet" in title or "gcs_server" in title]


@pytest.mark.chaos
def test_a_killed_extraction_goes_on_exactly_once(run, rendered, tmp_path):
    mark, out = f"AVSEP_TESTS={tmp_path}", tmp_path / "out"
    environment = os.environ | {"AVSEP_TESTS": str(tmp_path)}
    command = [sys.executable, "-m", "pipelines.extract", "--out", str(out)]
    command += ["--segments", str(rendered / "segments.csv")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any((out / "commits").glob("*.json")), process)
    assert ray_processes(mark)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = len(shards.read_ids(str(out))[0])
    assert part > 0
    assert subprocess.run(command, env=environment, timeout=240).returncode == 0
    same_records(str(run / "clips"), str(out))
    assert len(shards.read_ids(str(out))[0]) == 14
    for _ in range(100):
        if not ray_processes(mark):
            break
        time.sleep(0.3)
    assert not ray_processes(mark)
    for commit in shards.read_commits(str(out)):
        assert hashlib.sha256((out / commit.clips.path).read_bytes()).hexdigest() == commit.clips.sha256


@pytest.mark.chaos
def test_a_killed_training_goes_on_where_it_stopped(run, tmp_path):
    command = [sys.executable, "-m", "pipelines.train", "--clips", str(run / "clips"), "--in-process", "--epochs", "40"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "--out", str(whole)], env=environment).returncode == 0
    process = subprocess.Popen([*command, "--out", str(broken)], env=environment)
    wait_for(lambda: len(history(broken)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(history(broken)) < 40
    assert subprocess.run([*command, "--out", str(broken), "--resume"], env=environment).returncode == 0
    expected, got = ([r["train_loss"] for r in history(o)] for o in (whole, broken))
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    a, b = (Model.load(str(o / "model")).network.state_dict() for o in (whole, broken))
    for name, value in a.items():
        np.testing.assert_allclose(value.numpy(), b[name].numpy(), rtol=1e-2, atol=1e-3)


def test_remote_segments_are_fetched_once_and_kept(run, rendered, web, tmp_path):
    address, asked = web
    clip = sorted((rendered / "clips").glob("*train*"))[0].name
    rows = [{"segment_id": "-a_b", "source": f"{address}/{clip}", "start_s": 0, "end_s": 6, "labels": "drum"}]
    rows += [{"segment_id": "gone", "source": f"{address}/gone.mp4", "start_s": 0, "end_s": 6, "labels": "drum"}]
    segments, media_store = table_of(tmp_path, rows), str(tmp_path / "media")
    command = ["--segments", segments, "--media", media_store, "--rate", "100000", "--in-process"]

    assert extract.main([*command, "--out", media_store, "--until", "fetch"]) == 0  # to the store itself
    shutil.rmtree(media_store)
    first = str(tmp_path / "first")
    assert extract.main([*command, "--out", first, "--until", "fetch"]) == 0
    assert shards.read_ids(first) == ([], ["gone"])
    asked.clear()
    assert extract.main([*command, "--out", first]) == 0  # follows, and asks for nothing again
    assert shards.read_ids(first) == (["-a_b"], ["gone"])
    (rejection,) = shards.read_rejections(first)
    assert (rejection.stage, rejection.reason) == ("fetch", "removed")
    (record,) = shards.read_clips(first)
    assert record.source == f"{address}/{clip}" and record.duration_s == pytest.approx(6, abs=0.1)
    assert asked == []

    # it comes back: fetching it takes the rejection back, and extraction follows
    shutil.copy(rendered / "clips" / clip, rendered / "clips" / "gone.mp4")
    try:
        assert extract.main([*command, "--out", first, "--until", "fetch", "--retry-rejected"]) == 0
    finally:
        (rendered / "clips" / "gone.mp4").unlink()
    assert shards.read_ids(first) == (["-a_b"], [])
    assert extract.main([*command, "--out", first]) == 0
    assert shards.read_ids(first) == (["-a_b", "gone"], [])

    assert extract.main(["--segments", segments, "--out", str(tmp_path / "x"), "--in-process"]) == 2  # no --media


def test_extraction_follows_a_fetch_live(rendered, web, tmp_path, monkeypatch, capfd):
    """While one run downloads, an extraction to the same folder takes what has come and downloads nothing."""
    address, asked = web
    names = [p.name for p in sorted((rendered / "clips").glob("*train*"))[:3]]
    rows = [
        {"segment_id": f"s{i}", "source": f"{address}/{n}", "start_s": 0, "end_s": 2, "labels": "drum"}
        for i, n in enumerate([*names, "gone.mp4"])
    ]
    segments, store, out = table_of(tmp_path, rows), str(tmp_path / "media"), str(tmp_path / "out")
    arguments = ["--segments", segments, "--media", store, "--out", out, "--in-process"]
    program = [sys.executable, "-m", "pipelines.extract", *arguments, "--until", "fetch", "--rate", "1000"]
    fetching = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "media" / "fetch.lock").exists, fetching)
    assert extract.main([*arguments, "--until", "fetch"]) == 2  # it is at it
    assert "in use by process" in capfd.readouterr().err
    monkeypatch.setattr(downloads, "FOLLOW_S", 1.0)
    assert extract.main(arguments) == 0
    assert "another run downloads" in capfd.readouterr().out
    assert fetching.wait(timeout=60) == 0
    assert shards.read_ids(out) == (["s0", "s1", "s2"], ["s3"])
    assert max(sum(n in path for path in asked) for n in names) <= 3  # each was downloaded by one of them
    egress = json.loads((tmp_path / "media" / "egress.json").read_text())
    assert len(egress["identities"]) == 1
    for status in ("status.json", "fetch-status.json"):
        assert json.loads((tmp_path / "out" / status).read_text())["done"] == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_too_busy_for_ray_is_tried_again_and_then_gets_one_line(tmp_path):
    """Ray's own node isn't known to Ray in the 30 s that it waits for it."""
    table = tmp_path / "segments.csv"
    table.write_text("segment_id,source,labels\nx,x.mp4,drum\n")
    slow = {"RAY_testing_asio_delay_us": "NodeInfoGcsService.grpc_server.RegisterNode=90000000:90000000"}
    command = [sys.executable, "-m", "pipelines.extract", "--segments", str(table), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | slow, capture_output=True, text=True, timeout=500)
    (line,) = (line for line in done.stderr.splitlines() if "testing_asio_delay" not in line)
    assert done.returncode == 2 and line.startswith("pipelines.extract: Ray didn't start on this machine in 3 tries: ")
    assert line.endswith("(it lives, but was given 30 s); try again when less runs, or --in-process"), line
    assert done.stdout.count("; trying again\n") == 2


LATE = """
import os, sys, time
if any("dashboard/agent.py" in a for a in sys.orig_argv):
    try:
        os.close(os.open(os.path.join(os.path.dirname(__file__), "once"), os.O_CREAT | os.O_EXCL))
        time.sleep(40)
    except FileExistsError:
        pass
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_is_started_again_where_its_raylet_gave_up_its_own_agent(tmp_path):
    """The first agent writes its ports later than the 15 s that its raylet gives it."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    program = (
        "from pipelines import runners\n"
        "def double(x): return 2 * x\n"
        "with runners.session() as runner: print(list(runner.map(double, [(2,)])))\n"
    )
    mark = f"AVSEP_TESTS={tmp_path}"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"AVSEP_TESTS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said, result = done.stdout.splitlines()
    assert said.startswith("Ray didn't start on this machine: its raylet ended: ") and said.endswith("; trying again")
    assert "metrics_agent_port" in said or "WaitForDashboardAgentPorts" in said
    assert result == "[4]"
    for _ in range(100):
        if not ray_processes(mark):
            break
        time.sleep(0.3)
    assert not ray_processes(mark)
