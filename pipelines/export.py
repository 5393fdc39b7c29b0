"""Write clips' sound, pictures and labels for other people's models, as WebDataset archives or Parquet.

One commit of the clips is one task, which decodes their media again: one file per split, and one commit. Whatever is
killed, and whenever, the same command goes on where it stopped, and each clip ends up once, in the files or in
`rejections.parquet`. Clips that were extracted again are exported again, and rejections tried again once their
media are there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.export --clips out/clips --out out/export --format parquet
  python -m pipelines.export --clips out/clips --media out/media --out out/export --format webdataset
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("export", __doc__, EXAMPLES)
    p.add_argument("--clips", required=True, help="folder or URI of the clip shards")
    p.add_argument("--media", metavar="URI", help="where downloads were kept; not needed for files of your own")
    p.add_argument("--out", required=True, help="folder or URI of the export")
    p.add_argument(
        "--format",
        required=True,
        choices=["webdataset", "parquet"],
        help="tar archives for webdataset, or Parquet for datasets.load_dataset",
    )
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

from avsep import exporting, fetching, lock, shards, storage
from avsep.exporting import Export
from avsep.extraction import Done
from avsep.fetching import MediaStore, open_store, several_of
from avsep.records import Segment
from avsep.work import Work
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress
from pipelines.shardtasks import ShardTask, extract_shards

Clips = Mapping[str, Sequence[Segment]]  # the export's shards


def export_shard(task: ShardTask) -> Done:
    """Run one Ray task."""
    cluster.one_thread()
    return exporting.export_shard(task.job, task.work, task.store.locate if task.store else None)


def run(arguments: argparse.Namespace) -> int:
    """Export what is left of the clips, then write the table of rejections and the card."""
    console.absolute(arguments, "clips", "media", "out")
    console.keep_apart(arguments, "clips", "media")
    job = exporting.prepare(arguments.out, arguments.clips, arguments.format)
    clips = exporting.read_clips(job.clips)
    store = find_store(arguments, [s for segments in clips.values() for s in segments])
    storage.make_directory(job.out)
    with lock.Lock(storage.join(job.out, exporting.LOCK_FILE), f"--out {job.out}", tell=say) as mine:
        state = shards.read_state(job.root)
        exporting.check_same(job, state, clips)
        if n_replaced := exporting.forget_replaced(job, state, clips.keys()):
            say(f"{n_replaced} shards of clips were extracted again, and are exported again")
            state = shards.read_state(job.root)
        works = exporting.plan_work(job, state, clips, store)
        if works or n_replaced:
            storage.delete_file(storage.join(job.out, exporting.CARD))  # until all is there
        drive(arguments, job, clips, works, store, state, mine)
        state = shards.read_state(job.root)
        exporting.sweep(job, state, clips.keys())
        exporting.write_rejections(job, state)
        missing = sum(map(len, clips.values())) - len(state.clip_ids) - len(state.rejections)
        if not missing:
            exporting.write_card(job, state)
    return tell_result(job, state, missing)


def find_store(arguments: argparse.Namespace, segments: Sequence[Segment]) -> MediaStore | None:
    """List the media store, of which nothing is downloaded here; UsageError where there is none and one is needed."""
    remote = sum(map(fetching.is_remote, segments))
    if remote and not arguments.media:
        fail(f"{remote} clips are of downloaded media: say with --media FOLDER where these were kept")
    if remote and not storage.exists(arguments.media):
        fail(f"--media {arguments.media} doesn't exist; give the folder that extraction downloaded to")
    return open_store(arguments.media, segments, several_of(segments)) if remote else None


def drive(
    arguments: argparse.Namespace,
    job: Export,
    clips: Clips,
    works: Sequence[Work],
    store: MediaStore | None,
    state: shards.State,
    mine: lock.Lock,
) -> None:
    """Do what is left."""
    total, todo = sum(map(len, clips.values())), {s.segment_id for w in works for s in w.segments}
    if done := total - len(todo):
        say(f"done before: {done} of {total} clips")
    with (
        runners.session(arguments.in_process or not works) as runner,
        Progress(
            "export",
            total,
            "clips",
            done=done,
            rejected=Counter(str(r.reason) for i, r in state.rejections.items() if i not in todo),
            status=storage.join(job.out, exporting.STATUS_FILE),
            metrics=isinstance(runner, runners.OnRay),
        ) as progress,
    ):
        extract_shards(works, job, runner, progress, function=export_shard, store=store, locks=[mine])


def tell_result(job: Export, state: shards.State, missing: int) -> int:
    """Say what became of the clips; return the exit status."""
    reasons = Counter(r.reason for r in state.rejections.values())
    say(f"{len(state.clip_ids)} clips exported and {reasons.total()} rejected, in {job.out}")
    for reason, count in reasons.most_common():
        say(f"  rejected, {reason}: {count}")
    if missing:
        say(f"{missing} clips are in neither; run the same command again")
    return console.SHORTFALL if missing else console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv, "the same command goes on from here")


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.export import main as run_main

    sys.exit(run_main())
