"""What the labels of public sets mean: each set's own vocabulary, and the same in another one."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from avsep.objects import AUDIOSET_23, SoundObject, Vocabulary

_VOCABULARIES = Path(__file__).parent.parent / "vocabularies"


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    """Read one of the vocabularies that come with the package: `music_11`, `music_21` or `ave_28`.

    >>> vocabulary("ave_28").find("Violin, fiddle"), vocabulary("ave_28").find("Bark")
    ('violin', 'dog')
    """
    return Vocabulary.parse((_VOCABULARIES / f"{name}.csv").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4096)
def objects_of(label: str, own: Vocabulary, asked: Vocabulary | None = None) -> tuple[str, ...]:
    """Return the objects that a label means in `asked` (default: the set's `own` vocabulary); none where it lacks them.

    A label may name several objects, as `cello violin` does. In another vocabulary the object
    is taken that has the label as name or alias. Else it is the one that has the own object's name. Else it is the
    only one that has one of its aliases.
    Raises ValueError for a label that the set doesn't have.

    >>> objects_of("cello violin", vocabulary("music_11")), objects_of("Bark", vocabulary("ave_28"), AUDIOSET_23)
    (('cello', 'violin'), ('dog',))
    """
    try:
        names: tuple[str, ...] = (own.find(label),)
    except ValueError as error:
        words = label.split()
        try:
            names = tuple(dict.fromkeys(own.find(word) for word in words)) if len(words) > 1 else ()
        except ValueError:
            names = ()
        if not names:
            raise ValueError(f"label: {error}") from None
    if asked is None:
        return names
    found = []
    for name in names:
        one = own.objects[own.index(name)]
        typed = [[label]] if len(names) == 1 else []
        meant = (_found(asked, group) for group in (*typed, [name], one.aliases))
        found.append(next((next(iter(some)) for some in meant if len(some) == 1), None))
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _found(asked: Vocabulary, names: Iterable[str]) -> set[str]:
    """Return the objects that names mean; one that is unknown or ambiguous means none."""
    found = set()
    for name in names:
        try:
            found.add(asked.find(name))
        except ValueError:
            continue
    return found


def vocabulary_of(labels: Iterable[str]) -> Vocabulary:
    """Make VGGSound's vocabulary of its labels: an object per label, in sorted order of the labels.

    A label that is the only one for one of the default's 23 objects gives that object, such as `violin`. Each other
    label gives an object of its own. It has the look of one of the 23 where that fits: `dog_barking` looks like a dog.
    Labels that can't be names of objects are left out.

    >>> v = vocabulary_of(["playing violin, fiddle", "dog barking", "dog howling", "playing oboe"])
    >>> v.names, v.find("playing violin, fiddle"), v.find("oboe"), v.objects[0].imagenet[0]
    (('dog_barking', 'dog_howling', 'playing_oboe', 'violin'), 'violin', 'playing_oboe', 151)
    """
    same = vocabulary("vggsound_23")
    made: dict[str, SoundObject] = {}
    for label in sorted(set(labels)):
        try:
            one = _object_of(label, same)
        except ValueError:
            continue
        key = one.name.replace("_", "")
        before = made.get(key)
        made[key] = replace(before, aliases=tuple(dict.fromkeys((*before.aliases, label)))) if before else one
    own = {_key(o.name) for o in made.values()}
    objects = (replace(o, aliases=tuple(a for a in o.aliases if _key(a) not in own)) for o in made.values())
    return Vocabulary(tuple(objects))


def _object_of(label: str, same: Vocabulary) -> SoundObject:
    """Return a label's object; ValueError where it can't be a name. `same` has VGGSound's labels for the 23."""
    parts = [part.strip() for part in label.removeprefix("playing ").split(",")]
    others = [label, *(part for part in parts if part and part != label)]
    twin = next((o for o in same if label in o.aliases), None)
    default = AUDIOSET_23.objects[AUDIOSET_23.index(twin.name)] if twin else None
    if twin and default and len(twin.aliases) == 1:
        return replace(default, aliases=tuple(dict.fromkeys((*others, *default.aliases))))
    if default:
        aliases = (*others, default.name)
        return SoundObject(name_of(label), default.imagenet, (), aliases, default.published, default.sound)
    return SoundObject(name_of(label), aliases=tuple(others), sound="pitched" if parts[0] != label else "unpitched")


def name_of(label: str) -> str:
    """Turn a label into an object's name.

    >>> name_of("police car (siren)")
    'police_car_siren'
    """
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "_", plain).strip("_")


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())
