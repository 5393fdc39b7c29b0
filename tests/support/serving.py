"""A tiny model that knows two pitches, files of them, and the service: its application alone, and on Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from avsep import media
from avsep.factors import ExtractionConfig
from avsep.model import Model, ModelConfig, NetworkConfig, SeparationConfig
from avsep.objects import object_index
from avsep.service import connections
from avsep.service.api import make_app
from avsep.service.config import ServiceConfig
from avsep.service.hotmodel import Load
from avsep.service.jobs import JobWorker
from avsep.service.local import Threads
from avsep.service.service import Service
from avsep.stft import STFT
from tests.support.processes import descendants

RATE = 8000
PITCH = {"dog": 200, "violin": 900}  # Hz


def write_model(folder: Path, n_iter: int = 60, recipe: str = "tones", **training: Any) -> str:
    """Low bases are dogs, high ones violins, by 20 points of score. `training` is what it says of that."""
    config = ModelConfig(
        extraction=ExtractionConfig(
            stft=STFT(sample_rate=RATE, n_fft=400, hop_length=200),  # a bin is 20 Hz
            n_bases=6,
            n_iter=n_iter,
        ),
        network=NetworkConfig(n_subconcepts=1, hidden=2, published_head=False),
        separation=SeparationConfig(window_s=4.0, overlap_s=0.5),
        recipe=recipe,
        training=training,
    )
    network = config.build().eval()
    with torch.no_grad():
        network.shared[0].bias.zero_()
        network.shared[0].weight.zero_()
        network.shared[0].weight[0, :25] = 1.0
        network.shared[0].weight[1, 25:] = 1.0
        network.subconcepts.bias.fill_(-10.0)
        network.subconcepts.weight.zero_()
        for unit, name in enumerate(PITCH):
            network.subconcepts.weight[object_index(name), unit] = 20.0
    Model(config, network).save(str(folder))
    return str(folder)


@dataclass
class Bands:
    """A separator without bases or a network: what lies below 500 Hz, and what lies above."""

    sample_rate: int = RATE
    objects: tuple[str, ...] = ("low", "high")

    def plan(self, blocks: Iterable[NDArray], objects=None, seen=None) -> Bands.Planned:
        list(blocks)
        return Bands.Planned(tuple(objects or self.objects))

    @dataclass
    class Planned:
        objects: tuple[str, ...]
        confidence: dict[str, float] = field(default_factory=lambda: {"low": 1.0, "high": 1.0})
        silent: tuple[str, ...] = ()
        explanation: None = None

        def render(self, blocks: Iterable[NDArray]) -> Iterator[NDArray]:
            for block in blocks:
                X = np.fft.rfft(block)
                low = np.fft.rfftfreq(len(block), 1 / RATE) < 500
                parts = {"low": X * low, "high": X * ~low}
                estimates = [np.fft.irfft(parts[name], len(block)) for name in self.objects]
                yield np.stack([*estimates, block - sum(estimates)]).astype(np.float32)


def tone(name: str, seconds: float) -> np.ndarray:
    """One object's sound, on and off in a rhythm of its own."""
    t = np.arange(int(RATE * seconds)) / RATE
    rhythm = {"dog": 3.0, "violin": 2.0}[name]
    return (0.3 * np.sin(2 * np.pi * PITCH[name] * t) * (np.sin(2 * np.pi * rhythm * t) > -0.6)).astype(np.float32)


def write_sound(path: Path, seconds: float = 6.0) -> Path:
    soundfile.write(path, tone("dog", seconds) + tone("violin", seconds), RATE, subtype="PCM_16")
    return path


def write_video(path: Path, seconds: float = 6.0, size: str = "160x120") -> Path:
    sound = write_sound(path.with_suffix(".source.wav"), seconds)
    ffmpeg = [media.ffmpeg_executable(), "-y", "-loglevel", "error", "-f", "lavfi"]
    picture = ["-i", f"testsrc=size={size}:rate=10:duration={seconds}", "-i", str(sound)]
    codecs = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "flac", "-strict", "-2"]
    subprocess.run([*ffmpeg, *picture, *codecs, str(path)], check=True)
    sound.unlink()
    return path


@contextlib.contextmanager
def half_an_upload(port: int, n_sent: int, n_said: int) -> Iterator[socket.socket]:
    """A client that sends the beginning of a file, and goes when the block ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" % n_said + b"\0" * n_sent
        )
        yield raw


@contextlib.contextmanager
def waiting_client(url: str, file: Path) -> Iterator[None]:
    """A client that has sent a file and waits for the answer; it goes when the block ends."""
    with file.open("rb") as opened:
        request = httpx.Request("POST", f"{url}/v1/separations", files={"file": opened})
        content = request.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port), timeout=60) as raw:
        raw.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + content)
        yield


class Server:
    """The application on a port of loopback, with workers in threads in place of Serve's replicas."""

    def __init__(self, config: ServiceConfig, workers: int = 1, load: Load | None = None) -> None:
        self.config = config
        working = [JobWorker(config, load=load) for _ in range(workers)]
        self._threads = Threads(working)
        self.service = Service(config, self._threads, working[0].model.card if load else None)
        self.app = make_app(self.service)
        self._server = connections.server(self.app)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        wait(lambda: self._server.started)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        self._threads.close()

    def post(self, path: Path, headers: dict[str, str] | None = None, **fields: str) -> httpx.Response:
        with path.open("rb") as file:
            return self.client.post("/v1/separations", files={"file": file}, data=fields, headers=headers)

    def idle(self) -> bool:
        return self.service.pending == 0

    def folders(self) -> list[Path]:
        """Whatever is left of jobs."""
        return [p for p in Path(self.config.results).iterdir() if p.name not in ("examples", "network.txt")]


@contextmanager
def serving(folder: Path, model: str, workers: int = 1, load: Load | None = None, **limits: Any) -> Iterator[Server]:
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    limits = {"answer_within_s": 55.0} | limits  # a busy machine takes longer than people wait
    server = Server(ServiceConfig(model, str(results), **limits), workers, load)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What `serve deploy deploy/serve.yaml` does, without its replicas' numbers.
PROXIED = """
import os, sys, time
from ray import serve
from pipelines import runners
from pipelines.serve import build
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "avsep.service.connections.guard_serve_proxy"
with runners.session():
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[4])})
    serve.run(build({"model": sys.argv[2]}), name="avsep", route_prefix="/")
    try:
        time.sleep(1e6)
    finally:
        serve.shutdown()
"""


class RayService:
    """The service as it is started, `python -m pipelines.serve`, in a process of its own; or behind Serve's proxy."""

    def __init__(self, folder: Path, n_iter: int = 2500, proxied: bool = False, **limits: Any) -> None:
        self.model, self.results = folder / "model", folder / "results"
        write_model(self.model, n_iter, recipe="first")
        self.port = free_port()
        limits |= {"results": self.results, "replicas": 2}
        environment = {**os.environ, **{f"AVSEP_SERVE_{k.upper()}": str(v) for k, v in limits.items()}}
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", PROXIED] if proxied else ["-m", "pipelines.serve"]),
             "--model", str(self.model), "--port", str(self.port)],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)
        try:
            wait(self.ready, 200)
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        assert self.process.poll() is None, Path(self.log.name).read_text()
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/healthz").status_code == 200
        return False

    def post(self, path: Path, **headers: str) -> httpx.Response:
        with path.open("rb") as file:
            return self.client.post("/v1/separations", files={"file": file}, headers=headers)

    def idle(self) -> bool:
        return self.client.get("/healthz").json()["pending"] == 0

    def replicas(self, name: str) -> list[int]:
        """The processes of a deployment."""
        return [p for p, title in descendants(self.process.pid).items() if f"ServeReplica:avsep:{name}" in title]

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.log.close()


def working(results: Path) -> bool:
    """Whether a job of that folder has come to its sound."""
    return any('"listening"' in p.read_text() for p in results.glob("*/job.json"))


def wait(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
