"""The tables of MUSIC, AVE and VGGSound as published, and as people pass them on: whole lines or files to rows."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from avsep import audioset

MUSIC_STARTS_S = (10, 30, 50, 70, 90, 110)  # of a video's excerpts: its length isn't in the table
MUSIC_TEST_PERCENT = 10  # of the videos, beside AudioSet's VAL_PERCENT
EXCERPT_S = 10  # in MUSIC, and in VGGSound as published; AVE's files are as long


@dataclass(frozen=True)
class Row:
    """A row of a set's table: excerpts of one video under one label, or a problem."""

    line: int  # in its block, from 1
    text: str
    label: str = ""
    video: str = ""
    times: tuple[tuple[float, float], ...] = ()  # seconds
    split: str = ""
    problem: str = ""


def music_rows(data: bytes) -> Iterator[Row]:
    """Read a file of MUSIC: `{"videos": {"cello": [ID, …], "cello violin": […]}}`; rows are numbered as they come.

    A video is cut into excerpts of EXCERPT_S at MUSIC_STARTS_S. MUSIC has no splits: `val` and `test` are shares of the
    videos by a hash of their ids, so all excerpts of one are together. Raises ValueError where it is no such file.
    """
    try:
        raw = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_loss)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    videos = raw.get("videos") if isinstance(raw, dict) else None
    if not isinstance(videos, dict):
        raise ValueError('has no object "videos" with lists of ids by instrument')
    times = tuple((float(s), float(s + EXCERPT_S)) for s in MUSIC_STARTS_S)
    named = ((label, v) for label, some in videos.items() for v in (some if isinstance(some, list) else [some]))
    for line, (label, video) in enumerate(named, 1):
        text = json.dumps({label: video}, ensure_ascii=False)
        if not isinstance(video, str):
            yield Row(line, text, problem=f"id is {json.dumps(video)}; it must be a text")
        else:
            yield _checked(Row(line, text, label, video.strip(), times, _split_of(video.strip())))


def _without_loss(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; lists under one name twice are put together."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        both = isinstance(made.get(key), list) and isinstance(value, list)
        made[key] = [*made[key], *value] if both else value
    return made


def _split_of(video: str) -> str:
    percent = audioset.hash_percent(video)
    return "val" if percent < audioset.VAL_PERCENT else "test" if percent >= 100 - MUSIC_TEST_PERCENT else "train"


def ave_rows(block: bytes, split: str) -> Iterator[Row]:
    """Read whole lines of AVE's tables, `Category&VideoID&Quality&StartTime&EndTime`; the header is no row.

    The excerpt is the event, and its times are those of the file of ten seconds.
    """
    for line, text in _lines(block):
        cells = [cell.strip() for cell in text.split("&")]
        if [cell.casefold() for cell in cells[:2]] == ["category", "videoid"]:
            continue
        if len(cells) != 5:
            said = f"{len(cells)} cells; a row is Category&VideoID&Quality&StartTime&EndTime"
            yield Row(line, text, problem=said)
            continue
        label, video, _, *times = cells
        start_s, end_s = map(_seconds, times)
        row = Row(line, text, label, video, ((start_s, end_s),), split)
        if not 0 <= start_s <= EXCERPT_S or not 0 <= end_s <= EXCERPT_S:
            problem = f"times are {times[0]!r} and {times[1]!r}; they must be seconds from 0 to {EXCERPT_S}"
            yield replace(row, problem=problem)
        elif end_s <= start_s:
            yield replace(row, problem=f"EndTime is {times[1]}; it must come after StartTime = {times[0]}")
        else:
            yield _checked(row)


def vggsound_rows(block: bytes) -> Iterator[Row]:
    """Read whole lines of VGGSound's table, `YouTubeID,start second,label,train|test`; excerpts have EXCERPT_S.

    Comments (`#`), and a header whose last cell speaks of the split, are no rows.
    """
    for line, text in _lines(block):
        if text.startswith("#"):
            continue
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            yield Row(line, text, problem=f"broken quoting: {error}")
            continue
        if line == 1 and "split" in cells[-1].casefold():
            continue
        if len(cells) != 4:
            yield Row(line, text, problem=f"{len(cells)} cells; a row is YouTubeID,start second,label,train|test")
            continue
        video, start, label, split = cells
        start_s = _seconds(start)
        row = Row(line, text, label, video, ((start_s, start_s + EXCERPT_S),), split.lower())
        if not 0 <= start_s < audioset.MAX_SECONDS:
            yield replace(row, problem=f"start is {start!r}; it must be a time in seconds from 0 up")
        elif row.split not in ("train", "test"):
            yield replace(row, problem=f"split is {split!r}; it must be train or test")
        else:
            yield _checked(row)


def _lines(block: bytes) -> Iterator[tuple[int, str]]:
    """Number whole lines from 1; blank ones are left out."""
    for number, line in enumerate(block.split(b"\n"), 1):
        if text := line.decode("utf-8", "replace").strip():
            yield number, text


def _checked(row: Row) -> Row:
    if not re.fullmatch("[0-9A-Za-z_-]+", row.video):
        return replace(row, problem=f"id is {row.video!r}; it must be letters, digits, _ and -")
    return row


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
