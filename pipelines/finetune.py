"""Fine-tune the picture network on the clips at hand with Ray Train: OUT/labeller.safetensors, and the model's.

It learns from given labels, from the agreement of pictures and sound, or from both, and starts
from --weights, else from the network that the model or the clips carry, else from scratch. What
is written is the epoch that is best on split val; where none is better than the start, nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import arguments_of, begin

_SMALL = "shufflenet_v2_x0_5"  # what is trained from scratch when no other is asked for
EXAMPLES = """examples:
  python -m pipelines.finetune --segments out/manifest --clips out/clips --model out/run/model \\
      --out out/labeller --weights resnet152-394f9c45.pth
  python -m pipelines.finetune --segments out/manifest --clips out/clips --model out/run/model \\
      --out out/labeller --targets agreement
  python -m pipelines.finetune --segments out/manifest --out out/labeller --targets labels \\
      --architecture shufflenet_v2_x0_5
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("finetune", __doc__, EXAMPLES)
    p.add_argument("--segments", required=True, help="a manifest's folder, or a table")
    p.add_argument("--out", required=True, help="folder or URI of the run")
    p.add_argument("--clips", help="what pipelines.extract wrote; for --targets agreement and both")
    p.add_argument("--model", help="the model folder: its relation map is the sound's voice, and it gets the network")
    p.add_argument("--targets", choices=("labels", "agreement", "both"), default="both", help="what is learned from")
    p.add_argument("--weights", help="where to start: a .pth of ImageNet weights, or a .safetensors file")
    p.add_argument("--architecture", help=f"any torchvision classifier; resnet152 with a .pth, else {_SMALL}")
    p.add_argument("--epochs", type=int, default=8, help="%(default)s unless said")
    p.add_argument("--media", metavar="URI", help="where pipelines.extract keeps downloads")
    p.add_argument("--replace", action="store_true", help="train anew; OUT's last network is kept in OUT/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np
import torch
from torch import Tensor

from avsep import fetching, media, shards, storage
from avsep.learning import finetuning
from avsep.learning.finetuning import FinetuningConfig
from avsep.looks import Looking
from avsep.model import LABELLER_FILE, LabelConfig, LabellerConfig, Model
from avsep.objects import multi_hot
from avsep.records import ClipError, Segment, clips_from_table, read_segments
from avsep.vision import DEFAULT_ARCHITECTURE, ImageLabeller, LabellerUnavailable
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress

_SCRATCH_RATE = 3e-3  # learning rate from scratch
_START, _CHECKPOINT, _HISTORY = "start.safetensors", "checkpoint.pt", "history.json"


def keep_pictures(path: str, looking: Looking, segments: Sequence[Segment], known: dict[str, str]) -> tuple[int, int]:
    """Write the middles of some segments' pictures to an album; return how many have any, and how many can't be had."""
    cluster.one_thread()
    clips, missing = [], 0
    for segment in segments:
        at = known.get(segment.segment_id)
        try:
            s = fetching.within(segment, at) if at else segment
            with storage.local_file(s.source) as file:
                images = looking(media.decode(file, s.start_s, s.end_s).images).crops
        except (ClipError, FileNotFoundError, ValueError):
            missing += 1
            continue
        if len(images):
            clips.append((segment.segment_id, images))
    finetuning.write_album(path, clips)
    return len(clips), missing


def shares_of_file(model_dir: str, path: str) -> dict[str, Tensor]:
    """Return each object's share of the sound of one shard's clips."""
    cluster.one_thread()
    return finetuning.sound_shares(Model.load(model_dir), clips_from_table(shards.read_table(path)))


def score_file(weights: str, path: str) -> dict[str, Tensor]:
    """Score one album's clips with a picture network."""
    cluster.one_thread()
    with storage.local_file(weights) as file:
        return finetuning.score_album(ImageLabeller.load(weights=file), path)


def gather(
    runner: runners.Runner, function: Callable[..., dict[str, Tensor]], first: str, files: Sequence[str]
) -> dict[str, Tensor]:
    """Map over files and join the results."""
    return {i: x for part in runner.map(function, ((first, f) for f in files)) for i, x in part.items()}


def start(arguments: argparse.Namespace) -> tuple[ImageLabeller, bool]:
    """Load the network to start from, and say whether it has learned anything yet."""
    carried = [storage.join(d, LABELLER_FILE) for d in (arguments.model, arguments.clips) if d]
    source = arguments.weights or next((c for c in carried if storage.exists(c)), None)
    if source is None:
        architecture = arguments.architecture or _SMALL
        say(f"note: no --weights, and neither model nor clips carry a picture network: {architecture} from scratch")
        try:
            return finetuning.untrained(architecture, FinetuningConfig.seed), False
        except ValueError:
            fail(f"--architecture {architecture}: torchvision has no such classifier; give one such as {_SMALL}")
    try:
        with storage.local_file(source) as path:
            labeller = ImageLabeller.load(arguments.architecture or DEFAULT_ARCHITECTURE, path)
    except (LabellerUnavailable, FileNotFoundError) as error:
        fail(str(error))
    if labeller.classes is None:  # said aloud, so that the file goes wherever a small network's does
        labeller.classes = tuple(range(1000))
    labeller.way = "centre"  # what it is shown here
    say(f"finetune: {labeller.architecture} from {source}")
    return labeller, True


def save(labeller: ImageLabeller, path: str) -> bytes:
    """Write a picture network to a file or URI, and return the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.safetensors")
        labeller.save(file)
        data = file.read_bytes()
    storage.write_bytes(path, data)
    return data


def fit(job: dict[str, Any], rank: int = 0, n_ranks: int = 1, report: Any = None) -> None:
    """Train to the end from the job's checkpoint, if there is one: the body of one training worker."""
    config: FinetuningConfig = job["config"]
    out, labels = job["out"], job["labels"]
    device = job.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(config.seed)
    with storage.local_file(storage.join(out, _START)) as path:
        labeller = ImageLabeller.load(weights=path, device=device)
    network = labeller.network
    if config.dropout:
        finetuning.add_dropout(network, config.dropout)
    optimiser = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-2)
    rows: list[dict[str, float]] = []
    checkpoint = storage.join(out, _CHECKPOINT)
    if storage.exists(checkpoint):
        saved = torch.load(io.BytesIO(storage.read_bytes(checkpoint)), map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        rows = saved["rows"]
    n_batches = -(-len(labels) // config.batch_clips)
    best = max([job["before"], *(r["selection"] for r in rows)])
    for epoch in range(len(rows), config.epochs):
        started = time.monotonic()
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout
        parts = finetuning.batches(job["train"], labels, config, epoch, rank, n_ranks)
        rate = finetuning.one_cycle(config.learning_rate)
        loss = finetuning.train_epoch(labeller, parts, optimiser, config, rate, n_batches, epoch)
        scores = {i: s for f in job["val"] for i, s in finetuning.score_album(labeller, f).items()}
        row = measure(scores, job["truth"], job["thresholds"])
        row |= {"epoch": epoch, "train_loss": loss, "seconds": time.monotonic() - started}
        rows.append(row)
        if rank == 0:
            if row["selection"] > best:
                best = row["selection"]
                save(labeller, storage.join(out, LABELLER_FILE))
            buffer = io.BytesIO()
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "rows": rows}
            torch.save(state, buffer)
            storage.write_bytes(checkpoint, buffer.getbuffer())
            storage.write_text(storage.join(out, _HISTORY), json.dumps(rows, indent=1))
            say(
                f"finetune: epoch {epoch + 1}/{config.epochs}, loss {loss:.3f}; validation {figures(row)}; "
                f"{row['seconds']:.1f} s"
            )
        if report:
            report(row)


def fit_on_ray(job: dict[str, Any]) -> None:
    """Run one Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    fit(job, context.get_world_rank(), context.get_world_size(), ray.train.report)


def measure(scores: dict[str, Tensor], truth: dict[str, Tensor], thresholds: LabelConfig) -> dict[str, float]:
    """Return mAP, agreement, and their mean, by which the epoch is chosen."""
    found = finetuning.agreement(scores, truth, thresholds.threshold, thresholds.best_threshold)
    return found | {"selection": float(np.nanmean(list(found.values())))}


def figures(row: dict[str, float]) -> str:
    """Format validation figures."""
    return f"mAP {row['map']:.3f}, label agreement {row['agreement']:.3f}"


def decide(
    arguments: argparse.Namespace,
    segments: Sequence[Segment],
    shares: dict[str, Tensor],
    scores: dict[str, Tensor],
    model: Model | None,
) -> dict[str, Tensor]:
    """Decide what each clip's pictures show; clips that show nothing for certain are left out."""
    labels = {}
    for s in segments:
        given = None if s.labels is None else multi_hot(s.labels)
        marks = finetuning.targets(arguments.targets, given, shares.get(s.segment_id), scores.get(s.segment_id), model)
        if marks is not None and marks.any():
            labels[s.segment_id] = marks
    return labels


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune, write the network, and say what it brought."""
    console.absolute(arguments, "out", "clips", "model", "weights", "media")
    writes = (LABELLER_FILE, _CHECKPOINT, _START, _HISTORY, "pictures-*")
    console.keep_apart(arguments, "segments", "clips", "model", "weights", "media", writes=writes)
    if arguments.epochs < 1:
        fail(f"--epochs {arguments.epochs}: at least one epoch is needed")
    if arguments.targets != "labels" and not (arguments.clips and arguments.model):
        fail(f"--targets {arguments.targets}: the sound's voice needs --clips and --model; or give --targets labels")
    model = Model.load(arguments.model) if arguments.model else None
    thresholds = LabelConfig()  # of one look at the middle
    by_split: dict[str, list[Segment]] = {"train": [], "val": []}
    for s in read_segments(arguments.segments, say):
        by_split.get(s.split, []).append(s)
    if not by_split["train"] or not by_split["val"]:
        fail(f"{arguments.segments} needs segments of split train, to learn from, and val, to choose by")
    out = arguments.out
    made = f"--out {out} holds a fine-tuned picture network; another --out leaves it alone"
    console.check_free(out, [LABELLER_FILE], made, arguments.replace)
    labeller, learned = start(arguments)
    weights = storage.join(out, _START)
    save(labeller, weights)
    with runners.session(arguments.in_process) as runner:
        console.put_aside(out, [LABELLER_FILE, _HISTORY, _CHECKPOINT])
        files = album_files(runner, arguments, by_split, labeller.looking("centre"))
        clip_files = shards.clip_files(arguments.clips) if arguments.targets != "labels" else []
        shares = gather(runner, shares_of_file, arguments.model, clip_files)
        known = gather(runner, score_file, weights, files["val"])
        if learned and arguments.targets != "labels":
            scores = known | gather(runner, score_file, weights, files["train"])
        else:
            scores = {}
        labels = decide(arguments, by_split["train"], shares, scores, model)
        if not labels:
            fail(f"--targets {arguments.targets}: no clip of split train shows an object for certain")
        truth = {s.segment_id: multi_hot(s.labels) for s in by_split["val"] if s.labels is not None}
        truth = {i: t for i, t in truth.items() if i in known} or decide(
            arguments, by_split["val"], shares, scores, model
        )
        before = measure(known, truth, thresholds)
        say(f"finetune: {len(labels)} clips to learn from, {len(truth)} for validation; before: {figures(before)}")
        config = FinetuningConfig(epochs=arguments.epochs)
        if not learned:
            config = replace(config, learning_rate=_SCRATCH_RATE)
        job = {
            "out": out,
            "train": files["train"],
            "val": files["val"],
            "labels": labels,
            "truth": truth,
            "before": before["selection"],
            "thresholds": thresholds,
            "config": config,
            "threads": min(2, os.cpu_count() or 1),
        }
        if isinstance(runner, runners.InProcess):
            fit(job)
        else:
            runners.train_workers(fit_on_ray, job, out, runner)
        return report(runner, arguments, model, files["val"], truth, by_split["val"], before, known, thresholds)


def album_name(split: str, shard: shards.Shard) -> str:
    """Name the album of a shard's pictures; other excerpts under the same ids get another name."""
    excerpts = [(s.segment_id, s.source, s.start_s, s.end_s) for s in shard.segments]
    return f"{split}-{shard.name}-{hashlib.sha256(json.dumps(excerpts).encode()).hexdigest()[:8]}.parquet"


def album_files(
    runner: runners.Runner, arguments: argparse.Namespace, by_split: dict[str, list[Segment]], looking: Looking
) -> dict[str, list[str]]:
    """Decode the pictures that aren't kept yet; return each split's albums."""
    remote = [s for group in by_split.values() for s in group if fetching.is_remote(s)]
    if remote and not arguments.media:
        fail(f"{len(remote)} segments are remote; say with --media where pipelines.extract keeps downloads")
    known = fetching.find_media(arguments.media, remote) if remote else {}
    files: dict[str, list[str]] = {}
    todo = []
    for split, segments in by_split.items():
        files[split] = []
        for shard in shards.plan(segments):
            path = storage.join(arguments.out, f"pictures-{looking.size}", album_name(split, shard))
            files[split].append(path)
            if not storage.exists(path):
                todo.append(
                    (
                        path,
                        looking,
                        shard.segments,
                        {s.segment_id: known[s.segment_id] for s in shard.segments if s.segment_id in known},
                    )
                )
    missing = 0
    with Progress("pictures", sum(len(t[2]) for t in todo), "clips") as progress:
        for count, lost in runner.map(keep_pictures, todo):
            missing += lost
            progress.add(count + lost)
    if missing:
        say(f"finetune: the pictures of {missing} segments can't be had; pipelines.extract says why")
    return files


def report(
    runner: runners.Runner,
    arguments: argparse.Namespace,
    model: Model | None,
    files: Sequence[str],
    truth: dict[str, Tensor],
    segments: Sequence[Segment],
    before: dict[str, float],
    known: dict[str, Tensor],
    thresholds: LabelConfig,
) -> int:
    """Say what was gained, and give the network to the model."""
    path = storage.join(arguments.out, LABELLER_FILE)
    if not storage.exists(path):
        say("finetune: no epoch was better on split val than the start, so nothing was written")
        return console.SHORTFALL
    scores = gather(runner, score_file, path, files)
    after = measure(scores, truth, thresholds)
    say(f"split val against its labels: before {figures(before)}; after {figures(after)}")
    audible = {s.segment_id: multi_hot(s.objects) for s in segments if s.objects is not None}
    if audible:
        was, now = (measure(x, audible, thresholds) for x in (known, scores))
        say(f"split val against what is audible: before {figures(was)}; after {figures(now)}")
    if model is not None:
        data = storage.read_bytes(path)
        console.put_aside(arguments.model, [LABELLER_FILE])
        storage.write_bytes(storage.join(arguments.model, LABELLER_FILE), data)
        with storage.local_file(path) as file:
            labeller = ImageLabeller.load(weights=file)
        entry = LabellerConfig(labeller.architecture, labeller.sha256)
        extraction = replace(model.config.extraction, looks="centre")
        own = thresholds.threshold, thresholds.best_threshold  # the other settings of labels stay the model's
        labels = replace(model.config.labels, threshold=own[0], best_threshold=own[1], joined=False)
        replace(model, config=replace(model.config, labeller=entry, labels=labels, extraction=extraction)).save(
            arguments.model
        )
    say(f"picture network in {path}" + (f" and in {arguments.model}" if model else ""))
    return console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command with --replace begins anew, but the pictures are kept")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.finetune import main as run_main

    sys.exit(run_main())
