"""A media store: what is there, and what is brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from avsep.fetching.fetch import fetch
from avsep.fetching.options import Budget
from avsep.fetching.sources import find_media, is_fetched, is_remote, names_of, within
from avsep.records import ClipError, Reason, Rejection, Segment


@dataclass
class MediaStore:
    """Where remote segments' media are, and how missing ones get there."""

    uri: str
    known: dict[str, str]  # segment_id → path, as listed at the start
    missing: set[str]  # segments that are to be fetched
    siblings: dict[str, tuple[Segment, ...]]  # source → its missing segments, where there are several
    whole: frozenset[str] = frozenset()  # sources with several excerpts, see `sources.several_of`
    budget: Budget | None = None  # None: somebody else downloads
    retried: list[dict[str, Any]] = field(default_factory=list)  # downloads that failed and were tried again

    def of(self, segments: Sequence[Segment]) -> MediaStore:
        """Return the part that a task with these segments needs."""
        ids, sources = {s.segment_id for s in segments}, {s.source for s in segments}
        return MediaStore(
            self.uri,
            {i: self.known[i] for i in ids & self.known.keys()},
            ids & self.missing,
            {s: self.siblings[s] for s in sources & self.siblings.keys()},
            self.whole & sources,
            self.budget,
        )

    def locate(self, segment: Segment) -> Segment:
        """Return the segment as it is in the store, fetched when it isn't there; ClipError says why it can't be."""
        if not is_remote(segment):
            return segment
        path = self.known.get(segment.segment_id)
        if path is None and not is_fetched(segment.source):
            raise ClipError(Reason.MISSING, f"{self.uri} holds no file {names_of(segment)[0]}: it can't be downloaded")
        if path is None:
            if self.budget is None:
                raise ClipError(Reason.MISSING, f"not in {self.uri} yet", transient=True)

            def tell(attempt: int, error: ClipError) -> None:
                self.retried.append(
                    {
                        "event": "retried",
                        "segment_id": segment.segment_id,
                        "stage": "fetch",
                        "reason": str(error.reason),
                        "attempt": attempt,
                        "detail": error.detail,
                    }
                )

            siblings = self.siblings.get(segment.source, ())
            path = fetch(segment, self.uri, self.budget, siblings=siblings, tell=tell).path
        return within(segment, path, whole=segment.source in self.whole)

    def fetch_all(self, segments: Sequence[Segment]) -> list[Rejection]:
        """Bring segments' media into the store; return those that can't be had."""
        rejections = []
        for s in segments:
            try:
                self.locate(s)
            except ClipError as error:
                rejections.append(Rejection(s.segment_id, "fetch", error.reason, error.transient, detail=error.detail))
        return rejections


def open_store(uri: str, segments: Sequence[Segment], whole: frozenset[str] = frozenset()) -> MediaStore | None:
    """List what the media store holds; None where no segment needs one. `whole` is `several_of` the whole table."""
    remote = [s for s in segments if is_remote(s)]
    if not remote:
        return None
    known = find_media(uri, remote)
    missing = {s.segment_id for s in remote if s.segment_id not in known and is_fetched(s.source)}
    by_source: dict[str, list[Segment]] = {}
    for s in remote:
        if s.segment_id in missing:
            by_source.setdefault(s.source, []).append(s)
    siblings = {source: tuple(several) for source, several in by_source.items() if len(several) > 1}
    return MediaStore(uri, known, missing, siblings, whole)
