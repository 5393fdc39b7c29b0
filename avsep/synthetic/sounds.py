"""Performances of seven objects, synthesised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import scipy.interpolate
import scipy.signal
from numpy.random import Generator
from numpy.typing import NDArray

Sound = NDArray[np.float32]
Resonance = tuple[float, float, float]  # centre in Hz, Q, gain
Dry = tuple[Sound, Sequence[Resonance]]  # a sound, and the body that it is heard through

OBJECTS: tuple[str, ...] = ("acoustic_guitar", "violin", "flute", "drum", "dog", "motorcycle")
OFFSCREEN: tuple[str, ...] = ("bell", "babble")  # heard, never seen, and none of avsep.objects
RMS = 0.1  # of a performance, full scale = 1


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
    wet /= rms(wet)
    limit = 6.0  # the highest crest factor before the last scaling: bends only the peaks of sparse knocks
    wet = limit * np.tanh(wet / limit)
    return (wet * min(RMS / rms(wet), 0.99 / np.abs(wet).max())).astype(np.float32)


def rms(x: NDArray) -> float:
    """Return the root mean square, above zero."""
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


def shaped_noise(rng: Generator, n_samples: int, lowpass_hz: float, sample_rate: int) -> Sound:
    """Draw noise of RMS one that falls by 6 dB an octave above `lowpass_hz`."""
    pole = np.exp(-2 * np.pi * lowpass_hz / sample_rate)
    white = rng.standard_normal(n_samples, dtype=np.float32)
    coloured = scipy.signal.lfilter(*np.array([[1 - pole, 0], [1, -pole]], np.float32), white)
    return coloured / np.float32(rms(coloured))


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
            pluck[:n_click] += 0.08 * fall**2 * shaped_noise(rng, n_click, 3000, sample_rate)
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
        bow = shaped_noise(rng, n, 5000, sample_rate)
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
        air = shaped_noise(rng, n, air_hz, sample_rate) * (1 + 3 * np.exp(-t / 0.02))  # a chiff at the start
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
        stick_noise = shaped_noise(rng, len(hit), 5000, sample_rate)
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
            f0 = pitch * rng.uniform(0.92, 1.08) * glide * (1 + rough * shaped_noise(rng, n, 60, sample_rate))
            voice = _harmonic(np.maximum(f0, 40), amplitudes, rng, sample_rate)
            envelope = np.minimum(x / 0.08, 1) * np.exp(-2.2 * x) * np.minimum((1 - x) / 0.15, 1)
            bark = (voice + breath * shaped_noise(rng, n, 4000, sample_rate)) * envelope.astype(np.float32)
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
    hiss = shaped_noise(rng, n_samples, rng.uniform(800, 2000), sample_rate) * strokes
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
        voice = _harmonic(glide, amplitudes, rng, sample_rate) + 0.05 * shaped_noise(rng, n, 5000, sample_rate)
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
