"""What AudioSet's clips of the 23 objects cost in hours and money on three shapes of machines.

Seconds a clip are those of `deploy/rates.json`, which `python -m tests.benchmarks.rates --json deploy/rates.json`
measures, or of your own extraction (`--clips OUT`, from its commits). What was not measured is in ASSUMED,
with its source; PRICES are examples of their date. Change both for yours.

    python deploy/cost.py                            # the table of deploy/README.md
    python deploy/cost.py --clips out/clips          # with your extraction's own seconds
    python deploy/cost.py --write                    # put the table into deploy/README.md
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIPS = 190_000  # of AudioSet's two million
EPOCHS = 12  # of the recipe `audioset`, in one pass
PICTURES = 10  # a clip
MARKS = ("<!-- deploy/cost.py writes this table -->\n", "<!-- end -->\n")

ASSUMED = {
    "busy": 0.85,  # share of its cores that extraction keeps at work; `extract --profile` says yours
    "downloads_an_hour": 300,  # what YouTube allows a guest's address; --rate keeps to 250 by default
    "flop_a_picture": 23e9,  # ResNet-152 at 224 pixels: 11.5 G multiply-adds (torchvision's documentation)
    "gpu_bfloat16_per_s": 0.25 * 121e12,  # a quarter of an NVIDIA L4's dense peak (its data sheet); not measured
    "flop_a_factorisation": 19.3e9,  # 200 updates of 2401 x 201 with 25 bases, counted
    "gpu_float32_per_s": 0.25 * 30.3e12,  # likewise
    "media_bytes": 1_000_000,  # a downloaded excerpt of 10 s at 360p
    "clip_bytes": 150_000,  # a row of a clip shard: 25 bases of 2401 bins, 201 frames, ten pictures' logits
}
PRICES_OF = "2025-06"
PRICES = {  # US dollars, on demand, AWS us-west-2; spot machines are about 60 % cheaper
    "laptop_hour": 0.02,  # 60 W at 0.30 a kWh
    "gpu_box_hour": 0.98,  # g6.2xlarge: 8 cores, one L4
    "cluster_hour": 4 * (0.805 + 0.179),  # four g6.xlarge with one L4 each, four c7i.xlarge with 4 cores each
    "small_hour": 0.021,  # t3.small, one for each egress identity, to download
    "gb_month": 0.023,  # object storage
}


@dataclass(frozen=True)
class Shape:
    """Machines to run on."""

    name: str
    cores: int
    gpus: int
    identities: int  # addresses to download from
    hour: float  # US dollars, while it computes
    download_hour: float  # while it downloads
    stores: bool = True  # in an object store


SHAPES = (
    Shape("laptop", 8, 0, 1, PRICES["laptop_hour"], PRICES["laptop_hour"], stores=False),
    Shape("one GPU box", 8, 1, 1, PRICES["gpu_box_hour"], PRICES["small_hour"]),
    Shape("cluster of 16 cores and 4 GPUs", 16, 4, 4, PRICES["cluster_hour"], 4 * PRICES["small_hour"]),
)


def read_rates(clips: str | None) -> dict[str, float]:
    """Read CPU-seconds a clip by stage; those of an extraction in place of the recorded ones where they are given.

    Raises ValueError for an extraction without clips.
    """
    rates: dict[str, float] = json.loads((HERE / "rates.json").read_text())["cpu_seconds_a_clip"]
    if clips:
        from avsep import shards

        commits = [c for c in shards.read_commits(clips) if c.clip_ids]
        done = sum(len(c.clip_ids) for c in commits)
        if not done:
            raise ValueError(f"--clips {clips} holds no clips yet; give an extraction's --out, with a shard done")
        for stage in {stage for c in commits for stage in c.timings_s} & rates.keys():
            rates[stage] = sum(c.timings_s.get(stage, 0.0) for c in commits) / done
    return rates


def hours(shape: Shape, rates: dict[str, float]) -> dict[str, float]:
    """Say how long each step takes, in hours."""
    on_cores, on_gpus = rates["decode"] + rates["record"], 0.0
    if shape.gpus:  # they factorise and look at pictures, while the cores decode
        on_gpus = ASSUMED["flop_a_factorisation"] / ASSUMED["gpu_float32_per_s"]
        on_gpus += PICTURES * ASSUMED["flop_a_picture"] / ASSUMED["gpu_bfloat16_per_s"]
    else:
        on_cores += rates["factorize"] + rates["label"]
    extraction = max(on_cores / (shape.cores * ASSUMED["busy"]), on_gpus / max(shape.gpus, 1))
    # a GPU trains as fast as one core reads it the shards; without, one core does all
    training = EPOCHS * (rates["read"] / shape.gpus if shape.gpus else rates["train"])
    return {
        "downloads": CLIPS / (ASSUMED["downloads_an_hour"] * shape.identities),
        "extraction": CLIPS * extraction / 3600,
        "training": CLIPS * training / 3600,
        "dictionary": CLIPS * rates["collect"] / (shape.cores * ASSUMED["busy"]) / 3600,
    }


def dollars(shape: Shape, took: dict[str, float]) -> dict[str, float]:
    """Say what that costs, with the storage until it is done."""
    computing = took["extraction"] + took["training"] + took["dictionary"]
    gigabytes = CLIPS * (ASSUMED["media_bytes"] + ASSUMED["clip_bytes"]) / 1e9
    months = (took["downloads"] + computing) / 730
    return {
        "downloads": took["downloads"] * shape.download_hour,
        "computing": computing * shape.hour,
        "storage": gigabytes * PRICES["gb_month"] * months if shape.stores else 0.0,
    }


def time_text(h: float) -> str:
    """Say hours in the unit that suits them."""
    return f"{h / 24:.0f} days" if h >= 72 else f"{h:.1f} h" if h >= 1 else f"{60 * h:.0f} min"


def table(rates: dict[str, float]) -> str:
    """Draw the table, in Markdown."""
    columns = []
    for shape in SHAPES:
        took = hours(shape, rates)
        cost = dollars(shape, took)
        columns.append([
            shape.name,
            f"{shape.cores} / {shape.gpus} / {shape.identities}",
            *(time_text(h) for h in took.values()),
            time_text(sum(took.values()) - took["downloads"]),
            *(f"${d:.0f}" for d in cost.values()),
            f"**${sum(cost.values()):.0f}**",
        ])  # fmt: skip
    names = [
        f"{CLIPS:,} clips", "cores / GPUs / egress identities", "downloads", "extraction, with pictures",
        f"training, {EPOCHS} epochs", "dictionary", "computing in all", "downloads cost", "computing costs",
        "storage until then", "**in all**",
    ]  # fmt: skip
    rows = ["| " + " | ".join(cells) + " |" for cells in zip(names, *columns, strict=True)]
    return "\n".join([rows[0], "|" + " --- |" * (1 + len(SHAPES)), *rows[1:]]) + "\n"


def main() -> None:
    """Run the command."""
    p = argparse.ArgumentParser(
        "deploy/cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--clips", help="an extraction's --out, whose seconds count in place of the recorded ones")
    p.add_argument("--write", action="store_true", help="put the table into deploy/README.md")
    arguments = p.parse_args()
    try:
        text = table(read_rates(arguments.clips))
    except (OSError, ValueError) as error:
        p.exit(2, f"{p.prog}: {error}\n")
    print(text, end="")
    if arguments.write:
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        readme.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1], 1)[1])


if __name__ == "__main__":
    main()
