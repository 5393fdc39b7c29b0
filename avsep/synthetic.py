"""Clips with known sources, pictures and bases, for tests, the demo and the docs; all of it generated.

Six objects play: their sounds are synthesised by mechanism (plucked, bowed, blown, struck,
barked, fired), their pictures drawn with Pillow. Each clip has its own players, room and look,
drawn from the stream of its (seed, split, number), so no timbre occurs in two clips.
"""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
import scipy.fft
import scipy.interpolate
import scipy.signal
import soundfile
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from avsep import storage
from avsep.records import SPLITS, Segment, names_cell

Sound = NDArray[np.float32]
Colour = tuple[int, int, int]
Point = tuple[float, float]
Resonance = tuple[float, float, float]  # centre in Hz, Q, gain
Dry = tuple[Sound, Sequence[Resonance]]  # a sound, and the body that it is heard through

OBJECTS: tuple[str, ...] = ("acoustic_guitar", "violin", "flute", "drum", "dog", "motorcycle")
OFFSCREEN: tuple[str, ...] = ("bell", "babble")  # heard, never seen, and none of avsep.objects
RMS = 0.1  # of a performance, full scale = 1
_STEP = 2.0**-23  # of 24-bit samples: float32 adds multiples of it below 1 without rounding


# ------------------------------------------------------------------------------------- sounds


def performance(object_name: str, rng: Generator, seconds: float = 10.0, sample_rate: int = 48_000) -> Sound:
    """Play one of OBJECTS or OFFSCREEN: random phrases of a random player in a random room, `(S,)`.

    The RMS is 0.1, no sample reaches full scale. Pitches, rhythm, dynamics, brightness, body
    resonances and room all come from `rng`. Raises ValueError for a name that isn't played, or
    for less than a second.
    """
    if object_name not in _PLAYERS:
        raise ValueError(f"{object_name!r} isn't played here; {', '.join(_PLAYERS)} are")
    if not seconds >= 1:
        raise ValueError(f"seconds is {seconds}; a performance takes at least one")
    n_samples = round(seconds * sample_rate)
    dry, body = _PLAYERS[object_name](rng, n_samples, sample_rate)
    wet = _in_room(dry, body, rng, sample_rate)
    wet /= _rms(wet)
    limit = 6.0  # the highest crest factor before the last scaling: bends only the peaks of sparse knocks
    wet = limit * np.tanh(wet / limit)
    return (wet * min(RMS / _rms(wet), 0.99 / np.abs(wet).max())).astype(np.float32)


def _rms(x: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) + 1e-12


def _phrases(
    rng: Generator, seconds: float, shortest_s: float, longest_s: float, rests: float = 0.2
) -> list[tuple[float, float, float]]:
    """Draw notes one after the other: (onset_s, duration_s, gain); before some, as `rests` says, a pause."""
    notes: list[tuple[float, float, float]] = []
    tempo = rng.uniform(0.7, 1.4)
    t = rng.uniform(0, 0.5) if rng.random() < 0.8 else rng.uniform(0.05, 0.3) * seconds
    while t < seconds - 0.15:
        if notes and rng.random() < rests:
            t += rng.uniform(0.3, 1.2)
        duration = tempo * float(np.exp(rng.uniform(np.log(shortest_s), np.log(longest_s))))
        notes.append((t, duration, 10 ** (rng.uniform(-8, 0) / 20)))
        t += duration
    return notes


def _melody(rng: Generator, lowest_hz: float, highest_hz: float, n_notes: int) -> NDArray[np.float64]:
    """Walk up and down a scale of about an octave somewhere between two pitches, `(n_notes,)` Hz."""
    scale = np.array([0, 2, 3, 5, 7, 8, 10, 12] if rng.random() < 0.5 else [0, 2, 4, 5, 7, 9, 11, 12])
    tonic = float(np.exp(rng.uniform(np.log(lowest_hz), np.log(highest_hz / 2))))
    degrees = rng.integers(len(scale)) + np.cumsum(rng.choice([-2, -1, -1, 0, 1, 1, 2], n_notes))
    turn = 2 * (len(scale) - 1)
    degrees = np.abs((degrees + len(scale) - 1) % turn - (len(scale) - 1))  # reflect at both ends
    return tonic * 2 ** (scale[degrees] / 12)


def _add(track: Sound, onset_s: float, sound: NDArray, sample_rate: int) -> None:
    start = int(onset_s * sample_rate)
    end = min(start + len(sound), len(track))
    if end > start:
        track[start:end] += sound[: end - start]


def _envelope(n_samples: int, attack_s: float, release_s: float, sample_rate: int) -> NDArray[np.float32]:
    t = np.arange(n_samples, dtype=np.float32) / sample_rate
    rise, fall = np.minimum(t / attack_s, 1), np.clip((t[-1] - t) / release_s, 0, 1)
    return (np.sin(np.pi / 2 * rise) * np.sin(np.pi / 2 * fall)).astype(np.float32)


def _noise(rng: Generator, n_samples: int, lowpass_hz: float, sample_rate: int) -> Sound:
    """Draw noise of RMS one that falls by 6 dB an octave above `lowpass_hz`."""
    pole = np.exp(-2 * np.pi * lowpass_hz / sample_rate)
    white = rng.standard_normal(n_samples, dtype=np.float32)
    coloured = scipy.signal.lfilter(*np.array([[1 - pole, 0], [1, -pole]], np.float32), white)
    return coloured / np.float32(_rms(coloured))


def _harmonic(f0_hz: NDArray, amplitudes: NDArray, rng: Generator, sample_rate: int) -> Sound:
    """Sound a periodic wave of given harmonic amplitudes `(K,)` along a pitch contour `(S,)`."""
    n_table = 4096
    kept = amplitudes[: max(1, min(int(0.45 * sample_rate / f0_hz.max()), n_table // 8))]
    spectrum = np.zeros(n_table // 2 + 1, complex)
    spectrum[1 : len(kept) + 1] = kept * np.exp(2j * np.pi * rng.random(len(kept))) * n_table / 2
    table = np.fft.irfft(spectrum, n_table).astype(np.float32)
    table = np.append(table, table[0])
    position = (np.cumsum(f0_hz) / sample_rate % 1 * n_table).astype(np.float32)
    index = np.minimum(position.astype(np.int32), n_table - 1)
    left = table[index]
    return left + (position - index) * (table[index + 1] - left)


def _ringing(
    frequencies_hz: NDArray, amplitudes: NDArray, decays_s: NDArray, seconds: float, sample_rate: int
) -> Sound:
    """Sum sinusoids that start together and die away, each with its own time constant."""
    kept = frequencies_hz < 0.45 * sample_rate
    rates = (2j * np.pi * frequencies_hz - 1 / decays_s)[kept, None] / sample_rate
    n_samples, block = int(seconds * sample_rate), 256
    starts = np.exp(rates * np.arange(0, n_samples, block)) * amplitudes[kept, None]
    within = np.exp(rates * np.arange(block))  # exp(r (s + i)) = exp(r s) exp(r i): one product of matrices
    y = (starts.astype(np.complex64).T @ within.astype(np.complex64)).imag.reshape(-1)[:n_samples].copy()
    fade = min(len(y), sample_rate // 100)
    y[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return y


def _in_room(dry: Sound, body: Sequence[Resonance], rng: Generator, sample_rate: int) -> Sound:
    """Filter by a body, a random tone colour and a short random reverberation."""
    decay_s = rng.uniform(0.025, 0.09)  # time constant: 60 dB down after seven of them
    tail = rng.standard_normal(int(7 * decay_s * sample_rate), dtype=np.float32)
    tail *= np.exp(-np.arange(len(tail), dtype=np.float32) / (decay_s * sample_rate))
    tail *= np.float32(10 ** (rng.uniform(-14, -5) / 20) / np.sqrt(np.sum(tail**2)))
    tail[0] += 1
    n_fft = scipy.fft.next_fast_len(len(dry) + len(tail), real=True)
    f = np.fft.rfftfreq(n_fft, 1 / sample_rate).astype(np.float32)
    spectrum = scipy.fft.rfft(dry, n_fft) * scipy.fft.rfft(tail, n_fft)
    colour_db = np.interp(np.log2(np.maximum(f, 30) / 30), np.linspace(0, 9.7, 8), rng.normal(0, 3, 8))
    spectrum *= (10 ** (colour_db / 20)).astype(np.float32)
    if body:
        response = np.full(len(f), 0.4, np.complex64)
        for centre_hz, q, gain in body:
            ratio = f / np.float32(centre_hz)
            response += np.float32(gain) * 1j * ratio / (np.float32(q) * (1 - ratio * ratio) + 1j * ratio)
        spectrum *= response
    spectrum[f < 25] = 0
    return scipy.fft.irfft(spectrum, n_fft)[: len(dry)]


def _body(rng: Generator, *resonances: Resonance) -> list[Resonance]:
    """Vary resonances as one maker's instruments do."""
    size = rng.uniform(0.85, 1.18)
    return [
        (size * rng.uniform(0.93, 1.07) * centre_hz, rng.uniform(0.7, 1.4) * q, rng.uniform(0.6, 1.5) * gain)
        for centre_hz, q, gain in resonances
    ]


def _acoustic_guitar(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Pluck strings: slightly stretched partials, combed by the plucking point, the high ones dying first."""
    y = np.zeros(n_samples, np.float32)
    notes = _phrases(rng, n_samples / sample_rate, 0.18, 0.7, rests=0.12)
    pitches = _melody(rng, 100, 440, len(notes))
    k = np.arange(1, 26)
    point, tilt = rng.uniform(0.12, 0.3), rng.uniform(0.7, 1.2)
    stiffness, ring_s, damping = rng.uniform(2e-5, 1.5e-4), rng.uniform(0.35, 0.9), rng.uniform(0.08, 0.3)
    strums = rng.uniform(0, 0.4)
    strings: dict[float, Sound] = {}

    def string(pitch_hz: float) -> Sound:
        if pitch_hz not in strings:
            partials = pitch_hz * k * np.sqrt(1 + stiffness * k**2)
            amplitudes = np.sin(np.pi * k * point) / k**tilt
            decays = ring_s * (200 / pitch_hz) ** 0.3 / (1 + damping * (k - 1))
            pluck = _ringing(partials, amplitudes, decays, 1.6, sample_rate)
            n_click = sample_rate // 80
            fall = np.linspace(1, 0, n_click, dtype=np.float32)
            pluck[:n_click] += 0.08 * fall**2 * _noise(rng, n_click, 3000, sample_rate)
            strings[pitch_hz] = pluck
        return strings[pitch_hz]

    for (onset, duration, gain), pitch in zip(notes, pitches, strict=True):
        chord = [1.0, 1.5, 2.0] if rng.random() < strums else [1.0]
        for i, interval in enumerate(chord):
            pluck = string(float(pitch) * interval)[: int((duration + 0.5) * sample_rate)].copy()
            fade = min(len(pluck), sample_rate // 12)
            pluck[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
            _add(y, onset + 0.02 * i, gain * pluck, sample_rate)
    return y, _body(rng, (105, 6, 0.4), (205, 7, 0.7), (390, 5, 0.9), (800, 2, 0.8), (2400, 1.5, 0.8))


def _violin(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Bow a string: a sawtooth with vibrato and bow noise, shaped by the body."""
    y = np.zeros(n_samples, np.float32)
    notes = _phrases(rng, n_samples / sample_rate, 0.25, 1.5, rests=0.12)
    pitches = _melody(rng, 200, 950, len(notes))
    k = np.arange(1, 41)
    amplitudes = k ** -rng.uniform(0.8, 1.2) * rng.uniform(0.7, 1.3, len(k))
    rate_hz, depth, attack_s = rng.uniform(4.8, 6.6), rng.uniform(0.003, 0.012), rng.uniform(0.05, 0.14)
    noise = rng.uniform(0.02, 0.06)
    for (onset, duration, gain), pitch in zip(notes, pitches, strict=True):
        n = int((duration + 0.05) * sample_rate)
        t = np.arange(n) / sample_rate
        vibrato = 1 + depth * np.minimum(t / 0.3, 1) * np.sin(2 * np.pi * (rate_hz * t + rng.random()))
        tone = _harmonic(pitch * vibrato, amplitudes, rng, sample_rate)
        bow = _noise(rng, n, 5000, sample_rate)
        _add(y, onset, gain * (tone + noise * bow) * _envelope(n, attack_s, 0.07, sample_rate), sample_rate)
    return y, _body(rng, (280, 10, 1.0), (460, 10, 1.2), (700, 8, 0.8), (1150, 4, 0.9), (2700, 2.5, 1.4))


def _flute(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Blow across a hole: few harmonics, a swelling tone and breath around it."""
    y = np.zeros(n_samples, np.float32)
    notes = _phrases(rng, n_samples / sample_rate, 0.16, 1.1, rests=0.2)
    pitches = _melody(rng, 262, 1250, len(notes))
    amplitudes = np.array([1, 0.45, 0.2, 0.08, 0.04, 0.02]) * rng.uniform(0.5, 1.6, 6)
    rate_hz, depth, breath = rng.uniform(4.5, 6), rng.uniform(0.05, 0.25), rng.uniform(0.04, 0.14)
    attack_s, air_hz = rng.uniform(0.03, 0.08), rng.uniform(1500, 4500)
    for (onset, duration, gain), pitch in zip(notes, pitches, strict=True):
        n = int(duration * 0.95 * sample_rate)
        t = np.arange(n) / sample_rate
        swell = np.sin(2 * np.pi * (rate_hz * t + rng.random()))
        tone = _harmonic(pitch * (1 + 0.003 * swell), amplitudes, rng, sample_rate) * (1 + depth * swell)
        air = _noise(rng, n, air_hz, sample_rate) * (1 + 3 * np.exp(-t / 0.02))  # a chiff at the start
        note = (tone + breath * air).astype(np.float32)
        _add(y, onset, gain * note * _envelope(n, attack_s, 0.06, sample_rate), sample_rate)
    return y, []


def _drum(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Beat a pattern on two drums: the modes of a round membrane, one drum with snares under it."""
    modes = np.array([1, 1.594, 2.136, 2.296, 2.653, 2.918, 3.156, 3.501])  # zeros of Bessel functions
    voices = []
    low, high = (65, 130, 0.16, 0.0), (150, 290, 0.11, rng.uniform(0.2, 1.0))
    for lowest_hz, highest_hz, ring_s, snares in (low, high):
        pitch = rng.uniform(lowest_hz, highest_hz)
        amplitudes = modes**-1.0 * rng.uniform(0.4, 1.2, len(modes))
        decays = ring_s * rng.uniform(0.7, 1.6) / np.sqrt(modes)
        hit = _ringing(pitch * modes, amplitudes, decays, 0.6, sample_rate)
        t = np.arange(len(hit), dtype=np.float32) / sample_rate
        stick_noise = _noise(rng, len(hit), 5000, sample_rate)
        stick = stick_noise * np.exp(-t / 0.006)
        wires = scipy.signal.iirpeak(rng.uniform(2500, 4500), 0.7, fs=sample_rate)
        rattle = scipy.signal.lfilter(*wires, stick_noise) * np.exp(-t / rng.uniform(0.04, 0.1))
        voices.append((hit + 0.3 * stick + snares * rattle).astype(np.float32))
    y = np.zeros(n_samples, np.float32)
    step_s = 60 / rng.uniform(80, 150) / 4
    pattern = rng.random((2, 16)) < np.array([[0.2], [0.3]])
    pattern[0, 0] = pattern[1, rng.choice([4, 8])] = True
    start_s = rng.uniform(0, 0.5) if rng.random() < 0.8 else rng.uniform(0.05, 0.25) * n_samples / sample_rate
    for bar in range(1 + int(n_samples / sample_rate / step_s / 16)):
        if bar and rng.random() < 0.12:
            continue
        for voice, step in zip(*np.nonzero(pattern ^ (rng.random(pattern.shape) < 0.06)), strict=True):
            gain = 10 ** (rng.uniform(-7, 0) / 20)
            _add(y, start_s + (16 * bar + step) * step_s, gain * voices[voice], sample_rate)
    return y, []


def _dog(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Bark in bursts: a rough voice that rises and falls, and breath, through a muzzle's formants."""
    y = np.zeros(n_samples, np.float32)
    size = np.exp(rng.uniform(np.log(0.6), np.log(1.6)))  # small dogs have high voices
    pitch, bark_s = 480 / size, rng.uniform(0.14, 0.24)
    k = np.arange(1, 31)
    amplitudes = k ** -rng.uniform(0.5, 0.9)
    rough, breath, rise = rng.uniform(0.02, 0.05), rng.uniform(0.15, 0.4), rng.uniform(0.2, 0.5)
    t = rng.uniform(0, 0.6) if rng.random() < 0.8 else rng.uniform(0.05, 0.25) * n_samples / sample_rate
    while t < n_samples / sample_rate - 0.15:
        for _ in range(rng.integers(2, 6)):
            n = int(bark_s * rng.uniform(0.8, 1.3) * sample_rate)
            x = np.linspace(0, 1, n)
            glide = 0.75 + rise * np.sin(np.pi * np.minimum(1, 1.6 * x) ** 0.8) - 0.15 * x
            f0 = pitch * rng.uniform(0.92, 1.08) * glide * (1 + rough * _noise(rng, n, 60, sample_rate))
            voice = _harmonic(np.maximum(f0, 40), amplitudes, rng, sample_rate)
            envelope = np.minimum(x / 0.08, 1) * np.exp(-2.2 * x) * np.minimum((1 - x) / 0.15, 1)
            bark = (voice + breath * _noise(rng, n, 4000, sample_rate)) * envelope.astype(np.float32)
            _add(y, t, 10 ** (rng.uniform(-5, 0) / 20) * bark, sample_rate)
            t += bark_s + rng.uniform(0.08, 0.3)
        t += rng.uniform(0.3, 1.4)
    muzzle = [(620 / size**0.6, 4, 2.0), (1250 / size**0.6, 5, 1.6), (2700 / size**0.6, 5, 0.8)]
    return y, _body(rng, *muzzle)


def _motorcycle(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Run an engine: uneven firing pulses at a wandering speed, exhaust noise in their rhythm."""
    seconds = n_samples / sample_rate
    idle_rpm, peak_rpm = rng.uniform(900, 1500), rng.uniform(2600, 5200)
    knots = np.arange(0, seconds + 2, rng.uniform(0.7, 1.3))
    throttle = rng.uniform(0.3, 1, len(knots)) * np.where(rng.random(len(knots)) < 0.4, 1, 0.08)
    t = np.arange(n_samples, dtype=np.float32) / sample_rate
    opened = np.interp(t, knots, throttle)
    opened = 0.5 - 0.5 * np.cos(np.pi * opened)
    unsteady = 1 + 0.01 * np.interp(t, np.linspace(0, seconds, 90), rng.standard_normal(90))
    cycle_hz = unsteady * (idle_rpm + (peak_rpm - idle_rpm) * opened) / 120  # four strokes are two turns
    n_cylinders, angles = int(rng.choice([1, 2, 2, 4])), np.arange(4096) / 4096
    pulses = np.zeros(4096)
    for i in range(n_cylinders):
        firing = (i + 0.3 * rng.uniform(-1, 1) * (i > 0)) / n_cylinders
        pulses += rng.uniform(0.7, 1.2) * np.exp(-((angles - firing) % 1) / (0.07 / n_cylinders))
    amplitudes = np.abs(np.fft.rfft(pulses))[1:201]
    amplitudes /= np.sqrt((amplitudes**2).sum() / 2)
    tone = _harmonic(cycle_hz, amplitudes, rng, sample_rate)
    strokes = 1 + _harmonic(cycle_hz * n_cylinders, np.array([1.0, 0.3]), rng, sample_rate)
    hiss = _noise(rng, n_samples, rng.uniform(800, 2000), sample_rate) * strokes
    y = (tone + rng.uniform(0.1, 0.3) * hiss) * (0.35 + opened).astype(np.float32)
    start_s = rng.uniform(0, 0.3) if rng.random() < 0.6 else rng.uniform(0.05, 0.3) * seconds
    end_s = seconds * (1 if rng.random() < 0.6 else rng.uniform(0.7, 1))
    gate = np.clip((t - start_s) / 0.25, 0, 1) * np.clip((end_s - t) / 0.25, 0, 1)
    exhaust = _body(rng, (95, 3, 1.2), (230, 3, 1.5), (520, 3, 1.2), (1100, 2, 0.9))
    return (y * gate).astype(np.float32), exhaust


def _bell(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Strike a bell now and then."""
    ratios = np.array([0.5, 1, 1.183, 1.506, 2, 2.514, 2.662, 3.011, 4.166])
    amplitudes = rng.uniform(0.3, 1, len(ratios)) / np.sqrt(ratios)
    pitch, ring_s = rng.uniform(350, 900), rng.uniform(0.5, 1.2)
    strike = _ringing(pitch * ratios, amplitudes, ring_s / ratios, 3, sample_rate)
    y = np.zeros(n_samples, np.float32)
    for onset, _, gain in _phrases(rng, n_samples / sample_rate, 0.6, 2):
        _add(y, onset, gain * strike, sample_rate)
    return y, []


def _babble(rng: Generator, n_samples: int, sample_rate: int) -> Dry:
    """Speak nonsense: a buzzing voice through two formants that differ from syllable to syllable."""
    y = np.zeros(n_samples, np.float32)
    pitch = rng.uniform(95, 230)
    amplitudes = np.arange(1, 60) ** -1.0
    for onset, duration, gain in _phrases(rng, n_samples / sample_rate, 0.1, 0.35, rests=0.25):
        n = int(duration * sample_rate)
        first, last = pitch * rng.uniform(0.85, 1.2, 2)
        glide = np.linspace(first, last, n)
        voice = _harmonic(glide, amplitudes, rng, sample_rate) + 0.05 * _noise(rng, n, 5000, sample_rate)
        vowel = np.zeros(n, np.float32)
        for formant_hz in (rng.uniform(280, 850), rng.uniform(900, 2300)):
            b, a = scipy.signal.iirpeak(formant_hz, 6, fs=sample_rate)
            vowel += scipy.signal.lfilter(b.astype(np.float32), a.astype(np.float32), voice)
        _add(y, onset, gain * vowel * _envelope(n, 0.03, 0.05, sample_rate), sample_rate)
    return y, []


_PLAYERS: dict[str, Callable[[Generator, int, int], Dry]] = {
    "acoustic_guitar": _acoustic_guitar,
    "violin": _violin,
    "flute": _flute,
    "drum": _drum,
    "dog": _dog,
    "motorcycle": _motorcycle,
    "bell": _bell,
    "babble": _babble,
}


# ----------------------------------------------------------------------------------- pictures


def picture(object_name: str | None, rng: Generator, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Draw one of OBJECTS somewhere in a random scene, or with None a scene without any, RGB.

    `size` is (width, height) in pixels. Place, scale, tilt, colours, make and background come
    from `rng`. Raises ValueError for a name that can't be drawn.
    """
    scenery = _scenery(rng, size)
    return _compose(scenery, [] if object_name is None else [_sprite(object_name, rng)], rng)


def _compose(scenery: Image.Image, sprites: Sequence[Image.Image], rng: Generator) -> Image.Image:
    """Put objects side by side into a scene; a single one fills most of it."""
    image, (width, height) = scenery.copy(), scenery.size
    for i, sprite in enumerate(sprites):
        share = width / len(sprites)
        side = int(min(height * rng.uniform(0.82, 1.12), share * rng.uniform(0.95, 1.15)))
        x = (i + 0.5) * share + rng.uniform(-0.5, 0.5) * max(0.15 * share, share - side)
        y = height / 2 + rng.uniform(-0.3, 0.7) * max(0.1 * height, 0.8 * (height - side))
        small = sprite.resize((side, side), Image.Resampling.BOX, reducing_gap=1.0)
        image.paste(small, (int(x - side / 2), int(y - side / 2)), small)
    return image


class _Pen:
    """Draws on a transparent square in unit coordinates, (0, 0) top left, turned about the middle."""

    def __init__(self, tilt_deg: float, mirrored: bool, side: int = 560) -> None:
        self.image = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self.image)
        self._side, self._mirror = side, -1 if mirrored else 1
        self._cos, self._sin = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))

    def _place(self, points: Sequence[Point]) -> list[Point]:
        x, y = (np.asarray(points, float) - 0.5).T
        placed = np.stack([self._mirror * (self._cos * x - self._sin * y), self._sin * x + self._cos * y], -1)
        return [(float(a), float(b)) for a, b in (placed + 0.5) * self._side]

    def shape(self, points: Sequence[Point], fill: Colour, edge: Colour | None = None, width: float = 0.008) -> None:
        self._draw.polygon(self._place(points), fill=fill)
        if edge is not None:
            self.line([*points, points[0]], edge, width)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        placed, thickness = self._place(points), max(1, round(width * self._side))
        self._draw.line(placed, fill=fill, width=thickness, joint="curve")
        if thickness > 3:
            r = thickness / 2 - 0.5
            for x, y in (placed[0], placed[-1]):
                self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        edge: Colour | None = None,
        width: float = 0.008,
        turn_deg: float = 0.0,
    ) -> None:
        self.shape(_arc(x, y, rx, ry, 0, 360, turn_deg), fill, edge, width)

    def ring(self, x: float, y: float, r: float, fill: Colour, width: float) -> None:
        self.line(_arc(x, y, r, r, 0, 365), fill, width)


def _arc(
    x: float, y: float, rx: float, ry: float, first_deg: float, last_deg: float, turn_deg: float = 0.0
) -> list[Point]:
    a, turn = np.radians(np.linspace(first_deg, last_deg, 49)), np.radians(turn_deg)
    u, v = rx * np.cos(a), ry * np.sin(a)
    px, py = x + np.cos(turn) * u - np.sin(turn) * v, y + np.sin(turn) * u + np.cos(turn) * v
    return list(zip(px.tolist(), py.tolist(), strict=True))


def _curve(points: Sequence[Point], n: int = 60) -> list[Point]:
    """Lead a smooth curve through points."""
    p = np.array(points)
    u = np.append(0, np.cumsum(np.hypot(*np.diff(p, axis=0).T)))
    at = np.linspace(0, u[-1], n)
    smooth = scipy.interpolate.PchipInterpolator(u, p)(at)
    return [(float(a), float(b)) for a, b in smooth]


def _mirrored(half: Sequence[Point], middle: float = 0.5) -> list[Point]:
    """Close an outline of which the right half is given, from top to bottom."""
    return [*half, *((2 * middle - x, y) for x, y in reversed(half))]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten a colour."""
    r, g, b = (c * factor if factor <= 1 else 255 - (255 - c) * max(0, 2 - factor) for c in colour)
    return int(r), int(g), int(b)


def _pick(rng: Generator, *colours: Colour, spread: int = 14) -> Colour:
    chosen = np.array(colours[rng.integers(len(colours))])
    r, g, b = (int(c) for c in np.clip(chosen + rng.integers(-spread, spread + 1, 3), 0, 255))
    return r, g, b


_BLACK, _DARK, _STEEL, _SILVER = (18, 16, 16), (48, 42, 40), (128, 132, 142), (208, 212, 220)
_BRASS, _IVORY, _HAIR = (206, 166, 74), (238, 230, 210), (240, 238, 228)


def _sprite(object_name: str, rng: Generator) -> Image.Image:
    """Draw one object alone on a transparent square, RGBA, larger than it will be shown."""
    if object_name not in _DRAWERS:
        raise ValueError(f"{object_name!r} can't be drawn; {', '.join(_DRAWERS)} can")
    draw, middle_deg, spread_deg = _DRAWERS[object_name]
    pen = _Pen(middle_deg + rng.uniform(-spread_deg, spread_deg), rng.random() < 0.5)
    draw(pen, rng)
    return pen.image


# fmt: off
def _draw_guitar(pen: _Pen, rng: Generator) -> None:
    top = _pick(rng, (226, 178, 104), (204, 134, 62), (236, 208, 150), (164, 84, 42), (70, 48, 40))
    edge, neck = _shade(top, 0.42), _pick(rng, (92, 58, 34), (64, 40, 28))
    waist, lower = rng.uniform(0.112, 0.128), rng.uniform(0.195, 0.215)
    half = [(0.5, 0.47), (0.56, 0.475), (0.635, 0.515), (0.65, 0.57), (0.5 + waist, 0.665),
            (0.5 + lower * 0.88, 0.745), (0.5 + lower, 0.83), (0.5 + lower * 0.86, 0.92), (0.58, 0.965),
            (0.5, 0.97)]
    body = _mirrored(_curve(half))
    pen.shape(body, top, edge, 0.016)
    pen.shape([(0.5 + 0.93 * (x - 0.5), 0.72 + 0.945 * (y - 0.72)) for x, y in body], _shade(top, 1.12))
    hole = 0.655
    pen.oval(0.5, hole, 0.072, 0.072, _shade(top, 0.6))
    pen.oval(0.5, hole, 0.057, 0.057, _BLACK)
    if rng.random() < 0.5:
        pen.shape([(0.555, 0.63), (0.60, 0.65), (0.595, 0.76), (0.54, 0.72)], _DARK)
    pen.shape([(0.475, 0.13), (0.525, 0.13), (0.533, 0.60), (0.467, 0.60)], neck, _BLACK, 0.006)
    for fret in range(1, 13):
        y = 0.13 + 0.62 * (1 - 2 ** (-fret / 12))
        pen.line([(0.475 - 0.008 * (y - 0.13), y), (0.525 + 0.008 * (y - 0.13), y)], _SILVER, 0.005)
        if fret in (3, 5, 7, 9):
            pen.oval(0.5, y - 0.012, 0.006, 0.006, _IVORY)
    pen.shape([(0.475, 0.13), (0.455, 0.03), (0.545, 0.03), (0.525, 0.13)], _shade(neck, 0.8), _BLACK, 0.006)
    for i in range(3):
        for sign in (-1, 1):
            y = 0.045 + 0.03 * i
            pen.line([(0.5 + sign * 0.04, y), (0.5 + sign * 0.062, y)], _SILVER, 0.008)
            pen.oval(0.5 + sign * 0.068, y, 0.011, 0.008, _IVORY, _STEEL, 0.004)
    pen.shape(_box(0.40, 0.84, 0.60, 0.868), _shade(neck, 0.7))
    pen.line([(0.45, 0.85), (0.55, 0.85)], _IVORY, 0.007)
    for i in range(6):
        offset = (i - 2.5) / 2.5
        pen.line([(0.5 + 0.018 * offset, 0.12), (0.5 + 0.036 * offset, 0.85)], _HAIR, 0.003)


def _draw_violin(pen: _Pen, rng: Generator) -> None:
    top = _pick(rng, (172, 82, 34), (146, 60, 26), (190, 104, 44), (120, 46, 28), (206, 126, 58))
    edge = _shade(top, 0.4)
    half = [(0.5, 0.405), (0.545, 0.412), (0.598, 0.45), (0.613, 0.50), (0.606, 0.553), (0.622, 0.578)]
    bout = [(0.622, 0.578), (0.585, 0.60), (0.568, 0.645), (0.58, 0.69), (0.632, 0.722)]
    low = [(0.632, 0.722), (0.622, 0.745), (0.647, 0.80), (0.648, 0.85), (0.61, 0.92), (0.55, 0.947),
           (0.5, 0.95)]
    body = _mirrored([*_curve(half, 30), *_curve(bout, 30), *_curve(low, 40)])
    pen.shape(body, top, edge, 0.014)
    pen.shape([(0.5 + 0.9 * (x - 0.5), 0.68 + 0.94 * (y - 0.68)) for x, y in body], _shade(top, 1.15))
    for sign in (-1, 1):
        hole = [(0.542, 0.618), (0.556, 0.61), (0.563, 0.63), (0.558, 0.67), (0.566, 0.71), (0.58, 0.725),
                (0.588, 0.708)]
        pen.line([(0.5 + sign * (x - 0.5), y) for x, y in _curve(hole, 24)], _BLACK, 0.010)
        pen.oval(0.5 + sign * 0.045, 0.621, 0.008, 0.008, _BLACK)
        pen.oval(0.5 + sign * 0.085, 0.706, 0.009, 0.009, _BLACK)
    pen.shape([(0.484, 0.14), (0.516, 0.14), (0.527, 0.60), (0.473, 0.60)], _BLACK)
    pen.shape([(0.482, 0.13), (0.486, 0.07), (0.514, 0.07), (0.518, 0.14)], top, edge, 0.006)
    pen.oval(0.5, 0.055, 0.026, 0.026, top, edge, 0.007)
    pen.line(_arc(0.5, 0.055, 0.012, 0.012, 0, 300), edge, 0.006)
    for i, sign in enumerate((-1, 1, -1, 1)):
        y = 0.08 + 0.015 * i
        pen.line([(0.5, y), (0.5 + sign * 0.048, y - 0.006)], _BLACK, 0.009)
        pen.oval(0.5 + sign * 0.055, y - 0.007, 0.011, 0.008, _BLACK)
    pen.shape([(0.47, 0.765), (0.53, 0.765), (0.513, 0.925), (0.487, 0.925)], _BLACK)
    pen.oval(0.425, 0.885, 0.062, 0.045, _BLACK, (60, 56, 56), 0.005, -25)
    pen.line([(0.462, 0.682), (0.5, 0.67), (0.538, 0.682)], _IVORY, 0.014)
    for i in range(4):
        offset = (i - 1.5) / 1.5
        pen.line([(0.5 + 0.010 * offset, 0.13), (0.5 + 0.022 * offset, 0.675)], _HAIR, 0.0035)
        pen.line([(0.5 + 0.022 * offset, 0.675), (0.5 + 0.018 * offset, 0.78)], _HAIR, 0.0035)
    wood, shift = _pick(rng, (104, 52, 24), (70, 36, 22)), rng.uniform(-0.03, 0.03)
    if rng.random() < 0.5:  # the bow lies across the strings, or beside the violin
        tip, frog = (0.12, 0.50 + shift), (0.93, 0.75 + shift)
    else:
        tip, frog = (0.70 + shift, 0.06), (0.80 + shift, 0.93)
    along = np.subtract(frog, tip) / np.hypot(*np.subtract(frog, tip))
    across = np.array([-along[1], along[0]]) * 0.026
    hair = [tuple(np.add(tip, across)), tuple(np.add(frog, across) - 0.06 * along)]
    pen.line(hair, _HAIR, 0.010)
    pen.line(_curve([tip, tuple(np.add(tip, frog) / 2 + 0.25 * across), frog]), wood, 0.013)
    pen.line([tip, hair[0]], _IVORY, 0.010)
    pen.line([hair[1], tuple(np.subtract(frog, 0.05 * along))], _BLACK, 0.022)


def _draw_flute(pen: _Pen, rng: Generator) -> None:
    tube = _pick(rng, _SILVER, (196, 202, 214), _SILVER, (222, 196, 128), (120, 78, 52), spread=8)
    y, r = 0.5, rng.uniform(0.026, 0.032)
    for i, factor in enumerate((0.45, 0.72, 0.92, 1.1, 1.6, 1.2, 0.95, 0.7, 0.5)):  # light along the tube
        stripe = y - r + 2 * r * i / 9
        pen.shape(_box(0.02, stripe, 0.98, stripe + 2 * r / 9 + 0.002), _shade(tube, factor))
    for x, half in ((0.02, 0.012), (0.31, 0.014), (0.79, 0.012), (0.972, 0.008)):
        joint = _box(x - half, y - 1.25 * r, x + half, y + 1.25 * r)
        pen.shape(joint, _shade(tube, 1.3), _shade(tube, 0.4), 0.004)
    pen.oval(0.175, y - 0.25 * r, 0.062, 1.35 * r, _shade(tube, 1.35), _shade(tube, 0.4), 0.005)
    pen.oval(0.175, y - 0.3 * r, 0.017, 0.42 * r, _BLACK)
    metal = _shade(tube, 1.25) if sum(tube) > 330 else _SILVER
    pen.line([(0.36, y - 1.35 * r), (0.77, y - 1.35 * r)], _shade(metal, 0.55), 0.010)
    pen.line([(0.82, y - 1.35 * r), (0.95, y - 1.35 * r)], _shade(metal, 0.55), 0.010)
    for x in (0.37, 0.41, 0.45, 0.49, 0.545, 0.585, 0.625, 0.665, 0.705, 0.745, 0.83, 0.87, 0.915):
        key = 0.019 if x not in (0.37, 0.41) else 0.014
        pen.line([(x, y - 1.45 * r), (x, y)], _shade(metal, 0.7), 0.010)
        pen.oval(x, y - 0.25 * r, key, 1.05 * key, metal, _shade(metal, 0.4), 0.005)
        pen.oval(x - 0.003, y - 0.25 * r - 0.004, 0.4 * key, 0.4 * key, _shade(metal, 1.7))
    for x in (0.39, 0.53, 0.80):
        pen.line([(x, y + 0.9 * r), (x + 0.035, y + 1.9 * r)], _shade(metal, 0.8), 0.014)


def _draw_drum(pen: _Pen, rng: Generator) -> None:
    shell = _pick(rng, (178, 30, 36), (28, 62, 150), (20, 120, 80), (40, 38, 42), (206, 150, 60))
    rim, head = _pick(rng, _SILVER, _BRASS, _SILVER), _pick(rng, (244, 240, 230), (250, 248, 244), spread=5)
    rx, ry, top, bottom = 0.37, rng.uniform(0.10, 0.14), 0.42, rng.uniform(0.70, 0.82)

    def side(y0: float, y1: float, radius: float) -> list[Point]:
        return [*_arc(0.5, y1, radius, ry, 0, 180), *reversed(_arc(0.5, y0, radius, ry, 0, 180))]

    pen.shape(side(top, bottom, rx), shell, _shade(shell, 0.4), 0.01)
    for angle, factor in ((150, 1.25), (130, 1.15), (40, 0.75), (22, 0.6)):
        x0, x1 = (0.5 + rx * np.cos(np.radians(a)) for a in (angle + 9, angle - 9))
        y0, y1 = (ry * np.sin(np.radians(a)) for a in (angle + 9, angle - 9))
        stripe = [(x0, top + y0), (x1, top + y1), (x1, bottom + y1), (x0, bottom + y0)]
        pen.shape(stripe, _shade(shell, factor))
    ropes = rng.random() < 0.5
    angles = np.radians(np.linspace(12, 168, 8))
    for i, a in enumerate(angles):
        x, y = 0.5 + rx * np.cos(a), ry * np.sin(a)
        if ropes and i + 1 < len(angles):
            x2, y2 = 0.5 + rx * np.cos(angles[i + 1]), ry * np.sin(angles[i + 1])
            middle = ((x + x2) / 2, bottom + (y + y2) / 2)
            pen.line([(x, top + y), middle, (x2, top + y2)], _HAIR, 0.011)
        elif not ropes and i % 2:
            pen.line([(x, top + y + 0.02), (x, bottom + y - 0.01)], rim, 0.010)
            middle_y = (top + bottom) / 2 + y
            pen.shape(_box(x - 0.014, middle_y - 0.035, x + 0.014, middle_y + 0.035), rim)
    for y in (bottom - 0.035, top):
        pen.shape(side(y, y + 0.05, rx + 0.012), rim, _shade(rim, 0.45), 0.006)
    pen.oval(0.5, top, rx + 0.012, ry + 0.008, rim, _shade(rim, 0.45), 0.008)
    pen.oval(0.5, top, rx - 0.012, ry - 0.010, head, _shade(head, 0.75), 0.006)
    wood = _pick(rng, (214, 170, 106), (184, 130, 74))
    reach = rng.uniform(-0.05, 0.05)
    for sign in (-1, 1):
        tip = (0.5 + sign * (0.06 + reach), top - 0.01 + 0.02 * sign)
        end = (0.5 + sign * 0.40, 0.07 + 0.05 * reach)
        pen.line([tip, end], _shade(wood, 0.5), 0.030)
        pen.line([tip, end], wood, 0.022)
        pen.oval(*tip, 0.024, 0.017, wood, _shade(wood, 0.5), 0.005)


def _draw_dog(pen: _Pen, rng: Generator) -> None:
    coat = _pick(rng, (196, 146, 88), (120, 78, 48), (232, 214, 184), (70, 62, 60), (150, 142, 138), spread=8)
    light, dark = _shade(coat, 1.5), _shade(coat, 0.6)
    edge, patch = _shade(coat, 0.4), _shade(coat, 0.45) if rng.random() < 0.5 else light
    pen.line(_curve([(0.66, 0.86), (0.80, 0.80), (0.86, 0.66), (0.84, rng.uniform(0.52, 0.62))]), edge, 0.066)
    pen.line(_curve([(0.66, 0.86), (0.80, 0.80), (0.86, 0.66), (0.84, 0.6)]), coat, 0.050)
    pen.oval(0.5, 0.76, 0.21, 0.21, coat, edge)
    for sign in (-1, 1):
        pen.oval(0.5 + sign * 0.19, 0.87, 0.085, 0.10, coat, edge)
        pen.oval(0.5 + sign * 0.20, 0.955, 0.085, 0.034, light, edge)
    pen.oval(0.5, 0.76, 0.11, 0.17, light)
    for sign in (-1, 1):
        pen.shape(_curve([(0.5 + sign * 0.02, 0.66), (0.5 + sign * 0.105, 0.66), (0.5 + sign * 0.10, 0.95),
                          (0.5 + sign * 0.015, 0.95), (0.5 + sign * 0.02, 0.66)]), coat, edge)
        pen.oval(0.5 + sign * 0.065, 0.955, 0.065, 0.034, light, edge)
    collar = _pick(rng, (200, 40, 40), (40, 90, 190), (40, 150, 90))
    pen.line(_arc(0.5, 0.50, 0.16, 0.15, 25, 155), collar, 0.036)
    floppy = rng.random() < 0.85
    if not floppy:
        for sign in (-1, 1):
            x = [0.5 + sign * d for d in (0.06, 0.20, 0.235, 0.07, 0.17, 0.20)]
            pen.shape([(x[0], 0.19), (x[1], 0.02), (x[2], 0.28)], dark, edge)
            pen.shape([(x[3] + sign * 0.04, 0.18), (x[4] + sign * 0.02, 0.07), (x[5], 0.25)], (214, 150, 144))
    pen.oval(0.5, 0.34, 0.215, 0.20, coat, edge)
    if rng.random() < 0.6:
        pen.oval(0.585, 0.29, 0.085, 0.10, patch)
    else:
        pen.shape(_curve([(0.47, 0.15), (0.53, 0.15), (0.525, 0.3), (0.475, 0.3), (0.47, 0.15)]), light)
    if floppy:
        for sign in (-1, 1):
            ear = [(0.12, 0.15), (0.22, 0.14), (0.285, 0.27), (0.275, 0.42), (0.225, 0.46), (0.185, 0.36),
                   (0.12, 0.15)]
            pen.shape(_curve([(0.5 + sign * a, b) for a, b in ear]), dark, edge)
    barking = rng.random() < 0.6
    if barking:
        pen.oval(0.5, 0.50, 0.075, 0.065, (70, 20, 26), edge)
        pen.oval(0.5, 0.525, 0.045, 0.040, (226, 104, 116))
    for sign in (-1, 1):
        pen.oval(0.5 + sign * 0.052, 0.435, 0.075, 0.062, light, edge, 0.006)
    pen.shape(_box(0.44, 0.37, 0.56, 0.43), light)
    pen.oval(0.5, 0.37, 0.075, 0.045, light)
    pen.oval(0.5, 0.385, 0.050, 0.034, _BLACK)
    pen.oval(0.485, 0.373, 0.014, 0.008, (150, 150, 156))
    pen.line([(0.5, 0.41), (0.5, 0.455)], _BLACK, 0.008)
    for sign in (-1, 1):
        pen.line(_arc(0.5 + sign * 0.035, 0.452, 0.035, 0.024, 10, 170), _BLACK, 0.008)
        pen.oval(0.5 + sign * 0.085, 0.285, 0.034, 0.038, (250, 250, 246), edge, 0.005)
        pen.oval(0.5 + sign * 0.082, 0.290, 0.024, 0.028, (60, 36, 20))
        pen.oval(0.5 + sign * 0.082 - 0.008, 0.280, 0.008, 0.009, (255, 255, 255))


def _draw_motorcycle(pen: _Pen, rng: Generator) -> None:
    paint = _pick(rng, (190, 24, 30), (24, 70, 170), (30, 30, 34), (230, 120, 20), (230, 200, 40))
    rear, front, y, r = 0.20, 0.80, 0.70, rng.uniform(0.150, 0.165)
    for x in (rear, front):
        pen.ring(x, y, r, _BLACK, 0.048)
        pen.ring(x, y, r - 0.034, _SILVER, 0.012)
        for a in np.arange(0, 180, 22.5) + rng.uniform(0, 22):
            pen.line(_arc(x, y, r - 0.03, r - 0.03, float(a), float(a) + 180)[:: 48], _STEEL, 0.005)
        pen.oval(x, y, 0.038, 0.038, _STEEL, _DARK)
    pen.line(_arc(rear, y, r + 0.034, r + 0.034, 190, 320), paint, 0.026)  # mudguards
    pen.line(_arc(front, y, r + 0.034, r + 0.034, 215, 330), paint, 0.026)
    pen.line([(rear, y), (0.36, 0.55), (0.42, 0.50)], _DARK, 0.026)
    pen.line([(rear, y), (0.45, 0.72), (0.60, 0.72), (0.655, 0.44)], _DARK, 0.024)
    pen.line([(front, y), (0.665, 0.34)], _SILVER, 0.034)  # fork
    pen.line([(front + 0.004, y - 0.02), (0.73, 0.50)], _STEEL, 0.044)
    pen.oval(0.50, 0.68, 0.085, 0.065, _STEEL, _DARK)
    pen.oval(0.50, 0.68, 0.045, 0.036, _SILVER, _DARK, 0.006)
    cylinders = ((0.43, 0.47), (0.57, 0.53)) if rng.random() < 0.5 else ((0.5, 0.5),)
    for x0, x1 in cylinders:
        for i in range(6):
            a = i / 5
            x, fin = x1 + (x0 - x1) * (1 - a) * 0.8 + (x0 - x1) * 0.1, 0.62 - 0.095 * (1 - a)
            pen.line([(x - 0.045, fin), (x + 0.045, fin)], _SILVER if i % 2 else _STEEL, 0.013)
    pipe = [(0.565, 0.60), (0.62, 0.68), (0.56, 0.775), (0.42, 0.79), (0.30, 0.785)]
    pen.line(_curve(pipe), _SILVER, 0.026)
    pen.line([(0.34, 0.787), (0.06, 0.765)], _shade(_SILVER, 0.55), 0.060)  # exhaust
    pen.line([(0.34, 0.781), (0.07, 0.759)], _SILVER, 0.036)
    tank = [(0.40, 0.50), (0.415, 0.435), (0.48, 0.395), (0.57, 0.39), (0.64, 0.42), (0.66, 0.46),
            (0.56, 0.505), (0.40, 0.50)]
    pen.shape(_curve(tank), paint, _shade(paint, 0.4), 0.009)
    pen.line(_curve([(0.46, 0.43), (0.53, 0.412), (0.60, 0.425)]), _shade(paint, 1.6), 0.012)
    seat = [(0.13, 0.475), (0.20, 0.465), (0.28, 0.485), (0.36, 0.49), (0.42, 0.465), (0.43, 0.51),
            (0.30, 0.54), (0.15, 0.51)]
    pen.shape([*seat, seat[0]], (58, 40, 32) if rng.random() < 0.4 else _BLACK, _DARK)
    pen.shape([(0.27, 0.545), (0.41, 0.515), (0.40, 0.60), (0.31, 0.62)], paint, _shade(paint, 0.4), 0.006)
    pen.line(_curve([(0.665, 0.36), (0.655, 0.30), (0.60, 0.275), (0.53, 0.30)]), _STEEL, 0.020)  # handlebar
    pen.line([(0.57, 0.283), (0.52, 0.302)], _BLACK, 0.032)
    pen.line([(0.645, 0.30), (0.63, 0.215)], _STEEL, 0.010)
    pen.oval(0.628, 0.205, 0.030, 0.020, _DARK)
    pen.oval(0.705, 0.385, 0.050, 0.055, _shade(_SILVER, 0.7), _DARK)
    pen.oval(0.725, 0.385, 0.024, 0.046, (255, 246, 200), _STEEL, 0.006)
    pen.oval(0.105, 0.535, 0.020, 0.020, (220, 40, 40), _DARK, 0.005)
# fmt: on


_DRAWERS: dict[str, tuple[Callable[[_Pen, Generator], None], float, float]] = {  # and tilts: middle, spread
    "acoustic_guitar": (_draw_guitar, 35, 22),
    "violin": (_draw_violin, 20, 20),
    "flute": (_draw_flute, -14, 16),
    "drum": (_draw_drum, 0, 9),
    "dog": (_draw_dog, 0, 8),
    "motorcycle": (_draw_motorcycle, 0, 6),
}


def _scenery(rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Draw a room, a stage, a street or a park without any of the objects."""
    width, height = size
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    floor = height * rng.uniform(0.62, 0.8)

    def box(left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        draw.rectangle((left, top, right, bottom), fill=fill)

    def gradient(top: float, bottom: float, first: Colour, last: Colour) -> None:
        for row in range(int(top), int(bottom) + 1):
            a = (row - top) / max(1, bottom - top)
            mixed = [int(p + a * (q - p)) for p, q in zip(first, last, strict=True)]
            draw.line((0, row, width, row), fill=(mixed[0], mixed[1], mixed[2]))

    place = rng.choice(["room", "stage", "street", "park"])
    if place == "room":
        wall = _pick(rng, (206, 196, 178), (170, 190, 200), (196, 176, 190), (180, 200, 170), (120, 130, 150))
        gradient(0, floor, _shade(wall, 1.15), wall)
        gradient(floor, height, _pick(rng, (150, 104, 66), (120, 110, 104), (96, 70, 56)), (60, 46, 40))
        box(0, floor - 5, width, floor, _shade(wall, 0.7))
        x, y = rng.uniform(0, 0.7) * width, rng.uniform(0.05, 0.2) * height
        box(x - 4, y - 4, x + 0.25 * width + 4, y + 0.3 * height + 4, (236, 232, 224))
        box(
            x,
            y,
            x + 0.25 * width,
            y + 0.3 * height,
            _pick(rng, (150, 196, 230), (60, 76, 110), (226, 200, 150)),
        )
        if rng.random() < 0.6:
            box(x + 0.12 * width, y, x + 0.13 * width, y + 0.3 * height, (236, 232, 224))
    elif place == "stage":
        curtain = _pick(rng, (110, 16, 24), (30, 30, 80), (60, 20, 70), (24, 60, 56))
        for x in range(0, width, 4):
            fold = 0.75 + 0.25 * np.sin(x * 0.14 + 6 * rng.random())
            box(x, 0, x + 4, floor, _shade(curtain, fold))
        gradient(floor, height, _pick(rng, (120, 84, 54), (70, 66, 70)), (30, 24, 22))
        light = Image.new("L", size)
        x = rng.uniform(0.3, 0.7) * width
        ImageDraw.Draw(light).polygon([(x, -20), (x - 0.35 * width, height), (x + 0.35 * width, height)], fill=46)
        image.paste((255, 244, 214), (0, 0), light)
    elif place == "street":
        gradient(0, floor, _pick(rng, (120, 170, 220), (170, 176, 186), (240, 190, 150)), (226, 226, 220))
        x = -20.0
        while x < width:
            across, tall = rng.uniform(40, 90), rng.uniform(0.3, 0.95) * floor
            wall = _pick(rng, (150, 120, 104), (130, 134, 140), (176, 150, 120), (110, 96, 100))
            box(x, floor - tall, x + across, floor, wall)
            for wx in np.arange(x + 7, x + across - 12, 16):
                for wy in np.arange(floor - tall + 8, floor - 18, 22):
                    box(wx, wy, wx + 8, wy + 12, _shade(wall, 0.6 if rng.random() < 0.7 else 1.7))
            x += across + rng.uniform(0, 12)
        gradient(floor, height, (110, 110, 114), (70, 70, 76))
        for x in np.arange(rng.uniform(-40, 0), width, 60):
            box(x, 0.93 * height, x + 30, 0.93 * height + 4, (226, 220, 200))
    else:
        gradient(0, floor, _pick(rng, (110, 170, 230), (150, 190, 220), (230, 180, 150)), (220, 234, 240))
        gradient(floor, height, _pick(rng, (96, 150, 70), (130, 160, 80), (150, 140, 90)), (60, 104, 48))
        for _ in range(rng.integers(2, 6)):
            x, r = rng.uniform(0, width), rng.uniform(18, 42)
            leaves = _pick(rng, (50, 110, 56), (80, 130, 60), (160, 110, 50))
            box(x - 4, floor - 1.4 * r, x + 4, floor + 4, (92, 64, 44))
            draw.ellipse((x - r, floor - 3 * r, x + r, floor - r), fill=leaves)
            draw.ellipse((x - 0.8 * r, floor - 3.3 * r, x + 0.4 * r, floor - 2 * r), fill=_shade(leaves, 1.15))
    return image


# ------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class SceneConfig:
    """What clips are like. Shares are of clips; levels are drawn uniformly from (lowest, highest)."""

    objects: tuple[str, ...] = OBJECTS
    n_objects_shares: tuple[float, ...] = (0.25, 0.55, 0.20)  # with one, two, three audible objects
    silent_share: float = 0.10  # another object is shown that makes no sound
    hidden_share: float = 0.05  # one of the audible objects is never shown
    offscreen_share: float = 0.12  # one of OFFSCREEN sounds
    empty_shot_share: float = 0.30  # a second of the video shows the scene without objects
    object_level_db: tuple[float, float] = (-3.0, 3.0)
    offscreen_level_db: tuple[float, float] = (-12.0, -5.0)  # relative to the objects' mean level
    noise_level_db: tuple[float, float] = (-50.0, -35.0)  # relative to the mix
    mix_level_db: tuple[float, float] = (-24.0, -14.0)  # RMS, full scale = 0, less where peaks forbid it
    seconds: int = 10
    sample_rate: int = 48_000
    pictures_per_s: int = 5
    size: tuple[int, int] = (320, 240)  # pixels, width and height, both even


@dataclass(frozen=True)
class Shot:
    """A part of the video between two cuts: one object close up, several at once, or none."""

    start_s: int
    end_s: int
    objects: tuple[str, ...]


@dataclass(frozen=True)
class ScenePlan:
    """Everything about a clip that is decided before anything is rendered."""

    segment_id: str
    number: int
    split: str
    seed: int
    audible: tuple[str, ...]
    visible: tuple[str, ...]
    offscreen: str | None
    shots: tuple[Shot, ...]
    config: SceneConfig


@dataclass(frozen=True)
class Scene:
    """A rendered clip. `mix` is exactly the sum of the sources and `rest`, in any order of adding."""

    plan: ScenePlan
    mix: Sound  # (S,)
    sources: dict[str, Sound]  # what each audible object contributed, (S,) each
    rest: Sound  # (S,), off-screen sound and noise


def plan_scene(
    number: int, split: str, seed: int, config: SceneConfig | None = None, n_objects: int | None = None
) -> ScenePlan:
    """Decide what is heard and shown in clip `number` of a split; cheap, nothing is rendered.

    `n_objects` fixes the number of audible objects. Every visible object is close up for at
    least two whole seconds. Raises ValueError for an unknown split or object, or when the
    numbers of objects and seconds don't allow it.
    """
    config = config or SceneConfig()
    if unknown := set(config.objects) - set(_DRAWERS):
        raise ValueError(f"{sorted(unknown)} can't be rendered; {', '.join(_DRAWERS)} can")
    rng = _stream(number, split, seed, "plan", n_objects)
    audible_count = n_objects or 1 + int(rng.choice(len(config.n_objects_shares), p=config.n_objects_shares))
    if not 1 <= audible_count <= len(config.objects):
        raise ValueError(f"n_objects is {audible_count}; it must lie in 1…{len(config.objects)}")
    shuffled = [config.objects[i] for i in rng.permutation(len(config.objects))]
    audible, others = shuffled[:audible_count], shuffled[audible_count:]
    visible = audible[rng.random() < config.hidden_share :] + others[: rng.random() < config.silent_share]
    if 2 * len(visible) > config.seconds:
        raise ValueError(f"{config.seconds} s are too short to show {len(visible)} objects for two seconds each")
    offscreen = str(rng.choice(OFFSCREEN)) if rng.random() < config.offscreen_share else None
    return ScenePlan(
        segment_id=f"synthetic-{split}-{seed}-{n_objects or 'x'}-{number:05d}",
        number=number,
        split=split,
        seed=seed,
        audible=tuple(sorted(audible)),
        visible=tuple(sorted(visible)),
        offscreen=offscreen,
        shots=_plan_shots(visible, config, rng),
        config=config,
    )


def _plan_shots(visible: Sequence[str], config: SceneConfig, rng: Generator) -> tuple[Shot, ...]:
    """Cut the clip at whole seconds: two-second close-ups first, what is left as it comes."""
    contents: list[tuple[tuple[str, ...], int]] = [((name,), 2) for name in visible]
    free = config.seconds - 2 * len(visible)
    if free and (not visible or rng.random() < config.empty_shot_share):
        contents.append(((), 1))
        free -= 1
    while free:
        length = min(free, int(rng.integers(1, 4)))
        names = [visible[i] for i in rng.permutation(len(visible))]
        wide = len(names) > 1 and rng.random() < 0.6
        contents.append((tuple(names if wide else names[:1]), length))
        free -= length
    shots, start = [], 0
    for i in rng.permutation(len(contents)):
        names, length = contents[i]
        shots.append(Shot(start, start + length, tuple(names)))
        start += length
    return tuple(shots)


def render_scene(
    number: int, split: str, seed: int, config: SceneConfig | None = None, n_objects: int | None = None
) -> Scene:
    """Play clip `number` of a split; all of it follows from the arguments. See `plan_scene`."""
    plan = plan_scene(number, split, seed, config, n_objects)
    config = plan.config
    rng = _stream(number, split, seed, "levels", n_objects)

    def play(name: str, level_db: tuple[float, float]) -> Sound:
        stream = _stream(number, split, seed, f"sound of {name}", n_objects)
        gain = np.float32(10 ** (rng.uniform(*level_db) / 20))
        return gain * performance(name, stream, config.seconds, config.sample_rate)

    parts = {name: play(name, config.object_level_db) for name in plan.audible}
    n_samples = config.seconds * config.sample_rate
    rest = np.zeros(n_samples, np.float32)
    if plan.offscreen is not None:
        rest += play(plan.offscreen, config.offscreen_level_db)
    noise = _noise(rng, n_samples, 300, config.sample_rate)
    level = 10 ** (rng.uniform(*config.noise_level_db) / 20)
    rest += np.float32(level * _rms(np.sum(list(parts.values()), 0))) * noise
    parts["_rest"] = rest
    together = np.stack(list(parts.values()))
    gain = 10 ** (rng.uniform(*config.mix_level_db) / 20) / _rms(together.sum(0))
    gain = min(gain, 0.99 / float(np.abs(together).sum(0).max()))
    # On the grid of 24-bit samples, and any partial sum below full scale: adding is exact, FLAC keeps it.
    grid = (np.round(together.astype(np.float64) * (gain / _STEP)) * _STEP).astype(np.float32)
    sources = dict(zip(parts, grid, strict=True))
    rest = sources.pop("_rest")
    return Scene(plan, grid.sum(0), sources, rest)


def frames(plan: ScenePlan) -> NDArray[np.uint8]:
    """Draw a clip's video, `(n_frames, height, width, 3)`: cuts between shots, slow pans and zooms.

    One scenery and one look of each object run through the clip.
    """
    config, (width, height) = plan.config, plan.config.size
    rng = _stream(plan.number, plan.split, plan.seed, "pictures", plan.segment_id)
    larger = (int(1.2 * width), int(1.2 * height))
    scenery = _scenery(rng, larger)
    sprites = {name: _sprite(name, rng) for name in plan.visible}
    video = np.empty((config.seconds * config.pictures_per_s, height, width, 3), np.uint8)
    for shot in plan.shots:
        image = _compose(scenery, [sprites[name] for name in shot.objects], rng)
        views = []  # left, top and width of what the camera sees first and last
        for _ in range(2):
            seen = rng.uniform(0.84, 1) * larger[0]
            left, top = rng.random(2) * (larger[0] - seen) * (1, height / width)
            views.append((left, top, seen))
        first, last = shot.start_s * config.pictures_per_s, shot.end_s * config.pictures_per_s
        for i, a in zip(range(first, last), np.linspace(0, 1, last - first), strict=True):
            left, top, seen = (1 - a) * np.array(views[0]) + a * np.array(views[1])
            view = (left, top, left + seen, min(top + seen * height / width, larger[1]))
            video[i] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=view))
    return video


def _stream(number: int, split: str, seed: int, purpose: str, variant: int | str | None = None) -> Generator:
    """Open the random stream of one purpose in one clip; no two are alike."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if number < 0 or seed < 0:
        raise ValueError(f"number and seed are {number} and {seed}; they count from 0")
    text = f"{purpose}/{variant}".encode()
    return np.random.default_rng([seed, SPLITS.index(split), number, *text])


# -------------------------------------------------------------------------------------- files


def write_scene(scene: Scene, folder: str | Path) -> Segment:
    """Write a clip and its references under a folder, and return its row for a table there.

    `clips/ID.mp4` is H.264 and AAC at 256 kbit/s, `references/ID/OBJECT.flac` and `_rest.flac` are
    24-bit mono: their sum is the mix before AAC, sample for sample. `objects` are the audible
    ones; `labels` None leaves the labels to the pictures.
    Raises RuntimeError with ffmpeg's words when it fails.
    """
    folder, plan = Path(folder), scene.plan
    clip = folder / "clips" / f"{plan.segment_id}.mp4"
    references = folder / "references" / plan.segment_id
    clip.parent.mkdir(parents=True, exist_ok=True)
    references.mkdir(parents=True, exist_ok=True)
    for name, sound in {**scene.sources, "_rest": scene.rest}.items():
        _write_flac(references / f"{name}.flac", sound, plan.config.sample_rate)
    video = frames(plan)
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        soundfile.write(wav, scene.mix, plan.config.sample_rate, format="WAV", subtype="FLOAT")
        wav.flush()
        size, rate = "{}x{}".format(*plan.config.size), plan.config.pictures_per_s
        pictures = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=size, r=rate)
        output = ffmpeg.output(
            pictures,
            ffmpeg.input(wav.name),
            str(clip),
            **{"c:v": "libx264", "preset": "superfast", "pix_fmt": "yuv420p"},
            **{"c:a": "aac", "b:a": "256k", "aac_coder": "fast"},  # its noise is some 30 dB down
            **{"threads": 1, "loglevel": "error"},
        )
        executable = shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
        try:
            output.overwrite_output().run(executable, input=video.tobytes(), quiet=True)
        except ffmpeg.Error as error:
            raise RuntimeError(f"ffmpeg could not write {clip}: {error.stderr.decode(errors='replace')}") from None
    return Segment(plan.segment_id, f"clips/{clip.name}", 0.0, float(plan.config.seconds), plan.split, plan.audible)


def _write_flac(path: Path, sound: Sound, sample_rate: int) -> None:
    whole = np.round(sound.astype(np.float64) / _STEP).astype(np.int32)
    soundfile.write(path, whole << 8, sample_rate, subtype="PCM_24")  # libsndfile takes the upper 24 bits


def write_table(segments: Iterable[Segment], path_csv: str | Path) -> None:
    """Write the CSV table that `avsep.records.read_segments` reads, without labels."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["segment_id", "source", "start_s", "end_s", "split", "objects"])
    for s in segments:
        rows.writerow([s.segment_id, s.source, s.start_s, s.end_s, s.split, names_cell(s.objects)])
    storage.write_text(str(path_csv), text.getvalue())


# -------------------------------------------------------------------------------------- bases


@dataclass(frozen=True)
class PlantedBases:
    """Matrices whose factors are known: `V = W H`, and which object each basis belongs to."""

    V: Tensor  # (B, F, N)
    W: Tensor  # (B, F, M), each column's maximum one
    H: Tensor  # (B, M, N)
    object_of_basis: Tensor  # (B, M), int64 in 0…L-1
    labels: Tensor  # (B, L), bool: the objects that have a basis in the clip


def planted_bases(
    n_clips: int,
    *,
    n_bins: int = 48,
    n_bases: int = 6,
    n_frames: int = 40,
    n_objects: int = 4,
    objects_a_clip: int = 2,
    variation: float = 0.2,
    seed: int = 0,
) -> PlantedBases:
    """Draw clips whose bases vary around two spectra an object, common to all clips.

    Each clip holds `objects_a_clip` different objects, its bases shared out among them evenly, in
    random order; activations are zero half of the time. With `variation` 0 the bases of
    one kind are equal. Raises ValueError when the objects of a clip don't all get a basis.

    >>> planted = planted_bases(3)
    >>> planted.V.shape, planted.object_of_basis.shape, planted.labels.sum(1).tolist()
    (torch.Size([3, 48, 40]), torch.Size([3, 6]), [2, 2, 2])
    """
    if not 1 <= objects_a_clip <= min(n_objects, n_bases):
        raise ValueError(f"objects_a_clip is {objects_a_clip}; it must lie in 1…{min(n_objects, n_bases)}")
    rng = np.random.default_rng(seed)
    spectra = rng.exponential(size=(n_objects, 2, n_bins)) ** 2  # a few bins stand out in each
    shape = (n_clips, n_bases)
    present = np.argsort(rng.random((n_clips, n_objects)))[:, :objects_a_clip]
    order = np.argsort(rng.random(shape)) % objects_a_clip
    owner = np.take_along_axis(present, order, 1)
    W = spectra[owner, rng.integers(2, size=shape)] * np.exp(variation * rng.standard_normal((*shape, n_bins)))
    W = (W / W.max(-1, keepdims=True)).swapaxes(1, 2).astype(np.float32)
    H = (rng.exponential(size=(*shape, n_frames)) * (rng.random((*shape, n_frames)) < 0.5)).astype(np.float32)
    labels = np.zeros((n_clips, n_objects), bool)
    np.put_along_axis(labels, present, True, 1)
    return PlantedBases(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (W @ H, W, H, owner, labels)))
