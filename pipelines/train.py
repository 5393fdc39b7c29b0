"""Train the MIML network on clip shards with Ray Train, and write the model directory.

The default recipe then mixes clips in which one object plays alone, learns on the mixtures which bases
belong together, and trains the network a second time, on them too. After every epoch a checkpoint is
written to OUT; a killed run goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from pipelines import RECIPES, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.train --clips out/clips --out out/run
  python -m pipelines.train --clips out/clips --out out/paper --recipe paper
  python -m pipelines.train --clips out/clips --out out/run --resume
  python -m pipelines.train --clips out/clips --out out/run --replace
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("train", __doc__, EXAMPLES)
    p.add_argument("--clips", required=True, help="what pipelines.extract wrote")
    p.add_argument("--out", required=True, help="folder or URI of the run; the model goes to OUT/model")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="a run configuration")
    p.add_argument("--epochs", type=int, help="instead of the recipe's")
    p.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint")
    p.add_argument("--replace", action="store_true", help="train anew; OUT's last model is kept in OUT/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np
import torch

from avsep import evidence, plots, shards, stages, storage
from avsep.factors import DataConfig
from avsep.familiarity import Familiarity
from avsep.learning import bags, practice, training
from avsep.learning.run import (
    HISTORY_FILE,
    MIXTURES_FILE,
    VAL_MIXTURES_FILE,
    fit,
    read_mixtures,
    write_mixtures,
)
from avsep.miml import basis_posteriors
from avsep.model import (
    LABELLER_FILE,
    MODEL_FILES,
    LabellerConfig,
    Model,
    ModelConfig,
    describe_training,
    label_config,
    versions,
)
from avsep.records import SPLITS, ClipRecord, clips_from_table
from pipelines import cluster, console, recipes, runners
from pipelines.console import fail, say
from pipelines.progress import Progress

_READERS = 16  # files read at the same time to count their clips
_SOLOS_AN_OBJECT = 100  # that practice mixtures draw from
_SOLO_FILES = 200  # in which they are looked for
_EVIDENCE_FILES = 20  # whose labels say how far labels can be believed; they are held in memory
_FEW_CLIPS = 200
_COMPARED_CLIPS = 160  # whose bases go with the model
_MAPS = 4  # relation maps drawn
_VAL_MIXTURES = 64
_MADE = (  # in OUT, by a training; the model's configuration comes first
    *(f"model/{f}" for f in MODEL_FILES), HISTORY_FILE, "checkpoint.pt", "checkpoint-2.pt", MIXTURES_FILE,
    VAL_MIXTURES_FILE,
)  # fmt: skip


def _check_resumable(path: str, settings: dict[str, Any]) -> None:
    if not storage.exists(path):
        fail(f"--resume: {path} doesn't exist; train without --resume first")
    saved = torch.load(io.BytesIO(storage.read_bytes(path)), weights_only=True)["settings"]
    if saved != settings:
        fail(f"--resume: {path} has recipe {saved['recipe']!r} or other settings; give its --recipe, or another --out")


def fit_on_ray(job: dict[str, Any]) -> None:
    """Run one Ray Train worker."""
    import ray.train

    fit(job, ray.train.report)


def run(arguments: argparse.Namespace) -> int:
    """Train, write the model, and draw its figures."""
    console.absolute(arguments, "clips", "out")
    console.keep_apart(arguments, "clips", writes=("model",))
    recipe = recipes.get(arguments.recipe)
    if arguments.epochs is not None and arguments.epochs < 1:
        fail(f"--epochs {arguments.epochs}: at least one epoch is needed")
    training_config = replace(recipe.training, epochs=arguments.epochs or recipe.training.epochs)
    out, files = arguments.out, shards.clip_files(arguments.clips)
    clips = DataConfig.from_dict(shards.read_configuration(arguments.clips))
    labels = label_config(clips.labeller, clips.extraction.looks)
    if recipe.labels:
        labels = replace(recipe.labels, joined=labels.joined)  # that is how the clips' evidence is
    config = ModelConfig(
        vocabulary=clips.vocabulary,
        extraction=clips.extraction,
        network=recipe.network,
        labels=labels,
        labeller=LabellerConfig(clips.labeller or recipe.labeller, clips.labeller_sha256),
        separation=recipe.separation,
        recipe=recipe.name,
        versions=versions(),
    )
    settings = {
        "recipe": recipe.name,
        "network": asdict(recipe.network),
        "training": {k: v for k, v in asdict(recipe.training).items() if k != "epochs"},
    }
    if arguments.resume:
        if arguments.replace:
            fail("--resume goes on with a training and --replace begins anew; give one of them")
        _check_resumable(storage.join(out, "checkpoint.pt"), settings)
    else:
        check_free(out, arguments.replace)
    with ThreadPoolExecutor(_READERS) as pool:  # an object store takes its time for each
        counts = list(pool.map(lambda file: bags.count_clips(file, config.labelling), files))
    by_split = Counter({split: sum(c[split] for c, _ in counts) for split in SPLITS})
    n_train, n_val = by_split["train"], by_split["val"]
    clips_by_label = {name: n for name in config.objects if (n := sum(c[name] for _, c in counts))}
    if not clips_by_label:  # clips that show nothing teach no object
        fail(
            f"{arguments.clips} has no clip of split train with labels: give them in the table, or give "
            "pipelines.extract the --weights of a picture network, and extract to another folder"
        )
    say(f"train: {n_train} clips, {n_val} for validation, recipe {recipe.name}{left_out(arguments.clips, by_split)}")
    if n_train < _FEW_CLIPS:
        say(f"train: {n_train} clips are few: some hundreds are needed, or separation may be worse than none")
    if not n_val:
        say("train: no clip of split val, so the last epoch's network is taken")
    job = {
        "files": files,
        "out": out,
        "config": config,
        "training": training_config,
        "counts": [c["train"] for c, _ in counts],
        "clips_by_label": clips_by_label,
        "n_bytes": n_train * math.prod(config.extraction.shape) * 2,
        "threads": min(2, os.cpu_count() or 1),
        "settings": settings,
        "pass": 1,
        "earlier_rows": [],
    }
    storage.make_directory(out)
    passes = 2 if recipe.second_pass else 1
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(runners.session(arguments.in_process))
        if not arguments.resume:
            console.put_aside(out, _MADE)
        stack.enter_context(following(out, passes * training_config.epochs))
        train_pass(runner, job)
        if recipe.practice:
            job["quality"] = judge(runner, job)
        practices = make_mixtures(runner, job, min(recipe.practice, 2 * n_train)) if recipe.practice else []
        if practices:
            learn_context(runner, job, practices, epochs=20 if recipe.second_pass else 40)
        if practices and recipe.second_pass:
            rows = json.loads(storage.read_bytes(storage.join(out, HISTORY_FILE)))
            train_pass(runner, job | {"pass": 2, "earlier_rows": [r for r in rows if r["pass"] == 1]})
            learn_context(runner, job, practices)
    remember_training(job, n_train)
    labeller = storage.join(arguments.clips, LABELLER_FILE)
    if storage.exists(labeller):  # the clips' own picture network goes with the model
        storage.write_bytes(storage.join(out, "model", LABELLER_FILE), storage.read_bytes(labeller))
    draw_figures(out, arguments.clips)
    say(f"model in {storage.join(out, 'model')}")
    return console.DONE


def check_free(out: str, replace: bool) -> None:
    """Raise UsageError where there is an earlier training, unless it is to be replaced."""
    epochs = 0
    if storage.exists(history := storage.join(out, HISTORY_FILE)):
        epochs = len(json.loads(storage.read_bytes(history)))
    what = f"--out {out} holds a training of {epochs} epoch{'s' * (epochs != 1)}"
    what = f"{what}; --resume goes on with it, another --out leaves it alone"
    console.check_free(out, _MADE, what, replace)


@contextlib.contextmanager
def following(out: str, epochs: int) -> Iterator[None]:
    """Print each epoch's figures as the workers write them, wherever those run."""
    path, said, ended = storage.join(out, HISTORY_FILE), 0, threading.Event()

    def say_new() -> None:
        nonlocal said
        rows = json.loads(storage.read_bytes(path)) if storage.exists(path) else []
        if (now := len(rows)) > said:
            said = now
            row = rows[-1]
            keys = [k for k in ("val_loss", "val_map", "val_agreement", "val_assignment") if k in row]
            figures = ", ".join(f"{k.removeprefix('val_')} {row[k]:.3f}" for k in keys)
            seconds = sum(r["seconds"] for r in rows) / now
            tail = f"; validation {figures}" if figures else ""
            left = f"{(epochs - now) * seconds:.0f} s left"
            say(f"train: epoch {now}/{epochs}, loss {row['train_loss']:.3f}{tail}; {seconds:.1f} s an epoch, {left}")

    def watch() -> None:
        while not ended.wait(2.0):
            say_new()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        say_new()


def left_out(clips: str, counts: Counter[str]) -> str:
    """Say how many of the clips take no part in training, and why; `counts` are those with labels, by split."""
    total = sum(len(c.clip_ids) for c in shards.read_commits(clips))
    reasons = {"without a label": total - counts.total(), "of split test": counts["test"]}
    parts = [f"{n} {reason}" for reason, n in reasons.items() if n]
    return f"; left out: {', '.join(parts)}" if parts else ""


def train_pass(runner: runners.Runner, job: dict[str, Any]) -> None:
    """Train the network over all epochs."""
    if isinstance(runner, runners.InProcess):
        fit(job)
    else:
        runners.train_workers(fit_on_ray, job, job["out"], runner)


def judge(runner: runners.Runner, job: dict[str, Any]) -> evidence.LabelQuality:
    """Estimate how good the labels are from what the first pass's network hears."""
    files = job["files"][:_EVIDENCE_FILES]
    item = (storage.join(job["out"], "model"), files)
    ((quality, recall),) = runner.map(judge_files, [item])
    say(f"train: the labels seem to name {recall:.0%} of the objects that sound; training goes by that")
    return quality


def judge_files(model_dir: str, files: list[str]) -> tuple[evidence.LabelQuality, float]:
    """Judge the labels of some files' training clips; return with it what share of the sounding objects they name."""
    cluster.one_thread()
    model = Model.load(model_dir)
    clips = bags.load_bags(files, model.config.labelling, "train")
    if clips is None:
        return evidence.LabelQuality.good(len(model.config.objects)), 1.0
    shares = training.object_shares(model.network, clips)
    quality = evidence.judge_labels(model.config.evidence, shares, clips.labels)
    likely = quality.presence(clips.labels)
    return quality, float((likely * clips.labels).sum() / likely.sum())


def make_mixtures(runner: runners.Runner, job: dict[str, Any], n_mixtures: int) -> list[practice.Practice]:
    """Mix clips in which one object plays alone; return training clips' mixtures, and keep them and validation's."""
    out, config = job["out"], job["config"]
    files = job["files"][:_SOLO_FILES]  # each is a random sample of the clips
    looked_for = [(storage.join(out, "model"), f, job["quality"]) for f in files]
    parts = runners.map_in_order(runner, solos_of_file, looked_for)
    made: dict[str, list[practice.Practice]] = {}
    for split, wanted in (("train", n_mixtures), ("val", min(_VAL_MIXTURES, n_mixtures))):
        solos = [s for part in parts for s in part[split]]
        objects = {s.object_index for s in solos}
        if len(objects) < 2:
            continue
        kept = [s for i in sorted(objects) for s in [t for t in solos if t.object_index == i][:_SOLOS_AN_OBJECT]]
        n_frames = int(np.median([s.activations.shape[1] for s in kept]))
        shape = (len(config.objects), *config.extraction.shape, n_frames)
        shared = runner.share(kept)
        items = [(shared, *shape, range(i, min(i + 10, wanted))) for i in range(0, wanted, 10)]
        with Progress(f"practise ({split})", wanted, "mixtures") as progress:
            done: dict[int, list[practice.Practice]] = {}
            for first, mixtures in runner.map(mix_batch, items):
                done[first] = mixtures
                progress.add(len(mixtures))
        made[split] = [p for first in sorted(done) for p in done[first]]
    if "train" not in made:
        say("train: the clips hold no solos of two objects to practise on: bases are assigned one by one, in one pass")
        return []
    if "val" not in made:  # its clips hold no solos: the last mixtures of training clips stand in
        kept_back = max(1, len(made["train"]) // 10)
        made["train"], made["val"] = made["train"][:-kept_back], made["train"][-kept_back:]
    for split, name in (("train", MIXTURES_FILE), ("val", VAL_MIXTURES_FILE)):
        write_mixtures(out, name, made[split])
    return made["train"]


def learn_context(
    runner: runners.Runner, job: dict[str, Any], practices: list[practice.Practice], epochs: int = 40
) -> None:
    """Learn on practice mixtures which bases belong together, and add it to the model."""
    directory = storage.join(job["out"], "model")
    model = Model.load(directory)
    files = job["files"][:_EVIDENCE_FILES]
    item = (job["out"], model, practices, files, epochs, job["training"].seed)
    ((model, figures),) = runner.map(fit_context, [item])
    say(
        f"train: cross-entropy of bases of held-out mixtures: {figures['before']:.3f} one by one, "
        f"{figures['after']:.3f} together"
    )
    heard, silent = model.config.evidence.shown_when_heard, model.config.evidence.shown_when_silent
    say(f"train: labels name {heard:.0%} of the objects that sound, and {silent:.1%} of those that don't")
    model.save(directory)


def solos_of_file(model_dir: str, path: str, quality: evidence.LabelQuality) -> dict[str, list[practice.Solo]]:
    """Find one file's clips, by split, in which an object plays alone."""
    cluster.one_thread()
    model = Model.load(model_dir)
    solos: dict[str, list[practice.Solo]] = {"train": [], "val": []}
    for record in clips_from_table(shards.read_table(path)):
        labels = model.config.labelling.decide(record.labels, record.image_logits)
        if record.split in solos and labels is not None and labels.any():
            solo = practice.find_solo(model.network, record, labels, quality)
            solos[record.split] += [solo] if solo else []
    return solos


def mix_batch(
    solos: list[practice.Solo], n_objects: int, n_bins: int, n_bases: int, n_frames: int, seeds: range
) -> tuple[int, list[practice.Practice]]:
    """Make some practice mixtures."""
    cluster.one_thread()
    return seeds[0], [practice.mix_solos(solos, n_objects, n_bins, n_bases, n_frames, seed) for seed in seeds]


def fit_context(
    out: str, model: Model, practices: list[practice.Practice], files: list[str], epochs: int, seed: int
) -> tuple[Model, dict[str, float]]:
    """Train the context, and learn how far to believe sound and pictures, in one worker."""
    cluster.one_thread()
    model.context, figures = practice.train_context(model.network, practices, epochs=epochs, seed=seed)
    mixtures = read_mixtures(out, VAL_MIXTURES_FILE) or practice.as_bags(practices)
    learned = evidence.fit_sound(training.object_shares(model.network, mixtures), mixtures.labels)
    clips = bags.load_bags(files, model.config.labelling, "train")
    if clips is not None:
        learned = evidence.fit_pictures(learned, training.object_shares(model.network, clips), clips.labels)
    model.config = replace(model.config, context=True, evidence=learned)
    return model, figures


def remember_training(job: dict[str, Any], n_clips: int) -> None:
    """Add to the model what it was trained on, and bases of training clips, with which new sounds are compared."""
    directory = storage.join(job["out"], "model")
    model = Model.load(directory)
    files = job["files"][:_SOLO_FILES]  # each is a random sample of the clips
    records = itertools.islice(training_records(files, model.config), _COMPARED_CLIPS)
    model.familiarity = Familiarity.learn(bases_of(model, record) for record in records)
    model.config = replace(
        model.config, training=model.config.training | {"clips": n_clips, "sources": count_sources(files)}
    )
    model.save(directory)
    say(f"train: {describe_training(model.config)}")


def training_records(files: Sequence[str], config: ModelConfig) -> Iterator[ClipRecord]:
    """Read the training clips that have labels."""
    for file in files:
        for record in clips_from_table(shards.read_table(file)):
            labels = config.labelling.decide(record.labels, record.image_logits)
            if record.split == "train" and labels is not None and labels.any():
                yield record


@torch.inference_mode()
def bases_of(model: Model, record: ClipRecord) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a clip's factors and what the network makes of them: `(F, M)`, `(M, N)` and posteriors `(L + 1, M)`."""
    W, H = (torch.from_numpy(x) for x in record.factors())
    return W, H, basis_posteriors(model.network.relate(W, H)[None])[0]


def count_sources(files: Sequence[str]) -> dict[str, int]:
    """Count the training clips of some files by where they came from."""
    counts: Counter[str] = Counter()
    for file in files:
        table = shards.read_table(file, ["split", "source"])
        for split, source in zip(*(table.column(c).to_pylist() for c in ("split", "source")), strict=True):
            web = source.startswith(("http://", "https://"))
            kind = "YouTube" if source.startswith("youtube:") else "web addresses" if web else "files"
            counts[kind] += split == "train"
    return {kind: count for kind, count in counts.most_common() if count}


def draw_figures(out: str, clips: str) -> None:
    """Draw the loss curves and some relation maps of validation clips (training clips without any)."""
    rows = json.loads(storage.read_bytes(storage.join(out, HISTORY_FILE)))
    storage.write_bytes(storage.join(out, "loss.png"), plots.loss_curves(rows))
    model = Model.load(storage.join(out, "model"))
    shown: list[ClipRecord] = []
    for split in ("val", "train"):
        shown += itertools.islice(shards.read_clips(clips, split=split), _MAPS - len(shown))
    for record in shown:
        with torch.inference_mode():
            relation = model.network.relate(*(torch.from_numpy(x) for x in record.factors()))
        frame = stages.middle_picture(record.source, record.start_s, record.start_s + record.duration_s)
        figure = plots.relation_map(relation.numpy(), model.config.objects, record.basis_energy, frame)
        storage.write_bytes(storage.join(out, "relation_maps", f"{record.segment_id}.png"), figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command with --resume goes on from the last epoch")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.train import main as run_main

    sys.exit(run_main())
