import io
import json
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from avsep import cli, commands, looks, plots
from avsep.locating import Locations, box_of, ending_of, grid, object_cells, whole_maps
from avsep.objects import AUDIOSET_23
from avsep.stages import Label
from avsep.videos import VideoSeparator
from avsep.vision import NETWORKS, ImageLabeller, ImageNetwork, LabellerUnavailable, build_network
from tests.support.planted import COLOURS, add_labeller, grey, paint, planted_labeller, write_painted
from tests.support.serving import write_model

DOG, VIOLIN, CAT = (AUDIOSET_23.index(name) for name in COLOURS)


def peak(cells: np.ndarray) -> tuple[float, float]:
    """Where a map has its maximum, as fractions of height and width."""
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    return (row + 0.5) / cells.shape[0], (column + 0.5) / cells.shape[1]


@pytest.mark.parametrize("way", looks.WAYS)
@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (240, 700)])
def test_a_map_peaks_where_its_object_was_planted(way: str, height: int, width: int) -> None:
    """In the published look within the middle of the picture, which is all that it shows."""
    images = grey(height, width, 3)
    reach = 0.9 * min(1.0, height / width) / 2 if way == "centre" else 0.45  # of the middle
    places = {"dog": (0.5 - reach, 0.3), "violin": (0.5 + 0.6 * reach, 0.6)}
    for name, (left, top) in places.items():
        paint(images, name, (left, top, left + 0.12, top + 0.12))
    maps = planted_labeller().locate(images, way=way)
    assert maps.shape == (3, 23, *grid(height, width)) and maps.min() >= 0 and maps.max() <= 1
    for picture in maps:
        for name, (left, top) in places.items():
            row, column = peak(picture[AUDIOSET_23.index(name)])
            assert left - 0.07 <= column <= left + 0.19 and top - 0.07 <= row <= top + 0.19, name


def test_a_maps_maximum_is_the_objects_probability_and_what_is_absent_is_nowhere() -> None:
    images = grey(240, 320)
    paint(images, "dog", (0.1, 0.1, 0.5, 0.6))
    labeller = planted_labeller()
    evidence, maps = labeller.labels_and_maps(images, "tiles", AUDIOSET_23.imagenet_classes())
    assert maps is not None
    scores = AUDIOSET_23.scores(evidence, joined=True)
    torch.testing.assert_close(maps.amax((0, 2, 3))[[DOG, VIOLIN, CAT]], scores[[DOG, VIOLIN, CAT]])
    assert scores[DOG] > 0.9 and maps[:, VIOLIN].max() < 0.1
    others = [i for i in range(23) if i not in (DOG, VIOLIN, CAT)]
    assert maps[:, others].max() == 0  # the network has no classes of theirs


def test_labels_are_the_same_with_maps_as_without() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8)
    torch.manual_seed(0)
    labeller = ImageLabeller("efficientnet_lite0", build_network("efficientnet_lite0", 1000).eval(), "")
    views = labeller.looking("tiles")(images)
    seen = labeller.see(views.crops[:4], AUDIOSET_23.imagenet_classes())
    torch.testing.assert_close(seen.logits, labeller(views.crops[:4]))
    assert seen.cells is not None and seen.cells.shape == (4, 23, 7, 7)


@pytest.mark.parametrize("certainty", [0.0, 4.0, 9.0])
def test_an_objects_log_odds_are_the_mean_of_their_map(certainty: float) -> None:
    """Against autograd: the map's weights are the gradient of the object's log-odds by the pooled features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 5, 3, 4, generator=generator)
    last = nn.Linear(5, 7)
    group = [1, 4]
    with torch.no_grad():
        last.bias[group] += certainty
    pooled = features.mean((2, 3)).requires_grad_()
    logits = last(pooled)
    p = logits.softmax(-1)
    share = p[:, group].sum(-1)
    odds = share.log() - (1 - share).log()
    (gradient,) = torch.autograd.grad(odds.sum(), pooled)
    evidence = torch.einsum("nd,ndhw->nhw", gradient, features)
    cells = (evidence - evidence.mean((1, 2), keepdim=True) + odds[:, None, None]).sigmoid()
    expected = share[:, None, None] * cells / cells.amax((1, 2), keepdim=True)
    found = object_cells(features, logits, last.weight, [group, []])
    torch.testing.assert_close(found[:, 0], expected.detach())
    assert found[:, 1].max() == 0


@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2", "efficientnet_b0", "efficientnet_lite2"]
)
def test_the_end_of_a_network_is_found(name: str) -> None:
    network = build_network(name, 6).eval()
    ending = ending_of(network)
    assert ending is not None
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        logits, maps = ending.watch(network, x)
        torch.testing.assert_close(ending.last(maps.mean((2, 3))), logits)
        assert maps.shape[2:] == (3, 3) and not ending.maps._forward_hooks


class Blunt(nn.Sequential):
    """A network that takes maxima in place of means."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(12, n_outputs))


@pytest.mark.parametrize("name", ["blunt", "squeezenet1_1", "mobilenet_v3_small"])
def test_a_network_that_ends_otherwise_labels_without_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "blunt", ImageNetwork(Blunt))
    labeller = ImageLabeller(name, build_network(name, 1000).eval(), "")
    images = grey(64, 64)
    evidence, maps = labeller.labels_and_maps(images, "centre", AUDIOSET_23.imagenet_classes())
    assert evidence.shape == (1, 1000) and maps is None
    with pytest.raises(LabellerUnavailable, match=f"{name} can't say where objects are: .*efficientnet_lite2"):
        labeller.locate(images)


def test_without_pictures_there_are_no_maps() -> None:
    assert planted_labeller().locate(np.zeros((0, 0, 0, 3), np.uint8)).shape[:2] == (0, 23)


def test_a_picture_borrows_from_others_of_its_scene_alone() -> None:
    """Eight pictures have all tiles together; behind a cut nothing of the dog is left."""
    before = grey(240, 320, 8)
    paint(before, "dog", (0.1, 0.1, 0.4, 0.5))
    after = grey(240, 320, 8) + 120
    maps = planted_labeller().locate(np.concatenate([before, after]))[:, DOG]
    assert all(np.hypot(*np.subtract(peak(m), (0.3, 0.25))) < 0.2 for m in maps[:8])
    assert maps[:8].max((1, 2)).min() > 0.2 and maps[8:].max() < 0.05


def test_views_lie_where_they_were_cut() -> None:
    """Of views that say how far down and right each of their cells is in the whole, the map says that, too."""
    images = grey(240, 320)
    views = looks.Looking("tiles", 32)(images)
    cells = torch.zeros(len(views.boxes), 2, 16, 16)
    at = (torch.arange(16) + 0.5) / 16
    for i, (x, y, w, h) in enumerate(views.boxes):
        cells[i, 0] = (y + h * at)[:, None]
        cells[i, 1] = x + w * at
    maps = whole_maps(images, views, cells)[0]
    rows, columns = maps.shape[1:]
    down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    torch.testing.assert_close(
        maps[0] / maps[0].max(), (down / down.max())[:, None].expand(rows, columns), atol=0.03, rtol=0
    )
    torch.testing.assert_close(
        maps[1] / maps[1].max(), (across / across.max()).expand(rows, columns), atol=0.03, rtol=0
    )


def test_boxes_are_around_what_is_joined_to_the_maximum() -> None:
    maps = torch.zeros(2, 3, 4, 8)
    maps[0, 1, 1:3, 2:5] = 0.9
    maps[0, 1, 0, 7] = 0.8  # another one, apart
    maps[1, 2] = 0.005
    found = Locations.of(["b", "c"], ["a", "b", "c"], [0.5, 1.5], maps)
    assert (
        found.boxes("b") == [{"time_s": 0.5, "box": [0.25, 0.25, 0.625, 0.75]}]
        and found.surest("b") == found.boxes("b")[0]
    )
    assert found.boxes("c") == [] and found.surest("c") is None
    assert found.best() == 0 and found.marks(0) == {"b": (0.25, 0.25, 0.625, 0.75)} and found.marks(1) == {}
    assert box_of(np.eye(3)[:1]) == (0.0, 0.0, round(1 / 3, 3), 1.0)


def test_boxes_are_drawn_into_the_picture() -> None:
    picture = grey(120, 160)[0]
    plain, marked = (
        np.asarray(Image.open(io.BytesIO(plots.located(picture, marks))).convert("RGB")).astype(int)
        for marks in ({}, {"dog": (0.25, 0.25, 0.5, 0.75)})
    )
    changed = np.abs(plain - marked).sum(-1) > 60
    rows, columns = np.nonzero(changed)
    assert plain.shape == (360, 480, 3)
    np.testing.assert_allclose([columns.min(), columns.max(), rows.min(), rows.max()], [120, 240, 90, 270], atol=4)
    assert not changed[200:250, 140:220].any()  # within the box, below the name, is the picture


def test_files_say_where_their_objects_are(tmp_path, capsys) -> None:
    model = write_model(tmp_path / "model")
    add_labeller(model)
    box = (0.05, 0.2, 0.35, 0.7)
    video = write_painted(tmp_path / "duet.mp4", {"dog": box, "violin": (0.6, 0.3, 0.95, 0.8)})
    report = commands.separate_file(str(video), model, str(tmp_path / "out"), None, None)
    assert json.loads((tmp_path / "out/separation.json").read_text())["objects"] == report["objects"]
    dog = next(o for o in report["objects"] if o["name"] == "dog")
    assert [b["time_s"] for b in dog["boxes"]] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    np.testing.assert_allclose([b["box"] for b in dog["boxes"]], [box] * 6, atol=0.15)
    assert cli.main(["label", str(video), "--model", model]) == 0
    said = capsys.readouterr().out
    assert "pictures: planted" in said
    assert sorted(line.split("  ")[1] for line in said.splitlines() if "(label)  [0." in line) == ["dog", "violin"]


def test_logits_alone_from_elsewhere_are_no_reason_to_say_that_the_network_cannot(tmp_path) -> None:
    model = write_model(tmp_path / "model")
    add_labeller(model)
    video = write_painted(tmp_path / "solo.mp4", {"dog": (0.1, 0.1, 0.4, 0.4)}, 2.0)
    files = VideoSeparator.load(model)
    network = files.labeller
    assert isinstance(network, ImageLabeller)

    def classify(images: np.ndarray) -> Future:
        future: Future = Future()
        future.set_result(network.see(images))
        return future

    files = files.elsewhere(Label(network.looking(files.config.extraction.looks), classify), None)
    report = files(video, tmp_path / "out", ["dog"]).report
    assert report["objects"][0]["boxes"] is None and "can't say where" not in report["note"]


def test_where_the_network_cannot_say_it_is_told(tmp_path, capsys, monkeypatch) -> None:
    model = write_model(tmp_path / "model")
    monkeypatch.setitem(NETWORKS, "blunt", ImageNetwork(Blunt))
    ImageLabeller("blunt", Blunt(1000).eval(), "").save(tmp_path / "blunt.safetensors")
    video = write_painted(tmp_path / "solo.mp4", {"dog": (0.1, 0.1, 0.4, 0.4)}, 2.0)
    weights = str(tmp_path / "blunt.safetensors")
    report = commands.separate_file(str(video), model, str(tmp_path / "out"), ["dog"], weights)
    assert report["objects"][0]["boxes"] is None and "blunt can't say where objects are" in report["note"]
    assert cli.main(["label", str(video), "--weights", weights]) == 0
    assert "note: blunt can't say where" in capsys.readouterr().out
