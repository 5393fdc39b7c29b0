"""The 23 objects, and what the pictures say about them."""

from __future__ import annotations

import difflib
import functools
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes seconds, and readers of tables need the names alone

N_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class SoundObject:
    """An object with a look (ImageNet classes) and a sound (a node of AudioSet's ontology)."""

    name: str
    imagenet: tuple[int, ...]  # indices of the ImageNet-1k classes that show it, a published one first
    mid: str  # its AudioSet node
    weak_mids: tuple[str, ...] = ()  # descendants whose clips seldom carry the object's own tag

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that people use; one that several objects have is ambiguous."""
        return _ALIASES.get(self.name, ())


def _span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


OBJECTS: tuple[SoundObject, ...] = (
    SoundObject("cat", _span(281, 285), "/m/01yrx", ("/m/07rjwbb", "/m/0ghcn6")),
    SoundObject("dog", _span(151, 268), "/m/0bt9lr", ("/m/0ghcn6",)),  # breeds only: 269-275 are wild canids
    SoundObject("chicken", (7, 8), "/m/09b5t"),
    SoundObject("frog", _span(30, 32), "/m/09ld4"),
    SoundObject("accordion", (401,), "/m/0mkg"),
    SoundObject("acoustic_guitar", (402,), "/m/042v_gx"),
    SoundObject("banjo", (420,), "/m/018j2"),
    SoundObject("cello", (486,), "/m/01xqw"),
    SoundObject("drum", (541, 542), "/m/026t6", ("/m/011k_j",)),
    SoundObject("electric_guitar", (546,), "/m/02sgy"),
    SoundObject("flute", (558,), "/m/0l14j_"),
    SoundObject("french_horn", (566,), "/m/0319l"),
    SoundObject("harmonica", (593,), "/m/03qjg"),
    SoundObject("harp", (594,), "/m/03m5k"),
    SoundObject("marimba", (642,), "/m/0dwsp"),
    SoundObject("piano", (579, 881), "/m/05r5c"),
    SoundObject("saxophone", (776,), "/m/06ncr"),
    SoundObject("trombone", (875,), "/m/07c6l"),
    SoundObject("violin", (889,), "/m/07y_7", ("/m/0d8_n",)),
    SoundObject(
        "car",
        (751, 817, 511, 436, 468, 479, 581, 609, 627, 656, 661, 717),
        "/m/0k4j",
        ("/m/0912c9", "/m/07qv_d5", "/m/02mfyn", "/m/04gxbd"),
    ),
    SoundObject("train", (466, 547, 565, 705, 820, 829), "/m/07jdr"),
    SoundObject("plane", (404, 895, 908), "/m/0cmf2"),  # 726 is a carpenter's plane
    SoundObject("motorcycle", (670, 665, 518, 535), "/m/04_sv"),  # 518, 535: helmet and disk brake, what is seen of it
)
# Where the published indices are others: they leave out most of what people film.
_PUBLISHED = {
    "drum": (541,),
    "car": (751, 817, 511),
    "train": (705, 466, 820, 547),
    "plane": (404, 895),
    "motorcycle": (670, 665),
}
# Which ImageNet classes show each object, by name.
IMAGENET_CLASSES: dict[str, tuple[tuple[int, ...], ...]] = {
    "everyday": tuple(o.imagenet for o in OBJECTS),
    "published": tuple(_PUBLISHED.get(o.name, o.imagenet) for o in OBJECTS),
}
OBJECT_NAMES: tuple[str, ...] = tuple(o.name for o in OBJECTS)
_ALIASES: dict[str, tuple[str, ...]] = {
    "cat": ("kitten", "kitty"),
    "dog": ("puppy", "hound"),
    "chicken": ("hen", "rooster", "cockerel", "cock", "chick"),
    "frog": ("bullfrog", "tree_frog"),
    "accordion": ("piano_accordion", "squeezebox"),
    "acoustic_guitar": ("guitar", "classical_guitar", "spanish_guitar", "folk_guitar"),
    "cello": ("violoncello",),
    "drum": ("drum_kit", "drum_set", "snare_drum", "bass_drum"),
    "electric_guitar": ("guitar", "e_guitar"),
    "flute": ("concert_flute", "transverse_flute"),
    "french_horn": ("horn",),
    "harmonica": ("mouth_organ", "mouth_harp", "blues_harp"),
    "harp": ("concert_harp",),
    "piano": ("grand_piano", "upright_piano", "pianoforte"),
    "saxophone": ("sax", "alto_saxophone", "tenor_saxophone", "alto_sax", "tenor_sax"),
    "violin": ("fiddle",),
    "car": ("automobile", "motorcar", "auto", "sports_car", "race_car", "racing_car"),
    "train": ("locomotive", "steam_locomotive", "railway"),
    "plane": ("airplane", "aeroplane", "aircraft", "airliner", "jet"),
    "motorcycle": ("motorbike", "moped"),
}


def object_index(name: str) -> int:
    """Return the row of an object in every L axis, by its own name; `find` takes what people type.

    Raises ValueError as `find` does, for names that `find` takes too: what is stored holds the objects' own.
    """
    try:
        return OBJECT_NAMES.index(name)
    except ValueError:
        own = find(name)
        raise ValueError(f"unknown object {name!r}; did you mean {own}?") from None


def find(name: str) -> str:
    """Return the object that a typed name means: case, blanks, hyphens, plurals and other names are taken.

    Raises ValueError for an ambiguous or unknown name, with the objects that may be meant.

    >>> find("Acoustic Guitar"), find("motor-bike"), find("Drums")
    ('acoustic_guitar', 'motorcycle', 'drum')
    """
    key = _key(name)
    known = _by_key()
    singulars = [key.removesuffix(end) + y for end, y in (("s", ""), ("es", ""), ("ies", "y")) if key.endswith(end)]
    meant = next((known[k] for k in (key, *singulars) if k in known), ())
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"object {name!r} is ambiguous: {' or '.join(meant)}?")
    near = [o for found in difflib.get_close_matches(key, known, n=3, cutoff=0.75) for o in known[found]]
    if near:
        raise ValueError(f"unknown object {name!r}; did you mean {' or '.join(dict.fromkeys(near))}?")
    raise ValueError(f"unknown object {name!r}; the objects are {', '.join(OBJECT_NAMES)}")


def _key(name: str) -> str:
    """Leave of a name what tells it from others."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


@functools.cache
def _by_key() -> dict[str, tuple[str, ...]]:
    """Map the keys of names and aliases to the objects that have them."""
    known: dict[str, tuple[str, ...]] = {}
    for o in OBJECTS:
        for name in (o.name, *o.aliases):
            known[_key(name)] = (*known.get(_key(name), ()), o.name)
    return known


def multi_hot(names: list[str] | tuple[str, ...]) -> Tensor:
    """Turn object names into boolean `(L,)`.

    >>> multi_hot(["dog"]).nonzero().tolist()
    [[1]]
    """
    import torch

    hot = torch.zeros(len(OBJECTS), dtype=torch.bool)
    for name in names:
        hot[object_index(name)] = True
    return hot


def object_scores(image_logits: Tensor, classes: str = "everyday", *, joined: bool = False) -> Tensor:
    """Score each object in a clip's pictures, `(…, n_images, 1000)` logits → `(…, L)` in [0, 1].

    Per picture, a softmax over the 1000 ImageNet classes and the sum inside an object's group
    (the probability of the union); then the maximum over the pictures.

    Args:
        image_logits: one row per picture.
        classes: which ImageNet classes show an object: a name in `IMAGENET_CLASSES`.
        joined: the rows are of several looks, log-probabilities that nothing normalises again (`looks.Views`).

    Raises ValueError when there is no picture, the classes aren't ImageNet's 1000, or `classes` is unknown.
    """
    import torch

    if classes not in IMAGENET_CLASSES:
        raise ValueError(f"classes are {classes!r}; they must be one of {', '.join(IMAGENET_CLASSES)}")
    if image_logits.ndim < 2 or image_logits.shape[-1] != N_IMAGENET_CLASSES or image_logits.shape[-2] == 0:
        raise ValueError(f"image_logits is {tuple(image_logits.shape)}; it must be (…, n_images ≥ 1, 1000)")
    probabilities = image_logits.float().exp() if joined else image_logits.float().softmax(-1)
    groups = [probabilities[..., list(group)].sum(-1) for group in IMAGENET_CLASSES[classes]]
    return torch.stack(groups, -1).amax(-2).clamp(0, 1)


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
