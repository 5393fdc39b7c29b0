"""How processes of the service get their memory."""

from __future__ import annotations

import contextlib
import ctypes

SEPARATING = {  # the environment of a process that separates
    "OMP_NUM_THREADS": "1",
    # glibc gives each thread an arena and large blocks back to the system: 9,000 page faults a clip, and growth
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
}
ANSWERING = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}  # of one that answers requests


def spare_memory() -> None:
    """Set this process's allocator as SEPARATING sets another's."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        for option, name in (
            (-8, "MALLOC_ARENA_MAX"), (-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_"),
        ):  # fmt: skip
            ctypes.CDLL(None).mallopt(option, int(SEPARATING[name]))
