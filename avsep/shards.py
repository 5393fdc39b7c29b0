"""Which segment is in which shard; writing, committing and reading shards exactly once.

    OUT/clips/SHARD-gG-HASH.parquet        the clips of one shard's generation G
    OUT/rejections/SHARD-gG-HASH.parquet   its rejections
    OUT/commits/SHARD-gG.json              what counts: readers trust commit records only

A data file is named by its content, written under a temporary name, read back and renamed
before the commit record that names it appears. So a process killed anywhere leaves at most a
file that no commit names, and two processes that do the same shard leave one commit.

A commit record also says what was asked for, so that a segment whose row in the table changed is
told from one that is done. Its shard's next generation then holds the whole shard and replaces the
earlier ones: readers pass these over, and `sweep` deletes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from avsep import storage
from avsep.objects import Vocabulary
from avsep.records import (
    SCHEMA_VERSION,
    SEGMENT_SCHEMA,
    ClipRecord,
    Rejection,
    Segment,
    clips_from_table,
    clips_to_table,
    definition,
    rejections_to_table,
    segment_of,
    validate,
)

LOCK_FILE = "extract.lock"  # under OUT, while a driver is at work
_DATA_FILE = re.compile(r"(?P<shard>.+)-g(?P<generation>\d+)-[0-9a-f]{12}\.parquet")
_COMMIT_FILE = re.compile(r"(?P<shard>.+)-g(?P<generation>\d+)\.json")
ROW_GROUP_BYTES = 32 << 20
_READERS = 16  # files read at a time


@dataclass(frozen=True)
class Shard:
    """The segments that one task extracts and commits together."""

    name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class DataFile:
    """A committed Parquet file: its name under OUT, content hash and ids."""

    path: str
    sha256: str
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Commit:
    """One generation of one shard, finished; its `rejections` supersede those of earlier generations."""

    shard: str
    generation: int
    digest: str  # of the extraction's configuration
    clips: DataFile | None
    rejections: DataFile | None
    timings_s: dict[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    retried: tuple[str, ...] = ()  # ids that were rejected before, perhaps in another shard
    replaces: bool = False  # it holds the whole shard: earlier generations no longer count
    asked: dict[str, str] = field(default_factory=dict)  # id → `records.definition` of its segment

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """Ids of the segments that became clips in this generation."""
        return self.clips.ids if self.clips else ()

    @property
    def rejection_ids(self) -> tuple[str, ...]:
        """Ids of the segments that this generation rejected."""
        return self.rejections.ids if self.rejections else ()


def default_shard_size(n_segments: int) -> int:
    """Choose segments a shard from the manifest's size: small sets spread over workers, large ones
    make files of tens of megabytes.

    >>> default_shard_size(100), default_shard_size(190_000)
    (8, 256)
    """
    return 8 if n_segments <= 256 else 32 if n_segments <= 10_000 else 256


def plan(segments: Sequence[Segment], shard_size: int | None = None) -> list[Shard]:
    """Divide segments into shards; which is where follows from the segments alone.

    They are ordered by a hash of their ids, so that every shard is a random sample. A shard's name holds a hash of the
    ids in it: a changed manifest can't reuse a name.

    >>> [len(s.segments) for s in plan([Segment(str(i), f"{i}.mp4") for i in range(20)])]
    [8, 8, 4]
    """
    size = shard_size or default_shard_size(len(segments))
    ordered = sorted(segments, key=lambda s: (_hash(s.segment_id), s.segment_id))
    shards = []
    for number, start in enumerate(range(0, len(ordered), size)):
        part = tuple(ordered[start : start + size])
        shards.append(Shard(f"{number:05d}-{_hash(*(s.segment_id for s in part))[:8]}", part))
    return shards


def write_shard(
    out: str,
    shard: str,
    generation: int,
    clips: Sequence[ClipRecord],
    rejections: Sequence[Rejection],
    *,
    configuration: dict[str, Any],
    shape: tuple[int, int],
    timings_s: dict[str, float] | None = None,
    retried: Sequence[str] = (),
    replaces: bool = False,
    asked: Mapping[str, str] | None = None,
) -> Commit:
    """Write one generation of a shard and commit it; return the commit that stands.

    When another process has committed the same generation, its commit stands and comes back.

    Args:
        out: the extraction's folder or URI.
        configuration: what the records were made with (`factors.DataConfig.as_dict`), stored in each file.
        shape: (F, M) of the bases.
        retried: those of the segments that were rejected before.
        replaces: clips and rejections are all of the shard's: earlier generations no longer count.
        asked: the definitions of the rejected segments, by id; clips hold their own.

    Raises:
        ValueError: a record breaks its contract, or an id is there twice.
        OSError: the disk is full, a file read back differs, …; nothing is committed then.
    """
    everything: list[ClipRecord | Rejection] = [*clips, *rejections]
    ids = [r.segment_id for r in everything]
    if len(set(ids)) != len(ids):
        raise ValueError(f"shard {shard}: a segment is there twice among {len(ids)}")
    vocabulary = Vocabulary.from_list(configuration["vocabulary"])
    for record in everything:
        validate(record, vocabulary)
    return commit_shard(
        out,
        shard,
        generation,
        clips_to_table(clips, *shape) if clips else None,
        rejections,
        configuration=configuration,
        timings_s=timings_s,
        retried=retried,
        replaces=replaces,
        asked={**(asked or {}), **{c.segment_id: definition(c) for c in clips}},
    )


def commit_shard(
    out: str,
    shard: str,
    generation: int,
    done: pa.Table | None,
    rejections: Sequence[Rejection],
    *,
    configuration: dict[str, Any],
    kind: str = "clips",
    key: str = "segment_id",
    timings_s: dict[str, float] | None = None,
    retried: Sequence[str] = (),
    replaces: bool = False,
    asked: Mapping[str, str] | None = None,
) -> Commit:
    """Write what was `done` of a shard's generation to OUT/`kind`, and commit it, as `write_shard` does clips.

    `done` has one or more rows per segment, whose ids are its column `key`. `configuration` is JSON-able.
    """
    digest = configuration_digest(configuration)
    metadata = {
        b"avsep.schema_version": str(SCHEMA_VERSION).encode(),
        b"avsep.configuration": json.dumps(configuration, sort_keys=True).encode(),
        b"avsep.digest": digest.encode(),
    }
    stem = f"{shard}-g{generation}"
    commit = Commit(
        shard,
        generation,
        digest,
        _write_table(out, kind, stem, done, metadata, key) if done is not None else None,
        _write_table(out, "rejections", stem, rejections_to_table(rejections), metadata) if rejections else None,
        timings_s or {},
        retried=tuple(retried),
        replaces=replaces,
        asked=dict(asked or {}),
    )
    path = storage.join(out, "commits", f"{stem}.json")
    storage.write_bytes(path, json.dumps(asdict(commit), indent=1).encode(), exclusive=True)
    standing = read_commit(path)
    _withdraw(out, commit, standing)
    return standing


def _write_table(
    out: str, kind: str, stem: str, table: pa.Table, metadata: dict[bytes, bytes], key: str = "segment_id"
) -> DataFile:
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    sink = io.BytesIO()
    rows = max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
    # no dictionaries: float16 values repeat without saving room, and would be read three times as slowly
    pq.write_table(table, sink, row_group_size=rows, compression="zstd", use_dictionary=False)
    data = sink.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{kind}/{stem}-{sha256[:12]}.parquet"
    storage.write_bytes(storage.join(out, path), data)
    back = storage.read_bytes(storage.join(out, path))
    if hashlib.sha256(back).hexdigest() != sha256 or pq.read_metadata(io.BytesIO(back)).num_rows != len(table):
        raise OSError(f"{storage.join(out, path)} reads back differently from what was written: check the disk")
    return DataFile(path, sha256, tuple(dict.fromkeys(table.column(key).to_pylist())))


def _withdraw(out: str, mine: Commit, standing: Commit) -> None:
    """Delete files of mine that a twin's standing commit doesn't name; never a twin's, who may be about to commit."""
    named = {f.path for f in (standing.clips, standing.rejections) if f}
    for f in (mine.clips, mine.rejections):
        if f and f.path not in named:
            storage.delete_file(storage.join(out, f.path))


def sweep(out: str, commits: Iterable[Commit], kinds: Sequence[str] = ("clips", "rejections")) -> list[str]:
    """Delete what killed writers left: temporary files, and data files that no commit will ever name.

    Where a generation's commit doesn't name a data file, the file is a loser's. Where a generation has no commit, its
    files may be a live writer's, and are left until they are old. What a later generation replaced goes, too, its
    commit record last. Returns the names.
    """
    commits = list(commits)
    named = {(c.shard, c.generation): {f.path for f in (c.clips, c.rejections) if f} for c in commits}
    replaced = _replaced(commits)
    swept = storage.sweep(storage.join(out, "commits"))
    for kind in kinds:
        swept += storage.sweep(storage.join(out, kind))
        for info in storage.infos(storage.join(out, kind)):
            match = _DATA_FILE.fullmatch(info.base_name)
            if not match or info.type != pafs.FileType.File:
                continue
            generation = int(match["generation"])
            used = named.get((match["shard"], generation))
            lost = used is not None or generation < replaced.get(match["shard"], 0)
            if (lost or storage.is_older(info, storage.ABANDONED_S)) and f"{kind}/{info.base_name}" not in (used or ()):
                storage.delete_file(storage.join(out, kind, info.base_name))
                swept.append(f"{kind}/{info.base_name}")
    for path in storage.list_files(storage.join(out, "commits")):
        match = _COMMIT_FILE.fullmatch(storage.name(path))
        if match and int(match["generation"]) < replaced.get(match["shard"], 0):
            storage.delete_file(path)
            swept.append(f"commits/{storage.name(path)}")
    return swept


def standing(commits: Iterable[Commit]) -> list[Commit]:
    """Leave out the commits that a later generation of their shard replaces."""
    commits = list(commits)
    replaced = _replaced(commits)
    return [c for c in commits if c.generation >= replaced.get(c.shard, 0)]


def _replaced(commits: Iterable[Commit]) -> dict[str, int]:
    """Map shards to their last generation that replaces all before."""
    replaced: dict[str, int] = {}
    for c in commits:
        if c.replaces:
            replaced[c.shard] = max(c.generation, replaced.get(c.shard, 0))
    return replaced


def configuration_digest(configuration: dict[str, Any]) -> str:
    """Return a short hash of a JSON-able configuration.

    >>> configuration_digest({"a": 1, "b": 2}) == configuration_digest({"b": 2, "a": 1})
    True
    """
    return _hash(json.dumps(configuration, sort_keys=True))[:16]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_commits(out: storage.AnyPath) -> list[Commit]:
    """Read the commit records that stand, ordered by shard and generation; [] where nothing is committed.

    Raises ValueError for shards that another version of this program wrote.
    """
    paths = [path for path in storage.list_files(storage.join(out, "commits")) if path.endswith(".json")]
    with ThreadPoolExecutor(_READERS) as pool:  # an object store takes its time for each
        commits = list(pool.map(read_commit, paths))
    if others := {c.schema_version for c in commits} - {SCHEMA_VERSION}:
        raise ValueError(
            f"the shards in {out} are of schema version {min(others)}, this program's are of {SCHEMA_VERSION}: "
            "extract the clips again, to another folder"
        )
    return sorted(standing(commits), key=lambda c: (c.shard, c.generation))


def read_commit(path: str) -> Commit:
    """Read one commit record; ValueError where it is none."""
    try:
        raw = json.loads(storage.read_bytes(path))
        for kind in ("clips", "rejections"):
            if raw[kind]:
                raw[kind] = DataFile(raw[kind]["path"], raw[kind]["sha256"], tuple(raw[kind]["ids"]))
        return Commit(**{**raw, "retried": tuple(raw.get("retried", ()))})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no commit record ({error}); remove it to have its shard done again") from None


def read_ids(out: storage.AnyPath) -> tuple[list[str], list[str]]:
    """Return (clip ids, rejection ids) of everything committed, each sorted; both empty where nothing is.

    An id that a later generation turned into a clip is no rejection any more.
    """
    commits = read_commits(out)
    clips = [i for c in commits for i in c.clip_ids]
    return sorted(clips), sorted(set(_latest_rejections(commits)) - set(clips))


@dataclass(frozen=True)
class State:
    """What is committed, read once."""

    commits: list[Commit]
    clip_ids: frozenset[str]
    rejections: dict[str, Rejection]  # those that stand, by segment_id

    def changed_rejections(self, segments: Iterable[Segment]) -> set[str]:
        """Return the ids of rejected segments that ask for something else by now."""
        asked: dict[str, str] = {}
        for c in sorted(self.commits, key=lambda c: c.generation):
            asked |= {i: c.asked[i] for i in c.rejection_ids if i in c.asked}
        rejected = (s for s in segments if s.segment_id in self.rejections and s.segment_id in asked)
        return {s.segment_id for s in rejected if asked[s.segment_id] != definition(s)}


def read_state(out: storage.AnyPath) -> State:
    """Read every commit record, and the rejections that stand."""
    commits = read_commits(out)
    files = rejection_files(commits)

    def read(item: tuple[str, set[str]]) -> list[Rejection]:
        with storage.open_input(storage.join(out, item[0])) as f:
            return [Rejection(**row) for row in pq.read_table(f).to_pylist() if row["segment_id"] in item[1]]

    with ThreadPoolExecutor(_READERS) as pool:
        found = {r.segment_id: r for part in pool.map(read, sorted(files.items())) for r in part}
    return State(commits, frozenset(i for c in commits for i in c.clip_ids), {i: found[i] for i in sorted(found)})


def changed_clips(out: storage.AnyPath, commits: Iterable[Commit], segments: Iterable[Segment]) -> dict[str, Segment]:
    """Map the ids of clips whose segments ask for something else by now to what was asked for then.

    Where a commit says that nothing differs, its files aren't opened; else their columns but bases are read.
    """
    wanted = {s.segment_id: s for s in segments}

    def read(commit: Commit) -> list[Segment]:
        differ = {i for i in commit.clip_ids if i in wanted and commit.asked.get(i) != definition(wanted[i])}
        if not commit.clips or not differ:
            return []
        rows = read_table(storage.join(out, commit.clips.path), SEGMENT_SCHEMA.names).to_pylist()
        return [segment for segment in map(segment_of, rows) if segment.segment_id in differ]

    with ThreadPoolExecutor(_READERS) as pool:
        then = [s for part in pool.map(read, commits) for s in part]
    return {s.segment_id: s for s in then if s != wanted[s.segment_id]}


def without_logits(out: storage.AnyPath, commits: Iterable[Commit], ids: Set[str]) -> set[str]:
    """Return those of some clips that no picture network has seen."""
    found: set[str] = set()
    for c in commits:
        if c.clips and not ids.isdisjoint(c.clip_ids):
            table = read_table(storage.join(out, c.clips.path), ["segment_id", "image_logits"])
            unseen = table.filter(pc.is_null(table.column("image_logits")))
            found |= ids & set(unseen.column("segment_id").to_pylist())
    return found


def newer_media(
    out: storage.AnyPath, commits: Iterable[Commit], segments: Iterable[Segment], *, rejected: bool = False
) -> set[str]:
    """Return the ids of clips whose local media file was written after their commit; URIs aren't looked at.

    With `rejected`, those of rejections, too.
    """
    written = {i.base_name: i.mtime_ns for i in storage.infos(storage.join(out, "commits"))}
    committed = {
        i: written.get(f"{c.shard}-g{c.generation}.json")
        for c in sorted(commits, key=lambda c: c.generation)
        for i in (*c.clip_ids, *(c.rejection_ids if rejected else ()))
    }
    now, newer = time.time_ns(), set()
    for s in segments:
        if (then := committed.get(s.segment_id)) is None or storage.is_uri(s.source):
            continue
        with contextlib.suppress(OSError):  # one that is gone doesn't undo the clip
            if then < os.stat(s.source).st_mtime_ns <= now:
                newer.add(s.segment_id)
    return newer


def rejection_files(commits: Iterable[Commit]) -> dict[str, set[str]]:
    """Map each file with rejections that stand to the ids of those."""
    commits = list(commits)
    clips = {i for c in commits for i in c.clip_ids}
    files: dict[str, set[str]] = {}
    for i, file in _latest_rejections(commits).items():
        if i not in clips:
            files.setdefault(file.path, set()).add(i)
    return files


def _latest_rejections(commits: Iterable[Commit]) -> dict[str, DataFile]:
    """Map each rejected id to the file of its shard's last generation; of several shards, to that of the highest."""
    last = {c.shard: c for c in commits}  # commits come in order of generation
    ordered = sorted(last.values(), key=lambda c: c.generation)
    return {i: c.rejections for c in ordered if c.rejections for i in c.rejections.ids}


def read_rejections(out: storage.AnyPath) -> list[Rejection]:
    """Read the rejections that stand, in order of their ids."""
    return list(read_state(out).rejections.values())


def clip_files(out: storage.AnyPath) -> list[str]:
    """List the committed clip files, as paths; ValueError where nothing is committed."""
    files = [storage.join(out, c.clips.path) for c in read_commits(out) if c.clips]
    if not files:
        raise ValueError(f"{out} holds no committed clips; run pipelines.extract to it first")
    return files


def read_table(path: str, columns: Sequence[str] | None = None, without: Set[str] = frozenset()) -> pa.Table:
    """Read one clip file, or some of its columns, but for the clips of some ids.

    Raises OSError, with the remedy, when it is missing or damaged.
    """
    needed = None if columns is None else [*columns, *({"segment_id"} - set(columns) if without else ())]
    with _opened(path) as f:
        table = pq.read_table(f, columns=needed)
    if without:
        table = table.filter([i not in without for i in table.column("segment_id").to_pylist()])
    return table if columns is None else table.select(list(columns))


@contextlib.contextmanager
def open_table(path: str) -> Iterator[pq.ParquetFile]:
    """Open one clip file to read some of its row groups; OSError as `read_table`, also for what is read within."""
    with _opened(path) as f:
        yield pq.ParquetFile(f)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pa.NativeFile]:
    try:
        with storage.open_input(path) as f:
            yield f
    except (OSError, pa.ArrowInvalid) as error:
        raise OSError(f"{path} is missing or damaged ({error}); pipelines.audit says what to do") from None


def read_clips(out: storage.AnyPath, *, split: str | None = None) -> Iterator[ClipRecord]:
    """Iterate over committed clips, one file in memory at a time."""
    for path in clip_files(out):
        for record in clips_from_table(read_table(path)):
            if split is None or record.split == split:
                yield record


def read_configuration(out: storage.AnyPath) -> dict[str, Any]:
    """Return the configuration that a folder's clips were extracted with."""
    return configuration_in(clip_files(out)[0])


def configuration_in(path: str) -> dict[str, Any]:
    """Return the configuration that the clips of one file were extracted with."""
    with storage.open_input(path) as f:
        return json.loads(pq.read_schema(f).metadata[b"avsep.configuration"])
