"""Segments from AudioSet's, MUSIC's, AVE's or VGGSound's own files, or any table of media files, with Apache Beam.

Input is cut into blocks of lines, row groups or files, and each becomes an Arrow table of segments. The tables meet
again in ranges of segment_id, where repeats are found and Parquet files written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pipelines import arguments_of, begin

EPILOG = """\
examples:
  a table of one's own, with a column source (paths relative to the table) and any of segment_id, start_s, end_s,
  split, objects, labels:
    python -m pipelines.manifest --table clips.csv --out out/manifest
  AudioSet (files with 'eval' in their name become split test, 4 % of the others val):
    python -m pipelines.manifest --audioset balanced_train_segments.csv unbalanced_train_segments.csv \\
        eval_segments.csv --ontology ontology.json --out out/manifest
  MUSIC, AVE and VGGSound, as published:
    python -m pipelines.manifest --music MUSIC_solo_videos.json MUSIC_duet_videos.json --out out/music
    python -m pipelines.manifest --ave Annotations.txt trainSet.txt valSet.txt testSet.txt --out out/ave
    python -m pipelines.manifest --vggsound vggsound.csv --out out/vggsound
  the same on a cluster (other options go to Beam):
    python -m pipelines.manifest --audioset gs://B/eval_segments.csv --ontology gs://B/ontology.json \\
        --out gs://B/manifest --runner FlinkRunner --flink_master HOST:8081

MUSIC's videos give excerpts of 10 s at 10, 30, 50, 70, 90 and 110 s; extract rejects what lies beyond a video's end.
By a hash of its id 4 % of the videos are val, 10 % test. AVE's rows are train unless one of its sets is given. AVE's
and VGGSound's splits are as published. The objects are the set's own. With --objects, an excerpt whose label is none
of them by name or alias is left out, and counted; a label that the set itself doesn't have is a dead letter. Rows for
one excerpt are merged.

DIR gets segments.parquet (several files beyond half a million segments), statistics.json (written
last) and dead_letters.jsonl: rows that can't be used, with file, line, reason and text.

exit status: 0 done; 1 done, but rows of one's own table are among the dead letters, or none of a set's
is left; 2 unusable arguments or input, such as a table without a usable row."""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of(
        "manifest", "Write the manifest: the segments that extraction is to process.", EPILOG, abbreviations=False
    )
    sources = p.add_mutually_exclusive_group(required=True)
    sources.add_argument("--table", metavar="CSV_OR_PARQUET", help="a table of media files")
    sources.add_argument("--audioset", nargs="+", metavar="CSV", help="AudioSet's segment files")
    sources.add_argument("--music", nargs="+", metavar="JSON", help="MUSIC's files, or MUSIC-21's")
    sources.add_argument("--ave", nargs="+", metavar="FILE", help="AVE's Annotations.txt, and its files of splits")
    sources.add_argument("--vggsound", nargs=1, metavar="CSV", help="VGGSound's vggsound.csv")
    p.add_argument("--ontology", metavar="JSON", help="AudioSet's ontology.json")
    p.add_argument("--own-node-only", action="store_true", help="don't count the ontology's descendants")
    p.add_argument(
        "--objects",
        metavar="FILE",
        help="a vocabulary of your own, JSON or CSV (default: the set's own, else the 23 objects)",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="where to write; a manifest there is replaced")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import pyarrow as pa

from avsep import audioset, storage
from avsep.datasets import PLANS
from avsep.manifest import (
    SHARD_ROWS,
    STAGING,
    WRITES,
    Block,
    Plan,
    Reader,
    Tally,
    add_samples,
    commit,
    first_reason,
    into_ranges,
    one_line,
    plan_audioset,
    plan_table,
    read_objects,
    read_statistics,
    report_lines,
    sample_ids,
    shard_bounds,
    sources_of,
    write_dead_letters,
    write_shard,
    write_statistics,
)
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import (
    comment_note,
    describe_sources,
)
from pipelines import console, runners
from pipelines.console import complain, say

logging.disable(logging.WARNING)  # beam warns of cloud clients that nobody asked for
import apache_beam as beam
from apache_beam.pvalue import AsSingleton, TaggedOutput

logging.disable(logging.NOTSET)


def tagged(block: Block, read: Reader) -> Iterator[pa.Table | TaggedOutput]:
    """Read a block; its tally goes a way of its own."""
    for found in read(block):
        yield TaggedOutput("tallies", found) if isinstance(found, Tally) else found


def build(
    pipeline: beam.Pipeline,
    blocks: list[Block],
    read: Reader,
    uris: list[str],
    folder: str,
    *,
    repeats: str,
    vocabulary: Vocabulary,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Lay out the whole pass from blocks of `uris` to the files in `folder`."""
    letters = storage.join(folder, "dead_letters.jsonl")
    parsed = (
        pipeline
        | "blocks" >> beam.Create(blocks)
        | "spread" >> beam.Reshuffle()
        | "parse" >> beam.FlatMap(tagged, read).with_outputs("tallies", main="segments")
    )
    bounds = AsSingleton(
        parsed.segments
        | "sample" >> beam.Map(sample_ids)
        | "samples" >> beam.CombineGlobally(add_samples)
        | "bounds" >> beam.Map(shard_bounds, shard_rows)
    )
    written = (
        parsed.segments
        | "ranges" >> beam.FlatMap(into_ranges, bounds)
        | "shards" >> beam.GroupByKey()
        | "write" >> beam.Map(write_shard, bounds, folder, repeats=repeats, vocabulary=vocabulary)
    )
    tallies = (parsed.tallies, written) | beam.Flatten()
    _ = (
        tallies
        | "counts" >> beam.Map(lambda tally: tally.counts)
        | "statistics" >> beam.CombineGlobally(audioset.add_counts)
        | "write statistics" >> beam.Map(write_statistics, storage.join(folder, "statistics.json"), vocabulary)
    )
    _ = (
        tallies
        | "bring together" >> beam.Map(lambda tally: (None, tally))
        | "tallies" >> beam.GroupByKey()
        | "dead letters" >> beam.MapTuple(lambda _, group: write_dead_letters(group, uris, letters))
    )


def plan_of(args: argparse.Namespace) -> tuple[list[str], Plan]:
    """Check arguments and input → its files, and how they are read. Raises ValueError or OSError."""
    own = read_objects(storage.resolve(args.objects, ".")) if args.objects else None
    if not args.audioset and (args.ontology or args.own_node_only):
        raise ValueError("--ontology and --own-node-only go with --audioset alone")
    if args.table:
        uris = [storage.resolve(args.table, ".")]
        return uris, plan_table(uris[0], own)
    for name, plan in PLANS.items():
        if given := getattr(args, name):
            uris = list(dict.fromkeys(storage.resolve(uri, ".") for uri in given))
            return uris, plan(uris, own)
    if not args.ontology and not args.own_node_only:
        raise ValueError("--audioset needs --ontology ontology.json (or --own-node-only to do without)")
    uris = list(dict.fromkeys(storage.resolve(uri, ".") for uri in args.audioset))
    ontology = storage.resolve(args.ontology, ".") if args.ontology else None
    return uris, plan_audioset(uris, ontology, args.own_node_only, own or AUDIOSET_23)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    try:
        args, others = parser().parse_known_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        options = runners.beam_options(others)
        out = storage.resolve(args.out, ".")
        console.keep_apart(args, "table", "audioset", *PLANS, "ontology", "objects", writes=WRITES)
        uris, plan = plan_of(args)
        pipeline = beam.Pipeline(options=options)
        staging = storage.join(out, STAGING)
        storage.make_directory(out)
        storage.delete_folder(staging)
        storage.make_directory(staging)
        for note in plan.notes:
            say(note)
    except (ValueError, OSError, ImportError, console.UsageError) as error:
        complain(f"manifest: {one_line(error)}")
        return 2
    say(f"reading {', '.join(map(storage.name, uris))}")
    try:
        build(
            pipeline,
            plan.blocks,
            plan.read,
            uris,
            staging,
            repeats=plan.repeats,
            vocabulary=plan.vocabulary,
        )
        if console.is_local(options):  # what a step raises comes back to us; Beam would print its traceback first
            logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
        pipeline.run().wait_until_finish()
        first = first_reason(storage.join(staging, "dead_letters.jsonl"))
        if args.table and not read_statistics(staging)["kept"]:
            raise console.UsageError(f"{uris[0]}: no row can be used; {first or 'there is none'}")
        segments = commit(staging, out, plan.vocabulary)
    except (OSError, console.UsageError) as error:
        complain(f"manifest: {one_line(error)}")
        return 2
    finally:
        with suppress(OSError):  # the next run does it
            storage.delete_folder(staging)
    statistics = read_statistics(out)
    if statistics["comment_lines"]:
        say(comment_note(uris[0], statistics["comment_lines"]))
    for line in report_lines(statistics, out, segments):
        say(line)
    if args.table and console.is_local(options) and (line := describe_sources(sources_of(out, segments))):
        say(line)
    n_dead, letters = statistics["dead_letters"], storage.join(out, "dead_letters.jsonl")
    if n_dead:
        say(f"{n_dead:,} rows can't be used; see {letters} for lines and reasons; {first}")
    if not statistics["kept"]:
        say("no segment is left: the manifest is empty")
    return 1 if not statistics["kept"] or (args.table and n_dead) else 0


if __name__ == "__main__":
    from pipelines.manifest import main as run  # other processes know our classes by this name

    sys.exit(console.guarded(run, "pipelines.manifest"))
