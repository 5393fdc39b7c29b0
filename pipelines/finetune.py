"""Fine-tune the picture network on the clips at hand with Ray Train: OUT/labeller.safetensors, and the model's.

It learns from given labels, from the agreement of pictures and sound, or from both. It starts from --weights, else from
the network that the model or the clips carry, else from scratch.
What is written is the epoch that is best on split val; where none is better than the start, nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines import WITHOUT, arguments_of, begin

_SMALL = "shufflenet_v2_x0_5"  # what is trained from scratch when no other is asked for
EXAMPLES = """examples:
  python -m pipelines.finetune --segments out/manifest --clips out/clips --model out/run/model \\
      --out out/labeller --weights resnet152-394f9c45.pth
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
    p.add_argument("--without", nargs="+", action="extend", default=[], metavar="LIST", help=WITHOUT)
    p.add_argument("--epochs", type=int, default=8, help="%(default)s unless said")
    p.add_argument("--media", metavar="URI", help="where pipelines.extract keeps downloads")
    p.add_argument("--replace", action="store_true", help="train anew; OUT's last network is kept in OUT/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

from torch import Tensor

from avsep import fetching, shards, storage, suspects
from avsep.learning import albums, finetuning
from avsep.learning.finetuning import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    START_FILE,
    FinetuningConfig,
    FinetuningRun,
    decide,
    describe,
    measure,
)
from avsep.looks import Looking
from avsep.model import LABELLER_FILE, LabelConfig, LabellerConfig, Model
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import Segment, check_vocabularies, clips_from_table, read_segments, read_vocabulary
from avsep.vision import DEFAULT_ARCHITECTURE, ImageLabeller, LabellerUnavailable
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress
from pipelines.training_workers import train_workers

_SCRATCH_RATE = 3e-3  # learning rate from scratch


def keep_images(*item: Any) -> tuple[int, int]:
    """Run one Ray task."""
    cluster.one_thread()
    return albums.keep_images(*item)


def shares_of_file(model_dir: str, path: str) -> dict[str, Tensor]:
    """Return each object's share of the sound of one shard's clips."""
    cluster.one_thread()
    return finetuning.sound_shares(Model.load(model_dir), clips_from_table(shards.read_table(path)))


def score_file(asked: tuple[str, Vocabulary], path: str) -> dict[str, Tensor]:
    """Score one album's clips with a picture network, `asked` its file and the vocabulary."""
    cluster.one_thread()
    weights, vocabulary = asked
    with storage.local_file(weights) as file:
        return finetuning.score_album(ImageLabeller.load(weights=file), path, vocabulary)


def gather(
    runner: runners.Runner, function: Callable[..., dict[str, Tensor]], first: Any, files: Sequence[str]
) -> dict[str, Tensor]:
    """Map over files and join the results."""
    return {i: x for part in runner.map(function, ((first, f) for f in files)) for i, x in part.items()}


def start(arguments: argparse.Namespace, vocabulary: Vocabulary) -> tuple[ImageLabeller, bool]:
    """Load the network to start from, and say whether it has learned anything yet."""
    carried = [storage.join(d, LABELLER_FILE) for d in (arguments.model, arguments.clips) if d]
    source = arguments.weights or next((c for c in carried if storage.exists(c)), None)
    if source is None:
        architecture = arguments.architecture or _SMALL
        say(f"note: no --weights, and neither model nor clips carry a picture network: {architecture} from scratch")
        try:
            return finetuning.untrained(architecture, FinetuningConfig.seed, vocabulary), False
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


def tell_epoch(row: dict[str, float], epochs: int) -> None:
    """Say how an epoch went."""
    how = f"loss {row['train_loss']:.3f}; validation {describe(row)}; {row['seconds']:.1f} s"
    say(f"finetune: epoch {row['epoch'] + 1}/{epochs}, {how}")


def fit(run: FinetuningRun, device: str) -> None:
    """Run one Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    rank = context.get_world_rank()

    def report(row: dict[str, float]) -> None:
        if rank == 0:
            tell_epoch(row, run.config.epochs)
        ray.train.report(row)

    finetuning.fit(run, device, rank, context.get_world_size(), report)


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune, write the network, and say what it brought."""
    console.absolute(arguments, "out", "clips", "model", "weights", "media")
    writes = (LABELLER_FILE, CHECKPOINT_FILE, START_FILE, HISTORY_FILE, "pictures-*")
    console.keep_apart(arguments, "segments", "clips", "model", "weights", "media", writes=writes)
    if arguments.epochs < 1:
        fail(f"--epochs {arguments.epochs}: at least one epoch is needed")
    if arguments.targets != "labels" and not (arguments.clips and arguments.model):
        fail(f"--targets {arguments.targets}: the sound's voice needs --clips and --model; or give --targets labels")
    model = Model.load(arguments.model) if arguments.model else None
    vocabulary = read_vocabulary(arguments.segments, model.config.vocabulary if model else AUDIOSET_23)
    if model is not None:
        check_vocabularies("--segments", vocabulary, "--model", model.config.vocabulary)
    by_split: dict[str, list[Segment]] = {"train": [], "val": []}
    for s in read_segments(arguments.segments, say, vocabulary):
        by_split.get(s.split, []).append(s)
    if not by_split["train"] or not by_split["val"]:
        fail(f"{arguments.segments} needs segments of split train, to learn from, and val, to choose by")
    without = listed(arguments, by_split)
    made = f"--out {arguments.out} holds a fine-tuned picture network; another --out leaves it alone"
    console.check_free(arguments.out, [LABELLER_FILE], made, arguments.replace)
    labeller, learned = start(arguments, vocabulary)
    finetuning.save(labeller, storage.join(arguments.out, START_FILE))
    with runners.session(arguments.in_process) as runner:
        console.put_aside(arguments.out, [LABELLER_FILE, HISTORY_FILE, CHECKPOINT_FILE])
        files = album_files(runner, arguments, by_split, labeller.looking("centre"))  # of all: other lists may come
        by_split = {split: [s for s in group if s.segment_id not in without] for split, group in by_split.items()}
        tuning, known = plan(runner, arguments, model, by_split, files, learned, vocabulary)
        if isinstance(runner, runners.InProcess):
            finetuning.fit(tuning, report=lambda row: tell_epoch(row, tuning.config.epochs))
        else:
            train_workers(fit, tuning, tuning.out, runner)
        return conclude(runner, arguments, model, tuning, by_split["val"], known)


def listed(arguments: argparse.Namespace, by_split: dict[str, list[Segment]]) -> frozenset[str]:
    """Return the ids that --without names, and say how many there are."""
    ids = {split: [s.segment_id for s in group] for split, group in by_split.items()}
    without, note = suspects.left_out_of(arguments.without, ids["train"] + ids["val"], arguments.segments)
    for line in filter(None, (f"{len(without):,} of the clips are left out by --without" * bool(without), note)):
        say(f"finetune: {line}")
    for split in (split for split, of in ids.items() if without.issuperset(of)):
        fail(f"--without leaves nothing of split {split} in {arguments.segments}; leave less out")
    return without


def plan(
    runner: runners.Runner,
    arguments: argparse.Namespace,
    model: Model | None,
    by_split: dict[str, list[Segment]],
    files: dict[str, list[str]],
    learned: bool,
    vocabulary: Vocabulary,
) -> tuple[FinetuningRun, dict[str, Tensor]]:
    """Decide what is learned from; return it, and the validation clips' scores before. `files` are albums."""
    asked = storage.join(arguments.out, START_FILE), vocabulary
    clip_files = shards.clip_files(arguments.clips) if arguments.targets != "labels" else []
    shares = gather(runner, shares_of_file, arguments.model, clip_files)
    known = gather(runner, score_file, asked, files["val"])
    scores = {}
    if learned and arguments.targets != "labels":
        scores = known | gather(runner, score_file, asked, files["train"])
    labels = decide(arguments.targets, by_split["train"], shares, scores, model, vocabulary)
    if not labels:
        fail(f"--targets {arguments.targets}: no clip of split train shows an object for certain")
    truth = {s.segment_id: vocabulary.multi_hot(s.labels) for s in by_split["val"] if s.labels is not None}
    truth = {i: t for i, t in truth.items() if i in known}
    truth = truth or decide(arguments.targets, by_split["val"], shares, scores, model, vocabulary)
    thresholds = LabelConfig()  # of one look at the middle
    before = measure(known, truth, thresholds)
    say(f"finetune: {len(labels)} clips to learn from, {len(truth)} for validation; before: {describe(before)}")
    rate = FinetuningConfig.learning_rate if learned else _SCRATCH_RATE
    config = FinetuningConfig(epochs=arguments.epochs, learning_rate=rate)
    tuning = FinetuningRun(
        arguments.out, files["train"], files["val"], labels, truth, before["selection"], thresholds, config,
        vocabulary, min(2, os.cpu_count() or 1),
    )  # fmt: skip
    return tuning, known


def album_files(
    runner: runners.Runner, arguments: argparse.Namespace, by_split: dict[str, list[Segment]], looking: Looking
) -> dict[str, list[str]]:
    """Decode the pictures that aren't kept yet; return each split's albums."""
    remote = [s for group in by_split.values() for s in group if fetching.is_remote(s)]
    if remote and not arguments.media:
        fail(f"{len(remote)} segments are remote; say with --media where pipelines.extract keeps downloads")
    store = fetching.open_store(arguments.media, remote, fetching.several_of(remote)) if remote else None
    files: dict[str, list[str]] = {}
    todo = []
    for split, segments in by_split.items():
        files[split] = []
        for shard in shards.plan(segments):
            path = storage.join(arguments.out, f"pictures-{looking.size}", albums.album_name(split, shard))
            files[split].append(path)
            if not storage.exists(path):
                todo.append((path, looking, shard.segments, store.of(shard.segments) if store else None))
    missing = 0
    with Progress("pictures", sum(len(t[2]) for t in todo), "clips") as progress:
        for count, lost in runner.map(keep_images, todo):
            missing += lost
            progress.add(count + lost)
    if missing:
        say(f"finetune: the pictures of {missing} segments can't be had; pipelines.extract says why")
    return files


def conclude(
    runner: runners.Runner,
    arguments: argparse.Namespace,
    model: Model | None,
    tuning: FinetuningRun,
    segments: Sequence[Segment],
    known: dict[str, Tensor],
) -> int:
    """Say what was gained on split val, and give the network to the model; `known` are the scores before."""
    path = storage.join(arguments.out, LABELLER_FILE)
    if not storage.exists(path):
        say("finetune: no epoch was better on split val than the start, so nothing was written")
        return console.SHORTFALL
    scores = gather(runner, score_file, (path, tuning.vocabulary), tuning.val)
    before, after = (measure(x, tuning.truth, tuning.thresholds) for x in (known, scores))
    say(f"split val against its labels: before {describe(before)}; after {describe(after)}")
    audible = {s.segment_id: tuning.vocabulary.multi_hot(s.objects) for s in segments if s.objects is not None}
    if audible:
        was, now = (measure(x, audible, tuning.thresholds) for x in (known, scores))
        say(f"split val against what is audible: before {describe(was)}; after {describe(now)}")
    if model is not None:
        data = storage.read_bytes(path)
        console.put_aside(arguments.model, [LABELLER_FILE])
        storage.write_bytes(storage.join(arguments.model, LABELLER_FILE), data)
        with storage.local_file(path) as file:
            labeller = ImageLabeller.load(weights=file)
        entry = LabellerConfig(labeller.architecture, labeller.sha256)
        extraction = replace(model.config.extraction, looks="centre")
        own = tuning.thresholds.threshold, tuning.thresholds.best_threshold  # other settings of labels stay the model's
        labels = replace(model.config.labels, threshold=own[0], best_threshold=own[1], joined=False)
        config = replace(model.config, labeller=entry, labels=labels, extraction=extraction)
        replace(model, config=config).save(arguments.model)
    say(f"picture network in {path}" + (f" and in {arguments.model}" if model else ""))
    return console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command with --replace begins anew, but the pictures are kept")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.finetune import main as run_main

    sys.exit(run_main())
