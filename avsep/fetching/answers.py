"""What yt-dlp's messages mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from avsep.records import Reason


def classify(message: str, *, status: int | None = None, kinds: Iterable[str] = ()) -> tuple[Reason, bool]:
    """Say why yt-dlp failed → (reason, whether it may work later).

    `message` is the exception's, `status` the HTTP status that caused it, `kinds` the names of the
    classes of it and its causes. What it says of the video counts before how the transfer went.
    """
    text = message.replace("\u2019", "'").lower()
    kinds = set(kinds)
    if status is None and (match := re.search(r"http error (\d{3})", text)):
        status = int(match[1])
    if "GeoRestrictedError" in kinds:
        return Reason.REGION, False
    if "ProxyError" in kinds or status == 407:
        return Reason.EGRESS_BLOCKED, True
    for reason, transient, pattern in _MESSAGES:
        if pattern.search(text):
            return reason, transient
    if status is not None:
        return _of_status(status, redirect_loop="redirect" in text)
    if "UnsupportedError" in kinds:
        return Reason.UNREADABLE, False
    if kinds & {"TransportError", "ContentTooShortError", "OSError"}:
        return Reason.TRANSIENT, True
    for reason, transient, pattern in _LAST_MESSAGES:
        if pattern.search(text):
            return reason, transient
    return Reason.TRANSIENT, True


_MESSAGES = [
    (reason, transient, re.compile(pattern))
    for reason, transient, pattern in (
        (
            Reason.EGRESS_BLOCKED,
            True,
            "not a bot|rate-limited|rate limit|try again later|captcha|too many requests|unusual traffic"
            "|your ip (address )?(is|has been)|ip is likely (being )?blocked|tunnel connection failed",
        ),
        (Reason.AGE, False, "confirm your age|age[- ]restrict|inappropriate for some users|age verification"),
        (
            Reason.REGION,
            False,
            r"(in|from|for) your (country|location|region)|geo[- ]?(restrict|block)|available in .* only",
        ),
        (
            Reason.PRIVATE,
            False,
            "video is private|private video|granted access|members[- ]only|members on level|channel's members"
            "|join this channel|music premium|premium members|requires payment|requires purchase|rent(al)? "
            "|registered users|login required|log in to|sign in to (view|watch)|you need to log in",
        ),
        (
            Reason.TRANSIENT,
            True,
            "live event will begin|premieres in|is upcoming|is being processed|still processing|\\bis live\\b"
            "|error code: 152|video has not started",
        ),
        (
            Reason.REMOVED,
            False,
            "removed|terminated|no longer available|closed their|copyright|does not exist|deleted|violat"
            "|drm protected|recording is not available|video (is )?(unavailable|not available)$"
            r"|video (is )?(unavailable|not available)\. (?!this content isn't available)"
            "|incomplete youtube id|invalid video id|looks truncated",
        ),
        (Reason.TOO_LARGE, False, "file too large|max-filesize"),
        (Reason.EMPTY, True, "did not get any data blocks|downloaded file is empty"),
    )
]
_LAST_MESSAGES = [
    (reason, transient, re.compile(pattern))
    for reason, transient, pattern in (
        (
            Reason.TOOL_OUTDATED,
            True,
            "no video formats|requested format is not available|only images are available|signature|nsig"
            "|challenge|javascript runtime|player response|po token|page needs to be reloaded|precondition"
            "|not supported (in|on|by) this (application|device)|latest version|report this issue"
            "|unable to extract|failed to (extract|parse)",
        ),
        (Reason.UNREADABLE, False, "unsupported url|not a valid url|a playlist"),
    )
]


def _of_status(status: int, redirect_loop: bool) -> tuple[Reason, bool]:
    if status in (403, 407, 429):
        return Reason.EGRESS_BLOCKED, True
    if status in (404, 410):
        return Reason.REMOVED, False
    if status in (401, 402):
        return Reason.PRIVATE, False
    if status == 451:
        return Reason.REGION, False
    if status >= 500 or status in (408, 416, 425):
        return Reason.TRANSIENT, True
    if redirect_loop or status < 400:
        return Reason.UNREADABLE, False
    return Reason.TOOL_OUTDATED, True  # a request that the site no longer takes
