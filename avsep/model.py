"""The model directory: everything that separation needs, and nothing that runs code when loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import safetensors.torch
import torch

from avsep import storage
from avsep.context import BasisContext
from avsep.dictionary import BasisDictionary
from avsep.evidence import Evidence
from avsep.miml import MIML
from avsep.objects import OBJECT_NAMES
from avsep.stft import STFT

FORMAT = 2
_CONTEXT = "context."  # before the names of the context's weights, in the network's file
CONFIG_FILE, NETWORK_FILE, DICTIONARY_FILE, LABELLER_FILE = (
    "config.json",
    "miml.safetensors",
    "dictionary.safetensors",
    "labeller.safetensors",
)
MODEL_FILES = (CONFIG_FILE, NETWORK_FILE, DICTIONARY_FILE, LABELLER_FILE)


@dataclass(frozen=True)
class NetworkConfig:
    """MIML's arguments beside F and L; the defaults are the published network."""

    n_subconcepts: int = 4  # K
    hidden: int = 1024
    published_head: bool = True
    linear_bins: int | None = None
    square_root: bool = False
    log_bands: bool = False
    statistics: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class SeparationConfig:
    """How bases become sounds."""

    assignment: str = "soft"  # soft: posteriors share each basis; threshold: as published
    threshold: float = 0.5  # of an object's largest score, for assignment by threshold
    posterior_power: float = 1.0
    mask_power: float = 2.0
    n_factorizations: int = 3  # of each window, from other starts; their masks are averaged
    fine_masks: bool = True  # soft masks of own bases: at longer windows, to which the bases are fitted anew
    rest_below: float = 0.0  # a basis of which the given objects explain less than this goes to the rest
    bases: str = "own"  # own, learned or both
    dictionary_power: float = 0.8  # weight of the learned bases' masks beside the own ones'
    n_iter: int = 100  # updates of the activations of learned bases
    silent_share: float = 0.02  # an object is silent below this share of the sound
    least_confidence: float = 0.5  # of objects that nobody names: below it a seen one is silent, an unseen one absent
    window_s: float = 10.0
    overlap_s: float = 1.0

    def __post_init__(self) -> None:
        if self.assignment not in ("soft", "threshold"):
            raise ValueError(f"assignment is {self.assignment!r}; it is soft or threshold")
        if self.bases not in ("own", "learned", "both"):
            raise ValueError(f"bases is {self.bases!r}; it is own, learned or both")


@dataclass(frozen=True)
class LabelConfig:
    """How picture scores become weak labels."""

    threshold: float = 0.3
    best_threshold: float = 0.05


@dataclass(frozen=True)
class LabellerConfig:
    """Which picture network the clips were labelled with; its weights' hash is None without one."""

    architecture: str = "resnet152"
    sha256: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """`config.json`: whatever reads a model takes its settings from here, not from flags."""

    stft: STFT = field(default_factory=STFT)
    n_bases: int = 25
    n_iter: int = 200
    image_size: int = 224
    objects: tuple[str, ...] = OBJECT_NAMES
    network: NetworkConfig = field(default_factory=NetworkConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    labeller: LabellerConfig = field(default_factory=LabellerConfig)
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    evidence: Evidence = field(default_factory=Evidence)
    context: bool = False  # the network carries a trained BasisContext
    recipe: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, directory: storage.AnyPath) -> ModelConfig:
        """Read a model directory's `config.json` alone; raises as `Model.load` does."""
        path = storage.join(directory, CONFIG_FILE)
        if not storage.exists(path):
            raise FileNotFoundError(
                f"{directory} holds no {CONFIG_FILE}; give the model folder that pipelines.train wrote"
            )
        try:
            return _parse(json.loads(storage.read_bytes(path)))
        except (TypeError, KeyError, ValueError) as error:
            raise _no_model(directory, CONFIG_FILE, error) from None

    def build(self) -> MIML:
        """Build the network, untrained."""
        return MIML(self.stft.n_bins, len(self.objects), **asdict(self.network))


@dataclass
class Model:
    """A trained network with its configuration and, once collected, its dictionary."""

    config: ModelConfig
    network: MIML
    dictionary: BasisDictionary | None = None
    context: BasisContext | None = None

    def save(self, directory: storage.AnyPath) -> None:
        """Write the model directory; files that this model has not are left alone."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        if self.context is not None:
            own = self.context.state_dict()
            weights |= {f"{_CONTEXT}{k}": v.detach().cpu().contiguous() for k, v in own.items()}
        storage.write_bytes(storage.join(directory, NETWORK_FILE), safetensors.torch.save(weights))
        if self.dictionary is not None:
            self.dictionary.save(storage.join(directory, DICTIONARY_FILE))
        storage.write_text(storage.join(directory, CONFIG_FILE), json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, directory: storage.AnyPath) -> Model:
        """Read a model directory.

        Raises:
            FileNotFoundError: there is no model.
            ValueError: it is of another format, or its files don't fit together.
        """
        config = ModelConfig.read(directory)
        path = storage.join(directory, NETWORK_FILE)
        if not storage.exists(path):
            raise FileNotFoundError(
                f"{directory} holds no {NETWORK_FILE}: copy the whole model folder, or train it again"
            )
        try:
            weights = safetensors.torch.load(storage.read_bytes(path))
            network, context = config.build(), None
            network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(_CONTEXT)})
            if config.context:
                context = BasisContext()
                own = {k.removeprefix(_CONTEXT): v for k, v in weights.items() if k.startswith(_CONTEXT)}
                context.load_state_dict(own)
            dictionary, path = None, storage.join(directory, DICTIONARY_FILE)
            if storage.exists(path):
                dictionary = BasisDictionary.load(path)
        except (TypeError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            raise _no_model(directory, storage.name(path), error) from None
        return cls(config, network.eval(), dictionary, context.eval() if context else None)


def _no_model(directory: storage.AnyPath, file: str, error: Exception) -> ValueError:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    if isinstance(error, KeyError):
        reason = f"{reason} is missing"
    return ValueError(f"{directory} is no model of format {FORMAT}: {file}: {reason}")


def _parse(raw: Any) -> ModelConfig:
    if not isinstance(raw, dict):
        raise ValueError("it is no object of fields; train it again")
    if raw.get("format") != FORMAT:
        raise ValueError(f"its format is {raw.get('format')!r}; train it again")
    nested: dict[str, Any] = {
        "stft": STFT,
        "network": NetworkConfig,
        "labels": LabelConfig,
        "labeller": LabellerConfig,
        "separation": SeparationConfig,
        "evidence": Evidence,
    }
    parsed = {k: _built(k, nested[k], v) if k in nested else v for k, v in raw.items()}
    for f in fields(ModelConfig):
        _check_type(f.name, raw.get(f.name, f.default), f.default)
    return replace(ModelConfig(**parsed), objects=tuple(raw["objects"]))


def _built(name: str, kind: Any, raw: Any) -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{name} is {raw!r}; it must be an object of fields")
    for f in fields(kind):  # before its own checks, which compare numbers
        if f.name in raw:
            _check_type(f"{name}.{f.name}", raw[f.name], f.default)
    return kind(**raw)


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise ValueError when a field isn't of its default's kind."""
    kinds: dict[type, Any] = {bool: bool, int: int, float: (int, float), str: str}
    kind = kinds.get(type(default))
    if kind and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise ValueError(f"{name} is {value!r}; it must be of the kind of {default!r}")


def versions() -> dict[str, str]:
    """Return the versions that a run should remember."""
    from importlib.metadata import version

    return {"avsep": version("avsep"), "torch": torch.__version__}
