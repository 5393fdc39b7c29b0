"""The sites that sources `SCHEME:ID` name, such as `youtube:ID`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where sources `SCHEME:ID` are."""

    scheme: str  # of small letters and digits
    name: str  # as people know it
    id: re.Pattern[str]  # of a whole id, without `.`, `:` and slashes
    id_rule: str  # the same in words
    page: str  # the web address, with {} for the id, of what yt-dlp is to download; empty: people hold the files
    files: tuple[str, ...]  # how users name a whole video's file, without suffix, with {} for the id


YOUTUBE = Site(
    "youtube",
    "YouTube",
    re.compile(r"[0-9A-Za-z_-]{11}"),
    "11 letters, digits, _ or -",
    "https://www.youtube.com/watch?v={}",
    ("{}", "Y{}"),  # AudioSet's tools put a Y in front
)

# Excerpts of the set AVE, whose tables don't say where in a video of YouTube they begin.
AVE = Site("ave", "AVE", re.compile(r"[0-9A-Za-z_-]+"), "letters, digits, _ or -", "", ("{}",))

SITES: dict[str, Site] = {site.scheme: site for site in (YOUTUBE, AVE)}


def site_of(source: str) -> tuple[Site, str] | None:
    """Return a source's site and the id there; None where it names no known one.

    >>> site, video = site_of("youtube:dQw4w9WgXcQ")
    >>> site.name, video, site_of("tape:1"), site_of("videos/duet.mp4")
    ('YouTube', 'dQw4w9WgXcQ', None, None)
    """
    scheme, _, rest = source.partition(":")
    return (SITES[scheme], rest) if scheme in SITES else None


def forms() -> str:
    """Say what sources of the known sites look like: `youtube:ID, ave:ID`."""
    return ", ".join(f"{scheme}:ID" for scheme in SITES)
