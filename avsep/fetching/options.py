"""What a fetch may use, what it gives, and whom it asks for leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from avsep import media
from avsep.fetching.egress import Lease, Stop, Wait
from avsep.media.cut import CutOptions
from avsep.records import Reason


@dataclass(frozen=True)
class FetchOptions:
    """What one fetch may use."""

    attempts: int = 3  # each takes a token
    backoff_s: float = 5.0  # before the second attempt, then twice that …; ± half, at random
    timeout_s: float = 900.0  # one attempt
    resolve_timeout_s: float = 120.0  # of it, until yt-dlp has found the streams
    socket_timeout_s: float = 20.0  # a server silent for this long is asked again
    max_height: int = 360  # pixels
    max_bytes: int = 1 << 30  # one stream, as downloaded
    work_folder: str | None = None  # for downloads in progress; None: the system's temporary folder
    limits: media.DecodeLimits = field(default_factory=media.DecodeLimits)  # of cutting and checking

    @property
    def cutting(self) -> CutOptions:
        """What cutting may use of it."""
        return CutOptions(self.max_height, self.max_bytes, self.limits)


@dataclass(frozen=True)
class FetchResult:
    """Where a segment's excerpt is, and what it cost; a cached one cost nothing."""

    path: str  # in the media store
    identity: str | None = None  # that downloaded it; None: it was there
    seconds: float = 0.0  # of the attempt that succeeded
    bytes: int = 0  # downloaded by it
    attempts: int = 0


class Stopped(Exception):
    """No download is worth a try any more, and why: the run is to end."""


class Budget(Protocol):
    """What `fetch` asks for leave: an `EgressBudget`, or a stand-in that calls a shared one."""

    def acquire(self, machine: str = "", source: str = "") -> Lease | Wait | Stop:
        """Give a lease, or say how long to wait, or to stop."""

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""
