"""`pipelines.train --start`: it adapts a model, or keeps it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avsep import starter
from avsep.factors import DataConfig
from avsep.learning.adapting import agreements
from avsep.learning.bags import load_bags
from avsep.model import CONFIG_FILE, Labelling, Model, ModelConfig, NetworkConfig
from avsep.shards import clip_files
from pipelines import extract, train
from pipelines.adaptation import seen_by
from tests.support import sounds
from tests.support.scenes import table_of


def extracted(folder: Path, n: int) -> str:
    """Clips of noise, all labelled as drums: there is nothing to learn from them."""
    table, out = sounds.table(folder / "sounds", n), str(folder / "clips")
    assert extract.main(["--segments", str(table), "--out", out, "--in-process"]) == 0
    return out


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> str:
    return extracted(tmp_path_factory.mktemp("noises"), 12)


def adapt(clips: str, out: Path, *more: str, start: str = "starter") -> int:
    return train.main(["--clips", clips, "--out", str(out), "--start", start, "--in-process", *more])


def weights(folder: Path | str) -> bytes:
    return Path(folder, "miml.safetensors").read_bytes()


def same_network(first: str | Path, second: str | Path) -> bool:
    a, b = (Model.load(str(m)).network.state_dict() for m in (first, second))
    return all(torch.equal(a[k], v) for k, v in b.items())


def test_clips_that_teach_nothing_keep_the_start(noises: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert adapt(noises, out, "--epochs", "1") == 0
    assert "the start is kept as it was: held-back clips show no gain" in capfd.readouterr().out
    assert same_network(starter.PATH, out / "model")
    before, after = ModelConfig.read(starter.PATH), ModelConfig.read(str(out / "model"))
    said = dict(after.training)
    adapted = said.pop("adapted")
    assert said == before.training and (adapted["kept_start"], adapted["clips"], adapted["from"]) == (
        True,
        12,
        "starter",
    )
    assert replace(after, training={}, versions={}) == replace(before, training={}, versions={})
    assert adapt(noises, out, "--epochs", "1") == 2  # it is there
    assert "--replace makes it anew" in capfd.readouterr().err
    assert adapt(noises, out, "--resume") == 2
    assert "another --start, --epochs or --without" in capfd.readouterr().err
    for half in (1, 2):  # a resumed run doesn't do again what is done
        path = out / f"adapting-{half}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"before": [0.0] * 6, "after": [1.0] * 6}))
    assert adapt(noises, out, "--epochs", "1", "--resume") == 0
    assert "adapted to 12 clips" in capfd.readouterr().out and not same_network(starter.PATH, out / "model")
    assert "adapted with 12 clips of one's own" in ModelConfig.read(str(out / "model")).training["about"]


def test_few_clips_keep_the_start(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert adapt(extracted(tmp_path, 3), tmp_path / "run") == 0
    assert "too few of 3 clips have labels to show" in capfd.readouterr().out
    for more in ([], ["--resume"]):  # there is nothing to go on with
        assert adapt(extracted(tmp_path, 3), tmp_path / "run", *more) == 2
        assert "holds a model; another --out leaves it alone; --replace" in capfd.readouterr().err
    assert same_network(starter.PATH, tmp_path / "run" / "model")


def test_a_start_that_would_be_deleted_is_refused(noises: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    kept = out / "previous" / "model"
    shutil.copytree(starter.PATH, kept)
    assert adapt(noises, out, "--replace", start=str(kept)) == 2
    assert f"would delete --start {kept}" in capfd.readouterr().err and (kept / "config.json").exists()


@pytest.mark.slow
def test_a_half_of_other_clips_is_no_part_of_it(noises: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert adapt(noises, tmp_path / "run", "--epochs", "1") == 0
    (tmp_path / "run" / "adapting-1.json").unlink()
    assert adapt(extracted(tmp_path, 11), tmp_path / "run", "--epochs", "1", "--resume") == 2
    assert "adapting-2.json is of other clips" in capfd.readouterr().err
    assert adapt(noises, tmp_path / "run", "--epochs", "1", "--resume") == 0  # the other half alone is done again
    assert capfd.readouterr().out.count("has judged what the other one taught") == 1


def altered(folder: Path, **changes: object) -> str:
    """The starter with another configuration."""
    shutil.copytree(starter.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    replace(ModelConfig.read(starter.PATH), **changes).write(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("bases", ["n_bases 25", "with 30", "extract the clips again"]),
        ("hop", ["hop_length 2400", "hop_length 1200"]),
        ("objects", ["22 objects", "23 objects"]),
        ("published", ["recipe 'paper'", "can't be adapted"]),
        ("recipe", ["--recipe paper", "leave --recipe out"]),
        ("nothing", ["holds no config.json", "the word starter"]),
    ],
)
def test_what_does_not_fit_is_named(
    noises: str, tmp_path: Path, capfd: pytest.CaptureFixture, change: str, words: Sequence[str]
) -> None:
    config, more, model = ModelConfig.read(starter.PATH), [], tmp_path / "model"
    extraction = config.extraction
    changes = {
        "bases": {"extraction": replace(extraction, n_bases=30)},
        "hop": {"extraction": replace(extraction, stft=replace(extraction.stft, hop_length=1200))},
        "objects": {"vocabulary": type(config.vocabulary)(config.vocabulary.objects[1:])},
        "published": {"network": NetworkConfig(), "recipe": "paper"},
    }.get(change, {})
    start = altered(model, **changes)
    if change == "recipe":
        more = ["--recipe", "paper"]
    if change == "nothing":
        (model / CONFIG_FILE).unlink()
    assert adapt(noises, tmp_path / "run", *more, start=start) == 2
    complaint = capfd.readouterr().err
    assert all(word in complaint for word in words), complaint
    assert complaint.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_starter_hears_rendered_clips_better_afterwards(rendered: Path, tmp_path: Path) -> None:
    """By the labels of clips that it hasn't learned from: those of splits val and test."""
    table = tmp_path / "segments.csv"
    table.write_text(table_of(rendered).replace("clips/", f"{rendered}/clips/"))
    clips = str(tmp_path / "clips")
    assert extract.main(["--segments", str(table), "--out", clips, "--in-process"]) == 0
    assert adapt(clips, tmp_path / "run") == 0
    model, start = Model.load(str(tmp_path / "run" / "model")), Model.load(starter.PATH)
    assert not model.config.training["adapted"]["kept_start"]
    held = [load_bags(clip_files(clips), model.config.labelling, split) for split in ("val", "test")]
    gains = [float((agreements(model.network, b) - agreements(start.network, b)).mean()) for b in held if b is not None]
    assert min(gains) > 0 and max(gains) > 0.1, gains


def test_clips_that_were_looked_at_otherwise_bring_their_own_way() -> None:
    """The start's knowledge of its picture network's scores holds for that network and way alone."""
    start = ModelConfig.read(starter.PATH)
    made_with = DataConfig(start.extraction, start.vocabulary, "efficientnet_lite2", "0" * 64)
    assert seen_by(made_with, start).evidence == start.evidence
    for changed in (
        replace(made_with, labeller="resnet152"),
        replace(made_with, extraction=replace(start.extraction, looks="centre", image_size=224)),
    ):
        config = seen_by(changed, start)
        assert config.evidence == replace(start.evidence, picture_slope=0.0, picture_offset=0.0)
        assert config.extraction == changed.extraction and config.labelling == Labelling.of(changed)
