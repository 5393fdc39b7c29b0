"""The records that stages hand to each other, and their Arrow schemas."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from avsep import storage
from avsep.objects import N_IMAGENET_CLASSES, OBJECT_NAMES

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")


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

    `objects` are known to be audible; `labels` are given weak labels, None when the pictures
    are to decide. `source` is a path, a URI or `youtube:ID`.
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
    image_logits: NDArray[np.float16] | None  # (n_images, 1000); None: there was no labeller
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
    """A segment that could not become a clip, and why."""

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
        row["objects"], row["labels"] = _names(row["objects"]), _names(row["labels"])
        records.append(
            ClipRecord(
                **row,
                bases=flat[i],
                activations=table.column("activations")[i].values.to_numpy().reshape(n_bases, -1),
                image_logits=None if logits is None else logits.to_numpy().reshape(-1, N_IMAGENET_CLASSES),
            )
        )
    return records


def validate(record: Segment | ClipRecord | Rejection) -> None:
    """Raise ValueError naming the field, the value and the rule when a record breaks its contract."""
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
        unknown = set(getattr(record, column) or ()) - set(OBJECT_NAMES)
        require(not unknown, f"{column} holds {sorted(unknown, key=str)}; the objects are {', '.join(OBJECT_NAMES)}")
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


def segments_to_table(segments: Iterable[Segment]) -> pa.Table:
    """Turn segments into an Arrow table of SEGMENT_SCHEMA."""
    return pa.Table.from_pylist([asdict(s) for s in segments], schema=SEGMENT_SCHEMA)


def rejections_to_table(rejections: Iterable[Rejection]) -> pa.Table:
    """Turn rejections into an Arrow table of REJECTION_SCHEMA."""
    return pa.Table.from_pylist([asdict(r) for r in rejections], schema=REJECTION_SCHEMA)


def read_segments(uri: storage.AnyPath) -> list[Segment]:
    """Read segments from a CSV or Parquet table, or from a folder that `pipelines.manifest` wrote.

    Relative sources become absolute, relative to the table. Raises ValueError for a broken row
    (with its number), a duplicated id, an unknown or missing column or a file that is no table,
    FileNotFoundError for no table.
    """
    uri = os.fspath(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri} doesn't exist; a table (.csv, .parquet) or a manifest's folder is needed")
    tables = [uri]
    if storage.is_directory(uri):
        tables = [
            f for f in storage.list_files(uri) if f.endswith(".parquet") and storage.name(f).startswith("segments")
        ]
        if not tables:
            raise FileNotFoundError(f"{uri} holds no segments*.parquet; run pipelines.manifest first")
    segments: list[Segment] = []
    for table in tables:
        rows = _csv_rows(table) if table_kind(table) == "csv" else _parquet_rows(table)
        for number, row in rows:
            try:
                segments.append(segment_from_row(row, relative_to=storage.parent(table)))
            except ValueError as error:
                raise ValueError(f"{table}, row {number}: {error}") from None
    seen: set[str] = set()
    for segment in segments:
        if segment.segment_id in seen:
            raise ValueError(f"{uri}: segment_id {segment.segment_id!r} occurs twice; ids must be unique")
        seen.add(segment.segment_id)
    return segments


def table_kind(uri: str) -> str:
    """Tell by its name whether a table is `csv` or `parquet`; ValueError when it is neither."""
    if uri.lower().endswith(".csv"):
        return "csv"
    if uri.lower().endswith((".parquet", ".pq")):
        return "parquet"
    raise ValueError(f"{uri}: a table's name must end with .csv or .parquet")


def check_columns(uri: str, columns: Sequence[str]) -> None:
    """Raise ValueError when a table's header lacks a required column, or has an unknown one or one twice."""
    known = ", ".join(SEGMENT_SCHEMA.names)
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise ValueError(f"{uri}: the header is one cell, {columns[0]!r}; cells must be separated by commas")
    for column in ("segment_id", "source"):
        if column not in columns:
            raise ValueError(f"{uri} has no column {column!r}; it is required (the columns are {known})")
    for index, column in enumerate(columns):
        if column not in SEGMENT_SCHEMA.names:
            raise ValueError(f"{uri} has an unknown column {column!r}; remove it: the columns are {known}")
        if column in columns[:index]:
            raise ValueError(f"{uri} has the column {column!r} twice; remove one")


def segment_from_row(row: dict[str, Any], *, relative_to: str) -> Segment:
    """Build a validated segment from a table's row: text cells (CSV) or typed ones (Parquet).

    In text cells objects are `;`-separated; a missing column means None, an empty cell an
    empty list. A missing `start_s` is 0, a missing or empty `end_s` the source's end, a missing
    `split` train. Raises ValueError for a cell that breaks the contract.
    """
    for column in ("segment_id", "source"):
        if row.get(column) in (None, ""):
            raise ValueError(f"{column} is missing or empty")
    for column in ("objects", "labels"):
        if not isinstance(row.get(column), (str, list, tuple, type(None))):
            raise ValueError(f"{column} is {row[column]!r}; it must be a list of object names")
    segment = Segment(
        segment_id=str(row["segment_id"]),
        source=storage.resolve(str(row["source"]), relative_to),
        start_s=_seconds(row, "start_s") or 0.0,
        end_s=_seconds(row, "end_s"),
        split=row.get("split") or "train",
        objects=_names(row.get("objects")),
        labels=_names(row.get("labels")),
    )
    validate(segment)
    return segment


def _seconds(row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{column} is {value!r}; it must be a number of seconds") from None


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(";") if name.strip()]
    return tuple(dict.fromkeys(value))


def _csv_rows(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = next(reader, [])
        check_columns(uri, columns)
        for cells in reader:
            if cells and len(cells) != len(columns):
                what = f"{len(cells)} cells; the header has {len(columns)} columns"
                raise ValueError(f"{uri}, row {reader.line_num}: {what}")
            if cells:
                yield reader.line_num, dict(zip(columns, cells, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{uri}, row {reader.line_num}: {error}") from None


def _parquet_rows(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with storage.open_input(uri) as f:
            table = pq.read_table(f)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{uri} is no Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None
    check_columns(uri, table.column_names)
    yield from enumerate(table.to_pylist(), 1)
