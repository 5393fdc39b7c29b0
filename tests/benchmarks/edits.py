"""What corrections by hand are worth: SDR before, and after 1, 3 and 5 perfect moves per clip, beside the oracle's.

The moves are those of the shown bases, the one with the largest misassigned energy first, each to the source that has
most of its energy. Last comes every basis moved so, then the oracle, then the ideal mask.

python -m tests.benchmarks.edits --segments out/demo/segments --references out/demo/scenes/references
python -m tests.benchmarks.edits --model out/run/model --segments clips.csv --references references --clips 24
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avsep import baselines, metrics
from avsep.edits import Edits, Move
from avsep.evaluation import Case, bounded, truly_assigned
from avsep.objects import REST
from avsep.records import read_segments
from avsep.separation import Separator

MOVES = (0, 1, 3, 5)


def moves_of(shares: Tensor, energy: Tensor, owner: Tensor, names: Sequence[str]) -> list[Move]:
    """List the moves to true owners, `(M,)`, of the bases that `shares` `(J + 1, M)` divide, the worst first."""
    wrong = energy * (1 - shares.gather(0, owner[None])[0])
    return [
        Move(0, m, [*names, REST][int(owner[m])])
        for m in wrong.argsort(descending=True, stable=True).tolist()
        if wrong[m] > 0
    ]


def clip(separator: Separator, case: Case) -> tuple[dict[str, float], list[float]]:
    """Measure one clip of one window: the mean SDR of each row, and the seconds that each rendering took."""
    plan = separator.plan([case.mixture.numpy()], case.names)
    (window,) = plan.assigned.windows
    first = plan.first_window.first(separator.extraction.n_bases)
    owner = baselines.true_owners(case.everything, first.factors, separator.stft)
    n = first.relation.shape[1]
    moves = moves_of(window.shares[:, :n], first.factors.basis_energy, owner, plan.objects)
    rows: dict[str, Tensor] = {"mixture": case.mixture.expand(len(case.names), -1)}
    seconds = []
    for count in (*MOVES, n):
        begun = time.perf_counter()
        edited = plan.assigned.edited(Edits(tuple(moves[:count])))
        estimates = np.concatenate(list(edited.render([case.mixture.numpy()])), 1)
        seconds.append(time.perf_counter() - begun)
        rows["all moves" if count == n else f"{count} moves"] = torch.from_numpy(estimates[:-1])
    oracle = truly_assigned(case, plan.first_window.factors, separator.stft, separator)
    rows["oracle assignment"] = oracle[:-1]
    rows["ideal mask"] = baselines.ideal_ratio_mask(case.mixture, case.everything, separator.mask_stft)[:-1]
    sdr = metrics.bss_eval(case.references.numpy(), np.stack([e.numpy() for e in rows.values()])).sdr
    return dict(zip(rows, bounded(sdr).mean(1).tolist(), strict=True)), seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a model's folder (default: the starter model)")
    p.add_argument("--segments", required=True, help="a table, or a folder that pipelines.manifest wrote")
    p.add_argument("--references", required=True, help="folder of REFERENCES/SEGMENT_ID/OBJECT.flac")
    p.add_argument("--clips", type=int, default=20, help="how many clips of two objects (default: 20)")
    p.add_argument("--json", default="", help="file to write the figures to")
    arguments = p.parse_args(argv)
    torch.set_num_threads(1)
    separator = Separator.load(arguments.model)
    figures, seconds = [], []
    for segment in read_segments(arguments.segments):
        if len(segment.objects or ()) != 2 or len(figures) == arguments.clips:
            continue
        case = Case.load(segment, arguments.references, separator.sample_rate, separator.vocabulary)
        found, took = clip(separator, case)
        figures.append(found)
        seconds += took
        print(segment.segment_id, {k: round(v, 1) for k, v in found.items()}, file=sys.stderr, flush=True)
    means = {row: float(np.mean([f[row] for f in figures])) for row in figures[0]}
    error = {row: float(np.std([f[row] for f in figures]) / len(figures) ** 0.5) for row in figures[0]}
    print(f"{len(figures)} duets, mean SDR in dB ± standard error; a rendering took {np.median(seconds):.3f} s")
    for row, mean in means.items():
        print(f"  {row:<18} {mean:5.1f} ± {error[row]:.1f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"sdr": means, "clips": figures, "seconds": seconds}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
