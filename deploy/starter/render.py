"""Render training clips with known labels from the collected sounds: ten seconds of one to three objects each.

Every clip has its own room, microphone, levels, background and sometimes a codec; every object its own equaliser,
tuning and tempo. Some clips hold only sounds that are none of the objects, and are labelled `none`. Everything
follows from (--seed, clip number). Writes OUT/clips/*.flac and OUT/segments.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soundfile
from scipy.fft import irfft, rfft

RATE, SECONDS = 48_000, 10
LENGTH = RATE * SECONDS
N_OBJECTS = (0.16, 0.31, 0.37, 0.16)  # shares of clips of none, one, two and three objects
OFFSCREEN = 0.4  # share of the others that have another sound, too
VEHICLES = {"car", "train", "plane", "motorcycle"}
ANIMALS = {"cat", "dog", "chicken", "frog"}
RINGING = {"banjo", "acoustic_guitar", "electric_guitar", "drum", "harp", "marimba", "piano"}
CHORDS = {"acoustic_guitar", "electric_guitar", "piano", "accordion", "harp", "harmonica", "drum", "banjo", "marimba"}
BOWED = {"violin", "cello", "offscreen_ensembles"}
BLOWN = {"flute", "saxophone", "trombone", "french_horn", "harmonica", "offscreen_winds", "offscreen_brass"}
LOOPED = {"offscreen_effects", "offscreen_people", "offscreen_animals", "offscreen_things", "offscreen_speech"}
_HERTZ = np.fft.rfftfreq(LENGTH, 1 / RATE).astype(np.float32)
_OCTAVES = np.log2(np.maximum(_HERTZ, 30) / 30)  # above 30 Hz
_COARSE = np.linspace(0, 9.7, 200)
Bank = dict[str, dict[str, list[str]]]  # object: source: files


@lru_cache(maxsize=1500)
def sound(path: str) -> np.ndarray:
    """Read a sound, int16."""
    return soundfile.read(path, dtype="int16")[0]


def heard(path: str) -> np.ndarray:
    """Read a sound, float32."""
    return sound(path).astype(np.float32) / 32768


def bank_of(sounds: Path, without: frozenset[tuple[str, str]] = frozenset()) -> Bank:
    """List the sounds by object and source, but those of some (object, source)."""
    bank: Bank = {}
    for path in sorted(sounds.glob("*/*.flac")):
        source = path.name.split("__")[0]
        if (path.parent.name, source) not in without:
            bank.setdefault(path.parent.name, {}).setdefault(source, []).append(str(path))
    return bank


def played(x: np.ndarray, rng: np.random.Generator, semitones: float, vibrato: bool) -> np.ndarray:
    """Play a sound higher and faster, or with vibrato."""
    factor = 2 ** (semitones / 12)
    if not vibrato:
        if abs(semitones) < 0.02:
            return x
        return np.interp(np.arange(0, len(x) - 1, factor), np.arange(len(x)), x).astype(np.float32)
    t = np.arange(int((len(x) - 1) / factor * 0.99)) / RATE
    rate, depth = rng.uniform(4, 7), rng.uniform(8, 45) / 1200 * np.log(2)
    onset = np.clip((t - rng.uniform(0, 0.3)) / 0.3, 0, 1)
    swing = depth / (2 * np.pi * rate) * onset * np.cos(2 * np.pi * rate * t + rng.uniform(0, 6))
    y = np.interp(factor * (t - swing) * RATE, np.arange(len(x)), x).astype(np.float32)
    return y * (1 + rng.uniform(0, 0.25) * onset * np.sin(2 * np.pi * rate * t + rng.uniform(0, 6))).astype(np.float32)


def put(y: np.ndarray, x: np.ndarray, at: float, decibels: float) -> None:
    """Add a sound at a time in seconds, at a level beside an RMS of one."""
    start = int(at * RATE)
    x = x[: max(0, len(y) - start)]
    if len(x) > 480:
        y[start : start + len(x)] += x * (10 ** (decibels / 20) / (np.sqrt(np.mean(x**2)) + 1e-4))


def faded(x: np.ndarray, seconds: float) -> np.ndarray:
    """Fade the end."""
    n = min(len(x) // 2, int(seconds * RATE))
    if n:
        x = x.copy()
        x[-n:] *= np.linspace(1, 0, n, dtype=np.float32)
    return x


def tune(object_: str, files: list[str], rng: np.random.Generator) -> np.ndarray:
    """Play an instrument: a phrase of some notes of one source."""
    y = np.zeros(LENGTH, np.float32)
    files = [files[i] for i in rng.permutation(len(files))[: rng.integers(4, 14)]]
    tempo, tuning = rng.uniform(0.5, 1.6), rng.normal(0, 0.6)
    if rng.random() < 0.25:
        tuning += rng.choice([-3, -2, 2, 3])
    vibrato = object_ in BOWED | BLOWN and rng.random() < 0.6
    chords = object_ in CHORDS and rng.random() < 0.4
    legato = rng.uniform(0.7, 1.1)
    t = rng.uniform(0, 0.6) if rng.random() < 0.8 else rng.uniform(0.6, 4)
    while t < SECONDS - 0.15:
        if rng.random() < 0.15:
            t += rng.uniform(0.1, 0.9)
        seconds = np.exp(rng.uniform(np.log(0.12), np.log(1.8))) * tempo
        longest = 0.0
        for _ in range(int(rng.integers(2, 5)) if chords and rng.random() < 0.6 else 1):
            x = heard(files[rng.integers(len(files))])
            ring = len(x) / RATE
            if len(x) < 5.5 * RATE:  # a note, no excerpt
                ring = seconds * (rng.uniform(1.2, 4) if object_ in RINGING else legato)
            x = played(x[: int(1.3 * ring * RATE) + 1000], rng, tuning, vibrato)
            x = faded(x[: int(ring * RATE)], rng.uniform(0.01, 0.08))
            put(y, x, t + rng.uniform(0, 0.02), rng.uniform(-7, 3))
            longest = max(longest, min(len(x) / RATE, seconds) if len(x) < 5.5 * RATE else len(x) / RATE)
        t += max(0.08, longest * (1 if rng.random() > 0.2 else 0.5))
    return y


def calls(files: list[str], rng: np.random.Generator) -> np.ndarray:
    """Let an animal call, or something sound again and again."""
    y = np.zeros(LENGTH, np.float32)
    files = [files[i] for i in rng.permutation(len(files))[: rng.integers(1, 5)]]
    pitch, pause = rng.normal(0, 2.0), np.exp(rng.uniform(np.log(0.1), np.log(1.5)))
    t = rng.uniform(0, 1.5)
    while t < SECONDS - 0.2:
        x = played(heard(files[rng.integers(len(files))]), rng, pitch + rng.normal(0, 0.5), False)
        put(y, faded(x, 0.02), t, rng.uniform(-7, 3))
        t += len(x) / RATE + pause * rng.uniform(0.5, 1.8)
    return y


def engine(files: list[str], rng: np.random.Generator) -> np.ndarray:
    """Run a vehicle: its sounds in loops, at changing speed."""
    y = np.zeros(LENGTH, np.float32)
    t = 0.0 if rng.random() < 0.7 else rng.uniform(0, 3)
    pitch = rng.normal(0, 2.5)
    while t < SECONDS - 1:
        x, want = heard(files[rng.integers(len(files))]), int(rng.uniform(2.5, 9) * RATE)
        if len(x) < 3 * RATE:  # a loop
            edge = max(1, min(len(x) // 5, RATE // 20))
            once, body = x.copy(), np.zeros(int(want * 1.8) + len(x), np.float32)
            once[:edge] *= np.linspace(0, 1, edge, dtype=np.float32)
            once[-edge:] *= np.linspace(1, 0, edge, dtype=np.float32)
            for start in range(0, len(body) - len(x), max(1, len(x) - edge)):
                body[start : start + len(x)] += once
            x = body
        speed = 2 ** ((pitch + np.interp(np.linspace(0, 1, want), np.linspace(0, 1, 4), rng.normal(0, 1.5, 4))) / 12)
        position = np.cumsum(speed)
        x = np.interp(position[position < len(x) - 1], np.arange(len(x)), x).astype(np.float32)
        level = np.interp(np.linspace(0, 1, len(x)), np.linspace(0, 1, 4), rng.normal(0, 4, 4))  # it passes by
        put(y, faded(x * (10 ** (level / 20)).astype(np.float32), 0.3), t, rng.uniform(-4, 2))
        t += len(x) / RATE * rng.uniform(0.85, 1.05) + (rng.uniform(0, 1.5) if rng.random() < 0.3 else 0)
    return y


def perform(object_: str, bank: Bank, rng: np.random.Generator) -> np.ndarray:
    """Ten seconds of one object from one source, coloured: their spectrum."""
    by_source = bank[object_]
    names = sorted(by_source)
    weight = np.array([len(by_source[n]) for n in names]) ** 0.4
    files = by_source[names[rng.choice(len(names), p=weight / weight.sum())]]
    if object_ in VEHICLES:
        y = engine(files, rng)
    elif object_ in ANIMALS or object_ in LOOPED:
        y = calls(files, rng)
    else:
        y = tune(object_, files, rng)
    return coloured(rfft(y), rng, np.abs(rng.normal(0, 4.5)))


def level(spectrum: np.ndarray, decibels: float = 0.0) -> np.ndarray:
    """Bring a sound, given as its spectrum, to an RMS of so many dB."""
    power = 2 * float(np.vdot(spectrum, spectrum).real) / LENGTH**2
    return spectrum * np.float32(10 ** (decibels / 20) / np.sqrt(power + 1e-12))


def coloured(spectrum: np.ndarray, rng: np.random.Generator, decibels: float) -> np.ndarray:
    """Pass through a random equaliser of eight points of this deviation, and a tilt."""
    gain = np.interp(_COARSE, np.linspace(0, 9.7, 8), rng.normal(0, decibels, 8))
    gain += rng.normal(0, decibels / 3) * (_COARSE - 5)
    return spectrum * np.interp(_OCTAVES, _COARSE, 10 ** (np.clip(gain, -40, 25) / 20)).astype(np.float32)


def noise(rng: np.random.Generator) -> np.ndarray:
    """Noise of a random slope and colour: its spectrum."""
    white = rng.standard_normal((len(_OCTAVES), 2), np.float32).view(np.complex64)[:, 0]
    return coloured(white * np.exp2(-np.float32(rng.uniform(0, 1.2)) * _OCTAVES), rng, rng.uniform(0, 5))


class Room:
    """A synthetic room, the same for all sounds of a clip."""

    def __init__(self, rng: np.random.Generator, share: float = 0.75) -> None:
        self.seconds = float(np.exp(rng.uniform(np.log(0.1), np.log(1.6)))) if rng.random() < share else 0.0
        self.wet = rng.uniform(-18, -1)

    def hears(self, spectrum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Add the reverberation, from a place of its own; what rings beyond the end comes at the beginning."""
        if not self.seconds:
            return level(spectrum)
        n = int(self.seconds * RATE)
        t = np.arange(n, dtype=np.float32) / RATE
        tail = np.zeros(LENGTH, np.float32)
        tail[:n] = rng.standard_normal(n, np.float32) * np.exp2(-9.97 * t / self.seconds, dtype=np.float32)
        tail[: int(rng.uniform(0.003, 0.02) * RATE)] = 0
        for _ in range(6):  # early reflections
            tail[int(rng.uniform(0.003, 0.04) * RATE)] += rng.choice([-1, 1]) * rng.uniform(0.5, 3)
        dull = 1 / np.sqrt(1 + (_HERTZ / np.float32(rng.uniform(2000, 9000))) ** 2)
        return level(level(spectrum) + level(spectrum * rfft(tail) * dull, self.wet))


def microphone(spectrum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Record: a band, noise, sometimes a limiter, then a level."""
    if rng.random() < 0.5:
        low = np.exp(rng.uniform(np.log(40), np.log(250)))
        spectrum = spectrum * (_HERTZ**2 / (_HERTZ**2 + low**2)).astype(np.float32)
    if rng.random() < 0.4:
        high = np.exp(rng.uniform(np.log(3500), np.log(16_000)))
        spectrum = spectrum / (1 + (_HERTZ / high) ** rng.choice([4, 8, 16])).astype(np.float32)
    x = irfft(level(spectrum) + level(noise(rng), -np.abs(rng.normal(45, 12))), LENGTH)
    if rng.random() < 0.25:
        drive = rng.uniform(0.3, 1.2)
        x = np.tanh(x * drive) / drive
    return (x * min(10 ** (rng.uniform(-32, -12) / 20), 0.98 / np.abs(x).max())).astype(np.float32)


def codec(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Encode and decode as MP3 or Vorbis, as far as the library can."""
    kind, subtype = (("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS"))[rng.integers(3)]
    buffer = io.BytesIO()
    soundfile.write(buffer, x, RATE, format=kind, subtype=subtype, compression_level=float(rng.uniform(0.4, 0.95)))
    buffer.seek(0)
    y = soundfile.read(buffer, dtype="float32")[0][:LENGTH]
    return np.pad(y, (0, LENGTH - len(y)))


def clip(number: int, bank: Bank, seed: int) -> tuple[np.ndarray, list[str]]:
    """Make a clip's sound and the names of its objects."""
    rng = np.random.default_rng([seed, number])
    objects = sorted(o for o in bank if not o.startswith("offscreen_"))
    others = sorted(o for o in bank if o.startswith("offscreen_"))
    n = int(rng.choice(4, p=N_OBJECTS))
    first = objects[(number * 7 + zlib.crc32(b"%d" % (number // len(objects)))) % len(objects)]  # each equally often
    rest = [o for o in objects if o != first]
    chosen = [first, *(rest[i] for i in rng.permutation(len(rest)))][:n]
    room = Room(rng)
    mix = np.zeros(len(_HERTZ), np.complex64)
    for object_ in chosen:
        mix += room.hears(perform(object_, bank, rng), rng) * np.float32(10 ** (rng.uniform(-4.5, 4.5) / 20))
    n_others = int(rng.integers(1, 4)) if not chosen else int(rng.random() < OFFSCREEN)
    for _ in range(n_others):
        other = others[rng.integers(len(others))] if rng.random() < 0.8 else ""
        x = perform(other, bank, rng) if other else noise(rng)
        mix += room.hears(x, rng) * np.float32(10 ** (rng.uniform(-15, 0) / 20))
    x = microphone(mix, rng)
    return (codec(x, rng) if rng.random() < 0.3 else x), sorted(chosen)


def write(number: int, bank: Bank, seed: int, out: Path, split: str) -> list[str]:
    """Write a clip; return its row."""
    name = f"{split}-{seed}-{number:05d}"
    path = out / "clips" / f"{name}.flac"
    x, objects = clip(number, bank, seed)
    soundfile.write(path, x, RATE, subtype="PCM_16")
    named = ";".join(objects) or "none"
    return [name, f"clips/{path.name}", "0", str(SECONDS), split, named, named]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True, help="what collect.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips and their table")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--val", type=int, default=200, help="further clips of split val")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], metavar="OBJECT/SOURCE", help="sounds left out, as a test")
    a = parser.parse_args()
    bank = bank_of(a.sounds, frozenset(tuple(w.split("/")) for w in a.without))  # type: ignore[misc]
    (a.out / "clips").mkdir(parents=True, exist_ok=True)
    with (a.out / "segments.csv").open("w", newline="") as file, ProcessPoolExecutor(a.processes) as pool:
        rows = csv.writer(file)
        rows.writerow(["segment_id", "source", "start_s", "end_s", "split", "objects", "labels"])
        for split, count, seed in (("train", a.clips, a.seed), ("val", a.val, a.seed + 1_000_000)):
            made = pool.map(partial(write, bank=bank, seed=seed, out=a.out, split=split), range(count), chunksize=20)
            for i, row in enumerate(made):
                rows.writerow(row)
                if (i + 1) % 200 == 0:
                    print(f"render: {i + 1}/{count} clips of split {split}", flush=True)


if __name__ == "__main__":
    main()
