"""Slow and greedy clients on real sockets."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from avsep.service import connections
from tests.support.serving import wait

MANY = 40_000_000  # more than any socket's buffers


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def many(_: Request) -> Response:
    return StreamingResponse(b"x" * 100_000 for _ in range(MANY // 100_000))


async def broken(_: Request) -> Response:
    raise ZeroDivisionError


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    for name, value in {"HEAD_S": 0.6, "STALLED_S": 0.8, "HEAD_BYTES": 10_000, "MAX_CONNECTIONS": 20}.items():
        monkeypatch.setattr(connections, name, value)
    routes = [Route("/", echo, methods=["GET", "POST"]), Route("/many", many), Route("/broken", broken)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = connections.server(Starlette(routes=routes), shutdown_s=2)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait(lambda: server.started)
        yield listener.getsockname()[1]
        wait(lambda: not server.server_state.connections)  # whatever the clients did
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def connected(port: int, text: str = "") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(text.encode())
        yield raw


def until_closed(raw: socket.socket, dribble: Callable[[], None] = lambda: None) -> tuple[bytes, float]:
    """What comes before the connection's end, and when that is; until then something is done now and then."""
    raw.settimeout(0.1)
    started, answer = time.monotonic(), b""
    while time.monotonic() - started < 10:
        try:
            dribble()
            if not (data := raw.recv(1 << 20)):
                break
            answer += data
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return answer, time.monotonic() - started


def received(raw: socket.socket, ending: bytes, answers: int = 1) -> bytes:
    """What comes until so many answers are whole; they come in pieces as a socket likes."""
    data = b""
    while not (data.endswith(ending) and data.count(b"HTTP/1.1 200 ") == answers):
        piece = raw.recv(1000)
        assert piece, data
        data += piece
    return data


GET = "GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("before", ["", GET + "\r\n"])  # on a new connection, and on one kept alive
def test_headers_have_a_deadline_however_they_dribble(port, before):
    with connected(port, before) as raw:
        if before:
            received(raw, b"\r\n\r\n0")
        raw.sendall(GET.encode())
        answer, seconds = until_closed(raw, lambda: raw.sendall(b"X: y\r\n"))
    assert answer.startswith(b"HTTP/1.1 408 ") and 0.4 < seconds < 3


def test_what_breaks_is_logged(port, caplog):
    with connected(port, "GET /broken HTTP/1.1\r\nHost: x\r\n\r\n") as raw:
        assert raw.recv(1000).startswith(b"HTTP/1.1 500 ")
    wait(lambda: "ZeroDivisionError" in caplog.text)


def test_an_idle_connection_is_closed(port):
    with connected(port) as raw:
        answer, seconds = until_closed(raw)
    assert answer == b"" and 0.4 < seconds < 3


@pytest.mark.parametrize("part", ["X: " + "y" * 20_000, "X: y\r\n" * 4000])
def test_headers_have_a_size(port, part):
    with connected(port, GET + part) as raw:
        answer, _ = until_closed(raw)
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("before, piece", [("", "x" * 90 + ": y\r\n"), ("X: ", "y" * 100)])
def test_trailers_have_a_size(port, before, piece):
    with connected(port, CHUNKED + "1\r\nz\r\n0\r\n" + before) as raw, pytest.raises(ConnectionError):
        for _ in range(200):
            raw.sendall(10_000 * piece.encode())  # more than any socket's buffers


def test_bodies_of_large_chunks_and_with_trailers_are_taken(port):
    with connected(port) as raw:
        for _ in range(3):
            raw.sendall(f"{CHUNKED}{40_000:x}\r\n".encode())
            time.sleep(0.1)
            raw.sendall(b"z" * 40_000 + b"\r\n0\r\nX: y\r\n")
            time.sleep(0.1)
            raw.sendall(b"Y: z\r\n\r\n")
            received(raw, b"\r\n\r\n40000")


def test_a_body_may_take_its_time_and_requests_may_follow_each_other(port):
    with connected(port, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n") as raw:
        for _ in range(15):
            time.sleep(0.1)
            raw.sendall(b"z")
        received(raw, b"\r\n\r\n15")
        raw.sendall(2 * (GET + "\r\n").encode())  # both at once
        received(raw, b"\r\n\r\n0", answers=2)
        answer, _ = until_closed(raw)
        assert answer == b""


def test_what_comes_after_an_answer_is_bounded_too(port):
    """A body that nobody reads: the answer is there, and the rest dribbles."""
    with connected(port, "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n") as raw:
        raw.shutdown(socket.SHUT_WR)
        _, seconds = until_closed(raw)
    assert seconds < 3


def test_a_client_that_takes_nothing_is_left(port):
    with connected(port, "GET /many HTTP/1.1\r\nHost: x\r\n\r\n") as raw:
        time.sleep(2.5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := raw.recv(1 << 20):
                received += len(data)
    assert received < MANY  # what lay in the sockets' buffers


def test_a_client_that_takes_it_slowly_is_not(port):
    received = 0
    with connected(port, "GET /many HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as raw:
        started = time.monotonic()
        while data := raw.recv(1 << 20):
            received += len(data)
            time.sleep(max(0.0, started + 3 * received / MANY - time.monotonic()))
    assert received > MANY and time.monotonic() - started > 2.5


def test_one_too_many_is_closed_at_once(port, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 30.0)  # when any other would be
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connected(port))
        raw = stack.enter_context(connected(port))
        _, seconds = until_closed(raw)
        assert seconds < 10
    wait(lambda: _answers(port))


def _answers(port: int) -> bool:
    with connected(port, GET + "\r\n") as raw:
        try:
            return raw.recv(1000).startswith(b"HTTP/1.1 200 ")
        except ConnectionError:
            return False


CUTS = {"at once": [], "early": [5000], "at the bound": [10_000], "before the end": [-1], "in many": range(1, 9000, 50)}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("n_bytes, status", [(10_000, 200), (10_001, 431), (12_000, 431), (50_000, 431)])
def test_how_large_a_head_may_be_does_not_depend_on_how_it_arrives(port, n_bytes, status, cuts):
    """On a new connection, and on one kept alive; a busy server finds all of it in the socket at once."""
    ends = "X: ", "\r\n\r\n"
    head = GET + ends[0] + "y" * (n_bytes - len(GET + "".join(ends))) + ends[1]
    for before in ("", GET + "\r\n"):
        with connected(port, before) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if before:
                received(raw, b"\r\n\r\n0")
            at = 0
            with contextlib.suppress(ConnectionError):  # it may refuse what isn't yet complete
                for end in [*(cut % n_bytes for cut in cuts), n_bytes]:
                    raw.sendall(head[at:end].encode())
                    at = end
                    time.sleep(0.1 if len(cuts) == 1 and end < n_bytes else 0)
            try:
                answer = raw.recv(1000)
            except ConnectionError:  # a reset outruns the answer where more was sent than was read
                answer = b""
        assert answer.startswith(b"HTTP/1.1 %d " % status) or (status == 431 and not answer), answer[:100]
