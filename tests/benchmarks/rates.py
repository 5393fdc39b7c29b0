"""What a clip costs in each stage, in CPU-seconds of one core: what deploy/cost.py reckons with.

CPU time and not the clock's, so that a machine that does other work too gives the same figures.

python -m tests.benchmarks.rates --json deploy/rates.json
python -m tests.benchmarks.rates --rounds 1 --train-clips 32
"""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from avsep import shards
from avsep.dictionary import candidate_bases
from avsep.learning import bags, training
from avsep.model import LabelConfig, Labelling, ModelConfig
from avsep.objects import AUDIOSET_23
from avsep.records import clips_from_table
from pipelines import recipes
from tests.benchmarks import extraction, measure
from tests.benchmarks import training as training_benchmark

_BATCH = 256  # the recipe's for AudioSet


def sides(folder: Path, weights: str) -> dict[str, Callable[[], Any]]:
    """Each stage alone: extraction's on one rendered clip of 10 s, training's on made-up shards."""
    files = shards.clip_files(str(folder / "clips"))
    recipe = recipes.audioset()
    torch.manual_seed(0)
    network = ModelConfig(network=recipe.network).build()
    optimiser = training.optimiser_for(network, recipe.training)[0]

    labels = Labelling(LabelConfig(), AUDIOSET_23)
    clips = bags.TrainingClips(files, [bags.count_clips(f, labels)[0]["train"] for f in files], labels)

    def train() -> None:
        training.train_epoch(network, clips.batches(_BATCH, 0), optimiser, recipe.training, 0)

    def read() -> None:
        bags.bags_from_file(files[0], labels, "train")

    def collect() -> None:
        for record in clips_from_table(shards.read_table(files[0])):
            marks = labels.decide(record.labels, None)
            if marks is not None:
                candidate_bases(network.eval(), record, marks)

    stages = extraction.stage_sides(str(folder / "media" / "pictures.csv"), "resnet152", weights)
    return {**stages, "train": train, "read": read, "collect": collect}


def cpu_seconds() -> float:
    """What this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def least(run: Callable[[], Any], rounds: int) -> float:
    """Time a side after a turn to warm up; the best turn counts."""
    times = []
    for _ in range(rounds + 1):
        started = cpu_seconds()
        run()
        times.append(cpu_seconds() - started)
    return min(times[1:])


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--train-clips", type=int, default=_BATCH, help="one shard of them, 256 at most")
    arguments = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extraction.render(folder / "media", 1, 10)
        weights = extraction.random_weights(folder / "weights.pth", "resnet152")
        training_benchmark.write(folder, arguments.train_clips, hdf5=False)
        torch.set_num_threads(1)
        times = {side: least(run, arguments.rounds) for side, run in sides(folder, weights).items()}
    clips = {"label four clips": 4} | dict.fromkeys(("train", "read", "collect"), arguments.train_clips)
    each = {side.split()[0]: t / clips.get(side, 1) for side, t in times.items()}
    for stage, t in each.items():
        print(f"{stage}: {t:.4f} CPU-seconds a clip")
    figures = {
        "measured": time.strftime("%Y-%m-%d"),
        "cpu_seconds_a_clip": {stage: round(t, 5) for stage, t in each.items()},
    }
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
