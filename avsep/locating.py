"""Where objects are in pictures: class activation maps of the network that names them.

Some networks end in global average pooling and a linear layer. Such a one says for each cell of its last feature maps
how much that cell speaks for a class. Two of the same object share a map. The source is Zhou et al. 2016, Learning deep
features for discriminative localization.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from avsep.looks import Views

SHORT_SIDE = 16  # cells of a map along a picture's short side
_LONGEST = 3  # times the short side
_POOLED = 0.02  # of the pooled features' norm: how far the mean of the last maps may be from them
_PROBE = 96  # pixels, either way, of the picture that a network is tried with
_ALMOST_ALL = 0.01  # of the probability, left to other objects
_FADE = 2.0  # pictures: what was looked at that many before or after counts 1/e
_LIKE = 0.08  # of full scale: pictures that differ more, on average, are of other scenes
_THUMBNAIL = 12  # cells, either way, that pictures are compared by
_HALF = 0.5  # of its map's maximum: what belongs to an object
_LEAST = 0.02  # of a map in [0, 1]: below it an object is nowhere

Place = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the picture's width and height


class Seen(NamedTuple):
    """What a picture network makes of k views."""

    logits: Tensor  # (k, 1000)
    cells: Tensor | None  # (k, L, h, w), in [0, 1]; None: the network doesn't end in pooling and a linear layer


@dataclass(frozen=True)
class Ending:
    """A network's last feature maps, whose mean over the cells its last layer takes."""

    maps: nn.Module  # gives them, (n, D, h, w)
    last: nn.Linear  # (n, D) → (n, C)

    def watch(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run a network and return its logits `(n, C)` and last feature maps `(n, D, h, w)`."""
        found: list[Tensor] = []
        me = threading.get_ident()

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            if threading.get_ident() == me:
                found.append(output)

        handle = self.maps.register_forward_hook(keep)
        try:
            logits = network(x)
        finally:
            handle.remove()
        return logits, found[-1]


@torch.inference_mode()
def ending_of(network: nn.Module, device: str = "cpu") -> Ending | None:
    """Find where a network ends in global average pooling and a linear layer, by running it once; None: it doesn't."""
    means: list[tuple[nn.Module, Tensor]] = []
    ends: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            ends.append((module, inputs[0], output))
        elif isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            means.append((module, output.float().mean((2, 3))))

    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        noise = torch.rand(1, 3, _PROBE, _PROBE, generator=torch.Generator().manual_seed(0))
        logits = network(noise.to(device))
    except Exception:  # it takes no such picture: whatever it is, it has no such ending
        return None
    finally:
        for handle in handles:
            handle.remove()
    if not ends or ends[-1][2].shape != logits.shape or not torch.allclose(ends[-1][2].float(), logits.float()):
        return None
    last, pooled = ends[-1][0], ends[-1][1].float()
    for module, mean in reversed(means):
        if mean.shape == pooled.shape and float((mean - pooled).norm()) <= _POOLED * float(pooled.norm()):
            return Ending(module, last)
    return None


def object_cells(features: Tensor, logits: Tensor, weight: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Say where objects are in views, `(n, L, h, w)` in [0, 1].

    To first order, an object's log-odds are a sum over the classes: its own, weighted by their probabilities among
    themselves, less the others, weighted likewise. Each class is the mean of its map over the cells, so the log-odds
    have a map, too, whose mean they are. An object's cell is the probability of that, scaled so that the largest is the
    view's own probability: an object that isn't there is nowhere.

    Args:
        features: the last feature maps, `(n, D, h, w)`.
        logits: `(n, C)`.
        weight: the last layer's, `(C, D)`.
        groups: the classes of each object, L of them, as indices of C; one without classes is nowhere.
    """
    n, _, h, w = features.shape
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    every = p.float() @ weight  # (n, D), of all classes
    shares = torch.stack([p[:, list(group)].sum(-1) for group in groups], 1).clamp_min(1e-30)  # (n, L)
    rests = (1 - shares).clamp_min(1e-12)
    speaks, against = (weight.new_zeros(n, len(groups), weight.shape[1]) for _ in range(2))
    for i, group in enumerate(groups):
        if not group:
            continue
        own = list(group)
        speaks[:, i] = log_p[:, own].softmax(-1).float() @ weight[own]
        share, rest = (x[:, i : i + 1].float() for x in (shares, rests))
        against[:, i] = (every - share * speaks[:, i]) / rest
        for k in (rests[:, i] < _ALMOST_ALL).nonzero().flatten().tolist():  # a difference of what is nearly the same
            others = p[k].index_fill(0, torch.tensor(own, device=p.device), 0.0)
            against[k, i] = (others / others.sum().clamp_min(1e-30)).float() @ weight
    evidence = (speaks - against) @ features.flatten(2).float()  # (n, L, h·w)
    odds = (shares.log() - rests.log()).float().unsqueeze(-1)
    cells = (evidence - evidence.mean(-1, keepdim=True) + odds).sigmoid()
    cells = shares.float().unsqueeze(-1) * cells / cells.amax(-1, keepdim=True).clamp_min(1e-30)
    found = cells * torch.tensor([bool(group) for group in groups], device=cells.device).view(1, -1, 1)
    return found.view(n, len(groups), h, w)


def grid(height: int, width: int) -> tuple[int, int]:
    """Return how many rows and columns the maps of pictures of that size have."""
    short = min(height, width)
    rows, columns = (min(_LONGEST * SHORT_SIDE, max(1, round(SHORT_SIDE * n / short))) for n in (height, width))
    return rows, columns


def whole_maps(images: NDArray[np.uint8], views: Views, cells: Tensor) -> Tensor:
    """Join the views' cells, `(k, L, h', w')`, into maps of whole pictures, `(n, L, h, w)` in [0, 1].

    Where several views show a part of a picture it is their mean. Each picture has few views of its own, and objects
    stay for seconds. So what was seen before and after in the same scene counts, too, the less the farther.
    A map's maximum is the object's probability in the view that is surest of it; a part that no view shows is 0.
    """
    n, height, width = images.shape[:3]
    if not n:
        return torch.zeros(0, cells.shape[1], SHORT_SIDE, SHORT_SIDE)
    rows, columns = grid(height, width)
    cells = cells.float().cpu()
    boxes = torch.tensor(views.boxes)  # (k, 4)
    down, high = _placed(boxes[:, 1], boxes[:, 3], rows, cells.shape[2])
    across, wide = _placed(boxes[:, 0], boxes[:, 2], columns, cells.shape[3])
    shown = (down.unsqueeze(1) @ cells @ across.transpose(1, 2).unsqueeze(1)).flatten(1)  # (k, L·h·w)
    covered = (high.unsqueeze(2) * wide.unsqueeze(1)).flatten(1)  # (k, h·w)
    weights = _likeness(images)[:, list(views.owners)]  # (n, k)
    together = (weights @ shown).view(n, -1, rows * columns)
    mean = together / (weights @ covered).clamp_min(1e-6).unsqueeze(1)
    surest = (weights.unsqueeze(-1) * cells.amax((2, 3))).amax(1)  # (n, L)
    mean = mean * (surest / mean.amax(-1).clamp_min(1e-9)).unsqueeze(-1)
    return mean.view(n, -1, rows, columns)


def _placed(starts: Tensor, lengths: Tensor, n_cells: int, n_own: int) -> tuple[Tensor, Tensor]:
    """Interpolate views along one axis of the whole, `(k, n_cells, n_own)`, and say where they lie, `(k, n_cells)`."""
    centres = (torch.arange(n_cells) + 0.5) / n_cells
    within = (centres - starts.unsqueeze(1)) / lengths.unsqueeze(1)
    inside = ((within >= 0) & (within <= 1)).float()
    at = (within * n_own - 0.5).clamp(0, n_own - 1)
    near = (1 - (at.unsqueeze(-1) - torch.arange(n_own)).abs()).clamp_min(0)
    return near * inside.unsqueeze(-1), inside


def _likeness(images: NDArray[np.uint8]) -> Tensor:
    """Say how much each picture counts for each other, `(n, n)`: by their distance in time, 0 in another scene."""
    n, height, width = images.shape[:3]
    rows, columns = (np.linspace(0, size - 1, 4 * _THUMBNAIL).astype(int) for size in (height, width))
    sampled = torch.from_numpy(images[:, rows][:, :, columns]).float() / 255
    small = sampled.view(n, _THUMBNAIL, 4, _THUMBNAIL, 4, 3).mean((2, 4)).flatten(1)
    apart = torch.cdist(small, small, p=1) / small.shape[1]
    order = torch.arange(n)
    time = (-(order.unsqueeze(0) - order.unsqueeze(1)).abs() / _FADE).exp()
    return time * (apart < _LIKE)


@dataclass(frozen=True)
class Locations:
    """Where a file's objects are, in pictures from all over it."""

    objects: tuple[str, ...]  # J names
    times_s: tuple[float, ...]  # of n pictures
    maps: NDArray[np.uint8]  # (n, J, h, w): 255 is certainty

    @classmethod
    def of(cls, objects: Sequence[str], names: Sequence[str], times_s: Sequence[float], maps: Tensor) -> Locations:
        """Take some objects out of maps of all, `(n, L, h, w)` in [0, 1], whose names are `names`."""
        rows = [list(names).index(name) for name in objects]
        small = (255 * maps[:, rows]).round().byte().numpy()
        return cls(tuple(objects), tuple(float(t) for t in times_s), small)

    def boxes(self, name: str) -> list[dict[str, Any]]:
        """Say where an object is: `time_s` and `box`, left, top, right and bottom as fractions, of each picture of it.

        A box is around all that is joined to the map's maximum and at least half of it.
        """
        row = self.objects.index(name)
        peaks = self.maps[:, row].max((1, 2))
        least = max(_LEAST * 255, _HALF * float(peaks.max(initial=0)) / 2)
        return [
            {"time_s": round(self.times_s[i], 3), "box": list(box_of(self.maps[i, row]))}
            for i in np.flatnonzero(peaks >= least)
        ]

    def surest(self, name: str) -> dict[str, Any] | None:
        """Return the one of `boxes` in whose picture an object is seen best; None where it is nowhere."""
        peaks = self.maps[:, self.objects.index(name)].max((1, 2))
        at = round(self.times_s[int(peaks.argmax())], 3) if len(peaks) else None
        return next((found for found in self.boxes(name) if found["time_s"] == at), None)

    def best(self) -> int:
        """Return the picture that shows most of the objects, and the surest: the number of it; 0 where none does."""
        if not len(self.maps) or not self.objects:
            return 0
        return int(np.sqrt(self.maps.max((2, 3)).astype(np.float64)).sum(1).argmax())

    def marks(self, image: int) -> dict[str, Place]:
        """Return the boxes of the objects that one picture shows, by name."""
        marks: dict[str, Place] = {}
        for name in self.objects:
            for found in self.boxes(name):
                if found["time_s"] == round(self.times_s[image], 3):
                    marks[name] = tuple(found["box"])
        return marks


def box_of(cells: NDArray) -> Place:
    """Return the box around what is joined to a map's maximum, `(h, w)`, and at least half of it.

    >>> box_of(np.array([[0, 0, 0, 9], [0, 5, 8, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    (0.75, 0.0, 1.0, 0.25)
    """
    peak = np.unravel_index(int(cells.argmax()), cells.shape)
    regions, _ = ndimage.label(cells >= _HALF * cells[peak])
    rows, columns = np.nonzero(regions == regions[peak])
    height, width = cells.shape
    edges = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    left, top, right, bottom = (round(float(edge), 3) for edge in edges)
    return left, top, right, bottom
