"""Where a segment's media are: at their source, in the media store, or in a user's folder."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import replace

import pyarrow.fs as pafs

from avsep import media, storage
from avsep.records import ClipError, Reason, Segment
from avsep.sites import SITES, site_of

_SUFFIXES = (  # of owned files, pictures and sound before sound alone
    *(".mkv", ".mp4", ".webm", ".m4v", ".mov", ".avi", ".flv", ".ts"),
    *(".flac", ".wav", ".m4a", ".opus", ".ogg", ".mp3", ".aac"),
)


def is_web(source: str) -> bool:
    """Tell whether a source is a web address."""
    return source.startswith(("http://", "https://"))


def is_fetched(source: str) -> bool:
    """Tell whether a source can be fetched: `youtube:ID` or another site's, `http://…`, `https://…`."""
    site = site_of(source)
    return is_web(source) or (site is not None and bool(site[0].page))


def is_remote(segment: Segment) -> bool:
    """Tell whether a segment's media are in a media store: fetched, or a site's files that people hold."""
    return is_fetched(segment.source) or site_of(segment.source) is not None


def forms() -> str:
    """Say what sources that are fetched look like: `http://…, https://… or youtube:ID`."""
    *some, last = ["http://…", "https://…", *(f"{scheme}:ID" for scheme, site in SITES.items() if site.page)]
    return f"{', '.join(some)} or {last}"


def origin(source: str) -> str:
    """Say where a source is: a site's name, `web addresses` or `files`."""
    site = site_of(source)
    return site[0].name if site else "web addresses" if is_web(source) else "files"


def store_path(store: str, segment_id: str) -> str:
    """Return where a segment's excerpt lives: `STORE/ab/SEGMENT_ID.mkv`, ab from the id's hash."""
    return storage.join(store, _key(segment_id))


def _key(segment_id: str) -> str:
    return f"{hashlib.sha256(segment_id.encode()).hexdigest()[:2]}/{segment_id}.mkv"


def find_media(folder: str, segments: Iterable[Segment]) -> dict[str, str]:
    """Find the remote segments whose media are in a folder or its subfolders → {segment_id: path}.

    Taken are the store's own files, and files that users own under common names. Those are the segment's id, and the
    video's in each of its site's `files` forms. The latter stands alone, or with the excerpt's start, or start and
    end: in milliseconds, seconds, or seconds padded to six digits. `within` says which part of such a file is the
    segment. The folder is listed once.
    """
    wanted: dict[str, list[tuple[int, Segment]]] = {}
    for segment in segments:
        if is_remote(segment):
            for rank, name in enumerate(names_of(segment)):
                wanted.setdefault(name, []).append((rank, segment))
    found: dict[str, tuple[int, int, str]] = {}
    _, inner = storage.filesystem(folder)
    for info in storage.infos(folder, recursive=True):
        stem, suffix = os.path.splitext(info.base_name)
        if stem not in wanted or suffix.lower() not in _SUFFIXES or info.type != pafs.FileType.File:
            continue
        path = storage.join(folder, info.path[len(inner.rstrip("/")) :].lstrip("/"))
        for rank, segment in wanted[stem]:
            if path == store_path(folder, segment.segment_id):
                rank = -1
            here = (rank, _SUFFIXES.index(suffix.lower()), path)
            found[segment.segment_id] = min(found.get(segment.segment_id, here), here)
    return {segment_id: path for segment_id, (_, _, path) in found.items()}


def within(segment: Segment, path: str, *, whole: bool = False) -> Segment:
    """Return the segment with `path` as its source and its times as they are in that file.

    A file that isn't longer than the segment (1 s over is let pass) is the excerpt. So is a longer one that is named by
    the excerpt's start. A longer one named by the video's id alone is the whole video. So is any one with `whole`:
    several excerpts of it are asked for (`several_of`). In files of sites
    without pages, such as AVE's, the times are the segment's. Raises ClipError when the file can't be read.
    """
    if path.endswith(f"/{_key(segment.segment_id)}"):
        return replace(segment, source=path, start_s=0.0, end_s=None)
    stem = os.path.splitext(storage.name(path))[0]
    if not is_fetched(segment.source) or (whole and stem in _video_names(segment.source)):
        return replace(segment, source=path)
    length_s = media.or_inf(segment.end_s) - segment.start_s
    try:
        with storage.local_file(path) as file:
            duration_s = media.probe(file).duration_s
    except FileNotFoundError:
        raise ClipError(Reason.MISSING, f"{path} doesn't exist") from None
    if duration_s is not None and duration_s <= length_s + media.SLACK_S and math.isfinite(length_s):
        return replace(segment, source=path, start_s=0.0, end_s=length_s)
    if stem in _video_names(segment.source) or not math.isfinite(length_s):
        return replace(segment, source=path)
    return replace(segment, source=path, start_s=0.0, end_s=length_s)


def several_of(segments: Iterable[Segment]) -> frozenset[str]:
    """Return the sources of which several excerpts are asked for: a file that is named by one's id is all of it."""
    first: dict[str, tuple[float, float | None]] = {}
    times = ((s.source, (s.start_s, s.end_s)) for s in segments if is_remote(s))
    return frozenset(source for source, excerpt in times if first.setdefault(source, excerpt) != excerpt)


def names_of(segment: Segment) -> list[str]:
    """List the names that a segment's file may have, without suffix, best first."""
    names, videos = [segment.segment_id], _video_names(segment.source)
    if not is_fetched(segment.source):
        return videos
    if videos:
        times = [segment.start_s] if segment.end_s is None else [segment.start_s, segment.end_s]
        forms = [[f"{1000 * t:.0f}" for t in times], [f"{t:.3f}" for t in times]]
        if all(t.is_integer() for t in map(float, times)):
            forms += [[f"{t:06.0f}" for t in times], [f"{t:.0f}" for t in times]]
        endings = ["_" + "_".join(written) for form in forms for written in (form, form[:1])]
        names += [f"{video}{ending}" for ending in [*endings, ""] for video in videos]
    return list(dict.fromkeys(names))


def _video_names(source: str) -> list[str]:
    """List the names of a whole video's file, without suffix."""
    found = site_of(source)
    return [form.format(found[1]) for form in found[0].files] if found else []


def url_of(source: str) -> str:
    """Return a source's web address; ValueError where it has none, ClipError where the site has no such ids."""
    if is_web(source):
        return source
    found = site_of(source)
    if found is None or not is_fetched(source):
        raise ValueError(f"{source} is not to be fetched: that is {forms()}")
    site, video = found
    if not site.id.fullmatch(video):
        raise ClipError(Reason.REMOVED, f"{video!r} is no {site.name} id: {site.id_rule}")
    return site.page.format(video)
