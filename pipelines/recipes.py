"""Complete run configurations by name: each function returns everything a run needs, frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from avsep.factors import ExtractionConfig
from avsep.learning.training import TrainingConfig
from avsep.model import LabelConfig, LabellerConfig, NetworkConfig, SeparationConfig


@dataclass(frozen=True)
class Recipe:
    """Extraction, labels, network, training and separation, together."""

    name: str
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    labels: LabelConfig | None = None  # None: those calibrated for the picture network and its looks
    labeller: str = LabellerConfig.architecture
    network: NetworkConfig = field(default_factory=NetworkConfig)
    n_networks: int = 1  # whose relation maps are averaged: 2 for those of both passes
    training: TrainingConfig = field(default_factory=TrainingConfig)
    practice: int = 0  # mixtures of solos, on which the bases' context is learned; 0: none
    second_pass: bool = False  # train again, on the mixtures too, with targets from the first pass and its context
    separation: SeparationConfig = field(default_factory=SeparationConfig)


def default() -> Recipe:
    """Partial labels: every basis is trained, and shared softly among the objects that are there."""
    return Recipe(
        "default",
        network=NetworkConfig(
            published_head=False,
            hidden=768,
            linear_bins=801,
            square_root=True,
            log_bands=True,
            statistics=True,
        ),
        training=TrainingConfig(epochs=16, schedule="one_cycle", warp=0.06),
        practice=600,
        second_pass=True,
    )


def paper() -> Recipe:
    """The published method: multi-label hinge on the clip's best bases, assignment by threshold, no rest."""
    return Recipe(
        "paper",
        extraction=ExtractionConfig(image_size=256, looks="centre"),
        labels=LabelConfig(classes="published", unlabelled=False),
        training=TrainingConfig(loss="multilabel_margin", epochs=140),
        separation=SeparationConfig(
            assignment="threshold", mask_power=1.0, n_factorizations=1, second_look=False, least_share=0.0
        ),
    )


def audioset() -> Recipe:
    """The default for AudioSet's 190,000 clips: fewer epochs over many more clips, once."""
    base = default()
    return Recipe(
        "audioset",
        network=base.network,
        training=replace(base.training, epochs=12, batch_size=256),
        practice=2000,
        separation=base.separation,
    )


def both_passes() -> Recipe:
    """The default with the mean of both passes' networks, which carries over better to other collections' sounds."""
    return replace(default(), name="both_passes", n_networks=2)


RECIPES: dict[str, Callable[[], Recipe]] = {f.__name__: f for f in (default, paper, audioset, both_passes)}


def get(name: str) -> Recipe:
    """Return a recipe by name; ValueError lists the names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()
