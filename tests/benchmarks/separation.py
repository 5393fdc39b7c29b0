"""Separation of a 10 s clip after warm-up, pictures included and with the objects given, on one core each.

python -m tests.benchmarks.separation
python -m tests.benchmarks.separation --rounds 1 --processes 1 --objects 2
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from avsep.context import BasisContext
from avsep.factors import ExtractionConfig, factorize_clips
from avsep.model import Labelling, Model, ModelConfig, label_config
from avsep.objects import AUDIOSET_23, OBJECT_NAMES
from avsep.separation import Separator
from avsep.vision import ImageLabeller, build_network
from pipelines import recipes
from tests.benchmarks import measure


def separator(n_bases: int = 25) -> Separator:
    """The default recipe's model, untrained: what it costs doesn't depend on its weights."""
    torch.manual_seed(0)
    recipe = recipes.default()
    config = ModelConfig(
        network=recipe.network, separation=recipe.separation, extraction=ExtractionConfig(n_bases=n_bases), context=True
    )
    return Separator(Model(config, config.build().eval(), None, BasisContext().eval()))


def factorize_there(waveforms: Sequence[Any], seeds: Sequence[int], config: ExtractionConfig, device: str) -> Future:
    """Factorise windows on a device, as a separator has it done by others."""
    future: Future = Future()
    future.set_result(factorize_clips(waveforms, seeds, config, device))
    return future


def sides(seconds: int, n_objects: int, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Objects given, and found in ten pictures (whose decoding extraction measures); on a device what is done there."""
    from avsep.synthetic import SceneConfig, render_scene  # here, so that who takes the separator needs no ffmpeg

    model, names = separator(), OBJECT_NAMES[:n_objects]
    if device != "cpu":
        there = functools.partial(factorize_there, device=device)
        model = Separator(model.model, factorize=there)
    mix = torch.as_tensor(render_scene(0, "test", 5, SceneConfig(seconds=10), 2).mix)
    mix = mix.repeat(-(-seconds // 10))[: 48_000 * seconds]
    labeller = ImageLabeller("resnet152", build_network("resnet152", 1000).eval().to(device), "", None, device)
    images = np.random.default_rng(0).integers(0, 256, (10, 320, 427, 3), np.uint8)
    labels = Labelling(label_config(labeller.architecture, "tiles"), AUDIOSET_23)

    def with_pictures() -> None:
        labels.scores(labeller.evidence(images, "tiles"))
        model(mix, seen=names)

    return {"objects given": functools.partial(model, mix, names), "with pictures": with_pictures}


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--seconds", type=int, default=10, help="of sound")
    p.add_argument("--objects", type=int, default=2)
    arguments = p.parse_args()
    figures: dict[str, Any] = {}
    for n in arguments.processes:
        make = functools.partial(sides, arguments.seconds, arguments.objects)
        figures[f"seconds, {n} processes"] = times = measure.compare(make, arguments.rounds, n)
        print(f"\n{arguments.seconds} s of sound, {arguments.objects} objects, {n} process(es) at once")
        for side, t in times.items():
            print(f"  {side:<16} {t:.3f} s, {arguments.seconds / t:.0f} times faster than it sounds")
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
