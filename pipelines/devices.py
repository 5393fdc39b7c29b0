"""Where pictures are labelled and clips factorised: on GPUs that tasks share, or in their own processes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from avsep import factors, stages
from avsep.vision import NO_DOWNLOAD, ImageLabeller, LabellerFile, LabellerUnavailable
from pipelines import runners
from pipelines.console import fail, say

Groups = Sequence[Sequence[int]] | None
T = TypeVar("T")

_ACTORS_A_GPU = 2  # one moves data while the other computes


@dataclass(frozen=True)
class Devices:
    """Who labels a task's pictures (None: nobody), and who factorises its clips (None: the task itself)."""

    label: stages.Label | None = None
    factorize: factors.Factorize | None = None


@functools.lru_cache(maxsize=1)
def _own_labeller(architecture: str, weights: str | None, sha256: str) -> ImageLabeller:
    return ImageLabeller.load(architecture, weights)


@dataclass(frozen=True)
class LabelHere:
    """Label in the worker's own process: without a GPU to share, sending pictures away gains nothing."""

    architecture: str
    weights: str | None
    sha256: str  # of the weights: another file of the same name is another network

    def __call__(self, images: Any) -> Future:
        """Return a finished future of what the network sees."""
        future: Future = Future()
        future.set_result(_own_labeller(self.architecture, self.weights, self.sha256).see(images))
        return future


def load_labeller(arguments: argparse.Namespace, default: str, needed: bool) -> ImageLabeller | None:
    """Load the picture network asked for, or `default`; without weights go on where labels are given, else stop."""
    return _taken(ImageLabeller.load, arguments, default, needed)


def find_labeller(arguments: argparse.Namespace, default: str, needed: bool) -> LabellerFile | None:
    """Say what `load_labeller` would load, as far as that can be told without a download."""
    found = _taken(LabellerFile.find, arguments, default, needed)
    if found and found.sha256 is None:
        say(f"the weights of {found.architecture} aren't on this machine; the run brings and checks them")
    return found


def _taken(take: Callable[[str, str | None], T], arguments: argparse.Namespace, default: str, needed: bool) -> T | None:
    try:
        return take(arguments.labeller or default, arguments.weights)
    except LabellerUnavailable as error:
        if needed or arguments.weights or arguments.labeller:
            why = "; some segments have no given labels, so the pictures must decide them" if needed else ""
            remedy = "" if arguments.weights else f"; or take one that needs no download, --labeller {NO_DOWNLOAD}"
            fail(f"{error}{why}{remedy}")
        say(f"note: {error}. The table gives every label, so extraction goes on without picture logits.")
        return None


def open_stages(architecture: str | None, weights: str | None, groups: Groups = None) -> stages.DeviceStages:
    """Make the GPU's stages ready: what an actor holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labeller = ImageLabeller.load(architecture, weights, device) if architecture else None
    return stages.DeviceStages(labeller, device, groups)


def open_devices(
    runner: runners.Runner,
    config: factors.ExtractionConfig,
    labeller: ImageLabeller | None,
    weights: str | None,
    groups: Groups = None,
) -> list[Devices]:
    """Share the runner's GPUs among tasks: one entry per actor, which tasks take in turn; without GPUs a single one.

    `groups` are the ImageNet classes of objects whose places in pictures GPUs give, too.
    """
    looking = labeller.looking(config.looks) if labeller else None
    if n_gpus := runner.n_gpus:
        make = functools.partial(open_stages, labeller.architecture if labeller else None, weights, groups)
        actors = runner.actors(make, _ACTORS_A_GPU * n_gpus, gpus=1 / _ACTORS_A_GPU)
        return [
            Devices(
                stages.Label(looking, functools.partial(actor, stages.DeviceStages.label)) if looking else None,
                functools.partial(actor, stages.DeviceStages.factorize),
            )
            for actor in actors
        ]
    if labeller and looking:
        return [Devices(stages.Label(looking, LabelHere(labeller.architecture, weights, labeller.sha256)))]
    return [Devices()]
