"""A training epoch against a plain PyTorch loop over HDF5: the same network, optimiser and clips.

Each side reads its own file (ours once, into memory; the plain one row by row, shuffled, as HDF5 does it).

python -m tests.benchmarks.training
python -m tests.benchmarks.training --clips 64 --rounds 1 --processes 1
python -m tests.benchmarks.training --clips 180477 --epochs 140 --gpu    # the whole of AudioSet's objects
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avsep import shards
from avsep.factors import DataConfig, ExtractionConfig
from avsep.learning import training
from avsep.learning.bags import Bags, load_bags, shuffled_batches
from avsep.miml import activation_statistics
from avsep.model import LabelConfig, Labelling, ModelConfig
from avsep.objects import AUDIOSET_23, OBJECT_NAMES
from avsep.records import ClipRecord
from pipelines import recipes
from tests.benchmarks import measure

CONFIGURATION = DataConfig(ExtractionConfig(), AUDIOSET_23).as_dict()
_SHAPE = (2401, 25)
_A_SHARD = 256


def write(folder: Path, n_clips: int, hdf5: bool) -> None:
    """Write made-up clips as shards and, if asked, as HDF5."""
    rng = np.random.default_rng(0)
    n_different = min(n_clips, _A_SHARD)
    bases = rng.random((n_different, *_SHAPE)).astype(np.float16) ** 4
    bases[:, 0] = 1  # each basis's maximum
    for start in range(0, n_clips, _A_SHARD):
        rows = range(start, min(start + _A_SHARD, n_clips))
        records = [
            ClipRecord(
                f"clip{i:07}", "none", 0.0, 10.0, "train", None, (OBJECT_NAMES[i % 23],), bases[i - start],
                np.zeros((25, 201), np.float16), 1.0, np.full(25, 0.04, np.float32), None, 0.0, 10.0, -20.0, "",
                "given",
            )
            for i in rows
        ]  # fmt: skip
        options: dict[str, Any] = {
            "configuration": CONFIGURATION,
            "shape": _SHAPE,
            "timings_s": {},
        }
        shards.write_shard(str(folder / "clips"), f"s{start:07}", 0, records, [], **options)
    if hdf5:
        import h5py

        with h5py.File(folder / "clips.h5", "w") as f:
            f["bases"] = np.stack([bases[i % _A_SHARD].T for i in range(n_clips)])  # float16, as the shards
            f["labels"] = np.eye(23, dtype=bool)[np.arange(n_clips) % 23]
            f["statistics"] = activation_statistics(torch.zeros(1, 25, 201)).expand(n_clips, -1, -1).numpy()


def network(device: str = "cpu") -> tuple[Any, Any, training.TrainingConfig]:
    """Return the default recipe's network, its optimiser and its configuration, without warping."""
    torch.manual_seed(0)
    recipe = recipes.default()
    model = ModelConfig(network=recipe.network).build().to(device)
    config = training.TrainingConfig()
    return model, training.optimiser_for(model, config)[0], config


def sides(folder: Path, batch_size: int) -> dict[str, Callable[[], Any]]:
    """One epoch of ours, and one of a plain loop, reading included; and ours once the clips are in memory."""
    import h5py

    files = shards.clip_files(str(folder / "clips"))
    ours, theirs = network(), network()
    held = load_bags(files, Labelling(LabelConfig(), AUDIOSET_23), "train")

    def epoch(bags: Bags | None = None) -> None:
        bags = bags or load_bags(files, Labelling(LabelConfig(), AUDIOSET_23), "train")
        assert bags is not None
        training.train_epoch(ours[0], shuffled_batches(bags, batch_size, 0), ours[1], ours[2], 0)

    class Clips(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.file = h5py.File(folder / "clips.h5")

        def __len__(self) -> int:
            return len(self.file["bases"])

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            return [torch.from_numpy(self.file[name][i]) for name in ("bases", "labels", "statistics")]

    def plain() -> None:
        plain_epoch(theirs[0], theirs[1], torch.utils.data.DataLoader(Clips(), batch_size, shuffle=True))

    return {"avsep": epoch, "avsep, clips in memory": functools.partial(epoch, held), "plain loop over HDF5": plain}


def plain_epoch(model: Any, optimiser: torch.optim.Optimizer, batches: Iterable[Sequence[torch.Tensor]]) -> None:
    """Train over batches of bases, labels and statistics as one writes it down, in float32 where the network is."""
    device = next(model.parameters()).device
    model.train()
    for batch in batches:
        bases, labels, statistics = (x.to(device) for x in batch)
        weight = torch.full(bases.shape[:2], 0.2, device=device)
        relation = model.relation(bases.float(), weight > 0, statistics)
        loss = training.LOSSES["partial_label"](relation, labels, weight, None).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def on_gpu(folder: Path, epochs: int, batch_size: int) -> float:
    """Train on the GPU, reading included; return the seconds."""
    started = time.perf_counter()
    bags = load_bags(shards.clip_files(str(folder / "clips")), Labelling(LabelConfig(), AUDIOSET_23), "train")
    assert bags is not None
    model, optimiser, config = network("cuda")
    bags = bags.to("cuda")
    for number in range(epochs):
        training.train_epoch(model, shuffled_batches(bags, batch_size, number), optimiser, config, number)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--clips", type=int, default=512)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--epochs", type=int, default=140, help="with --gpu")
    p.add_argument("--gpu", action="store_true", help="only train on the GPU, and say how long it takes")
    arguments = p.parse_args()
    figures: dict[str, Any] = {"clips": arguments.clips}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, arguments.clips, not arguments.gpu)
        if arguments.gpu:
            figures["seconds on the GPU"] = s = on_gpu(folder, arguments.epochs, arguments.batch)
            print(f"{arguments.epochs} epochs over {arguments.clips} clips, reading included: {s:.0f} s")
        else:
            for n in arguments.processes:
                make = functools.partial(sides, folder, arguments.batch)
                figures[f"seconds, {n} processes"] = times = measure.compare(make, arguments.rounds, n)
                measure.table(f"an epoch of {arguments.clips} clips, {n} process(es) at once", "avsep", times)
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
