"""Make the starter model from nothing: collect, render, extract, train, slim, and write its model card.

    pip install --no-deps tinysoundfont && apt-get update
    python deploy/starter/build.py --work out/starter --out avsep/starter

Needs Debian 12, whose packages hold the recordings, and about 8 GB of disk. Each step is skipped where its result is
there; delete it to have it made anew. Once the packages are fetched, two cores take half an hour.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from avsep.evidence import ELSEWHERE
from avsep.model import label_config
from avsep.vision import NO_DOWNLOAD

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MOST_BYTES = 8_000_000
RECIPE = "both_passes"  # a second pass alone learns the sources by heart
# How sure it may be of sounds from elsewhere. `shown` is what picture networks see of rendered clips. How surely
# pictures show an object was fitted to 76 validation clips with photos. What is seen and heard at .4 is there.
EVIDENCE = ELSEWHERE | {"shown_when_heard": 0.75, "shown_when_silent": 0.03}
EVIDENCE |= {"picture_slope": 0.6, "picture_offset": 2.53}
SEPARATION = {"least_confidence": 0.4, "noise_weight": 0.2}  # what it doesn't know is seldom noise
FULL_PRECISION = ("running_mean", "running_var", "num_batches_tracked")  # batch norm's, which are few


def run(*command: str | Path) -> None:
    """Run one of the project's programs, or of this folder's."""
    print("+", *command, flush=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment)


def slim(model: Path, out: Path) -> int:
    """Copy a model with its weights in half precision, and without a dictionary; return its bytes."""
    out.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.load_file(model / "miml.safetensors")
    half = {k: v if k.endswith(FULL_PRECISION) or not v.is_floating_point() else v.half() for k, v in weights.items()}
    if lost := [k for k, v in half.items() if not torch.isfinite(v).all()]:
        raise SystemExit(f"{', '.join(lost)} can't be held in half precision")
    safetensors.torch.save_file(half, out / "miml.safetensors")
    for name in ("config.json", "familiarity.safetensors"):
        shutil.copyfile(model / name, out / name)
    return sum(p.stat().st_size for p in out.iterdir())


def describe(out: Path) -> None:
    """Let the model say what it was trained on, and how sure it may be of sounds from elsewhere."""
    config = json.loads((out / "config.json").read_text())
    config["training"]["about"] = (
        "clips rendered from openly licensed sounds of Debian's packages: "
        "Fluid R3, MuseScore, FreePats, Csound and 29 smaller collections"
    )
    config["evidence"] |= EVIDENCE
    config["separation"] |= SEPARATION
    config["labeller"] = {"architecture": NO_DOWNLOAD, "sha256": None}  # its clips had no pictures
    config["labels"] = asdict(label_config(NO_DOWNLOAD, config["extraction"]["looks"]))
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def card(work: Path, out: Path) -> str:
    """Fill the model card: clips and recordings by object, and every source with its licence."""
    with (work / "sounds" / "manifest.csv").open(newline="") as file:
        sounds = list(csv.DictReader(file))
    clips = json.loads((out / "config.json").read_text())["training"]["clips_by_label"]
    held: dict[str, Counter[str]] = {}
    for s in sounds:
        held.setdefault(s["object"], Counter())[s["source"]] += 1
    objects = ["| object | clips | sounds by source |", "| --- | --- | --- |"]
    for name, counts in sorted(held.items(), key=lambda item: (item[0].startswith("offscreen_"), item[0])):
        said = ", ".join(f"{source} {n}" for source, n in sorted(counts.items()))
        objects.append(f"| {name.replace('offscreen_', 'none of them: ')} | {clips.get(name, '')} | {said} |")
    packages = {(s["package"], s["version"], s["licence"]): s["source"] for s in sounds if s["package"]}
    sources = ["| package | version | licence of what was taken |", "| --- | --- | --- |"]
    sources += [f"| {package} | {version} | {licence} |" for package, version, licence in sorted(packages)]
    text = (HERE / "card.md").read_text()
    return text.replace("OBJECTS\n", "\n".join(objects) + "\n").replace("SOURCES\n", "\n".join(sources) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything in between")
    parser.add_argument("--out", type=Path, required=True, help="the model folder")
    parser.add_argument("--clips", type=int, default=4000, help="to train on")
    parser.add_argument("--epochs", type=int, default=16)
    a = parser.parse_args()
    work, clips = a.work.resolve(), a.work.resolve() / "clips"
    if not (work / "sounds" / "manifest.csv").exists():
        run(HERE / "collect.py", "--out", work)
    if not (work / "rendered" / "segments.csv").exists():
        run(HERE / "render.py", "--sounds", work / "sounds", "--out", work / "rendered", "--clips", str(a.clips))
    run("-m", "pipelines.manifest", "--table", work / "rendered" / "segments.csv", "--out", work / "manifest")
    run("-m", "pipelines.extract", "--segments", work / "manifest", "--out", clips, "--recipe", RECIPE)
    if not (work / "run" / "model" / "familiarity.safetensors").exists():
        out = ("--out", work / "run", "--recipe", RECIPE, "--in-process")
        run("-m", "pipelines.train", "--clips", clips, *out, "--epochs", str(a.epochs))
    size = slim(work / "run" / "model", a.out)
    describe(a.out)
    (a.out / "README.md").write_text(card(work, a.out))
    print(f"starter model in {a.out}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"that is more than {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
