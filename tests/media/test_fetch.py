"""yt-dlp itself against a server on loopback that misbehaves on purpose; real media; a clock of our own."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from avsep import media
from avsep.factors import ExtractionConfig
from avsep.fetching import (
    EgressBudget,
    EgressIdentity,
    FetchOptions,
    FetchResult,
    Lease,
    MediaStore,
    Stop,
    Stopped,
    TokenBucket,
    Wait,
    check_tools,
    classify,
    fetch,
    find_media,
    identities,
    open_store,
    several_of,
    store_path,
    within,
    ytdlp,
)
from avsep.fetching.sources import forms, is_fetched, is_remote, origin, url_of
from avsep.media import cut
from avsep.records import ClipError, Reason, Segment, validate
from avsep.sites import SITES, Site
from avsep.stages import decode
from tests.support.processes import alive, children, own_children

pytest.importorskip("yt_dlp")

LENGTH_S = 8
RATE = 48_000
SOUND = f"aevalsrc='0.4*sin(2*PI*(150+40*t)*t)|0.2*random(0)':s={RATE}:d={LENGTH_S}"
GREY = "geq=lum='16+2*mod(N,100)':cb=128:cr=128"  # tells the frame's number
PICTURE = f"color=s=64x48:r=25:d={LENGTH_S},format=yuv420p,{GREY}"
X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-threads", "1"]


def run_ffmpeg(*arguments: str | Path) -> None:
    command = [media.ffmpeg_executable(), "-y", "-v", "error", "-nostdin", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media to serve; `film.mp4` is eight seconds, index first, 3.2 s between key frames."""
    www = tmp_path_factory.mktemp("www")
    film, sound = ("-f", "lavfi", "-i", PICTURE), ("-f", "lavfi", "-i", SOUND)
    run_ffmpeg(*film, *sound, *X264, "-g", "80", "-c:a", "aac", "-movflags", "+faststart", www / "film.mp4")
    run_ffmpeg(*sound, "-c:a", "libopus", "-b:a", "128k", www / "song.webm")
    for name, width in (("small.mp4", 64), ("large.mp4", 800)):  # for the manifest below
        scaled = ("-vf", f"scale={width}:-2")
        run_ffmpeg(*film, *scaled, *X264, "-an", "-movflags", "+faststart", www / name)
    for name, rate in (("thin.m4a", "32k"), ("rich.m4a", "160k")):
        run_ffmpeg(*sound, "-c:a", "aac", "-b:a", rate, "-movflags", "+faststart", www / name)
    sets = []
    for kind, ext, entries in (
        (
            "video",
            "mp4",
            (("small", 'width="64" height="48"', 50_000), ("large", 'width="800" height="600"', 1_000_000)),
        ),
        (
            "audio",
            "m4a",
            (("thin", 'audioSamplingRate="48000"', 32_000), ("rich", 'audioSamplingRate="48000"', 160_000)),
        ),
    ):
        codec = "avc1.42c00b" if kind == "video" else "mp4a.40.2"
        sets.append(f'<AdaptationSet mimeType="{kind}/mp4">')
        for name, more, bandwidth in entries:
            sets.append(
                f'<Representation id="{name}" codecs="{codec}" bandwidth="{bandwidth}" {more}>'
                f"<BaseURL>{name}.{ext}</BaseURL></Representation>"
            )
        sets.append("</AdaptationSet>")
    (www / "both.mpd").write_text(
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        f' mediaPresentationDuration="PT{LENGTH_S}S"><Period>{"".join(sets)}</Period></MPD>'
    )
    return www


class Server:
    """Serves `files`; the first part of a path says how: `/stall/film.mp4`."""

    types: ClassVar = {".mp4": "video/mp4", ".webm": "audio/webm", ".m4a": "audio/mp4", ".mpd": "application/dash+xml"}

    def __init__(self, files: Path) -> None:
        server = self
        self.requests: list[str] = []
        self.cookies: list[str | None] = []
        self.seen: Counter[str] = Counter()
        self.stop = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                server.cookies.append(self.headers.get("Cookie"))
                with contextlib.suppress(ConnectionError):
                    server.answer(self, files)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{path}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler, files: Path) -> None:
        path = handler.path.removeprefix("http://video.invalid")  # this is its proxy, too
        how, _, name = path.strip("/").partition("/")
        name = name.partition("?")[0]
        self.seen[handler.path] += 1
        if how.isdigit() or (how.startswith("later") and self.seen[handler.path] <= 1):
            handler.send_error(int(how.removeprefix("later")))
            return
        if how == "loop":
            handler.send_response(302)
            handler.send_header("Location", handler.path)
            handler.end_headers()
            return
        data = (files / name).read_bytes() if name else b""
        kind = self.types.get(Path(name).suffix, "application/octet-stream")
        if how == "about":  # a page that says how long its video is
            about = {"@context": "https://schema.org", "@type": "VideoObject", "name": "film"}
            about |= {"duration": f"PT{LENGTH_S}S", "contentUrl": self.url("ok/film.mp4")}
            said = json.dumps(about)
            data = f'<!DOCTYPE html><script type="application/ld+json">{said}</script>'.encode()
            kind = "text/html"
        if how == "page":
            data, kind = b"<!DOCTYPE html><html><body>Please wait</body></html>", "text/html"
        if how == "html":
            data = b"<!DOCTYPE html><html><body>Please wait</body></html>" * 50
        if how == "empty":
            data = b""
        first, last = 0, len(data) - 1
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if wanted and data:
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            handler.send_response(200)
        body = data[first : last + 1]
        handler.send_header("Content-Type", kind)
        if how not in ("short", "flood"):
            handler.send_header("Content-Length", str(len(body) + 1000 * (how == "wrong")))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if how == "short" or (how in ("half", "once") and (how == "half" or self.seen[handler.path] <= 2)):
            body = body[: len(body) // 2]
        if how == "flood":
            while not self.stop.is_set():
                handler.wfile.write(bytes(1 << 16))
        if how == "drip":
            for start in range(0, len(body), 1000):
                handler.wfile.write(body[start : start + 1000])
                if self.stop.wait(0.2):
                    return
        elif how == "stall":
            handler.wfile.write(body[:5000])
            handler.wfile.flush()
            self.stop.wait(60)
        else:
            handler.wfile.write(body)

    def close(self) -> None:
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope="module", autouse=True)
def no_proxy_to_loopback() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture
def server(files: Path) -> Iterator[Server]:
    running = Server(files)
    yield running
    running.close()


@pytest.fixture
def options(tmp_path: Path) -> FetchOptions:
    return FetchOptions(
        attempts=1, backoff_s=0.01, timeout_s=60, socket_timeout_s=1, work_folder=str(tmp_path / "work")
    )


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def budget() -> EgressBudget:
    return EgressBudget([EgressIdentity("here")], per_hour=1e6, burst=100)


def segment(url: str, start_s: float = 2.0, end_s: float | None = 4.0, name: str = "a") -> Segment:
    return Segment(name, url, start_s, end_s, labels=("violin",))


def failure(segment: Segment, store: str, options: FetchOptions, allowed: EgressBudget | None = None) -> ClipError:
    with pytest.raises(ClipError) as caught:
        fetch(segment, store, allowed or budget(), options)
    assert caught.value.detail and "\n" not in caught.value.detail
    nothing_left(store, options)
    return caught.value


def nothing_left(store: str, options: FetchOptions) -> None:
    """No file in the store, no work folder, no process of ours."""
    assert [p for p in Path(store).rglob("*") if p.is_file()] == []
    assert [p for p in Path(str(options.work_folder)).rglob("*") if p.is_file()] == []
    assert not own_children()


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# What is stored


def test_excerpt_is_exact_and_cached(files: Path, server: Server, store: str, options: FetchOptions) -> None:
    wanted = segment(server.url("ok/film.mp4"), 3.3, 6.3, name="-a_B-c_3300")
    validate(wanted)
    first = fetch(wanted, store, budget(), options)
    assert first.path == store_path(store, "-a_B-c_3300") and first.path.endswith("/-a_B-c_3300.mkv")
    assert first.bytes == (files / "film.mp4").stat().st_size and first.identity == "here"
    stored = media.decode(Path(first.path))
    source = media.decode(files / "film.mp4", 3.3, 6.3)
    np.testing.assert_allclose(stored.waveform, source.waveform, atol=2**-15)
    assert stored.images.shape == source.images.shape == (3, 256, 341, 3)
    assert np.abs(stored.images.astype(int) - source.images).max() <= 2  # grey levels of frames are 2 apart
    assert np.abs(np.diff(stored.images.mean((1, 2, 3)))).min() > 20
    assert [p.name for p in Path(store).rglob("*") if p.is_file()] == ["-a_B-c_3300.mkv"]
    assert not own_children()

    requests = len(server.requests)
    server.close()
    none_left = EgressBudget([EgressIdentity("here")], per_hour=1e-3)
    none_left.acquire()
    assert fetch(wanted, store, none_left, options) == FetchResult(first.path)
    assert len(server.requests) == requests
    assert find_media(store, [replace(wanted, source="youtube:abcdefghijk")]) == {"-a_B-c_3300": first.path}
    for end_s in (6.3, None):
        assert within(replace(wanted, end_s=end_s), first.path) == Segment(
            wanted.segment_id, first.path, 0.0, None, labels=("violin",)
        )


def test_the_same_download_gives_the_same_bytes(files: Path, tmp_path: Path) -> None:
    for name in ("a.mkv", "b.mkv"):
        cut([files / "film.mp4"], 1.0, 2.5, tmp_path / name)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_small_picture_and_best_sound_from_apart(
    files: Path, server: Server, store: str, options: FetchOptions
) -> None:
    result = fetch(segment(server.url("ok/both.mpd"), 1.5, 3.5), store, budget(), options)
    loaded = {Path(path).name for path in server.requests}
    assert loaded == {"both.mpd", "small.mp4", "rich.m4a"}
    stored = media.decode(Path(result.path))
    np.testing.assert_allclose(stored.waveform, media.decode(files / "rich.m4a", 1.5, 3.5).waveform, atol=2**-15)
    np.testing.assert_array_equal(
        np.rint(stored.images.mean((1, 2, 3)) * 219 / 510), [25 * 2, 25 * 3]
    )  # the frames shown 0.5 and 1.5 s in


def test_large_pictures_are_made_smaller(files: Path, tmp_path: Path) -> None:
    cut([files / "large.mp4", files / "thin.m4a"], 1.0, 1.5, tmp_path / "out.mkv")
    info = media.probe(tmp_path / "out.mkv")
    assert (info.width, info.height) == (480, 360)


def test_sound_alone(files: Path, server: Server, store: str, options: FetchOptions) -> None:
    result = fetch(segment(server.url("ok/song.webm"), 0.0, 2.0), store, budget(), options)
    stored = media.decode(Path(result.path))
    assert len(stored.images) == 0 and len(stored.waveform) == 2 * RATE
    np.testing.assert_allclose(stored.waveform, media.decode(files / "song.webm", 0.0, 2.0).waveform, atol=2**-15)


def test_an_excerpt_that_goes_past_the_end_is_shorter(files: Path, tmp_path: Path) -> None:
    cut([files / "film.mp4"], 6.0, 16.0, tmp_path / "out.mkv")
    assert abs(len(media.decode(tmp_path / "out.mkv").waveform) / RATE - 2) < 0.05
    with pytest.raises(ClipError, match="truncated"):  # unless the site says that there is more
        cut([files / "film.mp4"], 6.0, 16.0, tmp_path / "again.mkv", said_s=30.0)
    with pytest.raises(ClipError, match="truncated"):
        cut([files / "film.mp4"], 9.0, 16.0, tmp_path / "once_more.mkv", said_s=30.0)


def test_an_excerpt_of_a_file_whose_subtitles_outlast_it(files: Path, tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:30,000\nlast\n")
    run_ffmpeg("-i", files / "film.mp4", "-i", tmp_path / "a.srt", "-c", "copy", "-c:s", "srt", tmp_path / "text.mkv")
    assert media.probe(tmp_path / "text.mkv").duration_s == 30.0
    cut([tmp_path / "text.mkv"], 6.0, 16.0, tmp_path / "out.mkv")
    assert abs(len(media.decode(tmp_path / "out.mkv").waveform) / RATE - 2) < 0.05


def test_an_excerpt_of_sound_that_changes(files: Path, tmp_path: Path) -> None:
    film = ["-i", files / "film.mp4", "-t", "3", "-c:v", "copy", "-c:a", "aac"]
    run_ffmpeg(*film, "-ac", "1", tmp_path / "one.ts")
    run_ffmpeg(*film, "-ac", "2", "-output_ts_offset", "3", tmp_path / "two.ts")
    (tmp_path / "both.ts").write_bytes((tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes())
    cut([tmp_path / "both.ts"], 1.0, 5.0, tmp_path / "out.mkv")
    stored = media.decode(tmp_path / "out.mkv")
    assert len(stored.waveform) == 4 * RATE and len(stored.images) == 4
    source = media.decode(tmp_path / "both.ts", 1.0, 5.0)
    np.testing.assert_allclose(stored.waveform, source.waveform, atol=2**-15)
    assert not list(tmp_path.glob("*.wav"))


def test_pictures_at_fault_are_named(files: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.mp4"
    run_ffmpeg("-i", files / "film.mp4", "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=14", odd)
    with pytest.raises(ClipError, match="unreadable: the pictures can't be used"):
        cut([odd], 1.0, 3.0, tmp_path / "out.mkv")


# What goes wrong


BAD = {
    "404": (Reason.REMOVED, False),
    "410": (Reason.REMOVED, False),
    "403": (Reason.EGRESS_BLOCKED, True),
    "429": (Reason.EGRESS_BLOCKED, True),
    "451": (Reason.REGION, False),
    "500": (Reason.TRANSIENT, True),
    "loop": (Reason.UNREADABLE, False),
    "page": (Reason.UNREADABLE, False),
    "html": (Reason.UNREADABLE, True),
    "empty": (Reason.EMPTY, True),
    "half": (Reason.TRANSIENT, True),
    "wrong": (Reason.TRANSIENT, True),
    "short": (Reason.TRUNCATED, True),
    "stall": (Reason.TRANSIENT, True),
    "drip": (Reason.TIMEOUT, True),
}


@pytest.fixture(scope="module")
def outcomes(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipError]:
    """Fetch from all bad servers, several at a time."""
    folder, running = tmp_path_factory.mktemp("bad"), Server(files)
    options = FetchOptions(attempts=1, timeout_s=30, socket_timeout_s=1, work_folder=str(folder / "work"))

    def work(how: str) -> ClipError:
        limited = replace(options, timeout_s=10 if how == "drip" else 30)
        wanted = segment(running.url(f"{how}/film.mp4"), 4.0, 7.5, name=how)
        with pytest.raises(ClipError) as caught:
            fetch(wanted, str(folder / "store"), budget(), limited)
        return caught.value

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(BAD, pool.map(work, BAD), strict=True))
    nothing_left(str(folder / "store"), options)
    running.close()
    return found


@pytest.mark.parametrize("how", BAD)
def test_bad_servers(outcomes: dict[str, ClipError], how: str) -> None:
    error = outcomes[how]
    assert (error.reason, error.transient) == BAD[how], error
    assert error.detail and "\n" not in error.detail


@pytest.mark.parametrize("path,asked", [("ok/film.mp4", 2), ("about/", 1)])
def test_past_the_end(server: Server, store: str, options: FetchOptions, path: str, asked: int) -> None:
    error = failure(segment(server.url(path), 9.0, 19.0), store, options)
    assert (error.reason, error.transient) == (Reason.PAST_END, False)
    # once to resolve it; not to download it where the site says how long it is
    assert server.requests.count("/ok/film.mp4") == asked


def test_without_sound(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="no_audio"):
        cut([files / "small.mp4"], 1.0, 2.0, tmp_path / "out.mkv")


def test_nobody_there(store: str, options: FetchOptions) -> None:
    error = failure(segment("http://127.0.0.1:9/film.mp4"), store, options)
    assert (error.reason, error.transient) == (Reason.TRANSIENT, True)


def test_a_dead_proxy_is_the_identitys_fault(server: Server, store: str, options: FetchOptions) -> None:
    # a name that never resolves, since no_proxy covers loopback
    proxies = identities(["http://me:secret@127.0.0.1:9"])
    allowed = EgressBudget(proxies, per_hour=1e6)
    error = failure(segment("http://video.invalid/film.mp4"), store, options, allowed)
    assert error.reason == Reason.EGRESS_BLOCKED and "secret" not in str(error)
    assert allowed.status()[0].paused_s > 0


def test_a_broken_transfer_goes_on_where_it_broke_off(server: Server, store: str, options: FetchOptions) -> None:
    fetch(segment(server.url("once/film.mp4")), store, budget(), options)
    assert 3 <= len(server.requests) <= 4


@pytest.mark.parametrize("path", ["ok/film.mp4", "flood/film.mp4"])
def test_output_is_limited(server: Server, store: str, options: FetchOptions, path: str) -> None:
    error = failure(segment(server.url(path)), store, replace(options, max_bytes=20_000))
    assert (error.reason, error.transient) == (Reason.TOO_LARGE, False)


def test_a_full_disk_is_no_clips_fault(server: Server, store: str, options: FetchOptions) -> None:
    small = Path("/dev/full")  # writing to it says that there is no space
    assert small.exists()
    work = Path(str(options.work_folder))
    allowed = budget()

    def swap() -> None:
        until(lambda: list(work.rglob("stream0.part")))
        (part,) = work.rglob("stream0.part")
        part.unlink()
        part.symlink_to(small)

    thread = threading.Thread(target=swap)
    thread.start()
    # the transfer breaks off, and goes on into what is now a full disk
    with pytest.raises(OSError, match="No space left on device; make room for downloads there, or let") as caught:
        fetch(segment(server.url("stall/film.mp4")), store, allowed, options)
    thread.join()
    assert caught.value.filename == f"{options.work_folder}/avsep-fetch-{os.getuid()}"
    assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, ClipError)
    assert allowed.status()[0].outcomes == {"transient": 1}
    nothing_left(store, options)


def test_sources_that_are_none(store: str, options: FetchOptions) -> None:
    with pytest.raises(ValueError, match="not to be fetched"):
        fetch(segment("/a/film.mp4"), store, budget(), options)
    with pytest.raises(ClipError, match="no YouTube id"):
        fetch(segment("youtube:../../etc"), store, budget(), options)


def test_another_site_is_an_entry(
    files: Path, server: Server, store: str, options: FetchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sources are fetched, its ids checked, its files known; another scheme is refused in one line."""
    tapes = Site("tape", "Tapes", re.compile("[a-z]{4}"), "four small letters", server.url("ok/{}.mp4"), ("tape-{}",))
    monkeypatch.setitem(SITES, "tape", tapes)
    wanted = segment("tape:film")
    assert is_remote(wanted) and origin(wanted.source) == "Tapes" and origin("youtube:x") == "YouTube"
    result = fetch(wanted, store, budget(), options)
    assert len(media.decode(Path(result.path)).images) == 2 and set(server.requests) == {"/ok/film.mp4"}
    owned = files.parent / f"{files.name}-owned" / "tape-film_2.mp4"
    owned.parent.mkdir()
    owned.write_bytes((files / "film.mp4").read_bytes())
    assert find_media(str(owned.parent), [wanted]) == {"a": str(owned)}
    assert forms().startswith("http://…, https://…, youtube:ID") and forms().endswith(" or tape:ID")
    with pytest.raises(ClipError, match="'FILM' is no Tapes id: four small letters"):
        fetch(segment("tape:FILM"), store, budget(), options)
    with pytest.raises(ValueError, match=r"disc:film is not to be fetched: that is http://…, .* or tape:ID$"):
        fetch(segment("disc:film"), store, budget(), options)


# Trying again


def test_tries_again_where_it_can_help(server: Server, store: str, options: FetchOptions) -> None:
    options = replace(options, attempts=3)
    allowed = budget()
    result = fetch(segment(server.url("later500/film.mp4")), store, allowed, options)
    assert result.attempts == 2 and allowed.status()[0].outcomes == {"transient": 1, "ok": 1}
    requests = len(server.requests)
    fresh = budget()
    assert failure_only(segment(server.url("404/film.mp4"), name="b"), store, options, fresh) == Reason.REMOVED
    assert len(server.requests) == requests + 1 and fresh.status()[0].outcomes == {"removed": 1}


def failure_only(segment: Segment, store: str, options: FetchOptions, allowed: EgressBudget) -> Reason:
    with pytest.raises(ClipError) as caught:
        fetch(segment, store, allowed, options)
    return caught.value.reason


def test_a_blocked_identity_rests_and_another_goes_on(server: Server, store: str, options: FetchOptions) -> None:
    options = replace(options, attempts=2)
    two = EgressBudget([EgressIdentity("one"), EgressIdentity("two")], per_hour=1e6)
    result = fetch(segment(server.url("later429/film.mp4")), store, two, options)
    status = {s.name: s for s in two.status()}
    other = ({"one", "two"} - {str(result.identity)}).pop()
    assert status[other].paused_s > 500 and status[str(result.identity)].paused_s == 0
    assert status[other].outcomes == {"egress_blocked": 1}


def test_one_identity_waits_for_its_pause_to_end(server: Server, store: str, options: FetchOptions) -> None:
    one = EgressBudget([EgressIdentity("one")], per_hour=1e6, cooldown_s=1.0)
    started = time.monotonic()
    result = fetch(segment(server.url("later429/film.mp4")), store, one, replace(options, attempts=2))
    assert result.attempts == 2 and time.monotonic() - started > 1.0 and one.status()[0].strikes == 0


def test_workers_together_keep_to_the_rate_and_stop_when_blocked() -> None:
    shared = EgressBudget([EgressIdentity("a"), EgressIdentity("b")], per_hour=36_000, burst=2)  # 10 a second each
    leases: list[tuple[float, str]] = []  # when each was asked for, and whose it is
    begun, blocked, blocked_at = time.monotonic(), threading.Lock(), math.inf

    def work() -> None:
        nonlocal blocked_at
        while Counter(name for _, name in leases)["b"] < 22:  # two at once, then two seconds' worth
            asked = time.monotonic()
            lease = shared.acquire()
            if not isinstance(lease, Lease):
                assert isinstance(lease, Wait)
                time.sleep(min(lease.seconds, 0.05))
                continue
            leases.append((asked, lease.identity.name))
            if lease.identity.name == "a" and len(leases) > 12 and blocked.acquire(blocking=False):
                shared.report(lease, Reason.EGRESS_BLOCKED)
                blocked_at = time.monotonic()
            else:
                shared.report(lease, None)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result()
    taken = Counter(name for _, name in leases)
    assert all(n <= 2 + 10 * (time.monotonic() - begun) for n in taken.values()) and taken["a"] < taken["b"]
    assert max(t for t, name in leases if name == "a") <= blocked_at < max(t for t, name in leases if name == "b")


# Who dies


def test_two_fetch_the_same(server: Server, store: str, options: FetchOptions) -> None:
    wanted = segment(server.url("ok/film.mp4"))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: fetch(wanted, store, budget(), options), range(2)))
    assert results[0].path == results[1].path
    assert [str(p) for p in Path(store).rglob("*") if p.is_file()] == [results[0].path]
    assert len(media.decode(Path(results[0].path)).waveform) == 2 * RATE


def test_a_killed_child_is_one_failed_attempt(server: Server, store: str, options: FetchOptions) -> None:
    def kill() -> None:
        until(lambda: len(server.requests) >= 2)
        os.kill(min(own_children()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    error = failure(segment(server.url("stall/film.mp4")), store, replace(options, socket_timeout_s=30))
    thread.join()
    assert (error.reason, error.transient) == (Reason.TRANSIENT, True) and "SIGKILL" in error.detail


WORKER = """
import sys
from avsep.fetching import EgressBudget
from avsep.fetching import FetchOptions, fetch
from avsep.records import Segment
url, store, work = sys.argv[1:]
fetch(Segment("a", url, 2, 4), store, EgressBudget(), FetchOptions(work_folder=work))
"""


def test_a_killed_worker_leaves_nothing(
    server: Server, store: str, options: FetchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [server.url("stall/film.mp4"), store, str(options.work_folder)]
    worker = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], start_new_session=True)
    until(lambda: len(server.requests) >= 2, 60)
    (child,) = children(worker.pid)
    worker.kill()
    worker.wait()
    until(lambda: not alive(child), 5)
    assert not list(Path(store).rglob("*"))
    work = Path(str(options.work_folder)) / f"avsep-fetch-{os.getuid()}"
    (left,) = work.iterdir()  # which the next fetch clears away
    monkeypatch.setattr(ytdlp, "STALE_S", -1.0)
    failure(segment(server.url("404/film.mp4")), store, options)
    assert not left.exists() and not list(work.iterdir())


def test_an_identitys_proxy_and_cookies_are_used(
    server: Server, store: str, options: FetchOptions, tmp_path: Path
) -> None:
    jar = tmp_path / "cookies.txt"
    jar.write_text("# Netscape HTTP Cookie File\nvideo.invalid\tFALSE\t/\tFALSE\t0\tname\tvalue\n")
    before = jar.read_bytes()
    allowed = EgressBudget(identities([server.url("")], [str(jar)]), per_hour=1e6)
    fetch(segment("http://video.invalid/ok/film.mp4"), store, allowed, options)
    assert server.requests == ["http://video.invalid/ok/film.mp4"] * 2
    assert server.cookies == ["name=value"] * 2
    assert jar.read_bytes() == before  # yt-dlp wrote to its copy


# Files that users own


def test_owned_files(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "owned"
    whole = Segment("-a_bcdefg_h_3000", "youtube:-a_bcdefg_h", 3.0, 5.0)
    clip = Segment("ABCDEFGHIJK_30000", "youtube:ABCDEFGHIJK", 30.0, 40.0)
    named = Segment("kkkkkkkkkkk_3000", "youtube:kkkkkkkkkkk", 3.0, 5.0)
    both = Segment("bbbbbbbbbbb_3000", "youtube:bbbbbbbbbbb", 3.0, 5.0)
    other = Segment("ccccccccccc_3000", "youtube:ccccccccccc", 3.0, 5.0)
    local = Segment("film", str(files / "film.mp4"), 3.0, 5.0)
    film, song = (files / "film.mp4").read_bytes(), (files / "song.webm").read_bytes()
    for name, data in {
        "-a_bcdefg_h.mp4": film,
        "train/part00/YABCDEFGHIJK.webm": song,
        "kkkkkkkkkkk_000003.MP4": film,
        "bbbbbbbbbbb_3000_5000.webm": song,
        "bbbbbbbbbbb.mp4": film,
        "ccccccccccc.mkv.123.abcd.tmp": film,
        "ccccccccccc.txt": b"",
        "film.mp4": film,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = find_media(str(folder), [whole, clip, named, both, other, local])
    assert {i: str(Path(p).relative_to(folder)) for i, p in found.items()} == {
        whole.segment_id: "-a_bcdefg_h.mp4",
        clip.segment_id: "train/part00/YABCDEFGHIJK.webm",
        named.segment_id: "kkkkkkkkkkk_000003.MP4",
        both.segment_id: "bbbbbbbbbbb_3000_5000.webm",
    }
    times = {i.segment_id: within(i, found[i.segment_id]) for i in (whole, clip, named)}
    assert [(s.start_s, s.end_s) for s in times.values()] == [(3.0, 5.0), (0.0, 10.0), (0.0, 2.0)]
    assert find_media(str(tmp_path / "nowhere"), [whole]) == {}


def test_files_as_copies_of_public_sets_name_them(files: Path, tmp_path: Path) -> None:
    """AVE's hold ten seconds and its times are theirs; VGGSound's are cut; MUSIC's are whole videos, however short."""
    owned = {
        "-ave_file_0.mp4": Segment("-ave_file_0_1000_8000", "ave:-ave_file_0", 1.0, 8.0),
        "vggsound_01_000030.mp4": Segment("vggsound_01_30000", "youtube:vggsound_01", 30.0, 40.0),
        "-ggsound_02_30_40.mp4": Segment("-ggsound_02_30000", "youtube:-ggsound_02", 30.0, 40.0),
        "music__0001.mp4": Segment("music__0001_10000", "youtube:music__0001", 10.0, 20.0),
        "nobody_has_.mp4": Segment("nobody_has__0_10000", "ave:nobody_has_", 0.0, 10.0),
    }
    for name in list(owned)[:-1]:
        (tmp_path / name).write_bytes((files / "film.mp4").read_bytes())
    later = Segment("music__0001_30000", "youtube:music__0001", 30.0, 40.0)
    segments = [*owned.values(), later]
    assert several_of(segments) == several_of([*segments, *segments]) == {"youtube:music__0001"}
    store = open_store(str(tmp_path), segments, several_of(segments))
    assert store is not None and not store.missing  # what can't be fetched isn't to be
    part = store.of([later])
    assert part.whole == {"youtube:music__0001"} and part.locate(later).start_s == 30.0
    excerpts = {name: store.locate(s) for name, s in list(owned.items())[:-1]}
    assert all(s.source == str(tmp_path / name) for name, s in excerpts.items())
    assert [(s.start_s, s.end_s) for s in excerpts.values()] == [(1.0, 8.0), (0.0, 10.0), (0.0, 10.0), (10.0, 20.0)]
    config = ExtractionConfig()
    for name, s in excerpts.items():
        if name.startswith("music"):  # a film of 8 s
            with pytest.raises(ClipError, match=r"past_end: nothing follows 10 s"):
                decode(s, config)
        else:
            seconds = len(decode(s, config).clip.waveform) / config.stft.sample_rate
            assert abs(seconds - (7 if "ave" in name else 8)) < 0.1
    with pytest.raises(ClipError, match=r"missing: .* holds no file nobody_has_: it can't be downloaded") as missing:
        store.locate(owned["nobody_has_.mp4"])
    assert not missing.value.transient
    with pytest.raises(ValueError, match=r"ave:nobody_has_ is not to be fetched: that is .* or youtube:ID$"):
        url_of("ave:nobody_has_")
    assert not is_fetched("ave:nobody_has_") and is_remote(owned["nobody_has_.mp4"])


# Arithmetic, on a clock of our own


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_token_bucket() -> None:
    clock = Clock()
    bucket = TokenBucket(360, burst=3, clock=clock)  # one in ten seconds
    assert bucket.take() and not bucket.take() and bucket.wait_s == 10
    clock.now += 5
    assert not bucket.take() and bucket.wait_s == 5
    clock.now += 5
    assert bucket.take() and not bucket.take()
    clock.now += 1000
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    for rate, burst in ((0, 1), (-1, 1), (1, 0.5)):
        with pytest.raises(ValueError, match="positive"):
            TokenBucket(rate, burst)


def of(answer: Lease | Wait | Stop) -> Lease:
    assert isinstance(answer, Lease)
    return answer


def test_pauses_grow_and_end_with_a_success() -> None:
    clock = Clock()
    one = EgressBudget(
        [EgressIdentity("a")], per_hour=3600, cooldown_s=600, max_cooldown_s=2000, clock=clock, jitter=lambda: 0.0
    )
    clock.now += 10
    early = [of(one.acquire()) for _ in range(5)]
    for lease in early[:3]:  # one strike, however many were under way
        one.report(lease, Reason.EGRESS_BLOCKED)
    assert one.acquire() == Wait(600) and one.status()[0].strikes == 1
    one.report(early[3], None)  # began before the pause
    assert one.acquire() == Wait(600)
    for pause_s in (1200, 2000, 2000):
        clock.now += 10_000
        trial = of(one.acquire())
        assert isinstance(one.acquire(), Wait)  # one at a time
        one.report(early[4], Reason.EGRESS_BLOCKED)
        assert one.status()[0].paused_s == 0
        one.report(trial, Reason.EGRESS_BLOCKED)
        assert one.acquire() == Wait(pause_s)
    clock.now += 10_000
    one.report(of(one.acquire()), Reason.REMOVED)  # says nothing of the identity
    one.report(of(one.acquire()), Reason.TRANSIENT)
    trial = of(one.acquire())
    assert isinstance(one.acquire(), Wait)
    clock.now += 1801  # that worker died
    one.report(of(one.acquire()), None)
    assert [isinstance(one.acquire(), Lease) for _ in range(3)] == [True] * 3
    one.report(trial, Reason.EGRESS_BLOCKED)
    assert one.acquire() == Wait(600)


def test_a_pause_touches_one_identity_alone() -> None:
    clock = Clock()
    made = identities(["http://u:p@one:80", "socks5://two:1080"])
    shared = EgressBudget(made, per_hour=360, burst=1, clock=clock, jitter=lambda: 1.0)
    first, second = of(shared.acquire()), of(shared.acquire())
    assert {first.identity, second.identity} == set(made) and shared.acquire() == Wait(10)
    shared.report(first, Reason.EGRESS_BLOCKED)
    shared.report(second, None)
    clock.now += 10
    assert of(shared.acquire()).identity == second.identity and shared.acquire() == Wait(10)
    clock.now += 651
    assert {of(shared.acquire()).identity.name for _ in range(2)} == {i.name for i in made}
    assert [s.outcomes for s in shared.status()] == [{"egress_blocked": 1}, {"ok": 1}]


def test_each_machine_is_an_identity_when_none_is_given() -> None:
    shared = EgressBudget(per_hour=360, burst=1, clock=Clock())
    assert shared.seconds_left(1) == float("inf")
    assert of(shared.acquire("x")).identity.name == "machine x" and shared.acquire("x") == Wait(10)
    assert of(shared.acquire("y")).identity.name == "machine y"
    assert shared.seconds_left(20) == 100


def test_time_left() -> None:
    clock = Clock()
    shared = EgressBudget(identities(["http://a:1", "http://b:1"]), per_hour=360, clock=clock, jitter=lambda: 0.0)
    assert shared.seconds_left(0) == 0 and shared.seconds_left(100) == 500
    lease = of(shared.acquire())
    shared.report(lease, Reason.EGRESS_BLOCKED)  # for 600 s: the other does 60 of them alone
    assert shared.seconds_left(30) == 300 and shared.seconds_left(60) == 600 and shared.seconds_left(100) == 800
    clock.now += 600
    for _ in range(40):  # the workers are slower than they might be
        clock.now += 60
        shared.report(of(shared.acquire()), Reason.REMOVED)
    assert shared.seconds_left(100) == pytest.approx(100 * 3000 / 40)


def test_identities() -> None:
    paired = identities(["http://u:p@one:80"], [__file__])
    assert paired == (EgressIdentity("http://one:80 with test_fetch.py", "http://u:p@one:80", __file__),)
    gateway = identities(["http://u1:p@gate:80", "http://u2:p@gate:80"])
    assert [i.name for i in gateway] == ["http://gate:80 #1", "http://gate:80 #2"] and "p@" not in repr(gateway)
    for proxies, cookies, says in (
        (["one:80"], [], "give http://"),
        (["ftp://u:p@one:80"], [], "//…@one"),
        (["http://one:80"] * 2, [], "twice"),
        ([], [__file__] * 2, "twice"),
        (["http://one:80", "http://two:80"], [__file__], "as many"),
    ):
        with pytest.raises(ValueError, match=says):
            identities(proxies, cookies)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        identities(cookies=["/nowhere.txt"])
    with pytest.raises(ValueError, match="unique"):
        EgressBudget([EgressIdentity("a"), EgressIdentity("a")])


def test_tools(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("\n" not in note for note in check_tools())
    monkeypatch.setitem(sys.modules, "yt_dlp", None)  # as where it isn't installed
    for use in (check_tools, lambda: fetch(segment("http://127.0.0.1:9/a.mp4"), store, budget())):
        with pytest.raises(ModuleNotFoundError, match="pip install"):
            use()


REPORT = (
    "; please report this issue on  https://github.com/yt-dlp/yt-dlp/issues?q= , filling out the appropriate"
    " issue template. Confirm you are on the latest version using  yt-dlp -U"
)
HINT = (
    ". Use --cookies-from-browser or --cookies for the authentication. See  https://github.com/yt-dlp/yt-dlp/wiki/"
    "FAQ#how-do-i-pass-cookies-to-yt-dlp  for how to manually pass cookies."
)


@pytest.mark.parametrize(
    "message,reason,transient",
    [
        ("Video unavailable", "removed", False),
        ("Video unavailable. This video is not available", "removed", False),
        ("Video unavailable. This video has been removed by the uploader", "removed", False),
        ("Video unavailable. This video is no longer available because the YouTube account associated with this"
         " video has been terminated.", "removed", False),
        ("Video unavailable. This video is no longer available because the uploader has closed their YouTube"
         " account.", "removed", False),
        ("This video has been removed for violating YouTube's Terms of Service", "removed", False),
        ("Video unavailable. This video contains content from SME, who has blocked it on copyright grounds",
         "removed", False),
        ("Video unavailable. This video contains content from SME, who has blocked it in your country on copyright"
         " grounds", "region", False),
        ("The uploader has not made this video available in your country", "region", False),
        ("Private video. Sign in if you've been granted access to this video" + HINT, "private", False),
        ("Join this channel to get access to members-only content like this video, and other exclusive perks.",
         "private", False),
        ("This video is available to this channel's members on level: Fan (or any higher level).", "private", False),
        ("This video is only available to Music Premium members", "private", False),
        ("This video requires payment to watch", "private", False),
        ("Sign in to confirm your age. This video may be inappropriate for some users" + HINT, "age", False),
        ("Sign in to confirm you’re not a bot" + HINT, "egress_blocked", True),
        ("Video unavailable. This content isn’t available, try again later. The current session has been rate-limited"
         " by YouTube for up to an hour. It is recommended to use `-t sleep`", "egress_blocked", True),
        ("Video unavailable. YouTube is requiring a captcha challenge before playback", "egress_blocked", True),
        ("Unable to download API page: HTTP Error 429: Too Many Requests (caused by <HTTPError 429: Too Many"
         " Requests>)", "egress_blocked", True),
        ("unable to download video data: HTTP Error 403: Forbidden", "egress_blocked", True),
        ("Unable to connect to proxy: Tunnel connection failed: 502 Bad Gateway", "egress_blocked", True),
        ("Unable to download webpage: HTTP Error 404: Not Found (caused by <HTTPError 404>)", "removed", False),
        ("Unable to download webpage: HTTP Error 503: Service Unavailable", "transient", True),
        ("Unable to download API page: Read timed out", "transient", True),
        ("Unable to download webpage: [Errno -3] Temporary failure in name resolution", "transient", True),
        ("This live event will begin in 3 hours.", "transient", True),
        ("This live stream recording is not available.", "removed", False),
        ("This video is DRM protected", "removed", False),
        ("Incomplete YouTube ID abc. URL https://… looks truncated.", "removed", False),
        ("Requested format is not available. Use --list-formats for a list of available formats",
         "tool_outdated", True),
        ("No video formats found!" + REPORT, "tool_outdated", True),
        ("Signature extraction failed: Some formats may be missing" + REPORT, "tool_outdated", True),
        ("Failed to extract any player response" + REPORT, "tool_outdated", True),
        ("The page needs to be reloaded.", "tool_outdated", True),
        ("Unable to download API page: HTTP Error 400: Bad Request", "tool_outdated", True),
        ("Unsupported URL: https://example.org/", "unreadable", False),
        ("Something that nobody has seen before", "transient", True),
    ],
)  # fmt: skip
def test_what_yt_dlp_says(message: str, reason: str, transient: bool) -> None:
    for text in (message, f"ERROR: [youtube] -a_bcdefg_h: {message}"):
        assert classify(text) == (Reason(reason), transient)


def test_what_the_exceptions_are_counts() -> None:
    assert classify("Nothing here", kinds=["GeoRestrictedError", "ExtractorError"]) == (Reason.REGION, False)
    assert classify("Nothing here", kinds=["ProxyError", "TransportError"]) == (Reason.EGRESS_BLOCKED, True)
    assert classify("Nothing here", status=410) == (Reason.REMOVED, False)
    assert classify(f"timed out{REPORT}", kinds=["TransportError"]) == (Reason.TRANSIENT, True)
    assert json.dumps(classify("Private video")) == '["private", false]'


def test_what_a_budget_allows_within_an_hour() -> None:
    """Two identities of 360 an hour; one is blocked for 600 s, in which five tokens are kept."""
    clock = Clock()
    made = [EgressIdentity("a"), EgressIdentity("b")]
    shared = EgressBudget(made, per_hour=360, burst=5, clock=clock, jitter=lambda: 0.0, max_cooldown_s=1e9)
    assert shared.allowance() == 2 * (1 + 360)
    assert shared.allowance(100) == 2 * (1 + 10)
    shared.report(of(shared.acquire()), Reason.EGRESS_BLOCKED)
    assert shared.allowance() == (5 + 300) + (1 + 360)
    assert shared.allowance(600) == 0 + (1 + 60)
    clock.now += 600
    assert shared.allowance() == 2 * (5 + 360)


# What outlives a run


def test_a_restarted_budget_goes_on_where_the_last_one_stopped() -> None:
    """Tokens are spent, pauses last, strikes count; time that passed in between does, too."""
    clock, wall = Clock(), Clock()
    made = [EgressIdentity("a"), EgressIdentity("b")]

    def open_budget() -> EgressBudget:
        return EgressBudget(made, per_hour=360, burst=5, clock=Clock(), wall=wall, jitter=lambda: 0.0)

    first = EgressBudget(made, per_hour=360, burst=5, clock=clock, wall=wall, jitter=lambda: 0.0)
    one, two = of(first.acquire()), of(first.acquire())
    first.report(one, Reason.EGRESS_BLOCKED)
    first.report(two, None)
    kept = json.loads(json.dumps(first.state()))

    wall.now += 100
    second = open_budget()
    second.restore(kept)
    status = {s.name: s for s in second.status()}
    assert status[one.identity.name].paused_s == 500 and status[one.identity.name].strikes == 1
    assert status[two.identity.name].paused_s == 0
    assert [s.tokens for s in second.status()] == [5.0, 5.0]  # 100 s are ten tokens; five are kept

    wall.now += 3600
    third = open_budget()
    third.restore(kept)
    assert all(s.paused_s == 0 for s in third.status())

    again = EgressBudget(made, per_hour=360, burst=5, clock=Clock(), wall=lambda: kept["at"])
    again.restore(kept)  # at once: nothing is to be had that wasn't before
    assert isinstance(again.acquire(), Wait)


def test_machines_restarted_budget_knows_them() -> None:
    first = EgressBudget(per_hour=60, wall=lambda: 0.0)
    of(first.acquire("x"))
    second = EgressBudget(per_hour=60, wall=lambda: 0.0)
    second.restore(first.state())
    assert isinstance(second.acquire("x"), Wait) and isinstance(second.acquire("y"), Lease)


def test_an_identity_that_rests_for_a_run_is_still_paused_when_it_returns() -> None:
    """Egress is moved to another proxy and back again; a run without proxies doesn't take them for its own."""
    wall = Clock()

    def open_budget(*names: str) -> EgressBudget:
        made = [EgressIdentity(name) for name in names]
        return EgressBudget(made, per_hour=360, clock=Clock(), wall=wall, jitter=lambda: 0.0)

    first = open_budget("http://a:1")
    first.report(of(first.acquire()), Reason.EGRESS_BLOCKED)
    kept = first.state()
    for names in (("http://b:1",), ()):
        wall.now += 100
        between = open_budget(*names)
        between.restore(kept)
        of(between.acquire("x"))
        assert all(s.paused_s == 0 for s in between.status())
        kept = json.loads(json.dumps(between.state()))
    last = open_budget("http://a:1")
    last.restore(kept)
    (status,) = last.status()
    assert status.paused_s == 400 and status.strikes == 1


def test_a_source_is_downloaded_by_one_at_a_time() -> None:
    clock = Clock()
    shared = EgressBudget([EgressIdentity("a")], per_hour=36_000, burst=10, clock=clock, trial_s=60)
    clock.now += 10
    first = of(shared.acquire("m", "youtube:x"))
    assert isinstance(shared.acquire("n", "youtube:x"), Wait)
    assert isinstance(shared.acquire("n", "youtube:y"), Lease)
    shared.report(first, None)
    of(shared.acquire("n", "youtube:x"))
    clock.now += 61  # its worker was killed and never answered
    of(shared.acquire("m", "youtube:x"))


def test_segments_of_one_video_share_its_download(server: Server, store: str, options: FetchOptions) -> None:
    """Four workers, four segments, one transfer; one of them goes past the end and says so in its turn."""
    shared = EgressBudget([EgressIdentity("a")], per_hour=1e6, burst=10)
    url = server.url("ok/film.mp4")
    several = [segment(url, 2.0 * i, 2.0 * i + 2, name=f"s{i}") for i in range(3)]
    late = segment(url, LENGTH_S + 5.0, LENGTH_S + 7.0, name="late")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(fetch, s, store, shared, options, siblings=(*several, late)) for s in several]
        results = [j.result() for j in jobs]
    assert sorted(r.attempts for r in results) == [0, 0, 1]
    for s, r in zip(several, results, strict=True):
        alone = fetch(s, f"{store}-alone", budget(), options)
        assert Path(r.path).read_bytes() == Path(alone.path).read_bytes()
    assert shared.status()[0].outcomes == {"ok": 1}
    error = failure(late, f"{store}-late", options)
    assert error.reason == Reason.PAST_END


def test_a_budget_stops_everybody_once_youtube_has_changed(store: str, options: FetchOptions) -> None:
    """Not a moment before, not where something else happens in between, and again not once one has come."""
    clock = Clock()
    shared = EgressBudget([EgressIdentity("a")], per_hour=3600, burst=100, clock=clock)
    clock.now += 100
    early = of(shared.acquire())
    for outcome in (*[Reason.TOOL_OUTDATED] * 19, None, *[Reason.TOOL_OUTDATED] * 19, Reason.REMOVED):
        shared.report(of(shared.acquire()), outcome)
    for _ in range(20):
        shared.report(of(shared.acquire()), Reason.TOOL_OUTDATED)
    reason = "20 downloads in a row failed as if YouTube had changed: update yt-dlp, then run this again"
    assert shared.acquire() == Stop(reason)
    wanted = segment("http://127.0.0.1:9/a.mp4")
    with pytest.raises(Stopped, match=reason):
        fetch(wanted, store, shared, options)
    with pytest.raises(Stopped):  # no clip is rejected for it
        MediaStore(store, {}, {wanted.segment_id}, {}, budget=shared).fetch_all([wanted])
    shared.report(early, None)
    assert isinstance(shared.acquire(), Lease)
