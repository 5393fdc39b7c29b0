"""The model that serves, loaded again when its files change."""

from __future__ import annotations

import os
import time
from typing import Any

from avsep import storage
from avsep.model import CONFIG_FILE, LABELLER_FILE, MODEL_FILES, ModelConfig, training_facts
from avsep.service.config import ServiceConfig, log
from avsep.videos import FileLimits, VideoSeparator
from avsep.vision import LabellerUnavailable

_SETTLED_S = 1.0  # a model whose files changed later than that may still be in the writing


class HotModel:
    """A loaded model that follows its directory: replaced there, the next call gets the new one.

    A new model that can't be loaded changes nothing but `problem`.
    """

    def __init__(self, directory: str, weights: str | None, limits: FileLimits, device: str = "cpu") -> None:
        self._arguments = (directory, weights, limits, device)
        self.problem = ""
        self._stamp = model_stamp(directory)
        self._loaded = self._load()

    def _load(self) -> VideoSeparator:
        loaded = VideoSeparator.load(*self._arguments)
        _ = loaded.labeller  # now, and not in the first client's time
        return loaded

    def __call__(self) -> VideoSeparator:
        """Give the present model."""
        stamp = model_stamp(self._arguments[0])
        if stamp != self._stamp and _settled(stamp):
            try:
                loaded = self._load()
            except (LabellerUnavailable, OSError, ValueError) as error:
                self.problem = str(error)
                log.warning("the model in use stays: %s", error)
            else:
                self.problem = ""
                self._loaded = loaded
            self._stamp = stamp
        return self._loaded


Stamp = tuple[tuple[str, int, int, int], ...]


def model_stamp(directory: str) -> Stamp:
    """Tell one state of a local model directory from another; of a URI it is always the same."""
    stamps = []
    if not storage.is_uri(directory):
        for name in MODEL_FILES:
            try:
                stat = os.stat(os.path.join(directory, name))
            except OSError:
                continue
            stamps.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(stamps)


def _settled(stamp: Stamp) -> bool:
    names = {name for name, *_ in stamp}
    return CONFIG_FILE in names and time.time() - max(mtime for _, mtime, *_ in stamp) / 1e9 > _SETTLED_S


def check_model(config: ServiceConfig) -> None:
    """Load what a service will; ValueError, OSError or LabellerUnavailable say what can't be used."""
    separate = VideoSeparator.load(config.model, config.weights)
    if config.weights is not None or storage.exists(storage.join(config.model, LABELLER_FILE)):
        _ = separate.labeller


def trained_on(config: ModelConfig) -> dict[str, Any]:
    """Say what a model learned from, as far as it says so itself."""
    return {name: fact for name, fact in training_facts(config).items() if name != "recipe" and fact is not None}


def learned(config: ModelConfig) -> list[str]:
    """List the objects that clips of the model's training had: of others it can't tell the sound."""
    counts = config.training.get("clips_by_label")
    return [name for name in config.objects if counts is None or counts.get(name)]


def model_card(directory: str) -> dict[str, Any]:
    """Describe a model directory without loading its weights."""
    config = ModelConfig.read(directory)
    return {
        "recipe": config.recipe,
        "objects": list(config.objects),
        "learned": learned(config),
        "trained_on": trained_on(config),
        "sample_rate": config.stft.sample_rate,
        "n_fft": config.stft.n_fft,
        "hop_length": config.stft.hop_length,
        "n_bases": config.extraction.n_bases,
        "bases": config.separation.bases,
        "dictionary": storage.exists(storage.join(directory, "dictionary.safetensors")),
        "labeller": config.labeller.architecture,
        "window_s": config.separation.window_s,
        "versions": config.versions,
    }
