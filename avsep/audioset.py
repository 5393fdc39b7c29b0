"""AudioSet's files: rows and ontology in; segments of a vocabulary's objects, and their statistics, out.

Everything works on blocks of whole lines as Arrow tables: two million rows one by one take minutes.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avsep.objects import Vocabulary
from avsep.records import SCHEMA_VERSION, SEGMENT_SCHEMA, SPLITS
from avsep.sites import YOUTUBE

VAL_PERCENT = 4
MAX_SECONDS = 1e9
_SHOWN, _FEW = 30, 10  # objects in what is said of a manifest; of more than these, the most frequent

_ID = r"[0-9A-Za-z_-]+"
_SECONDS = r"[0-9]{1,9}(?:\.[0-9]+)?"
_TAG = r"/[a-z]/[0-9A-Za-z_]+"
_ROW = (
    rf"^(?P<ytid>{_ID})[ \t]*,[ \t]*(?P<start_s>{_SECONDS})[ \t]*,[ \t]*(?P<end_s>{_SECONDS})[ \t]*,"
    rf'[ \t]*"(?P<tags>{_TAG}(?:,{_TAG})*)"\s*$'
)

ROW_SCHEMA = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),  # in its block, from 1
        pa.field("ytid", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class BadLine:
    """A line that holds no usable row, and why."""

    line: int  # in its block, from 1
    reason: str
    text: str


def parse_rows(block: bytes) -> tuple[pa.Table, list[BadLine], int]:
    """Parse whole lines of an AudioSet CSV → (rows as ROW_SCHEMA, malformed lines, number of lines).

    Comments (`#`) and blank lines are neither rows nor malformed. Lines as AudioSet writes them
    are matched together; what is left goes one by one through `parse_row`, which decides.
    """
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    if block and not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int32))
    lines = pa.Array.from_buffers(pa.binary(), len(ends), [None, offsets, pa.py_buffer(block)])

    matches = pc.extract_regex(lines, _ROW)
    matched = np.flatnonzero(matches.is_valid())
    ytid, start, end, tags = (c.cast(pa.string()) for c in matches.take(pa.array(matched)).flatten())
    start, end = start.cast(pa.float64()), end.cast(pa.float64())
    good = pc.greater(end, start)
    rows = pa.table([pa.array(matched + 1), ytid, start, end, pc.split_pattern(tags, ",")], schema=ROW_SCHEMA)
    others = np.setdiff1d(np.arange(len(lines)), matched[np.asarray(good)])

    rescued, bad = [], []
    for index, line in zip(others.tolist(), lines.take(pa.array(others)).to_pylist(), strict=True):
        text = line.decode(errors="replace").strip()
        if not text or text.startswith("#"):
            continue
        try:
            rescued.append({"line": index + 1, **parse_row(text)})
        except ValueError as error:
            bad.append(BadLine(index + 1, str(error), text))
    tables = [rows.filter(good), pa.Table.from_pylist(rescued, schema=ROW_SCHEMA)]
    return pa.concat_tables(tables).combine_chunks(), bad, len(lines)


def parse_row(text: str) -> dict[str, Any]:
    """Parse one row, `YTID, start, end, "mid,mid"`; ValueError says what is wrong with it.

    >>> parse_row('-4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"')["tags"]
    ['/m/068hy', '/m/07q6cd_']
    """
    try:
        cells = next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"broken quoting: {error}") from None
    if len(cells) != 4:
        raise ValueError(f'{len(cells)} cells; a row is YTID, start, end, "mid,mid"')
    ytid, start, end, tags = (cell.strip() for cell in cells)
    if not re.fullmatch(_ID, ytid, re.ASCII):
        raise ValueError(f"YTID is {ytid!r}; it must be letters, digits, _ and -")
    start_s, end_s = _seconds("start", start), _seconds("end", end)
    if end_s <= start_s:
        raise ValueError(f"end is {end}; it must come after start = {start}")
    mids = [tag.strip() for tag in tags.split(",")]
    for mid in mids:
        if not re.fullmatch(_TAG, mid, re.ASCII):
            raise ValueError(f"tag {mid!r} is no mid such as /m/0bt9lr")
    return {"ytid": ytid, "start_s": start_s, "end_s": end_s, "tags": mids}


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < MAX_SECONDS:
        raise ValueError(f"{name} is {text!r}; it must be a time in seconds from 0 up")
    return value


def descendants(children: Mapping[str, Sequence[str]], mid: str) -> set[str]:
    """Return a node and everything below it in the ontology's graph, where a node may have several parents.

    >>> sorted(descendants({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a"))
    ['a', 'b', 'c', 'd']
    """
    found, ahead = {mid}, [mid]
    while ahead:
        new = set(children.get(ahead.pop(), ())) - found
        found |= new
        ahead.extend(new)
    return found


def object_masks(ontology: Any, *, own_node_only: bool = False, vocabulary: Vocabulary) -> dict[str, int]:
    """Map each mid that means one of the objects to a bit mask over them (bit l: object l).

    `ontology` is AudioSet's `ontology.json`, loaded: nodes with `id` and `child_ids`. An object
    whose node it lacks is known by that node's mid alone, one without
    nodes not at all. Raises ValueError for anything else.
    """
    try:
        children = {node["id"]: list(node["child_ids"]) for node in ontology}
    except (TypeError, KeyError):
        raise ValueError("no list of nodes with `id` and `child_ids`") from None
    nodes = [(o.name, mid) for o in vocabulary for mid in o.audioset]
    if not nodes:
        raise ValueError(f"{vocabulary}: none has an AudioSet node; give some in the column audioset of --objects")
    if not own_node_only and not any(mid in children for _, mid in nodes):
        raise ValueError(f"it has none of the objects' nodes ({nodes[0][1]} {nodes[0][0]}, …)")
    masks: dict[str, int] = {}
    for name, node in nodes:
        for mid in {node} if own_node_only else descendants(children, node):
            masks[mid] = masks.get(mid, 0) | 1 << vocabulary.index(name)
    return masks


def select_segments(rows: pa.Table, masks: Mapping[str, int], split: str | None, vocabulary: Vocabulary) -> pa.Table:
    """Keep rows with a tag in `masks` → SEGMENT_SCHEMA and `line`; a `split` of None is `hash_split`."""
    mids = list(masks)
    bits = np.array([[mask >> i & 1 for i in range(len(vocabulary))] for mask in (*masks.values(), 0)], bool)
    tags = rows["tags"].combine_chunks()
    indices = pc.index_in(tags.flatten(), pa.array(mids, pa.string())).fill_null(len(mids))
    starts = np.asarray(tags.offsets)[:-1]
    present = np.logical_or.reduceat(bits[np.asarray(indices)], starts) if len(rows) else bits[:0]
    any_there = present.any(1)
    rows, present = rows.filter(pa.array(any_there)), present[any_there]

    start_ms = np.round(np.asarray(rows["start_s"]) * 1000).astype(np.int64)
    ytid = rows["ytid"].combine_chunks()
    segment_id = pc.binary_join_element_wise(ytid, pa.array(start_ms).cast(pa.string()), "_")
    ends = np.concatenate([[0], present.sum(1).cumsum()])
    names = pa.array(vocabulary.names).take(pa.array(present.nonzero()[1]))
    columns = {
        "segment_id": segment_id,
        "source": pc.binary_join_element_wise(YOUTUBE.scheme, ytid, ":"),
        "start_s": rows["start_s"],
        "end_s": rows["end_s"],
        "split": pa.array([split or hash_split(s) for s in segment_id.to_pylist()], pa.string()),
        "objects": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), names),
        "labels": pa.nulls(len(rows), pa.list_(pa.string())),
        "line": rows["line"],
    }
    return pa.table(columns, schema=SEGMENT_SCHEMA.append(ROW_SCHEMA.field("line")))


def hash_percent(segment_id: str) -> float:
    """Spread ids evenly over [0, 100), the same way everywhere and for ever."""
    digest = hashlib.sha256(segment_id.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 * 100


def hash_split(segment_id: str) -> str:
    """Put VAL_PERCENT % of the ids into `val`, the others into `train`."""
    return "val" if hash_percent(segment_id) < VAL_PERCENT else "train"


def deduplicate(rows: pa.Table) -> tuple[pa.Table, pa.Table, NDArray[np.bool_]]:
    """Sort by segment_id and keep each id once: the one in split `test`, else the first of the input.

    Needs columns `file`, `block` and `line`. Returns (unique rows, the repeats, whether each
    repeat was in another split and lost to `test`); nothing is in both.
    """
    not_test = pc.not_equal(rows["split"], "test")
    order = ["segment_id", "not_test", "file", "block", "line"]
    rows = rows.append_column("not_test", not_test).sort_by([(column, "ascending") for column in order])
    ids, not_test = rows["segment_id"].combine_chunks(), np.asarray(rows["not_test"])
    rows = rows.drop_columns(["not_test"])
    first = np.ones(len(rows), bool)
    first[1:] = np.asarray(pc.not_equal(ids[1:], ids[:-1]))
    winner = np.flatnonzero(first)[first.cumsum() - 1] if len(rows) else first
    lost_to_test = (not_test & ~not_test[winner])[~first] if len(rows) else first
    return rows.filter(pa.array(first)), rows.filter(pa.array(~first)), lost_to_test


def merge_objects(segments: pa.Table, repeats: pa.Table, vocabulary: Vocabulary) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Give each segment the objects and labels that its repeats have, too (both columns are alike in either table).

    Returns the segments, and which repeats had an object that their segment lacked.
    """
    place = {s: i for i, s in enumerate(segments["segment_id"].to_pylist())} if len(repeats) else {}
    objects = segments["objects"].to_pylist() if len(repeats) else []
    new = np.zeros(len(repeats), bool)
    for i, row in enumerate(repeats.select(["segment_id", "objects"]).to_pylist()):
        at = place[row["segment_id"]]
        together = {*objects[at], *row["objects"]}
        new[i] = len(together) > len(objects[at])
        objects[at] = sorted(together, key=vocabulary.index)
    if new.any():
        for column in ("objects", "labels"):
            at, kind = segments.schema.get_field_index(column), segments.schema.field(column)
            segments = segments.set_column(at, kind, pa.array(objects, kind.type))
    return segments, new


# Statistics are counters, so that counts of parts add up in any order. The keys are
# (rows, FILE), (comments, FILE), (dropped, REASON), (dead_letters,), (segments, SPLIT),
# (objects | labels, NAME, SPLIT), (unlabelled, SPLIT), (nothing, SPLIT), (shorter_than_10_s, SPLIT) and
# (together, NAME, NAME).
Counts = Counter[tuple[str, ...]]


def count_segments(segments: pa.Table, vocabulary: Vocabulary) -> Counts:
    """Count segments (SEGMENT_SCHEMA) by split, object and pair of objects."""
    counts: Counts = Counter()
    length_s = np.asarray(pc.subtract(segments["end_s"], segments["start_s"]).fill_null(math.inf))
    in_splits = np.asarray(segments["split"])
    for split in SPLITS:
        here = in_splits == split
        counts["segments", split] = int(here.sum())
        counts["shorter_than_10_s", split] = int((length_s[here] < 10).sum())
        labels = segments["labels"].filter(pa.array(here))
        counts["unlabelled", split] = labels.null_count
        counts["nothing", split] = pc.sum(pc.equal(pc.list_value_length(labels), 0)).as_py() or 0
        for column in ("objects", "labels"):
            found = _present(segments[column].filter(pa.array(here)), vocabulary) % len(vocabulary)
            n_clips = np.bincount(found, minlength=len(vocabulary))
            for name, n in zip(vocabulary.names, n_clips.tolist(), strict=True):
                counts[column, name, split] = n
    several = segments["objects"].filter(pc.greater(pc.list_value_length(segments["objects"]), 1))
    present = np.zeros((len(several), len(vocabulary)), np.float32)  # counts beyond 2**24 would be rounded
    present.reshape(-1)[_present(several, vocabulary)] = 1
    together = np.triu(present.T @ present, 1)
    for a, b in np.argwhere(together).tolist():
        counts["together", vocabulary.names[a], vocabulary.names[b]] = int(together[a, b])
    return counts


def _present(names: pa.ChunkedArray, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Return, of lists of objects, the places of the ones in a flat `(n, L)` table of zeros and ones."""
    indices = np.asarray(pc.index_in(pc.list_flatten(names), pa.array(vocabulary.names)), np.int64)
    return np.unique(np.asarray(pc.list_parent_indices(names), np.int64) * len(vocabulary) + indices)


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Add counters up."""
    total: Counts = Counter()
    for part in parts:
        total.update(part)
    return total


def under(counts: Counts, *head: str) -> dict[str, int]:
    """Return the counts of keys that are `head` and one word more, by that word."""
    return {key[-1]: n for key, n in sorted(counts.items()) if key[:-1] == head}


def by_split(counts: Counts, *head: str) -> dict[str, int]:
    """Return the counts of `head` in each split."""
    return {split: counts[*head, split] for split in SPLITS}


def by_object(counts: Counts, vocabulary: Vocabulary) -> dict[str, Any]:
    """Arrange how often each object is known to sound, is a weak label, and meets each other."""
    return {
        "objects": {name: by_split(counts, "objects", name) for name in vocabulary.names},
        "labels": {name: by_split(counts, "labels", name) for name in vocabulary.names},
        "cooccurrence": {name: pairs for name in vocabulary.names if (pairs := under(counts, "together", name))},
    }


def summarize(counts: Counts, vocabulary: Vocabulary) -> dict[str, Any]:
    """Arrange the counts for `statistics.json`.

    Raises AssertionError unless rows in = kept + dropped + dead letters: a row went missing.
    """
    files, dropped = under(counts, "rows"), under(counts, "dropped")
    n_rows, n_kept, n_dead = sum(files.values()), sum(by_split(counts, "segments").values()), counts["dead_letters",]
    if n_rows != n_kept + sum(dropped.values()) + n_dead:
        raise AssertionError(f"{n_rows} rows, but {n_kept} kept, {dropped} dropped, {n_dead} dead letters")
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": n_rows,
        "kept": n_kept,
        "dropped": dropped,
        "dead_letters": n_dead,
        "files": files,
        "comment_lines": sum(under(counts, "comments").values()),
        **summarize_segments(counts, vocabulary),
    }


def summarize_segments(counts: Counts, vocabulary: Vocabulary) -> dict[str, Any]:
    """Arrange what `count_segments` counts; `without_labels` are left to the pictures, `labelled_none` show nothing."""
    return {
        "splits": by_split(counts, "segments"),
        "shorter_than_10_s": by_split(counts, "shorter_than_10_s"),
        "without_labels": by_split(counts, "unlabelled"),
        "labelled_none": by_split(counts, "nothing"),
        **by_object(counts, vocabulary),
    }


def describe_segments(statistics: Mapping[str, Any]) -> list[str]:
    """Say in lines what `summarize_segments` counted: splits, labels with what is left out, objects."""
    n, untold, nothing = (sum(statistics[k].values()) for k in ("splits", "without_labels", "labelled_none"))
    lines = ["splits: " + ", ".join(f"{split} {statistics['splits'][split]:,}" for split in SPLITS)]
    lines += _wrapped(
        f"labels: {n - untold - nothing:,} rows give them{_totals(statistics['labels'])}; "
        f"{nothing:,} say none; {untold:,} left to the pictures"
    )
    return lines + _wrapped(
        f"objects known to be audible: {_totals(statistics['objects']).strip(' ()') or 'not given'}"
    )


def _totals(by_object: Mapping[str, Mapping[str, int]]) -> str:
    totals = {name: sum(splits.values()) for name, splits in by_object.items()}
    there = [f"{name}\N{NO-BREAK SPACE}{n:,}" for name, n in totals.items() if n]
    if len(there) > _SHOWN:
        most = sorted(totals, key=lambda name: -totals[name])[:_FEW]
        there = [*(f"{name}\N{NO-BREAK SPACE}{totals[name]:,}" for name in most), f"{len(there) - _FEW} others"]
    return f" ({', '.join(there)})" if there else ""


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, 110, subsequent_indent="        ")
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
