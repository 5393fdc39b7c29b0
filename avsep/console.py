"""Standard output and error: whatever becomes of them, the work goes on, and its status is its own."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import sys
from typing import TextIO

INTERRUPTED = 130  # the exit status after Ctrl-C
_lost: list[OSError] = []


def prepare() -> None:
    """Make standard output and error take any text; call it before files are opened.

    What their encoding lacks is written as an escape, `\\u97f3`. Where one of them is closed, the null device takes
    its place: else the next file that is opened gets its number, and what libraries print.
    """
    _lost.clear()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line to standard output at once; what can't be written is told on standard error, once.

    A reader that has gone, as `head` does, is no mistake.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        _discard(sys.stdout)
        if error.errno != errno.EPIPE:
            _lost.append(error)
            complain(f"standard output can't be written: {error.strerror}; what follows isn't shown")


def complain(text: str) -> None:
    """Print a line to standard error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def lost() -> bool:
    """Tell whether some of what was said since `prepare` could not be written, though somebody may want it."""
    return bool(_lost)


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it.

    >>> [duration(s) for s in (42, 600, 20_000, 2_300_000)]
    ['42 s', '10 min', '5.6 h', '26.6 days']
    """
    if not math.isfinite(seconds):
        return "an unknown time"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds, and all that is to come, to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
