"""An S3 server on loopback, moto's, whose answers can be made late, refused or cut off."""

import contextlib
import os
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "AKIDLOOPBACK0EXAMPLE", "s3cr3t/key+of/loopback", "t0ken-of-loopback=="
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class S3:
    """The server, and what it does to requests: `fault` gets method and path, and says how the answer fails."""

    port: int = 0
    fault: Callable[[str, str], str | None] = lambda method, path: (
        None
    )  # "slow_down", "reset", "cut", "stall", "denied"
    delay_s: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)  # by method
    faults: Counter[str] = field(default_factory=Counter)
    _app: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, host: str = "127.0.0.1") -> dict[str, str]:
        """What a user sets."""
        return {
            "AWS_ENDPOINT_URL": f"http://{host}:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_SESSION_TOKEN": SESSION_TOKEN,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def calm(self) -> None:
        """Answer everything at once from now on, and count anew."""
        self.fault, self.delay_s = lambda method, path: None, 0.0
        self.requests.clear()
        self.faults.clear()

    def make_bucket(self) -> str:
        """Make a bucket, as its owner does beforehand."""
        name = f"b{uuid.uuid4().hex}"
        owner = pafs.S3FileSystem(
            endpoint_override=self.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY, allow_bucket_creation=True
        )
        owner.create_dir(name)
        return name

    def put(self, path: str, data: bytes) -> None:
        """Replace an object from within the server."""
        import moto.backends

        bucket, _, key = path.partition("/")
        (store,) = moto.backends.get_backend("s3").values()
        store["aws"].put_object(bucket, key, data)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests[method] += 1
        fault = None if path.startswith("/moto-api") else self.fault(method, path)
        if self.delay_s:
            time.sleep(self.delay_s)
        if fault:
            self.faults[fault] += 1
        if fault in ("slow_down", "denied"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = "503 Slow Down" if fault == "slow_down" else "403 Forbidden"
            body = SLOW_DOWN if fault == "slow_down" else SLOW_DOWN.replace(b"SlowDown", b"AccessDenied")
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body if method != "HEAD" else b""]
        if fault == "stall":
            time.sleep(3600)
        if fault == "reset":  # before anything has happened
            _reset(environ["werkzeug.socket"])
        answer = self._app(environ, start_response)
        if fault == "cut":  # in the midst of the answer, after it has happened
            return _cut(answer, environ["werkzeug.socket"])
        return answer


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.socket() as other:
        os.dup2(other.fileno(), connection.fileno())  # closes it, whoever else holds it
    raise ConnectionResetError


def _cut(answer: Iterable[bytes], connection: socket.socket) -> Iterator[bytes]:
    data = b"".join(answer)
    yield data[: len(data) // 2]
    _reset(connection)


@contextlib.contextmanager
def serve(host: str = "127.0.0.1") -> Iterator[S3]:
    """Serve on a free port."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # slow to import
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

        def connection_dropped(self, *_: Any) -> None:
            self.close_connection = True

    s3 = S3(_app=DomainDispatcherApplication(create_backend_app))
    server = make_server(host, 0, s3, threaded=True, request_handler=Handler)
    s3.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
