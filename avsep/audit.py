"""Is an extraction whole, and what is in it: integrity, counts, agreement, duplicates.

Each function looks at one thing, commit records, one shard file, or a table of facts about clips, so
that a scheduler can map it; `Report`s add up.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from avsep import fetch, shards, storage
from avsep.audioset import Counts, by_object, by_split, under
from avsep.model import LabelConfig, label_config
from avsep.objects import OBJECT_NAMES
from avsep.records import (
    REJECTION_SCHEMA,
    SCHEMA_VERSION,
    SPLITS,
    ClipRecord,
    Rejection,
    Segment,
    clip_schema,
    clips_from_table,
    validate,
)
from avsep.shards import Commit, DataFile

DURATION_BINS_S = np.append(np.arange(0.0, 30.5, 0.5), math.inf)
LEVEL_BINS_DB = np.arange(-80.0, 4.0, 2.0)
NEAR = 0.89  # similarity from which two clips count as the same sound
_BANDS, _FRAMES = 12, 50  # of a fingerprint
_LOW_HZ, _HIGH_HZ = 100.0, 10_000.0
_FRAME_S, _WINDOW_S = 0.2, 0.4
_FLOOR = math.exp(-3)  # of the loudest band: what is below is silence
_SHIFT = 4  # frames, at most
_STILL = 0.05  # standard deviation over time of the log energy: below it nothing happens
_SHORTEST_S = 3.0  # shorter clips are too alike to compare
_EXAMPLES = 3  # ids that a finding names
_PAIRS_A_GROUP = 1000

FACTS_SCHEMA = pa.schema(
    [
        ("segment_id", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("media_sha256", pa.string()),
        ("fingerprint", pa.binary(_BANDS * _FRAMES)),
    ]
)


@dataclass(frozen=True, order=True)
class Finding:
    """Damage: a file, what is wrong with it, and what to do."""

    path: str  # under the extraction's folder
    kind: str  # commit, missing, hash, unreadable, schema, digest, ids, record, twice, orphan or temporary
    detail: str


@dataclass(frozen=True, order=True)
class Pair:
    """Two clips of different splits that share something."""

    kind: str  # exact: the same excerpt of the same bytes; near: the same sound; source: other excerpts of one source
    one: str  # segment_id
    one_split: str
    other: str
    other_split: str
    similarity: float = 1.0


@dataclass
class Report:
    """What a part of the audit has to say."""

    counts: Counts = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def add_reports(parts: Iterable[Report]) -> Report:
    """Put reports together."""
    total = Report()
    for part in parts:
        total.counts.update(part.counts)
        total.findings += part.findings
        total.pairs += part.pairs
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
    out: str, kind: str, file: DataFile, digest: str, standing: Container[str] = ()
) -> tuple[Report, pa.Table]:
    """Check one committed file of clips or rejections and count what is in it.

    Of rejections only those of `standing` ids count. Returns the report, and facts of the clips as
    a table of FACTS_SCHEMA. A damaged file gives one finding of each kind of damage, and no counts.
    """
    findings: list[Finding] = []
    counts: Counts = Counter()
    facts: list[dict[str, Any]] = []
    try:
        data = storage.read_bytes(storage.join(out, file.path))
    except FileNotFoundError:
        detail = f"is missing, and with it {len(file.ids)} segments; remove its commit record to have its shard redone"
        return Report(findings=[Finding(file.path, "missing", detail)]), FACTS_SCHEMA.empty_table()
    except OSError as error:
        return Report(findings=[Finding(file.path, "unreadable", str(error))]), FACTS_SCHEMA.empty_table()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        findings += _check_header(parquet, kind, file, digest)
        if not any(f.kind == "schema" for f in findings):
            if kind == "clips":
                found, counts, facts = _check_clips(parquet, file)
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
        return Report(findings=findings), FACTS_SCHEMA.empty_table()
    return Report(counts), pa.Table.from_pylist(facts, schema=FACTS_SCHEMA)


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
    return list(_check_records(file, rejections, [r.segment_id for r in rejections])), counts


def _check_clips(parquet: pq.ParquetFile, file: DataFile) -> tuple[list[Finding], Counts, list[dict[str, Any]]]:
    counts: Counts = Counter()
    facts: list[dict[str, Any]] = []
    findings: list[Finding] = []
    ids: list[str] = []
    configuration = json.loads((parquet.schema_arrow.metadata or {})[b"avsep.configuration"])
    labels = label_config(configuration["labeller"], configuration["looks"])
    seconds_a_frame = frame_s(configuration)
    for group in range(parquet.num_row_groups):
        records = clips_from_table(parquet.read_row_group(group))
        ids += [r.segment_id for r in records]
        findings += _check_records(file, records)
        if not findings:
            for record in records:
                count_clip(record, counts, labels)
                print_ = fingerprint(record, seconds_a_frame)
                fact = {name: getattr(record, name) for name in FACTS_SCHEMA.names if name != "fingerprint"}
                facts.append({**fact, "fingerprint": None if print_ is None else print_.tobytes()})
    findings += _check_records(file, [], ids)
    return findings, counts, facts


def _check_records(
    file: DataFile, records: Sequence[ClipRecord | Rejection], ids: Sequence[str] | None = None
) -> Iterator[Finding]:
    if ids is not None and list(ids) != list(file.ids):
        wrong = sorted(set(ids) ^ set(file.ids)) or ["their order, or repeats"]
        yield Finding(file.path, "ids", f"holds other ids than its commit says: {_few(wrong)}")
    broken: dict[str, list[str]] = defaultdict(list)
    for record in records:
        try:
            validate(record)
            if isinstance(record, ClipRecord):
                _validate_measures(record)
        except ValueError as error:
            rule = str(error).removeprefix(f"{type(record).__name__} {record.segment_id!r}: ")
            broken[rule].append(record.segment_id)
    for rule, who in broken.items():
        yield Finding(file.path, "record", f"{rule} ({_few(who)}); remove its commit record to have its shard redone")


def _validate_measures(record: ClipRecord) -> None:
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


def chosen_labels(record: ClipRecord, labels: LabelConfig) -> tuple[str, ...] | None:
    """Return the weak labels that training takes: given ones, else the pictures'; None without either."""
    if record.labels is not None:
        return record.labels
    return seen_labels(record, labels)


def seen_labels(record: ClipRecord, labels: LabelConfig) -> tuple[str, ...] | None:
    """Return what the pictures show; None without logits."""
    if record.image_logits is None or not len(record.image_logits):
        return None
    hot = labels.choose(labels.scores(torch.from_numpy(record.image_logits.astype(np.float32))))
    return tuple(name for name, on in zip(OBJECT_NAMES, hot.tolist(), strict=True) if on)


def count_clip(record: ClipRecord, counts: Counts, config: LabelConfig) -> None:
    """Count one clip in every table of the card; `config` says how labels follow from the pictures."""
    counts["clips", record.split] += 1
    counts["label_source", record.label_source] += 1
    counts["seconds", record.split] += round(record.duration_s)
    counts["duration", str(_bin(record.duration_s, DURATION_BINS_S))] += 1
    counts["level", str(_bin(record.rms_db, LEVEL_BINS_DB))] += 1
    labels, tags, seen = chosen_labels(record, config), record.objects, seen_labels(record, config)
    if not labels:
        counts["unlabelled", record.split] += 1
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


# ----------------------------------------------------------------------------------- duplicates


def frame_s(configuration: Mapping[str, Any]) -> float:
    """Return the seconds from one STFT frame to the next; ValueError where the configuration doesn't say."""
    try:
        stft = configuration["stft"]
        return stft["hop_length"] / stft["sample_rate"]
    except (KeyError, TypeError):
        raise ValueError("the configuration in it holds no stft") from None


def fingerprint(record: ClipRecord, seconds_a_frame: float) -> NDArray[np.int8] | None:
    """Draw a clip's sound coarsely: log energy in 12 bands every 0.2 s of its first 10 s, `(600,)` int8.

    Neither gain nor coding nor NMF's random start change it much, since it comes from the product
    of bases and activations and is measured against its own loudest band, then against its means.
    None for clips under 3 s, and for those in which nothing happens: they are alike without being the same.
    """
    if record.duration_s < _SHORTEST_S or seconds_a_frame > _FRAME_S:
        return None
    W, H = record.bases.astype(np.float32), record.activations.astype(np.float32)
    energy = _band_sums(W) @ H  # (bands, N)
    level = np.log(energy / max(energy.max(), 1e-30) + _FLOOR)
    step, window = (round(s / seconds_a_frame) for s in (_FRAME_S, _WINDOW_S))
    starts = np.arange(0, level.shape[1] - window + 1, step)[:_FRAMES]
    sums = np.concatenate([np.zeros((_BANDS, 1)), level.cumsum(1, dtype=np.float64)], 1)
    level = (sums[:, starts + window] - sums[:, starts]) / window
    if np.sqrt(np.var(level, axis=1).mean()) < _STILL:
        return None
    level = level - (level.mean(1, keepdims=True) + level.mean()) / 2  # how it sounds counts, how it moves more
    drawn = np.zeros((_BANDS, _FRAMES), np.float32)
    drawn[:, : len(starts)] = level
    return np.round(drawn * (127 / np.abs(drawn).max())).astype(np.int8).reshape(-1)


def _band_sums(W: NDArray[np.float32], highest_hz: float = 24_000.0) -> NDArray[np.float32]:
    edges = np.geomspace(_LOW_HZ, _HIGH_HZ, _BANDS + 1) / highest_hz * (len(W) - 1)
    starts = np.round(edges).astype(int)
    return np.stack([W[a : max(b, a + 1)].sum(0) for a, b in pairwise(starts)])


def _drawings(facts: pa.Table) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return (rows that have a fingerprint, their fingerprints `(n, bands, frames)`)."""
    column = facts.column("fingerprint").combine_chunks()
    rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    flat = np.frombuffer(b"".join(column.take(pa.array(rows)).to_pylist()), np.int8)
    return rows, flat.reshape(len(rows), _BANDS, _FRAMES).astype(np.float32)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = x.reshape(len(x), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _moved(x: NDArray[np.float32], shift: int) -> NDArray[np.float32]:
    moved = np.zeros_like(x)
    moved[:, :, max(0, shift) : _FRAMES + min(0, shift)] = x[:, :, max(0, -shift) : _FRAMES - max(0, shift)]
    return moved


def near_duplicates(facts: pa.Table, held_out: pa.Table) -> list[Pair]:
    """Find the clips of `held_out` (splits val and test) that sound like a clip of another split in `facts`.

    Every pair is compared, at shifts of up to 0.8 s: the similarity is the correlation of the two
    fingerprints. A pair of two held-out clips is found from one side.
    """
    pairs = []
    rows, drawings = _drawings(facts)
    held_rows, held = _drawings(held_out)
    if not len(rows) or not len(held_rows):
        return []
    a = facts.select(["segment_id", "split", "media_sha256"]).to_pydict()
    b = held_out.select(["segment_id", "split", "media_sha256"]).to_pydict()
    here = _unit(drawings).T
    best = np.full((len(held), here.shape[1]), -1.0, np.float32)
    for shift in range(-_SHIFT, _SHIFT + 1):
        moved = _moved(held, shift)
        np.maximum(best, _unit(moved) @ here, out=best)
        if shift < _SHIFT:  # and by half a frame
            np.maximum(best, _unit(moved + _moved(held, shift + 1)) @ here, out=best)
    for i, j in np.argwhere(best >= NEAR):
        p, q = int(held_rows[i]), int(rows[j])
        one, other = (b["split"][p], b["segment_id"][p]), (a["split"][q], a["segment_id"][q])
        twice = other[0] in ("val", "test") and one < other  # met again from the other side
        if one[0] != other[0] and not twice and b["media_sha256"][p] != a["media_sha256"][q]:
            pairs.append(Pair("near", one[1], one[0], other[1], other[0], round(float(best[i, j]), 3)))
    return pairs


def shared_media(what: str, facts: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Find pairs of clips in different splits among those of equal `sha256`, or equal `source`.

    `exact`: the same excerpt (media in a store are one excerpt a file); `source`: others. Of a large
    group the first thousand pairs come back.
    """
    found: list[Pair] = []
    for n, one in enumerate(facts):
        for other in facts[:n]:
            same_bytes = one["media_sha256"] == other["media_sha256"]
            if one["split"] == other["split"] or (what == "source" and same_bytes):  # these come by their bytes
                continue
            overlap = min(_end(one), _end(other)) > max(one["start_s"], other["start_s"])
            remote = fetch.is_remote(Segment("", one["source"]))
            a, b = sorted((one, other), key=lambda f: -SPLITS.index(f["split"]))
            kind = "exact" if same_bytes and (remote or overlap) else "source"
            found.append(Pair(kind, a["segment_id"], a["split"], b["segment_id"], b["split"]))
            if len(found) == _PAIRS_A_GROUP:
                return found
    return found


def _end(fact: Mapping[str, Any]) -> float:
    return math.inf if fact["end_s"] is None else fact["end_s"]


# --------------------------------------------------------------------------------------- card


def summarize(report: Report, configuration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arrange a whole report for the card."""
    counts = report.counts

    def histogram(name: str, edges: NDArray) -> dict[str, Any]:
        return {
            "edges": [float(e) if math.isfinite(e) else None for e in edges],
            "counts": [counts[name, str(i)] for i in range(len(edges) - 1)],
        }

    agreement: dict[str, Any] = {}
    for source in ("pictures", "given"):
        if counts["compared", source]:
            agreement[source] = {"clips": counts["compared", source], "objects": {}}
            for name in OBJECT_NAMES:
                both, label, tag = (counts["agreement", source, name, o] for o in ("both", "label", "tag"))
                if both + label + tag:
                    agreement[source]["objects"][name] = {
                        "both": both,
                        "label_only": label,
                        "tag_only": tag,
                        "precision": both / (both + label) if both + label else None,
                        "recall": both / (both + tag) if both + tag else None,
                    }
    return {
        "schema_version": SCHEMA_VERSION,
        "configuration": configuration,
        "clips": by_split(counts, "clips"),
        "hours": {split: round(n / 3600, 2) for split, n in by_split(counts, "seconds").items()},
        "rejections": dict(sorted(under(counts, "rejected").items(), key=lambda kv: -kv[1])),
        "rejections_by_stage": under(counts, "rejected_at"),
        "label_source": under(counts, "label_source"),
        "unlabelled": by_split(counts, "unlabelled"),
        **by_object(counts),
        "agreement": agreement,
        "duration_s": histogram("duration", DURATION_BINS_S),
        "rms_db": histogram("level", LEVEL_BINS_DB),
        "duplicates": [asdict(p) for p in sorted(report.pairs)],
        "damage": [asdict(f) for f in sorted(report.findings)],
    }


def markdown(card: Mapping[str, Any], title: str) -> str:
    """Write the card for people; plots are named as `pipelines.audit` saves them."""
    n_clips, n_rejected = sum(card["clips"].values()), sum(card["rejections"].values())
    hours = sum(card["hours"].values())
    lines = [f"# {title}", "", f"{n_clips:,} clips, {hours:,.2f} hours, and {n_rejected:,} rejected segments.", ""]

    def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        rows = list(rows)
        if rows:
            lines.extend(["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)])
            lines.extend("| " + " | ".join(_cell(c) for c in row) + " |" for row in rows)
            lines.append("")

    lines += ["## Integrity", ""]
    if card["damage"]:
        lines += [f"**{len(card['damage'])} findings.**", ""]
        table(("file", "kind", "what"), ((f"`{f['path']}`", f["kind"], f["detail"]) for f in card["damage"]))
    else:
        lines += ["Every commit record, hash, schema and record is as it should be.", ""]
    lines += ["## Splits", ""]
    table(
        ("split", "clips", "hours", "without a label"),
        ((s, card["clips"][s], card["hours"][s], card["unlabelled"][s]) for s in SPLITS),
    )
    lines += ["## Objects", "", "Clips by weak label (what training takes), and by tag (`objects`).", ""]
    table(
        ("object", *(f"label, {s}" for s in SPLITS), *(f"tag, {s}" for s in SPLITS)),
        (
            (name, *(card["labels"][name][s] for s in SPLITS), *(card["objects"][name][s] for s in SPLITS))
            for name in OBJECT_NAMES
            if any(card["labels"][name].values()) or any(card["objects"][name].values())
        ),
    )
    lines += ["![Labels that occur together](cooccurrence.png)", ""]
    for source, found in card["agreement"].items():
        what = {"pictures": "the pictures' labels", "given": "the given labels"}[source]
        lines += [f"## Agreement of {what} with the tags", "", f"Over {found['clips']:,} clips that have both.", ""]
        table(
            ("object", "both", "label only", "tag only", "precision", "recall"),
            (
                (n, o["both"], o["label_only"], o["tag_only"], o["precision"], o["recall"])
                for n, o in found["objects"].items()
            ),
        )
    lines += ["## Duplicates across splits", ""]
    kinds = Counter(p["kind"] for p in card["duplicates"])
    said = {
        "exact": "the same excerpt of the same file",
        "near": f"the same sound (similarity from {NEAR:g})",
        "source": "other excerpts of one source",
    }
    lines += [f"- {text}: {kinds[kind]:,}" for kind, text in said.items()]
    lines.append("")
    table(
        ("kind", "clip", "split", "clip", "split", "similarity"),
        (
            (p["kind"], p["one"], p["one_split"], p["other"], p["other_split"], p["similarity"])
            for p in card["duplicates"][:100]
        ),
    )
    if len(card["duplicates"]) > 100:
        lines += [f"… and {len(card['duplicates']) - 100:,} more in card.json.", ""]
    lines += ["## Rejections", "", *([] if card["rejections"] else ["None.", ""])]
    total = max(1, n_clips + n_rejected)
    table(("reason", "segments", "share"), ((r, n, f"{n / total:.1%}") for r, n in card["rejections"].items()))
    lines += ["## Level and duration", "", "![Level and duration](distributions.png)", ""]
    if card["configuration"]:
        written = json.dumps(card["configuration"], indent=1, sort_keys=True)
        lines += ["## Configuration", "", "```json", written, "```", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
