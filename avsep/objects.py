"""The 23 objects, and what the pictures say about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

N_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class SoundObject:
    """An object with a look (ImageNet classes) and a sound (a node of AudioSet's ontology)."""

    name: str
    imagenet: tuple[int, ...]  # indices of the ImageNet-1k classes that show it
    mid: str  # its AudioSet node
    weak_mids: tuple[str, ...] = ()  # descendants whose clips seldom carry the object's own tag


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
        (436, 468, 479, 511, 581, 609, 627, 656, 661, 717, 751, 817),
        "/m/0k4j",
        ("/m/0912c9", "/m/07qv_d5", "/m/02mfyn", "/m/04gxbd"),
    ),
    SoundObject("train", (466, 547, 565, 705, 820, 829), "/m/07jdr"),
    SoundObject("plane", (404, 895, 908), "/m/0cmf2"),  # 726 is a carpenter's plane
    SoundObject("motorcycle", (518, 535, 665, 670), "/m/04_sv"),  # 518, 535: helmet and disk brake, what is seen of it
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


def object_index(name: str) -> int:
    """Return the row of `name` in every L axis; ValueError names the known objects."""
    try:
        return OBJECT_NAMES.index(name)
    except ValueError:
        raise ValueError(f"unknown object {name!r}; the objects are {', '.join(OBJECT_NAMES)}") from None


def multi_hot(names: list[str] | tuple[str, ...]) -> Tensor:
    """Turn object names into boolean `(L,)`.

    >>> multi_hot(["dog"]).nonzero().tolist()
    [[1]]
    """
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

    >>> weak_labels(torch.tensor([0.5, 0.1, 0.4])).tolist()
    [True, False, True]
    >>> weak_labels(torch.tensor([0.01, 0.1, 0.09])).tolist()
    [False, True, False]
    """
    best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    return (scores >= threshold) | (best & (scores >= best_threshold))
