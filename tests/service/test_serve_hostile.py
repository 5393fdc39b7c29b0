"""Hundreds of bad requests: each gets an answer of 4xx that says why, at once, and nothing else happens."""

import contextlib
import gzip
import http.client
import io
import os
import random
import socket
import struct
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import schemathesis
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from avsep import media
from tests.support.processes import descendants
from tests.support.serving import RayService, Server, serving, wait, write_model, write_sound, write_video

N_FUZZED = 120
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SECRET = "the-secret-of-another-file"


LIMITS = {"max_upload_bytes": 4_000_000, "max_duration_s": 20.0, "max_pixels": 640 * 480, "decode_timeout_s": 20.0}


@pytest.fixture(scope="module", params=["application", pytest.param("ray", marks=pytest.mark.slow)])
def server(request, tmp_path_factory) -> Iterator[Server | RayService]:
    """The application alone, and as it is started, on Ray."""
    folder = tmp_path_factory.mktemp("service")
    with contextlib.ExitStack() as stack:
        if request.param == "ray":
            running: Server | RayService = stack.enter_context(contextlib.closing(RayService(folder, 60, **LIMITS)))
            pid = running.process.pid
        else:
            running = stack.enter_context(serving(folder, write_model(folder / "model"), workers=2, **LIMITS))
            pid = os.getpid()
        yield running
        wait(running.idle)
        assert not [title for title in descendants(pid).values() if title.split(" ")[0].endswith("ffmpeg")]


@pytest.fixture(scope="module")
def canary() -> Iterator[tuple[int, list[bytes]]]:
    """A server on loopback that nobody may ask, and what it was asked."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            asked.append(connection.recv(1000))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield listener.getsockname()[1], asked
    listener.close()


def send(server: Server | RayService, content: bytes, name: str = "x.mp4", **fields: str) -> httpx.Response:
    return server.client.post("/v1/separations", files={"file": (name, content)}, data=fields, timeout=60)


def refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
    body = answer.json()
    assert body["detail"] and "/tmp" not in answer.text and SECRET not in answer.text and "Traceback" not in answer.text


# ------------------------------------------------------------------------------------- requests


OPERATIONS = [
    *(
        f"GET /v1/separations/{{job_id}}{tail}"
        for tail in ("", "/relation", "/relation.png", "/frame.png", "/archive.zip", "/edits", "/locations", "/mix")
    ),
    *(
        f"GET /v1/separations/{{job_id}}{tail}"
        for tail in ("/tracks/{track}.{kind}", "/bases/{basis}.wav", "/mix.{kind}")
    ),
    "PATCH /v1/separations/{job_id}",
    "DELETE /v1/separations/{job_id}",
    "POST /v1/separations",
    "GET /v1/examples/{name}",
    *(f"GET {path}" for path in ("/v1/objects", "/v1/model", "/v1/examples", "/healthz", "/metrics")),
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_the_openapi_allows_and_what_it_does_not(server, operation, mode):
    """Generated requests get answers that the OpenAPI document describes; bad ones 4xx."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    assert {o.ok().label for o in document.get_all_operations()} == set(OPERATIONS)
    described = document.find_operation_by_label(operation)
    quiet = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    asked = 0

    @settings(max_examples=20, **quiet)
    @given(case=described.as_strategy(generation_mode=mode))
    def ask(case) -> None:
        nonlocal asked
        asked += 1
        response = case.call(timeout=60)
        assert response.status_code < 500, f"{case.as_curl_command()}: {response.text}"
        case.validate_response(response, checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # some have no wrong parameters
        ask()
    assert asked or mode == GenerationMode.NEGATIVE


METHODS = ("PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND")


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_there_are_not(server, method):
    for path in ("/v1/separations", "/v1/objects", "/", "/metrics"):
        answer = server.client.request(method, path)
        assert answer.status_code == 405 and answer.headers["content-type"] == "application/problem+json"


RAW = [
    b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/separations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /static/%2e%2e/jobs.py HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/examples/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
]


@pytest.mark.parametrize("number", range(len(RAW)))
def test_raw_bytes(server, number):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(RAW[number])
        raw.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while data := raw.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert server.client.get("/healthz").status_code == 200


# ---------------------------------------------------------------------------------------- forms

NAMES = [
    "../../../../tmp/escaped.mp4", "..\\..\\escaped.mp4", "/etc/passwd", "a\0b.mp4", "x" * 5000, "", ".", "..",
    "con.mp4", "%2e%2e%2fescaped", "job.json", "-i", "concat:a|b", "http://127.0.0.1/", "$(touch escaped)", "‮4pm.exe",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_file_names_mean_nothing(server, tmp_path, number):
    before = set(Path("/tmp").iterdir())
    body = b'--b\r\nContent-Disposition: form-data; name=file; filename="' + NAMES[number].encode() + b'"\r\n\r\n'
    body += write_sound(tmp_path / "x.wav", 1).read_bytes() + b"\r\n--b--\r\n"
    answer = server.client.post(
        "/v1/separations", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code in (201, 400), answer.text  # the very long one has too large a header
    new = {p.name for p in set(Path("/tmp").iterdir()) - before}
    assert not [n for n in new if "escaped" in n]
    assert not list(tmp_path.glob("**/escaped*"))


def _forms() -> list[tuple[str, bytes]]:
    part = b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nabc\r\n"
    end = b"--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    return [
        ("text/plain", b"abc"),
        ("application/x-www-form-urlencoded", b"file=abc"),
        ("application/json", b"{" * 10000),
        ("multipart/form-data", part + end),
        ("multipart/form-data; boundary=", part + end),
        ("multipart/form-data; boundary=" + "b" * 10000, part + end),
        ('multipart/form-data; boundary="é"', part + end),
        ("multipart/mixed; boundary=b", part + end),
        (kind, part),
        (kind, end),
        (kind, part * 2 + end),
        (kind, b"--b\r\n" + b"A: b\r\n" * 1000 + b"\r\nabc\r\n" + end),
        (kind, b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n" + end),
        (kind, b"--b\r\nContent-Disposition: form-data; name=\xff\xfe\r\n\r\nabc\r\n" + end),
        (kind, b"--b\r\nContent-Disposition: form-data; name=objects\r\n\r\n\xff\xfe\r\n" + end),
        (kind, b"".join(b"--b\r\nContent-Disposition: form-data; name=o%d\r\n\r\nx\r\n" % i for i in range(100)) + end),
        (kind, b"--b\r\nContent-Disposition: form-data; name=objects\r\n\r\n" + b"dog," * 5000 + b"\r\n" + end),
        (kind, b"--b\r\nContent-Disposition: form-data; name=" + b"f" * 20000 + b"\r\n\r\nabc\r\n" + end),
        (kind, b"--b\n\nabc\n--b--\n"),
        (kind, b"\r\n" * 1000),
        (kind, os.urandom(10000)),
    ]


@pytest.mark.parametrize("number", range(len(_forms())))
def test_bodies_that_are_no_form(server, number):
    kind, body = _forms()[number]
    refused(server.client.post("/v1/separations", content=body, headers={"Content-Type": kind.encode()}))


# ---------------------------------------------------------------------------------------- media


def playlists(port: int, secret: Path) -> dict[str, bytes]:
    """Files that ask a decoder to open others."""
    url, file = f"http://127.0.0.1:{port}/x", f"file://{secret}"
    hls = "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "hls-http.m3u8": hls.format(url).encode(),
        "hls-file.m3u8": hls.format(file).encode(),
        "hls-path.m3u8": hls.format(secret).encode(),
        "hls-concat.m3u8": hls.format(f"concat:{url}|{file}").encode(),
        "hls-as-video.mp4": hls.format(url).encode(),
        "hls-key.m3u8": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:1,\n{url}\n'.encode(),
        "hls-subfile.m3u8": hls.format(f"subfile,,start,0,end,64,,:{secret}").encode(),
        "hls-gopher.m3u8": hls.format(f"gopher://127.0.0.1:{port}/x").encode(),
        "hls-tcp.m3u8": hls.format(f"tcp://127.0.0.1:{port}").encode(),
        "hls-data.m3u8": hls.format("data:audio/wav;base64,UklGRg==").encode(),
        "list.ffconcat": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "list-http.ffconcat": f"ffconcat version 1.0\nfile '{url}'\n".encode(),
        "session.sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio {port} RTP/AVP 0\n".encode(),
        "manifest.mpd": (
            f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
            f'<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>"
        ).encode(),
        "list.pls": f"[playlist]\nFile1={url}\nNumberOfEntries=1\n".encode(),
        "list.asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>'.encode(),
        "list.xspf": f'<playlist xmlns="http://xspf.org/ns/0/"><trackList><track><location>{url}</location>'
        f"</track></trackList></playlist>".encode(),
        "subtitle.srt": f"1\n00:00:00,000 --> 00:00:10,000\n<img src='{url}'>\n".encode(),
        "subtitle.ass": f"[Script Info]\n[Events]\nDialogue: 0,0:00:00.00,0:00:09.00,,,,,,,{secret}\n".encode(),
        "subtitle.idx": f"# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 0\n# {secret}"
        "".encode(),
        "script.avs": f'DirectShowSource("{url}")'.encode(),
        "movie.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>'.encode(),
        "image%03d.jpg": b"\xff\xd8\xff",
        "ref.mov": quicktime_reference(url),
        "ref-file.mov": quicktime_reference(file),
    }


def quicktime_reference(url: str) -> bytes:
    """A QuickTime movie that is but a reference to another."""

    def atom(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    text = url.encode() + b"\0"
    reference = atom(b"rdrf", b"\0\0\0\0url " + struct.pack(">I", len(text)) + text)
    return atom(b"ftyp", b"qt  \0\0\0\0qt  ") + atom(b"moov", atom(b"rmra", atom(b"rmda", reference)))


PLAYLISTS = sorted(playlists(0, Path("/x")))


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_file_opens_no_other(server, canary, tmp_path, name):
    port, asked = canary
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, np.ones(8000, np.float32) / 2, 8000)
    (tmp_path / "secret.txt").write_text(SECRET)
    for target in (secret, tmp_path / "secret.txt"):
        refused(send(server, playlists(port, target)[name], name))
    assert asked == []


def test_a_movies_data_reference_is_not_followed(server, tmp_path):
    """An MP4 whose samples lie in another file: the alias in its `dref` names it."""
    video = write_video(tmp_path / "x.mp4", 1).read_bytes()
    assert b"url \0\0\0\1" in video
    secret = write_sound(tmp_path / "secret.wav", 1)
    named = video.replace(b"url \0\0\0\1", b"alis\0\0\0\0")
    answer = send(server, named + str(secret).encode())
    assert answer.status_code == 201 or 400 <= answer.status_code < 500


def bombs(tmp_path: Path) -> dict[str, bytes]:
    """Small files of large pictures, long sounds and deep archives."""

    def ffmpeg(name: str, *arguments: str) -> bytes:
        path = tmp_path / name
        subprocess.run([media.ffmpeg_executable(), "-y", "-loglevel", "error", *arguments, str(path)], check=True)
        return path.read_bytes()

    large = "color=size=8000x8000:rate=1:duration=2"
    h264 = ["-c:v", "libx264", "-preset", "ultrafast"]
    sound = ["-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono", "-shortest"]
    header = bytearray(write_sound(tmp_path / "w.wav", 1).read_bytes())
    header[24:28] = struct.pack("<I", 1)  # one sample a second: hours of it
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", b"\0" * 50_000_000)
    return {
        "pixels.mp4": ffmpeg("pixels.mp4", "-f", "lavfi", "-i", large, *sound, *h264),
        "pixels.mkv": ffmpeg("pixels.mkv", "-f", "lavfi", "-i", large, *sound, "-c:v", "ffv1"),
        "pixels.png": ffmpeg("pixels.png", "-f", "lavfi", "-i", large, "-frames:v", "1"),
        "long.flac": ffmpeg("long.flac", "-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono:d=7200"),
        "slow.wav": bytes(header),
        "zip.zip": buffer.getvalue(),
        "gzip.gz": gzip.compress(b"\0" * 50_000_000),
    }


def test_bombs_do_not_go_off(server, tmp_path):
    for content in bombs(tmp_path).values():
        assert len(content) < 4_000_000
        refused(send(server, content))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("sources")
    video = write_video(folder / "x.mp4", 2)
    found = [video.read_bytes(), write_sound(folder / "x.wav", 2).read_bytes()]
    for name, codec in (
        ("x.mkv", ["-c", "copy"]),
        ("x.avi", ["-c:v", "mjpeg", "-c:a", "pcm_s16le"]),
        ("x.ogg", ["-vn"]),
    ):
        command = [media.ffmpeg_executable(), "-y", "-loglevel", "error", "-i", str(video), *codec, str(folder / name)]
        subprocess.run(command, check=True)
        found.append((folder / name).read_bytes())
    return found


@pytest.mark.parametrize("number", range(N_FUZZED))
def test_damaged_media(server, sources, number):
    """Truncated, overwritten, with pieces doubled or dropped: a result or 4xx, and never the time for more."""
    rng = random.Random(number)
    data = bytearray(sources[number % len(sources)])
    kind = number // len(sources) % 4
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        for _ in range(rng.choice((3, 30, 300))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        start = rng.randrange(min(4000, len(data)))
        data[start : start + rng.randrange(400)] = os.urandom(rng.randrange(1, 400))
    else:
        start = rng.randrange(len(data))
        piece = data[start : start + rng.randrange(5000)]
        data[start:start] = piece * rng.choice((0, 1, 50))
    answer = send(server, bytes(data))
    if answer.status_code != 201:
        refused(answer)


def test_it_still_works_after_all_that(server, tmp_path):
    assert send(server, write_sound(tmp_path / "x.wav", 2).read_bytes()).status_code == 201
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
