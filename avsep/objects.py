"""The 23 objects, and what the pictures say about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes seconds, and readers of tables need the names alone

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
    SoundObject("drum", (541,), "/m/026t6", ("/m/011k_j",)),
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
    SoundObject("car", (751, 817, 511), "/m/0k4j", ("/m/0912c9", "/m/07qv_d5", "/m/02mfyn", "/m/04gxbd")),
    SoundObject("train", (705, 466, 820, 547), "/m/07jdr"),
    SoundObject("plane", (404, 895), "/m/0cmf2"),  # 726 is a carpenter's plane
    SoundObject("motorcycle", (670, 665), "/m/04_sv"),
)
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
    import torch

    hot = torch.zeros(len(OBJECTS), dtype=torch.bool)
    for name in names:
        hot[object_index(name)] = True
    return hot


def object_scores(image_logits: Tensor) -> Tensor:
    """Score each object in a clip's pictures, `(…, n_images, 1000)` logits → `(…, L)` in [0, 1].

    Per picture, a softmax over the 1000 ImageNet classes and the sum inside an object's group
    (the probability of the union); then the maximum over the pictures.

    Raises ValueError when there is no picture or the classes aren't ImageNet's 1000.
    """
    import torch

    if image_logits.ndim < 2 or image_logits.shape[-1] != N_IMAGENET_CLASSES or image_logits.shape[-2] == 0:
        raise ValueError(f"image_logits is {tuple(image_logits.shape)}; it must be (…, n_images ≥ 1, 1000)")
    probabilities = image_logits.float().softmax(-1)
    groups = [probabilities[..., list(o.imagenet)].sum(-1) for o in OBJECTS]
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
