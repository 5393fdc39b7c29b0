"""A file's picture stream, as it is, with another sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ffmpeg

from avsep.limits import DecodeLimits
from avsep.media.ffmpeg import MEAN, FFmpeg, Header, input_of, read_header
from avsep.records import ClipError, Reason

_AAC_CHANNELS = (1, 2, 3, 4, 5, 6, 8)
# What players expect in an mp4.
_IN_MP4 = {"av1", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp9", "vvc"}


def aac_channels(n_channels: int) -> int:
    """Return how many channels a sound has in a video: those that AAC has a layout of, else two of 7, one of more.

    >>> [aac_channels(n) for n in (1, 6, 7, 8, 9)]
    [1, 6, 2, 8, 1]
    """
    return n_channels if n_channels in _AAC_CHANNELS else 2 if n_channels < 8 else 1


def video_container(path: Path, *, limits: DecodeLimits = DecodeLimits()) -> str:
    """Return the suffix of a file that can hold a file's picture stream: `mp4`, else `mkv`.

    Raises ClipError: MISSING, EMPTY, UNREADABLE, NO_VIDEO, CRASHED_DECODER, TIMEOUT (transient).
    """
    return "mp4" if _header(path, limits).video_codec in _IN_MP4 else "mkv"


def _header(path: Path, limits: DecodeLimits) -> Header:
    header = read_header(path, limits)
    if not header.info.has_video:
        raise ClipError(Reason.NO_VIDEO, "no video stream")
    return header


def mux(video: Path, sound: Path, n_channels: int, target: Path, *, limits: DecodeLimits = DecodeLimits()) -> None:
    """Write a file's picture stream, bit for bit, and a sound's samples as AAC; the target's suffix says as what.

    The sound's first sample is what `media.decode` and `iter_audio` give first of the video's sound;
    start times keep both together. `timeout_s` bounds the whole. Raises ClipError as
    `video_container` does, and UNREADABLE where the stream can't be copied.
    """
    header = _header(video, limits)
    source = input_of(video, limits)
    stem = input_of(sound, limits, guess_layout_max=8, itsoffset=f"{header.zero_s:.6f}")
    sounding = stem["a:0"]
    if n_channels > 8:  # of which nobody knows the loudspeakers
        sounding = sounding.filter("aeval", exprs=MEAN, channel_layout="mono")
    n_channels = aac_channels(n_channels)
    coding: dict[str, Any] = {"format": "mp4" if target.suffix == ".mp4" else "matroska"}
    coding |= {"c:v": "copy", "c:a": "aac", "ac": n_channels, "b:a": f"{96 * n_channels}k"}
    with FFmpeg([ffmpeg.output(source["V:0"], sounding, f"file:{target}", **coding)], video, limits) as process:
        for _ in process.pieces(limits.timeout_s):
            pass
    if process.returncode:
        raise ClipError(Reason.UNREADABLE, f"the pictures can't be copied: {process.last_words()}")
