"""How cost grows: NMF with the bases and the sound's length, separation with length and objects, extraction with clips.

python -m tests.benchmarks.growth
python -m tests.benchmarks.growth --bases 10 25 --seconds 1 10 --objects 1 3 --clips 2 4
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avsep import nmf
from avsep.objects import OBJECT_NAMES
from avsep.stft import STFT
from pipelines import extract
from tests.benchmarks import extraction, measure, separation


def best(run: Any, rounds: int) -> float:
    """Return the best time of some rounds after a first."""
    run()
    return min(measure.seconds(run) for _ in range(rounds))


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--bases", type=int, nargs="+", default=[10, 25, 50, 100])
    p.add_argument("--seconds", type=float, nargs="+", default=[1, 10, 60, 600])
    p.add_argument("--objects", type=int, nargs="+", default=[1, 2, 5, 23])
    p.add_argument("--clips", type=int, nargs="+", default=[10, 100, 1000], help="extracted in a plain loop")
    p.set_defaults(rounds=2)
    arguments = p.parse_args()
    torch.set_num_threads(1)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(int(48_000 * max(arguments.seconds, default=1))))
    noise = 0.1 * noise.float()
    ten = STFT()(noise[:480_000]).abs()
    model, points = separation.separator(), dict[str, dict[float, float]]()
    points["NMF, by bases"] = {m: best(lambda m=m: nmf.factorize(ten, m), arguments.rounds) for m in arguments.bases}
    by_length, whole = {}, {}
    for s in arguments.seconds:
        x = noise[: int(48_000 * s)]
        by_length[s] = best(lambda x=x: nmf.factorize(STFT()(x).abs(), 25), arguments.rounds)
        whole[s] = best(lambda x=x: model(x, OBJECT_NAMES[:2]), arguments.rounds)
    points["NMF in one piece, by seconds of sound"] = by_length
    points["separation in windows, by seconds of sound"] = whole
    points["separation, by objects"] = {
        n: best(lambda n=n: model(noise[:480_000], OBJECT_NAMES[:n]), arguments.rounds) for n in arguments.objects
    }
    by_clips: dict[float, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for n in arguments.clips:
            folder = Path(name, str(n))
            extraction.render(folder, n, 10)
            command = ["--segments", str(folder / "labels.csv"), "--out", str(folder / "out"), "--in-process"]
            by_clips[n] = measure.seconds(lambda c=command: extract.main(c))
    points["extraction in one process, by clips"] = by_clips
    exponents = {title: measure.growth(title, found) for title, found in points.items()}
    measure.write(arguments.json, {"seconds": points, "exponents": exponents})


if __name__ == "__main__":
    main()
