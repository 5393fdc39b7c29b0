"""uvicorn's HTTP/1.1 with what it lacks against slow and greedy clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0  # from a connection's start, or the last answer's end, to the end of a request's headers
HEAD_BYTES = 1 << 16  # that a request's head may have
STALLED_S = 120.0  # without taking any of an answer that waits for it
MAX_CONNECTIONS = 1000


class BoundedHttp(HttpToolsProtocol):
    """A connection that is closed when its client is slow, greedy, or one too many.

    Headers have a deadline (then 408, or nothing where none has begun) and a size (431). Bodies are the application's;
    what may come after a chunked one is dropped, and a connection with too much of it is closed.
    """

    _head: int | None = None  # bytes so far of the headers that are coming
    _chunk: int | None = None  # bytes so far after a chunk's size, unless of its body: trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._start("head", HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, in pieces that end where a head would be too large: how it arrives doesn't matter.

        A head that comes behind another request counts from where its piece begins, at most 16 kB earlier.
        """
        at = 0
        while at < len(data) and not self.transport.is_closing():
            end = at + (HEAD_BYTES // 4 if self._head is None else HEAD_BYTES - self._head)
            self._read(data[at:end])
            at = end

    def _read(self, data: bytes) -> None:
        if self._chunk is not None:
            self._chunk += len(data)
        super().data_received(data)
        if self._chunk is not None and self._chunk > HEAD_BYTES:
            self._close()
        if self._head is not None:
            self._head += len(data)
            if self._head >= HEAD_BYTES:  # and isn't complete
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Begin a request's headers."""
        self._head = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, and no trailer."""
        if self._head is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin its answer."""
        self._head = None
        self._stop("head")
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Begin a chunk; the last has trailers in place of a body."""
        self._chunk = 0

    def on_body(self, body: bytes) -> None:
        """Pass it on."""
        self._chunk = None
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        """End it."""
        self._chunk = None

    def on_response_complete(self) -> None:
        """End it."""
        another = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._start("taking", STALLED_S, self.transport.abort)
        elif not another:
            self._start("head", HEAD_S, self._late)

    def pause_writing(self) -> None:
        """Wait for the client to take what was sent."""
        self._start("taking", STALLED_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        if not self.transport.is_closing():
            self._stop("taking")
        super().resume_writing()

    def _late(self) -> None:
        if self._head is None:
            self._close()
        else:
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else it would get into another request's answer
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self._close()

    def _close(self) -> None:
        self.transport.close()  # what is written is sent first, if it is taken
        self._start("taking", STALLED_S, self.transport.abort)

    def _start(self, name: str, seconds: float, function: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, function)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def server(app: ASGIApp, keep_alive_s: int = 30, shutdown_s: int = 15) -> uvicorn.Server:
    """Return uvicorn with such connections, for `serve(sockets=[…])`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=keep_alive_s,
            timeout_graceful_shutdown=shutdown_s,
        )
    )


def guard_serve_proxy() -> list[Any]:
    """Give Ray Serve's proxies such connections, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttp.__name__}"
    return []  # of middlewares
