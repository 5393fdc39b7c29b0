"""The yt-dlp edge: one segment of a remote source in, one local file that holds just its excerpt out.

yt-dlp says where the streams are. Its own downloader gets them whole, in a supervised child. ffmpeg cuts the excerpt by
decoding. What the excerpt holds is counted before it enters the media store. Sections aren't downloaded: yt-dlp then
hangs on stalled servers, and calls fragments success.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from avsep import storage
from avsep.fetching.egress import EgressIdentity, Lease, Stop
from avsep.fetching.options import Budget, FetchOptions, FetchResult, Stopped
from avsep.fetching.sources import store_path, url_of
from avsep.fetching.ytdlp import need_yt_dlp, retrieve, temporary_folder
from avsep.media.cut import cut
from avsep.records import ClipError, Reason, Segment

_WAIT_S = 15.0  # between questions to the budget, at most
_AGAIN = (
    Reason.TRANSIENT,
    Reason.TIMEOUT,
    Reason.EGRESS_BLOCKED,
    Reason.EMPTY,
    Reason.TRUNCATED,
    Reason.UNREADABLE,
)


def fetch(
    segment: Segment,
    store: str,
    budget: Budget,
    options: FetchOptions = FetchOptions(),
    *,
    siblings: Sequence[Segment] = (),
    tell: Callable[[int, ClipError], None] | None = None,
) -> FetchResult:
    """Bring a segment's excerpt into the media store, unless it is there.

    `siblings` are other segments of the same source, which are cut from the same download. Waits for
    the budget's leave, and reports to it. Tries again, later or as another identity, where that can help. `tell` gets
    the number and the error of each attempt that is followed by another.

    Raises ClipError with the last attempt's reason, Stopped when the budget says so, and OSError when the disk is full.
    ModuleNotFoundError says that yt-dlp isn't there, ValueError that a source isn't remote.
    """
    path = store_path(store, segment.segment_id)
    url = url_of(segment.source)
    if storage.exists(path):
        return FetchResult(path)
    machine = socket.gethostname()
    for attempt in range(1, options.attempts + 1):
        lease = _wait_for_lease(budget, machine, segment.source, path)
        if lease is None:
            return FetchResult(path)
        outcome: Reason | None = Reason.TRANSIENT  # of what is no clip's fault
        try:
            result = download(segment, store, lease.identity, options, url=url, siblings=siblings)
            outcome = None
            return replace(result, attempts=attempt)
        except ClipError as error:
            outcome = error.reason
            if attempt == options.attempts or not error.transient or error.reason not in _AGAIN:
                raise
            if tell is not None:
                tell(attempt, error)
        finally:
            budget.report(lease, outcome)
        if outcome != Reason.EGRESS_BLOCKED:  # which waits for a lease instead
            time.sleep(options.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise ValueError(f"attempts is {options.attempts}; it must be at least 1")


def download(
    segment: Segment,
    store: str,
    identity: EgressIdentity,
    options: FetchOptions = FetchOptions(),
    *,
    url: str | None = None,
    siblings: Sequence[Segment] = (),
) -> FetchResult:
    """Download, cut, check and store a segment's excerpt: one attempt, as `identity`; the store isn't asked.

    The excerpt is exact, from sound and picture on the source's clock. The sound is FLAC at the source's rate, mono
    or stereo. The pictures are H.264 at 30 per second, their short side at most `max_height`.
    Raises as `fetch` does.
    """
    need_yt_dlp()
    started = time.monotonic()
    deadline = started + options.timeout_s
    with temporary_folder(options.work_folder) as folder:
        files, said_s = retrieve(url or url_of(segment.source), segment, folder, identity, options, deadline)
        received = sum(file.stat().st_size for file in files)
        target = folder / "excerpt.mkv"
        try:
            cut(files, segment.start_s, segment.end_s, target, options.cutting, said_s=said_s, deadline=deadline)
        except ClipError as error:  # it may have been the transfer's fault
            again = error.reason in (Reason.EMPTY, Reason.TRUNCATED, Reason.UNREADABLE)
            raise ClipError(error.reason, error.detail, transient=error.transient or again) from None
        path = store_path(store, segment.segment_id)
        storage.write_bytes(path, target.read_bytes(), exclusive=True)
        for sibling in siblings:  # one that can't be cut is told when its turn comes
            other = store_path(store, sibling.segment_id)
            if sibling.segment_id != segment.segment_id and not storage.exists(other):
                with contextlib.suppress(ClipError):
                    target.unlink(missing_ok=True)
                    late = max(deadline, time.monotonic() + options.limits.timeout_s)
                    cut(files, sibling.start_s, sibling.end_s, target, options.cutting, said_s=said_s, deadline=late)
                    storage.write_bytes(other, target.read_bytes(), exclusive=True)
    return FetchResult(path, identity.name, time.monotonic() - started, received, 1)


def _wait_for_lease(budget: Budget, machine: str, source: str, path: str) -> Lease | None:
    """Wait for a lease; None when the file is there meanwhile, as somebody's sibling."""
    while not isinstance(answer := budget.acquire(machine, source), Lease):
        if isinstance(answer, Stop):
            raise Stopped(answer.reason)
        time.sleep(min(answer.seconds, _WAIT_S) * random.uniform(1.0, 1.1) + 0.001)
        if storage.exists(path):
            return None
    return answer
