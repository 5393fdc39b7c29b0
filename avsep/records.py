"""The records that stages hand to each other, and their Arrow schemas."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from avsep import sites, storage, tables
from avsep.objects import AUDIOSET_23, N_IMAGENET_CLASSES, Vocabulary

SCHEMA_VERSION = 3
_VOCABULARY = b"avsep.vocabulary"  # in the metadata of tables of segments
SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "development"), "val"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}


class Reason(StrEnum):
    """Why a segment could not become a clip."""

    MISSING = "missing"  # no such file
    EMPTY = "empty"  # a file of no bytes, or no decodable samples
    UNREADABLE = "unreadable"  # ffmpeg finds no media in it
    NO_AUDIO = "no_audio"
    NO_VIDEO = "no_video"  # and no labels given either
    TRUNCATED = "truncated"  # less in it than its header says
    PAST_END = "past_end"  # the excerpt starts after the media ends
    TOO_SHORT = "too_short"  # less than half an STFT window
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"  # pictures or streams beyond the decoder's limits
    SILENT = "silent"
    TIMEOUT = "timed_out"
    CRASHED_DECODER = "crashed_decoder"  # or took its worker along
    REFUSED = "refused"  # its sounds can't be written as asked
    CHANGED = "changed"  # its media aren't those that the clip was extracted from
    # fetching
    REMOVED = "removed"
    PRIVATE = "private"
    REGION = "region"
    AGE = "age"
    EGRESS_BLOCKED = "egress_blocked"
    TOOL_OUTDATED = "tool_outdated"
    TRANSIENT = "transient"


class ClipError(Exception):
    """A clip can't be used, for a reason that is data: stages turn it into a `Rejection`."""

    def __init__(self, reason: Reason, detail: str, *, transient: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.transient = reason, detail, transient

    def __reduce__(self) -> tuple[Any, ...]:
        return (_clip_error, (self.reason, self.detail, self.transient))


def _clip_error(reason: Reason, detail: str, transient: bool) -> ClipError:
    return ClipError(reason, detail, transient=transient)


@dataclass(frozen=True)
class Segment:
    """An excerpt of one source, `start_s … end_s`; `end_s` None means to the source's end.

    `objects` are known to be audible, None where that isn't known; `labels` are given weak labels,
    None when the pictures are to decide. An empty tuple means nothing of the vocabulary.
    `source` is a path, a URI or `youtube:ID`.

    >>> Segment("duet", "videos/duet.mp4", 0.0, 10.0, labels=("violin", "cello")).split
    'train'
    """

    segment_id: str
    source: str
    start_s: float = 0.0
    end_s: float | None = None
    split: str = "train"
    objects: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None


@dataclass
class Clip:
    """Decoded media of one segment."""

    waveform: NDArray[np.float32]  # (S,), mono
    sample_rate: int  # Hz
    images: NDArray[np.uint8]  # (n_images, height, width, 3), RGB, one a second
    notes: tuple[str, ...] = ()  # what a user should know of it


@dataclass
class ClipRecord:
    """One clip as training and separation read it: a row of a clip shard."""

    segment_id: str
    source: str
    start_s: float
    end_s: float | None
    split: str
    objects: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    bases: NDArray[np.float16]  # (F, M), each column's maximum one
    activations: NDArray[np.float16]  # (M, N), times activation_scale
    activation_scale: float
    basis_energy: NDArray[np.float32]  # (M,), each basis's share of the clip's energy
    image_logits: NDArray[np.float16] | None  # (n_images, 1000); of several looks log-probabilities; None: no labeller
    kl_divergence: float
    duration_s: float
    rms_db: float  # full scale = 0
    media_sha256: str
    label_source: str  # given, pictures or none

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return W, `(F, M)`, and H, `(M, N)`, in float32."""
        return self.bases.astype(np.float32), self.activations.astype(np.float32) * np.float32(self.activation_scale)


@dataclass(frozen=True)
class Rejection:
    """A segment that could not become a clip, and why.

    >>> Rejection("duet", "decode", Reason.NO_AUDIO).reason
    <Reason.NO_AUDIO: 'no_audio'>
    """

    segment_id: str
    stage: str
    reason: str
    transient: bool = False
    attempts: int = 1
    detail: str = field(default="", compare=False)


SEGMENT_SCHEMA = pa.schema(
    [
        pa.field("segment_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("objects", pa.list_(pa.string())),
        pa.field("labels", pa.list_(pa.string())),
    ]
)
REJECTION_SCHEMA = pa.schema(
    [
        pa.field("segment_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("transient", pa.bool_(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def clip_schema(n_bins: int, n_bases: int) -> pa.Schema:
    """Return the schema of clip shards: the segment's fields, then what was extracted."""
    return pa.schema(
        [
            *SEGMENT_SCHEMA,
            pa.field("bases", pa.fixed_shape_tensor(pa.float16(), (n_bins, n_bases)), nullable=False),
            pa.field("activations", pa.list_(pa.float16()), nullable=False),
            pa.field("activation_scale", pa.float32(), nullable=False),
            pa.field("basis_energy", pa.list_(pa.float32(), n_bases), nullable=False),
            pa.field("image_logits", pa.list_(pa.float16())),
            pa.field("kl_divergence", pa.float64(), nullable=False),
            pa.field("duration_s", pa.float64(), nullable=False),
            pa.field("rms_db", pa.float32(), nullable=False),
            pa.field("media_sha256", pa.string(), nullable=False),
            pa.field("label_source", pa.string(), nullable=False),
        ]
    )


def clips_to_table(clips: Sequence[ClipRecord], n_bins: int, n_bases: int) -> pa.Table:
    """Turn records into an Arrow table of `clip_schema(n_bins, n_bases)`."""
    schema = clip_schema(n_bins, n_bases)
    columns: dict[str, Any] = {}
    for column in schema.names:
        values = [getattr(c, column) for c in clips]
        kind = schema.field(column).type
        if column == "bases":
            flat = np.ascontiguousarray(values, np.float16).reshape(len(clips), n_bins * n_bases)
            storage_array = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), n_bins * n_bases)
            columns[column] = pa.ExtensionArray.from_storage(kind, storage_array)
        elif column in ("activations", "image_logits", "basis_energy"):
            columns[column] = pa.array([None if v is None else v.reshape(-1) for v in values], kind)
        else:
            columns[column] = pa.array(values, kind)
    return pa.table(columns, schema=schema)


def clips_from_table(table: pa.Table) -> list[ClipRecord]:
    """Turn rows of a clip shard back into records."""
    n_bins, n_bases = table.schema.field("bases").type.shape
    bases = table.column("bases").combine_chunks()
    flat = bases.storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, n_bins, n_bases)
    rows = table.drop_columns(["bases", "activations", "image_logits"]).to_pylist()
    records = []
    for i, row in enumerate(rows):
        logits = table.column("image_logits")[i].values
        row["basis_energy"] = np.asarray(row["basis_energy"], np.float32)
        row["objects"], row["labels"] = _stored(row["objects"]), _stored(row["labels"])
        records.append(
            ClipRecord(
                **row,
                bases=flat[i],
                activations=table.column("activations")[i].values.to_numpy().reshape(n_bases, -1),
                image_logits=None if logits is None else logits.to_numpy().reshape(-1, N_IMAGENET_CLASSES),
            )
        )
    return records


def validate(record: Segment | ClipRecord | Rejection, vocabulary: Vocabulary = AUDIOSET_23) -> None:
    """Raise ValueError naming the field, the value and the rule when a record breaks its contract.

    >>> validate(Segment("duet", "duet.mp4", split="training"))
    Traceback (most recent call last):
        ...
    ValueError: Segment 'duet': split 'training' is none of train, val, test
    """
    name = f"{type(record).__name__} {record.segment_id!r}"

    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{name}: {rule}")

    require(bool(record.segment_id), "segment_id must not be empty")
    require(
        not set(record.segment_id) & set("/\\\n\r\0") and record.segment_id not in (".", ".."),
        "segment_id names files: it must not hold a slash, a backslash or a line break",
    )
    if isinstance(record, Rejection):
        require(record.reason in set(Reason), f"reason {record.reason!r} is none of {', '.join(Reason)}")
        require(record.attempts >= 1, f"attempts is {record.attempts}; it counts from 1")
        return
    require(bool(record.source), "source must not be empty")
    require(record.split in SPLITS, f"split {record.split!r} is none of {', '.join(SPLITS)}")
    require(
        math.isfinite(record.start_s) and record.start_s >= 0,
        f"start_s is {record.start_s}; it must be a time in seconds from 0 up",
    )
    require(
        record.end_s is None or (math.isfinite(record.end_s) and record.end_s > record.start_s),
        f"end_s is {record.end_s}; it must come after start_s = {record.start_s}",
    )
    for column in ("objects", "labels"):
        unknown = set(getattr(record, column) or ()) - set(vocabulary.names)
        require(
            not unknown, f"{column} holds {sorted(unknown, key=str)}; the objects are {', '.join(vocabulary.names)}"
        )
    if isinstance(record, ClipRecord):
        peaks = record.bases.max(0)
        require(
            bool(np.isfinite(record.bases).all() and (record.bases >= 0).all()),
            "bases must be finite and ≥ 0",
        )
        require(bool(np.isin(peaks, (0, 1)).all()), "each basis must have maximum one, or be all zero")
        require(record.activations.shape[0] == record.bases.shape[1], "one row of activations a basis")
        require(bool(np.isfinite(record.activations).all()), "activations must be finite")
        require(bool(abs(record.basis_energy.sum() - 1) < 1e-3), "basis_energy must sum to one")


def segment_of(row: Mapping[str, Any]) -> Segment:
    """Return the segment of a row of SEGMENT_SCHEMA, as it stands there."""
    names = {column: _stored(row[column]) for column in ("objects", "labels")}
    return Segment(**{column: row[column] for column in SEGMENT_SCHEMA.names} | names)


def definition(asked: Segment | ClipRecord) -> str:
    """Return a short hash of what a segment asks for: its fields but the id; a clip's is that of its segment.

    >>> definition(Segment("a", "/a.mp4")) == definition(Segment("b", "/a.mp4", labels=()))
    False
    """
    end_s = None if asked.end_s is None else float(asked.end_s)
    fields = [asked.source, float(asked.start_s), end_s, asked.split, asked.objects, asked.labels]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]


def with_vocabulary(table: pa.Table, vocabulary: Vocabulary) -> pa.Table:
    """Return a table of segments that says which vocabulary they are written with."""
    said = {_VOCABULARY: json.dumps(vocabulary.as_list()).encode()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **said})


def read_vocabulary(uri: storage.AnyPath, default: Vocabulary = AUDIOSET_23) -> Vocabulary:
    """Return the vocabulary that segments are written with; a table that says none has the default.

    Raises ValueError where files of one folder have several, FileNotFoundError for no table.
    """
    found = {_vocabulary_in(file, default) for file in _segment_files(uri)}
    if len(found) > 1:
        raise ValueError(f"{uri} mixes segments of {' and '.join(sorted(map(str, found)))}; write its manifest anew")
    return found.pop()


def check_vocabularies(first: str, vocabulary: Vocabulary, second: str, other: Vocabulary) -> None:
    """Raise ValueError, naming both, where two things that go together have different vocabularies."""
    if vocabulary != other:
        differing = sorted(set(vocabulary.names) ^ set(other.names))
        what = f"; only one has {', '.join(differing[:5])}" if differing else "; their order or classes differ"
        raise ValueError(f"{first} has {vocabulary}, {second} {other}{what}: use what was made with one vocabulary")


def _vocabulary_in(file: str, default: Vocabulary) -> Vocabulary:
    if tables.table_kind(file) != "parquet":
        return default
    try:
        with storage.open_input(file) as f:
            said = (pq.read_schema(f).metadata or {}).get(_VOCABULARY)
    except pa.ArrowInvalid:
        return default  # whoever reads its rows says that it's no table
    return default if said is None else Vocabulary.from_list(json.loads(said))


def _segment_files(uri: storage.AnyPath) -> list[str]:
    """Return the table, or the files of a manifest's folder."""
    uri = os.fspath(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri} doesn't exist; a table (.csv, .parquet) or a manifest's folder is needed")
    if not storage.is_directory(uri):
        return [uri]
    files = [f for f in storage.list_files(uri) if f.endswith(".parquet") and storage.name(f).startswith("segments")]
    if not files:
        raise FileNotFoundError(f"{uri} holds no segments*.parquet; run pipelines.manifest first")
    return files


def segments_to_table(segments: Iterable[Segment]) -> pa.Table:
    """Turn segments into an Arrow table of SEGMENT_SCHEMA."""
    return pa.Table.from_pylist([asdict(s) for s in segments], schema=SEGMENT_SCHEMA)


def rejections_to_table(rejections: Iterable[Rejection]) -> pa.Table:
    """Turn rejections into an Arrow table of REJECTION_SCHEMA."""
    return pa.Table.from_pylist([asdict(r) for r in rejections], schema=REJECTION_SCHEMA)


def read_segments(
    uri: storage.AnyPath, tell: Callable[[str], None] | None = None, vocabulary: Vocabulary = AUDIOSET_23
) -> list[Segment]:
    """Read segments from a CSV or Parquet table, or from a folder that `pipelines.manifest` wrote.

    Relative sources become absolute, relative to the table. `tell` gets what there is to say of how a
    table was read, such as columns that were left aside. Objects are those of the vocabulary that the
    files say, else of `vocabulary`. Raises ValueError for a broken row
    (with its number), a duplicated id, a missing column or a file that is no table,
    FileNotFoundError for no table.
    """
    vocabulary = read_vocabulary(uri, vocabulary)
    segments: list[Segment] = []
    seen: dict[str, tuple[str, int]] = {}
    for file in _segment_files(uri):
        layout = read_layout(file)
        notes, n_comments = list(layout.notes), 0
        for row in tables.read_rows(layout, texts=False):
            n_comments += row.comment
            if row.comment:
                continue
            try:
                if row.problem:
                    raise ValueError(row.problem)
                segments.append(segment_from_row(row.cells, relative_to=storage.parent(file), vocabulary=vocabulary))
            except ValueError as error:
                raise ValueError(f"{file}, row {row.line}: {error}") from None
            segment_id, where = segments[-1].segment_id, (file, row.line)
            if seen.setdefault(segment_id, where) != where:
                raise ValueError(_twice(segment_id, where, seen[segment_id], named="segment_id" in layout.columns))
        notes += [comment_note(file, n_comments)] if n_comments else []
        if tell is not None:
            for note in notes:
                tell(note)
    return segments


def comment_note(uri: str, n_lines: int) -> str:
    """Say how many lines of a table were taken as comments."""
    return f"{storage.name(uri)}: {n_lines} lines that begin with # were taken as comments"


def _twice(segment_id: str, where: tuple[str, int], before: tuple[str, int], named: bool) -> str:
    other = f"row {before[1]}" + (f" of {before[0]}" if before[0] != where[0] else "")
    if named:
        return f"{where[0]}, row {where[1]}: segment_id {segment_id!r} occurs twice; ids must be unique (see {other})"
    return (
        f"{where[0]}, row {where[1]}: its file's name, {segment_id!r}, is also that of {other}, so it can't be the "
        "segment's id; add a column segment_id"
    )


def read_layout(uri: str) -> tables.Layout:
    """Read how a table of segments is written, and which of their columns it has; ValueError where that can't be."""
    layout = tables.read_layout(uri, SEGMENT_SCHEMA.names, ("source",))
    if "segment_id" in layout.columns:
        return layout
    note = f"{storage.name(uri)} has no column segment_id: the names of the files are the ids"
    return replace(layout, notes=(*layout.notes, note))


def segment_from_row(row: Mapping[str, Any], *, relative_to: str, vocabulary: Vocabulary = AUDIOSET_23) -> Segment:
    """Build a validated segment from a table's row: text cells (CSV) or typed ones (Parquet).

    In text cells objects are separated by `;` (or commas or bars); a missing column or an empty cell
    means None, not known, and the word `none` an empty list. Objects and splits are taken by other
    names, too, and times as 83.5 or 1:23.5. Without a column `segment_id` the file's name is the id. A
    missing `start_s` is 0, a missing or empty `end_s` the source's end, a missing `split` train.
    A source `SCHEME:ID` is of a known site, or a file of that name.
    Raises ValueError for a cell that breaks the contract.

    >>> row = {"segment_id": "duet", "source": "duet.mp4", "end_s": "1:23.5", "labels": "fiddle;cello"}
    >>> segment = segment_from_row(row, relative_to="/videos")
    >>> segment.source, segment.end_s, segment.labels
    ('/videos/duet.mp4', 83.5, ('violin', 'cello'))
    """
    for column in ("segment_id", "source"):
        if row.get(column) in (None, "") and (column in row or column == "source"):
            raise ValueError(f"{column} is missing or empty")
    source = str(row["source"])
    split = str(row.get("split") or "train").strip()
    segment = Segment(
        segment_id=str(row["segment_id"]) if "segment_id" in row else file_id(source),
        source=_resolved(source, relative_to),
        start_s=_seconds(row, "start_s") or 0.0,
        end_s=_seconds(row, "end_s"),
        split=_SPLIT_NAMES.get(split.casefold(), split),
        objects=_names(row, "objects", vocabulary),
        labels=_names(row, "labels", vocabulary),
    )
    validate(segment, vocabulary)
    return segment


def _resolved(source: str, relative_to: str) -> str:
    """Make a local source absolute; ValueError for `SCHEME:ID` of no known site, unless a file has this name."""
    if not storage.is_opaque(source) or sites.site_of(source):
        if "://" in source and storage.is_uri(source) and not storage.has_known_scheme(source):
            raise ValueError(
                f"source is {source!r}, and nothing opens {source.partition('://')[0]}://; sources are "
                f"{sites.forms()}, web addresses, URIs of known stores, or paths"
            )
        return storage.resolve(source, relative_to)
    beside = f"./{source}" if not storage.is_uri(relative_to) else storage.join(relative_to, source)
    path = storage.resolve(beside, relative_to)
    if not storage.exists(path):
        raise ValueError(
            f"source is {source!r}, and {source.partition(':')[0]!r} is no known site: sources are {sites.forms()}, "
            "web addresses, URIs or paths"
        )
    return path


def names_cell(names: Sequence[str] | None) -> str:
    """Write object names as a table's text cell, the reverse of what `segment_from_row` reads.

    >>> [names_cell(n) for n in (("dog", "cat"), (), None)]
    ['dog;cat', 'none', '']
    """
    return "" if names is None else ";".join(names) or "none"


def file_id(source: str) -> str:
    """Return a source's name without scheme, folders and suffix, the id of a segment that has no other.

    >>> file_id("videos/duet.mp4"), file_id("youtube:abc")
    ('duet', 'abc')
    """
    name = source.partition(":")[2] if storage.is_opaque(source) else storage.name(source)
    return os.path.splitext(name)[0]


def describe_sources(sources: Iterable[str]) -> str:
    """Say whether the local ones among segments' sources are there, with one of their paths; empty without any."""
    local = [s for s in dict.fromkeys(sources) if not storage.is_uri(s)]
    if not local:
        return ""
    missing = [s for s in local if not os.path.isfile(s)]
    if not missing:
        return f"media: {len(local):,} local files, all there, such as {local[0]}"
    return (
        f"media: {len(missing):,} of {len(local):,} local files don't exist, such as {missing[0]}; "
        "relative sources are relative to the table's folder"
    )


def _seconds(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    text = str(value)
    if clock := re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]?\d(?:\.\d*)?)", text):
        return 3600 * float(clock[1] or 0) + 60 * float(clock[2]) + float(clock[3])
    if fraction := re.fullmatch(r"(\d+),(\d+)", text):
        if len(fraction[2]) == 3:
            raise ValueError(f"{column} is {value!r}, which may be thousands or a fraction; write it with a point")
        return float(f"{fraction[1]}.{fraction[2]}")
    raise ValueError(f"{column} is {value!r}; it must be a number of seconds")


def _names(row: Mapping[str, Any], column: str, vocabulary: Vocabulary) -> tuple[str, ...] | None:
    """Read a cell of object names, see `segment_from_row`."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        return _names_in(value, column, vocabulary)
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{column} is {value!r}; it must be a list of object names")
    return _found(tuple(value), column, vocabulary)


@functools.lru_cache(maxsize=4096)
def _names_in(text: str, column: str, vocabulary: Vocabulary) -> tuple[str, ...] | None:
    if not text.strip():
        return None
    python = re.fullmatch(r"\s*\[(.*)\]\s*", text, re.DOTALL)  # a list as Python writes it
    parts = [part.strip(" \t\n'\"") for part in re.split(r"[;,|\n]", python[1] if python else text)]
    names = tuple(part for part in parts if part)
    if not names and not python:
        raise ValueError(f"{column} is {text!r}; name objects, or write none where there is none of them")
    return _found(names, column, vocabulary)


@functools.lru_cache(maxsize=4096)
def _found(names: tuple[str, ...], column: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    others = [name for name in names if name.strip().casefold() != "none"]
    if others and len(others) < len(names):
        raise ValueError(f"{column} holds none beside {', '.join(others)}; write either")
    try:
        return tuple(dict.fromkeys(vocabulary.find(name) for name in others))
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None


def _stored(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
