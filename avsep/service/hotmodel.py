"""The model that serves, loaded again when its files change."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from avsep import storage
from avsep.model import CONFIG_FILE, LABELLER_FILE, MODEL_FILES, ModelConfig, training_facts
from avsep.separation import Separates, Separator
from avsep.service.answers import Card
from avsep.service.config import ENVIRONMENT, ServiceConfig, UnusableSettings, log
from avsep.videos import FileLimits, VideoSeparator
from avsep.vision import LabellerUnavailable

_SETTLED_S = 1.0  # a model whose files changed later than that may still be in the writing

Load = Callable[[str, str], Separates]  # reads a model directory for a device


class HotModel:
    """A loaded separator that follows its directory: replaced there, the next call gets the new one.

    `load` reads the directory; without it, it is one that `pipelines.train` wrote. A new model that
    can't be loaded changes nothing but `problem`.
    """

    def __init__(
        self, directory: str, weights: str | None, limits: FileLimits, device: str = "cpu", load: Load | None = None
    ) -> None:
        self._directory, self._weights, self._limits, self._device = directory, weights, limits, device
        self._load_separator = load or (lambda directory, _: Separator.load(directory))
        self.problem = ""
        self._stamp = model_stamp(directory)
        self._loaded = self._load()

    def _load(self) -> VideoSeparator:
        separator = self._load_separator(self._directory, self._device)
        own = self._directory if isinstance(separator, Separator) else None
        loaded = VideoSeparator(separator, own, self._weights, self._limits, self._device)
        _ = loaded.labeller  # now, and not in the first client's time
        return loaded

    def __call__(self) -> VideoSeparator:
        """Give the present model."""
        stamp = model_stamp(self._directory)
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

    def card(self) -> Card:
        """Describe the present model."""
        return card_of(self())


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
    """Load what a service will; ValueError, OSError or UnusableSettings say what can't be used."""
    separate = VideoSeparator.load(config.model, config.weights)
    if config.weights is not None or storage.exists(storage.join(config.model, LABELLER_FILE)):
        try:
            _ = separate.labeller
        except LabellerUnavailable as error:
            raise UnusableSettings(f"the picture network of {config.model}, or {ENVIRONMENT}WEIGHTS: {error}") from None


def model_card(directory: str) -> Card:
    """Describe a model directory without loading its weights; its picture network is the configured one."""
    dictionary = storage.exists(storage.join(directory, "dictionary.safetensors"))
    return _card(ModelConfig.read(directory), dictionary)


def card_of(files: VideoSeparator) -> Card:
    """Describe a loaded model; of one without bases little is known."""
    network = None if isinstance(files.labeller, str) else files.labeller.architecture
    if isinstance(files.separator, Separator):
        model = files.separator.model
        return _card(model.config, model.dictionary is not None).model_copy(update={"labeller": network})
    objects = list(files.separator.objects)
    card = Card(objects=objects, learned=objects, sample_rate=files.separator.sample_rate, labeller=network)
    return card.knowing(files.config.vocabulary)


def _card(config: ModelConfig, dictionary: bool) -> Card:
    facts = training_facts(config)
    counts = config.training.get("clips_by_label")
    card = Card(
        recipe=config.recipe,
        objects=list(config.objects),
        learned=[name for name in config.objects if counts is None or counts.get(name)],
        trained_on={name: fact for name, fact in facts.items() if name != "recipe" and fact is not None},
        sample_rate=config.stft.sample_rate,
        n_fft=config.stft.n_fft,
        hop_length=config.stft.hop_length,
        n_bases=config.extraction.n_bases,
        bases=config.separation.bases,
        dictionary=dictionary,
        labeller=config.labeller.architecture,
        window_s=config.separation.window_s,
        versions=config.versions,
    )
    return card.knowing(config.vocabulary, config)
