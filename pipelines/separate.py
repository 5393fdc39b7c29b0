"""Separate many files: one folder of sounds per file, and one row per file and object in a table.

`OUT/results.parquet` says what was found, `OUT/rejections.parquet` which files can't be separated, and why.
Whatever is killed, and whenever, the same command goes on where it stopped, and each file ends up once, in the
results or in the rejections. A run skips what is done. It takes again files written since, rows of tables that
changed, folders that are gone, and rejections of what may pass, such as a server that didn't answer.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from avsep.cli import separation_options
from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.separate --videos videos --out out/sounds
  python -m pipelines.separate --videos 'videos/*.mp4' more/solo.wav --out out/sounds --model out/run/model
  python -m pipelines.separate --videos clips.csv --out s3://bucket/sounds --format flac
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("separate", __doc__, EXAMPLES)
    p.add_argument(
        "--videos",
        nargs="+",
        required=True,
        metavar="FILE",
        help="videos or sounds; folders, whose videos and sounds are meant; patterns; tables, whose rows are excerpts",
    )
    p.add_argument("--out", required=True, help="folder or URI: one folder of sounds per file, and the two tables")
    separation_options(p)
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

from avsep import lock, many, shards, storage
from avsep.extraction import Done
from avsep.model import describe_training
from avsep.outputs import Output
from avsep.records import Segment
from avsep.vision import LabellerUnavailable
from avsep.work import plan_work
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.devices import Devices, open_devices
from pipelines.progress import Progress
from pipelines.shardtasks import ShardTask, extract_shards


def separate_shard(task: ShardTask) -> Done:
    """Run one Ray task."""
    cluster.one_thread()
    return many.separate_shard(task.job, task.work, task.devices.label, task.devices.factorize)


def run(arguments: argparse.Namespace) -> int:
    """Separate what is left of the files, and write the tables."""
    console.absolute(arguments, "out", "model", "weights")
    inputs = [v for v in arguments.videos if storage.is_uri(v) == storage.is_uri(arguments.out)]
    if any(storage.same(path, arguments.out) for path in inputs):
        fail(f"--out {arguments.out} is what --videos names; give another folder")
    console.keep_apart(arguments, "model")
    output = Output(arguments.mono, arguments.format, arguments.two_stems, arguments.with_video)
    try:
        job = many.prepare(
            arguments.out, arguments.model, arguments.weights, arguments.objects, arguments.track, output
        )
    except LabellerUnavailable as error:
        fail(str(error))
    rows, files = many.find(arguments.videos, job.objects, job.separator().config.vocabulary, say)
    many.check_inputs(job.out, rows, files, job.track)
    storage.make_directory(job.out)
    with lock.Lock(storage.join(job.out, many.LOCK_FILE), f"--out {job.out}", tell=say) as mine:
        state, before = shards.read_state(job.root), many.read_files(job.out)
        segments = many.name_files(files, rows, job.objects, before)
        many.check_same(job, state)
        many.check_names(job.out, state, segments, before)
        everything = many.remember_files(job.out, segments, before)
        sweep(job, state)
        drive(arguments, job, segments, state, mine)
        state = shards.read_state(job.root)
        sweep(job, state)
        many.write_tables(job, state, everything)
    return tell_result(job, segments, state)


def sweep(job: many.Separations, state: shards.State) -> None:
    """Delete what killed writers left of tables and commits."""
    storage.sweep(job.out)
    storage.sweep(job.root)
    shards.sweep(job.root, state.commits, many.KINDS)


def drive(
    arguments: argparse.Namespace,
    job: many.Separations,
    segments: Sequence[Segment],
    state: shards.State,
    mine: lock.Lock,
) -> None:
    """Do what is left."""
    changes = many.find_changes(job.out, state, segments)
    works = plan_work(state, segments, changes=changes, shard_size=many.shard_size(len(segments)))
    todo = {s.segment_id for w in works for s in w.segments}
    say(describe_training(job.separator().config))
    if done := len(segments) - len(todo):
        say(f"done before: {done} of {len(segments)} files")
    if again := len(todo & (changes.again | changes.rejected)):
        say(f"done again: {again} files, which changed, whose sounds are gone, or whose rejection may pass")
    ours = {s.segment_id for s in segments} - todo
    rejected = Counter(str(r.reason) for i, r in state.rejections.items() if i in ours)
    with (
        runners.session(arguments.in_process or not works) as runner,
        Progress(
            "separate",
            len(segments),
            "files",
            done=len(ours),
            rejected=rejected,
            status=storage.join(job.out, many.STATUS_FILE),
            metrics=isinstance(runner, runners.OnRay),
        ) as progress,
    ):
        devices = gpus(runner, job) if works else []
        extract_shards(works, job, runner, progress, function=separate_shard, devices=devices, locks=[mine])
    for folder in [] if storage.is_uri(job.out) else todo:
        storage.sweep(storage.join(job.out, folder))  # what a worker left that outlived its driver for a moment


def gpus(runner: runners.Runner, job: many.Separations) -> list[Devices]:
    """Share the runner's GPUs among tasks, as extraction does; without GPUs each worker has its own networks."""
    loaded = job.separator()
    labeller = None if isinstance(loaded.labeller, str) else loaded.labeller
    groups = loaded.labels.groups
    devices = open_devices(runner, loaded.config.extraction, labeller, job.labeller_weights(), groups)
    return devices if devices[0].factorize else [Devices()]


def tell_result(job: many.Separations, segments: Sequence[Segment], state: shards.State) -> int:
    """Say what became of the files; return the exit status."""
    ours = {s.segment_id for s in segments}
    separated = ours & state.clip_ids
    reasons = Counter(r.reason for i, r in state.rejections.items() if i in ours)
    say(f"{len(separated)} files separated and {reasons.total()} rejected of {len(segments)}, in {job.out}")
    for reason, count in reasons.most_common():
        say(f"  rejected, {reason}: {count}")
    if others := len(state.clip_ids - ours):
        say(f"{job.out} also holds {others} files of earlier runs, which this one doesn't name: they stay")
    say(" and ".join(storage.join(job.out, table) for table in (many.RESULTS, many.REJECTIONS)))
    missing = len(segments) - len(separated) - reasons.total()
    if missing:
        say(f"{missing} files are in neither; run the same command again")
    return console.SHORTFALL if missing else console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command goes on from here")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.separate import main as run_main

    sys.exit(run_main())
