"""The pointing game: how often the maximum of an object's map lies on its own half of a picture.

Two photos of a folder are set side by side; photos are OBJECT/*.jpg, named by the vocabulary's objects.

python -m tests.benchmarks.pointing --photos photos
python -m tests.benchmarks.pointing --photos photos --labeller efficientnet_lite0 --pairs 50
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from avsep.objects import AUDIOSET_23
from avsep.vision import NO_DOWNLOAD, ImageLabeller

HEIGHT = 256  # pixels, of both photos


def photos_of(folder: Path) -> dict[str, list[Path]]:
    """List the photos of each object that a folder has."""
    found = {name: sorted((folder / name).glob("*.jpg")) for name in AUDIOSET_23.names}
    return {name: files for name, files in found.items() if files}


def pairs(photos: dict[str, list[Path]], n: int, seed: int) -> Iterator[tuple[str, str, np.ndarray, float]]:
    """Yield n times two objects, their photos side by side, and where one ends and the other begins, in [0, 1]."""
    rng = random.Random(seed)
    for _ in range(n):
        names = rng.sample(sorted(photos), 2)
        both = [_scaled(rng.choice(photos[name])) for name in names]
        whole = np.concatenate(both, 1)
        yield names[0], names[1], whole, both[0].shape[1] / whole.shape[1]


def _scaled(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    return np.asarray(image.resize((round(image.width * HEIGHT / image.height), HEIGHT)))


def main() -> None:
    """Run the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", type=Path, required=True, help="a folder of folders, one per object")
    p.add_argument("--labeller", default=NO_DOWNLOAD)
    p.add_argument("--pairs", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", help="write the figures to this file")
    arguments = p.parse_args()
    photos = photos_of(arguments.photos)
    if len(photos) < 2:
        p.error(f"--photos {arguments.photos} has photos of {len(photos)} objects; give OBJECT/*.jpg of two at least")
    labeller = ImageLabeller.load(arguments.labeller)
    hits, missed, chance, absent = 0, Counter[str](), 0.0, []
    started = time.monotonic()
    for left, right, picture, edge in pairs(photos, arguments.pairs, arguments.seed):
        maps = labeller.locate(picture[None])[0]
        for name, share, first in ((left, edge, True), (right, 1 - edge, False)):
            found = maps[AUDIOSET_23.index(name)]
            column = np.unravel_index(found.argmax(), found.shape)[1]
            hit = ((column + 0.5) / found.shape[1] < edge) == first
            hits += hit
            missed[name] += not hit
            chance += share
        absent += [m.max() for name, m in zip(AUDIOSET_23.names, maps, strict=True) if name not in (left, right)]
    n = 2 * arguments.pairs
    figures = {
        "labeller": arguments.labeller,
        "objects": n,
        "on its half": hits / n,
        "chance": chance / n,
        "absent objects' largest value, 95th percentile": float(np.percentile(absent, 95)),
        "seconds per picture": (time.monotonic() - started) / arguments.pairs,
        "missed": {name: count for name, count in missed.items() if count},
    }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
