"""Where objects are, as the service answers it."""

import base64
import io
import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avsep.service.device import Device
from avsep.service.elsewhere import OtherNetwork
from avsep.service.jobs import JobWorker
from avsep.service.results import UPLOAD
from avsep.videos import VideoSeparator
from tests.support.planted import BOXES, COLOURS
from tests.support.serving import Server, write_sound


@pytest.fixture(scope="module")
def result(planted: Server, painted: Path) -> dict:
    return planted.post(painted).json()["result"]


def picture(server: Server, url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.client.get(url).content)).convert("RGB")).astype(int)


def test_each_object_has_its_boxes(result):
    objects = {o["name"]: o for o in result["objects"]}
    assert objects.keys() == set(COLOURS)
    assert objects["cat"]["silent"] and objects["cat"]["visible"]
    for name, box in BOXES.items():
        found = objects[name]["boxes"]
        assert [b["time_s"] for b in found] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
        np.testing.assert_allclose([b["box"] for b in found], [box] * 6, atol=0.16)


def test_maps_are_small_and_peak_where_the_objects_are(planted, result):
    answer = planted.client.get(result["locations"])
    body = answer.json()
    n, shape = len(body["times_s"]), (body["height"], body["width"])
    maps = np.frombuffer(base64.b64decode(body["maps"]), np.uint8).reshape(n, len(body["objects"]), *shape)
    assert n == 6 and 0 <= body["frame"] < n and len(answer.content) < 20_000
    for row, name in enumerate(body["objects"]):
        left, top, right, bottom = BOXES[name]
        for cells in maps[:, row]:
            y, x = (np.array(np.unravel_index(cells.argmax(), shape)) + 0.5) / shape
            assert left - 0.05 < x < right + 0.05 and top - 0.05 < y < bottom + 0.05, name


def test_the_picture_shows_where_the_objects_are(planted, result):
    marked, plain = (picture(planted, result["frame"] + query) for query in ("", "?marked=false"))
    assert plain.shape == (320, 427, 3) and marked.shape[1] >= 480
    large = np.asarray(Image.fromarray(plain.astype(np.uint8)).resize(marked.shape[1::-1])).astype(int)
    changed = (np.abs(marked - large).sum(-1) > 150).mean()
    assert 0.01 < changed < 0.2
    assert picture(planted, result["relation"]["png"]).shape[1] > 800
    assert planted.client.get(result["frame"] + "?marked=perhaps").status_code == 422


def test_of_sound_alone_nothing_is_known(planted, tmp_path):
    result = planted.post(write_sound(tmp_path / "duet.wav")).json()["result"]
    assert result["locations"] is None and {json.dumps(o["boxes"]) for o in result["objects"]} == {"null"}
    answer = planted.client.get(result["rest"]["wav"].split("/tracks")[0] + "/locations")
    assert answer.status_code == 404 and "isn't known where" in answer.json()["detail"]


def test_a_device_that_looks_for_others_says_where_objects_are_too(planted):
    """Requests in one batch get each its own; one for another vocabulary or network is refused."""
    files = VideoSeparator.load(planted.config.model)
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (1, 3))
    device = Device(planted.config)
    one, other, two = device.label([(first, files.sees), (first, "another/one"), (second, files.sees)])
    assert isinstance(other, OtherNetwork)
    for pictures, found in ((first, one), (second, two)):
        assert not isinstance(found, Exception)
        logits, cells = files.labeller.see(pictures, files.labels.groups)
        torch.testing.assert_close((found.logits, found.cells), (logits, cells))


def test_maps_that_a_device_made_are_the_same(planted, painted, result):
    """What is looked at elsewhere gives the boxes that the service's own worker gives."""
    device = Device(planted.config)

    def label(pictures: np.ndarray, sees: str) -> Future:
        future: Future = Future()
        future.set_result(device.label([(pictures, sees)])[0])
        return future

    worker = JobWorker(planted.config, label=label)
    job_id = worker.store.create()
    (worker.store.path(job_id) / UPLOAD).write_bytes(painted.read_bytes())
    worker.store.update(job_id, status="queued")
    worker(job_id)
    job = worker.store.job(job_id)
    assert job.result is not None and job.result.located
    boxes = {o["name"]: [b["box"] for b in o["boxes"]] for o in result["objects"]}
    assert {o.name: [list(b.box) for b in o.boxes or ()] for o in job.result.objects} == boxes
    worker.store.delete(job_id)
