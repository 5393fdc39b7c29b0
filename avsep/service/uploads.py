"""What clients send: multipart bodies straight to a file, bounded while they come; URLs, where allowed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import math
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from avsep import storage

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 8192
_MAX_REDIRECTS = 3
_CHUNK_BYTES = 1 << 18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # as 6to4's, they lead to the IPv4 address within
_SILENCE_S = 20.0  # of a server, before it is given up


class BadUpload(Exception):
    """A body that can't be used, with the HTTP status that says so."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(eq=False)
class _Upload:
    client: str
    started: float
    timeout: asyncio.Timeout
    received: int = 0
    whole: bool = False

    def rate(self, now: float) -> float:
        """Bytes a second; what has only begun is not yet slow, what is whole no longer."""
        return math.inf if self.whole else self.received / max(1.0, now - self.started)


class Uploads:
    """The unfinished uploads: so many together, so many of a client, and each at a least rate.

    `grace_s` goes by before the first byte has to be there. From then on each byte buys the time that it takes at
    the least rate, up to three times `grace_s` ahead. Where there is no room for one more, the
    slowest makes it, if it is below the least rate: who sends a byte now and then keeps nobody out.
    """

    def __init__(self, most: int, most_of_client: int, least_rate: float, grace_s: float, max_s: float) -> None:
        self._most, self._most_of_client = most, most_of_client
        self._least_rate, self._grace_s, self._max_s = least_rate, grace_s, max_s
        self._uploads: set[_Upload] = set()

    def __len__(self) -> int:
        return len(self._uploads)

    @contextlib.asynccontextmanager
    async def take(self, client: str, body: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the body as it comes. BadUpload: 429 or 503 for one too many, 408 for one too slow.

        An upload counts until the block ends. A client "" is one that isn't known.
        """
        now = time.monotonic()
        if client:
            self._make_room([u for u in self._uploads if u.client == client], self._most_of_client, now, 429)
        self._make_room([*self._uploads], self._most, now, 503)
        upload = None
        try:
            async with asyncio.timeout(min(self._grace_s, self._max_s)) as timeout:
                upload = _Upload(client, now, timeout)
                self._uploads.add(upload)
                yield self._counted(upload, body)
        except TimeoutError:
            raise BadUpload(408, self._too_slow(now)) from None
        finally:
            self._uploads.discard(upload)

    def _make_room(self, among: list[_Upload], most: int, now: float, status: int) -> None:
        if len(among) < most:
            return
        slowest = min(among, key=lambda u: u.rate(now))
        if slowest.rate(now) >= self._least_rate or now - slowest.started < min(1.0, self._grace_s):
            whose = "of yours " if status == 429 else ""
            raise BadUpload(
                status, f"{len(among)} uploads {whose}are under way, no more are taken now; try again later"
            )
        self._uploads.discard(slowest)
        slowest.timeout.reschedule(0.0)

    async def _counted(self, upload: _Upload, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        until = upload.started + self._grace_s
        offset = asyncio.get_running_loop().time() - time.monotonic()
        async for chunk in body:
            now = time.monotonic()
            upload.received += len(chunk)
            until = min(max(until, now) + len(chunk) / self._least_rate, now + 3 * self._grace_s)
            if upload in self._uploads:  # else its time is over
                upload.timeout.reschedule(offset + min(until, upload.started + self._max_s))
            yield chunk
        upload.whole = True
        if upload in self._uploads:
            upload.timeout.reschedule(None)

    def _too_slow(self, started: float) -> str:
        if time.monotonic() - started >= self._max_s:
            return f"the upload took longer than {self._max_s:g} s"
        return f"the upload is too slow: below {self._least_rate / 1000:g} kB/s"


def client_of(address: str) -> str:
    """Name the client at an address: an IPv6 one has a whole /64 to itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)


async def receive_multipart(
    body: AsyncIterator[bytes], content_type: str, target: Path, max_bytes: int
) -> dict[str, list[str]]:
    """Write the part named `file` to `target` as it comes, and return the other fields.

    Memory doesn't depend on the size; file names are never looked at. Raises BadUpload: 415 for
    another content type, 400 for a body that is no multipart, 413 for more than `max_bytes`.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise BadUpload(415, "send multipart/form-data, with the video or sound as its field 'file'")
    if not options.get(b"boundary"):
        raise BadUpload(400, "the content type names no boundary")
    with _Form(target, max_bytes) as form:
        try:
            parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]
            async for chunk in body:
                if chunk:
                    parser.write(chunk)
            parser.finalize()
        except (FormParserError, UnicodeDecodeError) as error:
            raise BadUpload(400, f"the body is no valid multipart/form-data: {str(error)[:200]}") from None
        if not form.complete:
            raise BadUpload(400, "the body ends before its last boundary")
    return form.fields


class _Form:
    """What a multipart parser reports, as it goes."""

    def __init__(self, target: Path, max_bytes: int) -> None:
        self.fields: dict[str, list[str]] = {}
        self.complete = False
        self._target, self._max_bytes = target, max_bytes
        self._file: IO[bytes] | None = None
        self._received = 0
        self._name = ""
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._value = bytearray()

    def __enter__(self) -> _Form:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Return what `MultipartParser` calls."""
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        return {f"on_{n}": getattr(self, f"_{n}") for n in (*names, "headers_finished", "end")}

    def _part_begin(self) -> None:
        self._header = (bytearray(), bytearray())
        self._disposition, self._value = b"", bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode()
        if self._name == "file":
            if self._file is not None:
                raise BadUpload(400, "there is more than one 'file'; send one a request")
            self._file = self._target.open("xb")
        elif sum(map(len, self.fields.values())) >= _MAX_FIELDS:
            raise BadUpload(400, f"there are more than {_MAX_FIELDS} fields")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            assert self._file is not None
            self._received += end - start
            if self._received > self._max_bytes:
                raise BadUpload(413, _too_many(self._max_bytes))
            self._file.write(memoryview(data)[start:end])
        else:
            self._value.extend(data[start:end])
            if len(self._value) > _MAX_FIELD_BYTES:
                raise BadUpload(413, f"the field {self._name[:40]!r} has more than {_MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if self._name == "file":
            assert self._file is not None
            self._file.flush()
        else:
            self.fields.setdefault(self._name, []).append(self._value.decode())

    def _end(self) -> None:
        self.complete = True


def public_addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """Resolve a host; BadUpload (422) unless every address it has is a public one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise BadUpload(422, "the URL's host has no address") from None
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) % 2**32) if ip in _NAT64 else ip)
        if not ip.is_global or ip.is_multicast:
            raise BadUpload(422, "the URL's host is not a public address")
    return found


def download(
    url: str,
    target: Path,
    max_bytes: int,
    timeout_s: float,
    resolve: Callable[[str, int], list[tuple[Any, ...]]] = public_addresses,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Fetch an `http:` or `https:` URL into a file.

    The connection goes to the very address that was checked, so a name can't resolve to another one in between. Each
    redirect is checked the same way, and no proxy is asked. Raises BadUpload:
    422 for what is not allowed or not there, 413 for more than `max_bytes`; OSError for a full disk.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            location = _get(url, target, max_bytes, deadline, resolve, step)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in storage.FULL:
                raise
            raise BadUpload(422, "the URL can't be fetched") from None
        if location is None:
            return
        url = urllib.parse.urljoin(url, location)
    raise BadUpload(422, f"the URL redirects more than {_MAX_REDIRECTS} times")


def _get(
    url: str,
    target: Path,
    max_bytes: int,
    deadline: float,
    resolve: Callable[[str, int], list[tuple[Any, ...]]],
    step: Callable[[], None],
) -> str | None:
    """Fetch one URL to the file, or return where it redirects to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise BadUpload(422, "the URL must be http:// or https://, without a user")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    family, kind, protocol, _, address = resolve(parts.hostname, port)[0]
    connection = http.client.HTTPConnection(parts.hostname, port)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(socket.socket(family, kind, protocol))
        raw.settimeout(max(0.1, min(_SILENCE_S, deadline - time.monotonic())))
        raw.connect(address)
        connection.sock = raw
        channels = [raw]
        end = threading.Timer(max(0.1, deadline - time.monotonic()), _shut, [channels])
        end.daemon = True
        end.start()  # a server that sends a byte now and then would outwit the socket's own
        stack.callback(end.cancel)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
            channels.append(connection.sock)
        stack.enter_context(connection.sock)
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"Accept": "video/*, audio/*, */*;q=0.1", "User-Agent": "avsep"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
            return str(response.headers["Location"])
        if response.status != 200:
            raise BadUpload(422, f"the URL's server answers {response.status}")
        if response.length is not None and response.length > max_bytes:
            raise BadUpload(413, _too_many(max_bytes))
        received = 0
        with target.open("wb") as file:
            while data := response.read1(_CHUNK_BYTES):
                received += len(data)
                if received > max_bytes:
                    raise BadUpload(413, _too_many(max_bytes))
                step()
                file.write(data)
        if time.monotonic() >= deadline:
            raise BadUpload(422, "the URL's server is too slow")
        if response.length:
            raise BadUpload(422, "the URL's server closed the connection before the end")
    return None


def _too_many(max_bytes: int) -> str:
    return (
        f"the file has more than {max_bytes} bytes ({max_bytes / 2**20:.4g} MB), the most that this service takes; "
        "send a smaller version, or its sound alone"
    )


def _shut(channels: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        channels[-1].shutdown(socket.SHUT_RDWR)
