"""The service as it is started, on Ray Serve: what dies, goes or is replaced in the middle of work."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import RayService, descendants, wait, write_model, write_sound

from avsep import connections
from pipelines import serve

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
    return {p.name for p in service.results.iterdir()}


def test_a_killed_replica_s_request_is_done_by_another(service, long):
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
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(
                b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
                b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" + b"\0" * 1_000_000
            )
            wait(lambda: not service.idle())
        wait(service.idle)
    assert folders(service) == before


def test_a_client_gone_while_waiting_stops_its_work(service, long):
    before = folders(service)
    with pytest.raises(httpx.ReadTimeout), long.open("rb") as file:
        httpx.post(f"http://127.0.0.1:{service.port}/v1/separations", files={"file": file}, timeout=1.0)
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
            assert time.monotonic() - started < 2 * connections.HEAD_S
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
    wait(lambda: not [p for p in processes if _alive(p)])


def test_behind_serve_s_proxies(tmp_path, short):
    """As on a cluster: the same answers, and the same bounds on connections."""
    with contextlib.closing(RayService(tmp_path, 60, proxied=True, max_upload_bytes=2_000_000)) as service:
        assert [t for t in descendants(service.process.pid).values() if "ProxyActor" in t]
        job = service.post(short)
        assert job.status_code == 201 and service.client.delete(job.headers["location"]).status_code == 204
        with pytest.raises(httpx.ReadTimeout), short.open("rb") as file:
            httpx.post(f"{service.url}/v1/separations", files={"file": file}, timeout=0.1)
        wait(lambda: folders(service) == set())
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
        headers_have_a_deadline(service)
        wait(service.idle)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_what_a_killed_service_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serve.results_folder("", 8000) as folder:
        Path(folder, "left").mkdir()
        with serve.results_folder("", 8000) as again:
            assert again == folder and os.listdir(folder) == []
    assert os.listdir(tmp_path) == []
