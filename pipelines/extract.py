"""Turn segments into clip shards and rejections: decode, STFT and NMF, picture logits.

One shard is one Ray task and one commit. Whatever is killed, and whenever, the same command goes
on where it stopped, and each segment ends up once, in the clips or in the rejections.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from avsep import shards, stages
from avsep.records import Reason, Rejection, Segment, read_segments
from avsep.vision import ImageLabeller, LabellerUnavailable
from pipelines import execution, recipes
from pipelines.execution import fail, say

EXAMPLES = """examples:
  python -m pipelines.extract --segments out/manifest --out out/clips
  python -m pipelines.extract --segments out/manifest --out out/clips --weights resnet152-394f9c45.pth
  python -m pipelines.extract --segments out/manifest --out out/clips --retry-rejected timeout missing
  python -m pipelines.extract --segments out/manifest --out out/clips --in-process   # no Ray, for a debugger
"""


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
    p.add_argument(
        "--retry-rejected",
        nargs="*",
        metavar="REASON",
        help="try rejected segments again: all of them, or those of these reasons",
    )
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    p.add_argument("--profile", action="store_true", help="print each stage's time")
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
) -> shards.Commit:
    """Extract one shard's segments and commit them; `kept` are rejections that stand."""
    execution.one_thread()
    records, rejections, seconds = stages.extract_records(segments, config, label)
    rejections = [replace(r, attempts=attempts.get(r.segment_id, 0) + 1) for r in rejections]
    return shards.write_shard(
        out,
        shard,
        generation,
        records,
        [*kept, *rejections],
        configuration=configuration,
        shape=config.shape,
        timings_s=seconds,
    )


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
    if stale := {c.digest for c in commits} - {digest}:
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
    recipe = recipes.get(arguments.recipe)
    for reason in arguments.retry_rejected or ():
        if reason not in set(Reason):
            fail(f"--retry-rejected {reason}: no such reason; the reasons are {', '.join(Reason)}")
    segments = read_segments(arguments.segments)
    if not segments:
        fail(f"{arguments.segments} holds no segments")
    labeller = load_labeller(arguments, recipe, needed=any(s.labels is None for s in segments))
    configuration = recipe.extraction.as_dict(labeller.sha256 if labeller else None)
    configuration["labeller"] = labeller.architecture if labeller else None
    work = plan_work(arguments.out, segments, arguments.retry_rejected, shards.configuration_digest(configuration))
    todo = sum(len(w[2]) for w in work)
    if arguments.dry_run:
        say(f"{len(segments)} segments: {len(segments) - todo} done, {todo} to do in {len(work)} shards")
        return execution.DONE
    seconds: Counter[str] = Counter()
    with (
        execution.session(arguments.in_process or not work) as runner,
        execution.Progress("extract", len(segments), "segments", done=len(segments) - todo) as progress,
    ):
        callers: list[Any] = [None]
        if labeller and work:
            device = "cuda" if runner.n_gpus else "cpu"
            make = functools.partial(open_labeller, labeller.architecture, arguments.weights, device)
            callers = runner.actors(make, runner.n_gpus or min(runner.n_workers, len(work)))
        items = (
            (arguments.out, *w, recipe.extraction, configuration, callers[i % len(callers)]) for i, w in enumerate(work)
        )
        sizes = {w[0]: len(w[2]) for w in work}
        for commit in runner.map(extract_shard, items):
            seconds.update(commit.timings_s)
            progress.add(sizes[commit.shard])
    return _report(arguments, segments, seconds)


def _report(arguments: argparse.Namespace, segments: Sequence[Segment], seconds: Counter[str]) -> int:
    ours = {s.segment_id for s in segments}
    clips = ours & set(shards.read_ids(arguments.out)[0])
    reasons = Counter(r.reason for r in shards.read_rejections(arguments.out) if r.segment_id in ours)
    say(f"{len(clips)} clips and {sum(reasons.values())} rejections of {len(segments)} segments in {arguments.out}")
    for reason, count in reasons.most_common():
        say(f"  rejected, {reason}: {count}")
    if arguments.profile and seconds:
        total = sum(seconds.values())
        for stage, spent in seconds.most_common():
            say(f"  {stage}: {spent:.1f} worker-seconds, {spent / total:.0%}")
    missing = len(segments) - len(clips) - sum(reasons.values())
    if missing:
        say(f"{missing} segments are in neither; run the same command again")
    return execution.SHORTFALL if missing or not clips else execution.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
