"""From tables and AudioSet's lists to segments: the pure half of the manifest."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avsep import audioset, storage, tables
from avsep.audioset import BadLine, Counts
from avsep.objects import Vocabulary
from avsep.records import (
    SEGMENT_SCHEMA,
    Segment,
    file_id,
    read_layout,
    read_vocabulary,
    segment_from_row,
    segments_to_table,
    with_vocabulary,
)

BLOCK_BYTES = 8 << 20
BATCH_ROWS = 10_000
SHARD_ROWS = 500_000  # about 40 MB in memory
ROW_GROUP_ROWS = 50_000
SAMPLE_PERCENT = 2.0  # of the ids, to find the ranges of several shards
WRITES = ("segments.parquet", "segments-*-of-*.parquet", "statistics.json", "dead_letters.jsonl")
STAGING = "_manifest_in_progress"


@dataclass(frozen=True)
class Block:
    """Part of an input file: the lines that begin in bytes `start … stop`, or row groups `start … stop`."""

    file: int
    index: int
    uri: str
    start: int
    stop: int


@dataclass
class Tally:
    """What a step has to say besides its segments."""

    counts: Counts = field(default_factory=Counter)
    n_lines: dict[tuple[int, int], int] = field(default_factory=dict)  # of (file, block)
    bad: list[tuple[int, int, BadLine]] = field(default_factory=list)  # file, block, line in it


Reader = Callable[[Block], Iterator[pa.Table | Tally]]


@dataclass(frozen=True)
class Plan:
    """How a pass reads its input."""

    blocks: list[Block]
    read: Reader
    notes: list[str]  # what there is to say of it
    vocabulary: Vocabulary
    repeats: str = "dropped"  # what becomes of rows with one segment_id: they are bad, dropped or merged


def read_lines(block: Block) -> bytes:
    """Read the lines that begin in the block; each line of a file is in exactly one of its blocks."""
    before = min(block.start, 1)  # a line begins at `start` if the byte before it ends one
    with storage.open_input(block.uri) as f:
        f.seek(block.start - before)
        data = f.read(block.stop - block.start + before)
        if before:
            data = data[data.find(b"\n") + 1 :] if b"\n" in data else b""
        pieces = [data]
        while pieces[-1] and not pieces[-1].endswith(b"\n"):
            piece = f.read(1 << 16)
            pieces.append(piece[: piece.find(b"\n") + 1] if b"\n" in piece else piece)
    return b"".join(pieces)


def read_audioset(block: Block, masks: dict[str, int], vocabulary: Vocabulary) -> Iterator[pa.Table | Tally]:
    """Read the segments of a block of AudioSet's CSV, and tally them."""
    lines = tables.plain_lines(read_lines(block), first=block.index == 0)
    rows, bad, n_lines = audioset.parse_rows(lines)
    segments = audioset.select_segments(rows, masks, "test" if is_eval(block.uri) else None, vocabulary)
    n_dropped = len(rows) - len(segments)
    counts: Counts = Counter({("rows", block.uri): len(rows) + len(bad), ("dropped", "no_object"): n_dropped})
    yield from with_tally(block, [segments], bad, n_lines, counts)


def is_eval(uri: str) -> bool:
    """Tell AudioSet's evaluation file by its name."""
    return "eval" in storage.name(uri).lower()


def read_table(
    block: Block, layout: tables.Layout, groups: Sequence[int] | None, vocabulary: Vocabulary
) -> Iterator[pa.Table | Tally]:
    """Read the segments of a user's table, or of some row groups of a Parquet one, and tally them."""
    parts: list[pa.Table] = []
    batch: list[tuple[Segment, int, str]] = []
    bad: list[BadLine] = []
    folder = storage.parent(layout.uri)
    counts: Counts = Counter()
    line = 0

    def flush() -> None:
        segments, numbers, texts = zip(*batch, strict=True)
        table = segments_to_table(segments).append_column("line", pa.array(numbers, pa.int64()))
        parts.append(table.append_column("text", pa.array(texts, pa.string())))
        batch.clear()

    for row in tables.read_rows(layout, groups):
        line = row.line
        counts["comments" if row.comment else "rows", layout.uri] += 1
        if row.comment:
            continue
        try:
            if row.problem:
                raise ValueError(row.problem)
            segment = segment_from_row(row.cells, relative_to=folder, vocabulary=vocabulary)
            batch.append((segment, row.line, row.text))
        except ValueError as error:
            bad.append(BadLine(row.line, str(error), row.text))
        if len(batch) == BATCH_ROWS:
            flush()
    if batch:
        flush()
    counts["rows", layout.uri] += 0
    yield from with_tally(block, parts, bad, line, counts)


def with_tally(
    block: Block, tables: list[pa.Table], bad: list[BadLine], n_lines: int, counts: Counts
) -> Iterator[pa.Table | Tally]:
    """Give a block's tally, then its segments with the file and block they come from."""
    counts["dead_letters",] = len(bad)
    where = (block.file, block.index)
    yield Tally(counts, {where: n_lines}, [(*where, line) for line in bad])
    for table in tables:
        if len(table):
            for column, value in zip(("file", "block"), where, strict=True):
                table = table.append_column(column, pa.array(np.full(len(table), value, np.int32)))
            yield table


def read_objects(uri: str) -> Vocabulary:
    """Read a vocabulary of a user's own, JSON or CSV (`objects.Vocabulary.parse`).

    Raises ValueError naming the file, the object and the rule; OSError.
    """
    try:
        return Vocabulary.parse(storage.read_bytes(uri).decode())
    except ValueError as error:  # of its bytes, too
        raise ValueError(f"--objects {uri}: {error}") from None


def sample_ids(segments: pa.Table) -> tuple[int, list[str]]:
    """Return the number of segments, and a sample of ids that depends on nothing but the ids."""
    ids = segments["segment_id"].to_pylist()
    return len(ids), [s for s in ids if audioset.hash_percent(s) < SAMPLE_PERCENT]


def add_samples(samples: Iterable[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """Put samples together."""
    total, ids = 0, list[str]()
    for n, some in samples:
        total += n
        ids.extend(some)
    return total, ids


def shard_bounds(sample: tuple[int, list[str]], shard_rows: int) -> list[str]:
    """Return ids that cut all segments into ranges of about `shard_rows`: each begins one, but the first."""
    total, ids = sample[0], sorted(set(sample[1]))
    n_shards = max(min(math.ceil(total / shard_rows), len(ids)), 1)
    return [ids[len(ids) * shard // n_shards] for shard in range(1, n_shards)]


def into_ranges(segments: pa.Table, bounds: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Divide segments among the ranges of `shard_bounds`."""
    shard = np.zeros(len(segments), np.int64)
    for bound in bounds:
        shard += np.asarray(pc.greater_equal(segments["segment_id"], bound))
    for index in np.unique(shard).tolist():
        yield index, segments.filter(pa.array(shard == index))


def write_shard(
    keyed: tuple[int, Iterable[pa.Table]],
    bounds: list[str],
    folder: str,
    *,
    repeats: str,
    vocabulary: Vocabulary,
) -> Tally:
    """Write a range of segments, sorted and each once; tally them and what became of the `repeats`, see `Plan`."""
    index, tables = keyed
    segments, others, lost_to_test = audioset.deduplicate(pa.concat_tables(tables).combine_chunks())
    new = np.zeros(len(others), bool)
    if repeats == "merged":
        segments, new = audioset.merge_objects(segments, others, vocabulary)
    n_shards = len(bounds) + 1
    name = "segments.parquet" if n_shards == 1 else f"segments-{index:05d}-of-{n_shards:05d}.parquet"
    segments = segments.select(SEGMENT_SCHEMA.names)
    write_segments(storage.join(folder, name), segments, vocabulary)
    tally = Tally(audioset.count_segments(segments, vocabulary))
    if repeats == "bad":
        tally.counts["dead_letters",] = len(others)
        for row in others.select(["segment_id", "file", "block", "line", "text"]).to_pylist():
            reason = f"segment_id {row['segment_id']!r} occurs more than once; one row is kept"
            tally.bad.append((row["file"], row["block"], BadLine(row["line"], reason, row["text"])))
    else:
        tally.counts["dropped", "merged"] = int(new.sum())
        tally.counts["dropped", "also_in_eval"] = int((lost_to_test & ~new).sum())
        tally.counts["dropped", "duplicate"] = int((~lost_to_test & ~new).sum())
    return tally


def write_segments(uri: str, segments: pa.Table, vocabulary: Vocabulary) -> None:
    """Write a table of SEGMENT_SCHEMA with its vocabulary as one Parquet file, atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(with_vocabulary(segments, vocabulary), sink, row_group_size=ROW_GROUP_ROWS)
    storage.write_bytes(uri, sink.getvalue())


def write_dead_letters(tallies: Iterable[Tally], uris: list[str], path: str) -> None:
    """Write the bad lines as JSON lines, in the order of the input, numbered from 1 in each file."""
    n_lines: dict[tuple[int, int], int] = {}
    bad: list[tuple[int, int, BadLine]] = []
    for tally in tallies:
        n_lines.update(tally.n_lines)
        bad.extend(tally.bad)
    lines_before, total, last = {}, 0, -1
    for where in sorted(n_lines):
        total = 0 if where[0] != last else total
        lines_before[where], last = total, where[0]
        total += n_lines[where]
    letters = []
    for file, block, line in sorted(bad, key=lambda b: (b[0], b[1], b[2].line)):
        number = lines_before[file, block] + line.line
        letter = {"file": uris[file], "line": number, "reason": line.reason, "text": storage.redact(line.text)}
        letters.append(json.dumps(letter, ensure_ascii=False) + "\n")
    storage.write_text(path, "".join(letters))


def write_statistics(counts: Counts, path: str, vocabulary: Vocabulary) -> None:
    """Write the counts as JSON."""
    storage.write_text(path, json.dumps(audioset.summarize(counts, vocabulary), indent=1) + "\n")


def commit(staging: str, out: str, vocabulary: Vocabulary) -> list[str]:
    """Move finished files to their place, the statistics last; drop what an earlier run left there."""
    files = {storage.name(f) for f in storage.list_files(staging)}
    segments = sorted(f for f in files if f.endswith(".parquet"))
    if not segments:
        write_segments(storage.join(staging, "segments.parquet"), SEGMENT_SCHEMA.empty_table(), vocabulary)
        segments = ["segments.parquet"]
    storage.delete_file(storage.join(out, "statistics.json"))
    for name in segments:
        storage.move(storage.join(staging, name), storage.join(out, name))
    for uri in storage.list_files(out):
        if is_shard(storage.name(uri)) and storage.name(uri) not in segments:
            storage.delete_file(uri)
    for name in ("dead_letters.jsonl", "statistics.json"):
        storage.move(storage.join(staging, name), storage.join(out, name))
    return segments


def is_shard(name: str) -> bool:
    """Tell the files of segments that this program writes."""
    return re.fullmatch(r"segments(-\d{5}-of-\d{5})?\.parquet", name) is not None


def line_blocks(uris: Sequence[str], block_bytes: int = BLOCK_BYTES) -> list[Block]:
    """Cut text files into blocks; an empty file is one block."""
    blocks = []
    for file, uri in enumerate(uris):
        with storage.open_input(uri) as f:
            size = f.size()
        starts = range(0, max(size, 1), block_bytes)
        blocks += [Block(file, i, uri, at, min(at + block_bytes, size)) for i, at in enumerate(starts)]
    return blocks


def plan_audioset(uris: Sequence[str], ontology: str | None, own_node_only: bool, vocabulary: Vocabulary) -> Plan:
    """Check AudioSet's files → how to read them. Raises ValueError or OSError."""
    nodes: Any = []
    check_exist([*uris, *([ontology] if ontology else [])])
    if ontology:
        try:
            nodes = json.loads(storage.read_bytes(ontology))
        except ValueError as error:
            raise ValueError(f"{ontology} is no JSON ({error}); give AudioSet's ontology.json") from None
    try:
        masks = audioset.object_masks(nodes, own_node_only=own_node_only, vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"{ontology} is not AudioSet's ontology: {error}; give its ontology.json") from None
    ids = {node["id"] for node in nodes}
    missing = [o.name for o in vocabulary if not ids & set(o.audioset)]
    notes = []
    if missing and not own_node_only:
        notes.append(f"the ontology lacks {', '.join(missing)}: these are known by their own tag alone")
    blocks = line_blocks(uris)
    for block in blocks:
        if block.index == 0:
            head = read_lines(replace(block, stop=min(block.stop, 1 << 16)))
            if (written := tables.encoding(head)).startswith("utf-16"):
                raise ValueError(f"{block.uri} is written in {written.upper()}; save it as UTF-8")
            head = tables.plain_lines(head, first=True)
            rows, bad, _ = audioset.parse_rows(head)
            if bad and not len(rows):
                raise ValueError(
                    f"{block.uri} is none of AudioSet's CSV files: line {bad[0].line}: {bad[0].reason}; "
                    "a table of one's own goes with --table"
                )
    return Plan(blocks, lambda block: read_audioset(block, masks, vocabulary), notes, vocabulary)


def plan_table(uri: str, vocabulary: Vocabulary | None = None) -> Plan:
    """Check a user's table → how to read them. Raises ValueError or OSError."""
    if storage.is_directory(uri):
        raise ValueError(f"{uri} is a directory; give a table, .csv or .parquet")
    check_exist([uri])
    own = vocabulary or read_vocabulary(uri)
    layout = read_layout(uri)
    notes = list(layout.notes)
    if "split" not in layout.columns:
        notes.append("the table has no column 'split': every segment is in split train")
    if "segment_id" not in layout.columns:
        _check_names(layout)
    if layout.separator:  # a quoted cell may hold line breaks, so it is read from one end to the other
        return Plan([Block(0, 0, uri, 0, 0)], lambda block: read_table(block, layout, None, own), notes, own, "bad")
    with storage.open_input(uri) as f:
        n_groups = pq.ParquetFile(f).num_row_groups
    groups = [Block(0, i, uri, i, i + 1) for i in range(n_groups)] or [Block(0, 0, uri, 0, 0)]
    return Plan(groups, lambda b: read_table(b, layout, range(b.start, b.stop), own), notes, own, "bad")


def _check_names(layout: tables.Layout) -> None:
    """Raise ValueError where two rows have the same file's name, which would be the ids of both."""
    rows: dict[str, int] = {}
    for row in tables.read_rows(layout):
        if source := row.cells.get("source"):
            name = file_id(str(source))
            if rows.setdefault(name, row.line) != row.line:
                raise ValueError(
                    f"{layout.uri}: rows {rows[name]} and {row.line} have files named {name!r}, so the names can't be "
                    "the segments' ids; add a column segment_id"
                )


def check_exist(uris: Iterable[str]) -> None:
    """Raise ValueError where an input isn't there."""
    for uri in uris:
        if not storage.exists(uri):
            raise ValueError(f"{uri} doesn't exist; check the path")


def report_lines(statistics: dict[str, Any], out: str, segments: list[str]) -> list[str]:
    """Say in a few lines what a run made."""
    dropped = {"no_object": "without our objects", "duplicate": "duplicates", "also_in_eval": "also in eval"}
    parts = [f"{statistics['kept']:,} segments"]
    parts += [f"{n:,} {dropped.get(reason, reason)}" for reason, n in statistics["dropped"].items() if n]
    parts += [f"{statistics['dead_letters']:,} unusable"] if statistics["dead_letters"] else []
    lines = [f"{statistics['rows']:,} rows = {' + '.join(parts)}", *audioset.describe_segments(statistics)]
    files = segments[0] if len(segments) == 1 else f"{segments[0]} … {segments[-1]}"
    return [*lines, f"written: {storage.join(out, files)}, statistics.json"]


def read_statistics(folder: str) -> dict[str, Any]:
    """Read what `write_statistics` wrote."""
    statistics: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, "statistics.json")))
    return statistics


def sources_of(folder: str, files: Sequence[str]) -> Iterator[str]:
    """Give the sources of a manifest's segments."""
    for name in files:
        with storage.open_input(storage.join(folder, name)) as f:
            yield from pq.read_table(f, columns=["source"]).column("source").to_pylist()


def first_reason(letters: str) -> str:
    """Say what is wrong with the first of the dead letters; empty when there is none."""
    line = storage.read_bytes(letters).partition(b"\n")[0]
    if not line:
        return ""
    letter = json.loads(line)
    return f"the first, line {letter['line']}: {letter['reason']}"


def one_line(error: BaseException) -> str:
    """Return an error's message without Beam's additions."""
    return re.sub(r" \[while running .*\]$", "", " ".join(str(error).split()))
