"""A picture network of three colours, whose maps follow from its picture, and files that show them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avsep import media
from avsep.model import LABELLER_FILE, LabellerConfig, ModelConfig
from avsep.objects import AUDIOSET_23
from avsep.vision import NETWORKS, ImageLabeller, ImageNetwork, Preprocessing
from tests.support.serving import Server, serving, write_model, write_sound

COLOURS = {"dog": (255, 0, 0), "violin": (0, 255, 0), "cat": (0, 0, 255)}  # of what it takes for them
BOXES = {"dog": (0.05, 0.2, 0.35, 0.7), "violin": (0.6, 0.1, 0.95, 0.5), "cat": (0.5, 0.65, 0.8, 0.95)}  # a video's
_STRIDE = 4


class Planted(nn.Module):
    """A cell is as red, green and blue as its pixels are beyond the other two; nothing is the fourth class."""

    def __init__(self, n_outputs: int = 4) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, _STRIDE, _STRIDE)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(3, n_outputs)
        with torch.no_grad():
            self.colours.weight[:] = (torch.eye(3) * 2 - 1)[:, :, None, None] / _STRIDE**2
            self.colours.bias.zero_()
            self.fc.weight[:] = torch.cat([torch.eye(3) * 100, torch.zeros(1, 3)])[:n_outputs]
            self.fc.bias[:] = torch.tensor([0.0, 0.0, 0.0, 4.0])[:n_outputs]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.colours(x)).mean((2, 3)))


def planted_labeller(size: int = 64) -> ImageLabeller:
    """The network as a labeller of dogs, violins and cats; it is an entry of `NETWORKS`, so that files name it."""
    look = Preprocessing(size, 1.0, (0.0,) * 3, (1.0,) * 3)
    NETWORKS["planted"] = ImageNetwork(Planted, look)
    classes = [next(o for o in AUDIOSET_23 if o.name == name).imagenet[0] for name in COLOURS]
    return ImageLabeller("planted", Planted().eval(), "planted", (*classes, 0))


def grey(height: int, width: int, n: int = 1) -> NDArray[np.uint8]:
    """Pictures of nothing, `(n, height, width, 3)`."""
    return np.full((n, height, width, 3), 90, np.uint8)


def paint(images: NDArray[np.uint8], name: str, box: tuple[float, float, float, float]) -> None:
    """Put an object into every picture: left, top, right and bottom as fractions."""
    height, width = images.shape[1:3]
    left, top, right, bottom = box
    rows, columns = (
        slice(round(a), round(b)) for a, b in ((top * height, bottom * height), (left * width, right * width))
    )
    images[:, rows, columns] = COLOURS[name]


def add_labeller(model: str) -> None:
    """Give a model's folder the planted network as its own."""
    labeller = planted_labeller()
    labeller.save(Path(model, LABELLER_FILE))
    sha256 = ImageLabeller.load("planted", Path(model, LABELLER_FILE)).sha256
    replace(ModelConfig.read(model), labeller=LabellerConfig("planted", sha256)).write(model)


@contextmanager
def serving_planted(folder: Path) -> Iterator[Server]:
    """The service with a model that has the planted network."""
    model = write_model(folder / "model", clips_by_label={"dog": 12, "violin": 30, "cat": 9}, clips=40)
    add_labeller(model)
    with serving(folder / "service", model, max_upload_bytes=3_000_000) as running:
        yield running


def write_painted(path: Path, boxes: dict[str, tuple[float, float, float, float]], seconds: float = 6.0) -> Path:
    """Write a video that shows objects in their places, with the sound of a dog and a violin."""
    images = grey(120, 160)
    for name, box in boxes.items():
        paint(images, name, box)
    sound = write_sound(path.with_suffix(".source.wav"), seconds)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "160x120", "-r", "5", "-i", "pipe:"]
    codecs = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "flac", "-strict", "-2"]
    command = [media.ffmpeg_executable(), "-y", "-loglevel", "error", *raw, "-i", str(sound), *codecs, str(path)]
    subprocess.run(command, input=images.tobytes() * round(5 * seconds), check=True)
    sound.unlink()
    return path
