"""The service with a separator that has no model: no bases, no network, two objects of its own."""

import io
import zipfile
from pathlib import Path

import httpx
import pytest
import soundfile

from tests.support.serving import PITCH, RATE, Bands, serving, tone, write_sound, write_video


@pytest.fixture
def client(tmp_path):
    with serving(tmp_path, "bands", load=lambda *_: Bands()) as server:
        yield server.client


def post(client: httpx.Client, path: Path, **fields: str) -> dict:
    with path.open("rb") as file:
        answer = client.post("/v1/separations", files={"file": file}, data=fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_any_separator_can_be_served(client, tmp_path):
    result = post(client, write_sound(tmp_path / "duet.wav"))["result"]
    assert [o["name"] for o in result["objects"]] == ["low", "high"]
    for entry, pitch in zip(result["objects"], PITCH, strict=True):  # the dog is the low one
        found, rate = soundfile.read(io.BytesIO(client.get(entry["audio"]["wav"]).content), dtype="float32")
        expected = tone(pitch, 6)
        assert rate == RATE and ((found - expected) ** 2).sum() < 0.1 * (expected**2).sum()
        assert entry["confidence"] == 1 and entry["familiarity"] is entry["visible"] is None


def test_without_bases_there_is_no_map_and_the_answer_says_why(client, tmp_path):
    job = post(client, write_sound(tmp_path / "duet.wav"), objects="low")
    result, base = job["result"], f"/v1/separations/{job['id']}"
    assert result["relation"] is result["bases"] is result["frame"] is None
    for tail in ("relation", "relation.png", "bases/0.wav"):
        answer = client.get(f"{base}/{tail}")
        assert answer.status_code == 404 and "no bases and no relation map" in answer.json()["detail"]
    names = zipfile.ZipFile(io.BytesIO(client.get(result["archive"]).content)).namelist()
    assert set(names) == {"low.wav", "_rest.wav", "_mixture.wav", "separation.json"}


def test_its_objects_are_the_model_s(client, tmp_path):
    model = client.get("/v1/model").json()
    assert model["objects"] == model["learned"] == ["low", "high"] and model["sample_rate"] == RATE
    assert model["labeller"] is model["n_bases"] is model["recipe"] is None
    assert [o["name"] for o in client.get("/v1/objects").json()] == ["low", "high"]
    sound = write_sound(tmp_path / "duet.wav")
    for fields, words in (({"objects": "dog"}, "the objects are low, high"), ({"bases": "own"}, "without bases")):
        with sound.open("rb") as file:
            answer = client.post("/v1/separations", files={"file": file}, data=fields)
        assert answer.status_code == 422 and words in answer.json()["detail"]


def test_a_video_s_pictures_do_not_hinder_it(client, tmp_path):
    assert post(client, write_video(tmp_path / "duet.mp4", 2.0))["status"] == "done"
