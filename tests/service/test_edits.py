"""Corrections by hand over HTTP: what then sounds, what is refused, and what becomes of the store."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from avsep import starter
from avsep.edits import Edits
from avsep.separation import Separator
from avsep.service import answers, editing, hotmodel, jobs, window
from avsep.service.config import ServiceConfig
from avsep.service.results import ResultStore
from avsep.service.window import KeptWindow
from tests.support import tones
from tests.support.serving import PITCH, RATE, Bands, Server, serving, tone, write_model, write_sound


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("media") / "duet.wav")


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    with serving(tmp_path_factory.mktemp("service"), model) as running:
        yield running


@pytest.fixture
def job(server: Server, sound: Path) -> dict:
    return server.post(sound, objects="dog,violin").json()


def patch(server: Server, job: dict, **edits: object) -> httpx.Response:
    return server.client.patch(f"/v1/separations/{job['id']}", json=edits)


def heard(server: Server, job: dict, name: str) -> np.ndarray:
    result = job["result"]
    audio = {o["name"]: o["audio"] for o in result["objects"]} | {
        "_rest": result["rest"],
        "_mixture": result["mixture"],
    }
    answer = server.client.get(audio[name]["wav"])
    assert answer.status_code == 200
    return soundfile.read(io.BytesIO(answer.content), dtype="float32")[0]


def refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert not [w for w in words if w not in answer.json()["detail"]], answer.text


def low_bases(server: Server, job: dict) -> list[int]:
    """The bases that the model gives to the dog."""
    relation = server.client.get(job["result"]["relation"]["data"]).json()
    row = relation["audible"].index("dog")
    return [b for b, share in zip(relation["basis"], relation["shares"][row], strict=True) if share > 0.5]


def test_moving_all_bases_of_an_object_moves_all_its_sound(server, job):
    dog, violin = heard(server, job, "dog"), heard(server, job, "violin")
    moves = [{"window": 0, "basis": m, "to": "violin"} for m in low_bases(server, job)]
    answer = patch(server, job, moves=moves)
    assert answer.status_code == 200, answer.text
    edited = answer.json()
    assert edited["id"] == job["id"] and edited["result"]["edited"]
    both = heard(server, edited, "violin")
    assert np.abs(heard(server, edited, "dog")).max() < 0.3 * np.abs(dog).max()  # what it has of other bases
    assert np.abs(both - dog - violin).max() < 0.1
    assert low_bases(server, edited) == []
    every = patch(server, job, moves=[{"basis": m, "to": "violin"} for m in range(6)]).json()
    assert {o["name"]: o["silent"] for o in every["result"]["objects"]} == {"dog": True, "violin": False}
    relation = server.client.get(every["result"]["relation"]["data"]).json()
    assert relation["audible"] == ["violin", "_rest"]
    again = patch(server, job)  # no edits: the first sounds, bit for bit
    assert not again.json()["result"]["edited"]
    assert again.json()["result"] == job["result"]
    assert np.array_equal(heard(server, again.json(), "dog"), dog)


def test_an_edit_sounds_alike_after_others_bit_for_bit(server, job):
    moves = ([{"basis": 0, "to": "violin"}], [{"basis": 1, "to": "dog"}, {"basis": 2, "to": "cat"}])
    first, other, again = (heard(server, patch(server, job, moves=m).json(), "dog") for m in (*moves, moves[0]))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_edited_sounds_add_up_and_come_in_every_format(server, job):
    first = server.client.get(job["result"]["objects"][0]["audio"]["flac"]).content
    spans = [{"start_s": 1, "end_s": 3, "object": "dog", "present": False}]
    edited = patch(server, job, add=["cat"], spans=spans).json()
    names = [o["name"] for o in edited["result"]["objects"]]
    assert names == ["dog", "violin", "cat"] and edited["result"]["objects"][2]["found"] == "given"
    assert all(0 <= o["familiarity"] <= 1 for o in edited["result"]["objects"])
    total = sum(heard(server, edited, name) for name in (*names, "_rest"))
    assert np.abs(total - heard(server, edited, "_mixture")).max() < 1e-5
    dog = heard(server, edited, "dog")
    assert np.abs(dog[int(1.1 * RATE) : int(2.9 * RATE)]).max() < 1e-6 < 0.05 < np.abs(dog[4 * RATE :]).max()
    flac = server.client.get(edited["result"]["objects"][0]["audio"]["flac"])
    assert flac.status_code == 200 and flac.content != first
    archive = server.client.get(edited["result"]["archive"]).content
    assert b"edits.json" in archive and b"cat.wav" in archive
    assert server.client.get(edited["result"]["relation"]["png"]).status_code == 200
    answers.Job.model_validate(edited)


def test_an_added_object_that_was_never_learned_says_so(tmp_path, sound):
    model = write_model(tmp_path / "model", clips_by_label={"dog": 12, "violin": 30}, clips=40)
    with serving(tmp_path / "service", model) as running:
        job = running.post(sound, objects="dog,violin").json()
        objects = patch(running, job, add=["cat"]).json()["result"]["objects"]
    assert {o["name"]: o["learned"] for o in objects} == {"dog": True, "violin": True, "cat": False}


def test_edits_can_be_downloaded_and_used_again(server, job, sound):
    patch(server, job, moves=[{"basis": 2, "to": "_rest"}], remove=["dogs"])
    answer = server.client.get(job["result"]["edits"])
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    edits = Edits.from_json(answer.content)
    assert edits.remove == ("dog",) and edits.duration_s == pytest.approx(6, abs=0.1)
    other = server.post(sound, objects="dog,violin").json()
    again = server.client.patch(f"/v1/separations/{other['id']}", content=answer.content)
    assert again.status_code == 200 and [o["name"] for o in again.json()["result"]["objects"]] == ["violin"]
    for name in ("violin", "_rest"):
        assert np.array_equal(
            heard(server, again.json(), name), heard(server, job | {"result": again.json()["result"]}, name)
        )


def test_edits_that_cannot_be_are_refused_in_a_line_and_change_nothing(server, job):
    before = server.client.get(f"/v1/separations/{job['id']}").json()
    refused(patch(server, job, moves=[{"basis": 99, "to": "dog"}]), 422, "basis 99 of window 0", "there are 6 bases")
    refused(patch(server, job, moves=[{"window": 7, "basis": 0, "to": "dog"}]), 422, "window 7")
    refused(patch(server, job, add=["unicorn"]), 422, "unknown object 'unicorn'")
    refused(patch(server, job, remove=["cat"]), 422, "cat, which isn't in this separation; it has dog, violin")
    refused(patch(server, job, objects=[]), 422, "there are moves, add, remove, spans, duration_s")
    refused(patch(server, job, duration_s=60), 422, "60.00 s", "6.00 s")
    path = f"/v1/separations/{job['id']}"
    refused(server.client.patch(path, content=b"[1"), 422, "no JSON")
    refused(server.client.patch(path, content=b"\xff"), 422, "no JSON")
    refused(server.client.patch(path, content=b"[" * 100_000), 422, "no JSON")
    refused(server.client.patch(path, content=b" " * (1 << 21)), 413, "1048576 bytes")
    refused(server.client.patch(f"/v1/separations/{'0' * 32}", json={}), 404, "expired")
    refused(server.client.patch("/v1/separations/x", json={}), 404, "expired")
    refused(server.client.get(f"/v1/separations/{'0' * 32}/edits"), 404, "expired")
    refused(server.client.patch(path, json={}, headers={"Sec-Fetch-Site": "cross-site"}), 403, "other sites")
    assert server.client.get(path).json() == before


def test_a_stereo_file_of_another_rate_stays_so_when_edited(server, tmp_path):
    """The dog left, the violin right: what is moved changes channels with its sound, and all still adds up."""
    rate = 2 * RATE
    left, right = (np.repeat(tone(name, 6), 2) for name in ("dog", "violin"))
    soundfile.write(tmp_path / "wide.wav", np.stack([left, right], 1), rate, subtype="FLOAT")
    job = server.post(tmp_path / "wide.wav", objects="dog,violin").json()
    assert (job["result"]["channels"], job["result"]["sample_rate"]) == (2, rate)
    before = heard(server, job, "violin")
    moves = [{"window": 0, "basis": m, "to": "violin"} for m in low_bases(server, job)]
    edited = patch(server, job, moves=moves).json()
    sounds = [heard(server, edited, name) for name in ("dog", "violin", "_rest")]
    mixture = heard(server, edited, "_mixture")
    assert mixture.shape == before.shape == sounds[1].shape
    assert np.abs(sum(sounds) - mixture).max() < 1e-3 * np.sqrt(np.mean(mixture**2))
    level = lambda x: np.sqrt(np.mean(x[:, 0] ** 2))  # noqa: E731
    assert level(before) < 0.3 * level(mixture) < level(sounds[1])
    mixed = server.client.get(edited["result"]["mix"]["sound"] + "?gains=dog:0,_rest:0")
    assert np.allclose(soundfile.read(io.BytesIO(mixed.content))[0], sounds[1], atol=1e-6)  # of the edited sounds


def test_edits_made_at_once_leave_one_result_and_two_folders_at_most(server, job):
    bodies = [{"moves": [{"basis": m, "to": "_rest"}]} for m in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda body: patch(server, job, **body), bodies))
    assert [a.status_code for a in done] == [200] * 6
    folder = server.service.store.path(job["id"])
    assert len(list(folder.glob("edited.*"))) <= 2
    made = server.client.get(job["result"]["edits"]).json()["moves"]
    assert len(made) == 1


def test_a_separator_without_bases_and_a_busy_or_full_service_refuse(tmp_path, model, sound):
    with serving(tmp_path / "bands", model, load=lambda *_: Bands()) as bands:
        job = bands.post(sound).json()
        assert job["result"]["edits"] is None
        refused(patch(bands, job), 409, "can't be edited")
    with serving(tmp_path / "full", model, results_bytes=1_300_000, token="secret") as full:
        refused(full.client.patch(f"/v1/separations/{'0' * 32}", json={}), 401, "token")
        full.client.headers["Authorization"] = "Bearer secret"
        job = full.post(sound, objects="dog,violin").json()
        before = heard(full, job, "dog")
        refused(patch(full, job, remove=["violin"], add=["cat", "car", "harp"]), 507, "no room")
        assert np.array_equal(heard(full, job, "dog"), before)  # nothing of it made room for itself
        full.service.working = full.config.max_pending
        refused(patch(full, job, remove=["dog"]), 503, "in progress")


def test_a_job_deleted_while_it_is_edited_is_gone(server, job):
    server.client.delete(f"/v1/separations/{job['id']}")
    refused(patch(server, job, remove=["dog"]), 404, "expired")
    assert job["id"] not in [p.name for p in server.folders()]


@pytest.mark.parametrize("seconds", [0.05, 1.0, 2.9, 3.1, 13.0])
@pytest.mark.parametrize("name", ["tones", "starter"])
def test_room_is_kept_for_the_bases_of_short_and_long_sounds(tmp_path, name, seconds):
    """Of a short sound they take more than it does: each basis has its spectrum, however short."""
    if name == "tones":
        separator = Separator(tones.model(n_factorizations=2))
    elif seconds > 3:
        pytest.skip("the small one shows it")
    else:
        separator = Separator.load()
    config, rate = separator.model.config, separator.sample_rate
    sound = np.random.default_rng(0).normal(0, 0.1, round(rate * seconds)).astype(np.float32)
    plan = separator.plan([sound], ["dog", "violin"])
    assert editing.keep(plan, tmp_path)
    n_bytes, most = (tmp_path / "bases.zip").stat().st_size, editing.most_bytes(config, seconds, 2)
    assert n_bytes <= most <= 1.5 * n_bytes + 15_000  # nothing is left to the rest, which might have bases, too
    found = KeptWindow.of(plan, sound[: plan.explanation.n_samples])
    assert found is not None
    found.write(tmp_path)
    n_bytes, most = (tmp_path / "window.npz").stat().st_size, window.most_bytes(config, seconds, 2)
    assert n_bytes <= most <= 1.2 * n_bytes + 12_000


def test_what_is_kept_is_replaced_whole(tmp_path):
    """By a worker that was thought dead, under whoever corrects what another one made."""
    sound = (tones.tone(tones.DOG, 3.0) + tones.tone(tones.VIOLIN, 3.0)).numpy()
    plan = Separator(tones.model()).plan([sound], ["dog", "violin"])
    files = [tmp_path / "bases.zip", tmp_path / "window.npz"]
    numbers = []
    for _ in range(2):
        editing.keep(plan, tmp_path)
        KeptWindow.of(plan, sound[: plan.explanation.n_samples]).write(tmp_path)
        numbers.append([f.stat().st_ino for f in files])
        held = [f.open("rb") for f in files]  # so that no number is used again
    assert not set(numbers[0]) & set(numbers[1]) and sorted(tmp_path.iterdir()) == files
    for f in held:
        f.close()


def test_a_short_sound_never_takes_more_than_was_kept_for_it(tmp_path):
    store = ResultStore(tmp_path)
    job_id = store.create()
    sound = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    soundfile.write(store.path(job_id) / "upload", sound, 48_000, format="WAV", subtype="FLOAT")
    jobs.measure(ServiceConfig(starter.PATH, str(tmp_path)), store, job_id)
    jobs.reserve(store, job_id, 4, hotmodel.model_card(starter.PATH), False)
    plan = Separator.load().plan([sound], ["dog", "violin"])
    editing.keep(plan, store.path(job_id))
    KeptWindow.of(plan, sound).write(store.path(job_id))
    kept = sum(p.stat().st_size for p in store.path(job_id).iterdir())
    assert kept + 4 * 4 * 48_000 < store.job(job_id).reserved


def test_tones_are_told_apart_in_these_tests(server, job):
    for name in PITCH:
        found, true = heard(server, job, name), tone(name, 6)
        assert np.corrcoef(found[: len(true)], true[: len(found)])[0, 1] > 0.95
    assert json.loads(server.client.get(job["result"]["edits"]).content)["moves"] == []
