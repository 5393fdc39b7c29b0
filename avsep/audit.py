"""Is an extraction whole, and what is in it: integrity, counts, agreement, duplicates, suspect clips.

Each function looks at one thing, commit records, one shard file, or a table of facts about clips, so
that a scheduler can map it; `Findings` add up.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from avsep import shards, storage, suspects
from avsep.audioset import Counts
from avsep.duplicates import BANDS, FRAMES, Pair, fingerprint, frame_s
from avsep.factors import DataConfig
from avsep.model import Labelling
from avsep.objects import Vocabulary
from avsep.records import (
    REJECTION_SCHEMA,
    SCHEMA_VERSION,
    ClipRecord,
    Rejection,
    clip_schema,
    clips_from_table,
    validate,
)
from avsep.shards import Commit, DataFile
from avsep.suspects import Suspect

DURATION_BINS_S = np.append(np.arange(0.0, 30.5, 0.5), math.inf)
LEVEL_BINS_DB = np.arange(-80.0, 4.0, 2.0)
Record = TypeVar("Record", ClipRecord, Rejection)
_EXAMPLES = 3  # ids that a finding names

FACTS_SCHEMA = pa.schema(
    [
        ("segment_id", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("media_sha256", pa.string()),
        ("fingerprint", pa.binary(BANDS * FRAMES)),
    ]
)


@dataclass(frozen=True, order=True)
class Finding:
    """Damage: a file, what is wrong with it, and what to do."""

    path: str  # under the extraction's folder
    kind: str  # commit, missing, hash, unreadable, schema, digest, ids, record, twice, orphan or temporary
    detail: str


@dataclass
class Findings:
    """What a part of the audit has to say."""

    counts: Counts = field(default_factory=Counter)
    damage: list[Finding] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)  # of different splits
    same: list[Pair] = field(default_factory=list)  # `other` is the same recording as `one`
    suspects: list[Suspect] = field(default_factory=list)


def add_findings(parts: Iterable[Findings]) -> Findings:
    """Put findings together."""
    total = Findings()
    for part in parts:
        total.counts.update(part.counts)
        total.damage += part.damage
        total.pairs += part.pairs
        total.same += part.same
        total.suspects += part.suspects
    return total


# --------------------------------------------------------------------------------- commit records


def check_commits(out: str, *, writing: bool = False) -> tuple[list[Commit], list[Finding]]:
    """Read every commit record, and check that they and the files agree with each other.

    With `writing`, an extraction is at work, whose temporary and uncommitted files are no damage.
    """
    commits: list[Commit] = []
    findings: list[Finding] = []
    unreadable: list[str] = []
    named: dict[str, str] = {}
    records = []
    for path in storage.list_files(storage.join(out, "commits")):
        if path.endswith(".json"):
            records.append(path)
        elif not writing:
            findings.append(_left_over(f"commits/{storage.name(path)}"))
    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(_try_commit, records))
    for path, commit in zip(records, read, strict=True):
        name = f"commits/{storage.name(path)}"
        if isinstance(commit, str):
            findings.append(Finding(name, "commit", commit))
            unreadable.append(storage.name(path).removesuffix(".json"))
            continue
        commits.append(commit)
        if storage.name(path) != f"{commit.shard}-g{commit.generation}.json":
            findings.append(
                Finding(name, "commit", f"is of shard {commit.shard}, generation {commit.generation}: its name isn't")
            )
        if commit.schema_version != SCHEMA_VERSION:
            detail = f"schema version {commit.schema_version}; this program writes {SCHEMA_VERSION}"
            findings.append(Finding(name, "schema", detail))
        named |= {file.path: name for file in (commit.clips, commit.rejections) if file}
    for kind in ("clips", "rejections"):
        for path in storage.list_files(storage.join(out, kind)):
            name = f"{kind}/{storage.name(path)}"
            stem = storage.name(path).rpartition("-")[0]
            if name not in named and stem not in unreadable and not writing:
                findings.append(_left_over(name))
    commits = shards.standing(commits)
    digests = Counter(c.digest for c in commits if c.clips)
    if len(digests) > 1:
        usual = digests.most_common(1)[0][0]
        for c in commits:
            if c.clips and c.digest != usual:
                detail = f"extracted with configuration {c.digest}, most others with {usual}; don't mix them"
                findings.append(Finding(_name(c), "digest", detail))
    return commits, findings + check_ids(commits)


def _left_over(name: str) -> Finding:
    if name.endswith(".tmp"):
        return Finding(name, "temporary", "left by a writer that was killed; extraction sweeps it away")
    return Finding(name, "orphan", "no commit names it, so nobody reads it; extraction sweeps it away")


def _try_commit(path: str) -> Commit | str:
    try:
        return shards.read_commit(path)
    except (ValueError, OSError) as error:
        return " ".join(str(error).replace(path, "").split())


def _name(commit: Commit) -> str:
    return f"commits/{commit.shard}-g{commit.generation}.json"


def check_ids(commits: Iterable[Commit]) -> list[Finding]:
    """Check that each segment is in one place: one commit's clips, or one shard's rejections.

    A rejection that an earlier generation, or another shard before its retry, made doesn't stand.
    """
    commits = sorted(commits, key=lambda c: (c.shard, c.generation))
    last = {c.shard: c for c in commits}
    retried: dict[str, set[str]] = defaultdict(set)
    for c in commits:
        retried[c.shard].update(c.retried)
    clips: dict[str, list[Commit]] = defaultdict(list)
    rejected: dict[str, list[Commit]] = defaultdict(list)
    for c in commits:
        for i in c.clip_ids:
            clips[i].append(c)
    for c in last.values():
        for i in c.rejection_ids:
            rejected[i].append(c)
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)

    def note(one: Commit, other: Commit, what: str, segment_id: str) -> None:
        where = "itself" if one == other else _name(other)
        wrong[_name(one), f"{what} {where}"].append(segment_id)

    for i, places in clips.items():
        for one, other in zip(places[1:], places, strict=False):
            note(one, other, "holds clips that are also in", i)
        for c in rejected.get(i, ()):
            clip = places[0]
            if c.shard == clip.shard or not ({c.shard, clip.shard} & {s for s in retried if i in retried[s]}):
                note(c, clip, "rejects segments that are clips of", i)
    for i, places in rejected.items():
        first = [c for c in places if i not in retried[c.shard]]
        for one, other in zip(first[1:], first, strict=False):
            note(one, other, "rejects segments that are also rejected in", i)
    return [
        Finding(path, "twice", f"{what}: {_few(ids)}; remove one of the commit records")
        for (path, what), ids in wrong.items()
    ]


def _few(ids: Sequence[str]) -> str:
    ids = list(dict.fromkeys(ids))
    more = f" and {len(ids) - _EXAMPLES} more" if len(ids) > _EXAMPLES else ""
    return ", ".join(ids[:_EXAMPLES]) + more


# -------------------------------------------------------------------------------------- files


def check_file(
    out: str,
    kind: str,
    file: DataFile,
    digest: str,
    standing: Container[str] = (),
    listener: suspects.Listener | None = None,
) -> tuple[Findings, pa.Table]:
    """Check one committed file of clips or rejections and count what is in it.

    Of rejections only those of `standing` ids count. With a `listener` clips are suspect whose pictures and sound
    disagree. Returns the findings, and facts of the clips as a table of FACTS_SCHEMA. A damaged file gives one
    finding of each kind of damage, and no counts.
    """
    findings: list[Finding] = []
    counts: Counts = Counter()
    suspected: list[Suspect] = []
    facts: list[dict[str, Any]] = []
    try:
        data = storage.read_bytes(storage.join(out, file.path))
    except FileNotFoundError:
        detail = f"is missing, and with it {len(file.ids)} segments; remove its commit record to have its shard redone"
        return Findings(damage=[Finding(file.path, "missing", detail)]), FACTS_SCHEMA.empty_table()
    except OSError as error:
        return Findings(damage=[Finding(file.path, "unreadable", str(error))]), FACTS_SCHEMA.empty_table()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        findings += _check_header(parquet, kind, file, digest)
        if not any(f.kind == "schema" for f in findings):
            if kind == "clips":
                found, counts, facts, suspected = _check_clips(parquet, file, listener)
            else:
                found, counts = _check_rejections(parquet, file, standing)
            findings += found
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        findings.append(
            Finding(file.path, "unreadable", "no whole Parquet file: " + " ".join(str(error).split())[:200])
        )
    if sha256 != file.sha256:
        also = "".join(f"; {f.detail}" for f in findings)
        detail = f"SHA-256 is {sha256[:12]}…, the commit says {file.sha256[:12]}…; restore it{also}"
        findings = [Finding(file.path, "hash", detail)]
    if findings:
        return Findings(damage=findings), FACTS_SCHEMA.empty_table()
    return Findings(counts, suspects=suspected), pa.Table.from_pylist(facts, schema=FACTS_SCHEMA)


def _check_header(parquet: pq.ParquetFile, kind: str, file: DataFile, digest: str) -> Iterator[Finding]:
    schema = parquet.schema_arrow
    metadata = schema.metadata or {}
    version = metadata.get(b"avsep.schema_version", b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        yield Finding(file.path, "schema", f"schema version {version}; this program reads {SCHEMA_VERSION}")
        return
    expected = REJECTION_SCHEMA
    if kind == "clips":
        bases = schema.field("bases").type if "bases" in schema.names else None
        shape = getattr(bases, "shape", None)
        if shape is None or len(shape) != 2:
            yield Finding(file.path, "schema", f"bases are {bases}, no tensor of (F, M)")
            return
        expected = clip_schema(*shape)
    if not schema.equals(expected, check_metadata=False):
        wrong = sorted(set(map(str, schema)) ^ set(map(str, expected)))
        yield Finding(file.path, "schema", f"other columns than this program writes: {'; '.join(wrong)[:200]}")
    written = metadata.get(b"avsep.digest", b"none").decode(errors="replace")
    configuration = json.loads(metadata.get(b"avsep.configuration", b"null"))
    if written != digest:
        yield Finding(file.path, "digest", f"was extracted with configuration {written}; its commit says {digest}")
    elif shards.configuration_digest(configuration) != digest:
        yield Finding(file.path, "digest", f"the configuration in it hasn't the digest {digest}")


def _check_rejections(
    parquet: pq.ParquetFile, file: DataFile, standing: Container[str]
) -> tuple[list[Finding], Counts]:
    rejections = [Rejection(**row) for row in parquet.read().to_pylist()]
    counts: Counts = Counter()
    for r in rejections:
        if r.segment_id in standing:
            counts["rejected", r.reason] += 1
            counts["rejected_at", r.stage] += 1
    findings = _check_ids(file, [r.segment_id for r in rejections])
    return [*findings, *_check_records(file, rejections, validate)], counts


def _check_clips(
    parquet: pq.ParquetFile, file: DataFile, listener: suspects.Listener | None
) -> tuple[list[Finding], Counts, list[dict[str, Any]], list[Suspect]]:
    counts: Counts = Counter()
    facts: list[dict[str, Any]] = []
    suspected: list[Suspect] = []
    findings: list[Finding] = []
    ids: list[str] = []
    made_with = DataConfig.from_dict(json.loads((parquet.schema_arrow.metadata or {})[b"avsep.configuration"]))
    check = functools.partial(_check_clip, vocabulary=made_with.vocabulary)
    labels = Labelling.of(made_with)
    seconds_a_frame, way = frame_s(made_with.extraction.stft), made_with.extraction.looks
    if listener is not None and not listener.takes(made_with.extraction):
        listener = None
    for group in range(parquet.num_row_groups):
        records = clips_from_table(parquet.read_row_group(group))
        ids += [r.segment_id for r in records]
        findings += _check_records(file, records, check)
        if not findings:
            for record in records:
                count_clip(record, counts, labels)
                for kind, why in suspects.examine(record, way, seen_labels(record, labels), listener):
                    if why is None:
                        counts["unknown", kind, record.split] += 1
                    else:
                        suspected.append(Suspect(kind, record.segment_id, record.split, file.path, why))
                print_ = fingerprint(record, seconds_a_frame)
                counts["unknown", "again", record.split] += print_ is None
                fact = {name: getattr(record, name) for name in FACTS_SCHEMA.names if name != "fingerprint"}
                facts.append({**fact, "fingerprint": None if print_ is None else print_.tobytes()})
    findings += _check_ids(file, ids)
    return findings, counts, facts, suspected


def _check_ids(file: DataFile, ids: Sequence[str]) -> Iterator[Finding]:
    if list(ids) != list(file.ids):
        wrong = sorted(set(ids) ^ set(file.ids)) or ["their order, or repeats"]
        yield Finding(file.path, "ids", f"holds other ids than its commit says: {_few(wrong)}")


def _check_records(file: DataFile, records: Sequence[Record], check: Callable[[Record], None]) -> Iterator[Finding]:
    broken: dict[str, list[str]] = defaultdict(list)
    for record in records:
        try:
            check(record)
        except ValueError as error:
            rule = str(error).removeprefix(f"{type(record).__name__} {record.segment_id!r}: ")
            broken[rule].append(record.segment_id)
    for rule, who in broken.items():
        yield Finding(file.path, "record", f"{rule} ({_few(who)}); remove its commit record to have its shard redone")


def _check_clip(record: ClipRecord, vocabulary: Vocabulary) -> None:
    validate(record, vocabulary)
    for name in ("activation_scale", "kl_divergence", "duration_s", "rms_db"):
        if not math.isfinite(getattr(record, name)):
            raise ValueError(f"{name} must be finite")
    if not np.isfinite(record.basis_energy).all():
        raise ValueError("basis_energy must be finite")
    if record.duration_s <= 0:
        raise ValueError("duration_s must be above 0")
    if record.image_logits is not None and not (record.image_logits < np.inf).all():  # NaN neither
        raise ValueError("image_logits must be numbers")
    if len(record.media_sha256) != 64 or set(record.media_sha256) - set("0123456789abcdef"):
        raise ValueError("media_sha256 must be 64 hexadecimal digits")


# -------------------------------------------------------------------------------------- counts


def chosen_labels(record: ClipRecord, labels: Labelling) -> tuple[str, ...] | None:
    """Return the weak labels that training takes: given ones, else the pictures'; None without either."""
    if record.labels is not None:
        return record.labels
    return seen_labels(record, labels)


def seen_labels(record: ClipRecord, labels: Labelling) -> tuple[str, ...] | None:
    """Return what the pictures show; None without logits."""
    if record.image_logits is None or not len(record.image_logits):
        return None
    hot = labels.choose(labels.scores(torch.from_numpy(record.image_logits.astype(np.float32))))
    return tuple(name for name, on in zip(labels.vocabulary.names, hot.tolist(), strict=True) if on)


def count_clip(record: ClipRecord, counts: Counts, config: Labelling) -> None:
    """Count one clip in every table of the card; `config` says how labels follow from the pictures."""
    counts["clips", record.split] += 1
    counts["label_source", record.label_source] += 1
    counts["seconds", record.split] += round(record.duration_s)
    counts["duration", str(_bin(record.duration_s, DURATION_BINS_S))] += 1
    counts["level", str(_bin(record.rms_db, LEVEL_BINS_DB))] += 1
    labels, tags, seen = chosen_labels(record, config), record.objects, seen_labels(record, config)
    if not labels:
        counts["unlabelled", record.split] += 1
        counts["nothing", record.split] += record.labels is not None
    for name in tags or ():
        counts["objects", name, record.split] += 1
    for name in labels or ():
        counts["labels", name, record.split] += 1
        for other in labels or ():
            counts["together", name, other] += 1
    for source, claimed in (("pictures", seen), ("given", record.labels)):
        if claimed is not None and tags is not None:
            counts["compared", source] += 1
            for name in {*claimed, *tags}:
                outcome = "both" if name in claimed and name in tags else "label" if name in claimed else "tag"
                counts["agreement", source, name, outcome] += 1


def _bin(value: float, edges: NDArray) -> int:
    return int(np.clip(np.searchsorted(edges, value, "right") - 1, 0, len(edges) - 2))
