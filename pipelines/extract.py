"""Turn segments into clip shards and rejections: decode, STFT and NMF, picture logits.

One shard is one Ray task and one commit. Whatever is killed, and whenever, the same command goes
on where it stopped, and each segment ends up once, in the clips or in the rejections.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines import RECIPES, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.extract --segments out/manifest --out out/clips
  python -m pipelines.extract --segments out/manifest --out out/clips --weights resnet152-394f9c45.pth
  python -m pipelines.extract --segments out/manifest --out out/clips --retry-rejected timed_out missing
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --rate 250
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --until fetch
  python -m pipelines.extract --segments out/manifest --out out/clips --in-process   # no Ray, for a debugger
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("extract", __doc__, EXAMPLES)
    p.add_argument("--segments", required=True, help="a manifest's folder, or a table")
    p.add_argument("--out", required=True, help="folder or URI of the clip shards")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="a run configuration")
    p.add_argument("--weights", help="weights of the picture network, a .pth or .safetensors file")
    p.add_argument(
        "--labeller",
        metavar="NAME",
        help="the picture network: efficientnet_lite0 or efficientnet_lite2, which need no download, or a classifier "
        "of torchvision (default: the recipe's, resnet152)",
    )
    p.add_argument("--media", metavar="URI", help="where downloads are kept, and files that you have are looked for")
    p.add_argument("--until", choices=["fetch"], help="only fill --media; extraction can follow")
    p.add_argument("--rate", type=float, default=250.0, help="downloads an hour and egress identity (default 250)")
    p.add_argument("--proxies", nargs="+", default=[], metavar="URL", help="an egress identity each")
    p.add_argument("--cookies", nargs="+", default=[], metavar="FILE", help="an egress identity each")
    p.add_argument(
        "--retry-rejected",
        nargs="*",
        metavar="REASON",
        help="try rejected segments again: all of them, or those of these reasons",
    )
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    p.add_argument(
        "--profile", action="store_true", help="print each stage's time and rates, and the run's beside them"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import torch

from avsep import audioset, factors, fetching, lock, shards, stages, storage
from avsep.factors import DataConfig
from avsep.fetching import identities
from avsep.model import LABELLER_FILE
from avsep.records import (
    ClipRecord,
    Reason,
    Rejection,
    Segment,
    clips_from_table,
    describe_sources,
    read_segments,
    read_vocabulary,
    segments_to_table,
)
from avsep.vision import NO_DOWNLOAD, ImageLabeller, LabellerUnavailable
from avsep.work import Changes, Work, find_changes, forget_media, plan_work
from pipelines import cluster, console, recipes, runners
from pipelines.console import fail, say
from pipelines.downloads import FETCH_LOCK, FOLLOW_S, MediaStore, open_budget, open_store
from pipelines.progress import Progress, duration

_SECONDS_A_CLIP, _SECONDS_OF_PICTURES = 1.2, 2.2  # of one worker without GPU, until it is measured
_MEDIA_BYTES = 1_000_000  # an excerpt of 10 s
_FRAMES_A_CLIP = 201
_ACTORS_A_GPU = 2  # one moves data while the other computes
_LEAST_CPU = 0.5  # that a task claims, however long it waits for a GPU: its process takes 0.8 GB


Process = Callable[
    ...,  # as stages.extract_records takes them
    tuple[list[ClipRecord], list[Rejection], dict[str, float]],
]


Caller = tuple[stages.Label | None, factors.Factorize | None]


@dataclass(frozen=True)
class Job:
    """What the shards of one extraction have in common."""

    out: str
    config: factors.ExtractionConfig
    configuration: dict[str, Any]  # stored with the data
    process: Process = stages.extract_records
    fetch_only: bool = False


@dataclass
class Done:
    """What became of it."""

    work: Work
    n_clips: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # for the log: rejections, and what was tried again


def extract_shard(
    job: Job,
    work: Work,
    label: stages.Label | None = None,
    store: MediaStore | None = None,
    factorize: factors.Factorize | None = None,
) -> Done:
    """Extract what is left of a shard and commit it.

    With `fetch_only` media are only brought into the store, and what can't be had is committed as rejected.
    """
    cluster.one_thread()
    rejections: list[Rejection] = []
    seconds: dict[str, float] = {}
    locate = store.locate if store else None
    records, segments_to_do = renewed(job.out, work, locate)
    if job.fetch_only:
        rejections = store.fetch_all(work.segments) if store else []
    else:
        own = job.process is stages.extract_records  # others do all of their work themselves
        process = functools.partial(job.process, factorize_elsewhere=factorize) if factorize and own else job.process
        for segments in [(s,) for s in segments_to_do] if work.apart else [segments_to_do]:
            some_records, some_rejections, some_seconds = process(segments, job.config, label, locate)
            records += some_records
            rejections += some_rejections
            seconds |= {stage: seconds.get(stage, 0.0) + s for stage, s in some_seconds.items()}
    # in a fetch, only a retry that succeeded has something to take back
    retried = store.retried if store else []
    if work.probe or (job.fetch_only and not (rejections or work.attempts or work.culprits)):
        return Done(work, events=retried)
    rejections = [replace(r, attempts=work.attempts.get(r.segment_id, 0) + 1) for r in (*work.culprits, *rejections)]
    for c in work.replaced:
        seconds = {stage: seconds.get(stage, 0.0) + c.timings_s.get(stage, 0.0) for stage in seconds | c.timings_s}
    commit = shards.write_shard(
        job.out,
        work.shard,
        work.generation,
        records,
        [*work.kept, *rejections],
        configuration=job.configuration,
        shape=job.config.shape,
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


class Crashes:
    """Finds the segment that takes its worker along, and has the rest of its shard done without it.

    A shard whose worker died again and again is taken apart: its segments are tried one by one, and
    those whose worker dies are rejected. Where none does, they are too much together, and are done one after
    the other; where that fails, too, the run stops. A shard that can't be written is tried twice again, since
    an object store may have failed for a moment; then the run stops.
    """

    def __init__(self, queue: runners.Queue, item: Callable[[Work], tuple[Any, ...]], progress: Progress) -> None:
        self._queue, self._item, self._progress = queue, item, progress
        self._failed: Counter[str] = Counter()
        self._whole: dict[str, Work] = {}
        self._to_try: Counter[str] = Counter()
        self._culprits: dict[str, list[Rejection]] = {}

    def recover(self, item: tuple[Any, ...], error: Exception) -> None:
        """Deal with an item that failed, or raise."""
        work: Work = item[1]
        if isinstance(error, console.WorkerLost) and work.segments:
            self._progress.failed(work.shard, "worker_lost")
            if work.probe:
                segment_id = work.segments[0].segment_id
                detail = f"its worker died with it each time: {error}"
                self._culprits[work.shard].append(
                    Rejection(segment_id, "decode", Reason.CRASHED_DECODER, True, detail=detail)
                )
                self.tried(work)
                return
            text = f"shard {work.shard}: its worker died again and again; looking for the segment that does it"
            say(text, event="worker_lost", shard=work.shard, error=str(error))
            self._whole[work.shard], self._culprits[work.shard] = work, []
            self._to_try[work.shard] = len(work.segments)
            for s in work.segments:
                self._queue.add(self._item(replace(work, segments=(s,), probe=True)))
            return
        self._failed[work.shard] += 1
        self._progress.failed(work.shard, "not_written" if isinstance(error, OSError) else "error")
        if not isinstance(error, OSError) or self._failed[work.shard] > 2:
            raise error
        say(f"shard {work.shard}: {error}; trying again", event="not_written", shard=work.shard)
        self._queue.add(self._item(work))

    def tried(self, work: Work) -> None:
        """Take note that a probe has ended; after the last the shard is done without the culprits."""
        self._to_try[work.shard] -= 1
        if self._to_try[work.shard] == 0:
            whole, culprits = self._whole.pop(work.shard), self._culprits.pop(work.shard)
            ids = {r.segment_id for r in culprits}
            if not culprits and whole.apart:
                fail(
                    f"shard {work.shard}: its worker dies with its {len(whole.segments)} segments, though with none "
                    "of them alone; give workers more memory, or run fewer at once (AVSEP_CPUS)"
                )
            rest = tuple(s for s in whole.segments if s.segment_id not in ids)
            again = replace(
                whole, segments=rest, culprits=(*whole.culprits, *culprits), apart=whole.apart or not culprits
            )
            self._queue.add(self._item(again))


def extract(
    works: Sequence[Work],
    job: Job,
    runner: runners.Runner,
    progress: Progress,
    *,
    callers: Sequence[Caller] = ((None, None),),
    store: MediaStore | None = None,
    locks: Sequence[lock.Lock] = (),
) -> None:
    """Have every shard done: the driver, which holds a bounded number of shards in flight.

    `job.process` is what is done to a shard's segments; `callers` label pictures and, on GPUs,
    factorise. Raises lock.Held when one of the locks was lost.
    """
    numbers = itertools.count()
    in_flight: dict[str, int] = {}

    def item(work: Work) -> tuple[Any, ...]:
        in_flight[work.shard] = work.n_segments if not work.probe else in_flight[work.shard]
        progress.in_flight = sum(in_flight.values())
        progress.add(0)
        label, factorize = callers[next(numbers) % len(callers)]
        return job, work, label, store.of(work.segments) if store else None, factorize

    queue = runners.Queue(map(item, works))
    crashes = Crashes(queue, item, progress)
    elsewhere = any(factorize for _, factorize in callers)
    for done in runner.map(
        extract_shard, queue, crashes.recover, lambda: busy_share(progress.seconds) if elsewhere else 1.0
    ):
        for one in locks:
            one.check()
        work = done.work
        log_events(done)
        if work.probe:
            crashes.tried(work)
            continue
        del in_flight[work.shard]
        progress.in_flight = sum(in_flight.values())
        if store:
            store.settle(work.segments, progress)
        progress.add(work.n_segments + len(work.culprits), rejected=done.rejected, seconds=done.seconds)


def busy_share(seconds: Mapping[str, float]) -> float:
    """Return what part of a task's time its CPU works, while GPUs do the rest, as measured so far: ½, ¾ or 1.

    >>> [busy_share({"decode": d, "factorize": 3.0, "label": 1.0}) for d in (0.0, 1.0, 2.0, 50.0)]
    [0.5, 0.5, 0.5, 1.0]
    """
    waiting = seconds.get("factorize", 0.0) + seconds.get("label", 0.0)
    busy = sum(seconds.values()) - waiting
    share = busy / (busy + waiting) if waiting > 0 else 1.0
    return max(_LEAST_CPU, math.ceil(4 * share) / 4)


def log_events(done: Done) -> None:
    """Log what became of a shard's segments, an event each, and of the shard."""
    shard = done.work.shard
    for event in done.events:
        text = f"{event['segment_id']} {event['event']} in {event['stage']}: {event['reason']}"
        console.log(text, shard=shard, **event)
    if not done.work.probe:
        n_rejected = done.rejected.total()
        console.log(
            f"shard {shard}: {done.n_clips} clips, {n_rejected} rejections",
            event="shard_done",
            shard=shard,
            generation=done.work.generation,
            clips=done.n_clips,
            rejected=n_rejected,
            seconds={stage: round(s, 3) for stage, s in done.seconds.items()},
        )


@functools.lru_cache(maxsize=1)
def _own_labeller(architecture: str, weights: str | None, sha256: str) -> ImageLabeller:
    return ImageLabeller.load(architecture, weights)


@dataclass(frozen=True)
class LabelHere:
    """Label in the worker's own process: without a GPU to share, sending pictures away gains nothing."""

    architecture: str
    weights: str | None
    sha256: str  # of the weights: another file of the same name is another network

    def __call__(self, images: Any) -> Future:
        """Return a finished future of the logits."""
        future: Future = Future()
        future.set_result(_own_labeller(self.architecture, self.weights, self.sha256)(images))
        return future


def open_stages(config: factors.ExtractionConfig, architecture: str | None, weights: str | None) -> stages.DeviceStages:
    """Make the GPU's stages ready: what an actor holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labeller = ImageLabeller.load(architecture, weights, device) if architecture else None
    return stages.DeviceStages(config, labeller, device)


def fit_pictures(config: factors.ExtractionConfig, labeller: ImageLabeller) -> factors.ExtractionConfig:
    """Fit the way of looking to the picture network, and for one look at the middle the pictures' size, too.

    The middle is then cut out of pictures of the very size that the network takes it from.
    """
    looking = labeller.looking(config.looks)
    if looking.way != "centre":
        return config
    return replace(config, looks="centre", image_size=round(looking.size / looking.crop))


def load_labeller(arguments: argparse.Namespace, recipe: recipes.Recipe, needed: bool) -> ImageLabeller | None:
    """Load the picture network; without weights go on when the labels are given, else stop."""
    try:
        return ImageLabeller.load(arguments.labeller or recipe.labeller, arguments.weights)
    except LabellerUnavailable as error:
        if needed or arguments.weights or arguments.labeller:
            why = "; some segments have no given labels, so the pictures must decide them" if needed else ""
            remedy = "" if arguments.weights else f"; or take one that needs no download, --labeller {NO_DOWNLOAD}"
            fail(f"{error}{why}{remedy}")
        say(f"note: {error}. The table gives every label, so extraction goes on without picture logits.")
        return None


def tell_changes(job: Job, state: shards.State, segments: Sequence[Segment]) -> Changes:
    """Find what changed since it was extracted, and say so; a fetch leaves changed clips to extraction."""
    if job.fetch_only:
        return Changes(rejected=frozenset(state.changed_rejections(segments)))
    changes = find_changes(job.out, state, segments)
    for line in changes.lines():
        say(line)
    if gone := len(state.clip_ids - {s.segment_id for s in segments}):
        say(
            f"{job.out} also holds {gone} clips of segments that the table doesn't have: they stay, and training "
            "takes them; to be without them, give another --out"
        )
    return changes


def check_digest(state: shards.State, out: str, digest: str) -> None:
    """Refuse to mix clips of two configurations."""
    if stale := {c.digest for c in state.commits if c.clips} - {digest}:
        fail(f"{out} was extracted with another configuration (digest {stale.pop()}, now {digest}); give another --out")


def dry_run(
    arguments: argparse.Namespace,
    segments: Sequence[Segment],
    state: shards.State,
    works: Sequence[Work],
    config: factors.ExtractionConfig,
    pictured: bool,
) -> None:
    """Say what there is to do and what it will cost: measured in earlier shards where there are any, else assumed."""
    todo = [s for w in works for s in w.segments]
    n = sum(w.n_segments for w in works)
    say(f"{len(segments)} segments: {len(segments) - n} done, {n} to do in {len(works)} shards")
    vocabulary = read_vocabulary(arguments.segments)
    counted = audioset.count_segments(segments_to_table(segments), vocabulary)
    for line in audioset.describe_segments(audioset.summarize_segments(counted, vocabulary)):
        say(f"  {line}")
    if line := describe_sources(s.source for s in segments):
        say(f"  {line}")
    if not todo:
        return
    store = open_store(arguments.media, todo) if arguments.media else None
    hours: dict[str, float] = {}
    if store and store.missing:
        n_identities = max(1, len(identities(arguments.proxies, arguments.cookies)))
        hours["downloads"] = len(store.missing) / (arguments.rate * n_identities)
        say(
            f"  fetch: {len(store.missing)} downloads at {arguments.rate:g} an hour and identity, "
            f"{n_identities} of these: {duration(3600 * hours['downloads'])}; media store about "
            f"{len(store.missing) * _MEDIA_BYTES / 1e9:,.1f} GB (assumed)"
        )
    if arguments.until:
        return
    spent = sum(sum(c.timings_s.values()) - c.timings_s.get("fetch", 0.0) for c in state.commits)
    n_clips = len(state.clip_ids)
    each_s = spent / n_clips if n_clips and spent else _SECONDS_A_CLIP + pictured * _SECONDS_OF_PICTURES
    n_cores = os.cpu_count() or 1
    hours["computing"] = len(todo) * each_s / 3600 / n_cores
    measured = "measured" if n_clips and spent else "assumed"
    say(
        f"  compute: {each_s:.2f} worker-seconds a segment ({measured}), "
        f"{len(todo) * each_s / 3600:,.1f} worker-hours: "
        f"{duration(3600 * hours['computing'])} on {n_cores} cores like these"
    )
    n_bins, n_bases = config.shape
    each_bytes = 2 * n_bases * (n_bins + _FRAMES_A_CLIP) + pictured * 2 * 1000 * 10
    say(
        f"  write: about {len(todo) * each_bytes / 1e9:,.2f} GB of clips ({each_bytes / 1e3:.0f} kB each), "
        f"{len(works)} commits, {3 * len(works)} files at most"
    )
    say(f"  what takes longest: {max(hours, key=lambda k: hours[k])}")


def run(
    arguments: argparse.Namespace, *, recipe: recipes.Recipe | None = None, process: Process = stages.extract_records
) -> int:
    """Extract what is left of the segments.

    `process` is what is done to a shard's segments, `recipe` what is run in place of the named one.
    """
    console.absolute(arguments, "out", "weights", "media")
    console.keep_apart(arguments, "segments", *([] if arguments.until else ["media"]))
    out = arguments.out
    recipe = recipe or recipes.get(arguments.recipe)
    for reason in arguments.retry_rejected or ():
        if reason not in set(Reason):
            fail(f"--retry-rejected {reason}: no such reason; the reasons are {', '.join(Reason)}")
    segments = read_segments(arguments.segments, say)
    if not segments:
        fail(f"{arguments.segments} holds no segments")
    if not arguments.media and (remote := sum(map(fetching.is_remote, segments))):
        fail(f"{remote} segments must be downloaded; say with --media FOLDER where downloads are kept")
    if arguments.until and not arguments.media:
        fail("--until fetch: say with --media FOLDER where downloads are kept")
    if not 0 < arguments.rate < math.inf:
        fail(f"--rate {arguments.rate:g}: it must be a number of downloads an hour above 0")
    identities(arguments.proxies, arguments.cookies)  # a mistake is told before the work begins
    labeller = None
    if not arguments.until:
        labeller = load_labeller(arguments, recipe, needed=any(s.labels is None for s in segments))
    config = recipe.extraction
    if labeller:
        config = fit_pictures(config, labeller)
        say(f"pictures: {labeller.architecture}, looks: {config.looks}")
    vocabulary = read_vocabulary(arguments.segments)
    made_with = DataConfig(config, vocabulary, *((labeller.architecture, labeller.sha256) if labeller else ()))
    configuration = made_with.as_dict()
    digest = shards.configuration_digest(configuration)
    job = Job(out, config, configuration, process, fetch_only=bool(arguments.until))
    if arguments.dry_run:
        state = shards.read_state(out)
        check_digest(state, out, digest)
        works = plan_work(state, segments, arguments.retry_rejected, tell_changes(job, state, segments))
        dry_run(arguments, segments, state, works, config, labeller is not None)
        return console.DONE
    storage.make_directory(out)
    name = FETCH_LOCK if arguments.until else shards.LOCK_FILE  # extraction may follow a fetch to the same folder
    with lock.Lock(storage.join(out, name), f"--out {out}", tell=say) as mine:
        state = shards.read_state(out)
        if not arguments.until:
            check_digest(state, out, digest)
            shards.sweep(out, state.commits)
        if labeller and labeller.classes is not None and arguments.weights:  # no published one: it goes with the clips
            with storage.open_input(arguments.weights) as f:
                storage.write_bytes(storage.join(out, LABELLER_FILE), f.read())
        profile = _drive(arguments, segments, state, job, labeller, mine)
        state = shards.read_state(out)
        if not arguments.until:
            shards.sweep(out, state.commits)
    if arguments.until:
        rejected = state.rejections.keys() & {s.segment_id for s in segments}
        say(f"fetched to {arguments.media}; {len(rejected)} of {len(segments)} segments can't be had")
        return console.DONE
    status = _report(arguments, segments, state)
    for line in profile if arguments.profile else ():
        say(f"  {line}")
    return status


def _drive(
    arguments: argparse.Namespace,
    segments: Sequence[Segment],
    state: shards.State,
    job: Job,
    labeller: ImageLabeller | None,
    mine: lock.Lock,
) -> list[str]:
    """Do what is left, following another run's downloads where one is at it; return the profile's lines."""
    changes = tell_changes(job, state, segments)
    works = plan_work(state, segments, arguments.retry_rejected, changes)
    forget_media(arguments.media, [s for w in works for s in w.segments if s.segment_id in changes.elsewhere])
    todo = sum(w.n_segments for w in works)
    ours = {s.segment_id for s in segments} - {s.segment_id for w in works for s in (*w.segments, *w.relabelled)}
    rejected = Counter(str(r.reason) for i, r in state.rejections.items() if i in ours)
    status = storage.join(job.out, "fetch-status.json" if job.fetch_only else "status.json")
    with (
        runners.session(arguments.in_process or not works) as runner,
        Progress(
            "fetch" if job.fetch_only else "extract",
            len(segments),
            "segments",
            done=len(segments) - todo,
            rejected=rejected,
            status=status,
            metrics=isinstance(runner, runners.OnRay),
        ) as progress,
    ):
        callers: list[Caller] = [(None, None)]
        n_gpus = runner.n_gpus if works and not job.fetch_only else 0
        if n_gpus:
            architecture = labeller.architecture if labeller else None
            make = functools.partial(open_stages, job.config, architecture, arguments.weights)
            actors = runner.actors(make, _ACTORS_A_GPU * n_gpus, gpus=1 / _ACTORS_A_GPU)
            looking = labeller.looking(job.config.looks) if labeller else None
            callers = [
                (stages.Label(looking, stages.StageOf(a, "label")) if looking else None, stages.StageOf(a, "factorize"))
                for a in actors
            ]
        elif labeller and works:
            here = LabelHere(labeller.architecture, arguments.weights, labeller.sha256)
            callers = [(stages.Label(labeller.looking(job.config.looks), here), None)]
        following, n_shards, started = False, len(works), time.monotonic()
        while works:
            store = open_store(arguments.media, [s for w in works for s in w.segments])
            with contextlib.ExitStack() as stack:
                locks = [mine]
                if store and store.missing:
                    try:
                        path = storage.join(arguments.media, FETCH_LOCK)
                        if path != mine.path:
                            theirs = lock.Lock(path, f"media store {arguments.media}", tell=say)
                            locks.append(stack.enter_context(theirs))
                        store.budget = open_budget(arguments, store, runner)
                        following = False
                    except lock.Held:
                        if job.fetch_only:
                            raise
                        if not following:
                            say(
                                f"another run downloads to {arguments.media}; shards are extracted as they are complete"
                            )
                        following = True
                        works = [w for w in works if not any(s.segment_id in store.missing for s in w.segments)]
                else:
                    following = False
                extract(works, job, runner, progress, callers=callers, store=store, locks=locks)
            if not following:
                break
            time.sleep(FOLLOW_S)
            state = shards.read_state(job.out)
            if changes != Changes():
                changes = find_changes(job.out, state, segments)
            works = plan_work(state, segments, changes=changes)
            progress.count = len(segments) - sum(w.n_segments for w in works)
        elapsed_s = time.monotonic() - started
        return stages.profile(progress.seconds, todo, min(runner.n_workers, n_shards), elapsed_s)


def _report(arguments: argparse.Namespace, segments: Sequence[Segment], state: shards.State) -> int:
    ours = {s.segment_id for s in segments}
    clips = ours & state.clip_ids
    reasons = Counter(r.reason for i, r in state.rejections.items() if i in ours)
    say(f"{len(clips)} clips and {sum(reasons.values())} rejections of {len(segments)} segments in {arguments.out}")
    for reason, count in reasons.most_common():
        say(f"  rejected, {reason}: {count}")
    missing = len(segments) - len(clips) - sum(reasons.values())
    if missing:
        say(f"{missing} segments are in neither; run the same command again")
    return console.SHORTFALL if missing else console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command goes on from here")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.extract import main as run_main

    sys.exit(run_main())
