"""Write an excerpt of a media file as a smaller one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ffmpeg
import soundfile

from avsep.limits import DecodeLimits
from avsep.media.decode import decode
from avsep.media.excerpt import n_images, seek, sound_filters
from avsep.media.faults import SLACK_S, judge, reaches, survey
from avsep.media.ffmpeg import (
    Changed,
    FFmpeg,
    Header,
    Listening,
    or_inf,
    read_header,
    time_left,
)
from avsep.records import ClipError, Reason

_FPS = 30  # of the pictures in the store


@dataclass(frozen=True)
class CutOptions:
    """How an excerpt is written."""

    max_height: int = 360  # pixels
    max_bytes: int = 1 << 30
    limits: DecodeLimits = field(default_factory=DecodeLimits)  # of cutting and checking


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
    limits = replace(options.limits, timeout_s=time_left(deadline, options.limits.timeout_s))
    headers = [(file, read_header(file, limits)) for file in files]
    sound = next(((f, h) for f, h in headers if h.info.has_audio), None)
    video = next(((f, h) for f, h in headers if h.info.has_video), None)
    if sound is None:
        raise ClipError(Reason.NO_AUDIO, "no audio stream")
    sound_end_s = or_inf(sound[1].info.duration_s)  # says the header
    if start_s >= sound_end_s and not reaches(sound[0], start_s, limits=limits):
        if said_s is not None and start_s < said_s - SLACK_S:
            raise ClipError(Reason.TRUNCATED, f"ends at {sound_end_s:.2f} s; the site says {said_s:g} s")
        raise ClipError(Reason.PAST_END, f"starts at {start_s:g} s; the media end at {sound_end_s:g} s")
    longest_s = start_s + limits.max_duration_s
    too_long = math.inf > min(or_inf(end_s), sound_end_s) > longest_s
    if too_long and reaches(sound[0], longest_s, limits=limits):
        raise ClipError(Reason.TOO_LONG, f"more than {limits.max_duration_s:g} s")
    length_s = min(or_inf(end_s), longest_s + 1) - start_s
    if video is not None and start_s >= or_inf(video[1].info.duration_s):
        video = None  # it ended before
    process = _encode_each(sound, video, start_s, length_s, target, options, limits)

    limits = replace(limits, timeout_s=time_left(deadline, options.limits.timeout_s))
    try:
        clip = decode(target, image_size=16, limits=limits)
    except ClipError as error:
        if error.reason in (Reason.EMPTY, Reason.UNREADABLE, Reason.TRUNCATED):
            raise ClipError(Reason.TRUNCATED, f"nothing decodes from {start_s:g} s on") from None
        raise
    sound_s = len(clip.waveform) / clip.sample_rate
    stop_s, wanted_s = start_s + sound_s, or_inf(end_s)
    if said_s and stop_s < min(wanted_s, said_s) - SLACK_S:
        short = f"sound ends {sound_s:.2f} s into an excerpt of {min(wanted_s, said_s) - start_s:.2f} s"
        raise ClipError(Reason.TRUNCATED, short)
    promised_s = min(wanted_s, sound_end_s)
    if math.isfinite(promised_s) and stop_s < promised_s - SLACK_S:
        judge(sound[0], process, sound[1].tracks[0].stream, stop_s, promised_s, limits)
    if video is not None:
        video_s = min(sound_s, or_inf(video[1].info.duration_s) - start_s)
        if _too_few(len(clip.images), video_s) and video[1].video is not None:  # their stream may be shorter
            ends_s = survey(video[0], limits).ends_s
            video_s = min(video_s, ends_s.get(video[1].video, 0.0) - start_s)
        if _too_few(len(clip.images), video_s):
            shown = f"{len(clip.images)} pictures, one a second"
            raise ClipError(Reason.TRUNCATED, f"{shown}, in an excerpt of {video_s:.2f} s")


def _too_few(count: int, length_s: float) -> bool:
    return not count or count < n_images(length_s) - 1 - SLACK_S


# Cutting


_Source = tuple[Path, Header]


def _encode_each(
    sound: _Source,
    video: _Source | None,
    start_s: float,
    length_s: float,
    target: Path,
    options: CutOptions,
    limits: DecodeLimits,
) -> FFmpeg:
    """Encode an excerpt; where that fails, find out whether sound or pictures are at fault."""
    rest, begins, wave = (start_s, length_s, target, options, limits), start_s, target.with_suffix(".wav")
    try:
        try:
            process = _encode(sound, video, *rest)
        except Changed:  # a filter graph made anew would start from zero
            rate = sound[1].info.sample_rate or 48_000
            end_s = start_s + length_s
            clip = decode(sound[0], start_s, end_s, sample_rate=rate, images=False, limits=limits)
            soundfile.write(wave, clip.waveform, rate, subtype="FLOAT")
            sound, begins = (wave, read_header(wave, limits)), 0.0
            process = _encode(sound, video, *rest, sound_start_s=begins)
        if process.returncode and video is not None:
            alone = _encode(sound, None, *rest, sound_start_s=begins)
            if not alone.returncode:
                fault = _fault(video[0], *rest[:2], limits)
                raise ClipError(Reason.UNREADABLE, f"the pictures can't be used: {fault}")
            process = alone
    finally:
        wave.unlink(missing_ok=True)
    if process.returncode:
        raise ClipError(Reason.UNREADABLE, process.last_words() or "nothing decodes")
    return process


def _fault(file: Path, start_s: float, length_s: float, limits: DecodeLimits) -> str:
    """Say what is wrong with pictures that can't be encoded."""
    try:
        decode(file, start_s, start_s + length_s, image_size=16, sound=False, limits=limits)
    except ClipError as error:
        return error.detail
    return "they don't encode"


def _encode(
    sound: _Source,
    video: _Source | None,
    start_s: float,
    length_s: float,
    target: Path,
    options: CutOptions,
    limits: DecodeLimits,
    *,
    sound_start_s: float | None = None,
) -> FFmpeg:
    source, lead_s = seek(*sound, start_s if sound_start_s is None else sound_start_s, limits)
    listening, rate = Listening(mix=sound[1].tracks[0].mix), sound[1].info.sample_rate or 48_000
    filters = sound_filters(listening, lead_s, length_s, rate, samples="s16", layouts="mono|stereo")
    streams = [source["a:0"]]
    coding: dict[str, Any] = {"format": "matroska", "fs": options.max_bytes, "c:a": "flac"}
    coding |= {"af": f"{filters},asetpts=N/SR/TB", "map_metadata": -1, "map_chapters": -1}
    coding |= {"fflags": "+bitexact", "flags:a": "+bitexact"}
    if video is not None:
        if video[0] != sound[0]:
            source, lead_s = seek(*video, start_s, limits)
        streams.append(source["V:0"])
        coding |= {"vf": _video_filters(lead_s, length_s, options.max_height), "r": _FPS, "g": _FPS, "bf": 0}
        coding |= {"flags:v": "+bitexact", "threads": limits.threads}
    x264, mpeg4 = {"c:v": "libx264", "preset": "veryfast", "crf": 21}, {"c:v": "mpeg4", "q:v": 4}
    for encoder in (x264, mpeg4):
        target.unlink(missing_ok=True)  # of an attempt that failed
        chosen = {**coding, **encoder} if video is not None else coding
        output = ffmpeg.output(*streams, f"file:{target}", **chosen)
        with FFmpeg([output], sound[0], limits, listening=Listening()) as process:
            for _ in process.pieces(limits.timeout_s):
                pass
        if "Unknown encoder 'libx264'" not in process.log:
            break
    return process


def _video_filters(lead_s: float, length_s: float, short: int) -> str:
    """Return ffmpeg's filters for the pictures of an excerpt: number k is what is shown k / 30 s into it."""
    return (
        f"settb=1/1000000,setpts=PTS-{round(lead_s * 1e6)},fps={_FPS}:start_time=0:round=up"
        f",trim=end_frame={math.ceil(length_s * _FPS)},setpts=N"
        f",scale='if(gt(iw,ih),-2,2*trunc(min({short},iw)/2))':'if(gt(iw,ih),2*trunc(min({short},ih)/2),-2)'"
        ",format=yuv420p"
    )
