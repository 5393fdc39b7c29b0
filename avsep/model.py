"""The model directory: everything that separation needs, and nothing that runs code when loaded."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from avsep import storage
from avsep.context import BasisContext
from avsep.dictionary import BasisDictionary
from avsep.evidence import Evidence
from avsep.factors import DataConfig, ExtractionConfig
from avsep.familiarity import Familiarity
from avsep.miml import MIML, AnyMIML, MeanMIML
from avsep.objects import AUDIOSET_23, CLASSES, N_IMAGENET_CLASSES, Vocabulary, weak_labels
from avsep.stft import STFT

FORMAT = 4
_CONTEXT = "context."  # before the names of the context's weights, in the network's file
CONFIG_FILE, NETWORK_FILE, DICTIONARY_FILE, LABELLER_FILE, FAMILIARITY_FILE = (
    "config.json",
    "miml.safetensors",
    "dictionary.safetensors",
    "labeller.safetensors",
    "familiarity.safetensors",
)
UNET_FILE = "unet.safetensors"  # of `unet`, whose folders may stand beside models in a comparison
MODEL_FILES = (CONFIG_FILE, NETWORK_FILE, DICTIONARY_FILE, LABELLER_FILE, FAMILIARITY_FILE)
_COUNTED = 8  # objects whose clips are told one by one
_LATER = (
    "separation.second_look",
    "separation.fine_masks",
    "extraction.factorizer",
    "n_networks",
    "separation.most_rest",
    "separation.noise_weight",
    "separation.levelling",
    "separation.n_pitches",
    "evidence.picture_slope",
    "evidence.picture_offset",
)  # settings that a model of this format may lack: it gets their defaults
_SHARE, _POWER, _SURELY = (0.0, 1.0), (0.0, 100.0), 1e-9
_RANGES: dict[str, tuple[float, float]] = {  # of the configuration's numbers: beyond them no run ends well, or at all
    "extraction.stft.sample_rate": (1, 1_000_000),
    "extraction.stft.n_fft": (2, 1 << 20),
    "extraction.n_bases": (1, 1000),
    "extraction.n_iter": (1, 100_000),
    "extraction.image_size": (1, 10_000),
    "network.n_subconcepts": (1, 1000),
    "network.hidden": (1, 100_000),
    "network.linear_bins": (1, 1 << 20),
    "network.dropout": _SHARE,
    "n_networks": (1, 2),
    "labels.threshold": _SHARE,
    "labels.best_threshold": _SHARE,
    "separation.threshold": _SHARE,
    "separation.posterior_power": _POWER,
    "separation.mask_power": _POWER,
    "separation.n_factorizations": (1, 100),
    "separation.rest_below": _SHARE,
    "separation.dictionary_power": _POWER,
    "separation.n_iter": (1, 100_000),
    "separation.noise_weight": (1e-6, 1e6),
    "separation.silent_share": _SHARE,
    "separation.least_share": _SHARE,
    "separation.most_rest": (0.0, 1000.0),
    "separation.levelling": _SHARE,
    "separation.n_pitches": (1, 99),
    "separation.least_confidence": _SHARE,
    "separation.window_s": (0.0, 3600.0),
    "separation.overlap_s": (0.0, 3600.0),
    "evidence.slope": (0.0, 1000.0),
    "evidence.offset": (-1000.0, 1000.0),
    "evidence.shown_when_heard": (_SURELY, 1 - _SURELY),
    "evidence.shown_when_silent": (_SURELY, 1 - _SURELY),
    "evidence.picture_slope": (0.0, 1000.0),
    "evidence.picture_offset": (-1000.0, 1000.0),
}


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
    second_look: bool = True  # at each part of a first separation: factorised by itself, its bases judged again
    rest_below: float = 0.0  # a basis of which the given objects explain less than this goes to the rest
    bases: str = "own"  # own, learned or both
    dictionary_power: float = 0.8  # weight of the learned bases' masks beside the own ones'
    n_iter: int = 100  # updates of the activations of learned bases
    noise_weight: float = 1.0  # of a basis's being noise, beside what it is by the network
    silent_share: float = 0.02  # below this share of the sound a named object is hardly heard, a single one silent
    n_pitches: int = 5  # at which a basis is related to the objects; the mean counts
    levelling: float = 0.5  # how far parts of the sound that objects claim are made alike, where the model isn't sure
    least_share: float = 0.3  # of an equal part of the sound: what each object that was named gets at least
    most_rest: float = 1.0  # of an equal part, too: the rest's at most, beside several objects that are doubted
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
    classes: str = "everyday"  # which ImageNet classes show an object: one of objects.CLASSES
    joined: bool = False  # the evidence is of several looks per picture, which nothing normalises again
    unlabelled: bool = True  # clips without any label take part in training, too: they teach noise and absence

    def __post_init__(self) -> None:
        if self.classes not in CLASSES:
            raise ValueError(f"labels.classes is {self.classes!r}; it is one of {', '.join(CLASSES)}")

    def choose(self, scores: Tensor) -> Tensor:
        """Return the labels, boolean `(…, L)`."""
        return weak_labels(scores, self.threshold, self.best_threshold)

    def takes(self, marks: Tensor | None, split: str) -> bool:
        """Say whether a clip of such labels, boolean `(L,)`, is used; None: nobody looked."""
        return marks is not None and (bool(marks.any()) or (self.unlabelled and split == "train"))


@dataclass(frozen=True)
class Labelling:
    """A clip's weak labels: the given ones, else those that follow from its pictures."""

    config: LabelConfig
    vocabulary: Vocabulary

    @classmethod
    def of(cls, made_with: DataConfig) -> Labelling:
        """Return how labels follow from the pictures of clips that were made with these settings, as in training."""
        return cls(label_config(made_with.labeller, made_with.extraction.looks), made_with.vocabulary)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ImageNet classes that show each object."""
        return self.vocabulary.imagenet_classes(self.config.classes)

    def scores(self, image_logits: Tensor) -> Tensor:
        """Score each object in a clip's evidence, `(…, n_images, 1000)` → `(…, L)`."""
        return self.vocabulary.scores(image_logits, self.config.classes, joined=self.config.joined)

    def choose(self, scores: Tensor) -> Tensor:
        """Return the labels, boolean `(…, L)`."""
        return self.config.choose(scores)

    def decide(self, given: Sequence[str] | None, image_logits: Any) -> Tensor | None:
        """Return a clip's labels, boolean `(L,)`; None where none are given and nobody looked at its pictures."""
        if given is not None:
            return self.vocabulary.multi_hot(given)
        if image_logits is None:
            return None
        return self.choose(self.scores_of(image_logits))

    def scores_of(self, image_logits: Any) -> Tensor:
        """Score each object in a clip's evidence as shards hold it, `(n_images · 1000,)` → `(L,)`."""
        logits = torch.from_numpy(np.array(image_logits, np.float32)).reshape(-1, N_IMAGENET_CLASSES)
        return self.scores(logits)

    def takes(self, marks: Tensor | None, split: str) -> bool:
        """Say whether a clip of such labels, boolean `(L,)`, is used; see `LabelConfig.takes`."""
        return self.config.takes(marks, split)


# Thresholds by network and way of looking, calibrated on photos (.github/LOG.md); then by the way alone.
_THRESHOLDS: dict[tuple[str, str], tuple[float, float]] = {
    ("efficientnet_lite0", "tiles"): (0.36, 0.06),
    ("efficientnet_lite2", "tiles"): (0.28, 0.06),
    ("shufflenet_v2_x0_5", "centre"): (0.55, 0.05),  # the demo's, which saw a few hundred drawings
}
_OF_WAY = {"centre": (0.3, 0.05), "tiles": (0.35, 0.06)}  # the published ones; more looks, more chances to err


def label_config(architecture: str | None, way: str, classes: str = "everyday") -> LabelConfig:
    """Return how labels follow from the evidence of a picture network and its way of looking."""
    thresholds = _THRESHOLDS.get((architecture or "", way), _OF_WAY[way])
    return LabelConfig(*thresholds, classes, joined=way != "centre")


@dataclass(frozen=True)
class LabellerConfig:
    """Which picture network the clips were labelled with; its weights' hash is None without one."""

    architecture: str = "resnet152"
    sha256: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """`config.json`: whatever reads a model takes its settings from here, not from flags.

    Raises ValueError for a number that no run can work with.
    """

    vocabulary: Vocabulary = AUDIOSET_23
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    labeller: LabellerConfig = field(default_factory=LabellerConfig)
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    evidence: Evidence = field(default_factory=Evidence)
    n_networks: int = 1  # whose relation maps are averaged: 2 for those of both passes of a training
    context: bool = False  # the network carries a trained BasisContext
    recipe: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if value is not None and not least <= value <= most:  # NaN fails, too
                raise ValueError(f"{name} is {value}; it must lie in {least}…{most}")

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects' names, in the order of the L axis."""
        return self.vocabulary.names

    @property
    def stft(self) -> STFT:
        """The STFT that the model works on."""
        return self.extraction.stft

    @property
    def labelling(self) -> Labelling:
        """How a clip's weak labels are decided."""
        return Labelling(self.labels, self.vocabulary)

    def as_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        return asdict(self) | {"vocabulary": self.vocabulary.as_list(), "extraction": self.extraction.as_dict()}

    def write(self, directory: storage.AnyPath) -> None:
        """Write a model directory's `config.json`."""
        storage.write_text(storage.join(directory, CONFIG_FILE), json.dumps(self.as_dict(), indent=1) + "\n")

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
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise _no_model(directory, CONFIG_FILE, error) from None

    def build(self) -> MIML:
        """Build one network, untrained."""
        return MIML(self.stft.n_bins, len(self.objects), **asdict(self.network))

    def build_all(self) -> AnyMIML:
        """Build what the model's weights belong to: one network, or the mean of several."""
        if self.n_networks == 1:
            return self.build()
        return MeanMIML([self.build() for _ in range(self.n_networks)])


@dataclass
class Model:
    """A trained network with its configuration and, once collected, its dictionary.

    >>> from avsep import starter
    >>> model = Model.load(starter.PATH)
    >>> len(model.config.objects), model.config.stft.sample_rate
    (23, 48000)
    """

    config: ModelConfig
    network: AnyMIML
    dictionary: BasisDictionary | None = None
    context: BasisContext | None = None
    familiarity: Familiarity | None = None  # what sounds are compared with

    def save(self, directory: storage.AnyPath) -> None:
        """Write the model directory; files that this model has not are left alone."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        if self.context is not None:
            own = self.context.state_dict()
            weights |= {f"{_CONTEXT}{k}": v.detach().cpu().contiguous() for k, v in own.items()}
        storage.write_bytes(storage.join(directory, NETWORK_FILE), safetensors.torch.save(weights))
        if self.dictionary is not None:
            self.dictionary.save(storage.join(directory, DICTIONARY_FILE))
        if self.familiarity is not None:
            self.familiarity.save(storage.join(directory, FAMILIARITY_FILE))
        self.config.write(directory)

    @classmethod
    def load(cls, directory: storage.AnyPath) -> Model:
        """Read a model directory.

        Raises:
            FileNotFoundError: there is no model.
            ValueError: it is of another format, its files are damaged, hold what can't be, or don't fit together.
        """
        config = ModelConfig.read(directory)
        path = storage.join(directory, NETWORK_FILE)
        if not storage.exists(path):
            raise FileNotFoundError(
                f"{directory} holds no {NETWORK_FILE}: copy the whole model folder, or train it again"
            )
        try:
            weights = safetensors.torch.load(storage.read_bytes(path))
            network, context = config.build_all(), None
            network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(_CONTEXT)})
            if config.context:
                context = BasisContext()
                own = {k.removeprefix(_CONTEXT): v for k, v in weights.items() if k.startswith(_CONTEXT)}
                context.load_state_dict(own)
            for name, weight in weights.items():
                if not weight.isfinite().all():
                    raise ValueError(f"{name} holds NaN or infinity")
            dictionary, path = None, storage.join(directory, DICTIONARY_FILE)
            if storage.exists(path):
                dictionary = BasisDictionary.load(path)
                for name, W in dictionary.bases.items():
                    config.vocabulary.index(name)
                    if len(W) != config.stft.n_bins:
                        raise ValueError(f"{name} has bases of {len(W)} bins; the model works on {config.stft.n_bins}")
            familiarity, path = None, storage.join(directory, FAMILIARITY_FILE)
            if storage.exists(path):
                familiarity = Familiarity.load(path)
        except (TypeError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            raise _no_model(directory, storage.name(path), error) from None
        return cls(config, network.eval(), dictionary, context.eval() if context else None, familiarity)


def fingerprint(directory: storage.AnyPath) -> str:
    """Return the SHA-256 of a model directory's files, but for its card."""
    files = [storage.join(directory, f) for f in (*MODEL_FILES, UNET_FILE)]
    return hashlib.sha256(b"".join(storage.read_bytes(f) for f in files if storage.exists(f))).hexdigest()


def training_facts(config: ModelConfig) -> dict[str, Any]:
    """Say what a model was trained on; a value that it doesn't hold is None.

    `recipe`, `clips` of split train, `clips_by_label`, `sources` (clips by where they came from) and `about`.
    """
    facts = config.training
    return {
        "recipe": config.recipe,
        "clips": facts.get("clips"),
        "clips_by_label": facts.get("clips_by_label"),
        "sources": facts.get("sources"),
        "about": facts.get("about"),
    }


def describe_training(config: ModelConfig) -> str:
    """Say in a sentence which objects a model has learned, and from what.

    >>> described = {"clips": 40, "clips_by_label": {"dog": 25, "violin": 21}, "sources": {"files": 40}}
    >>> describe_training(ModelConfig(recipe="default", training=described))
    'this model learned 2 objects from 40 clips (files; recipe default): dog 25, violin 21'
    """
    facts = training_facts(config)
    origin = facts["about"] or ", ".join(facts["sources"] or ())
    about = "; ".join(filter(None, (origin, config.recipe and f"recipe {config.recipe}")))
    clips = "an untold number of" if facts["clips"] is None else f"{facts['clips']:,}"
    counts = facts["clips_by_label"]
    if counts is None:
        return f"this model doesn't say what it was trained on{f' ({about})' if about else ''}"
    each = ""
    if len(counts) <= _COUNTED:
        objects = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    else:
        objects, each = ", ".join(counts), f", {min(counts.values()):,} to {max(counts.values()):,} of each"
    several = f"{len(counts)} object{'s' * (len(counts) != 1)} from {clips} clip{'s' * (clips != '1')}"
    return f"this model learned {several}{f' ({about})' if about else ''}{each}: {objects}"


def add_training_facts(directory: storage.AnyPath, **facts: Any) -> None:
    """Add to what a model directory says of its training; the rest of it stays as it is."""
    config = ModelConfig.read(directory)
    replace(config, training=config.training | facts).write(directory)


def _no_model(directory: storage.AnyPath, file: str, error: Exception) -> ValueError:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(".")
    if isinstance(error, KeyError):
        reason = f"{reason} is missing"
    return ValueError(
        f"{directory} is no model of format {FORMAT}: {file}: {reason}; copy the whole folder again, or train it again"
    )


def _parse(raw: Any) -> ModelConfig:
    if isinstance(raw, dict) and raw.get("format") != FORMAT:
        raise ValueError(f"its format is {raw.get('format')!r}")
    nested: dict[str, Any] = {
        "network": NetworkConfig,
        "labels": LabelConfig,
        "labeller": LabellerConfig,
        "separation": SeparationConfig,
        "evidence": Evidence,
    }
    check_fields("it", ModelConfig, raw)
    check_fields("extraction", ExtractionConfig, raw["extraction"], without=("limits",))
    check_fields("extraction.stft", STFT, raw["extraction"]["stft"])
    for name, kind in nested.items():
        check_fields(name, kind, raw[name])
    values: dict[str, Any] = {k: kind(**raw[k]) for k, kind in nested.items()}
    values["extraction"] = ExtractionConfig.from_dict(raw["extraction"])
    values["vocabulary"] = Vocabulary.from_list(raw["vocabulary"])
    return ModelConfig(**raw | values)


def check_fields(name: str, kind: Any, raw: Any, without: Sequence[str] = ()) -> None:
    """Raise ValueError unless `raw` holds a dataclass's fields, all of them and of their defaults' kinds.

    Messages put `name` before the fields' names, unless it is "it".
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{name} is {raw!r}; it must be an object of fields")
    prefix = "" if name == "it" else f"{name}."
    names = {f.name for f in fields(kind)} - set(without)
    for missing in sorted(names - set(raw)):
        if prefix + missing not in _LATER:
            raise ValueError(f"{prefix}{missing} is missing")
    for unknown in sorted(set(raw) - names):
        raise ValueError(f"{prefix}{unknown} is no setting of this version")
    for f in fields(kind):  # before its own checks, which compare numbers
        if f.name in raw:
            _check_type(f"{prefix}{f.name}", raw[f.name], f)


def _check_type(name: str, value: Any, of: Field[Any]) -> None:
    """Raise ValueError when a value isn't of its field's type, of those that JSON has."""
    kinds: dict[str, Any] = {
        "bool": bool,
        "int": int,
        "float": (int, float),
        "str": str,
        "int | None": (int, NoneType),
        "str | None": (str, NoneType),
        "Vocabulary": list,
        "tuple[int, ...]": list,
        "tuple[str, ...]": list,
    }
    kind = kinds.get(str(of.type), dict)  # annotations are text
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}; it must be of the type {of.type}")


def versions() -> dict[str, str]:
    """Return the versions that a run should remember."""
    from importlib.metadata import version

    return {"avsep": version("avsep"), "torch": torch.__version__}
