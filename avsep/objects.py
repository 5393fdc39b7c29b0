"""Which objects there are, and what the pictures say about them."""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes seconds, and readers of tables need the names alone

N_IMAGENET_CLASSES = 1000
SOUNDS = ("pitched", "unpitched", "struck")
CLASSES = ("everyday", "published")
REST = "_rest"  # what is none of the objects'
_RESERVED = ("none", "noise", "mixture")  # words of tables and names of files


@dataclass(frozen=True)
class SoundObject:
    """An object with a look (ImageNet classes) and a sound (nodes of AudioSet's ontology); it may lack either.

    >>> SoundObject("oboe", imagenet=(683,), aliases=("hautbois",)).sound
    'pitched'
    """

    name: str  # of lower-case letters, digits and _
    imagenet: tuple[int, ...] = ()  # indices of the ImageNet-1k classes that show it, the best first
    audioset: tuple[str, ...] = ()  # AudioSet's nodes; what lies below them counts, too
    aliases: tuple[str, ...] = ()  # other names that people use; one that several objects have is ambiguous
    published: tuple[int, ...] = ()  # the method's published ImageNet indices, where they are others
    sound: str = "pitched"  # or unpitched or struck, for baselines that tell these apart

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z0-9_]+", self.name) or self.name in _RESERVED or self.name.startswith("_"):
            raise ValueError(
                f"object name {self.name!r}: it must be lower-case letters, digits and _ such as french_horn, "
                f"and not {', '.join(_RESERVED)}"
            )
        for index in (*self.imagenet, *self.published):
            if not isinstance(index, int) or not 0 <= index < N_IMAGENET_CLASSES:
                raise ValueError(f"{self.name}: ImageNet index {index!r}; indices are 0 to {N_IMAGENET_CLASSES - 1}")
        for mid in self.audioset:
            if not re.fullmatch(r"/[a-z]/\w+", mid):
                raise ValueError(f"{self.name}: AudioSet node {mid!r}; nodes are mids such as /m/0bt9lr")
        if self.sound not in SOUNDS:
            raise ValueError(f"{self.name}: sound is {self.sound!r}; it is one of {', '.join(SOUNDS)}")


@dataclass(frozen=True)
class Vocabulary:
    """Which objects there are, in the order of every L axis.

    It is written with segments, clip shards and models, and read from there. Raises ValueError where there is
    no object, a name occurs twice, or an alias is another object's name.
    """

    objects: tuple[SoundObject, ...]

    def __post_init__(self) -> None:
        if not self.objects:
            raise ValueError("a vocabulary needs at least one object")
        owners: dict[str, str] = {}
        for o in self.objects:
            if (other := owners.setdefault(_key(o.name), o.name)) != o.name or self.names.count(o.name) > 1:
                raise ValueError(f"the objects {other} and {o.name} have one name")
        for o in self.objects:
            for alias in o.aliases:
                if owners.get(_key(alias), o.name) != o.name:
                    raise ValueError(f"alias {alias!r} of {o.name} is the name of another object")

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[SoundObject]:
        return iter(self.objects)

    def __str__(self) -> str:
        """Say it shortly: `5 objects (cello, clarinet, dog, …)`."""
        some = ", ".join(self.names[:3]) + (", …" if len(self) > 3 else "")
        return f"{len(self)} object{'s' * (len(self) != 1)} ({some})"

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The objects' names."""
        return tuple(o.name for o in self.objects)

    @functools.cached_property
    def digest(self) -> str:
        """A short hash of the whole."""
        return hashlib.sha256(json.dumps(self.as_list()).encode()).hexdigest()[:12]

    @functools.cached_property
    def _by_key(self) -> dict[str, tuple[str, ...]]:
        """The keys of names and aliases, with the objects that have them."""
        known: dict[str, tuple[str, ...]] = {}
        for o in self.objects:
            for name in (o.name, *o.aliases):
                known[_key(name)] = tuple(dict.fromkeys((*known.get(_key(name), ()), o.name)))
        return known

    def index(self, name: str) -> int:
        """Return the row of an object in every L axis, by its own name; `find` takes what people type.

        Raises ValueError as `find` does, for names that `find` takes too: what is stored holds the objects' own.
        """
        try:
            return self.names.index(name)
        except ValueError:
            own = self.find(name)
            raise ValueError(f"unknown object {name!r}; did you mean {own}?") from None

    def find(self, name: str) -> str:
        """Return the object that a typed name means: case, blanks, hyphens, plurals and other names are taken.

        Raises ValueError for an ambiguous or unknown name, with the objects that may be meant.
        """
        key, known = _key(name), self._by_key
        ends = (("s", ""), ("es", ""), ("ies", "y"))
        singulars = [key.removesuffix(end) + y for end, y in ends if key.endswith(end)]
        meant = next((known[k] for k in (key, *singulars) if k in known), ())
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise ValueError(f"object {name!r} is ambiguous: {' or '.join(meant)}?")
        near = [o for found in difflib.get_close_matches(key, known, n=3, cutoff=0.75) for o in known[found]]
        if near:
            raise ValueError(f"unknown object {name!r}; did you mean {' or '.join(dict.fromkeys(near))}?")
        raise ValueError(f"unknown object {name!r}; the objects are {', '.join(self.names)}")

    def multi_hot(self, names: Sequence[str]) -> Tensor:
        """Turn object names into boolean `(L,)`."""
        import torch

        hot = torch.zeros(len(self), dtype=torch.bool)
        for name in names:
            hot[self.index(name)] = True
        return hot

    def imagenet_classes(self, classes: str = "everyday") -> tuple[tuple[int, ...], ...]:
        """Return which ImageNet classes show each object: `everyday` what people film, or the `published` ones."""
        if classes not in CLASSES:
            raise ValueError(f"classes are {classes!r}; they must be one of {', '.join(CLASSES)}")
        return tuple((o.published if classes == "published" else ()) or o.imagenet for o in self.objects)

    def scores(self, image_logits: Tensor, classes: str = "everyday", *, joined: bool = False) -> Tensor:
        """Score each object in a clip's pictures, `(…, n_images, 1000)` logits → `(…, L)` in [0, 1].

        Per picture, a softmax over the 1000 ImageNet classes and the sum inside an object's group
        (the probability of the union); then the maximum over the pictures. An object without classes scores 0.

        Args:
            image_logits: one row per picture.
            classes: which ImageNet classes show an object, see `imagenet_classes`.
            joined: the rows are of several looks, log-probabilities that nothing normalises again (`looks.Views`).

        Raises ValueError when there is no picture, the classes aren't ImageNet's 1000, or `classes` is unknown.
        """
        import torch

        groups = self.imagenet_classes(classes)
        if image_logits.ndim < 2 or image_logits.shape[-1] != N_IMAGENET_CLASSES or image_logits.shape[-2] == 0:
            raise ValueError(f"image_logits is {tuple(image_logits.shape)}; it must be (…, n_images ≥ 1, 1000)")
        probabilities = image_logits.float().exp() if joined else image_logits.float().softmax(-1)
        return torch.stack([probabilities[..., list(g)].sum(-1) for g in groups], -1).amax(-2).clamp(0, 1)

    @classmethod
    def of(cls, names: Sequence[str]) -> Vocabulary:
        """Make a vocabulary of names: the default's objects where it has them, others without look and sound."""
        known = {o.name: o for o in AUDIOSET_23}
        return cls(tuple(known.get(name) or SoundObject(name) for name in names))

    def as_list(self) -> list[dict[str, Any]]:
        """Return what JSON holds of it."""
        rows = [asdict(o) for o in self.objects]
        return [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in rows]

    @classmethod
    def from_list(cls, raw: Any) -> Vocabulary:
        """Read what `as_list` gave, or a user's list of the same entries; all but `name` may be missing.

        Raises ValueError naming the object, the value and the rule.
        """
        if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
            raise ValueError("a vocabulary is a list of objects with a name each")
        known = [f.name for f in fields(SoundObject)]
        objects = []
        for number, entry in enumerate(raw, 1):
            if unknown := set(entry) - set(known):
                raise ValueError(f"object {number} has {', '.join(sorted(unknown))}; it may have {', '.join(known)}")
            if not isinstance(entry.get("name"), str):
                raise ValueError(f"object {number} has no name")
            lists = {k: v for k, v in entry.items() if k not in ("name", "sound")}
            for key, value in lists.items():
                if not isinstance(value, (list, tuple)):
                    raise ValueError(f"{entry['name']}: {key} is {value!r}; it must be a list")
            objects.append(SoundObject(**entry | {k: tuple(v) for k, v in lists.items()}))
        return cls(tuple(objects))

    @classmethod
    def parse(cls, text: str) -> Vocabulary:
        """Read a JSON list or a CSV table with the columns of `SoundObject`; all but `name` may be missing.

        In CSV `;` separates several values, for indices and nodes a blank does, too; 281-285 is a span of
        ImageNet indices, and a line that begins with # is a comment.
        Raises ValueError naming the object, the value and the rule.

        >>> Vocabulary.parse("name,imagenet,aliases\\noboe,683,hautbois\\ndog,151-268,").find("Hautbois")
        'oboe'
        """
        text = text.removeprefix("\ufeff")
        if text.lstrip().startswith("["):
            try:
                return cls.from_list(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"is no JSON: {error}") from None
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        rows = list(csv.DictReader(lines, restkey="beyond"))
        if not rows or "name" not in rows[0]:
            raise ValueError("must be a JSON list, or a CSV table with a column name")
        return cls.from_list([_entry(row) for row in rows if any(row.values())])


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a CSV row's cells into what JSON holds of an object."""
    entry: dict[str, Any] = {"name": (row.pop("name") or "").strip()}
    for column, cell in row.items():
        between = ";" if column == "aliases" else r"[;\s]"  # an alias may be of several words
        parts = [p.strip() for p in re.split(between, cell or "") if p.strip()] if column != "beyond" else [cell]
        if column == "sound":
            entry |= {"sound": cell.strip()} if parts else {}
        elif column in ("imagenet", "published"):
            entry[column] = [i for part in parts for i in _span(entry["name"], part)]
        else:
            entry[column] = parts
    return entry


def _span(name: str, text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise ValueError(f"{name}: ImageNet index {text!r}; write 889 or a span such as 281-285")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _key(name: str) -> str:
    """Leave of a name what tells it from others."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


# The default: one line of data per object.
AUDIOSET_23 = Vocabulary.parse(Path(__file__).with_name("audioset_23.csv").read_text())
OBJECTS: tuple[SoundObject, ...] = AUDIOSET_23.objects
OBJECT_NAMES: tuple[str, ...] = AUDIOSET_23.names


def object_index(name: str) -> int:
    """Return an object's row in the default vocabulary's L axis; see `Vocabulary.index`.

    >>> object_index("cat"), OBJECT_NAMES[1]
    (0, 'dog')
    """
    return AUDIOSET_23.index(name)


def find(name: str) -> str:
    """Return the object of the default vocabulary that a typed name means; see `Vocabulary.find`.

    >>> find("Acoustic Guitar"), find("motor-bike"), find("Drums")
    ('acoustic_guitar', 'motorcycle', 'drum')
    """
    return AUDIOSET_23.find(name)


def multi_hot(names: Sequence[str]) -> Tensor:
    """Turn names of the default vocabulary into boolean `(L,)`.

    >>> multi_hot(["dog"]).nonzero().tolist()
    [[1]]
    """
    return AUDIOSET_23.multi_hot(names)


def object_scores(image_logits: Tensor, classes: str = "everyday", *, joined: bool = False) -> Tensor:
    """Score the default vocabulary's objects in a clip's pictures; see `Vocabulary.scores`.

    >>> import torch
    >>> logits = torch.full((1, 1000), -20.0)  # one picture
    >>> logits[0, 889] = 20.0  # ImageNet's violin
    >>> scores = object_scores(logits)
    >>> OBJECT_NAMES[int(scores.argmax())], round(float(scores.max()), 3)
    ('violin', 1.0)
    """
    return AUDIOSET_23.scores(image_logits, classes, joined=joined)


def weak_labels(scores: Tensor, threshold: float = 0.3, best_threshold: float = 0.05) -> Tensor:
    """Choose the labels of a clip from its object scores, `(…, L)` → boolean `(…, L)`.

    Every object of score ≥ `threshold`, and the best one when it reaches `best_threshold`;
    possibly none, and then the clip takes no part in training.

    >>> import torch
    >>> weak_labels(torch.tensor([0.5, 0.1, 0.4])).tolist()
    [True, False, True]
    >>> weak_labels(torch.tensor([0.01, 0.1, 0.09])).tolist()
    [False, True, False]
    """
    import torch

    best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    return (scores >= threshold) | (best & (scores >= best_threshold))
