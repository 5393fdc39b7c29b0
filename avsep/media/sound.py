"""The sound of a whole file, in blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avsep.limits import DecodeLimits
from avsep.media.excerpt import open_excerpt, samples_of, says_empty
from avsep.media.faults import (
    QUIET,
    SLACK_S,
    cancelled,
    cancelled_note,
    check_samples,
    energy_of,
    judge,
    probe_audio,
    silence_notes,
)
from avsep.media.ffmpeg import ALTERNATING, Changed, FFmpeg, Header, Listening, count_channels, or_inf
from avsep.records import ClipError, Reason


def listen(path: Path, *, limits: DecodeLimits = DecodeLimits(), track: int = 1) -> tuple[Listening, tuple[str, ...]]:
    """Find out how the sound of a file too long for `decode` is taken, for `iter_audio`, and what to note.

    Reads until the sound isn't quiet any more, as a rule its first second. Raises as `iter_audio` does.
    """
    found = Listening(track)
    header = probe_audio(path, limits, found)
    energies = []
    for mix in ("", ALTERNATING):
        peak, energy = 0.0, 0.0
        tried = replace(found, mix=mix)
        for block in iter_audio(path, sample_rate=8000, block=1 << 13, limits=limits, listening=tried):
            peak, energy = max(peak, float(np.abs(block).max())), energy + energy_of(block)
            if not mix and peak >= QUIET:
                return found, ()
        energies.append(energy)
        if header.tracks[track - 1].layout == "mono":
            return found, tuple(silence_notes(peak, header, track))
    if cancelled(*energies):
        return tried, (cancelled_note(header.tracks[track - 1]),)
    return found, tuple(silence_notes(peak, header, track))


def as_it_is(path: Path, *, limits: DecodeLimits = DecodeLimits(), track: int = 1) -> tuple[int, Listening]:
    """Read what a track's header says: its sample rate in Hz, and how `iter_audio` takes all of its channels.

    Channels of a layout that nobody knows are mixed to one. Raises as `iter_audio` does.
    """
    found = probe_audio(path, limits, Listening(track)).tracks[track - 1]
    layout = found.layout if count_channels(found.layout) else "mono"
    return found.sample_rate or 48_000, Listening(track, layout=layout)


def iter_audio(
    path: Path,
    *,
    sample_rate: int,
    block: int,
    limits: DecodeLimits = DecodeLimits(),
    listening: Listening = Listening(),
) -> Iterator[NDArray[np.float32]]:
    """Decode a whole file's audio as `decode` does, `block` samples at a time, the last block shorter.

    Blocks are `(block,)`, mixed to one channel, and `(C, block)` where the listening has a layout.
    Memory stays the same however long the file is: `max_duration_s` doesn't apply, and
    `timeout_s` bounds the wait for each piece. What channels have left of each other isn't looked
    for: `listen` does. Raises ClipError while iterating: MISSING, EMPTY, UNREADABLE, NO_AUDIO,
    CRASHED_DECODER, TIMEOUT (transient) and, after the last block, TRUNCATED.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be a positive number of samples")
    header = probe_audio(path, limits, listening)
    sound = whole_sound(path, header, listening, sample_rate, limits)
    excerpt, n_samples = yield from _blocks(sound, block, listening.n_channels if listening.layout else None)
    if excerpt.too_many_errors or (not n_samples and excerpt.returncode):
        raise ClipError(Reason.UNREADABLE, excerpt.last_words() or "nothing decodes")
    if not n_samples:
        raise ClipError(Reason.EMPTY, excerpt.last_words() or "no samples")
    end_s, promised_s = n_samples / sample_rate, or_inf(header.info.duration_s)
    if end_s < promised_s - SLACK_S < math.inf or excerpt.stopped:
        own = header.tracks[listening.track - 1].stream
        judge(path, excerpt, own, end_s, promised_s, limits)


def _blocks(
    pieces: Generator[bytes, None, FFmpeg], block: int, n_channels: int | None
) -> Generator[NDArray[np.float32], None, tuple[FFmpeg, int]]:
    """Divide float32 samples into blocks; return what `pieces` returns, and their number."""
    n_samples, rest, width = 0, bytearray(), 4 * (n_channels or 1)

    def samples_of_rest(count: int) -> NDArray[np.float32]:
        samples = check_samples(np.frombuffer(bytes(rest[: width * count]), "<f4"))
        return samples if n_channels is None else samples.reshape(-1, n_channels).T

    while True:
        try:
            rest += next(pieces)
        except StopIteration as end:
            if left := len(rest) // width:
                yield samples_of_rest(left)
            return end.value, n_samples + left
        while len(rest) >= width * block:
            yield samples_of_rest(block)
            del rest[: width * block]
            n_samples += block


def whole_sound(
    path: Path, header: Header, listening: Listening, sample_rate: int, limits: DecodeLimits
) -> Generator[bytes, None, FFmpeg]:
    """Give a whole file's float32 samples as they come; return the ffmpeg that read the last."""
    links = ogg_links(path, header)
    for link in links:
        listening = replace(listening, link=link if len(links) > 1 else None)
        if listening.link:
            header = probe_audio(path, limits, listening)
        mix = listening.mix or header.tracks[listening.track - 1].mix
        sound = replace(header, info=replace(header.info, has_video=False))
        excerpt = yield from _link_sound(path, sound, replace(listening, mix=mix), sample_rate, limits)
    return excerpt


def _link_sound(
    path: Path, sound: Header, listening: Listening, sample_rate: int, limits: DecodeLimits
) -> Generator[bytes, None, FFmpeg]:
    given = 0  # bytes
    while True:
        at = 0
        try:
            with open_excerpt(path, sound, 0.0, math.inf, sample_rate, 0, limits, listening=listening) as excerpt:
                for data in samples_of(excerpt, sample_rate, limits.timeout_s):
                    fresh = data[max(0, given - at) :]
                    at += len(data)
                    given = max(given, at)
                    yield fresh
            if not says_empty(excerpt, at):
                return excerpt
            listening = replace(listening, endless=True)
        except Changed:
            listening = replace(listening, timed=True)


def ogg_links(path: Path, header: Header) -> list[tuple[int, int]]:
    """Return where each link of an Ogg chain starts and ends, in bytes; of other files none but the whole.

    A link starts with pages that begin a stream, after others. ffmpeg itself goes on to the next
    link only where that is like the first.
    """
    starts, position, head = [0], 0, True
    n_bytes = path.stat().st_size
    with path.open("rb") as f:
        while header.format == "ogg" and position < n_bytes:
            f.seek(position)
            page = f.read(27 + 255)
            if len(page) < 27 or not page.startswith(b"OggS"):
                break
            begins = bool(page[5] & 2)
            if begins and not head:
                starts.append(position)
            head = begins
            position += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return list(itertools.pairwise([*starts, n_bytes]))
