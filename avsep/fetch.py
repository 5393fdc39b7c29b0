"""The yt-dlp edge: one segment of a remote source in, one local file that holds just its excerpt out.

yt-dlp says where the streams are and its own downloader gets them whole, in a supervised child;
ffmpeg cuts the excerpt by decoding; what it holds is counted before it enters the media store.
yt-dlp's download of sections isn't used: it hangs on stalled servers, and calls fragments success.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import ffmpeg
import pyarrow.fs as pafs
import soundfile

from avsep import media, storage
from avsep.egress import EgressIdentity, Lease
from avsep.records import ClipError, Reason, Segment

_FPS = 30  # of the pictures in the store
_WAIT_S = 15.0  # between questions to the budget, at most
_REPLY_BYTES = 1 << 20
_STALE_S = 60.0  # a younger work folder may not be locked yet
_DETAIL_CHARACTERS = 300
_REFUSED = re.compile("Connection refused|Name or service|name resolution|No route|SOCKS", re.IGNORECASE)
_YOUTUBE_ID = re.compile(r"[0-9A-Za-z_-]{11}")
_SUFFIXES = (  # of owned files, pictures and sound before sound alone
    *(".mkv", ".mp4", ".webm", ".m4v", ".mov", ".avi", ".flv", ".ts"),
    *(".flac", ".wav", ".m4a", ".opus", ".ogg", ".mp3", ".aac"),
)
_AGAIN = (
    Reason.TRANSIENT,
    Reason.TIMEOUT,
    Reason.EGRESS_BLOCKED,
    Reason.EMPTY,
    Reason.TRUNCATED,
    Reason.UNREADABLE,
)


@dataclass(frozen=True)
class FetchOptions:
    """What one fetch may use."""

    attempts: int = 3  # each takes a token
    backoff_s: float = 5.0  # before the second attempt, then twice that …; ± half, at random
    timeout_s: float = 900.0  # one attempt
    resolve_timeout_s: float = 120.0  # of it, until yt-dlp has found the streams
    socket_timeout_s: float = 20.0  # a server silent for this long is asked again
    max_height: int = 360  # pixels
    max_bytes: int = 1 << 30  # one stream, as downloaded
    work_folder: str | None = None  # for downloads in progress; None: the system's temporary folder
    limits: media.DecodeLimits = field(default_factory=media.DecodeLimits)  # of cutting and checking

    @property
    def cutting(self) -> CutOptions:
        """What cutting may use of it."""
        return CutOptions(self.max_height, self.max_bytes, self.limits)


@dataclass(frozen=True)
class CutOptions:
    """How an excerpt is written."""

    max_height: int = 360  # pixels
    max_bytes: int = 1 << 30
    limits: media.DecodeLimits = field(default_factory=media.DecodeLimits)  # of cutting and checking


@dataclass(frozen=True)
class FetchResult:
    """Where a segment's excerpt is, and what it cost; a cached one cost nothing."""

    path: str  # in the media store
    identity: str | None = None  # that downloaded it; None: it was there
    seconds: float = 0.0  # of the attempt that succeeded
    bytes: int = 0  # downloaded by it
    attempts: int = 0


class Budget(Protocol):
    """What `fetch` asks for leave: an `EgressBudget`, or a stand-in that calls a shared one."""

    def acquire(self, machine: str = "", source: str = "") -> Lease | float:
        """Give a lease, or the seconds to wait."""

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""


def is_remote(segment: Segment) -> bool:
    """Tell whether a segment's source has to be fetched: `youtube:ID`, `http://…`, `https://…`."""
    return segment.source.startswith(("youtube:", "http://", "https://"))


def check_tools() -> list[str]:
    """Return what would keep downloads from YouTube from working well, a line each.

    Raises ModuleNotFoundError when there is no yt-dlp.
    """
    _need_yt_dlp()
    notes = []
    if not shutil.which("deno", path=_search_path()) and not _node_counts():
        notes.append("no JavaScript runtime for yt-dlp (deno, or node from version 22): YouTube will fail")
    if importlib.util.find_spec("yt_dlp_ejs") is None:
        notes.append("yt-dlp-ejs isn't installed: YouTube will fail; pip install 'yt-dlp[default,deno]'")
    return notes


def store_path(store: str, segment_id: str) -> str:
    """Return where a segment's excerpt lives: `STORE/ab/SEGMENT_ID.mkv`, ab from the id's hash."""
    return storage.join(store, _key(segment_id))


def _key(segment_id: str) -> str:
    return f"{hashlib.sha256(segment_id.encode()).hexdigest()[:2]}/{segment_id}.mkv"


def fetch(
    segment: Segment,
    store: str,
    budget: Budget,
    options: FetchOptions = FetchOptions(),
    *,
    siblings: Sequence[Segment] = (),
    tell: Callable[[int, ClipError], None] | None = None,
) -> FetchResult:
    """Bring a segment's excerpt into the media store, unless it is there.

    `siblings` are other segments of the same source, which are cut from the same download. Waits for
    the budget's leave, reports to it, and tries again, later or as another identity, where that can
    help; `tell` gets the number and the error of each attempt that is followed by another. Raises
    ClipError with the last attempt's reason, OSError when the disk is full, ModuleNotFoundError
    without yt-dlp, ValueError for a source that isn't remote.
    """
    path = store_path(store, segment.segment_id)
    url = _url(segment.source)
    if storage.exists(path):
        return FetchResult(path)
    machine = socket.gethostname()
    for attempt in range(1, options.attempts + 1):
        lease = _wait_for_lease(budget, machine, segment.source, path)
        if lease is None:
            return FetchResult(path)
        outcome: Reason | None = Reason.TRANSIENT  # of what is no clip's fault
        try:
            result = download(segment, store, lease.identity, options, url=url, siblings=siblings)
            outcome = None
            return replace(result, attempts=attempt)
        except ClipError as error:
            outcome = error.reason
            if attempt == options.attempts or not error.transient or error.reason not in _AGAIN:
                raise
            if tell is not None:
                tell(attempt, error)
        finally:
            budget.report(lease, outcome)
        if outcome != Reason.EGRESS_BLOCKED:  # which waits for a lease instead
            time.sleep(options.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise ValueError(f"attempts is {options.attempts}; it must be at least 1")


def download(
    segment: Segment,
    store: str,
    identity: EgressIdentity,
    options: FetchOptions = FetchOptions(),
    *,
    url: str | None = None,
    siblings: Sequence[Segment] = (),
) -> FetchResult:
    """Download, cut, check and store a segment's excerpt: one attempt, as `identity`; the store isn't asked.

    The excerpt is exact, from sound and picture on the source's clock: FLAC at the source's rate,
    mono or stereo, and H.264 at 30 pictures a second, the short side at most `max_height`.
    Raises as `fetch` does.
    """
    _need_yt_dlp()
    started = time.monotonic()
    deadline = started + options.timeout_s
    with _work_folder(options.work_folder) as folder:
        files, said_s = _retrieve(url or _url(segment.source), segment, folder, identity, options, deadline)
        received = sum(file.stat().st_size for file in files)
        target = folder / "excerpt.mkv"
        try:
            cut(files, segment.start_s, segment.end_s, target, options.cutting, said_s=said_s, deadline=deadline)
        except ClipError as error:  # it may have been the transfer's fault
            again = error.reason in (Reason.EMPTY, Reason.TRUNCATED, Reason.UNREADABLE)
            raise ClipError(error.reason, error.detail, transient=error.transient or again) from None
        path = store_path(store, segment.segment_id)
        storage.write_bytes(path, target.read_bytes(), exclusive=True)
        for sibling in siblings:  # one that can't be cut is told when its turn comes
            other = store_path(store, sibling.segment_id)
            if sibling.segment_id != segment.segment_id and not storage.exists(other):
                with contextlib.suppress(ClipError):
                    target.unlink(missing_ok=True)
                    late = max(deadline, time.monotonic() + options.limits.timeout_s)
                    cut(files, sibling.start_s, sibling.end_s, target, options.cutting, said_s=said_s, deadline=late)
                    storage.write_bytes(other, target.read_bytes(), exclusive=True)
    return FetchResult(path, identity.name, time.monotonic() - started, received, 1)


def cut(
    files: Sequence[Path],
    start_s: float,
    end_s: float | None,
    target: Path,
    options: CutOptions = CutOptions(),
    *,
    said_s: float | None = None,
    deadline: float = math.inf,
) -> None:
    """Write the excerpt `start_s … end_s` of one file, or of a picture's and a sound's, and check it.

    `media.decode` of `target` gives what it gives for that excerpt of the source: the same
    pictures, but for their coding, and at the source's rate the samples within 16 bits. An excerpt
    that goes past the source's end is shorter; `said_s` is how long the site says the source is.
    Raises ClipError: EMPTY, UNREADABLE, NO_AUDIO, PAST_END, TRUNCATED, TOO_LONG, TOO_LARGE, TIMEOUT.
    """
    limits = replace(options.limits, timeout_s=_left(deadline, options.limits.timeout_s))
    headers = [(file, media._probe(file, limits)) for file in files]
    sound = next(((f, h) for f, h in headers if h.info.has_audio), None)
    picture = next(((f, h) for f, h in headers if h.info.has_video), None)
    if sound is None:
        raise ClipError(Reason.NO_AUDIO, "no audio stream")
    sound_end_s = media._or_inf(sound[1].info.duration_s)  # says the header
    if start_s >= sound_end_s and not media.reaches(sound[0], start_s, limits=limits):
        if said_s is not None and start_s < said_s - media._SLACK_S:
            raise ClipError(Reason.TRUNCATED, f"ends at {sound_end_s:.2f} s; the site says {said_s:g} s")
        raise ClipError(Reason.PAST_END, f"starts at {start_s:g} s; the media end at {sound_end_s:g} s")
    longest_s = start_s + limits.max_duration_s
    too_long = math.inf > min(media._or_inf(end_s), sound_end_s) > longest_s
    if too_long and media.reaches(sound[0], longest_s, limits=limits):
        raise ClipError(Reason.TOO_LONG, f"more than {limits.max_duration_s:g} s")
    length_s = min(media._or_inf(end_s), longest_s + 1) - start_s
    if picture is not None and start_s >= media._or_inf(picture[1].info.duration_s):
        picture = None  # it ended before
    process = _encode_each(sound, picture, start_s, length_s, target, options, limits)

    limits = replace(limits, timeout_s=_left(deadline, options.limits.timeout_s))
    try:
        clip = media.decode(target, image_size=16, limits=limits)
    except ClipError as error:
        if error.reason in (Reason.EMPTY, Reason.UNREADABLE, Reason.TRUNCATED):
            raise ClipError(Reason.TRUNCATED, f"nothing decodes from {start_s:g} s on") from None
        raise
    sound_s = len(clip.waveform) / clip.sample_rate
    stop_s, wanted_s = start_s + sound_s, media._or_inf(end_s)
    if said_s and stop_s < min(wanted_s, said_s) - media._SLACK_S:
        short = f"sound ends {sound_s:.2f} s into an excerpt of {min(wanted_s, said_s) - start_s:.2f} s"
        raise ClipError(Reason.TRUNCATED, short)
    promised_s = min(wanted_s, sound_end_s)
    if math.isfinite(promised_s) and stop_s < promised_s - media._SLACK_S:
        media._judge(sound[0], process, sound[1].tracks[0].stream, stop_s, promised_s, limits)
    if picture is not None:
        pictures_s = min(sound_s, media._or_inf(picture[1].info.duration_s) - start_s)
        if _too_few(len(clip.images), pictures_s) and picture[1].picture is not None:  # their stream may be shorter
            ends_s = media._survey(picture[0], limits).ends_s
            pictures_s = min(pictures_s, ends_s.get(picture[1].picture, 0.0) - start_s)
        if _too_few(len(clip.images), pictures_s):
            shown = f"{len(clip.images)} pictures, one a second"
            raise ClipError(Reason.TRUNCATED, f"{shown}, in an excerpt of {pictures_s:.2f} s")


def _too_few(n_images: int, length_s: float) -> bool:
    return not n_images or n_images < media._n_pictures(length_s) - 1 - media._SLACK_S


def find_media(folder: str, segments: Iterable[Segment]) -> dict[str, str]:
    """Find the remote segments whose media are in a folder or its subfolders → {segment_id: path}.

    Taken are the store's own files, and files that users own under common names: the segment's
    id; YTID with the excerpt's start, or start and end, in milliseconds, seconds or seconds padded
    to six digits; YTID alone; each also with AudioSet's `Y` in front. `within` says which part of
    such a file is the segment. The folder is listed once.
    """
    wanted: dict[str, list[tuple[int, Segment]]] = {}
    for segment in segments:
        if is_remote(segment):
            for rank, name in enumerate(_names(segment)):
                wanted.setdefault(name, []).append((rank, segment))
    found: dict[str, tuple[int, int, str]] = {}
    _, inner = storage.filesystem(folder)
    for info in storage.infos(folder, recursive=True):
        stem, suffix = os.path.splitext(info.base_name)
        if stem not in wanted or suffix.lower() not in _SUFFIXES or info.type != pafs.FileType.File:
            continue
        path = storage.join(folder, info.path[len(inner.rstrip("/")) :].lstrip("/"))
        for rank, segment in wanted[stem]:
            if path == store_path(folder, segment.segment_id):
                rank = -1
            here = (rank, _SUFFIXES.index(suffix.lower()), path)
            found[segment.segment_id] = min(found.get(segment.segment_id, here), here)
    return {segment_id: path for segment_id, (_, _, path) in found.items()}


def within(segment: Segment, path: str) -> Segment:
    """Return the segment with `path` as its source and its times as they are in that file.

    A file that isn't longer than the segment (1 s over is let pass) is the excerpt, and so is a
    longer one that is named by the excerpt's start; a longer one named by YTID alone is the whole
    video. Raises ClipError when the file can't be read.
    """
    if path.endswith(f"/{_key(segment.segment_id)}"):
        return replace(segment, source=path, start_s=0.0, end_s=None)
    length_s = media._or_inf(segment.end_s) - segment.start_s
    try:
        with storage.local_file(path) as file:
            duration_s = media.probe(file).duration_s
    except FileNotFoundError:
        raise ClipError(Reason.MISSING, f"{path} doesn't exist") from None
    if duration_s is not None and duration_s <= length_s + media._SLACK_S and math.isfinite(length_s):
        return replace(segment, source=path, start_s=0.0, end_s=length_s)
    stem = os.path.splitext(storage.name(path))[0]
    video = segment.source.removeprefix("youtube:")
    if stem in (video, f"Y{video}") or not math.isfinite(length_s):
        return replace(segment, source=path)
    return replace(segment, source=path, start_s=0.0, end_s=length_s)


def classify(message: str, *, status: int | None = None, kinds: Iterable[str] = ()) -> tuple[Reason, bool]:
    """Say why yt-dlp failed → (reason, whether it may work later).

    `message` is the exception's, `status` the HTTP status that caused it, `kinds` the names of the
    classes of it and its causes. What it says of the video counts before how the transfer went.
    """
    text = message.replace("\u2019", "'").lower()
    kinds = set(kinds)
    if status is None and (match := re.search(r"http error (\d{3})", text)):
        status = int(match[1])
    if "GeoRestrictedError" in kinds:
        return Reason.REGION, False
    if "ProxyError" in kinds or status == 407:
        return Reason.EGRESS_BLOCKED, True
    for reason, transient, pattern in _MESSAGES:
        if pattern.search(text):
            return reason, transient
    if status is not None:
        return _of_status(status, redirect_loop="redirect" in text)
    if "UnsupportedError" in kinds:
        return Reason.UNREADABLE, False
    if kinds & {"TransportError", "ContentTooShortError", "OSError"}:
        return Reason.TRANSIENT, True
    for reason, transient, pattern in _LAST_MESSAGES:
        if pattern.search(text):
            return reason, transient
    return Reason.TRANSIENT, True


_MESSAGES = [
    (reason, transient, re.compile(pattern))
    for reason, transient, pattern in (
        (
            Reason.EGRESS_BLOCKED,
            True,
            "not a bot|rate-limited|rate limit|try again later|captcha|too many requests|unusual traffic"
            "|your ip (address )?(is|has been)|ip is likely (being )?blocked|tunnel connection failed",
        ),
        (Reason.AGE, False, "confirm your age|age[- ]restrict|inappropriate for some users|age verification"),
        (
            Reason.REGION,
            False,
            r"(in|from|for) your (country|location|region)|geo[- ]?(restrict|block)|available in .* only",
        ),
        (
            Reason.PRIVATE,
            False,
            "video is private|private video|granted access|members[- ]only|members on level|channel's members"
            "|join this channel|music premium|premium members|requires payment|requires purchase|rent(al)? "
            "|registered users|login required|log in to|sign in to (view|watch)|you need to log in",
        ),
        (
            Reason.TRANSIENT,
            True,
            "live event will begin|premieres in|is upcoming|is being processed|still processing|\\bis live\\b"
            "|error code: 152|video has not started",
        ),
        (
            Reason.REMOVED,
            False,
            "removed|terminated|no longer available|closed their|copyright|does not exist|deleted|violat"
            "|drm protected|recording is not available|video (is )?(unavailable|not available)$"
            r"|video (is )?(unavailable|not available)\. (?!this content isn't available)"
            "|incomplete youtube id|invalid video id|looks truncated",
        ),
        (Reason.TOO_LARGE, False, "file too large|max-filesize"),
        (Reason.EMPTY, True, "did not get any data blocks|downloaded file is empty"),
    )
]
_LAST_MESSAGES = [
    (reason, transient, re.compile(pattern))
    for reason, transient, pattern in (
        (
            Reason.TOOL_OUTDATED,
            True,
            "no video formats|requested format is not available|only images are available|signature|nsig"
            "|challenge|javascript runtime|player response|po token|page needs to be reloaded|precondition"
            "|not supported (in|on|by) this (application|device)|latest version|report this issue"
            "|unable to extract|failed to (extract|parse)",
        ),
        (Reason.UNREADABLE, False, "unsupported url|not a valid url|a playlist"),
    )
]


def _of_status(status: int, redirect_loop: bool) -> tuple[Reason, bool]:
    if status in (403, 407, 429):
        return Reason.EGRESS_BLOCKED, True
    if status in (404, 410):
        return Reason.REMOVED, False
    if status in (401, 402):
        return Reason.PRIVATE, False
    if status == 451:
        return Reason.REGION, False
    if status >= 500 or status in (408, 416, 425):
        return Reason.TRANSIENT, True
    if redirect_loop or status < 400:
        return Reason.UNREADABLE, False
    return Reason.TOOL_OUTDATED, True  # a request that the site no longer takes


def _names(segment: Segment) -> list[str]:
    """List the names that a segment's file may have, without suffix, best first."""
    names = [segment.segment_id]
    if segment.source.startswith("youtube:"):
        video = segment.source.removeprefix("youtube:")
        times = [segment.start_s] if segment.end_s is None else [segment.start_s, segment.end_s]
        forms = [[f"{1000 * t:.0f}" for t in times], [f"{t:.3f}" for t in times]]
        if all(t.is_integer() for t in map(float, times)):
            forms += [[f"{t:06.0f}" for t in times], [f"{t:.0f}" for t in times]]
        endings = ["_" + "_".join(written) for form in forms for written in (form, form[:1])]
        names += [f"{y}{video}{ending}" for ending in [*endings, ""] for y in ("", "Y")]
    return list(dict.fromkeys(names))


def _url(source: str) -> str:
    if source.startswith(("http://", "https://")):
        return source
    if not source.startswith("youtube:"):
        raise ValueError(f"{source} is not to be fetched: youtube:ID, http:// and https:// are")
    video = source.removeprefix("youtube:")
    if not _YOUTUBE_ID.fullmatch(video):
        raise ClipError(Reason.REMOVED, f"{video!r} is no YouTube id: 11 letters, digits, _ or -")
    return f"https://www.youtube.com/watch?v={video}"


def _wait_for_lease(budget: Budget, machine: str, source: str, path: str) -> Lease | None:
    """Wait for a lease; None when the file is there meanwhile, as somebody's sibling."""
    while not isinstance(answer := budget.acquire(machine, source), Lease):
        time.sleep(min(answer, _WAIT_S) * random.uniform(1.0, 1.1) + 0.001)
        if storage.exists(path):
            return None
    return answer


def _left(deadline: float, timeout_s: float) -> float:
    left_s = min(deadline - time.monotonic(), timeout_s)
    if left_s <= 0:
        raise ClipError(Reason.TIMEOUT, "no time is left to cut and check the excerpt", transient=True)
    return left_s


def _need_yt_dlp() -> None:
    if importlib.util.find_spec("yt_dlp") is None:
        raise ModuleNotFoundError("fetching needs yt-dlp: pip install 'yt-dlp[default,deno]'")


def _search_path() -> str:
    """Where programs are looked for: beside this Python first, where the registry's deno lands."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _node_counts() -> bool:
    node = shutil.which("node", path=_search_path())
    if not node:
        return False
    try:
        version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    match = re.match(r"v(\d+)", version)
    return match is not None and int(match[1]) >= 22


# Cutting


_Source = tuple[Path, media._Header]


def _encode_each(
    sound: _Source,
    picture: _Source | None,
    start_s: float,
    length_s: float,
    target: Path,
    options: CutOptions,
    limits: media.DecodeLimits,
) -> media._FFmpeg:
    """Encode an excerpt; where that fails, find out whether sound or pictures are at fault."""
    rest, begins, wave = (start_s, length_s, target, options, limits), start_s, target.with_suffix(".wav")
    try:
        try:
            process = _encode(sound, picture, *rest)
        except media._Changed:  # a filter graph made anew would start from zero
            rate = sound[1].info.sample_rate or 48_000
            end_s = start_s + length_s
            clip = media.decode(sound[0], start_s, end_s, sample_rate=rate, pictures=False, limits=limits)
            soundfile.write(wave, clip.waveform, rate, subtype="FLOAT")
            sound, begins = (wave, media._probe(wave, limits)), 0.0
            process = _encode(sound, picture, *rest, sound_start_s=begins)
        if process.returncode and picture is not None:
            alone = _encode(sound, None, *rest, sound_start_s=begins)
            if not alone.returncode:
                fault = _fault(picture[0], *rest[:2], limits)
                raise ClipError(Reason.UNREADABLE, f"the pictures can't be used: {fault}")
            process = alone
    finally:
        wave.unlink(missing_ok=True)
    if process.returncode:
        raise ClipError(Reason.UNREADABLE, process.last_words() or "nothing decodes")
    return process


def _fault(file: Path, start_s: float, length_s: float, limits: media.DecodeLimits) -> str:
    """Say what is wrong with pictures that can't be encoded."""
    try:
        media.decode(file, start_s, start_s + length_s, image_size=16, sound=False, limits=limits)
    except ClipError as error:
        return error.detail
    return "they don't encode"


def _encode(
    sound: _Source,
    picture: _Source | None,
    start_s: float,
    length_s: float,
    target: Path,
    options: CutOptions,
    limits: media.DecodeLimits,
    *,
    sound_start_s: float | None = None,
) -> media._FFmpeg:
    def opened(file: Path, header: media._Header, start_s: float) -> tuple[Any, float]:
        seek_s = max(0.0, start_s - (media._LEAD_S if header.indexed else media._UNINDEXED_LEAD_S))
        seek: dict[str, Any] = {"ss": f"{seek_s:.6f}", "noaccurate_seek": None} if seek_s else {}
        if header.info.has_video:
            seek |= {"max_pixels:v": limits.max_pixels, "reinit_filter:v": 0}
        return media._input(file, limits, **seek), header.zero_s + start_s - seek_s

    source, lead_s = opened(*sound, start_s if sound_start_s is None else sound_start_s)
    mix = sound[1].tracks[0].mix
    rate = sound[1].info.sample_rate or 48_000
    audio = (
        f"atrim=start={lead_s:.6f}:end={lead_s + length_s + 0.1:.6f}"
        + (f",aeval='{mix}':c=mono" if mix else "")
        + f",aresample={rate}:async=1:first_pts={round(lead_s * rate)}:rematrix_maxval=1"
        f",aformat=sample_fmts=s16:channel_layouts=mono|stereo:sample_rates={rate}"
        f",atrim=end_sample={round(length_s * rate)},asetpts=N/SR/TB"
    )
    streams = [source["a:0"]]
    coding: dict[str, Any] = {"format": "matroska", "fs": options.max_bytes, "c:a": "flac", "af": audio}
    coding |= {"map_metadata": -1, "map_chapters": -1, "fflags": "+bitexact", "flags:a": "+bitexact"}
    if picture is not None:
        if picture[0] != sound[0]:
            source, lead_s = opened(*picture, start_s)
        start, short = round(lead_s * 1e6), options.max_height
        # Picture k is what is shown k / 30 s into the excerpt.
        video = (
            f"settb=1/1000000,setpts=PTS-{start},fps={_FPS}:start_time=0:round=up"
            f",trim=end_frame={math.ceil(length_s * _FPS)},setpts=N"
            f",scale='if(gt(iw,ih),-2,2*trunc(min({short},iw)/2))':'if(gt(iw,ih),2*trunc(min({short},ih)/2),-2)'"
            ",format=yuv420p"
        )
        streams.append(source["V:0"])
        coding |= {
            "vf": video,
            "r": _FPS,
            "g": _FPS,
            "bf": 0,
            "flags:v": "+bitexact",
            "threads": limits.threads,
        }
    x264, mpeg4 = {"c:v": "libx264", "preset": "veryfast", "crf": 21}, {"c:v": "mpeg4", "q:v": 4}
    for encoder in (x264, mpeg4):
        target.unlink(missing_ok=True)  # of an attempt that failed
        chosen = {**coding, **encoder} if picture is not None else coding
        output = ffmpeg.output(*streams, f"file:{target}", **chosen)
        with media._FFmpeg([output], sound[0], limits, listening=media.Listening()) as process:
            for _ in process.pieces(limits.timeout_s):
                pass
        if "Unknown encoder 'libx264'" not in process.log:
            break
    return process


# Downloading


@contextlib.contextmanager
def _work_folder(parent: str | None) -> Iterator[Path]:
    """Give a folder that goes when the block ends, or, when the process dies, with the next one's start."""
    root = Path(parent or tempfile.gettempdir()) / f"avsep-fetch-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to someone else; give another work folder, or set TMPDIR")
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_S and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
    folder = Path(tempfile.mkdtemp(dir=root))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder, for as long as this process lives; None when another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _retrieve(
    url: str, segment: Segment, folder: Path, identity: EgressIdentity, options: FetchOptions, deadline: float
) -> tuple[list[Path], float | None]:
    """Download a source's streams whole → (files, how long the site says it is)."""
    low = f"[height<={options.max_height}]"
    unknown = f"[height<=?{options.max_height}]"
    request: dict[str, Any] = {
        "parent": os.getpid(),
        "url": url,
        "max_bytes": options.max_bytes,
        "params": {
            "format": f"bv{low}+ba/b{low}/bv*{unknown}+ba/b{unknown}/wv*+ba/w/ba",
            "socket_timeout": options.socket_timeout_s,
            "retries": 2,  # of a transfer, which goes on where it broke off
            "fragment_retries": 2,
            "skip_unavailable_fragments": False,
            "max_filesize": options.max_bytes,
            "hls_prefer_native": True,
            "noplaylist": True,
            "playlist_items": "1",
            "updatetime": False,
            "noprogress": True,
            "quiet": True,
            "no_color": True,
            "js_runtimes": {"deno": {}, "node": {}},
            "ffmpeg_location": media.ffmpeg_executable(),
        },
    }
    if identity.proxy is not None:
        request["params"]["proxy"] = identity.proxy
    if identity.cookies is not None:
        copy = folder / "cookies.txt"  # yt-dlp writes to it
        copy.touch(mode=0o600)
        try:
            copy.write_bytes(storage.read_bytes(identity.cookies))
        except FileNotFoundError:
            raise ClipError(
                Reason.EGRESS_BLOCKED, f"cookie file {identity.cookies} doesn't exist", transient=True
            ) from None
        request["params"]["cookiefile"] = str(copy)
    with _YtDlp(folder, identity) as child:
        found = child.ask(request, min(deadline, time.monotonic() + options.resolve_timeout_s))
        said_s = found["duration"]
        if said_s is not None and segment.start_s >= said_s:
            raise ClipError(Reason.PAST_END, f"starts at {segment.start_s:g} s; the site says {said_s:g} s")
        if found["live"]:
            raise ClipError(Reason.TRANSIENT, "is live", transient=True)
        if sum(found["bytes"]) > options.max_bytes:
            raise ClipError(Reason.TOO_LARGE, f"{sum(found['bytes'])} bytes; the limit is {options.max_bytes}")
        done = child.ask({}, deadline)
    return [folder / name for name in done["files"]], said_s


class _YtDlp:
    """yt-dlp in a child with a process group of its own, which ends with the `with` block or its parent."""

    def __init__(self, folder: Path, identity: EgressIdentity) -> None:
        self._folder, self._identity = folder, identity
        self._replies = self._log = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "PATH": _search_path(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
            preexec_fn=media._die_with_parent,
        )

    def __enter__(self) -> _YtDlp:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        with contextlib.suppress(BrokenPipeError), self._process:
            pass

    def ask(self, line: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send a line and wait for the answer; raises ClipError when it is a failure, or none comes."""
        started = time.monotonic()
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            selector.register(self._process.stderr, selectors.EVENT_READ)
            while b"\n" not in self._replies:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() > deadline:
                    spent_s = time.monotonic() - started
                    raise ClipError(Reason.TIMEOUT, f"yt-dlp took more than {spent_s:.3g} s", transient=True)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        if key.fileobj is self._process.stdout:
                            raise self._died()
                    elif key.fileobj is self._process.stdout:
                        self._replies += data
                        if len(self._replies) > _REPLY_BYTES:
                            raise ClipError(Reason.TOOL_OUTDATED, "yt-dlp says too much", transient=True)
                    else:
                        self._log = (self._log + data)[-_REPLY_BYTES:]
        reply, _, self._replies = self._replies.partition(b"\n")
        answer = json.loads(reply)
        if "failure" in answer:
            raise self._failure(answer)
        return answer

    def _failure(self, answer: dict[str, Any]) -> Exception:
        message = answer["failure"]
        if answer["errno"]:  # the machine's trouble, not the clip's
            remedy = "make room for downloads there, or let TMPDIR name a folder that has some and can be written to"
            return OSError(answer["errno"], f"{os.strerror(answer['errno'])}; {remedy}", str(self._folder.parent))
        reason, transient = classify(message, status=answer["status"], kinds=answer["kinds"])
        if self._identity.proxy and reason == Reason.TRANSIENT and _REFUSED.search(message):
            reason = Reason.EGRESS_BLOCKED  # by the proxy itself: sites that refuse come as its HTTP errors
        if reason == Reason.TOOL_OUTDATED and answer["warnings"]:
            message += " (" + answer["warnings"][-1] + ")"
        return ClipError(reason, self._detail(message), transient=transient)

    def _died(self) -> ClipError:
        deadline = time.monotonic() + 2
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (end := os.waitid(os.P_PID, self._process.pid, flags)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if end is not None and end.si_code != os.CLD_EXITED:
            said = f"died of {signal.Signals(end.si_status).name}"
        else:
            log = self._log.decode(errors="replace").strip()
            said = "ended without an answer: " + log.rpartition("\n")[2]
        return ClipError(Reason.TRANSIENT, self._detail(f"yt-dlp {said}"), transient=True)

    def _detail(self, message: str) -> str:
        """One line, without the appeal to report it, and without the proxy, which may hold a password."""
        text = " ".join(message.split()).removeprefix("ERROR: ")
        text = re.sub(r"^\[[\w:+-]+\] ([\w-]+: )?", "", text)
        text = re.sub(r"[;.] ?please report this issue on .*?yt-dlp -U", "", text, flags=re.IGNORECASE)
        if self._identity.proxy:
            text = text.replace(self._identity.proxy, "the proxy")
        return text[:_DETAIL_CHARACTERS]


def _download() -> None:
    """Run yt-dlp, in the child: answer a request with what was found, then a go-ahead with the files.

    The child gets this function's source alone, since importing the package would cost it seconds.
    """
    import ctypes
    import errno
    import json
    import os
    import resource
    import signal
    import subprocess
    import sys

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is log
    request = json.loads(sys.stdin.readline())
    if os.getppid() != request["parent"]:
        return  # it died before this process was bound to it
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], request["max_bytes"]))
    prctl = ctypes.PyDLL(None).prctl
    start: Any = subprocess.Popen.__init__

    def start_bound(self, *arguments, **options):  # type: ignore[no-untyped-def]
        start(self, *arguments, **{**options, "preexec_fn": lambda: prctl(1, signal.SIGKILL)})

    subprocess.Popen.__init__ = start_bound  # type: ignore[method-assign]
    warnings: list[str] = []
    last = ["nothing was downloaded"]

    class Log:
        def debug(self, text: str) -> None:
            last[0] = text

        def warning(self, text: str) -> None:
            warnings.append(text[:500])
            del warnings[:-5]

        def error(self, text: str) -> None:
            last[0] = text

    def answer(**values: object) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        import yt_dlp

        with yt_dlp.YoutubeDL({**request["params"], "logger": Log()}) as ydl:
            info = ydl.extract_info(request["url"], download=False)
            while info.get("_type", "video") != "video":  # a page with one video in it
                entries = [e for e in info.get("entries") or [] if e]
                if len(entries) != 1:
                    raise ValueError(f"a playlist of {len(entries)} videos: give one")
                info = entries[0]
            streams = info.get("requested_formats") or [info]
            sizes = [s.get("filesize") or s.get("filesize_approx") or 0 for s in streams]
            answer(duration=info.get("duration"), live=bool(info.get("is_live")), bytes=sizes)
            sys.stdin.readline()
            files = []
            for number, stream in enumerate(streams):
                files.append(f"stream{number}")
                one = {k: v for k, v in {**info, **stream}.items() if k != "requested_formats"}
                if not ydl.dl(files[-1], one)[0]:
                    raise ValueError(last[0])
            answer(files=files)
    except Exception as error:
        chain: list[BaseException] = []
        todo: list[object] = [error]
        while todo:
            cause = todo.pop()
            if isinstance(cause, BaseException) and cause not in chain:
                chain.append(cause)
                todo += [cause.__cause__, getattr(cause, "cause", None)]
                todo += getattr(cause, "exc_info", None) or ()
        machines = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        numbers = [n for c in chain if isinstance(c, OSError) and (n := c.errno) in machines]
        full = [n for n in machines if f"[Errno {n}]" in str(error)]
        answer(
            failure=str(error) or type(error).__name__,
            status=next((s for c in chain if isinstance(s := getattr(c, "status", None), int)), None),
            kinds=sorted({k.__name__ for c in chain for k in type(c).__mro__}),
            errno=next(iter(numbers + full), None),
            warnings=warnings,
        )


_CHILD = f"from __future__ import annotations\n{inspect.getsource(_download)}\n_download()\n"
