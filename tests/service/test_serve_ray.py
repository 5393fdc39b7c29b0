"""The service as it is started, on Ray Serve: what dies, goes or is replaced in the middle of work."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch

from avsep import vision
from avsep.model import LABELLER_FILE
from avsep.objects import OBJECTS, object_index
from avsep.service import place
from avsep.service.config import ServiceConfig
from avsep.service.connections import HEAD_S
from pipelines import runners, serve
from tests.support.processes import alive, descendants
from tests.support.serving import (
    PITCH,
    RayService,
    free_port,
    half_an_upload,
    serving,
    wait,
    waiting_client,
    working,
    write_model,
    write_sound,
    write_video,
)

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(800)]


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[RayService]:
    started = RayService(tmp_path_factory.mktemp("service"))
    yield started
    started.close()


@pytest.fixture
def long(tmp_path) -> Path:
    return write_sound(tmp_path / "long.wav", 50)


@pytest.fixture
def short(tmp_path) -> Path:
    return write_sound(tmp_path / "short.wav", 2)


def folders(service: RayService) -> set[str]:
    return {p.name for p in service.results.iterdir() if p.name != "network.txt"}


def test_a_killed_replicas_request_is_done_by_another(service, long):
    urls = [service.post(long, Prefer="respond-async").headers["location"] for _ in range(2)]
    wait(lambda: all(service.client.get(u).json()["progress"] > 0 for u in urls), 200)
    replicas = service.replicas("separating")
    assert len(replicas) == 2  # each with work
    os.kill(replicas[0], signal.SIGKILL)
    for url in urls:
        wait(lambda url=url: service.client.get(url).json()["status"] in ("done", "failed"), 500)
        assert service.client.get(url).json()["status"] == "done"
        assert service.client.delete(url).status_code == 204
    wait(lambda: len(service.replicas("separating")) == 2, 200)
    assert not [t for t in descendants(service.process.pid).values() if t.split(" ")[0].endswith("ffmpeg")]
    wait(service.idle)


def test_a_client_gone_in_mid_upload_leaves_nothing(service):
    before = folders(service)
    for _ in range(3):
        with half_an_upload(service.port, 1_000_000, 5_000_000):
            wait(lambda: not service.idle())
        wait(service.idle)
    assert folders(service) == before


def test_a_client_gone_while_waiting_stops_its_work(service, long):
    before = folders(service)
    with waiting_client(service.url, long):
        wait(lambda: working(service.results))
    wait(lambda: folders(service) == before)
    wait(service.idle)


def test_headers_that_dribble_are_given_up(service):
    headers_have_a_deadline(service)


def headers_have_a_deadline(service: RayService) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        raw.settimeout(1)
        started, answer = time.monotonic(), b""
        while not answer:
            with contextlib.suppress(TimeoutError):
                raw.sendall(b"X: y\r\n")
                answer = raw.recv(1000)
            assert time.monotonic() - started < 2 * HEAD_S
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_dead_ingress_is_begun_anew_and_its_work_taken_up(service, long):
    url = service.post(long, Prefer="respond-async").headers["location"]
    wait(lambda: service.client.get(url).json()["progress"] > 0, 200)
    (ingress,) = service.replicas("ingress")
    os.kill(ingress, signal.SIGKILL)
    wait(lambda: service.replicas("ingress") not in ([], [ingress]), 100)
    wait(service.ready, 100)
    wait(lambda: service.client.get(url).json()["status"] == "done", 300)
    assert service.client.delete(url).status_code == 204
    wait(service.idle)


def test_a_model_is_replaced_without_dropping_a_request(service, short):
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = service.post(short)
            answers.append((answer.status_code, answer.json()["result"]["model"]["recipe"]))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    wait(lambda: len(answers) > 3)
    write_model(service.model, n_iter=2500, recipe="second")
    time.sleep(1.5)
    count = len(answers)
    wait(lambda: [a[1] for a in answers[count:]].count("second") > 6, 100)
    stop.set()
    for client in clients:
        client.join()
    assert {status for status, _ in answers} == {201}
    assert service.client.get("/v1/model").json()["recipe"] == "second"


def test_more_than_the_queue_holds_is_told_to_come_later(service, long):
    answers = [service.post(long, Prefer="respond-async") for _ in range(18)]
    statuses = [a.status_code for a in answers]
    assert set(statuses) == {202, 503} and statuses[0] == 202
    assert all(int(a.headers["retry-after"]) > 0 for a in answers if a.status_code == 503)
    for answer in answers:
        if answer.status_code == 202:
            service.client.delete(answer.headers["location"])
    wait(service.idle, 100)


def test_it_leaves_nothing_behind(service, short):
    (ingress,) = service.replicas("ingress")

    def used_after(requests: int) -> tuple[int, int]:
        for _ in range(requests):
            url = service.post(short).headers["location"]
            assert service.client.get(f"{url}/archive.zip").status_code == 200
            assert service.client.delete(url).status_code == 204
        return len(os.listdir(f"/proc/{ingress}/fd")), _resident(ingress)

    open_files, memory = used_after(15)  # Ray opens channels of its own at first
    files_then, memory_then = used_after(20)
    assert files_then < open_files + 10  # a leak would be one a request
    assert memory_then < memory + 100_000_000
    processes = list(descendants(service.process.pid))
    service.process.terminate()
    assert service.process.wait(60) == 0
    wait(lambda: not [p for p in processes if alive(p)])


def test_behind_serves_proxies(tmp_path, short, long):
    """As on a cluster: the same answers, and the same bounds on connections."""
    with contextlib.closing(RayService(tmp_path, proxied=True, max_upload_bytes=2_000_000)) as service:
        assert [t for t in descendants(service.process.pid).values() if "ProxyActor" in t]
        job = service.post(short)
        assert job.status_code == 201 and service.client.delete(job.headers["location"]).status_code == 204
        with waiting_client(service.url, long):
            wait(lambda: working(service.results))
        wait(lambda: folders(service) == set())
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
        headers_have_a_deadline(service)
        wait(service.idle)


def test_ended_while_it_starts_it_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(free_port())]
    command += ["--model", write_model(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait(lambda: any("ServeController" in t for t in descendants(process.pid).values()), 200)
        processes = list(descendants(process.pid))
        process.terminate()
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 130 and said.splitlines()[-1].startswith("pipelines.serve: interrupted"), said
    wait(lambda: not [p for p in processes if alive(p)])


def write_pictured_model(folder: Path, seed: int) -> None:
    """A model that carries a picture network, of drawn weights."""
    torch.manual_seed(seed)
    classes = tuple(OBJECTS[object_index(name)].imagenet[0] for name in PITCH)
    network = vision.build_network("shufflenet_v2_x0_5", len(classes)).eval()
    write_model(folder, 3000 + seed, recipe=f"{seed}")
    vision.ImageLabeller("shufflenet_v2_x0_5", network, "", classes).save(folder / LABELLER_FILE)


def answers_of(client: httpx.Client, files: list[Path], folder: Path) -> list[tuple[Any, dict[str, np.ndarray]]]:
    """What each file's client is told and given, all asking at once."""

    def ask(number: int) -> tuple[Any, dict[str, np.ndarray]]:
        with files[number].open("rb") as file:
            answer = client.post("/v1/separations", files={"file": file}, headers={"Prefer": "wait=100"})
        if answer.status_code != 201:
            return (answer.status_code, answer.json()["reason"]), {}
        result, url = answer.json()["result"], answer.headers["location"]
        sounds = {}
        for name in (*(o["name"] for o in result["objects"]), "_rest"):
            (folder / f"{number}.wav").write_bytes(client.get(f"{url}/tracks/{name}.wav").raise_for_status().content)
            sounds[name] = soundfile.read(folder / f"{number}.wav")[0]
        return result, sounds

    with ThreadPoolExecutor(len(files)) as clients:
        return list(clients.map(ask, range(len(files))))


def test_a_devices_answers_are_the_ordinary_ones(tmp_path, monkeypatch):
    """Ray is told of a GPU; where torch finds none the stages of all requests are done together all the same."""
    from ray import serve as ray_serve

    model = tmp_path / "model"
    write_pictured_model(model, 1)
    files = [write_video(tmp_path / f"{i}.mkv", 20.0 + i) for i in range(4)] + [
        write_sound(tmp_path / "blind.wav"),
        tmp_path / "none",
    ]
    files[-1].write_bytes(b"no media")
    monkeypatch.setenv("AVSEP_CPUS", "3")
    monkeypatch.setenv("AVSEP_GPUS", "1")
    monkeypatch.setenv("AVSEP_SERVE_REPLICAS", "3")
    port = free_port()
    with runners.session(), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=200) as client:
        serve.start(ServiceConfig(str(model)), port, str(tmp_path / "served"))
        try:
            for seed in (1, 2):
                if seed == 2:
                    write_pictured_model(model, 2)
                    time.sleep(1.5)
                with serving(tmp_path / f"{seed}", str(model)) as ordinary:
                    expected = answers_of(ordinary.client, files, tmp_path)
                found = answers_of(client, files, tmp_path)
                assert [r["objects_from"] for r, sounds in found if sounds] == ["pictures"] * 4 + ["sound"]
                for (result, sounds), (told, heard) in zip(expected, found, strict=True):
                    if not sounds:
                        assert told == result == (422, "unreadable")
                        continue
                    assert result["model"]["recipe"] == told["model"]["recipe"] == f"{seed}"
                    assert result["objects_from"] == told["objects_from"]
                    for one, other in zip(result["objects"], told["objects"], strict=True):
                        assert one["name"] == other["name"]
                        assert other["picture_score"] == pytest.approx(one["picture_score"], abs=1e-5)
                    for name, sound in sounds.items():
                        np.testing.assert_allclose(heard[name], sound, atol=1e-5)
            batch_sizes = ray_serve.get_deployment_handle("on_device", "avsep").batch_sizes
            assert sum(size * count for size, count in batch_sizes.remote().result()["label"].items()) == 8
            for _ in range(10):  # requests come together by chance
                if max(batch_sizes.remote().result()["factorize"]) > 1:
                    break
                answers_of(client, files[:4], tmp_path)
            assert max(batch_sizes.remote().result()["factorize"]) > 1
            with files[0].open("rb") as file:
                sent = client.post("/v1/separations", files={"file": file}, headers={"Prefer": "respond-async"})
            url = sent.headers["location"]
            wait(lambda: client.get(url).json()["stage"] == "listening")
            (device,) = (p for p, t in descendants(os.getpid()).items() if "ServeReplica:avsep:on_device" in t)
            os.kill(device, signal.SIGKILL)
            wait(lambda: client.get(url).json()["status"] in ("done", "failed"), 200)
            assert client.get(url).json()["status"] == "done"
        finally:
            ray_serve.shutdown()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_a_killed_service_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with place.results_folder("", 8000) as folder:
        Path(folder, "left").mkdir()
        with place.results_folder("", 8000) as again:
            assert again == folder and os.listdir(folder) == []
    assert os.listdir(tmp_path) == []
