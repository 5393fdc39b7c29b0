"""Typed names and a model's objects: the only place of the service that asks the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from avsep.objects import Vocabulary
from avsep.service.answers import ObjectInfo

_LONGEST_NAME = 40  # of an object


def find_objects(typed: Iterable[str], vocabulary: Vocabulary) -> list[str]:
    """Turn what a client typed into a model's objects, each once; ValueError for a name that means none of them."""
    names = (t.strip()[:_LONGEST_NAME] for t in typed)
    return list(dict.fromkeys(vocabulary.find(name) for name in names if name))


def object_infos(vocabulary: Vocabulary, learned: Sequence[str]) -> list[ObjectInfo]:
    """Describe a model's objects."""
    return [
        ObjectInfo(
            name=o.name, learned=o.name in learned, imagenet=list(o.imagenet), audioset=next(iter(o.audioset), "")
        )
        for o in vocabulary
    ]
