"""What is wrong with a file: what its header promises, its packets hold and its channels cancel."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.limits import LOUDEST, DecodeLimits
from avsep.media.ffmpeg import (
    UNFRAMED,
    FFmpeg,
    Header,
    Listening,
    TooManyPixels,
    Track,
    input_of,
    or_inf,
    read_header,
)
from avsep.records import ClipError, Reason

QUIET = 1e-2  # peaks below this may be what channels in opposite phase have left of each other …
_CANCELLED_DB = 20.0  # … and are, when the alternating sum is this much louder
_SILENT = 1e-4  # peaks below this are no sound
_UNREAD = 0.1  # of a file's bytes: more than that, left over where reading fails, are missed
SLACK_S = 1.0  # media may end this much before their header says


@dataclass(frozen=True)
class Request:
    """What is to be decoded of a file, and by when."""

    path: Path
    start_s: float
    end_s: float  # may be infinite
    sample_rate: int
    image_size: int
    limits: DecodeLimits
    deadline: float

    @property
    def length_s(self) -> float:
        """Seconds from start to end."""
        return min(self.end_s - self.start_s, self.limits.max_duration_s + 1)  # headers may promise too little

    @property
    def too_long(self) -> ClipError:
        """The error of media longer than the limit."""
        return ClipError(Reason.TOO_LONG, f"more than {self.limits.max_duration_s:g} s")

    def remaining(self) -> DecodeLimits:
        """Return the limits with the time that is left."""
        return replace(self.limits, timeout_s=max(0.0, self.deadline - time.monotonic()))


def check_header(request: Request, header: Header, track: int, sound: bool, images: bool) -> None:
    """Raise the ClipError of a file whose header says that it can't be used."""
    info = header.info
    if sound and track > len(header.tracks):
        there = f"no audio track {track}; the file has {len(header.tracks)}" if header.tracks else "no audio stream"
        raise ClipError(Reason.NO_AUDIO, there)
    if images and not sound and not info.has_video:
        raise ClipError(Reason.NO_VIDEO, "no video stream")
    limit = request.limits.max_pixels
    if images and (info.width or 0) * (info.height or 0) > limit:
        raise TooManyPixels(Reason.TOO_LARGE, f"{info.width}x{info.height}; the limit is {limit} pixels")
    end_s, longest_s = min(request.end_s, or_inf(info.duration_s)), request.limits.max_duration_s
    too_long = math.isfinite(end_s) and end_s - request.start_s > longest_s  # says the header; is it true?
    if too_long and reaches(request.path, request.start_s + longest_s, limits=request.remaining()):
        raise request.too_long


def judge(
    path: Path, process: FFmpeg, own: int | None, end_s: float, promised_s: float, limits: DecodeLimits
) -> list[str]:
    """Find out why a stream ends before its file's header says: note a header that is wrong.

    A container's length is that of its longest stream, whatever it holds, and a header may have
    been written before its file was whole. So what counts is where the file's packets end, and
    whether something says that the file was cut or damaged: then a ClipError, TRUNCATED.
    """
    packets = survey(path, limits)
    if (process.stopped or packets.process.stopped) and packets.n_bytes < (1 - _UNREAD) * path.stat().st_size:
        raise ClipError(Reason.TRUNCATED, f"can't be read on from {end_s:.2f} s: {process.last_words()}")
    own_s = min(packets.ends_s.get(own, 0.0) if own is not None else 0.0, promised_s)
    if math.isfinite(own_s) and end_s < own_s - SLACK_S:
        raise ClipError(Reason.TRUNCATED, f"decodes up to {end_s:.2f} s of {own_s:.2f} s: {process.last_words()}")
    if not math.isfinite(promised_s) or end_s >= promised_s - SLACK_S:
        return []
    cut = process.cut or packets.process.cut
    if not cut and max(packets.ends_s.values(), default=0.0) >= promised_s - SLACK_S:
        return []
    if cut or process.header.format in UNFRAMED or process.last_words():
        raise ClipError(Reason.TRUNCATED, f"ends at {end_s:.2f} s, not at {promised_s:.2f} s")
    return [f"the header promises {promised_s:.2f} s; the file ends at {end_s:.2f} s"]


def energy_of(samples: NDArray[np.float32]) -> float:
    """Return the sum of squares."""
    return float(np.square(samples, dtype=np.float64).sum())


def cancelled(mixed: float, alternating: float) -> bool:
    """Tell from the energies of both sums of its channels whether a sound is lost in the usual one."""
    return alternating > mixed * 10 ** (_CANCELLED_DB / 10)


def cancelled_note(track: Track) -> str:
    """Say which sum of the channels was taken."""
    if track.layout in ("stereo", "downmix"):
        return "left and right cancel each other: half their difference was taken"
    return f"the mix of the channels ({track.layout}) is silent: they were added with alternating signs"


def silence_notes(peak: float, header: Header, track: int) -> list[str]:
    """Say that a sound is silent, and which others the file has."""
    if peak >= _SILENT:
        return []
    others = [f"{n} ({t})" for n, t in enumerate(header.tracks, 1) if n != track]
    if not others:
        return ["the sound is silent"]
    return [f"audio track {track} is silent; the file's others are {'; '.join(others)}"]


def reaches(path: Path, time_s: float, *, limits: DecodeLimits = DecodeLimits()) -> bool:
    """Tell whether any of a file's streams has something after a time, whatever the header says."""
    return any(end_s > 0 for end_s in survey(path, limits, time_s).ends_s.values())


@dataclass
class _Packets:
    """What is in a file, undecoded."""

    process: FFmpeg
    ends_s: dict[int, float]  # of each stream, on the file's clock, or after the start of the survey
    n_bytes: int


def survey(path: Path, limits: DecodeLimits, start_s: float = 0.0) -> _Packets:
    """Read a file's packets, those of a second where a start is given."""
    options: dict[str, Any] = {"ss": f"{start_s:.6f}"} if start_s else {}
    until = {"t": 1} if start_s else {}
    source = input_of(path, limits, **options)
    listed = source.output("pipe:1", format="framecrc", c="copy", map="0", copy_unknown=None, **until)
    bases: dict[int, float] = {}
    ends_s: dict[int, float] = {}
    n_bytes, rest = 0, b""
    with FFmpeg([listed], path, limits) as process:
        for _, data in process.pieces(limits.timeout_s):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if tick := re.match(rb"#tb (\d+): (\d+)/(\d+)", line):
                    bases[int(tick[1])] = int(tick[2]) / int(tick[3])
                elif packet := re.match(rb"(\d+), *(?:-?\d+|NOPTS), *(-?\d+), *(\d+), *(\d+),", line):
                    stream, time, duration, size = map(int, packet.groups())
                    ends_s[stream] = max(ends_s.get(stream, -math.inf), (time + duration) * bases.get(stream, 0.0))
                    n_bytes += size
    return _Packets(process, ends_s, n_bytes)


def check_samples(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples that can be sound; ClipError (UNREADABLE) where damage has made others of them."""
    if len(samples) and not np.abs(samples).max() <= LOUDEST:  # NaN isn't either
        raise ClipError(Reason.UNREADABLE, f"samples that are not finite numbers, or above {LOUDEST:.0e}")
    return samples


def probe_audio(path: Path, limits: DecodeLimits, listening: Listening) -> Header:
    """Read a file's header; raise the ClipError of one whose sound can't be used."""
    header = read_header(path, limits, listening.link)
    whole = Request(path, 0.0, 0.0, 1, 0, limits, math.inf)
    check_header(whole, header, listening.track, sound=True, images=False)
    return header
