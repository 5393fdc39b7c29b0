"""Where a clip's pictures are looked at, and what the looks say together."""

import math

import numpy as np
import pytest
import torch

from avsep import looks
from avsep.looks import Looking, Views, boxes

SHAPES = [(320, 320), (320, 569), (569, 320), (320, 960), (240, 101)]  # height, width


@pytest.mark.parametrize("way", looks.WAYS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("n_images", [1, 2, 10, 60])
def test_each_look_lies_within_its_picture(way: str, height: int, width: int, n_images: int) -> None:
    found = boxes(way, n_images, height, width)
    assert len(found) == n_images and all(found)  # every picture is looked at
    for x, y, w, h in (box for picture in found for box in picture):
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tiles_leave_no_part_of_a_clip_unseen(height: int, width: int) -> None:
    """Of ten pictures together, each point lies in some look; of one picture, too."""
    for n_images in (1, 10):
        seen = np.zeros((48, 48), bool)
        for x, y, w, h in (box for picture in boxes("tiles", n_images, height, width) for box in picture):
            seen[math.floor(48 * y) : math.ceil(48 * (y + h)), math.floor(48 * x) : math.ceil(48 * (x + w))] = True
        assert seen.all()


def test_tiles_of_a_high_picture_are_those_of_a_wide_one_mirrored() -> None:
    wide, high = boxes("tiles", 4, 300, 500), boxes("tiles", 4, 500, 300)
    assert [[(y, x, h, w) for x, y, w, h in picture] for picture in wide] == high


@pytest.mark.parametrize("way", looks.WAYS)
def test_a_clip_without_pictures_has_no_looks(way: str) -> None:
    """As decoding gives it, it has neither height nor width."""
    views = Looking(way, 64)(np.zeros((0, 0, 0, 3), np.uint8))
    assert views.crops.shape == (0, 64, 64, 3) and views.owners == () and views.n_images == 0
    assert views.evidence(np.zeros((0, 1000), np.float32)).shape == (0, 1000)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown way of looking 'corners'; the ways are centre, tiles"):
        boxes("corners", 1, 320, 320)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 455), (256, 457), (455, 256)])
def test_the_look_at_the_middle_is_the_published_crop(height: int, width: int) -> None:
    """Of a short side of 256 pixels 224 in the middle, pixel by pixel where they can lie on pixels."""
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    views = Looking("centre", 224)(image)
    top, left = (height - 224) / 2, (width - 224) / 2
    assert views.crops.shape == (1, 224, 224, 3) and views.owners == (0,)
    if top.is_integer() and left.is_integer():
        expected = image[:, int(top) : int(top) + 224, int(left) : int(left) + 224]
        assert np.array_equal(views.crops, expected)


@pytest.mark.parametrize("size", [32, 75])
def test_a_look_is_what_its_box_holds(size: int) -> None:
    """A picture blue on the left and red on the right: each look has as much red as its box."""
    image = np.zeros((1, 60, 120, 3), np.uint8)
    image[:, :, :60, 2], image[:, :, 60:, 0] = 200, 200
    views = Looking("tiles", size)(image)
    assert views.crops.shape == (len(views.owners), size, size, 3)
    for crop, (x, _, w, _) in zip(views.crops, boxes("tiles", 1, 60, 120)[0], strict=True):
        red = min(1, max(0, (x + w - 0.5) / w))
        assert crop[..., 0].mean() == pytest.approx(200 * red, abs=6)
        assert crop[..., 2].mean() == pytest.approx(200 * (1 - red), abs=6)
    assert Looking("tiles", size)(np.zeros((0, 0, 0, 3), np.uint8)).crops.shape == (0, size, size, 3)


def logits(n: int) -> torch.Tensor:
    return 4 * torch.randn(n, 1000, generator=torch.Generator().manual_seed(0))


def test_one_look_per_picture_gives_its_logits() -> None:
    found = logits(3)
    assert torch.equal(Views(np.zeros((3, 8, 8, 3), np.uint8), (0, 1, 2), 3).evidence(found), found)


def test_several_looks_give_the_largest_log_probability_of_each_class() -> None:
    found, owners = logits(5), (0, 0, 1, 1, 1)
    evidence = Views(np.zeros((5, 8, 8, 3), np.uint8), owners, 2).evidence(found)
    apart = found.log_softmax(1)
    assert torch.allclose(evidence, torch.stack([apart[:2].amax(0), apart[2:].amax(0)]))
    assert evidence.max() <= 0 and float(evidence[0].exp().sum()) > 1  # it is no distribution
    found[:, 7] = -torch.inf  # an output that a small network lacks
    evidence = Views(np.zeros((5, 8, 8, 3), np.uint8), owners, 2).evidence(found.numpy())
    assert torch.isneginf(evidence[:, 7]).all() and not torch.isnan(evidence).any()
