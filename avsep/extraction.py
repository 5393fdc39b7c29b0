"""The extraction of one shard, and what an extraction costs."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from avsep import audioset, shards, stages, storage
from avsep.console import duration
from avsep.factors import DataConfig, ExtractionConfig, Factorize
from avsep.fetching import MediaStore
from avsep.objects import Vocabulary
from avsep.records import (
    ClipRecord,
    Rejection,
    Segment,
    clips_from_table,
    describe_sources,
    segments_to_table,
)
from avsep.vision import ImageLabeller, LabellerFile
from avsep.work import Work

_SECONDS_A_CLIP, _SECONDS_OF_IMAGES = 1.2, 2.2  # of one worker without GPU, until it is measured
_MEDIA_BYTES = 1_000_000  # an excerpt of 10 s
_FRAMES_A_CLIP = 201

Process = Callable[
    ...,  # as stages.extract_records takes them
    tuple[list[ClipRecord], list[Rejection], dict[str, float]],
]


@dataclass(frozen=True)
class Extraction:
    """What the shards of one extraction have in common."""

    out: str
    made_with: DataConfig  # stored with the data
    process: Process = stages.extract_records
    fetch_only: bool = False
    whole: frozenset[str] = frozenset()  # sources with several excerpts, see `fetching.several_of`

    @property
    def config(self) -> ExtractionConfig:
        """What decides a clip's record."""
        return self.made_with.extraction


@dataclass
class Done:
    """What became of the work on a shard."""

    work: Work
    n_clips: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # for the log: rejections, and what was tried again


def extract_shard(
    extraction: Extraction,
    work: Work,
    label: stages.Label | None = None,
    factorize: Factorize | None = None,
    store: MediaStore | None = None,
) -> Done:
    """Extract what is left of a shard and commit it.

    `label` and `factorize` are where pictures are labelled and clips factorised; without `factorize` it is done here.
    With `fetch_only` media are only brought into the store, and what can't be had is committed as rejected.
    """
    rejections: list[Rejection] = []
    seconds: dict[str, float] = {}
    locate = store.locate if store else None
    records, segments_to_do = renewed(extraction.out, work, locate)
    if extraction.fetch_only:
        rejections = store.fetch_all(work.segments) if store else []
    else:
        own = extraction.process is stages.extract_records  # others do all of their work themselves
        process = (
            functools.partial(extraction.process, factorize_elsewhere=factorize)
            if factorize and own
            else extraction.process
        )
        for segments in [(s,) for s in segments_to_do] if work.apart else [segments_to_do]:
            some_records, some_rejections, some_seconds = process(segments, extraction.config, label, locate)
            records += some_records
            rejections += some_rejections
            seconds |= {stage: seconds.get(stage, 0.0) + s for stage, s in some_seconds.items()}
    # in a fetch, only a retry that succeeded has something to take back
    retried = store.retried if store else []
    if work.probe or (extraction.fetch_only and not (rejections or work.attempts or work.culprits)):
        return Done(work, events=retried)
    rejections = [replace(r, attempts=work.attempts.get(r.segment_id, 0) + 1) for r in (*work.culprits, *rejections)]
    for c in work.replaced:
        seconds = {stage: seconds.get(stage, 0.0) + c.timings_s.get(stage, 0.0) for stage in seconds | c.timings_s}
    commit = shards.write_shard(
        extraction.out,
        work.shard,
        work.generation,
        records,
        [*work.kept, *rejections],
        configuration=extraction.made_with.as_dict(),
        shape=extraction.config.shape,
        timings_s=seconds,
        retried=sorted({*work.attempts, *(i for c in work.replaced for i in c.retried)}),
        replaces=bool(work.replaced),
        asked=work.asked,
    )
    events = retried + [{"event": "rejected", **asdict(r)} for r in rejections]
    return Done(work, len(commit.clip_ids), Counter(str(r.reason) for r in rejections), commit.timings_s, events)


def renewed(out: str, work: Work, locate: stages.Locate | None) -> tuple[list[ClipRecord], list[Segment]]:
    """Return the clips of a shard that stay, as they are asked for now, and the segments that are left to do.

    A clip stays whose excerpt is the same, and whose media have the same bytes, wherever they are by now.
    """
    if not work.replaced or work.probe:
        return [], list(work.segments)
    files = [storage.join(out, c.clips.path) for c in work.replaced if c.clips]
    records = {r.segment_id: r for f in files for r in clips_from_table(shards.read_table(f))}
    for culprit in work.culprits:
        records.pop(culprit.segment_id, None)
    left = []
    for s in work.segments:
        record = records.get(s.segment_id)
        if record is not None and not stages.same_media(record, s, locate):
            del records[s.segment_id]
            record = None
        if record is None:
            left.append(s)
    for s in (*work.segments, *work.relabelled):
        if s.segment_id in records:
            records[s.segment_id] = stages.relabelled(records[s.segment_id], s)
    return list(records.values()), left


def fit_looks(config: ExtractionConfig, labeller: ImageLabeller | LabellerFile) -> ExtractionConfig:
    """Fit the way of looking to the picture network, and for one look at the middle the pictures' size, too.

    The middle is then cut out of pictures of the very size that the network takes it from.
    """
    looking = labeller.looking(config.looks)
    if looking.way != "centre":
        return config
    return replace(config, looks="centre", image_size=round(looking.size / looking.crop))


def describe_work(segments: Sequence[Segment], works: Sequence[Work], vocabulary: Vocabulary) -> list[str]:
    """Say what there is to do, a line each."""
    n = sum(w.n_segments for w in works)
    lines = [f"{len(segments)} segments: {len(segments) - n} done, {n} to do in {len(works)} shards"]
    counted = audioset.count_segments(segments_to_table(segments), vocabulary)
    lines += [f"  {line}" for line in audioset.describe_segments(audioset.summarize_segments(counted, vocabulary))]
    if line := describe_sources(s.source for s in segments):
        lines.append(f"  {line}")
    return lines


def describe_downloads(n_downloads: int, per_hour: float, n_identities: int) -> str:
    """Say what so many downloads take."""
    seconds = 3600 * n_downloads / (per_hour * n_identities)
    return (
        f"  fetch: {n_downloads} downloads at {per_hour:g} an hour and identity, "
        f"{n_identities} of these: {duration(seconds)}; media store about "
        f"{n_downloads * _MEDIA_BYTES / 1e9:,.1f} GB (assumed)"
    )


def describe_computing(
    works: Sequence[Work], state: shards.State, config: ExtractionConfig, with_images: bool, download_s: float
) -> list[str]:
    """Say what computing takes, a line each: as measured in earlier shards where there are any, else assumed."""
    n = sum(len(w.segments) for w in works)
    spent = sum(sum(c.timings_s.values()) - c.timings_s.get("fetch", 0.0) for c in state.commits)
    n_clips = len(state.clip_ids)
    measured = bool(n_clips and spent)
    each_s = spent / n_clips if measured else _SECONDS_A_CLIP + with_images * _SECONDS_OF_IMAGES
    n_cores = os.cpu_count() or 1
    computing_s = n * each_s / n_cores
    n_bins, n_bases = config.shape
    each_bytes = 2 * n_bases * (n_bins + _FRAMES_A_CLIP) + with_images * 2 * 1000 * 10
    return [
        f"  compute: {each_s:.2f} worker-seconds a segment ({'measured' if measured else 'assumed'}), "
        f"{n * each_s / 3600:,.1f} worker-hours: {duration(computing_s)} on {n_cores} cores like these",
        f"  write: about {n * each_bytes / 1e9:,.2f} GB of clips ({each_bytes / 1e3:.0f} kB each), "
        f"{len(works)} commits, {3 * len(works)} files at most",
        f"  what takes longest: {'downloads' if download_s >= computing_s and download_s else 'computing'}",
    ]
