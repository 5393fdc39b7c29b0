"""The service's API on a real port, without Ray: answers, limits, faults."""

import asyncio
import contextlib
import errno
import http.server
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch

from avsep import media, vision
from avsep.dictionary import BasisDictionary
from avsep.factors import ExtractionConfig, factorize
from avsep.model import LABELLER_FILE
from avsep.records import ClipError, Reason
from avsep.separation import Separator
from avsep.service import answers, jobs, service
from avsep.service.config import ServiceConfig
from avsep.service.device import Device, Together, each
from avsep.service.elsewhere import OtherNetwork
from avsep.service.failures import as_failure
from avsep.service.jobs import JobWorker, fail
from avsep.service.requests import describe
from avsep.service.results import NoSuchJob, ResultStore, StoreFull
from avsep.service.state import Failure
from avsep.service.uploads import BadUpload, download, public_addresses
from tests.support.serving import (
    PITCH,
    RATE,
    Server,
    half_an_upload,
    serving,
    tone,
    wait,
    waiting_client,
    working,
    write_model,
    write_sound,
    write_video,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("slow"), n_iter=8000)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "duet.mp4")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("media") / "duet.wav")


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    limits = {"max_upload_bytes": 2_000_000, "max_duration_s": 30.0, "max_pixels": 640 * 480}
    with serving(tmp_path_factory.mktemp("service"), model, **limits) as running:
        yield running


def get_sound(server: Server, url: str) -> np.ndarray:
    answer = server.client.get(url)
    assert answer.status_code == 200
    samples, rate = soundfile.read(io.BytesIO(answer.content), dtype="float32")
    assert rate == RATE
    return samples


def check_problem(answer: httpx.Response, status: int, *words: str) -> dict:
    """An answer that says what is wrong, in the one form that all have, and nothing of the server."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["title"] and body["detail"]
    assert not [w for w in words if w not in body["detail"]], body["detail"]
    assert "/tmp" not in answer.text and "Traceback" not in answer.text
    assert status not in (429, 503, 507) or int(answer.headers["retry-after"]) > 0
    return body


# ------------------------------------------------------------------------------------ results


def test_a_videos_objects_come_back_and_add_up(server, video):
    answer = server.post(video, objects="dog,violin")
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/separations/{job['id']}"
    assert len(job["id"]) == 32 and job["status"] == "done"
    result = job["result"]
    assert [o["name"] for o in result["objects"]] == ["dog", "violin"]
    assert result["duration_s"] == pytest.approx(6, abs=0.1)
    for entry in result["objects"]:
        found = get_sound(server, entry["audio"]["wav"])
        expected = tone(entry["name"], 6)[: len(found)]
        error = found[: len(expected)] - expected
        assert (error**2).sum() < 0.1 * (expected**2).sum()  # 10 dB
        assert (entry["found"], entry["silent"], entry["visible"]) == ("given", False, False)
    tracks = [o["audio"]["wav"] for o in result["objects"]] + [result["rest"]["wav"]]
    whole = get_sound(server, result["mixture"]["wav"])
    assert np.abs(sum(get_sound(server, t) for t in tracks) - whole).max() < 1e-5
    assert np.abs(get_sound(server, result["mixture"]["flac"]) - whole).max() < 1e-6
    assert set(result["timings"]) >= {"queued_s", "decode_s", "listen_s", "separate_s", "total_s"}
    assert server.client.get(answer.headers["location"]).json() == job


def test_the_relation_map_and_each_basis_alone(server, sound):
    result = server.post(sound, objects="dog,violin").json()["result"]
    base = result["relation"]["data"].removesuffix("/relation")
    relation = server.client.get(result["relation"]["data"]).json()
    posteriors, shares = np.array(relation["posteriors"]), np.array(relation["shares"])
    assert posteriors.shape == (24, 6) and relation["objects"][-1] == "noise"
    assert posteriors.sum(0) == pytest.approx(1, abs=0.01) and shares.sum(0) == pytest.approx(1, abs=0.01)
    assert relation["energy"] == sorted(relation["energy"], reverse=True)
    bases = [get_sound(server, f"{base}/bases/{m}.wav") for m in sorted(relation["basis"])]
    whole = get_sound(server, result["mixture"]["wav"])
    assert np.abs(sum(bases) - whole[: len(bases[0])]).max() < 6 * 2**-15  # 16 bits each
    # the loudest basis is one object's: nearly all of it lies at that object's pitch
    best = relation["objects"][int(posteriors[:, 0].argmax())]
    spectrum = np.abs(np.fft.rfft(bases[relation["basis"][0]]))
    loudest = np.argmax(spectrum) * RATE / len(bases[0])
    assert abs(loudest - PITCH[best]) < 20
    assert server.client.get(result["relation"]["png"]).content.startswith(b"\x89PNG")
    check_problem(server.client.get(f"{base}/bases/6.wav"), 404)
    check_problem(server.client.get(f"{base}/bases/-1.wav"), 404)
    check_problem(server.client.get(f"{base}/frame.png"), 404)  # sound has none
    check_problem(server.client.get(f"{base}/tracks/cat.wav"), 404, "dog")


def test_a_client_that_does_not_wait_asks_again(server, video):
    answer = server.post(video, {"Prefer": "respond-async"})
    assert answer.status_code == 202
    url = answer.headers["location"]
    wait(lambda: server.client.get(url).json()["status"] == "done")
    result = server.client.get(url).json()["result"]
    assert result["objects_from"] in ("pictures", "sound")  # of test bars a picture network sees nothing for certain
    assert {o["name"] for o in result["objects"] if not o["silent"]} == {"dog", "violin"}
    assert server.client.get(result["frame"]).content.startswith(b"\x89PNG")
    assert server.client.delete(url).status_code == 204
    for method in ("GET", "DELETE"):
        check_problem(server.client.request(method, url), 404)
    check_problem(server.client.get(result["rest"]["wav"]), 404)


def test_what_is_odd_about_a_file_is_told(server, video, tmp_path):
    odd = tmp_path / "odd.mkv"
    ffmpeg = [media.ffmpeg_executable(), "-y", "-loglevel", "error", "-i", str(video)]
    opposite = ["-af", "pan=stereo|c0=c0|c1=-1*c0", "-c:a", "flac", "-c:v", "copy", str(odd)]
    subprocess.run([*ffmpeg, *opposite], check=True)
    result = server.post(odd, objects="Dogs, Fiddle").json()["result"]
    assert [o["name"] for o in result["objects"]] == ["dog", "violin"]
    note = result["note"]
    assert "left and right cancel each other" in note and "picture network" not in note


def test_an_archive_holds_everything(server, sound):
    answer = server.post(sound, {"Accept": "application/zip"}, objects="dog")
    assert (answer.status_code, answer.headers["content-type"]) == (201, "application/zip")
    again = server.client.get(answer.headers["location"], headers={"Accept": "application/zip"})
    for content in (answer.content, again.content):
        archive = zipfile.ZipFile(io.BytesIO(content))
        assert archive.testzip() is None
        assert set(archive.namelist()) == {
            "dog.wav", "_rest.wav", "_mixture.wav", "relation_map.png", "separation.json",
        }  # fmt: skip
        assert json.loads(archive.read("separation.json"))["status"] == "done"
    check_problem(server.post(sound, {"Accept": "text/html"}), 406)


def test_a_small_format_for_listening_is_as_long_and_nearly_the_same(server, tmp_path):
    result = server.post(write_sound(tmp_path / "long.wav", 25.0), objects="dog").json()["result"]
    whole, small = (get_sound(server, result["mixture"][kind]) for kind in ("wav", "ogg"))
    assert len(whole) == len(small)
    assert ((whole - small) ** 2).mean() < 0.05 * (whole**2).mean()
    sizes = {k: len(server.client.get(result["mixture"][k]).content) for k in ("flac", "ogg")}
    assert sizes["ogg"] < 0.5 * sizes["flac"]  # of two pure tones, which FLAC likes


def test_finished_sounds_can_be_had_from_a_full_disk(server, sound):
    result = server.post(sound, objects="dog").json()["result"]
    with largest_file(5_000):
        for kind in ("flac", "ogg"):
            assert len(get_sound(server, result["rest"][kind])) == round(result["duration_s"] * RATE)


def test_sounds_can_be_fetched_in_parts(server, sound):
    url = server.post(sound, objects="dog").json()["result"]["rest"]["wav"]
    part = server.client.get(url, headers={"Range": "bytes=4-11"})
    assert part.status_code == 206 and part.content == server.client.get(url).content[4:12]


def test_long_sounds_are_done_in_windows(server, tmp_path):
    job = server.post(write_sound(tmp_path / "long.wav", 29.0), objects="dog,violin").json()
    assert job["result"]["duration_s"] == pytest.approx(29)
    windows = job["result"]["windows"]
    assert windows[0]["start_s"] == 0 and windows[-1]["end_s"] == pytest.approx(29)
    assert all(set(w["heard"]) == {"dog", "violin"} for w in windows)
    dog = get_sound(server, job["result"]["objects"][0]["audio"]["wav"])
    assert ((dog - tone("dog", 29)) ** 2).sum() < 0.1 * (tone("dog", 29) ** 2).sum()


def test_learned_bases_where_there_are_some(tmp_path, sound):
    model = write_model(tmp_path / "model")
    W = np.zeros((201, 1), np.float32)
    W[9:12] = 1
    import torch

    BasisDictionary({"dog": torch.from_numpy(W)}).save(str(tmp_path / "model" / "dictionary.safetensors"))
    with serving(tmp_path, model) as server:
        for bases in ("own", "learned", "both"):
            job = server.post(sound, objects="dog,violin", bases=bases).json()
            assert job["result"]["bases"] == bases


def test_what_the_service_says_of_itself(server):
    assert server.client.get("/healthz").json()["status"] == "ok"
    assert {"name": "dog"}.items() <= server.client.get("/v1/objects").json()[1].items()
    model = server.client.get("/v1/model").json()
    assert model["recipe"] == "tones" and model["limits"]["max_upload_bytes"] == 2_000_000
    assert "/tmp" not in json.dumps(model)
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/separations", "/v1/separations/{job_id}", "/v1/objects", "/v1/model", "/healthz"} <= set(paths)
    text = server.client.get("/metrics").text
    for name in ("avsep_requests_total", "avsep_request_seconds_bucket", "avsep_pending", "avsep_stored_bytes"):
        assert name in text


def test_the_picture_network_in_use_is_named(tmp_path):
    """The model is configured with another one than the one that it carries."""
    folder = tmp_path / "model"
    write_model(folder)
    network = vision.build_network("shufflenet_v2_x0_5", 2).eval()
    vision.ImageLabeller("shufflenet_v2_x0_5", network, "", (0, 1)).save(folder / LABELLER_FILE)
    with serving(tmp_path, str(folder)) as server:
        assert server.client.get("/v1/model").json()["labeller"] == "shufflenet_v2_x0_5"


def described(server):
    """The model as the service describes it, but for the disk's room, which changes by itself."""
    card = server.client.get("/v1/model").json()
    return {**card, "limits": {k: v for k, v in card["limits"].items() if k != "free_bytes"}}


def test_the_model_stays_described_while_another_is_written(tmp_path, model):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    with serving(tmp_path, str(folder)) as server:
        (folder / "config.json").write_text("{")
        card = described(server)
        assert card["recipe"] == "tones"
        (folder / "config.json").unlink()
        assert described(server) == card
        write_model(folder, recipe="second")
        assert described(server) == {**card, "recipe": "second"}


def test_what_the_log_is_to_say_is_there(tmp_path, model, caplog):
    with serving(tmp_path, model, examples=str(tmp_path / "nowhere")) as server:
        check_problem(server.client.get("/v1/examples"), 500, "log")
    assert "FileNotFoundError" in caplog.text and "/v1/examples" in caplog.text


def test_a_head_is_a_get_without_its_body(server):
    for path in ("/", "/healthz", "/v1/separations/" + "0" * 32):
        got, head = server.client.get(path), server.client.head(path)
        assert head.status_code == got.status_code and head.content == b""
        assert head.headers["content-length"] == str(len(got.content))
    assert server.client.head("/v1/separations").status_code == 405


def test_a_preference_that_is_none_is_passed_over(server, sound):
    for prefer in (b"wait=\xb2", b"wait=-1", b"wait=1e9", b"wait", b"=,;"):
        answer = server.post(sound, {"Prefer": prefer})
        assert answer.status_code == 201
        server.client.delete(answer.headers["location"])


def test_the_page_is_whole_and_asks_nobody_else(server):
    for path in ("/", "/docs", "/static/page.js", "/static/docs.js", "/static/page.css", "/static/icon.svg"):
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        outside = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in outside and "https://" not in outside


def test_examples_are_files_that_the_service_takes(tmp_path, model):
    with serving(tmp_path, model) as server:
        examples = server.client.get("/v1/examples").json()
        assert len(examples) == 2
        content = server.client.get(examples[0]["url"]).content
        assert server.client.post("/v1/separations", files={"file": content}).status_code == 201
        check_problem(server.client.get("/v1/examples/nowhere"), 404)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"objects": "kazoo"}, 422, "kazoo"),
        ({"objects": "violine"}, 422, "did you mean violin?"),
        ({"objects": ", ,"}, 422, "objects"),
        ({"bases": "mine"}, 422, "mine"),
        ({"bases": "both"}, 422, "bases"),
        ({"colour": "red"}, 422, "colour"),
        ({"url": "http://example.com/x.mp4"}, 422, "either"),
    ],
)
def test_options_that_miss(server, sound, fields, status, word):
    check_problem(server.post(sound, **fields), status, word)


def test_bodies_that_miss(server, sound):
    post = server.client.post
    check_problem(post("/v1/separations"), 415)
    check_problem(post("/v1/separations", json={"url": "x"}), 415)
    check_problem(post("/v1/separations", data={"objects": "dog"}, files={"x": b""}), 422, "x")
    check_problem(post("/v1/separations", files=[("file", b"1"), ("file", b"2")]), 400, "one")
    check_problem(post("/v1/separations", files={"objects": (None, "d" * 9000)}), 413)
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (
        b"",
        b"--x",
        b"--x\r\n\r\n",
        b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\nabc",
        b"nonsense",
    ):
        check_problem(post("/v1/separations", content=body, headers=kind), 400)
    check_problem(post("/v1/separations", content=b"", headers={"Content-Type": "multipart/form-data"}), 400)
    wait(server.idle)


def test_example_answers_have_the_fields_of_real_ones(server, sound):
    document = server.client.get("/openapi.json").json()
    (job,) = document["components"]["schemas"]["Job"]["examples"]
    real = server.post(sound, objects="violin,dog").json()
    assert answers.Job.model_validate(job).model_dump(mode="json").keys() == real.keys()
    assert job["result"].keys() == real["result"].keys()
    assert job["result"]["objects"][0].keys() == real["result"]["objects"][0].keys()
    assert job["result"]["rest"].keys() == real["result"]["rest"].keys()
    (example,) = document["components"]["schemas"]["ObjectInfo"]["examples"]
    assert example in server.client.get("/v1/objects").json()


def test_what_cannot_be_read_is_told_in_plain_words(server, tmp_path):
    (tmp_path / "notes.mp4").write_text("no media")
    body = check_problem(server.post(tmp_path / "notes.mp4"), 422, "can't be read", "MP4", "WAV")
    assert body["reason"] == "unreadable" and body["cause"] and body["cause"] not in body["detail"]
    url = server.post(tmp_path / "notes.mp4", {"Prefer": "respond-async"}).headers["location"]
    wait(lambda: server.client.get(url).json()["status"] == "failed")
    assert server.client.get(url).json()["error"] == body
    (tmp_path / "nothing.mp4").write_bytes(b"")
    check_problem(server.post(tmp_path / "nothing.mp4"), 422, "nothing in it")
    check_problem(server.post(write_sound(tmp_path / "long.wav", 31)), 413, "too long", "30 s", "avsep separate")
    silent = [media.ffmpeg_executable(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=duration=1"]
    subprocess.run([*silent, str(tmp_path / "silent.mp4")], check=True)
    check_problem(server.post(tmp_path / "silent.mp4"), 422, "no sound")


def test_files_that_are_too_much(server, tmp_path):
    check_problem(server.post(write_sound(tmp_path / "long.wav", 31)), 413, "30 s")
    check_problem(server.post(write_video(tmp_path / "large.mp4", 1, "1024x768")), 413, "1024x768")
    (tmp_path / "big.wav").write_bytes(b"x" * 2_000_001)
    check_problem(server.post(tmp_path / "big.wav"), 413, "2000000")


def test_a_body_without_a_length_is_stopped_at_the_limit(server):
    sent = 0

    def endless():
        nonlocal sent
        yield b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n"
        while sent < 200_000_000:
            sent += 65536
            yield b"\0" * 65536

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        answer = server.client.post(
            "/v1/separations", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        check_problem(answer, 413)
    assert sent < 100_000_000
    wait(server.idle)


def test_a_declared_length_of_10_gb_is_refused_unread(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_no_url_unless_the_operator_allows_it_and_never_a_private_one(server, tmp_path, model, sound):
    check_problem(server.client.post("/v1/separations", files={"url": (None, "http://example.com/")}), 403)
    with serving(tmp_path, model, allow_urls=True) as open_server:
        asked = []
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asked.append(listener.accept()[0])

        threading.Thread(target=listen, daemon=True).start()
        hosts = "127.0.0.1 localhost [::1] 0.0.0.0 2130706433 0x7f.1 169.254.169.254 10.0.0.1 192.168.1.1"
        for host in [
            *hosts.split(),
            *["[::ffff:127.0.0.1]", "[fd00::1]", "[64:ff9b::7f00:1]", "100.64.0.1", "224.0.0.1"],
        ]:
            url = f"http://{host}:{port}/x.mp4"
            check_problem(open_server.client.post("/v1/separations", files={"url": (None, url)}), 422)
        for url in ("file:///etc/passwd", "ftp://example.com/", "http://", "http://user@example.com/", "youtube:../x"):
            check_problem(open_server.client.post("/v1/separations", files={"url": (None, url)}), 422)
        listener.close()
        assert not asked
        wait(open_server.idle)
        assert open_server.folders() == []


class Remote(http.server.BaseHTTPRequestHandler):
    """Answers with a file, half of one, too much, a redirect, or a byte now and then."""

    def do_GET(self) -> None:
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            if self.path == "/half":
                self.send_header("Content-Length", "2000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(50 if self.path == "/slow" else 1):
                    self.wfile.write(b"x" * (100_000 if self.path == "/large" else 1000))
                    time.sleep(0.1 if self.path == "/slow" else 0)

    def log_message(self, *_: object) -> None:
        pass


def test_what_a_url_brings_is_bounded_and_redirects_are_checked(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Remote) as remote:
        threading.Thread(target=remote.serve_forever, daemon=True).start()
        base = f"http://public.test:{remote.server_port}"

        def resolve(host: str, port: int) -> list:
            if host == "public.test":
                return socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
            return public_addresses(host, port)

        def fetch(url: str, timeout_s: float = 10) -> bytes:
            download(url, tmp_path / "file", 50_000, timeout_s, resolve)
            return (tmp_path / "file").read_bytes()

        assert fetch(f"{base}/file") == b"x" * 1000
        assert fetch(f"{base}/redirect?/file") == b"x" * 1000
        for path, status in (
            ("/missing", 422), ("/half", 422), ("/large", 413), ("/redirect?/redirect?/redirect?/redirect?/x", 422),
            (f"/redirect?http://127.0.0.1:{remote.server_port}/file", 422), ("/redirect?file:///etc/passwd", 422),
        ):  # fmt: skip
            with pytest.raises(BadUpload) as error:
                fetch(base + path)
            assert error.value.status == status, path
        with largest_file(500), pytest.raises(OSError) as full:
            fetch(f"{base}/file")
        assert as_failure(full.value).status == 507
        started = time.monotonic()
        with pytest.raises(BadUpload):
            fetch(f"{base}/slow", 0.5)
        assert time.monotonic() - started < 3
        remote.shutdown()


def test_a_token_is_asked_for_everything_but_the_page(tmp_path, model, sound):
    with serving(tmp_path, model, token="secret") as server:
        for path in ("/", "/static/page.js", "/healthz"):
            assert server.client.get(path).status_code == 200
        for path in ("/v1/model", "/v1/objects", "/v1/separations/" + "0" * 32, "/metrics", "/openapi.json"):
            answer = server.client.get(path)
            check_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        for host in ("x/healthz?", "x/healthz#"):  # old Starlettes' idea of the URL is made of it
            check_problem(server.client.get("/v1/model", headers={"Host": host}), 401)
        check_problem(server.post(sound, {"Authorization": "Bearer wrong"}), 401)
        check_problem(server.post(sound, {"Authorization": "Basic secret"}), 401)
        assert server.post(sound, {"Authorization": "Bearer secret"}).status_code == 201


def test_other_sites_pages_are_refused(server, sound):
    check_problem(server.post(sound, {"Sec-Fetch-Site": "cross-site"}), 403)
    assert server.post(sound, {"Sec-Fetch-Site": "same-origin"}).status_code == 201


@pytest.mark.parametrize("job_id", ["x", "0" * 32, "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "0" * 31 + "/", "é"])
def test_ids_that_are_none(server, job_id):
    for tail in ("", "/tracks/_rest.wav", "/archive.zip", "/relation"):
        check_problem(server.client.get(f"/v1/separations/{job_id}{tail}"), 404)


# ----------------------------------------------------------------------------------- too much work


def test_a_full_queue_says_come_later(tmp_path, slow_model, sound):
    with serving(tmp_path, slow_model, max_pending=2) as server:
        taken = [server.post(sound, {"Prefer": "respond-async"}) for _ in range(2)]
        assert [a.status_code for a in taken] == [202, 202]
        check_problem(server.post(sound), 503, "progress")
        for answer in taken:
            assert server.client.delete(answer.headers["location"]).status_code == 204
        wait(server.idle)
        assert server.folders() == []


def test_deleting_a_job_stops_its_work(tmp_path, slow_model):
    sound = write_sound(tmp_path / "long.wav", 60)
    with serving(tmp_path, slow_model) as server:
        url = server.post(sound, {"Prefer": "respond-async"}).headers["location"]
        wait(lambda: server.client.get(url).json()["stage"] == "listening")
        check_problem(server.client.get(f"{url}/tracks/_rest.wav"), 409, "running")
        server.client.delete(url)
        started = time.monotonic()
        wait(server.idle)
        assert time.monotonic() - started < 15  # a window or two, not fifteen
        assert server.folders() == []


def test_work_has_a_deadline(tmp_path, slow_model):
    sound = write_sound(tmp_path / "long.wav", 60)
    with serving(tmp_path, slow_model, max_work_s=2.0) as server:
        assert check_problem(server.post(sound), 503, "longer")["reason"] == "out_of_time"
        assert server.folders() == []


def test_an_upload_has_a_deadline(tmp_path, model):
    with serving(tmp_path, model, max_upload_s=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(
                b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            )
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        wait(server.idle)
        assert server.folders() == []


def dribble(port: int, n_bytes: int, every_s: float, seconds: float) -> bytes:
    """Send the beginning of a file, so much at a time, and give the answer that comes meanwhile."""
    with half_an_upload(port, 0, 1_000_000) as raw:
        raw.settimeout(every_s)
        for _ in range(int(seconds / every_s)):
            try:
                raw.sendall(b"\0" * n_bytes)
                return raw.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
    return b""


def test_uploads_that_dribble_keep_nobody_out(tmp_path, model, sound):
    """Sixteen clients that send a byte now and then, as many as jobs may wait; others are served at once."""
    slow = {"upload_grace_s": 2.0, "max_uploads": 12, "max_uploads_per_client": 8, "max_pending": 4}
    with serving(tmp_path, model, **slow) as server, ThreadPoolExecutor(16) as pool:
        hostile = [pool.submit(dribble, server.port, 1, 0.2, 20) for _ in range(16)]
        wait(lambda: server.service.pending == 8)
        time.sleep(1.1)  # from then on they are known to be slow
        started = time.monotonic()
        answers = [server.post(sound) for _ in range(3)]
        assert [a.status_code for a in answers] == [201] * 3
        told = [future.result() for future in hostile]
        assert time.monotonic() - started < 10
        assert {answer.split(b" ")[1] for answer in told if answer} == {b"408", b"429"}
        wait(server.idle)
        assert len(server.folders()) == 3


def test_an_upload_of_a_modest_line_is_taken(tmp_path, model):
    with serving(tmp_path, model, upload_grace_s=0.5, min_upload_rate=10_000) as server:
        assert dribble(server.port, 5000, 0.1, 3.0) == b""  # five times the least rate
        assert b" 408 " in dribble(server.port, 500, 0.1, 3.0)  # half of it
        assert b" 408 " in dribble(server.port, 100_000, 3.0, 6.0)  # nothing more after a good start
        wait(server.idle)


def test_room_is_kept_for_a_job_when_it_is_taken(tmp_path, slow_model, sound):
    """Eight uploads at once, and room for one with its sounds: what is taken is done, others are refused at once."""
    with serving(tmp_path, slow_model, results_bytes=1_300_000) as server, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = [*pool.map(lambda _: server.post(sound, {"Prefer": "respond-async"}), range(8))]
            taken = [a.headers["location"] for a in answers if a.status_code == 202]
            assert 0 < len(taken) < 8
            for answer in answers:
                if answer.status_code != 202:
                    assert check_problem(answer, 507, "room")["reason"] == "storage_full"
            wait(lambda: server.service.working == 0)
            states = [server.client.get(url).json()["status"] for url in taken]
            assert "done" in states and not {*states} - {"done", 404}  # a finished one may have made room
        url = taken[states.index("done")]
        # a body that is too large for whatever makes room is refused, and nothing has to go for it
        with half_an_upload(server.port, 10, 5_000_000) as raw:
            assert raw.recv(1000).startswith(b"HTTP/1.1 507 ")
        assert server.client.get(url).status_code == 200
        assert server.client.get("/v1/model").json()["limits"]["free_bytes"] == 1_300_000


def test_what_is_reserved_counts_as_used(tmp_path):
    store = ResultStore(tmp_path, max_bytes=1_000_000)
    job, other = store.create(), store.create()
    store.reserve(job, 600_000)
    store.reserve(job, 700_000)
    with pytest.raises(StoreFull):
        store.reserve(other, 400_000)
    assert store.room() == pytest.approx(300_000, abs=1000)
    (store.path(job) / "upload").write_bytes(b"x" * 650_000)  # within what is kept
    assert store.room() == pytest.approx(300_000, abs=1000)
    store.finish(job, "done")
    assert store.room() == pytest.approx(1_000_000, abs=1000)
    store.reserve(other, 400_000)
    whole = shutil.disk_usage(tmp_path).total
    with pytest.raises(StoreFull):  # the disk has less than the store may hold
        ResultStore(tmp_path, max_bytes=1 << 60).reserve(other, whole)


def test_more_objects_than_there_is_room_for_end_the_work(tmp_path, model, sound, monkeypatch):
    monkeypatch.setattr(service, "USUAL_OBJECTS", 0)
    with serving(tmp_path, model, results_bytes=700_000) as server:  # 2 sounds fit, 4 are found
        check_problem(server.post(sound), 507, "room")
        check_problem(server.post(sound, objects="dog,violin"), 507, "room")
        assert server.folders() == []


def test_a_client_gone_in_mid_upload_leaves_nothing(server):
    before = server.folders()
    for _ in range(5):
        with half_an_upload(server.port, 100_000, 1_000_000):
            wait(lambda: server.service.pending == 1)
        wait(server.idle)
    assert server.folders() == before


def test_a_client_gone_while_waiting_stops_its_work(tmp_path, slow_model):
    sound = write_sound(tmp_path / "long.wav", 60)
    with serving(tmp_path, slow_model) as server:
        with waiting_client(server.url, sound):
            wait(lambda: working(tmp_path / "results"))
        wait(server.idle, 15)
        assert server.folders() == []


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """What a full disk is to a program: writes fail, though with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, model, sound):
    with serving(tmp_path, model) as server:
        with largest_file(50_000):  # no room for the upload
            assert check_problem(server.post(sound), 507, "room")["reason"] == "storage_full"
        with largest_file(150_000):  # for the upload, not for the sounds
            assert check_problem(server.post(sound), 507)["reason"] == "storage_full"
            answer = server.post(sound, {"Prefer": "respond-async"})
            url = answer.headers["location"]
            wait(lambda: server.client.get(url).json()["status"] == "failed")
            assert server.client.get(url).json()["error"]["reason"] == "storage_full"
        kept = [p for folder in server.folders() for p in folder.rglob("*") if p.is_file()]
        assert [p.name for p in kept] == ["job.json"]
        assert server.post(sound).status_code == 201


def test_a_store_without_room_keeps_what_is_in_progress(tmp_path, model, sound):
    with serving(tmp_path, model, results_bytes=1_300_000) as server:
        urls = [server.post(sound).headers["location"] for _ in range(4)]
        there = [server.client.get(u).status_code for u in urls]
        assert there[-1] == 200 and there[0] == 404  # the oldest made room
        assert server.service.store.usage()["bytes"] <= 1_300_000
    with serving(tmp_path / "small", model, results_bytes=150_000) as server:
        check_problem(server.post(sound), 507)
        assert server.folders() == []


# --------------------------------------------------------------------------------------- the model


def test_a_model_is_replaced_without_dropping_a_request(tmp_path, sound):
    model = write_model(tmp_path / "model", recipe="first")
    statuses, recipes = [], []
    with serving(tmp_path, model, workers=2) as server:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answer = server.post(sound)
                statuses.append(answer.status_code)
                recipes.append(answer.json()["result"]["model"]["recipe"])

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        wait(lambda: "first" in recipes)
        write_model(tmp_path / "model", recipe="second")
        wait(lambda: recipes[-6:] == ["second"] * 6)  # both workers
        (tmp_path / "model" / "miml.safetensors").write_bytes(b"damaged")
        time.sleep(1.5)
        count = len(recipes)
        wait(lambda: len(recipes) > count + 8)
        stop.set()
        for client in clients:
            client.join()
    assert set(statuses) == {201}
    assert set(recipes[count:]) == {"second"}  # the damaged one was not taken


# --------------------------------------------------------------------------------------- the store


def test_the_store_lets_results_expire_in_order(tmp_path):
    store = ResultStore(tmp_path, max_bytes=10_000, max_jobs=3, ttl_s=100)
    ids = []
    for number in range(3):
        ids.append(store.create())
        (store.path(ids[-1]) / "sound").write_bytes(b"x" * 2000)
        store.finish(ids[-1], "done")
        store.update(ids[-1], finished=time.time() - 50 + number)
    store.sweep()
    assert store.usage()["done"] == 3
    store.sweep(5000)
    assert [i in os.listdir(tmp_path) for i in ids] == [False, True, True]
    store.update(ids[1], finished=time.time() - 101)
    store.sweep()
    with pytest.raises(NoSuchJob):
        store.job(ids[1])
    busy = store.create()
    (store.path(busy) / "upload").write_bytes(b"x" * 9000)
    with pytest.raises(StoreFull):
        store.sweep(2000)
    assert os.listdir(tmp_path) == [busy]  # all else made room
    with pytest.raises(NoSuchJob):
        store.update("../" + busy, progress=1)


def test_the_store_gives_up_work_that_nobody_touches(tmp_path):
    store = ResultStore(tmp_path, stale_s=100)
    job = store.create()
    killed = tmp_path / f".{'0' * 32}.12345678"  # a deletion that was
    killed.mkdir()
    store.sweep()
    assert store.job(job).status == "uploading" and killed.exists()
    written = tmp_path / job / "job.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"updated": 1.0}))
    os.utime(killed, (0, 0))
    store = ResultStore(tmp_path, stale_s=100)  # another worker's, which counts anew
    store.sweep()
    assert os.listdir(tmp_path) == []


def test_a_store_of_the_version_before_is_read(tmp_path):
    store = ResultStore(tmp_path)
    job = store.create()
    found = {"name": "dog", "file": "dog.wav", "from": "sound", "confidence": 0.9, "familiarity": 1.0, "doubt": ""}
    found |= {"sound_score": 0.4, "picture_score": None, "visible": None, "silent": False, "learned": True}
    result = {"sample_rate": 8000, "duration_s": 6.0, "objects_from": "sound", "note": "", "labeller": None}
    result |= {"objects": [found], "rest": "_rest.wav", "heard": {"dog": 0.4}, "bases": "own", "has_image": False}
    result |= {"windows": [{"start_s": 0.0, "end_s": 6.0, "heard": {"dog": 0.4}}], "timings": {"total_s": 1.0}}
    result |= {"model": {"recipe": "default"}, "trained_on": {"clips": 9}}
    state = {"id": job, "status": "done", "created": 1e9, "progress": 1.0, "options": {"objects": ["dog"]}}
    state |= {"queued": 1e9, "started": 1e9, "stage": "done", "duration_s": 6.0, "reserved": 9, "result": result}
    (tmp_path / job / "job.json").write_text(json.dumps({**state, "finished": 2e9, "updated": 2e9}))
    kept = store.job(job)
    assert kept.options.objects == ("dog",) and kept.result and kept.result.objects[0].found == "sound"
    told = describe(kept, 60.0)
    assert told.result and told.result.relation is None  # its first window is of another form
    assert told.result.objects[0].audio.wav == f"/v1/separations/{job}/tracks/dog.wav"
    assert store.update(job, progress=0.5).result == kept.result
    with pytest.raises(TypeError, match="no progres"):
        store.update(job, progres=1)


def test_a_job_without_room_leaves_no_folder(tmp_path):
    with largest_file(0), pytest.raises(OSError):
        ResultStore(tmp_path).create()
    assert os.listdir(tmp_path) == []


def test_a_deleted_jobs_folder_is_not_made_again(tmp_path, model, sound, monkeypatch):
    monkeypatch.setattr(jobs, "STEP_S", 1e9)  # nobody looks whether the job is still there
    config = ServiceConfig(model, str(tmp_path))

    def elsewhere(waveforms: Sequence[np.ndarray], seeds: Sequence[int], config: ExtractionConfig) -> Future:
        with contextlib.suppress(NoSuchJob):
            store.delete(job)
        future: Future = Future()
        future.set_result([factorize(w, seed, config) for w, seed in zip(waveforms, seeds, strict=True)])
        return future

    worker = JobWorker(config, factorize=elsewhere)
    store, job = worker.store, worker.store.create()
    shutil.copy(sound, store.path(job) / "upload")
    store.update(job, status="queued", options={}, queued=time.time())
    worker(job)
    assert os.listdir(tmp_path) == ["network.txt"]


def test_the_store_is_used_by_many_at_once(tmp_path):
    store = ResultStore(tmp_path, max_bytes=30_000)

    def work(_: int) -> None:
        for _ in range(60):
            job = store.create()
            (store.path(job) / "sound").write_bytes(b"x" * 2000)
            with contextlib.suppress(StoreFull):
                store.sweep()
            with contextlib.suppress(NoSuchJob):  # it made room
                store.finish(job, "done")
                store.usage()
                store.delete(job)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert os.listdir(tmp_path) == []


def test_settings_come_from_the_environment(tmp_path):
    given = {"AVSEP_SERVE_TOKEN": "x", "AVSEP_SERVE_MAX_PENDING": "3", "AVSEP_SERVE_ALLOW_URLS": "1", "HOME": "/"}
    config = ServiceConfig.from_environment(given, model="m")
    assert (config.token, config.max_pending, config.allow_urls) == ("x", 3, True)
    assert ServiceConfig.from_environment({"AVSEP_SERVE_TOKEN": " x\n"}, model="m").token == "x"
    assert ServiceConfig.from_environment({}, model="m").token is None
    values = {"REPLICAS": "0", "DEVICES": "-1", "ANSWER_WITHIN_S": "0", "RESULTS": str(tmp_path), "EXAMPLES": "."}
    assert ServiceConfig.from_environment({f"AVSEP_SERVE_{n}": v for n, v in values.items()}, model="m").replicas == 0
    (tmp_path / "file").touch()
    ranges = [("MAX_PENDING", "-1"), ("MAX_PENDING", "0"), ("REPLICAS", "-4"), ("DEVICES", "-2"), ("MAX_WORK_S", "nan")]
    folders = [("RESULTS", "s3://b/x"), ("RESULTS", str(tmp_path / "file")), ("EXAMPLES", str(tmp_path / "none"))]
    others = [("MAX_PENDING", "many"), ("ALLOW_URLS", "perhaps"), ("MAX_PENDNG", "3"), ("TOKEN", ""), ("TOKEN", " \n")]
    for name, text in [*ranges, *folders, *others]:
        with pytest.raises(ValueError, match=f"AVSEP_SERVE_{name}"):
            ServiceConfig.from_environment({f"AVSEP_SERVE_{name}": text}, model="m")
    with pytest.raises(ValueError, match="AVSEP_SERVE_REPLICAS=-4: give 0 or more"):  # as Ray's configuration gives it
        ServiceConfig.from_environment({}, model="m", replicas=-4)


def test_what_failures_mean():
    assert as_failure(ClipError(Reason.TOO_LONG, "more than 5 s")).status == 413
    assert as_failure(ClipError(Reason.UNREADABLE, "not media")).status == 422
    assert as_failure(ClipError(Reason.UNREADABLE, "killed", transient=True)).status == 503
    assert as_failure(OSError(errno.ENOSPC, "full")).status == 507
    assert as_failure(OSError(errno.EIO, "broken")).status == 500


@pytest.mark.parametrize("left", ["tracks.01234567.part", "tracks"])
def test_work_that_was_under_way_is_taken_up_again(tmp_path, model, sound, left):
    """What a service and a worker that died had written, in part or all of it, is no hindrance to the next."""
    store = ServiceConfig(model, str(tmp_path / "results")).store()
    job = store.create()
    shutil.copy(sound, store.path(job) / "upload")
    part = store.path(job) / left / "dog.wav.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    store.update(job, status="running", options={}, queued=time.time())
    with serving(tmp_path, model) as server:
        wait(lambda: server.client.get(f"/v1/separations/{job}").json()["status"] == "done")
        assert not part.exists() and not (store.path(job) / "upload").exists()
        JobWorker(server.config)(job)  # once more does nothing
        fail(store, job, Failure(status=503, reason="late", detail=""))
        assert store.job(job).status == "done"


def test_another_picture_network_elsewhere_means_this_one_here(model, tmp_path, video):
    """A device may have taken up a new model before a worker has."""
    asked = []

    def future(result: object, error: Exception | None = None) -> Future:
        answer: Future = Future()
        answer.set_exception(error) if error else answer.set_result(result)
        return answer

    def label(pictures: np.ndarray, sha256: str) -> Future:
        asked.append(sha256)
        return future(None, OtherNetwork())

    def factorize_by(waveforms: Sequence[np.ndarray], seeds: Sequence[int], config: ExtractionConfig) -> Future:
        return future([factorize(w, seed, config) for w, seed in zip(waveforms, seeds, strict=True)])

    worker = JobWorker(ServiceConfig(model, str(tmp_path)), label, factorize_by)
    job = worker.store.create()
    shutil.copy(video, worker.store.path(job) / "upload")
    worker.store.update(job, status="queued", queued=time.time())
    worker(job)
    result = worker.store.job(job).result
    assert len(asked) == 1 and result and result.objects_from == "pictures"


def test_a_device_does_requests_together_and_returns_each_failure():
    begun = threading.Event()

    def halve(requests: list[tuple[int]]) -> list[float]:
        begun.wait(10)
        if any(number == 3 for (number,) in requests):
            raise ValueError(3)
        return [number / 2 for (number,) in requests]

    async def ask() -> list:
        together = Together(halve, most=4)
        answers = [asyncio.ensure_future(together(number)) for number in range(8)]
        await asyncio.sleep(0.05)
        answers[7].cancel()
        begun.set()
        given = await asyncio.gather(*answers[:7])
        assert sum(size * count for size, count in together.sizes.items()) == 7 and max(together.sizes) > 1
        return given

    given = asyncio.run(ask())
    assert isinstance(given.pop(3), ValueError) and given == [0, 0.5, 1, 2, 2.5, 3]


def test_a_request_that_a_device_cannot_do_spoils_no_other(model):
    waveform, config = tone("dog", 2.0), Separator.load(model).extraction
    requests = [
        ([waveform] * 3, range(3), config),
        ([np.full_like(waveform, np.nan)], [0], config),
        ([waveform[:9000]], [7], config),
    ]
    first, second, third = each(Device(ServiceConfig(model)).factorize, requests)
    assert isinstance(second, ValueError)
    for factors, seed in zip(first, range(3), strict=True):
        torch.testing.assert_close(factors.W, factorize(waveform, seed, config).W)
    torch.testing.assert_close(third[0].H, factorize(waveform[:9000], 7, config).H)
