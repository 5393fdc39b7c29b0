"""A result's sounds mixed anew, each with a gain: as a sound, and under the pictures that were uploaded."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from avsep import media
from avsep.outputs import FORMATS, mixed_down
from avsep.service.results import UPLOAD

MOST_GAIN = 4.0  # 12 dB
_BLOCK = 1 << 16  # samples of each channel
_CEILING = 1 - 2**-15  # full scale, for what has whole numbers


def parse_gains(text: str, names: Sequence[str]) -> dict[str, float]:
    """Read `violin:0.5,_rest:0`: a gain for each of `names`, 1 for what isn't there; ValueError says what is wrong.

    >>> parse_gains("_rest:0", ["violin", "_rest"])
    {'violin': 1.0, '_rest': 0.0}
    """
    gains: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, number = part.partition(":")
        name = name.strip()
        if name not in names:
            raise ValueError(f"'gains' names {name[:40]!r}; the sounds are {', '.join(names)}")
        if name in gains:
            raise ValueError(f"'gains' names {name} twice; give each sound one")
        try:
            gains[name] = float(number)
        except ValueError:
            gains[name] = math.nan
        if not 0 <= gains[name] <= MOST_GAIN:
            raise ValueError(f"the gain of {name} is {number[:40]!r}; give a number from 0 to {MOST_GAIN:g}")
    return dict.fromkeys(names, 1.0) | gains


class Mix:
    """Sounds of one length, channels and sample rate, each a WAV file with a gain."""

    def __init__(self, gains: Mapping[Path, float]) -> None:
        self._gains = gains
        self.info = soundfile.info(next(iter(gains)))

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Give the sum from its start, `(S, C)` at a time."""
        with contextlib.ExitStack() as stack:
            files = [(stack.enter_context(soundfile.SoundFile(p)), g) for p, g in self._gains.items() if g]
            for start in range(0, self.info.frames, _BLOCK):
                shape = min(_BLOCK, self.info.frames - start), self.info.channels
                mixed = np.zeros(shape, np.float32)
                for file, gain in files:
                    mixed += np.float32(gain) * file.read(_BLOCK, dtype="float32", always_2d=True)
                yield mixed

    def scale(self) -> float:
        """Return what the sum is to be multiplied by so that nothing is above full scale, 1 as a rule."""
        peak = max((float(np.abs(block).max(initial=0)) for block in self.blocks()), default=0.0)
        return min(1.0, _CEILING / max(peak, 1e-9))

    def write(self, target: Path, format: str, clips: bool) -> str:
        """Write the sum, scaled where it would clip; return what to note."""
        scale = self.scale() if clips else 1.0
        kind = "RF64" if format == "wav" and self.n_bytes >= 2**32 else format
        how = {"subtype": FORMATS[format], "format": kind}
        with soundfile.SoundFile(target, "w", self.info.samplerate, self.info.channels, **how) as file:
            for block in self.blocks():
                file.write(np.float32(scale) * block)
        return f"made {-20 * math.log10(scale):.1f} dB softer, so that nothing clips" if scale < 1 else ""

    @property
    def n_bytes(self) -> int:
        """How large it is at most."""
        return 4 * self.info.frames * self.info.channels + (1 << 16)


def write_video(mix: Mix, folder: Path, target: Path, limits: media.DecodeLimits) -> str:
    """Write a job's upload, its pictures bit for bit and the mix as their sound; return what to note.

    The target's suffix says in what container. Raises ClipError where the pictures can't be copied.
    """
    sound = folder / f"mix.{secrets.token_hex(4)}.part"
    try:
        softer = mix.write(sound, "wav", clips=True)
        media.mux(folder / UPLOAD, sound, mix.info.channels, target, limits=limits)
    finally:
        sound.unlink(missing_ok=True)
    return "; ".join(filter(None, (softer, mixed_down(mix.info.channels))))


def mix_of(sounds: Path, gains: Mapping[str, float]) -> Mix:
    """Return the mix of the sounds in a folder, whose files' names are given without suffix."""
    return Mix({sounds / f"{name}.wav": gain for name, gain in gains.items()})
