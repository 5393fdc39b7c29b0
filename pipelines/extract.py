"""Turn segments into clip shards and rejections: decode, STFT and NMF, picture logits.

One shard is one Ray task and one commit. Whatever is killed, and whenever, the same command goes
on where it stopped, and each segment ends up once, in the clips or in the rejections.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence

from pipelines import RECIPES, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.extract --segments out/manifest --out out/clips
  python -m pipelines.extract --segments out/manifest --out out/clips --weights resnet152-394f9c45.pth
  python -m pipelines.extract --segments out/manifest --out out/clips --retry-rejected timed_out missing
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --rate 250
  python -m pipelines.extract --segments out/audioset --out out/clips --media out/media --until fetch
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
    p.add_argument("--cookies", nargs="+", default=[], metavar="FILE", help="likewise; with --proxies, a file each")
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

from avsep import fetching, lock, shards, stages, storage
from avsep.extraction import Extraction, Process, describe_computing, describe_downloads, describe_work, fit_looks
from avsep.factors import DataConfig
from avsep.fetching import identities, open_store, several_of
from avsep.model import LABELLER_FILE
from avsep.records import Reason, Segment, read_segments, read_vocabulary
from avsep.vision import ImageLabeller, LabellerFile
from avsep.work import Changes, Work, find_changes, forget_media, plan_work
from pipelines import console, downloads, recipes, runners
from pipelines.console import fail, say
from pipelines.devices import Devices, find_labeller, load_labeller, open_devices
from pipelines.downloads import FETCH_LOCK, Outlook, open_budget
from pipelines.progress import Progress
from pipelines.shardtasks import check_digest, extract_shards


def read_checked(arguments: argparse.Namespace) -> list[Segment]:
    """Read the segments; UsageError where arguments and table don't go together."""
    for reason in arguments.retry_rejected or ():
        if reason not in set(Reason):
            fail(f"--retry-rejected {reason}: no such reason; the reasons are {', '.join(Reason)}")
    segments = read_segments(arguments.segments, say)
    if not segments:
        fail(f"{arguments.segments} holds no segments")
    if not arguments.media and (remote := sum(map(fetching.is_remote, segments))):
        fail(f"{remote} segments must be downloaded, or found: say with --media FOLDER where the files are kept")
    if arguments.until and not arguments.media:
        fail("--until fetch: say with --media FOLDER where downloads are kept")
    if not 0 < arguments.rate < math.inf:
        fail(f"--rate {arguments.rate:g}: it must be a number of downloads an hour above 0")
    identities(arguments.proxies, arguments.cookies)  # a mistake is told before the work begins
    return segments


def tell_changes(extraction: Extraction, state: shards.State, segments: Sequence[Segment]) -> Changes:
    """Find what changed since it was extracted, and say so; a fetch leaves changed clips to extraction."""
    if extraction.fetch_only:
        return Changes(rejected=frozenset(state.changed_rejections(segments)))
    changes = find_changes(extraction.out, state, segments)
    for line in changes.lines():
        say(line)
    if gone := len(state.clip_ids - {s.segment_id for s in segments}):
        remedy = "they stay, and training takes them; to be without them, give another --out"
        say(f"{extraction.out} also holds {gone} clips of segments that the table doesn't have: {remedy}")
    return changes


def dry_run(arguments: argparse.Namespace, segments: Sequence[Segment], extraction: Extraction) -> None:
    """Say what there is to do and what it will cost."""
    state = shards.read_state(extraction.out)
    check_digest(state, extraction)
    works = plan_work(state, segments, arguments.retry_rejected, tell_changes(extraction, state, segments))
    for line in describe_work(segments, works, read_vocabulary(arguments.segments)):
        say(line)
    todo = [s for w in works for s in w.segments]
    if not todo:
        return
    store = open_store(arguments.media, todo, extraction.whole) if arguments.media else None
    download_s = 0.0
    if store and store.missing:
        n_identities = max(1, len(identities(arguments.proxies, arguments.cookies)))
        download_s = 3600 * len(store.missing) / (arguments.rate * n_identities)
        say(describe_downloads(len(store.missing), arguments.rate, n_identities))
    if arguments.until:
        return
    for line in describe_computing(
        works, state, extraction.config, extraction.made_with.labeller is not None, download_s
    ):
        say(line)


def prepare(
    arguments: argparse.Namespace,
    segments: Sequence[Segment],
    recipe: recipes.Recipe,
    process: Process,
    labeller: ImageLabeller | LabellerFile | None,
) -> Extraction:
    """Say what clips are made with, and how."""
    config = recipe.extraction
    if labeller:
        config = fit_looks(config, labeller)
        say(f"pictures: {labeller.architecture}, looks: {config.looks}")
    network = (labeller.architecture, labeller.sha256) if labeller else ()
    made_with = DataConfig(config, read_vocabulary(arguments.segments), *network)
    return Extraction(arguments.out, made_with, process, bool(arguments.until), several_of(segments))


def run(
    arguments: argparse.Namespace, *, recipe: recipes.Recipe | None = None, process: Process = stages.extract_records
) -> int:
    """Extract what is left of the segments.

    `process` is what is done to a shard's segments, `recipe` what is run in place of the named one.
    """
    console.absolute(arguments, "out", "weights", "media")
    console.keep_apart(arguments, "segments", *([] if arguments.until else ["media"]))
    out, recipe = arguments.out, recipe or recipes.get(arguments.recipe)
    segments = read_checked(arguments)
    needed = any(s.labels is None for s in segments)
    if arguments.dry_run:
        found = None if arguments.until else find_labeller(arguments, recipe.labeller, needed)
        dry_run(arguments, segments, prepare(arguments, segments, recipe, process, found))
        return console.DONE
    labeller = None if arguments.until else load_labeller(arguments, recipe.labeller, needed)
    extraction = prepare(arguments, segments, recipe, process, labeller)
    storage.make_directory(out)
    name = FETCH_LOCK if arguments.until else shards.LOCK_FILE  # extraction may follow a fetch to the same folder
    with lock.Lock(storage.join(out, name), f"--out {out}", tell=say) as mine:
        state = shards.read_state(out)
        if not arguments.until:
            check_digest(state, extraction)
            shards.sweep(out, state.commits)
        if labeller and labeller.classes is not None and arguments.weights:  # no published one: it goes with the clips
            with storage.open_input(arguments.weights) as f:
                storage.write_bytes(storage.join(out, LABELLER_FILE), f.read())
        profile = drive(arguments, segments, state, extraction, labeller, mine)
        state = shards.read_state(out)
        if not arguments.until:
            shards.sweep(out, state.commits)
    if arguments.until:
        rejected = state.rejections.keys() & {s.segment_id for s in segments}
        say(f"fetched to {arguments.media}; {len(rejected)} of {len(segments)} segments can't be had")
        return console.DONE
    status = tell_result(arguments, segments, state)
    for line in profile if arguments.profile else ():
        say(f"  {line}")
    return status


def drive(
    arguments: argparse.Namespace,
    segments: Sequence[Segment],
    state: shards.State,
    extraction: Extraction,
    labeller: ImageLabeller | None,
    mine: lock.Lock,
) -> list[str]:
    """Do what is left, following another run's downloads where one is at it; return the profile's lines."""
    changes = tell_changes(extraction, state, segments)
    works = plan_work(state, segments, arguments.retry_rejected, changes)
    forget_media(arguments.media, [s for w in works for s in w.segments if s.segment_id in changes.elsewhere])
    todo = sum(w.n_segments for w in works)
    ours = {s.segment_id for s in segments} - {s.segment_id for w in works for s in (*w.segments, *w.relabelled)}
    rejected = Counter(str(r.reason) for i, r in state.rejections.items() if i in ours)
    status = storage.join(extraction.out, "fetch-status.json" if extraction.fetch_only else "status.json")
    with (
        runners.session(arguments.in_process or not works) as runner,
        Progress(
            "fetch" if extraction.fetch_only else "extract",
            len(segments),
            "segments",
            done=len(segments) - todo,
            rejected=rejected,
            status=status,
            metrics=isinstance(runner, runners.OnRay),
        ) as progress,
    ):
        devices = [Devices()]
        if works and not extraction.fetch_only:
            devices = open_devices(runner, extraction.config, labeller, arguments.weights)
        following, n_shards, started = False, len(works), time.monotonic()
        while works:
            following = extract_round(arguments, works, extraction, runner, progress, devices, mine, following)
            if not following:
                break
            time.sleep(downloads.FOLLOW_S)
            state = shards.read_state(extraction.out)
            if changes != Changes():
                changes = find_changes(extraction.out, state, segments)
            works = plan_work(state, segments, changes=changes)
            progress.count = len(segments) - sum(w.n_segments for w in works)
        elapsed_s = time.monotonic() - started
        return stages.profile(progress.seconds, todo, min(runner.n_workers, n_shards), elapsed_s)


def extract_round(
    arguments: argparse.Namespace,
    works: Sequence[Work],
    extraction: Extraction,
    runner: runners.Runner,
    progress: Progress,
    devices: Sequence[Devices],
    mine: lock.Lock,
    following: bool,
) -> bool:
    """Extract the shards; where another run downloads, those whose media are all there, and then return True.

    `following` is what the last round returned.
    """
    store = open_store(arguments.media, [s for w in works for s in w.segments], extraction.whole)
    outlook, others = None, False
    with contextlib.ExitStack() as stack:
        locks = [mine]
        if store and store.missing:
            try:
                path = storage.join(arguments.media, FETCH_LOCK)
                if path != mine.path:
                    theirs = lock.Lock(path, f"media store {arguments.media}", tell=say)
                    locks.append(stack.enter_context(theirs))
                store.budget = budget = open_budget(arguments, store, runner)
                outlook = stack.enter_context(Outlook(store, budget, progress))
            except lock.Held:
                if extraction.fetch_only:
                    raise
                if not following:
                    say(f"another run downloads to {arguments.media}; shards are extracted as they are complete")
                others = True
                works = [w for w in works if not any(s.segment_id in store.missing for s in w.segments)]
        extract_shards(works, extraction, runner, progress, devices=devices, store=store, outlook=outlook, locks=locks)
    return others


def tell_result(arguments: argparse.Namespace, segments: Sequence[Segment], state: shards.State) -> int:
    """Say what became of the segments; return the exit status."""
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
