"""Sounds of objects of which few recordings are open, generated: frogs, cats, motorcycles, trains."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.fft import irfft, rfft

RATE = 48_000
EACH = 12


def curve(points: list[float], n: int) -> np.ndarray:
    """Go through some points in `n` samples."""
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(points)), points)


def pulses(hertz: np.ndarray, rng: np.random.Generator, jitter: float = 0.01, uneven: float = 0.0) -> np.ndarray:
    """One impulse a period, of varying height; `uneven` moves every second one."""
    phase = np.cumsum(hertz) / RATE
    at = np.searchsorted(phase, np.arange(1, phase[-1]))
    at = at + (rng.normal(0, jitter, len(at)) + uneven * (np.arange(len(at)) % 2)) * RATE / hertz[at]
    y = np.zeros(len(hertz))
    np.add.at(y, np.clip(at.astype(int), 0, len(y) - 1), rng.uniform(0.7, 1, len(at)))
    return y


def resonant(x: np.ndarray, peaks: list[tuple[float, float, float]], floor: float = 0.0) -> np.ndarray:
    """Filter with resonances of (frequency, width, height), and a level elsewhere."""
    f = np.fft.rfftfreq(len(x), 1 / RATE)
    gain = np.full(len(f), floor)
    for peak, width, height in peaks:
        gain += height / (1 + ((f - peak) / width) ** 2)
    return irfft(rfft(x) * gain, len(x))


def moving(x: np.ndarray, formants: list[list[float]], widths: list[float]) -> np.ndarray:
    """Filter with formants that move, in overlapping pieces."""
    n, hop = 2048, 512
    window, y = np.hanning(n), np.zeros(len(x) + n)
    for start in range(0, len(x), hop):
        piece = np.zeros(n)
        part = x[start : start + n]
        piece[: len(part)] = part
        centres = [float(np.interp(start / len(x), np.linspace(0, 1, len(f)), f)) for f in formants]
        y[start : start + n] += resonant(piece * window, [(f, w, 1.0) for f, w in zip(centres, widths, strict=True)])
    return y[: len(x)]


def swell(n: int, rise: float, fall: float) -> np.ndarray:
    """An envelope that rises and falls in these shares of the time."""
    t = np.linspace(0, 1, n)
    return np.clip(t / rise, 0, 1) * np.clip((1 - t) / fall, 0, 1)


def frog(rng: np.random.Generator) -> np.ndarray:
    """A tree frog's peep, a croak of pulses, or a bullfrog's hum."""
    kind = rng.integers(3)
    n = int(rng.uniform(0.2, 0.8) * RATE)
    if kind == 0:
        high = np.exp(rng.uniform(np.log(1200), np.log(3500)))
        tone = np.sin(2 * np.pi * np.cumsum(curve([high * 0.9, high, high * 1.05], n)) / RATE)
        tone += 0.1 * np.sin(4 * np.pi * np.cumsum(np.full(n, high)) / RATE)
        beat = 0.5 + 0.5 * np.cos(2 * np.pi * np.arange(n) * rng.uniform(25, 120) / RATE)
        return tone * beat ** rng.uniform(0.5, 3) * swell(n, 0.2, 0.3)
    if kind == 1:
        rate, low = rng.uniform(30, 110), rng.uniform(500, 1200)
        x = pulses(curve([rate, rate * rng.uniform(0.8, 1.6)], n), rng, 0.03)
        y = moving(x, [[low, low * rng.uniform(1, 1.8)], [2.2 * low, 2.6 * low]], [low / 6, low / 4])
        return y * swell(n, 0.15, 0.3)
    n = int(rng.uniform(0.5, 1.2) * RATE)
    pitch = rng.uniform(85, 210)
    x = pulses(curve([pitch * 0.9, pitch, pitch * 0.95], n), rng)
    return resonant(x, [(pitch * 2, 80, 1), (rng.uniform(500, 900), 150, 0.4), (1500, 300, 0.15)]) * swell(n, 0.3, 0.3)


def cat(rng: np.random.Generator) -> np.ndarray:
    """A meow."""
    n = int(rng.uniform(0.35, 1.3) * RATE)
    pitch = np.exp(rng.uniform(np.log(350), np.log(900)))
    f0 = curve([pitch * 0.8, pitch * rng.uniform(1, 1.3), pitch, pitch * rng.uniform(0.6, 0.9)], n)
    x = pulses(f0, rng, 0.01) + 0.02 * rng.standard_normal(n)
    formants = [[500, 950, 900, 550], [2300, 1900, 1500, 1100], [3300, 3600]]
    scaled = (rng.uniform(0.85, 1.3) * np.array(f) for f in formants)
    return moving(x, [list(f) for f in scaled], [180, 250, 400]) * swell(n, 0.15, 0.35)


def motorcycle(rng: np.random.Generator) -> np.ndarray:
    """An engine of one or two cylinders, idling, pulling away or passing."""
    n = 5 * RATE
    idle = rng.uniform(14, 30)
    speeds = [idle * s for s in ([1, 1.1, 1, 1.05] if rng.random() < 0.3 else rng.uniform(1, 6, 5))]
    f0 = curve(list(speeds), n)
    x = pulses(f0, rng, 0.02, uneven=rng.choice([0, 0, 0.15, 0.25]))
    body = np.exp(rng.uniform(np.log(60), np.log(180)))
    y = resonant(x, [(body, 40, 1), (body * 2.7, 90, 0.8), (rng.uniform(500, 900), 250, 0.5), (2200, 900, 0.25)], 0.02)
    hiss = resonant(rng.standard_normal(n), [(1500, 1500, 1)]) * (0.4 + np.abs(y) / np.abs(y).max())
    return y / np.std(y) + rng.uniform(0.05, 0.4) * hiss / np.std(hiss)


def train(rng: np.random.Generator) -> np.ndarray:
    """A steam engine's puffs, wheels over joints of the rails, or a horn."""
    n, kind = 5 * RATE, rng.integers(3)
    noise = rng.standard_normal(n)
    if kind == 2:
        n = int(rng.uniform(1, 3) * RATE)
        root = rng.uniform(250, 420)
        chord = sum(pulses(np.full(n, root * r), rng, 0.002) for r in rng.permutation([1, 1.19, 1.5, 1.68, 2])[:4])
        chord = resonant(chord, [(root * 2, 600, 1), (1800, 800, 0.5)])
        return (chord / np.std(chord) + 0.1 * rng.standard_normal(n)) * swell(n, 0.05, 0.1)
    rate = rng.uniform(1.5, 7) if kind == 0 else rng.uniform(0.8, 2.5)
    beats = pulses(np.full(n, rate), rng, 0.02)
    if kind == 1:
        beats += np.roll(beats, int(rng.uniform(0.1, 0.25) / rate * RATE)) * 0.8  # two axles
    length = 0.25 / rate if kind == 0 else 0.03
    tail = np.exp(-np.arange(int(6 * length * RATE)) / (length * RATE))
    envelope = np.convolve(beats, tail)[:n] if len(tail) < 2000 else irfft(rfft(beats) * rfft(tail, n), n)
    puff = resonant(noise, [(rng.uniform(200, 900), 500, 1), (3000, 2000, 0.2)])
    rumble = resonant(rng.standard_normal(n), [(rng.uniform(50, 150), 60, 1)], 0.02)
    return puff / np.std(puff) * np.maximum(envelope, 0.03) + rng.uniform(0.05, 0.4) * rumble / np.std(rumble)


def sounds() -> Iterator[tuple[str, str, np.ndarray]]:
    """Generate them all: (object, name, sound)."""
    for make in (frog, cat, motorcycle, train):
        for i in range(EACH):
            yield make.__name__, f"{i:02d}", make(np.random.default_rng([i, len(make.__name__)])).astype(np.float32)
