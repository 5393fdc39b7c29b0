"""A whole file's pictures and sound, however long it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avsep import media
from avsep.records import ClipError, Reason

VIDEOS = (  # what the names of videos end with, in small letters
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm"),
    ".wmv",
)
SUFFIXES = (  # of the files of a folder that are taken for videos and sounds
    *VIDEOS,
    *(".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".mka", ".mp2", ".mp3", ".oga", ".ogg"),
    *(".opus", ".rf64", ".w64", ".wav", ".weba", ".wma", ".wv"),
)
HELD_S = 60.0  # a file up to this long is decoded once and held; a longer one is read twice, in blocks
MAX_PICTURES = 60  # of a file that are labelled; a longer one is sampled evenly
DECODED = 0.05  # share of the work on a long file when its pictures are there
_MIDDLE_S = 0.5  # of a second: where in it its picture is taken
_BLOCK = 1 << 20  # samples read at a time
_LIMITS = media.DecodeLimits()


Step = Callable[[str, float], None]  # is told the stage and how much is done in [0, 1]; raises to stop the work


def no_step(stage: str, done: float) -> None:
    """Go on."""


@dataclass(frozen=True)
class FileLimits:
    """What one file may be, and what reading it may use."""

    max_duration_s: float = float("inf")
    decode: media.DecodeLimits = field(default_factory=media.DecodeLimits)


NO_LIMITS = FileLimits()  # but those of decoding


class WholeFile:
    """One file's pictures and sound; the sound can be read more than once."""

    def __init__(
        self,
        video: Path,
        sample_rate: int,
        image_size: int,
        limits: FileLimits,
        step: Step = no_step,
        track: int = 1,
    ) -> None:
        self._video, self._rate, self._limits = video, sample_rate, limits
        self._held: NDArray[np.float32] | None = None
        held = min(HELD_S, limits.max_duration_s, limits.decode.max_duration_s)
        try:
            shorter = replace(limits.decode, max_duration_s=held)
            clip = media.decode(video, sample_rate=sample_rate, image_size=image_size, limits=shorter, track=track)
        except ClipError as error:
            if error.reason != Reason.TOO_LONG or held < HELD_S:
                raise
            info = media.probe(video, timeout_s=limits.decode.timeout_s)
            duration_s = info.duration_s
            too_long = duration_s is not None and duration_s > limits.max_duration_s  # says the header; is it true?
            if too_long and media.reaches(video, limits.max_duration_s, limits=limits.decode):
                raise _too_long(limits) from None
            self._listening, self.notes = media.listen(video, limits=limits.decode, track=track)
            self.n_samples = round(sample_rate * (duration_s or 2 * held))  # a guess, where the header doesn't say
            self.images, self.times_s = images(video, image_size, info, limits.decode, step)
        else:
            self._held, self.images, self.notes = clip.waveform, clip.images, clip.notes
            self.times_s = _every_second(self.images)
            self.n_samples = len(clip.waveform)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Read the sound from its start, `(S,)` at a time."""
        if self._held is not None:
            yield self._held
            return
        n_samples = 0
        for block in self._read(self._rate, self._listening):
            n_samples += len(block)
            if n_samples > self._limits.max_duration_s * self._rate:  # headers may promise too little
                raise _too_long(self._limits)
            yield block
        self.n_samples = n_samples

    def channels(self, sample_rate: int, listening: media.Listening) -> Iterator[NDArray[np.float32]]:
        """Read the sound from its start as `media.as_it_is` says, `(C, S)` at a time."""
        return self._read(sample_rate, listening)

    def _read(self, sample_rate: int, listening: media.Listening) -> Iterator[NDArray[np.float32]]:
        block = _BLOCK // listening.n_channels
        limits = self._limits.decode
        return media.iter_audio(self._video, sample_rate=sample_rate, block=block, limits=limits, listening=listening)


def _too_long(limits: FileLimits) -> ClipError:
    return ClipError(Reason.TOO_LONG, f"more than {limits.max_duration_s:g} s")


def images(
    video: Path,
    image_size: int,
    info: media.MediaInfo | None = None,
    limits: media.DecodeLimits = _LIMITS,
    step: Step = no_step,
) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """Decode pictures from all over a file, at most a minute's worth, as `media.decode` gives them, and their times."""
    found: list[tuple[float, NDArray[np.uint8]]] = []
    info = info or media.probe(video)
    if not info.has_video:
        return np.zeros((0, 0, 0, 3), np.uint8), ()
    decode = functools.partial(media.decode, video, image_size=image_size, limits=limits, sound=False)
    if info.duration_s is None or info.duration_s <= MAX_PICTURES:
        images = decode(0, None if info.duration_s else MAX_PICTURES).images
        return images, _every_second(images)
    for number, start in enumerate(np.linspace(0, info.duration_s - 1, MAX_PICTURES)):
        step("decoding", DECODED * number / MAX_PICTURES)
        with contextlib.suppress(ClipError):  # a damaged stretch
            found += [(float(start), image) for image in decode(float(start), float(start) + 1).images]
    same = [(at, f) for at, f in found if f.shape == found[0][1].shape]  # where a stream changes its size, the first
    times_s = tuple(at + _MIDDLE_S for at, _ in same)
    return np.stack([f for _, f in same]) if same else np.zeros((0, 0, 0, 3), np.uint8), times_s


def _every_second(images: NDArray[np.uint8]) -> tuple[float, ...]:
    """Give the times of pictures that are a second apart."""
    return tuple(i + _MIDDLE_S for i in range(len(images)))
