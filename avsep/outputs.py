"""How separated sounds are written: channels, sample rates and formats."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from avsep.media import Listening, aac_channels
from avsep.separation import REST

MIXTURE = "_mixture"
FORMATS = {"wav": "FLOAT", "flac": "PCM_24", "mp3": "MPEG_LAYER_III"}  # soundfile's subtypes
_MOST_CHANNELS = {"flac": 8, "mp3": 2, "ogg": 8}
_RATES: dict[str, Collection[int]] = {  # Hz
    "flac": range(1, 655_351),
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    "ogg": range(1000, 192_001),
}
_WAV_BYTES = 4_000_000_000  # WAV's sizes have 32 bits


class CannotHold(ValueError):
    """A format can't hold a sound: `fact` says why; `mono` whether one channel at the separator's rate may help."""

    def __init__(self, fact: str, mono: bool) -> None:
        super().__init__(f"{fact}: give another --format{', or --mono' if mono else ''}")
        self.fact, self.mono = fact, mono


def lacks(format: str, sample_rate: int, n_channels: int) -> str:
    """Say why a format, `ogg` among them, can't hold a sound; "" where it can.

    >>> lacks("mp3", 44_100, 6), lacks("ogg", 44_100, 6)
    ('the sound has 6 channels, and mp3 at most 2', '')
    """
    most = _MOST_CHANNELS.get(format, n_channels)
    if n_channels > most:
        return f"the sound has {n_channels} channels, and {format} at most {most}"
    if sample_rate not in _RATES.get(format, (sample_rate,)):
        return f"the sound has {sample_rate} Hz, which {format} can't hold"
    return ""


@dataclass(frozen=True)
class Shape:
    """The sounds' sample rate in Hz, their channels, and how a file's are read; None: it is the separator's own."""

    sample_rate: int
    n_channels: int = 1
    listening: Listening | None = None
    duration_s: float = 0.0
    container: str = ""  # the suffix of videos, where some are written

    @property
    def note(self) -> str:
        """Say that videos aren't mp4, or have fewer channels than the sounds."""
        if not self.container:
            return ""
        kind = "" if self.container == "mp4" else f"mp4 can't hold these pictures: the videos are {self.container}"
        return "; ".join(filter(None, (kind, mixed_down(self.n_channels))))


@dataclass(frozen=True)
class Output:
    """What is written of a separation."""

    mono: bool = False  # one channel at the separator's sample rate, else as the file is
    format: str = "wav"
    two_stems: str | None = None  # an object: it and all the rest
    video: bool = False  # the file's pictures, too, with each object's sound
    as_wav: bool = False  # for now: it is to be converted to the format when somebody asks

    @property
    def suffix(self) -> str:
        """What the names of sounds end with, without the dot."""
        return "wav" if self.as_wav else self.format

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of files may end with that are written."""
        return (".wav", f".{self.format}", *((".mp4", ".mkv") if self.video else ()))

    def check(self, shape: Shape) -> None:
        """Raise CannotHold where the format can't hold such sounds."""
        if fact := lacks(self.format, shape.sample_rate, shape.n_channels):
            raise CannotHold(fact, mono=not self.mono)

    def names(self, objects: Sequence[str]) -> list[str]:
        """Return the sounds' names, that of what is left last."""
        return [*objects, REST] if self.two_stems is None else [self.two_stems, f"no_{self.two_stems}"]

    def videos(self, objects: Sequence[str], shape: Shape) -> dict[str, str]:
        """Name the video of each sound that has one, both with their suffixes."""
        if not self.video:
            return {}
        named = {name: name for name in self.names(objects)[: 1 if self.two_stems else -1]}
        if self.two_stems:
            named[f"no_{self.two_stems}"] = f"without_{self.two_stems}"
        return {f"{sound}.{self.suffix}": f"{video}.{shape.container}" for sound, video in named.items()}

    def described(
        self, objects: Sequence[str], shape: Shape, files: Sequence[str], entries: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what a report says of the files; its `entries` on the objects name each one's file, or None."""
        written = self.names(objects)
        for entry in entries:
            entry["file"] = f"{entry['name']}.{self.suffix}" if entry["name"] in written else None
            if self.video:
                entry["video"] = self.videos(objects, shape).get(entry["file"])
        return {
            "sample_rate": shape.sample_rate,
            "channels": shape.n_channels,
            "objects": list(entries),
            "rest": f"{written[-1]}.{self.suffix}",
            "files": list(files),
        }


HEARD = "_heard"  # the mono mix that a separator heard, where the sounds have other channels or another rate
AS_IT_IS = Output()
MONO = Output(mono=True)


def mixed_down(n_channels: int) -> str:
    """Say that the sound of videos has fewer channels than `n_channels`; "" where it hasn't."""
    held = aac_channels(n_channels)
    return (
        f"the videos' sound is mixed to {held} channel{'s' * (held > 1)}: AAC holds no {n_channels}"
        if held != n_channels
        else ""
    )


def clipped(loud: Sequence[str], *formats: str) -> str:
    """Say which sounds are above full scale, where formats clip; "" for none, or for WAV alone."""
    formats = tuple(f for f in formats if f != "wav")
    if not loud or not formats:
        return ""
    *others, last = formats
    named = f"{', '.join(others)} and {last} clip" if others else f"{last} clips"
    return f"{', '.join(loud)}: louder than full scale, where {named}; wav doesn't"


def write_sounds(
    objects: Sequence[str],
    rendered: Iterable[NDArray[np.float32]],
    out: Path,
    shape: Shape,
    output: Output,
    mixture: bool = False,
    parents: bool = True,
) -> tuple[list[str], list[str]]:
    """Write blocks of sounds `(J + 1, C, S)`, under other names until all are whole.

    Returns the files' names, and those of the sounds above full scale, which all but WAV clips.
    """
    suffix = output.suffix
    names = [*output.names(objects), *([MIXTURE] if mixture else [])]
    parts = [out / f"{name}.{suffix}.part" for name in names]
    peaks = np.zeros(len(names))
    kind = suffix.upper()
    if suffix == "wav" and 4 * shape.duration_s * shape.sample_rate * shape.n_channels >= _WAV_BYTES:
        kind = "RF64"
    out.mkdir(parents=parents, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            how: dict[str, Any] = {"subtype": FORMATS[suffix], "format": kind}
            files = [
                stack.enter_context(soundfile.SoundFile(p, "w", shape.sample_rate, shape.n_channels, **how))
                for p in parts
            ]
            for block in _chosen(objects, rendered, output.two_stems):
                rows = [*block, block.sum(0)] if mixture else block
                peaks = np.maximum(peaks, [np.abs(row).max(initial=0) for row in rows])
                for file, samples in zip(files, rows, strict=True):
                    file.write(samples.T)
        for part in parts:
            part.replace(part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    loud = [name for name, peak in zip(names, peaks, strict=True) if peak > 1]
    return [f"{name}.{suffix}" for name in names], loud


def _chosen(
    objects: Sequence[str], rendered: Iterable[NDArray[np.float32]], one: str | None
) -> Iterator[NDArray[np.float32]]:
    """Pass blocks on; of two stems, that of one object and the sum of all others."""
    if one is None:
        yield from rendered
        return
    row = list(objects).index(one)
    for block in rendered:
        yield np.stack([block[row], np.delete(block, row, 0).sum(0)])
