"""ImageLabeller against the bare network in float32, on the same pictures and weights; and what a clip's tiles cost,
and where objects are.

python -m tests.benchmarks.labeller
python -m tests.benchmarks.labeller --architecture resnet18 --pictures 4 --rounds 2 --processes 1
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from avsep.objects import AUDIOSET_23
from avsep.vision import ImageLabeller, build_network
from tests.benchmarks import measure


def sides(architecture: str, n_pictures: int) -> dict[str, Callable[[], Any]]:
    """The bare network, the labeller on it, and on all that it is shown of a clip of ten pictures."""
    torch.manual_seed(0)
    network = build_network(architecture, 1000).eval()
    labeller = ImageLabeller(architecture, network, "")
    size = labeller.preprocessing.size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n_pictures, size, size, 3), np.uint8)
    clip = rng.integers(0, 256, (10, 320, 569, 3), np.uint8)

    def bare() -> torch.Tensor:
        with torch.inference_mode():
            return network(labeller.preprocessing(torch.from_numpy(images)))

    return {
        "avsep": functools.partial(labeller, images),
        "bare float32": bare,
        "a clip's tiles": functools.partial(labeller.evidence, clip, "tiles"),
        "a clip's tiles, and where objects are": functools.partial(
            labeller.labels_and_maps, clip, "tiles", AUDIOSET_23.imagenet_classes()
        ),
    }


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--architecture", default="resnet152")
    p.add_argument("--pictures", type=int, default=10)
    arguments = p.parse_args()
    make = functools.partial(sides, arguments.architecture, arguments.pictures)
    ours, theirs = (run() for run in list(make().values())[:2])
    error = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    print(f"{arguments.pictures} pictures, {arguments.architecture}: logits differ by {error:.3%} of their range")
    figures: dict[str, Any] = {"error as share of range": error}
    for n in arguments.processes:
        figures[f"seconds, {n} processes"] = times = measure.compare(make, arguments.rounds, n)
        measure.table(f"{n} process(es) at once", "avsep", times)
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
