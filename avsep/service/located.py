"""What is kept of where a video's objects are: their maps, and the picture that shows most of them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avsep import plots
from avsep.locating import Locations, Place

_FRAME, _MAPS = "frame.png", "locations.npz"


def write_image(folder: Path, images: NDArray[np.uint8], locations: Locations | None) -> bool:
    """Keep one of a video's pictures, `(n, height, width, 3)`, and the objects' maps; False where there is none.

    It is the picture that shows most of the objects; the middle one where it isn't known what they show.
    """
    if not len(images):
        return False
    number = len(images) // 2
    if locations is not None:
        number = locations.best()
        np.savez_compressed(
            folder / _MAPS,
            objects=np.array(locations.objects, dtype=str),
            times_s=np.array(locations.times_s),
            maps=locations.maps,
            image=number,
        )
    Image.fromarray(images[number]).save(image_path(folder), compress_level=1)
    return True


def image_path(folder: Path) -> Path:
    """Where a job's picture is, if it has one."""
    return folder / _FRAME


def _read(folder: Path) -> tuple[Locations, int]:
    """Read a job's maps, and which picture was kept."""
    with np.load(folder / _MAPS) as arrays:
        found: dict[str, Any] = dict(arrays)
    objects, times_s = tuple(found["objects"].tolist()), tuple(found["times_s"].tolist())
    return Locations(objects, times_s, found["maps"]), int(found["image"])


def marked_image(folder: Path) -> tuple[NDArray[np.uint8] | None, dict[str, Place]]:
    """Read a job's picture, None where it has none, and the boxes of the objects that it shows."""
    if not image_path(folder).exists():
        return None, {}
    marks: dict[str, Place] = {}
    if (folder / _MAPS).exists():
        locations, number = _read(folder)
        marks = locations.marks(number)
    return np.asarray(Image.open(image_path(folder))), marks


def marked_png(folder: Path) -> bytes:
    """Draw a job's picture with a box around each object, as PNG."""
    image, marks = marked_image(folder)
    if image is None:
        raise FileNotFoundError(image_path(folder))
    return plots.located(image, marks)


def maps(folder: Path) -> dict[str, Any]:
    """Read a job's maps, as `answers.LocationMaps`."""
    locations, number = _read(folder)
    _, _, height, width = locations.maps.shape
    return {
        "objects": list(locations.objects),
        "times_s": [round(t, 3) for t in locations.times_s],
        "height": height,
        "width": width,
        "maps": base64.b64encode(locations.maps.tobytes()).decode(),
        "frame": number,
    }
