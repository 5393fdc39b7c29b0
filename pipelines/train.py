"""Train the MIML network on clip shards with Ray Train, and write the model directory.

After every epoch a checkpoint is written to OUT/checkpoint.pt; a killed run goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from avsep import bags, plots, practice, shards, stages, storage, training
from avsep.context import BasisContext
from avsep.miml import MIML
from avsep.model import LABELLER_FILE, MODEL_FILES, LabellerConfig, Model, ModelConfig, versions
from avsep.records import ClipRecord, clips_from_table
from avsep.stft import STFT
from pipelines import execution, recipes
from pipelines.execution import fail, say

EXAMPLES = """examples:
  python -m pipelines.train --clips out/clips --out out/run
  python -m pipelines.train --clips out/clips --out out/paper --recipe paper
  python -m pipelines.train --clips out/clips --out out/run --resume
"""
_IN_MEMORY_BYTES = 4 << 30  # of bases; more are streamed from the shards
_SOLOS_AN_OBJECT = 100  # that practice mixtures draw from
_SOLO_FILES = 200  # in which they are looked for
HISTORY_FILE = "history.json"
_MAPS = 4  # relation maps drawn


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = argparse.ArgumentParser(
        "pipelines.train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--clips", required=True, help="what pipelines.extract wrote")
    p.add_argument("--out", required=True, help="folder or URI of the run; the model goes to OUT/model")
    p.add_argument("--recipe", default="default", help="one of " + ", ".join(recipes.RECIPES))
    p.add_argument("--epochs", type=int, help="instead of the recipe's")
    p.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


def fit(job: dict[str, Any], rank: int = 0, n_ranks: int = 1, report: Any = None) -> None:
    """Train to the end from the job's checkpoint, if there is one: the body of one training worker."""
    files, out = job["files"], job["out"]
    config: ModelConfig = job["config"]
    training_config: training.TrainingConfig = job["training"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    torch.manual_seed(training_config.seed)
    network = config.build().to(device)
    optimiser, schedule = training.optimiser_for(network, training_config)
    history = training.History()
    best: dict[str, torch.Tensor] = {}
    path = storage.join(out, "checkpoint.pt")
    if storage.exists(path):
        saved = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        history.rows, best = saved["history"], saved["best"]
    val = bags.load_bags(files, config.labels, "val")
    train = bags.load_bags(files, config.labels, "train") if job["in_memory"] else None
    batch_size = training.batch_size_for(job["n_train"], training_config)
    for epoch in range(len(history.rows), training_config.epochs):
        started = time.monotonic()
        torch.manual_seed(training_config.seed * 1_000_003 + epoch)  # dropout, alike after a resume
        seed = training_config.seed * 1_000_003 + epoch
        batches = (
            training.shuffled_batches(train, batch_size, seed)
            if train is not None
            else bags.streamed_batches(files, config.labels, "train", batch_size, seed)
        )
        row = training.train_epoch(network, _share(batches, rank, n_ranks), optimiser, training_config, epoch)
        if val is not None:
            pieces = (val.take(slice(i, i + 256)) for i in range(0, len(val), 256))
            row |= training.validate(network, pieces, training_config)
        row |= {
            "epoch": epoch,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "seconds": time.monotonic() - started,
        }
        schedule.step()
        history.rows.append(row)
        if history.best() == epoch:
            best = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
        if rank == 0:
            _save_checkpoint(path, job["settings"], network, optimiser, schedule, history, best)
            storage.write_text(storage.join(out, HISTORY_FILE), json.dumps(history.rows, indent=1))
        if report:
            report(row)
    if rank == 0:
        network.load_state_dict(best)
        chosen = history.rows[history.best()] if history.rows else {}
        Model(replace(config, training=asdict(training_config) | {"chosen": chosen}), network).save(
            storage.join(out, "model")
        )


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
            keys = [k for k in ("val_loss", "val_map", "val_agreement") if k in row]
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


def _share(batches: Iterator[training.Bags], rank: int, n_ranks: int) -> Iterator[training.Bags]:
    """Give each worker its rows of every batch, so that all take the same number of steps."""
    for batch in batches:
        rows = torch.arange(rank, max(len(batch), n_ranks), n_ranks) % len(batch)  # at least one clip each
        yield batch if n_ranks == 1 else batch.take(rows)


def _check_resumable(path: str, settings: dict[str, Any]) -> None:
    if not storage.exists(path):
        fail(f"--resume: {path} doesn't exist; train without --resume first")
    saved = torch.load(io.BytesIO(storage.read_bytes(path)), weights_only=True)["settings"]
    if saved != settings:
        fail(f"--resume: {path} has recipe {saved['recipe']!r} or other settings; give its --recipe, or another --out")


def _save_checkpoint(
    path: str,
    settings: dict[str, Any],
    network: MIML,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    history: training.History,
    best: dict[str, torch.Tensor],
) -> None:
    buffer = io.BytesIO()
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "history": history.rows,
        "settings": settings,
        "best": best,
    }
    torch.save(state, buffer)
    storage.write_bytes(path, buffer.getbuffer())


def fit_on_ray(job: dict[str, Any]) -> None:
    """Run one Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    fit(job, context.get_world_rank(), context.get_world_size(), ray.train.report)


def train_on_ray(job: dict[str, Any], runner: execution.OnRay) -> None:
    """Run the workers under Ray Train; a worker that dies is started again from the checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    n_workers = runner.n_gpus or 1
    trainer = TorchTrainer(
        fit_on_ray,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=n_workers,
            use_gpu=bool(runner.n_gpus),
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if runner.n_gpus else {}),
        ),
        run_config=RunConfig(
            name=f"train-{time.time_ns():x}",  # an old name would resume Ray's own record of an old run
            storage_path=storage.join(job["out"], "ray"),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()


def run(arguments: argparse.Namespace) -> int:
    """Train, write the model, and draw its figures."""
    execution.absolute(arguments, "clips", "out")
    recipe = recipes.get(arguments.recipe)
    if arguments.epochs is not None and arguments.epochs < 1:
        fail(f"--epochs {arguments.epochs}: at least one epoch is needed")
    training_config = replace(recipe.training, epochs=arguments.epochs or recipe.training.epochs)
    out, files = arguments.out, shards.clip_files(arguments.clips)
    extracted = shards.read_configuration(arguments.clips)
    config = ModelConfig(
        stft=STFT(**extracted["stft"]),
        n_bases=extracted["n_bases"],
        n_iter=extracted["n_iter"],
        image_size=extracted["image_size"],
        network=recipe.network,
        labels=recipe.labels,
        labeller=LabellerConfig(extracted["labeller"] or recipe.labeller, extracted["labeller_sha256"]),
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
        _check_resumable(storage.join(out, "checkpoint.pt"), settings)
    counts = [_count(f, config) for f in files]
    n_train, n_val = sum(c[0] for c in counts), sum(c[1] for c in counts)
    if n_train < 1:
        fail(f"{arguments.clips} has no clip of split train with labels, so there is nothing to learn from")
    say(f"train: {n_train} clips, {n_val} for validation, recipe {recipe.name}")
    job = {
        "files": files,
        "out": out,
        "config": config,
        "training": training_config,
        "n_train": n_train,
        "in_memory": n_train * config.n_bases * config.stft.n_bins * 2 < _IN_MEMORY_BYTES,
        "threads": min(2, os.cpu_count() or 1),
        "settings": settings,
    }
    if not arguments.resume:
        for old in ("checkpoint.pt", HISTORY_FILE, *(f"model/{f}" for f in MODEL_FILES)):  # of an earlier run
            storage.delete_file(storage.join(out, old))
    with execution.session(arguments.in_process) as runner, following(out, training_config.epochs):
        if isinstance(runner, execution.InProcess):
            fit(job)
        else:
            train_on_ray(job, runner)
        if recipe.practice:
            learn_context(runner, job, min(recipe.practice, 2 * n_train))
    labeller = storage.join(arguments.clips, LABELLER_FILE)
    if storage.exists(labeller):  # the clips' own picture network goes with the model
        storage.write_bytes(storage.join(out, "model", LABELLER_FILE), storage.read_bytes(labeller))
    draw_figures(out, arguments.clips)
    say(f"model in {storage.join(out, 'model')}")
    return execution.DONE


def _count(path: str, config: ModelConfig) -> tuple[int, int]:
    """Count one file's usable train and val clips."""
    columns = shards.read_table(path, ["split", "labels", "image_logits"])
    counts = {"train": 0, "val": 0, "test": 0}
    for i in range(len(columns)):
        marks = bags.decide_labels(
            columns.column("labels")[i].as_py(), columns.column("image_logits")[i].values, config.labels
        )
        counts[columns.column("split")[i].as_py()] += int(marks is not None and bool(marks.any()))
    return counts["train"], counts["val"]


def learn_context(runner: execution.Runner, job: dict[str, Any], n_mixtures: int) -> None:
    """Mix clips in which one object plays alone, learn on them which bases belong together, add it to the model."""
    directory = storage.join(job["out"], "model")
    files = job["files"][:_SOLO_FILES]  # each is a random sample of the clips
    parts = execution.map_in_order(runner, solos_of_file, [(directory, f) for f in files])
    solos = [s for part in parts for s in part]
    counts = Counter(s.object_index for s in solos)
    if len(counts) < 2:
        say("train: the clips hold no solos of two objects to practise on, so bases are assigned one by one")
        return
    kept = [s for i in counts for s in [t for t in solos if t.object_index == i][:_SOLOS_AN_OBJECT]]
    model = Model.load(directory)
    config = model.config
    n_frames = int(np.median([s.activations.shape[1] for s in kept]))
    shared = runner.share(kept)
    items = [
        (shared, len(config.objects), config.stft.n_bins, config.n_bases, n_frames, range(i, min(i + 10, n_mixtures)))
        for i in range(0, n_mixtures, 10)
    ]
    with execution.Progress("practise", n_mixtures, "mixtures") as progress:
        done: dict[int, list[practice.Practice]] = {}
        for first, mixtures in runner.map(mix_batch, items):
            done[first] = mixtures
            progress.add(len(mixtures))
    practices = [p for first in sorted(done) for p in done[first]]
    ((model.context, figures),) = runner.map(fit_context, [(model.network, practices, job["training"].seed)])
    say(
        f"train: cross-entropy of bases of held-out mixtures: {figures['before']:.3f} one by one, "
        f"{figures['after']:.3f} together"
    )
    Model(replace(config, context=True), model.network, None, model.context).save(directory)


def solos_of_file(model_dir: str, path: str) -> list[practice.Solo]:
    """Find one file's training clips in which an object plays alone."""
    execution.one_thread()
    model = Model.load(model_dir)
    solos = []
    for record in clips_from_table(shards.read_table(path)):
        labels = bags.decide_labels(record.labels, record.image_logits, model.config.labels)
        if record.split == "train" and labels is not None and labels.any():
            solos.append(practice.find_solo(model.network, record, labels))
    return [s for s in solos if s is not None]


def mix_batch(
    solos: list[practice.Solo], n_objects: int, n_bins: int, n_bases: int, n_frames: int, seeds: range
) -> tuple[int, list[practice.Practice]]:
    """Make some practice mixtures."""
    execution.one_thread()
    return seeds[0], [practice.mix_solos(solos, n_objects, n_bins, n_bases, n_frames, seed) for seed in seeds]


def fit_context(network: MIML, practices: list[practice.Practice], seed: int) -> tuple[BasisContext, dict[str, float]]:
    """Train the context, in one worker."""
    execution.one_thread()
    return practice.train_context(network, practices, seed=seed)


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
            relation = model.network.relation(torch.from_numpy(record.bases.T.astype("float32"))[None])[0]
        frame = stages.middle_picture(record.source, record.start_s, record.start_s + record.duration_s)
        figure = plots.relation_map(relation.numpy(), model.config.objects, record.basis_energy, frame)
        storage.write_bytes(storage.join(out, "relation_maps", f"{record.segment_id}.png"), figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
