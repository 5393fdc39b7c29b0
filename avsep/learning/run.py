"""A training run: epochs, checkpoints and what is kept of them."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from avsep import storage
from avsep.learning import bags, parallel, practice, training
from avsep.miml import MIML
from avsep.model import (
    Model,
    ModelConfig,
)

_IN_MEMORY_BYTES = 4 << 30  # of bases that a worker without a GPU holds; more are read anew for every epoch
_OF_GPU = 0.6  # of its free memory, for bases held there
HISTORY_FILE = "history.json"
MIXTURES_FILE, VAL_MIXTURES_FILE = "practice.pt", "practice-val.pt"


def fit(job: dict[str, Any], report: Any = None) -> None:
    """Train to the end of a pass from its checkpoint, if there is one: the body of one training worker.

    Every worker reads its own files and takes its part of each batch; the first one validates and writes.
    """
    files, out = job["files"], job["out"]
    config: ModelConfig = job["config"]
    training_config: training.TrainingConfig = job["training"]
    device = job.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(training_config.seed)
    network = config.build().to(device)
    parallel.share_batch_norm(network)
    first = parallel.place()[0] == 0
    optimiser, schedule = training.optimiser_for(network, training_config)
    history = training.History()
    best: dict[str, torch.Tensor] = {}
    path = _checkpoint(out, job["pass"])
    if storage.exists(path):
        saved = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        history.rows, best = saved["history"], saved["best"]
        if first:  # what was killed between the two may not have got to it
            _write_history(job, history)
    teacher, mixtures, val_mixtures = None, None, None
    if job["pass"] > 1:
        taught = Model.load(storage.join(out, "model"))
        teacher = practice.Teacher(taught.network, taught.context, job["quality"]) if taught.context else None
        mixtures, val_mixtures = read_mixtures(out, MIXTURES_FILE), read_mixtures(out, VAL_MIXTURES_FILE)
    val = bags.load_bags(files, config.labelling, "val") if first else None
    clips = bags.TrainingClips(
        files, job["counts"], config.labelling, teacher=teacher, mixtures=mixtures, held=fits(job["n_bytes"], device),
        device=device,
    )  # fmt: skip
    batch_size = training.batch_size_for(sum(job["counts"]), training_config)
    for epoch in range(len(history.rows), training_config.epochs):
        started = time.monotonic()
        seed = training_config.seed * 1_000_003 + epoch
        torch.manual_seed(seed)  # noise, alike after a resume
        batches = clips.batches(batch_size, seed)
        row = training.train_epoch(network, batches, optimiser, training_config, epoch, job.get("quality"))
        if val is not None:
            pieces = (val.take(slice(i, i + 256)) for i in range(0, len(val), 256))
            row |= training.validate(network, pieces, training_config, val_mixtures)
        row |= {
            "pass": job["pass"],
            "epoch": epoch,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "seconds": time.monotonic() - started,
        }
        schedule.step()
        history.rows.append(row)
        if history.best() == epoch:
            best = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
        if first:
            _save_checkpoint(path, job["settings"], network, optimiser, schedule, history, best)
            _write_history(job, history)
        if report:
            report(row)
    if first:
        network.load_state_dict(best)
        chosen = history.rows[history.best()] if history.rows else {}
        told = {"chosen": chosen, "clips_by_label": job["clips_by_label"]}
        if "quality" in job:
            told["label_quality"] = asdict(job["quality"])
        Model(replace(config, training=asdict(training_config) | told), network).save(storage.join(out, "model"))


def fits(n_bytes: int, device: str) -> bool:
    """Tell whether this worker's part of so many bytes of bases is to be held in memory, the GPU's where there is one.

    It changes nothing but the time that an epoch takes.
    """
    free = _OF_GPU * torch.cuda.mem_get_info()[0] if device != "cpu" else _IN_MEMORY_BYTES
    return n_bytes / parallel.place()[1] < free


def _checkpoint(out: str, number: int) -> str:
    return storage.join(out, "checkpoint.pt" if number == 1 else f"checkpoint-{number}.pt")


def read_mixtures(out: str, name: str) -> bags.Bags | None:
    """Read what `write_mixtures` wrote; None where there is none."""
    path = storage.join(out, name)
    if not storage.exists(path):
        return None
    return bags.Bags(**torch.load(io.BytesIO(storage.read_bytes(path)), weights_only=True))


def write_mixtures(out: str, name: str, practices: Sequence[practice.Practice]) -> None:
    """Write practice mixtures, for workers and for a resumed run."""
    buffer = io.BytesIO()
    torch.save(vars(practice.as_bags(practices)), buffer)
    storage.write_bytes(storage.join(out, name), buffer.getbuffer())


def _write_history(job: dict[str, Any], history: training.History) -> None:
    rows = [*job["earlier_rows"], *history.rows]
    storage.write_text(storage.join(job["out"], HISTORY_FILE), json.dumps(rows, indent=1))


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
