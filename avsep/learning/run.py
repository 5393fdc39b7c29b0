"""A training run: epochs, checkpoints and what is kept of them."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from avsep import evidence, storage
from avsep.learning import bags, parallel, practice, training
from avsep.miml import MIML, AnyMIML, MeanMIML
from avsep.model import Model, ModelConfig

_IN_MEMORY_BYTES = 4 << 30  # of bases that a worker without a GPU holds; more are read anew for every epoch
_OF_GPU = 0.6  # of its free memory, for bases held there
HISTORY_FILE = "history.json"
MIXTURES_FILE, VAL_MIXTURES_FILE = "practice.pt", "practice-val.pt"


@dataclass(frozen=True)
class TrainingRun:
    """What the workers of one pass of a training need to know."""

    files: list[str]  # of clips
    counts: list[int]  # training clips with labels, by file
    out: str
    config: ModelConfig
    training: training.TrainingConfig
    settings: dict[str, Any]  # what a checkpoint must agree with
    clips_by_label: dict[str, int]
    without: frozenset[str] = frozenset()  # ids of clips that are left out
    threads: int = 1
    number: int = 1  # of the pass
    earlier_rows: list[dict[str, Any]] = field(default_factory=list)  # of the history: the first pass's
    quality: evidence.LabelQuality | None = None  # of the labels, once a pass has been judged

    @property
    def n_bytes(self) -> int:
        """What the bases of all training clips take as float16."""
        return sum(self.counts) * math.prod(self.config.extraction.shape) * 2

    @property
    def model(self) -> str:
        """Where the model goes."""
        return storage.join(self.out, "model")


def fit(run: TrainingRun, device: str | None = None, report: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Train to the end of a pass from its checkpoint, if there is one: the body of one training worker.

    Every worker reads its own files and takes its part of each batch; the first one validates and writes.
    `report` gets the figures of each epoch.
    """
    config, training_config = run.config, run.training
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(run.threads)
    torch.manual_seed(training_config.seed)
    state = _State.start(run, device)
    network = state.network
    first = parallel.place()[0] == 0
    if first and state.history.rows:  # what was killed between the two may not have got to it
        _write_history(run, state.history)
    teacher, mixtures, val_mixtures = _first_pass_s(run) if run.number > 1 else (None, None, None)
    val = bags.load_bags(run.files, config.labelling, "val", run.without) if first else None
    clips = bags.TrainingClips(
        run.files, run.counts, config.labelling, without=run.without, teacher=teacher, mixtures=mixtures,
        held=fits(run.n_bytes, device), device=device,
    )  # fmt: skip
    batch_size = training.batch_size_for(sum(run.counts), training_config)
    for epoch in range(len(state.history.rows), training_config.epochs):
        started = time.monotonic()
        seed = training_config.seed * 1_000_003 + epoch
        torch.manual_seed(seed)  # noise, alike after a resume
        batches = clips.batches(batch_size, seed)
        row = training.train_epoch(network, batches, state.optimiser, training_config, epoch, run.quality)
        if val is not None:
            pieces = (val.take(slice(i, i + 256)) for i in range(0, len(val), 256))
            row |= training.validate(network, pieces, training_config, val_mixtures)
        row |= {
            "pass": run.number,
            "epoch": epoch,
            "learning_rate": float(state.schedule.get_last_lr()[0]),
            "seconds": time.monotonic() - started,
        }
        state.take(row)
        if first:
            state.save(run)
            _write_history(run, state.history)
        if report:
            report(row)
    if first:
        _save_model(run, state, teacher)


def _first_pass_s(run: TrainingRun) -> tuple[practice.Teacher | None, bags.Bags | None, bags.Bags | None]:
    """Return what a second pass learns from: the first one's network, and mixtures of both splits."""
    taught = Model.load(run.model)
    assert run.quality is not None
    teacher = practice.Teacher(taught.network, taught.context, run.quality) if taught.context else None
    return teacher, read_mixtures(run.out, MIXTURES_FILE), read_mixtures(run.out, VAL_MIXTURES_FILE)


def _save_model(run: TrainingRun, state: _State, teacher: practice.Teacher | None) -> None:
    """Write the model: this pass's network, or after a second pass the mean of both, where that is configured."""
    state.network.load_state_dict(state.best)
    network: AnyMIML = state.network
    if run.config.n_networks == 2 and teacher is not None and isinstance(teacher.network, MIML):
        network = MeanMIML([teacher.network, state.network])
    config = replace(run.config, n_networks=1 if network is state.network else 2)
    rows = state.history.rows
    facts = {"chosen": rows[state.history.best()] if rows else {}, "clips_by_label": run.clips_by_label}
    if run.quality is not None:
        facts["label_quality"] = asdict(run.quality)
    Model(replace(config, training=asdict(run.training) | facts), network).save(run.model)


@dataclass
class _State:
    """What a checkpoint holds."""

    network: MIML
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: training.History = field(default_factory=training.History)
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # weights of the best epoch

    @classmethod
    def start(cls, run: TrainingRun, device: str) -> _State:
        """Build the network, or go on from the checkpoint."""
        network = run.config.build().to(device)
        parallel.share_batch_norm(network)
        state = cls(network, *training.optimiser_for(network, run.training))
        path = checkpoint(run.out, run.number)
        if storage.exists(path):
            saved = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
            network.load_state_dict(saved["network"])
            state.optimiser.load_state_dict(saved["optimiser"])
            state.schedule.load_state_dict(saved["schedule"])
            state.history.rows, state.best = saved["history"], saved["best"]
        return state

    def take(self, row: dict[str, Any]) -> None:
        """Take an epoch's figures, and its weights where it is the best one."""
        self.schedule.step()
        self.history.rows.append(row)
        if self.history.best() == row["epoch"]:
            self.best = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}

    def save(self, run: TrainingRun) -> None:
        """Write the checkpoint."""
        buffer = io.BytesIO()
        raw = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history.rows,
            "settings": run.settings,
            "best": self.best,
        }
        torch.save(raw, buffer)
        storage.write_bytes(checkpoint(run.out, run.number), buffer.getbuffer())


def fits(n_bytes: int, device: str) -> bool:
    """Tell whether this worker's part of so many bytes of bases is to be held in memory, the GPU's where there is one.

    It changes nothing but the time that an epoch takes.
    """
    free = _OF_GPU * torch.cuda.mem_get_info()[0] if device != "cpu" else _IN_MEMORY_BYTES
    return n_bytes / parallel.place()[1] < free


def checkpoint(out: str, number: int = 1) -> str:
    """Name the checkpoint of a pass."""
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


def _write_history(run: TrainingRun, history: training.History) -> None:
    rows = [*run.earlier_rows, *history.rows]
    storage.write_text(storage.join(run.out, HISTORY_FILE), json.dumps(rows, indent=1))


def read_history(out: str) -> list[dict[str, Any]]:
    """Read the figures of every epoch so far; an empty list where there are none."""
    path = storage.join(out, HISTORY_FILE)
    return json.loads(storage.read_bytes(path)) if storage.exists(path) else []


def settings_of(out: str) -> dict[str, Any] | None:
    """Read the settings that the first pass's checkpoint was made with; None where there is no checkpoint."""
    path = checkpoint(out)
    if not storage.exists(path):
        return None
    return torch.load(io.BytesIO(storage.read_bytes(path)), weights_only=True)["settings"]
