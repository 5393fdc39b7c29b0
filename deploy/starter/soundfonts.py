"""Notes of sound banks: SF2 and SF3 played by tinysoundfont, Gravis patches played here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RATE = 48_000
_RELEASE_S = 0.8


class Bank:
    """An SF2 or SF3 file."""

    def __init__(self, path: Path) -> None:
        import tinysoundfont

        self._synth = tinysoundfont.Synth(samplerate=RATE, gain=-6)
        self._font = self._synth.sfload(str(path))

    def has(self, bank: int, program: int) -> bool:
        """Tell whether there is such an instrument."""
        return bool(self._synth.sfpreset_name(self._font, bank, program))

    def note(self, bank: int, program: int, key: int, velocity: int, seconds: float) -> np.ndarray:
        """Play one note, `(n,)` float32 at 48 kHz, and let it ring."""
        synth, drums = self._synth, bank == 128
        synth.sounds_off(0)
        synth.program_select(0, self._font, bank, program, drums)
        synth.noteon(0, key, velocity)
        parts = [self._generate(seconds)]
        synth.noteoff(0, key)
        parts.append(self._generate(_RELEASE_S))
        return np.concatenate(parts)

    def _generate(self, seconds: float) -> np.ndarray:
        stereo = np.frombuffer(self._synth.generate(int(seconds * RATE)), np.float32)
        return stereo.reshape(-1, 2).mean(1)


class Patch:
    """A Gravis Ultrasound patch: samples of an instrument, each at a pitch of its own."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        n_samples, at = data[198], 239  # after the file's, the instrument's and the layer's headers
        self._samples = []
        for _ in range(n_samples):
            size, begin, end, rate, _, _, root = struct.unpack_from("<IIIHIII", data, at + 8)
            mode = data[at + 55]
            raw = data[at + 96 : at + 96 + size]
            kind = ("u2" if mode & 2 else "<i2") if mode & 1 else ("u1" if mode & 2 else "i1")
            x = np.frombuffer(raw[: size // 2 * 2] if mode & 1 else raw, kind).astype(np.float32)
            x = (x - (32768 if mode & 1 else 128) * bool(mode & 2)) / (32768 if mode & 1 else 128)
            width = 2 if mode & 1 else 1
            loop = (begin // width, end // width) if mode & 4 and end > begin else None
            self._samples.append((root, rate, x, loop))
            at += 96 + size

    def note(self, key: int, seconds: float, decay_s: float | None) -> np.ndarray:
        """Play one note; `decay_s`, for what is struck or plucked, is the time in which it falls by 60 dB."""
        hertz = 440_000 * 2 ** ((key - 69) / 12)
        root, rate, x, loop = min(self._samples, key=lambda s: abs(np.log(s[0] / hertz)))
        step = hertz / root * rate / RATE
        position = np.arange(int((seconds + _RELEASE_S) * RATE)) * step
        if loop:
            begin, end = loop
            position = np.where(position < end, position, begin + (position - begin) % (end - begin))
        y = np.interp(position, np.arange(len(x)), x, right=0).astype(np.float32)
        t = np.arange(len(y)) / RATE
        if loop and decay_s:
            y *= 10 ** (-3 * t / decay_s)
        return y * np.clip((seconds + _RELEASE_S - t) / _RELEASE_S, 0, 1).astype(np.float32)

    def hit(self) -> np.ndarray:
        """Play a drum's sample as it is."""
        _, rate, x, _ = self._samples[0]
        return np.interp(np.arange(int(len(x) * RATE / rate)) * rate / RATE, np.arange(len(x)), x).astype(np.float32)


def patch_of(folder: Path, program: int) -> Patch | None:
    """Find a program's patch in freepats' folder."""
    for path in folder.glob(f"Tone_000/{program:03d}_*.pat"):
        return Patch(path)
    return None


def drum_patches(folder: Path, keys: tuple[int, ...]) -> Iterator[tuple[int, Patch]]:
    """Find the patches of a drum kit's keys."""
    for key in keys:
        for path in folder.glob(f"Drum_000/{key:03d}_*.pat"):
            yield key, Patch(path)
