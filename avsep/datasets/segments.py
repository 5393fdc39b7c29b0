"""Rows of public sets to segments, and how a pass over their files goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from avsep import storage, tables
from avsep.audioset import BadLine, Counts
from avsep.datasets.labels import objects_of, vocabulary, vocabulary_of
from avsep.datasets.rows import EXCERPT_S, MUSIC_STARTS_S, Row, ave_rows, music_rows, vggsound_rows
from avsep.manifest import Block, Plan, Tally, check_exist, line_blocks, read_lines, with_tally
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import SEGMENT_SCHEMA, SPLITS
from avsep.sites import AVE, SITES, YOUTUBE

_SCHEMA = SEGMENT_SCHEMA.append(pa.field("line", pa.int64())).append(pa.field("text", pa.string()))


def to_segments(
    block: Block, rows: Iterable[Row], scheme: str, own: Vocabulary, asked: Vocabulary | None, n_lines: int
) -> Iterator[pa.Table | Tally]:
    """Give a block's tally and the segments of its rows, SEGMENT_SCHEMA with `line` and `text`.

    A row with a problem, or with a label that the set doesn't have, is reported as bad; excerpts without an object of
    the asked vocabulary are counted as `no_object`. A row counts as many times as it has excerpts, a bad one once.
    """
    counts: Counts = Counter({("rows", block.uri): 0})
    bad: list[BadLine] = []
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            if not SITES[scheme].id.fullmatch(row.video):
                raise ValueError(f"id is {row.video!r}; it must be {SITES[scheme].id_rule}")
            names = objects_of(row.label, own, asked)
        except ValueError as error:
            counts["rows", block.uri] += 1
            bad.append(BadLine(row.line, str(error), row.text))
            continue
        counts["rows", block.uri] += len(row.times)
        if not names:
            counts["dropped", "no_object"] += len(row.times)
            continue
        for start_s, end_s in row.times:
            ends = (start_s, end_s) if scheme == AVE.scheme else (start_s,)
            segment_id = "_".join((row.video, *(f"{1000 * t:.0f}" for t in ends)))
            source = f"{scheme}:{row.video}"
            values = (segment_id, source, start_s, end_s, row.split, names, names, row.line, row.text)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    yield from with_tally(block, [pa.table(columns, schema=_SCHEMA)], bad, n_lines, counts)


def plan_music(uris: Sequence[str], asked: Vocabulary | None = None) -> Plan:
    """Check MUSIC's JSON files → how to read them. Raises ValueError or OSError."""
    check_exist(uris)
    rows: list[Row] = []
    for uri in uris:
        try:
            rows += music_rows(storage.read_bytes(uri))
        except ValueError as error:
            raise ValueError(f"{uri} {error}; give MUSIC_solo_videos.json or another of MUSIC's files") from None
    few, own = vocabulary("music_11"), vocabulary("music_21")
    ours = [row.label for row in rows if not row.problem and _has(own, row.label)]
    if not ours:
        raise ValueError(f"{', '.join(uris)}: none of the videos has one of MUSIC's instruments; {_first(rows, own)}")
    if all(_has(few, label) for label in ours):
        own = few

    def read(block: Block) -> Iterator[pa.Table | Tally]:
        found = list(music_rows(storage.read_bytes(block.uri)))
        yield from to_segments(block, found, YOUTUBE.scheme, own, asked, len(found))

    *starts, last = map(str, MUSIC_STARTS_S)
    note = (
        f"MUSIC: {len({r.video for r in rows if not r.problem}):,} videos, each with excerpts of {EXCERPT_S} s at "
        f"{', '.join(starts)} and {last} s; what lies beyond a video's end becomes a rejection of extract"
    )
    blocks = [Block(file, 0, uri, 0, 0) for file, uri in enumerate(uris)]
    return Plan(blocks, read, [note], asked or own, "merged")


def plan_ave(uris: Sequence[str], asked: Vocabulary | None = None) -> Plan:
    """Check AVE's Annotations.txt, and its files of splits → how to read them. Raises ValueError or OSError.

    A file is one of splits if its name says so, as trainSet.txt. Files of splits hold the rows of Annotations.txt
    again. So Annotations.txt is asked only for rows in none of them, which are bad.
    """
    check_exist(uris)
    own = vocabulary("ave_28")
    splits = [_split_named(uri) for uri in uris]
    listed: set[Any] = set()
    for uri, split in zip(uris, splits, strict=True):
        rows = list(ave_rows(_text(uri), split or "train"))
        _check_rows(uri, rows, own, "AVE's files, Annotations.txt or trainSet.txt")
        listed |= {_identity(row) for row in rows} if split else set()
    sets = ", ".join(storage.name(uri) for uri, split in zip(uris, splits, strict=True) if split)

    def read(block: Block) -> Iterator[pa.Table | Tally]:
        data, split = _block_text(block), splits[block.file]
        rows: Iterable[Row] = ave_rows(data, split or "train")
        if sets and not split:
            problem = f"in none of {sets}, so its split isn't known"
            left = (row for row in rows if _identity(row) not in listed)
            rows = (row if row.problem else replace(row, problem=problem) for row in left)
        yield from to_segments(block, rows, AVE.scheme, own, asked, _n_lines(data))

    note = "AVE: no trainSet.txt, valSet.txt or testSet.txt is given: every segment is in split train"
    return Plan(line_blocks(uris), read, [] if sets else [note], asked or own, "merged")


def plan_vggsound(uri: str, asked: Vocabulary | None = None) -> Plan:
    """Check VGGSound's CSV, and make its vocabulary → how to read it. Raises ValueError or OSError."""
    check_exist([uri])
    blocks = line_blocks([uri])
    labels = {row.label for block in blocks for row in vggsound_rows(_block_text(block)) if not row.problem}
    try:
        own = vocabulary_of(labels)
    except ValueError:  # of no label
        own = AUDIOSET_23
    _check_rows(uri, vggsound_rows(_block_text(blocks[0])), own, "VGGSound's table, vggsound.csv")

    def read(block: Block) -> Iterator[pa.Table | Tally]:
        data = _block_text(block)
        yield from to_segments(block, vggsound_rows(data), YOUTUBE.scheme, own, asked, _n_lines(data))

    return Plan(blocks, read, [], asked or own, "merged")


PLANS: dict[str, Callable[[list[str], Vocabulary | None], Plan]] = {  # by the option that names a set's files
    "music": plan_music,
    "ave": plan_ave,
    "vggsound": lambda uris, asked: plan_vggsound(uris[0], asked),
}


def _split_named(uri: str) -> str | None:
    name = os.path.splitext(storage.name(uri))[0].casefold()
    return next((split for split in SPLITS if name.startswith(split)), None)


def _identity(row: Row) -> Any:
    """Return what a row of one of AVE's files has in common with the same row of another."""
    return row.text if row.problem else (row.video, row.label.casefold(), row.times)


def _has(own: Vocabulary, label: str) -> bool:
    try:
        return bool(objects_of(label, own))
    except ValueError:
        return False


def _check_rows(uri: str, rows: Iterable[Row], own: Vocabulary, what: str) -> None:
    """Raise ValueError where no row is usable; the first one says why."""
    some = []
    for row in rows:
        if not row.problem and _has(own, row.label):
            return
        some.append(row)
        if len(some) == 1000:
            break
    raise ValueError(f"{uri} is none of {what}: {_first(some, own)}")


def _first(rows: Sequence[Row], own: Vocabulary) -> str:
    if not rows:
        return "it has no row"
    problem = rows[0].problem
    try:
        objects_of(rows[0].label, own)
    except ValueError as error:
        problem = problem or str(error)
    return f"line {rows[0].line}: {problem}"


def _text(uri: str) -> bytes:
    return b"".join(_block_text(block) for block in line_blocks([uri]))


def _block_text(block: Block) -> bytes:
    data = read_lines(block)
    if block.index == 0 and (written := tables.encoding(data[:4])).startswith("utf-16"):
        raise ValueError(f"{block.uri} is written in {written.upper()}; save it as UTF-8")
    return tables.plain_lines(data, first=block.index == 0)


def _n_lines(data: bytes) -> int:
    return data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
