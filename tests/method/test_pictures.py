"""Objects found in pictures by a real network, whose weights are among the dependencies, and the job from there on."""

import csv
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image

from avsep import cli, media, shards, synthetic
from avsep.model import Labelling, Model, label_config
from avsep.objects import AUDIOSET_23, OBJECT_NAMES
from avsep.videos import VideoSeparator
from avsep.vision import ImageLabeller
from pipelines import evaluate, extract, manifest, recipes, train

PICTURES = Path(__file__).parents[1] / "data" / "pictures"
Box = tuple[float, float, float, float]  # left, top, width, height, as parts of the frame's

UNEVEN: dict[tuple[str, ...], tuple[Box, ...]] = {  # never in halves or thirds of the frame
    ("acoustic_guitar", "car"): ((0.03, 0.05, 0.3, 0.9), (0.42, 0.25, 0.55, 0.65)),
    ("cat", "electric_guitar"): ((0.02, 0.1, 0.6, 0.8), (0.68, 0.05, 0.28, 0.9)),
    ("harp", "cat"): ((0.66, 0.05, 0.3, 0.9), (0.03, 0.25, 0.58, 0.7)),
}


def frame(names: tuple[str, ...], places: tuple[Box, ...], size: tuple[int, int] = (569, 320)) -> NDArray[np.uint8]:
    """Lay pictures on a plain wall, each as large as its place allows, `(height, width, 3)`."""
    image = Image.new("RGB", size, (214, 209, 198))
    for name, (x, y, w, h) in zip(names, places, strict=True):
        picture = Image.open(PICTURES / f"{name}.jpg")
        scale = min(w * size[0] / picture.width, h * size[1] / picture.height)
        picture = picture.resize((round(scale * picture.width), round(scale * picture.height)))
        left, top = x * size[0] + (w * size[0] - picture.width) / 2, y * size[1] + (h * size[1] - picture.height) / 2
        image.paste(picture, (round(left), round(top)))
    return np.asarray(image)


def found(labeller: ImageLabeller, images: NDArray[np.uint8], way: str) -> set[str]:
    config = Labelling(label_config(labeller.architecture, way), AUDIOSET_23)
    marks = config.choose(config.scores(labeller.evidence(images, way)))
    return {name for name, on in zip(OBJECT_NAMES, marks.tolist(), strict=True) if on}


@pytest.fixture(scope="module")
def lite0() -> ImageLabeller:
    return ImageLabeller.load("efficientnet_lite0")


@pytest.mark.parametrize("names", UNEVEN)
def test_objects_beside_each_other_are_found_by_tiles_and_missed_in_the_middle(
    lite0: ImageLabeller, names: tuple[str, ...]
) -> None:
    images = np.stack([frame(names, UNEVEN[names])] * 10)
    assert not set(names) <= found(lite0, images[:1], "centre")
    labels = found(lite0, images, "tiles")
    assert set(names) <= labels and len(labels) <= len(names) + 1


def write_clip(folder: Path, number: int, names: tuple[str, ...], split: str) -> dict[str, str]:
    """Write three seconds of pictures and of the sounds of what they show, with references; return the table's row."""
    places = ((0.03, 0.05, 0.3, 0.9), (0.42, 0.25, 0.55, 0.65)) if len(names) == 2 else ((0.2, 0.05, 0.6, 0.9),)
    segment_id, rng = f"{split}{number}", np.random.default_rng(number)
    sounds = {name: synthetic.performance(name, rng, 3.0) for name in names}
    references = folder / "references" / segment_id
    references.mkdir(parents=True)
    for name, sound in {**sounds, "_rest": np.zeros(3 * 48_000, np.float32)}.items():
        soundfile.write(references / f"{name}.flac", sound, 48_000, subtype="PCM_24")
    soundfile.write(folder / "mix.wav", sum(sounds.values()), 48_000, subtype="FLOAT")
    Image.fromarray(frame(names, places, (570, 320))).save(folder / "frame.png")
    video = folder / f"{segment_id}.mp4"
    subprocess.run(
        [
            *(media.ffmpeg_executable(), "-loglevel", "error", "-loop", "1", "-r", "5", "-i", folder / "frame.png"),
            *("-i", folder / "mix.wav", "-t", "3", "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"),
            *("-c:a", "aac", "-b:a", "256k", video),
        ],
        check=True,
    )
    return {"segment_id": segment_id, "source": str(video), "split": split, "objects": ";".join(names)}


@pytest.mark.slow
def test_the_main_job_from_pictures_alone(tmp_path: Path, capfd, monkeypatch) -> None:
    """No labels in the table and no download: what is seen is found, learned from, and separated."""
    recipe = recipes.default()
    small = replace(recipe, extraction=replace(recipe.extraction, image_size=288, n_iter=40))
    monkeypatch.setitem(recipes.RECIPES, "default", lambda: small)
    guitar, violin, both = ("acoustic_guitar",), ("violin",), ("acoustic_guitar", "violin")
    kinds = {"train": (guitar, violin, both, guitar, violin, both), "val": (both,), "test": (both,)}
    rows = [write_clip(tmp_path, n, names, split) for split, clips in kinds.items() for n, names in enumerate(clips)]
    with (tmp_path / "clips.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    segments, clips, run = (str(tmp_path / name) for name in ("segments", "clips", "run"))
    assert manifest.main(["--table", str(tmp_path / "clips.csv"), "--out", segments]) == 0
    own = ["--labeller", "efficientnet_lite0", "--in-process"]
    assert extract.main(["--segments", segments, "--out", clips, *own]) == 0
    assert "pictures: efficientnet_lite0, looks: tiles" in capfd.readouterr().out
    configuration = shards.read_configuration(clips)
    assert (configuration["extraction"]["image_size"], configuration["labeller"]) == (288, "efficientnet_lite0")
    labels = Labelling(label_config("efficientnet_lite0", "tiles"), AUDIOSET_23)
    for record in shards.read_clips(clips):
        seen = labels.choose(labels.scores(torch.from_numpy(record.image_logits.astype(np.float32))))
        assert record.image_logits.shape == (3, 1000) and record.label_source == "pictures"
        assert set(record.objects) <= {n for n, on in zip(OBJECT_NAMES, seen.tolist(), strict=True) if on}

    assert train.main(["--clips", clips, "--out", run, "--epochs", "1", "--in-process"]) == 0
    model = str(Path(run, "model"))
    extraction = Model.load(model).config.extraction
    assert (extraction.image_size, extraction.looks) == (288, "tiles")
    told = ["--segments", segments, "--references", str(tmp_path / "references"), "--in-process"]
    assert evaluate.main(["--model", model, *told, "--out", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "results.json").exists()

    video, out = str(tmp_path / "test0.mp4"), tmp_path / "separated"
    assert VideoSeparator.load(model)(Path(video), tmp_path / "parts").images.shape == (3, 288, 513, 3)
    assert cli.main(["separate", video, "--model", model, "--out", str(out)]) == 0
    assert "pictures: efficientnet_lite0" in capfd.readouterr().out
    report = json.loads((out / "separation.json").read_text())
    assert report["labeller"] == "efficientnet_lite0" and report["objects_from"] == "pictures"
    assert {"acoustic_guitar", "violin"} <= {o["name"] for o in report["objects"]}
    assert all((out / o["file"]).exists() for o in report["objects"]) and (out / "_rest.wav").exists()


def test_label_says_which_network_it_used(tmp_path: Path, capsys) -> None:
    write_clip(tmp_path, 0, ("acoustic_guitar",), "test")
    assert cli.main(["label", str(tmp_path / "test0.mp4"), "--labeller", "efficientnet_lite0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "pictures: efficientnet_lite0, looks: tiles"
    assert re.fullmatch(r"0\.\d+  acoustic_guitar  \(label\)  \[(0\.\d+, ){3}[01]\.\d+\] at \d\.5 s", printed[1])
