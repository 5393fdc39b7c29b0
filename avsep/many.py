"""Many files to separate: which, under what names; the work on a shard of them; the tables of what became of them.

    OUT/NAME/…                 one file's sounds and report, as `avsep separate` writes them
    OUT/results.parquet        a row per file and object, made from the commits at the end
    OUT/rejections.parquet     a row per file that can't be separated, likewise
    OUT/_shards/               what counts: commits with their rows, as `avsep.shards` writes them
    OUT/_shards/files.parquet  every file that was asked for, and its name, which it keeps

A file that is being separated when its worker is killed is separated again; it has its row once its shard is committed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile

from avsep import commands, inputs, media, shards, starter, storage
from avsep.extraction import Done
from avsep.factors import Factorize
from avsep.files import NO_LIMITS
from avsep.model import LABELLER_FILE, fingerprint
from avsep.objects import Vocabulary
from avsep.outputs import Output
from avsep.records import (
    REJECTION_SCHEMA,
    SEGMENT_SCHEMA,
    ClipError,
    Reason,
    Rejection,
    Segment,
    check_vocabularies,
    definition,
    read_segments,
    read_vocabulary,
    segment_of,
    segments_to_table,
)
from avsep.stages import Label
from avsep.videos import VideoSeparator
from avsep.work import Changes, Work

LOCK_FILE, STATUS_FILE = "separate.lock", "status.json"
RESULTS, REJECTIONS = "results.parquet", "rejections.parquet"
KINDS = ("results", "rejections")  # of committed tables
_SHARDS, _FILES = "_shards", "files.parquet"
_RESERVED = (_SHARDS, LOCK_FILE, STATUS_FILE, RESULTS, REJECTIONS)  # names in OUT that no file gets
_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_STAGES = {"decode_s": "decode", "look_s": "label", "listen_s": "factorize", "separate_s": "separate"}
_FULL_HEIGHT = 4320  # pixels of an excerpt's pictures, where they are written


@dataclass(frozen=True)
class Result:
    """One object of a separated file. A file in which no object was found has one row, without an object."""

    folder: str  # in OUT: the file's name, or its row's segment_id
    file: str  # a path or URI
    start_s: float  # of the excerpt
    end_s: float | None  # null: the file's end
    object: str | None  # null: none was found, and all columns that speak of it
    sound: str | None  # its file in the folder; null where it isn't written
    rest: str  # the file of all that is left
    share: float | None  # of the file's sound, as the model hears it
    confidence: float | None  # that it sounds
    silent: bool | None  # asked for or seen, and not heard
    found_from: str | None  # given, pictures or sound
    familiarity: float | None  # how like the training its sound is
    picture_score: float | None  # null: no picture was looked at
    visible: bool | None  # likewise
    doubt: str  # why it may not be what it is called
    duration_s: float
    sample_rate: int  # Hz
    channels: int
    labeller: str | None  # the picture network, where it saw pictures
    note: str  # what of the file couldn't be used


_ARROW = {"str": pa.string(), "float": pa.float64(), "bool": pa.bool_(), "int": pa.int32()}
RESULT_SCHEMA = pa.schema([
    pa.field(f.name, _ARROW[str(f.type).split()[0]], nullable="None" in str(f.type)) for f in fields(Result)
])  # fmt: skip
REJECTED_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    *(SEGMENT_SCHEMA.field(name).with_name("file" if name == "source" else name)
      for name in ("source", "start_s", "end_s")),
    *(field for field in REJECTION_SCHEMA if field.name != "segment_id"),
])  # fmt: skip


@dataclass(frozen=True)
class Separations:
    """What the files of one run have in common."""

    out: str
    model: str
    weights: str | None
    objects: tuple[str, ...] | None  # of rows that name none, and of files
    track: int
    output: Output
    configuration: dict[str, Any]  # argument → what it says, or a hash of what it names

    @property
    def root(self) -> str:
        """The folder of the commits, which `avsep.shards` knows as an extraction's."""
        return _root(self.out)

    def separator(self) -> VideoSeparator:
        """Return the model and its picture network, loaded once in each process.

        Raises ValueError where they aren't those of the configuration.
        """
        loaded = load(self.model, self.weights, self.configuration["--model"])
        if (seen := _pictures(loaded)) != (mine := self.configuration["--weights"]):
            raise ValueError(f"workers have another picture network ({seen}, not {mine}); give one with --weights")
        return loaded

    def labeller_weights(self) -> str | None:
        """Return the file of the picture network's weights; None: published ones."""
        own = storage.join(self.model, LABELLER_FILE)
        return self.weights or (own if storage.exists(own) else None)


def _root(out: str) -> str:
    return storage.join(out, _SHARDS)


def prepare(
    out: str, model: str | None, weights: str | None, objects: str | None, track: int, output: Output
) -> Separations:
    """Load the model, and say what a run is made with; names of objects are those that people type.

    Raises ValueError for unknown objects, and what `VideoSeparator.load` raises.
    """
    model = starter.PATH if model is None else model
    sha256 = fingerprint(model)
    loaded = load(model, weights, sha256)
    vocabulary = loaded.config.vocabulary
    names = None if objects is None else tuple(commands.object_names(objects, vocabulary))
    if output.two_stems is not None:
        output = replace(output, two_stems=vocabulary.find(output.two_stems))
    configuration = {
        "--model": sha256,
        "--weights": _pictures(loaded),
        "--objects": None if names is None else list(names),
        "--track": track,
        "--format": output.format,
        "--mono": output.mono,
        "--two-stems": output.two_stems,
        "--video": output.video,
    }
    return Separations(out, model, weights, names, track, output, configuration)


def _pictures(loaded: VideoSeparator) -> str:
    """Return the SHA-256 of the picture network, or why there is none."""
    return loaded.labeller if isinstance(loaded.labeller, str) else loaded.labeller.sha256


@functools.lru_cache(maxsize=1)
def load(model: str, weights: str | None, sha256: str) -> VideoSeparator:
    """Load a model and its picture network, once in each process; ValueError where it isn't that of `sha256`."""
    if fingerprint(model) != sha256:
        raise ValueError(f"the model in {model} has been replaced; run the same command again, with another --out")
    loaded = VideoSeparator.load(model, weights, NO_LIMITS)
    _ = loaded.labeller
    return loaded


# -------------------------------------------------------------------------------------------------- which files


def find(
    named: Sequence[str], objects: tuple[str, ...] | None, vocabulary: Vocabulary, tell: Callable[[str], None]
) -> tuple[list[Segment], list[str]]:
    """Find what paths, folders, patterns and tables name: rows of tables, and files, sorted.

    Files are absolute paths or URIs. Rows without objects get `objects`. Raises FileNotFoundError where
    nothing is found, ValueError for a table that can't be used.
    """
    named = [text if storage.is_uri(text) else os.path.expanduser(text) for text in named]
    read = [text for text in named if _is_manifest(text)]
    found, left_out = inputs.find_files([text for text in named if text not in read])
    if left_out:
        tell(inputs.describe_left_out(left_out))
    read += [f for f in found if f.lower().endswith(_TABLES)]
    rows: dict[str, Segment] = {}
    for table in read:
        check_vocabularies(f"--videos {table}", read_vocabulary(table, vocabulary), "the model", vocabulary)
        for s in read_segments(table, tell, vocabulary):
            if s.segment_id in rows:
                raise ValueError(f"{table}: segment_id {s.segment_id!r} is in another table, too; give them apart")
            if s.segment_id in _RESERVED:
                raise ValueError(f"{table}: segment_id {s.segment_id!r} is a name of --out's own; give another")
            told = objects if s.objects is None else s.objects
            rows[s.segment_id] = replace(s, split="train", labels=None, objects=told)
    files = sorted({storage.resolve(f, ".") for f in found if f not in read})
    for file in files:
        if any("\udc80" <= c <= "\udcff" for c in file):
            raise ValueError(f"{file!r}: its name isn't UTF-8; rename it")
    if not rows and not files:
        raise FileNotFoundError(f"{', '.join(read)} holds no rows; name files, folders, patterns or tables")
    return list(rows.values()), files


def _is_manifest(path: str) -> bool:
    """Tell a folder that `pipelines.manifest` wrote."""
    if path.startswith(("http://", "https://")) or storage.is_opaque(path):
        return False
    if not (storage.is_directory(path) if storage.is_uri(path) else os.path.isdir(path)):
        return False
    names = map(storage.name, storage.list_files(path))
    return any(name.startswith("segments") and name.endswith(".parquet") for name in names)


def name_files(
    files: Sequence[str], rows: Sequence[Segment], objects: tuple[str, ...] | None, before: Mapping[str, Segment]
) -> list[Segment]:
    """Return rows, and files as segments: each file's id is the name of its folder in OUT.

    `before` are all that were ever asked for in OUT: a file of them keeps its name, and no other file gets it. So a
    file's name follows from the files' paths, whatever was killed when.
    """
    kept = {
        s.source: i for i, s in before.items() if replace(s, segment_id="") == Segment("", s.source, objects=objects)
    }
    ids = {s.segment_id for s in rows}
    known = {f: kept[f] for f in files if f in kept and kept[f] not in ids}
    taken = {*_RESERVED, *ids, *before}
    names = dict(zip(new := [f for f in files if f not in known], inputs.distinct(new, taken), strict=True))
    return [*rows, *(Segment((known | names)[f], f, objects=objects) for f in files)]


def read_files(out: str) -> dict[str, Segment]:
    """Read which files were ever asked for, by name; {} where none was."""
    path = storage.join(_root(out), _FILES)
    if not storage.exists(path):
        return {}
    with storage.open_input(path) as f:
        return {s.segment_id: s for s in map(segment_of, pq.read_table(f).to_pylist())}


def remember_files(out: str, segments: Iterable[Segment], before: Mapping[str, Segment]) -> dict[str, Segment]:
    """Keep the files that are asked for now, beside those of before; return all of them."""
    everything = {**before, **{s.segment_id: s for s in segments}}
    if everything != before:
        _write(storage.join(_root(out), _FILES), segments_to_table(everything.values()))
    return everything


def check_inputs(out: str, rows: Sequence[Segment], files: Iterable[str], track: int) -> None:
    """Raise ValueError for files in OUT, which may be overwritten, and for excerpts of other tracks than the first."""
    inside = out.rstrip("/") + "/" if storage.is_uri(out) else os.path.realpath(out) + "/"
    for given in (*(s.source for s in rows), *files):
        source = given if storage.is_uri(given) or storage.is_uri(out) else os.path.realpath(given)
        if source.startswith(inside):
            raise ValueError(f"--out {out} holds {given}, which is to be separated; give another --out")
    for s in rows:
        if track != 1 and _is_excerpt(s):
            raise ValueError(f"--track {track}: excerpts, such as {s.segment_id}, are of the first track; leave it out")


def check_same(job: Separations, state: shards.State) -> None:
    """Raise ValueError where OUT holds files that were separated with another model, or other options."""
    digest = shards.configuration_digest(job.configuration)
    other = next((c for c in state.commits if c.digest != digest), None)
    file = other and (other.clips or other.rejections)
    if not file:
        return
    with storage.open_input(storage.join(job.root, file.path)) as f:
        then = json.loads(pq.read_schema(f).metadata[b"avsep.configuration"])
    for name, now in job.configuration.items():
        if (was := then.get(name)) != now:
            what = "the picture network" if name == "--weights" else name
            differ = "other" if name in ("--model", "--weights") else f"{_said(was)}, now {_said(now)}"
            raise ValueError(f"{job.out} was separated with another {what} ({differ}); give another --out")


def _said(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else "none" if value is None else str(value).lower()


def check_names(out: str, state: shards.State, segments: Iterable[Segment], before: Mapping[str, Segment]) -> None:
    """Raise ValueError where a row's sounds would take the place of another file's."""
    for s in segments:
        there = before.get(s.segment_id, s).source
        if s.segment_id in state.clip_ids and there != s.source:
            raise ValueError(f"{out}/{s.segment_id} holds the sounds of {there}, not {s.source}; give another --out")


def shard_size(n_files: int) -> int:
    """Choose files per shard: what a killed worker has done of one is done again.

    >>> [shard_size(n) for n in (100, 1_000, 100_000)]
    [1, 4, 16]
    """
    return 1 if n_files <= 256 else 4 if n_files <= 10_000 else 16


def find_changes(out: str, state: shards.State, segments: Sequence[Segment]) -> Changes:
    """Say what is to be done again: files written since, rows that changed, folders that are gone, what may pass."""
    wanted = {s.segment_id: s for s in segments}
    asked = {i: c.asked.get(i) for c in state.commits for i in c.clip_ids if i in wanted}
    there = {i.base_name for i in storage.infos(out)}
    touched = shards.newer_media(_root(out), state.commits, segments, rejected=True)
    again = {i for i, then in asked.items() if then != definition(wanted[i]) or i not in there or i in touched}
    rejected = {i for i, r in state.rejections.items() if i in wanted and (r.transient or i in touched)}
    return Changes(again=frozenset(again), rejected=frozenset(rejected | state.changed_rejections(segments)))


# ------------------------------------------------------------------------------------------------- a shard of them


def separate_shard(job: Separations, work: Work, label: Label | None, factorize: Factorize | None) -> Done:
    """Separate what is left of a shard, and commit it; of a file that can't be separated a rejection is committed.

    `label` and `factorize` are where pictures are labelled and windows factorised; None: here.
    Raises OSError where sounds can't be written.
    """
    separate_video = job.separator().elsewhere(label, factorize)
    rejections: list[Rejection] = [replace(r, stage="separate") for r in work.culprits]
    seconds: Counter[str] = Counter()
    rows: list[Result] = []
    for s in work.segments:
        report = separate_segment(job, s, separate_video)
        if isinstance(report, Rejection):
            rejections.append(report)
            continue
        rows += results_of(s, report)
        seconds.update({_STAGES[name]: spent for name, spent in report["timings"].items()})
    if work.probe:
        return Done(work)
    rejections = [replace(r, attempts=work.attempts.get(r.segment_id, 0) + 1) for r in rejections]
    done = pa.concat_tables([_kept(job, work), pa.Table.from_pylist([asdict(r) for r in rows], RESULT_SCHEMA)])
    commit = shards.commit_shard(
        job.root,
        work.shard,
        work.generation,
        done if len(done) else None,
        [*work.kept, *rejections],
        configuration=job.configuration,
        kind=KINDS[0],
        key="folder",
        timings_s=dict(seconds),
        retried=sorted({*work.attempts, *(i for c in work.replaced for i in c.retried)}),
        replaces=bool(work.replaced),
        asked=work.asked | {i: c.asked[i] for c in work.replaced for i in c.clip_ids if i not in work.asked},
    )
    events = [{"event": "rejected", **asdict(r)} for r in rejections]
    return Done(work, len(commit.clip_ids), Counter(str(r.reason) for r in rejections), commit.timings_s, events)


def _kept(job: Separations, work: Work) -> pa.Table:
    """Return the rows of a shard's earlier generations that stay when the next one replaces them."""
    again = {s.segment_id for s in work.segments} | {r.segment_id for r in work.culprits}
    kept = [RESULT_SCHEMA.empty_table()]
    for c in work.replaced:
        if c.clips:
            table = shards.read_table(storage.join(job.root, c.clips.path)).replace_schema_metadata(None)
            kept.append(table.filter(pc.invert(pc.is_in(table.column("folder"), pa.array(sorted(again), pa.string())))))
    return pa.concat_tables(kept)


def separate_segment(job: Separations, segment: Segment, separate_video: VideoSeparator) -> dict[str, Any] | Rejection:
    """Separate one file, or an excerpt, to its folder; return its report, or why it can't be.

    Raises OSError where the sounds can't be written.
    """
    reject = functools.partial(Rejection, segment.segment_id)
    out = storage.join(job.out, segment.segment_id)
    said: dict[str, Any] = {"source": segment.source}
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(storage.local_file(segment.source))
        except (FileNotFoundError, ValueError) as error:  # no such file, or no such scheme
            return reject("fetch", Reason.MISSING, detail=str(error))
        except OSError as error:
            if not storage.is_uri(segment.source) or error.errno is not None:  # of this machine's disk
                raise
            return reject("fetch", Reason.TRANSIENT, True, detail=str(error))
        try:
            if _is_excerpt(segment):
                said |= {"start_s": segment.start_s, "end_s": segment.end_s}
                path = _cut(path, segment, Path(stack.enter_context(tempfile.TemporaryDirectory())), job.output)
            commands.check_outputs({segment.source: out}, job.model, job.output)
            return commands.separate_local(
                path, said, job.model, out, segment.objects, separate_video, job.track, job.output, draw=False
            )
        except ClipError as error:
            return reject("decode", error.reason, error.transient, detail=error.detail)
        except ValueError as error:
            return reject("separate", Reason.REFUSED, detail=str(error))
        except soundfile.LibsndfileError as error:  # of writing: what is read goes through ffmpeg
            raise OSError(f"{out} can't be written: {error} Is the disk full?") from None


def _is_excerpt(segment: Segment) -> bool:
    return segment.start_s > 0 or segment.end_s is not None


def _cut(path: Path, segment: Segment, folder: Path, output: Output) -> Path:
    """Cut an excerpt: at most two channels, 16 bits, its pictures encoded anew."""
    options = media.CutOptions(max_height=_FULL_HEIGHT) if output.video else media.CutOptions()
    media.cut([path], segment.start_s, segment.end_s, folder / "excerpt.mkv", options)
    return folder / "excerpt.mkv"


def results_of(segment: Segment, report: Mapping[str, Any]) -> list[Result]:
    """Return a file's rows, as its `separation.json` says."""
    nothing = dict.fromkeys(("name", "file", "from", "confidence", "silent"))
    return [
        Result(
            folder=segment.segment_id,
            file=segment.source,
            start_s=segment.start_s,
            end_s=segment.end_s,
            object=entry["name"],
            sound=entry["file"],
            rest=report["rest"],
            share=entry.get("sound_score"),
            confidence=entry["confidence"],
            silent=entry["silent"],
            found_from=entry["from"],
            familiarity=entry.get("familiarity"),
            picture_score=entry.get("picture_score"),
            visible=entry.get("visible"),
            doubt=entry.get("doubt", ""),
            duration_s=report["duration_s"],
            sample_rate=report["sample_rate"],
            channels=report["channels"],
            labeller=report["labeller"],
            note=report["note"],
        )
        for entry in report["objects"] or [nothing]
    ]


# --------------------------------------------------------------------------------------------------- the tables


def write_tables(job: Separations, state: shards.State, files: Mapping[str, Segment]) -> None:
    """Write both tables, from all that is committed, ordered by folder."""
    parts = [storage.join(job.root, c.clips.path) for c in state.commits if c.clips]
    results = pa.concat_tables(
        [RESULT_SCHEMA.empty_table(), *(shards.read_table(p).replace_schema_metadata(None) for p in parts)]
    )
    rejected = []
    for i, r in sorted(state.rejections.items()):
        segment = files[i]
        place = {"folder": i, "file": segment.source, "start_s": segment.start_s, "end_s": segment.end_s}
        rejected.append(place | {k: v for k, v in asdict(r).items() if k != "segment_id"})
    _write(storage.join(job.out, RESULTS), results.take(pc.sort_indices(results, [("folder", "ascending")])))
    _write(storage.join(job.out, REJECTIONS), pa.Table.from_pylist(rejected, REJECTED_SCHEMA))


def _write(path: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(path, sink.getvalue())
