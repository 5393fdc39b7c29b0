"""Clips' sound, pictures and labels for other people's models: WebDataset archives, or Parquet files for `datasets`.

    OUT/data/SPLIT-SHARD.tar      a shard's clips of one split; `.parquet` in the other format
    OUT/croissant.json            the same card as Croissant, for machines
    OUT/README.md                 the dataset card: it is there once the export is whole
    OUT/rejections.parquet        a row per clip whose media can't be had any more
    OUT/_shards/                  what counts: commits with a row per exported clip, as `avsep.shards` writes them

One commit of the clips is one task and one commit of the export. Its data files are written first. Their names and
bytes follow from the clips: a task that was killed is done again, and writes the same files.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import re
import tarfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from numpy.typing import NDArray
from PIL import Image

from avsep import croissant, shards, stages, storage
from avsep.extraction import Done
from avsep.factors import DataConfig, ExtractionConfig
from avsep.fetching import MediaStore, is_remote
from avsep.model import Labelling
from avsep.records import (
    SEGMENT_SCHEMA,
    SPLITS,
    ClipError,
    Reason,
    Rejection,
    Segment,
    rejections_to_table,
    segment_of,
)
from avsep.work import Work

FORMATS = {"webdataset": "tar", "parquet": "parquet"}  # and their files' suffix
KINDS = ("exported", "rejections")  # of committed tables
LOCK_FILE, STATUS_FILE = "export.lock", "status.json"
CARD, CROISSANT, REJECTIONS = "README.md", "croissant.json", "rejections.parquet"
_SHARDS, _DATA = "_shards", "data"
_LAYOUT = 1  # goes up when data files are laid out differently
_ROW_GROUP_BYTES = 32 << 20
_PIECE_BYTES = 8 << 20  # of a file that is read back
_JPEG_QUALITY = 90
_READERS = 16
_PUBLIC_SPLITS = {"train": "train", "val": "validation", "test": "test"}  # as `datasets` calls them
_DATA_FILE = re.compile(rf"(?:{'|'.join(SPLITS)})-(?P<shard>.+)\.(?:{'|'.join(FORMATS.values())})")
_ROW = ["segment_id", "source", "start_s", "end_s", "split", "objects", "labels", "label_source", "duration_s"]
_ROW += ["media_sha256"]  # columns of clip records that are exported
_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SAMPLE_SCHEMA = pa.schema(
    [
        *SEGMENT_SCHEMA,
        pa.field("label_source", pa.string(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("media_sha256", pa.string(), nullable=False),
        pa.field("audio_scale", pa.float64(), nullable=False),
    ]
)
EXPORTED_SCHEMA = pa.schema(
    [
        pa.field("segment_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("file_bytes", pa.int64(), nullable=False),
        pa.field("file_sha256", pa.string(), nullable=False),
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Export:
    """What the shards of one export have in common."""

    out: str
    clips: str
    format: str  # one of FORMATS
    made_with: DataConfig  # of the clips

    @property
    def root(self) -> str:
        """The folder of the commits."""
        return storage.join(self.out, _SHARDS)

    @property
    def configuration(self) -> dict[str, Any]:
        """What decides the data files, but for the clips themselves."""
        return {"format": self.format, "layout": _LAYOUT, "clips": self.made_with.as_dict()}


@dataclass(frozen=True)
class Sample:
    """One exported clip."""

    row: dict[str, Any]  # of SAMPLE_SCHEMA
    sound: bytes  # FLAC
    pictures: tuple[bytes, ...]  # JPEG, one a second


def prepare(out: str, clips: str, format: str) -> Export:
    """Say what an export is made with; ValueError where nothing is extracted in `clips`."""
    return Export(out, clips, format, DataConfig.from_dict(shards.read_configuration(clips)))


# -------------------------------------------------------------------------------------------- what is left to do


def stem(commit: shards.Commit) -> str:
    """Name the export's shard of one commit of the clips."""
    return f"{commit.shard}-g{commit.generation}"


def read_clips(clips: str) -> dict[str, tuple[Segment, ...]]:
    """Read which clips each commit of an extraction has: the export's shard → segments."""
    commits = [c for c in shards.read_commits(clips) if c.clips]

    def read(commit: shards.Commit) -> tuple[Segment, ...]:
        assert commit.clips
        rows = shards.read_table(storage.join(clips, commit.clips.path), SEGMENT_SCHEMA.names).to_pylist()
        return tuple(map(segment_of, rows))

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(map(stem, commits), pool.map(read, commits), strict=True))


def check_same(job: Export, state: shards.State, names: Iterable[str]) -> None:
    """Raise ValueError where OUT holds another format, or the export of other clips. `names` are of all shards."""
    digest = shards.configuration_digest(job.configuration)
    files = (c.clips or c.rejections for c in state.commits if c.digest != digest)
    if file := next(filter(None, files), None):
        with storage.open_input(storage.join(job.root, file.path)) as f:
            then = json.loads(pq.read_schema(f).metadata[b"avsep.configuration"])
        was, now = then.get("format"), job.format
        what = f"--format {was}, now {now}" if was != now else "other settings, or from clips extracted differently"
        raise ValueError(f"{job.out} was exported with {what}; give another --out")
    here = {name.rpartition("-g")[0] for name in names}
    if state.commits and not any(c.shard.rpartition("-g")[0] in here for c in state.commits):
        raise ValueError(f"{job.out} was exported from other clips than those of {job.clips}; give another --out")


def forget_replaced(job: Export, state: shards.State, names: Set[str]) -> int:
    """Delete the commits of shards that `names` lacks: their clips were extracted again. Return how many."""
    gone = [c for c in state.commits if c.shard not in names]
    for c in gone:
        storage.delete_file(storage.join(job.root, "commits", f"{stem(c)}.json"))
        for file in filter(None, (c.clips, c.rejections)):
            storage.delete_file(storage.join(job.root, file.path))
    return len(gone)


def plan_work(
    job: Export, state: shards.State, clips: Mapping[str, Sequence[Segment]], store: MediaStore | None
) -> list[Work]:
    """Say what is left: shards without a commit, whose files are gone, or with rejections that may pass now."""
    commits: dict[str, list[shards.Commit]] = {}
    for c in state.commits:
        commits.setdefault(c.shard, []).append(c)
    broken = {r["shard"] for r in read_exported(job, state) if r["broken"]}
    passing = _may_pass(job, state, [s for segments in clips.values() for s in segments], store)
    works = []
    for name, segments in clips.items():
        before = commits.get(name, [])
        if before and name not in broken and passing.isdisjoint(i for c in before for i in c.rejection_ids):
            continue
        attempts = {s.segment_id: r.attempts for s in segments if (r := state.rejections.get(s.segment_id))}
        generation = max((c.generation + 1 for c in before), default=0)
        works.append(Work(name, generation, tuple(segments), attempts=attempts, replaced=tuple(before)))
    return works


def _may_pass(job: Export, state: shards.State, segments: Sequence[Segment], store: MediaStore | None) -> set[str]:
    """Return the ids of rejections worth another try: media that came or changed, and what was transient."""
    rejected = [s for s in segments if s.segment_id in state.rejections]
    found = {s.segment_id: store.known.get(s.segment_id, s.source) if store else s.source for s in rejected}
    located = [replace(s, source=found[s.segment_id]) for s in rejected]
    passing = shards.newer_media(job.root, state.commits, located, rejected=True)
    for s in located:
        r = state.rejections[s.segment_id]
        if _is_there(s) if r.reason == Reason.MISSING else r.transient:
            passing.add(s.segment_id)
    return passing


def _is_there(segment: Segment) -> bool:
    return not is_remote(segment) and storage.exists(segment.source)


def read_exported(job: Export, state: shards.State) -> list[dict[str, Any]]:
    """Read the row of every exported clip, with its `shard`, and whether its file is gone or `broken`."""
    sizes = {f"{_DATA}/{i.base_name}": i.size for i in storage.infos(storage.join(job.out, _DATA))}
    commits = [c for c in state.commits if c.clips]

    def read(commit: shards.Commit) -> list[dict[str, Any]]:
        assert commit.clips
        rows = shards.read_table(storage.join(job.root, commit.clips.path)).to_pylist()
        return [r | {"shard": commit.shard, "broken": sizes.get(r["file"]) != r["file_bytes"]} for r in rows]

    with ThreadPoolExecutor(_READERS) as pool:
        return [row for rows in pool.map(read, commits) for row in rows]


def sweep(job: Export, state: shards.State, names: Set[str]) -> None:
    """Delete what killed writers left, and data files that no commit names.

    A file whose shard has no commit yet stays: its writer may be about to commit it, or writes it again.
    """
    for folder in (job.out, job.root, storage.join(job.out, _DATA)):
        storage.sweep(folder)
    shards.sweep(job.root, state.commits, KINDS)
    named = {row["file"] for row in read_exported(job, state)}
    committed = {c.shard for c in state.commits}
    for info in storage.infos(storage.join(job.out, _DATA)):
        match = _DATA_FILE.fullmatch(info.base_name)
        lost = match and (match["shard"] in committed or match["shard"] not in names)
        if lost and f"{_DATA}/{info.base_name}" not in named:
            storage.delete_file(storage.join(job.out, _DATA, info.base_name))


# ---------------------------------------------------------------------------------------------- a shard of clips


def export_shard(job: Export, work: Work, locate: stages.Locate | None = None) -> Done:
    """Write the data files of a shard, one per split, and commit them; of clips without media commit rejections.

    `locate` finds a clip's media; without it they are at its source. The encoded shard is held in memory,
    twice while a file of it is written: some 0.5 GB for 256 clips of ten seconds.
    Raises OSError where a file can't be written, or reads back differently.
    """
    started = time.monotonic()
    rejections: list[Rejection] = [replace(r, stage="export") for r in work.culprits]
    samples: dict[str, list[Sample]] = {}
    rows = _read_rows(job, work.shard)
    for s in work.segments:
        sample = export_segment(s, rows[s.segment_id], job.made_with.extraction, locate)
        if isinstance(sample, Rejection):
            rejections.append(sample)
        else:
            samples.setdefault(s.split, []).append(sample)
    if work.probe:
        return Done(work)
    rejections = [replace(r, attempts=work.attempts.get(r.segment_id, 0) + 1) for r in rejections]
    exported = [row for split, some in samples.items() for row in _write(job, f"{split}-{work.shard}", some)]
    commit = shards.commit_shard(
        job.root,
        work.shard,
        work.generation,
        pa.Table.from_pylist(exported, EXPORTED_SCHEMA) if exported else None,
        rejections,
        configuration=job.configuration,
        kind=KINDS[0],
        timings_s={"export": time.monotonic() - started},
        retried=sorted(work.attempts),
        replaces=bool(work.replaced),
    )
    events = [{"event": "rejected", **asdict(r)} for r in rejections]
    return Done(work, len(commit.clip_ids), Counter(str(r.reason) for r in rejections), commit.timings_s, events)


def _read_rows(job: Export, shard: str) -> dict[str, dict[str, Any]]:
    """Read a shard's clips, with labels decided from their pictures where none were given."""
    commit = shards.read_commit(storage.join(job.clips, "commits", f"{shard}.json"))
    assert commit.clips
    table = shards.read_table(storage.join(job.clips, commit.clips.path), [*_ROW, "image_logits"])
    labelling, rows = Labelling.of(job.made_with), table.select(_ROW).to_pylist()
    for row, logits in zip(rows, table.column("image_logits"), strict=True):
        if row["labels"] is None and (marks := labelling.decide(None, logits.values)) is not None:
            names = labelling.vocabulary.names
            row["labels"] = [names[i] for i in marks.nonzero().flatten().tolist()]
        if not storage.is_uri(row["source"]):
            row["source"] = storage.name(row["source"])  # this machine's folders mean nothing elsewhere
    return {row["segment_id"]: row for row in rows}


def export_segment(
    segment: Segment, row: Mapping[str, Any], config: ExtractionConfig, locate: stages.Locate | None = None
) -> Sample | Rejection:
    """Decode and encode one clip's sound and pictures, or say why that can't be done."""
    stage = "fetch"
    try:
        found = locate(segment) if locate else segment
        stage = "decode"
        decoded = stages.decode(found, config)
        if decoded.sha256 != row["media_sha256"]:
            detail = f"{found.source} isn't what the clip was extracted from; extract it again, or bring that file back"
            raise ClipError(Reason.CHANGED, detail)
    except ClipError as error:
        return Rejection(segment.segment_id, stage, error.reason, error.transient, detail=error.detail)
    sound, scale = encode_sound(decoded.clip.waveform, decoded.clip.sample_rate)
    return Sample({**row, "audio_scale": scale}, sound, tuple(map(encode_picture, decoded.clip.images)))


def encode_sound(waveform: NDArray[np.float32], sample_rate: int) -> tuple[bytes, float]:
    """Encode a waveform `(S,)` as FLAC of 16 bits; return it and its scale.

    What is decoded times the scale is the waveform, within scale / 32768. The scale is 1 unless samples exceed 1.
    """
    scale = max(1.0, float(np.abs(waveform).max(initial=0.0)))
    samples = np.clip(np.round(waveform.astype(np.float64) * (32768 / scale)), -32768, 32767).astype(np.int16)
    sink = io.BytesIO()
    soundfile.write(sink, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return sink.getvalue(), scale


def encode_picture(image: NDArray[np.uint8]) -> bytes:
    """Encode a picture, `(height, width, 3)` RGB, as JPEG."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=_JPEG_QUALITY)
    return sink.getvalue()


def _write(job: Export, name: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Write a data file, check it, and return its rows of EXPORTED_SCHEMA."""
    if job.format == "webdataset":
        data = tar_of(samples)
    else:
        data = parquet_of(samples, job.made_with.extraction.stft.sample_rate)
    file, sha256 = f"{_DATA}/{name}.{FORMATS[job.format]}", hashlib.sha256(data).hexdigest()
    path = storage.join(job.out, file)
    storage.write_bytes(path, data)
    if _hash_of(path) != sha256:
        raise OSError(f"{path} reads back differently from what was written: check the disk")
    return [
        {
            "segment_id": s.row["segment_id"],
            "split": s.row["split"],
            "file": file,
            "file_bytes": len(data),
            "file_sha256": sha256,
            "n_images": len(s.pictures),
            "duration_s": s.row["duration_s"],
        }
        for s in samples
    ]


def _hash_of(path: str) -> str:
    digest = hashlib.sha256()
    with storage.open_input(path) as f:
        while piece := f.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- the two formats


def key_of(segment_id: str) -> str:
    """Return the name of a clip in an archive: no dot in it, and no two ids' the same (`urllib.parse.unquote`).

    >>> key_of("-Ab_0"), key_of("my clip.v2")
    ('-Ab_0', 'my%20clip%2Ev2')
    """
    return urllib.parse.quote(segment_id, safe="").replace(".", "%2E").replace("~", "%7E")


def tar_of(samples: Iterable[Sample]) -> bytes:
    """Write clips as a WebDataset archive: `KEY.flac`, `KEY.json`, `KEY.0.jpg` …; equal clips give equal bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for s in samples:
            text = json.dumps(s.row, ensure_ascii=False, sort_keys=True).encode()
            files = {"flac": s.sound, "json": text, **{f"{i}.jpg": p for i, p in enumerate(s.pictures)}}
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key_of(s.row['segment_id'])}.{suffix}")  # of 1970, and nobody's
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_of(samples: Sequence[Sample], sample_rate: int) -> bytes:
    """Write clips as a Parquet file that `datasets` decodes: its schema says which columns are sound and pictures."""
    features = {
        **{f.name: _feature(f.type) for f in SAMPLE_SCHEMA},
        "audio": {"sampling_rate": sample_rate, "_type": "Audio"},
        "images": {"feature": {"_type": "Image"}, "_type": "Sequence"},
    }
    schema = pa.schema([*SAMPLE_SCHEMA, ("audio", _FILE), ("images", pa.list_(_FILE))])
    said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = schema.with_metadata(said)
    sink = io.BytesIO()
    n_bytes = sum(len(s.sound) + sum(map(len, s.pictures)) for s in samples)
    n_rows = max(1, _ROW_GROUP_BYTES * len(samples) // max(1, n_bytes))
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
        for first in range(0, len(samples), n_rows):  # a row group at a time, or all clips would be there thrice
            rows = [_row_of(s) for s in samples[first : first + n_rows]]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return sink.getvalue()


def _row_of(sample: Sample) -> dict[str, Any]:
    key = key_of(sample.row["segment_id"])
    images = [{"bytes": p, "path": f"{key}.{i}.jpg"} for i, p in enumerate(sample.pictures)]
    return {**sample.row, "audio": {"bytes": sample.sound, "path": f"{key}.flac"}, "images": images}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": "float64" if pa.types.is_float64(kind) else "string", "_type": "Value"}


# --------------------------------------------------------------------------------------------- the tables and card


def write_rejections(job: Export, state: shards.State) -> None:
    """Write all rejections that stand as one table, ordered by id."""
    sink = io.BytesIO()
    pq.write_table(rejections_to_table(list(state.rejections.values())), sink, compression="zstd")
    storage.write_bytes(storage.join(job.out, REJECTIONS), sink.getvalue())


def write_card(job: Export, state: shards.State) -> None:
    """Write the dataset card, whose header tells `datasets` which files are which split, and what is in them.

    Croissant says the same to other programs.
    """
    exported = read_exported(job, state)
    written = [i.mtime_ns for i in storage.infos(storage.join(job.root, "commits")) if i.mtime_ns]
    published = datetime.datetime.fromtimestamp(max(written, default=0) / 1e9, datetime.UTC).date()  # the last commit's
    described = as_croissant(job, exported, str(published))
    storage.write_text(storage.join(job.out, CROISSANT), json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    storage.write_text(storage.join(job.out, CARD), card(job, exported, len(state.rejections)))


def as_croissant(job: Export, exported: Sequence[Mapping[str, Any]], published: str) -> dict[str, Any]:
    """Return the export's description as Croissant; `published` is a day, as 2026-01-31."""
    return croissant.describe(
        storage.name(job.out.rstrip("/")),
        job.out if storage.is_uri(job.out) else "./",  # this machine's folders mean nothing elsewhere
        published,
        f"{len(exported):,} clips of video with sound, pictures and weak labels, written by pipelines.export. "
        f"The objects are {', '.join(job.made_with.vocabulary.names)}.",
        [(str(r["file"]), int(r["file_bytes"]), str(r["file_sha256"])) for r in exported],
        SAMPLE_SCHEMA,
    )


def card(job: Export, exported: Sequence[Mapping[str, Any]], n_rejected: int) -> str:
    """Return the dataset card; each value of its YAML header is JSON, which is YAML, too."""
    counts = Counter(str(r["split"]) for r in exported)
    splits = [split for split in SPLITS if counts[split]]
    suffix, config = FORMATS[job.format], job.made_with.extraction
    files = [{"split": _PUBLIC_SPLITS[s], "path": f"{_DATA}/{s}-*.{suffix}"} for s in splits]
    header = {
        "license": "unknown",
        "task_categories": ["audio-classification"],
        "tags": ["audio", "image", "sound-separation", "weak-labels", *(["webdataset"] * (suffix == "tar"))],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": _card_features(job, max((r["n_images"] for r in exported), default=0))},
    }
    hours = sum(r["duration_s"] for r in exported) / 3600
    table = [f"| {_PUBLIC_SPLITS[s]} | {counts[s]} |" for s in splits]
    where = "`KEY.flac`, `KEY.0.jpg` … and `KEY.json`" if suffix == "tar" else "the columns `audio` and `images`"
    body = f"""# {len(exported):,} clips with sound, pictures and weak labels

{hours:,.2f} hours, written by `python -m pipelines.export`. Left out are {n_rejected:,} clips whose media can't be had.

| split | clips |
| --- | --- |
{chr(10).join(table)}

- **Sound and pictures** are in {where}: mono, {config.stft.sample_rate} Hz, FLAC of 16 bits, as the model hears it;
  one picture a second, at 0.5, 1.5, … s, whose short side is {config.image_size} pixels, JPEG.
  The waveform is the decoded sound times `audio_scale`, which is 1 unless samples exceed full scale.
- **`labels`** are weak: given, or decided from the pictures, as `label_source` says; null where nobody looked.
  **`objects`** are those known to be audible; null where that isn't known.
- **`segment_id`, `source`, `start_s`, `end_s`, `media_sha256`** say which excerpt of which file a clip is.
- **Objects**: {", ".join(job.made_with.vocabulary.names)}.
- **Licence**: that of each source; this export adds none. Enter it in the header, and in `{CROISSANT}` with the
  creator, before you publish.
"""
    return "---\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in header.items()) + f"---\n\n{body}"


def _card_features(job: Export, n_images: int) -> list[dict[str, Any]]:
    fields = [
        {"name": f.name, "sequence": "string"}
        if pa.types.is_list(f.type)
        else {"name": f.name, "dtype": "float64" if pa.types.is_float64(f.type) else "string"}
        for f in SAMPLE_SCHEMA
    ]
    audio = {"audio": {"sampling_rate": job.made_with.extraction.stft.sample_rate}}
    if job.format == "parquet":
        return [*fields, {"name": "audio", "dtype": audio}, {"name": "images", "sequence": "image"}]
    return [
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__")),
        {"name": "flac", "dtype": audio},
        {"name": "json", "struct": fields},
        *({"name": f"{i}.jpg", "dtype": "image"} for i in range(n_images)),
    ]
