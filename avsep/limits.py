"""What media may be and may cost."""

from __future__ import annotations

from dataclasses import dataclass

LOUDEST = 1e10  # of a sample, full scale 1: sums of squares of what is louder overflow


@dataclass(frozen=True)
class DecodeLimits:
    """What one call may use before it gives up with a `ClipError`."""

    timeout_s: float = 120.0
    max_duration_s: float = 900.0
    max_pixels: int = 8192 * 4320
    max_memory_bytes: int = 4 << 30  # ffmpeg's address space
    threads: int = 1  # ffmpeg's, a decoder
