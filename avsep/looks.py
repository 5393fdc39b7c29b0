"""Which parts of a clip's pictures the picture network is shown, and what its answers say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, width, height, as parts of the picture's

WAYS = ("centre", "tiles")
CENTRE = 7 / 8  # of the short side: the middle that most classifiers were measured with
_THIRD, _SIXTH = 1 / 3, 1 / 6
# Of pictures that are wider than high; of others, mirrored. Each picture gets the next two; eight have all.
_TILES: tuple[Box, ...] = (
    *((0, 0, 1, 1), (0, 0, _THIRD, 1), (_THIRD, 0, _THIRD, 1), (2 * _THIRD, 0, _THIRD, 1)),
    *((0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), (0, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
    *((0, 0, 0.6, 0.6), (0.4, 0, 0.6, 0.6), (0, 0.4, 0.6, 0.6), (0.4, 0.4, 0.6, 0.6)),
    *((_SIXTH, 0, _THIRD, 1), (0.5, 0, _THIRD, 1), (0.25, 0.25, 0.5, 0.5), (_SIXTH, 0, 2 * _THIRD, 1)),
)
_TILES_A_PICTURE = 2


@dataclass(frozen=True)
class Looking:
    """How a clip's pictures are looked at: the way, and what the network takes."""

    way: str
    size: int  # pixels, either way
    crop: float = CENTRE  # of the short side, in the look at the middle
    resampling: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, images: NDArray[np.uint8]) -> Views:
        """Cut the looks out of a clip's pictures, `(n, height, width, 3)`, each squeezed into the network's square."""
        cut, owners, places = [], [], []
        n_images, height, width = images.shape[:3]
        for i, parts in enumerate(boxes(self.way, n_images, height, width, self.crop)):
            image = Image.fromarray(images[i])
            for x, y, w, h in parts:
                box = (x * width, y * height, min(width, (x + w) * width), min(height, (y + h) * height))
                cut.append(np.asarray(image.resize((self.size, self.size), self.resampling, box=box)))
                owners.append(i)
                places.append((x, y, w, h))
        crops = np.stack(cut) if cut else np.zeros((0, self.size, self.size, 3), np.uint8)
        return Views(crops, tuple(owners), n_images, tuple(places))


@dataclass(frozen=True)
class Views:
    """Parts of a clip's pictures, resized to what the network takes."""

    crops: NDArray[np.uint8]  # (k, size, size, 3)
    owners: tuple[int, ...]  # the picture of each, (k,)
    n_images: int
    boxes: tuple[Box, ...] = ()  # what each shows of its picture, (k,)

    def evidence(self, logits: NDArray[np.float32] | Tensor) -> Tensor:
        """Join the crops' logits, `(k, 1000)`, into one row per picture, `(n_images, 1000)`.

        With one look per picture they are the logits; with several, of each class the largest log-probability.
        """
        rows = torch.as_tensor(logits)
        if self.owners == tuple(range(self.n_images)):
            return rows
        best = torch.full((self.n_images, rows.shape[1]), -torch.inf)
        index = torch.tensor(self.owners).unsqueeze(1).expand_as(rows)
        return best.scatter_reduce(0, index, rows.float().log_softmax(-1), "amax")


def boxes(way: str, n_images: int, height: int, width: int, crop: float = CENTRE) -> list[list[Box]]:
    """Say where to look in each of a clip's pictures.

    `centre` is one look at the middle, `crop` of the short side, as published. `tiles` are the whole frame, its
    halves, thirds and quarters: an object at the side, small, or beside another is missed in one look, where the
    strongest takes the softmax. Objects stay for seconds, so the tiles are dealt out over the pictures. Raises
    ValueError for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way of looking {way!r}; the ways are {', '.join(WAYS)}")
    if not n_images:  # and no height nor width either
        return []
    if way == "centre":
        side = crop * min(height, width)
        return [[((1 - side / width) / 2, (1 - side / height) / 2, side / width, side / height)]] * n_images
    tiles = _TILES if width >= height else tuple((y, x, h, w) for x, y, w, h in _TILES)
    each = max(_TILES_A_PICTURE, -(-len(tiles) // n_images))  # few pictures have them all
    return [[tiles[k % len(tiles)] for k in range(i * each, (i + 1) * each)] for i in range(n_images)]


def join(clips: Sequence[Views]) -> NDArray[np.uint8]:
    """Put several clips' crops together, to be shown at once."""
    return np.concatenate([v.crops for v in clips])
