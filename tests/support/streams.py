"""Sounds written and read as they are, what ffmpeg gives of a file, and what its streams hold."""

import subprocess
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from avsep.media import ffmpeg_executable


def write(path: Path, channels: NDArray, rate: int) -> Path:
    soundfile.write(path, channels.T, rate, subtype="FLOAT")
    return path


def read(path: Path) -> NDArray:
    return soundfile.read(path, always_2d=True)[0].T


def decoded(path: Path, tmp_path: Path) -> NDArray:
    """The file's sound as ffmpeg gives it, from its first timestamp on."""
    wav = tmp_path / "decoded.wav"
    run_ffmpeg("-i", path, "-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-c:a", "pcm_f32le", wav)
    return read(wav)


def run_ffmpeg(*arguments: object) -> str:
    command = [ffmpeg_executable(), "-y", "-v", "error", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


def packets(path: Path, at: str = "0:V:0") -> tuple[float, list[str]]:
    """When a stream's first packet is shown, in s after the file's start, and the packets' sizes and checksums."""
    lines = run_ffmpeg("-i", path, "-map", at, "-c", "copy", "-f", "framecrc", "-").splitlines()
    tick = next(eval(line.split(": ")[1]) for line in lines if line.startswith("#tb"))
    rows = [line.replace(" ", "").split(",") for line in lines if line[0] != "#"]
    return min(int(r[2]) for r in rows) * tick, [",".join(r[4:6]) for r in rows]


def lag_s(sound: NDArray, of: NDArray, rate: int) -> float:
    """How much later one sound comes than another."""
    n = 1 << (len(sound) + len(of)).bit_length()
    found = np.fft.irfft(np.fft.rfft(sound, n) * np.conj(np.fft.rfft(of, n)), n)
    at = int(found.argmax())
    return (at if at < n // 2 else at - n) / rate
