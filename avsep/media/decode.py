"""The ffmpeg edge: media files in, arrays out, bounded in time and memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avsep.limits import DecodeLimits
from avsep.media.excerpt import LEAD_S, open_excerpt, read_excerpt, says_empty
from avsep.media.faults import (
    QUIET,
    SLACK_S,
    Request,
    cancelled,
    cancelled_note,
    check_header,
    check_samples,
    energy_of,
    judge,
    reaches,
    silence_notes,
)
from avsep.media.ffmpeg import (
    ALTERNATING,
    MEAN,
    Changed,
    FFmpeg,
    Header,
    Listening,
    MediaInfo,
    OtherHeader,
    TooManyPixels,
    check_file,
    or_inf,
)
from avsep.media.sound import ogg_links, whole_sound
from avsep.records import Clip, ClipError, Reason

_LOST = 10  # packets that don't decode are worth a note; a few at the start of a recording aren't


@dataclass
class _Taken:
    """What one pass of ffmpeg gave."""

    header: Header
    listening: Listening
    waveform: NDArray[np.float32]
    images: NDArray[np.uint8]
    process: FFmpeg


def decode(
    path: Path,
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    sample_rate: int = 48_000,
    image_size: int = 256,
    limits: DecodeLimits = DecodeLimits(),
    images: bool = True,
    sound: bool = True,
    track: int = 1,
) -> Clip:
    """Decode the excerpt `start_s … end_s` (None: the file's end), as a rule in one pass of ffmpeg.

    The waveform is mono float32 `(S,)` at `sample_rate` Hz, of the audio track with that number.
    Channels are downmixed: surround as ffmpeg does it, ambisonics to W, others to their mean. Where
    they cancel each other, the waveform is their sum with alternating signs: of stereo the side
    signal, (L − R) / 2. Silence fills gaps in the timestamps, so that sound and pictures stay
    together: from 0.1 s on, at the start from 1 ms on. Samples that are mono at this rate already come out unchanged.
    After a seek they are placed as exactly as the timestamps are: Matroska rounds these to milliseconds.

    The images are `(n_images, height, width, 3)` RGB uint8: what a player shows 0.5, 1.5, … s into the excerpt, upright
    and whole. The short side is resized to `image_size`. Of a long side of more than three times that the middle is
    kept. Video too short for that gives its first picture, a
    file without usable video none. Neither `images` nor `sound` is decoded unless it is wanted.

    The clip's notes say what a user should know: pictures that can't be used, channels that cancel,
    silence, a header that promises more than there is. A file that ends before `end_s` gives a
    shorter clip. Raises ValueError for times that bound no excerpt, and ClipError: MISSING, EMPTY,
    UNREADABLE, NO_AUDIO, NO_VIDEO (without `sound`), PAST_END, TRUNCATED, TOO_LONG, TOO_LARGE,
    CRASHED_DECODER, TIMEOUT (transient).
    """
    if not (math.isfinite(start_s) and start_s >= 0 and (end_s is None or start_s < end_s)):
        raise ValueError(f"the excerpt is {start_s}…{end_s} s; it must start from 0 up and end after that")
    if track < 1:
        raise ValueError(f"the audio track is {track}; tracks are counted from 1")
    deadline = time.monotonic() + limits.timeout_s
    end_s = math.inf if end_s is None else end_s
    request = Request(path, start_s, end_s, sample_rate, image_size, limits, deadline)
    check_file(path)
    taken, trouble = _take_each(request, Listening(track), sound, images)
    if sound and len(ogg_links(path, taken.header)) > 1:
        _chain(request, taken)
    notes = _missing(request, taken, sound)
    if trouble:
        state = "end early" if len(taken.images) else "can't be used"
        notes.append(f"the pictures {state}: {trouble}")
    if sound:
        check_samples(taken.waveform)
        notes += _hear(request, taken)
    return Clip(taken.waveform, sample_rate, taken.images, tuple(notes))


def _take_each(request: Request, listening: Listening, sound: bool, images: bool) -> tuple[_Taken, str]:
    """Take sound and pictures together; where that fails each by itself, so that neither is blamed for the other.

    Returns what was taken, and what is wrong with the pictures.
    """
    if not (sound and images):
        return _take(request, listening, sound, images), ""
    try:
        taken = _take(request, listening)
        info = taken.header.info
        if not taken.process.returncode or not info.has_video:
            return taken, ""
    except ClipError as error:
        refused = error.transient or isinstance(error, TooManyPixels)
        if refused or error.reason not in (Reason.TOO_LARGE, Reason.CRASHED_DECODER):
            raise
    taken = _take(request, listening, images=False)
    if not taken.header.info.has_video:
        return taken, ""
    try:
        seen = _take(request, listening, sound=False)
    except ClipError as error:
        if error.transient:
            raise
        return taken, error.detail
    taken.images = seen.images
    return taken, seen.process.last_words() if seen.process.returncode else ""


def _take(request: Request, listening: Listening, sound: bool = True, images: bool = True) -> _Taken:
    """Decode in one pass of ffmpeg, or in another where the file turns out not to be as most are."""
    assumed = Header(MediaInfo(None, sound, images, None, None, None), zero_s=0.0, indexed=True)

    def look(header: Header) -> None:
        check_header(request, header, listening.track, sound, images)
        blind = assumed.info.has_video and not header.info.has_video
        sought = request.start_s > LEAD_S and header.indexed != assumed.indexed
        unmixed = sound and not listening.mix and header.tracks[listening.track - 1].mix
        if blind or sought or unmixed or header.zero_s != assumed.zero_s:
            raise OtherHeader(header)

    while True:
        length_s, limits = request.length_s, request.remaining()
        size = request.sample_rate, request.image_size
        try:
            with open_excerpt(
                request.path, assumed, request.start_s, length_s, *size, limits, look, listening
            ) as excerpt:
                waveform, seen = read_excerpt(excerpt, length_s, *size, limits.timeout_s)
        except OtherHeader as other:
            info = replace(other.header.info, has_audio=sound, has_video=images and other.header.info.has_video)
            assumed = replace(other.header, info=info)
            if sound and not listening.mix:
                listening = replace(listening, mix=other.header.tracks[listening.track - 1].mix)
        except Changed:
            listening = replace(listening, timed=True)
        else:
            if excerpt.unmixable and not listening.mix:
                listening = replace(listening, mix=MEAN)
            elif says_empty(excerpt, len(waveform)) and not request.start_s:
                listening, assumed = replace(listening, endless=True), excerpt.header
            else:
                return _Taken(excerpt.header, listening, waveform, seen, excerpt)


def _missing(request: Request, taken: _Taken, sound: bool) -> list[str]:
    """Say what the header promises and the file hasn't; raise the ClipError of a file that is at fault."""
    process, header, start_s = taken.process, taken.header, request.start_s
    decoded_s = len(taken.waveform) / request.sample_rate if sound else max(0.0, len(taken.images) - 0.5)
    if decoded_s > request.limits.max_duration_s + 0.5:  # codecs pad the end
        raise request.too_long
    if process.too_many_errors or (not decoded_s and process.returncode):
        raise ClipError(Reason.UNREADABLE, process.last_words() or "nothing decodes")
    if not decoded_s and not start_s:
        raise ClipError(Reason.EMPTY, process.last_words() or "no samples")
    end_s, promised_s = start_s + decoded_s, min(request.end_s, or_inf(header.info.duration_s))
    notes = []
    if end_s < promised_s - SLACK_S < math.inf or (process.stopped and end_s < request.end_s):
        own = header.tracks[taken.listening.track - 1].stream if sound else header.video
        notes = judge(request.path, process, own, end_s, promised_s, request.remaining())
    if sound and (lost := process.lost(header.tracks[taken.listening.track - 1].stream)) >= _LOST:
        notes.append(f"{lost} packets of the sound are damaged: {process.last_words()}")
    if process.cut and end_s < request.end_s and header.info.duration_s is None:
        notes.append(f"the file ends in the middle of its data, at {end_s:.2f} s: it may have been cut")
    if not decoded_s and not len(taken.images) and not reaches(request.path, start_s, limits=request.remaining()):
        raise ClipError(Reason.PAST_END, f"nothing follows {start_s:g} s")
    if not decoded_s:
        raise ClipError(Reason.EMPTY, process.last_words() or f"no samples follow {start_s:g} s")
    return notes


def _hear(request: Request, taken: _Taken) -> list[str]:
    """Take the channels' differences where they cancel each other; say that, and say what is silent."""
    if np.abs(taken.waveform).max() >= QUIET:
        return []
    track = taken.header.tracks[taken.listening.track - 1]
    notes = []
    if track.layout != "mono":
        other = _take(request, replace(taken.listening, mix=ALTERNATING), images=False)
        if cancelled(energy_of(taken.waveform), energy_of(other.waveform)):
            taken.waveform = check_samples(other.waveform)
            notes = [cancelled_note(track)]
    return notes + silence_notes(float(np.abs(taken.waveform).max()), taken.header, taken.listening.track)


def _chain(request: Request, taken: _Taken) -> None:
    """Take the excerpt's sound from all links of an Ogg chain, of which `taken` has the first."""
    start = 4 * round(request.start_s * request.sample_rate)
    end = start + 4 * round(request.length_s * request.sample_rate)
    pieces = whole_sound(request.path, taken.header, taken.listening, request.sample_rate, request.remaining())
    at, kept = 0, bytearray()
    while at < end:
        try:
            data = next(pieces)
        except StopIteration as last:
            taken.process = last.value
            break
        kept += data[max(0, start - at) : max(0, end - at)]
        at += len(data)
        if time.monotonic() > request.deadline:
            raise ClipError(Reason.TIMEOUT, f"ffmpeg took more than {request.limits.timeout_s:.3g} s", transient=True)
    taken.waveform = np.frombuffer(kept, "<f4", len(kept) // 4)
