"""Typed names and a model's objects: the only place of the service that knows a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from avsep.objects import OBJECTS, find
from avsep.service.answers import ObjectInfo

_LONGEST_NAME = 40  # of an object


def find_objects(typed: Iterable[str], objects: Sequence[str]) -> list[str]:
    """Turn what a client typed into a model's objects, each once; ValueError for a name that means none of them."""
    found = []
    for text in filter(None, (t.strip() for t in typed)):
        name = text if text in objects else find(text[:_LONGEST_NAME])
        if name not in objects:
            raise ValueError(f"the model has no object {name!r}; it has {', '.join(objects)}")
        found.append(name)
    return list(dict.fromkeys(found))


def object_infos(objects: Sequence[str], learned: Sequence[str]) -> list[ObjectInfo]:
    """Describe a model's objects; classes are given where the vocabulary has some."""
    known = {o.name: o for o in OBJECTS}
    return [
        ObjectInfo(
            name=name,
            learned=name in learned,
            imagenet=list(known[name].imagenet) if name in known else [],
            audioset=known[name].mid if name in known else "",
        )
        for name in objects
    ]
