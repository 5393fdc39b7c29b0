"""Turn segments into clip shards and rejections: decode, STFT and NMF, picture logits.

One shard is one Ray task and one commit. Whatever is killed, and whenever, the same command goes
on where it stopped, and each segment ends up once, in the clips or in the rejections.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from avsep import fetch, shards, stages, storage
from avsep.egress import EgressBudget, Lease, identities
from avsep.model import LABELLER_FILE
from avsep.records import ClipError, ClipRecord, Reason, Rejection, Segment, read_segments
from avsep.vision import ImageLabeller, LabellerUnavailable
from pipelines import execution, recipes
from pipelines.execution import fail, say

EXAMPLES = """examples:
  python -m pipelines.extract --segments out/manifest --out out/clips
  python -m pipelines.extract --segments out/manifest --out out/clips --weights resnet152-394f9c45.pth
  python -m pipelines.extract --segments out/manifest --out out/clips --retry-rejected timeout missing
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --rate 250
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --until fetch
  python -m pipelines.extract --segments out/manifest --out out/clips --in-process   # no Ray, for a debugger
"""


_OUTDATED_IN_A_ROW = 20  # downloads that fail as if yt-dlp no longer understood YouTube


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = argparse.ArgumentParser(
        "pipelines.extract",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--segments", required=True, help="a manifest's folder, or a table")
    p.add_argument("--out", required=True, help="folder or URI of the clip shards")
    p.add_argument("--recipe", default="default", help="one of " + ", ".join(recipes.RECIPES))
    p.add_argument("--weights", help="weights of the picture network, a .pth or .safetensors file")
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


def extract_shard(
    out: str,
    shard: str,
    generation: int,
    segments: Sequence[Segment],
    kept: Sequence[Rejection],
    attempts: dict[str, int],
    config: stages.ExtractionConfig,
    configuration: dict[str, Any],
    label: stages.Label | None,
    store: MediaStore | None = None,
    fetch_only: bool = False,
) -> tuple[str, dict[str, float]]:
    """Extract one shard's segments and commit them; return its name and the seconds of each stage.

    `kept` are rejections that stand. With `fetch_only` media are only brought into the store, and
    what can't be had is committed as rejected.
    """
    execution.one_thread()
    records: list[ClipRecord] = []
    seconds: dict[str, float] = {}
    if fetch_only:
        rejections = store.fetch_all(segments) if store else []
        if not rejections and not attempts:  # a retry that succeeded must take its rejections back
            return shard, {}
    else:
        records, rejections, seconds = stages.extract_records(segments, config, label, store.locate if store else None)
    rejections = [replace(r, attempts=attempts.get(r.segment_id, 0) + 1) for r in rejections]
    commit = shards.write_shard(
        out,
        shard,
        generation,
        records,
        [*kept, *rejections],
        configuration=configuration,
        shape=config.shape,
        timings_s=seconds,
    )
    return shard, commit.timings_s


@dataclass
class MediaStore:
    """Where remote segments' media are, and how missing ones get there."""

    uri: str
    known: dict[str, str]  # segment_id → path, as listed at the start
    budget: SharedBudget

    def locate(self, segment: Segment) -> Segment:
        """Return the segment as it is in the store, fetched when it isn't there; ClipError says why it can't be."""
        if not fetch.is_remote(segment):
            return segment
        path = self.known.get(segment.segment_id) or fetch.fetch(segment, self.uri, self.budget).path
        return fetch.within(segment, path)

    def fetch_all(self, segments: Sequence[Segment]) -> list[Rejection]:
        """Bring segments' media into the store; return those that can't be had."""
        rejections = []
        for s in segments:
            try:
                self.locate(s)
            except ClipError as error:
                rejections.append(Rejection(s.segment_id, "fetch", error.reason, error.transient, detail=error.detail))
        return rejections


@dataclass
class SharedBudget:
    """An egress budget that all workers share: calls go to the one that holds it."""

    call: Callable[..., Future]

    def acquire(self, machine: str = "") -> Lease | float:
        """Give a lease, or the seconds to wait; stop the run where YouTube has changed."""
        outdated, answer = self.call("acquire", machine).result()
        if outdated >= _OUTDATED_IN_A_ROW:
            fail(f"{outdated} downloads in a row failed as if YouTube had changed: update yt-dlp, then run this again")
        return answer

    def report(self, lease: Lease, outcome: Reason | None) -> None:
        """Take a lease's outcome, None for success."""
        self.call("report", lease, outcome).result()


class HeldBudget:
    """The budget itself, behind one callable."""

    def __init__(self, proxies: Sequence[str], cookies: Sequence[str], per_hour: float) -> None:
        self.budget = EgressBudget(identities(proxies, cookies), per_hour=per_hour)

    def __call__(self, method: str, *arguments: Any) -> tuple[int, Any]:
        """Call a method; the number of 'tool outdated' answers in a row comes with its result."""
        result = getattr(self.budget, method)(*arguments)
        return self.budget.outdated_in_a_row, result


def open_store(
    arguments: argparse.Namespace, segments: Sequence[Segment], runner: execution.Runner
) -> MediaStore | None:
    """List what the media store holds; None where no segment needs one."""
    remote = [s for s in segments if fetch.is_remote(s)]
    if not remote:
        return None
    known = fetch.find_media(arguments.media, remote)
    missing = len(remote) - len(known)
    if missing:
        try:
            fetch.check_tools()
        except ModuleNotFoundError as error:
            fail(str(error))
        n_identities = max(1, len(identities(arguments.proxies, arguments.cookies)))
        hours = missing / (arguments.rate * n_identities)
        say(f"{missing} of {len(remote)} remote segments are to be fetched: {hours:.1f} hours at the rate allowed")
    make = functools.partial(HeldBudget, arguments.proxies, arguments.cookies, arguments.rate)
    return MediaStore(arguments.media, known, SharedBudget(runner.actors(make, 1, gpu=False)[0]))


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


def open_labeller(architecture: str, weights: str | None, device: str) -> ImageLabeller:
    """Load the picture network: what a labelling actor holds."""
    return ImageLabeller.load(architecture, weights, device)


def load_labeller(arguments: argparse.Namespace, recipe: recipes.Recipe, needed: bool) -> ImageLabeller | None:
    """Load the picture network; without weights go on when the labels are given, else stop."""
    try:
        return ImageLabeller.load(recipe.labeller, arguments.weights)
    except LabellerUnavailable as error:
        if needed or arguments.weights:
            why = "; some segments have no given labels, so the pictures must decide them" if needed else ""
            fail(f"{error}{why}")
        say(f"note: {error}. The table gives every label, so extraction goes on without picture logits.")
        return None


def plan_work(
    out: str, segments: Sequence[Segment], retry_reasons: Sequence[str] | None, digest: str
) -> list[tuple[str, int, list[Segment], list[Rejection], dict[str, int]]]:
    """Say what is left to do: (shard, generation, segments, rejections that stand, earlier attempts).

    `retry_reasons` None retries nothing, an empty list every rejection.
    """
    commits = shards.read_commits(out)
    if stale := {c.digest for c in commits if c.clips} - {digest}:
        fail(f"{out} was extracted with another configuration (digest {stale.pop()}, now {digest}); give another --out")
    generations = Counter({c.shard: c.generation + 1 for c in commits})
    rejections = {r.segment_id: r for r in shards.read_rejections(out)}
    retried = {
        i
        for i, r in rejections.items()
        if retry_reasons is not None and (not retry_reasons or r.reason in retry_reasons)
    }
    done = set(shards.read_ids(out)[0]) | (set(rejections) - retried)
    own_rejections = {c.shard: c.rejection_ids for c in commits}
    work = []
    for shard in shards.plan(segments):
        todo = [s for s in shard.segments if s.segment_id not in done]
        if todo:
            kept = [rejections[i] for i in own_rejections.get(shard.name, ()) if i in done and i in rejections]
            attempts = {s.segment_id: rejections[s.segment_id].attempts for s in todo if s.segment_id in rejections}
            work.append((shard.name, generations[shard.name], todo, kept, attempts))
    return work


def run(arguments: argparse.Namespace) -> int:
    """Extract what is left of the segments."""
    execution.absolute(arguments, "out", "weights", "media")
    recipe = recipes.get(arguments.recipe)
    for reason in arguments.retry_rejected or ():
        if reason not in set(Reason):
            fail(f"--retry-rejected {reason}: no such reason; the reasons are {', '.join(Reason)}")
    segments = read_segments(arguments.segments)
    if not segments:
        fail(f"{arguments.segments} holds no segments")
    if not arguments.media and (remote := sum(map(fetch.is_remote, segments))):
        fail(f"{remote} segments must be downloaded; say with --media FOLDER where downloads are kept")
    if arguments.until and not arguments.media:
        fail("--until fetch: say with --media FOLDER where downloads are kept")
    if arguments.rate <= 0:
        fail(f"--rate {arguments.rate:g}: it must be above 0 downloads an hour")
    identities(arguments.proxies, arguments.cookies)  # a mistake is told before the work begins
    labeller = None
    if not arguments.until:
        labeller = load_labeller(arguments, recipe, needed=any(s.labels is None for s in segments))
    configuration = recipe.extraction.as_dict(labeller.sha256 if labeller else None)
    configuration["labeller"] = labeller.architecture if labeller else None
    work = plan_work(arguments.out, segments, arguments.retry_rejected, shards.configuration_digest(configuration))
    todo = sum(len(w[2]) for w in work)
    if arguments.dry_run:
        say(f"{len(segments)} segments: {len(segments) - todo} done, {todo} to do in {len(work)} shards")
        return execution.DONE
    if labeller and labeller.classes is not None and arguments.weights:  # no published network: it goes with the clips
        with storage.open_input(arguments.weights) as f:
            storage.write_bytes(storage.join(arguments.out, LABELLER_FILE), f.read())
    seconds: Counter[str] = Counter()
    with (
        execution.session(arguments.in_process or not work) as runner,
        execution.Progress("extract", len(segments), "segments", done=len(segments) - todo) as progress,
    ):
        callers: list[Any] = [None]
        store = open_store(arguments, [s for w in work for s in w[2]], runner)
        if labeller and work and runner.n_gpus:
            make = functools.partial(open_labeller, labeller.architecture, arguments.weights, "cuda")
            callers = runner.actors(make, runner.n_gpus, gpu=True)
        elif labeller and work:
            callers = [LabelHere(labeller.architecture, arguments.weights, labeller.sha256)]
        items = (
            (
                arguments.out,
                *w,
                recipe.extraction,
                configuration,
                callers[i % len(callers)],
                store,
                bool(arguments.until),
            )
            for i, w in enumerate(work)
        )
        sizes, n_workers, started = {w[0]: len(w[2]) for w in work}, runner.n_workers, time.monotonic()
        for shard, spent in runner.map(extract_shard, items):
            seconds.update(spent)
            progress.add(sizes[shard])
        elapsed_s = time.monotonic() - started
    if arguments.until:
        rejected = set(shards.read_ids(arguments.out)[1]) & {s.segment_id for s in segments}
        say(f"fetched to {arguments.media}; {len(rejected)} of {len(segments)} segments can't be had")
        return execution.DONE
    status = _report(arguments, segments)
    if arguments.profile:
        for line in stages.profile(seconds, todo, min(n_workers, len(work)), elapsed_s):
            say(f"  {line}")
    return status


def _report(arguments: argparse.Namespace, segments: Sequence[Segment]) -> int:
    ours = {s.segment_id for s in segments}
    clips = ours & set(shards.read_ids(arguments.out)[0])
    reasons = Counter(r.reason for r in shards.read_rejections(arguments.out) if r.segment_id in ours)
    say(f"{len(clips)} clips and {sum(reasons.values())} rejections of {len(segments)} segments in {arguments.out}")
    for reason, count in reasons.most_common():
        say(f"  rejected, {reason}: {count}")
    missing = len(segments) - len(clips) - sum(reasons.values())
    if missing:
        say(f"{missing} segments are in neither; run the same command again")
    return execution.SHORTFALL if missing or not clips else execution.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
