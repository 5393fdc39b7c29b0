"""Audit an extraction: is every committed file whole, and what is in the data.

Every shard file is read once, one at a time per worker. What remains of a clip is a fingerprint of 600 bytes, by which
it is compared with all others.

Four lists name clips that may teach a network something wrong; pipelines.train --without leaves
out those of the lists that it is given. The card counts them, and those that can't be told.

- `still`: the pictures don't change, as far as the picture network sees. It compares what the network
  said of pictures of which it was shown the same parts, with many looks those eight seconds apart. So
  shorter clips, and those without a picture network, can't be told. Where the camera stands still, and
  what moves is a tenth or less as wide as the picture, a clip may be listed.
- `stops`: for the last two seconds or more there is no sound, or less than -60 dB of the clip's mean power. So are
  clips whose sound track ends that much before the pictures.
- `again`: the same recording as another clip. The first one in the order test, val, train, and then by
  id, isn't listed. Excerpts of one medium are the same where they share more than half of their time;
  others where they sound the same. Clips under 3 s, and those in which nothing happens, can't be told.
- `disagree`: by the sound alone, the model gives less than 5 % to each object that the pictures or the
  table's labels show. It can't be told where nothing is shown, or what the model doesn't know. The
  starter model lists 2 to 6 % of clips wrongly, and finds two thirds of those with another clip's
  sound; a model that was trained on such clips errs less.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipelines import UNUSABLE, arguments_of, begin

EPILOG = """\
examples:
  python -m pipelines.audit --clips out/clips --out out/audit
  on a cluster (other options go to Beam):
  python -m pipelines.audit --clips gs://B/clips --out gs://B/audit --runner FlinkRunner --flink_master HOST:8081
  with the ears of a model of your own:
  python -m pipelines.audit --clips out/clips --out out/audit --model out/run/model

DIR gets card.md, card.json, the card's plots and the lists.

exit status: 0 all is whole; 1 something is damaged, and is named; 2 unusable arguments or input."""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("audit", __doc__, EPILOG, abbreviations=False)
    p.add_argument("--clips", required=True, metavar="DIR", help="the folder or URI that extraction wrote")
    p.add_argument("--out", required=True, metavar="DIR", help="where the data card and the lists go")
    p.add_argument("--model", help="whose ears say what sounds, for `disagree` (default: the starter model)")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np
import pyarrow as pa

from avsep import audit, datacard, duplicates, lock, plots, shards, starter, storage, suspects
from avsep.audit import FACTS_SCHEMA, Findings
from avsep.factors import DataConfig
from avsep.model import Model
from avsep.shards import DataFile
from pipelines import cluster, console, runners
from pipelines.console import complain, fail, say

logging.disable(logging.WARNING)  # beam warns of cloud clients that nobody asked for
import apache_beam as beam
from apache_beam.pvalue import AsSingleton, TaggedOutput

logging.disable(logging.NOTSET)


FileToCheck = tuple[str, DataFile, str, frozenset[str]]  # kind, file, digest, ids of rejections that stand


load_listener = functools.lru_cache(maxsize=1)(suspects.Listener.load)  # once a process


def check(work: FileToCheck, clips: str, model: str) -> Iterator[pa.Table | TaggedOutput]:
    """Check one file: facts of its clips, and findings."""
    cluster.one_thread()
    found, facts = audit.check_file(clips, *work, load_listener(model))
    yield TaggedOutput("findings", found)
    if len(facts):
        yield facts


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    """Put tables of facts together."""
    return pa.concat_tables([FACTS_SCHEMA.empty_table(), *tables]).combine_chunks()


def by_media(facts: pa.Table) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Key each clip by what it may share with others: its media's hash, its source."""
    for fact in facts.drop_columns(["fingerprint"]).to_pylist():
        yield ("sha256", fact["media_sha256"]), fact
        yield ("source", fact["source"]), fact


def shared(keyed: tuple[tuple[str, str], Iterable[dict[str, Any]]]) -> Findings:
    """Report clips that share a file or a source: pairs of different splits, and the same excerpts."""
    (what, _), group = keyed
    facts = list(group)
    return Findings(pairs=duplicates.shared_media(what, facts), same=duplicates.same_excerpts(facts))


def near(facts: pa.Table, others: pa.Table) -> Findings:
    """Report clips that sound like another one."""
    pairs = duplicates.near_duplicates(facts, others)
    return Findings(pairs=[p for p in pairs if p.one_split != p.other_split], same=pairs)


def write_findings(found: Findings, path: str) -> None:
    """Write findings as JSON."""
    raw = {
        "counts": [[*key, n] for key, n in found.counts.items()],
        "damage": [asdict(f) for f in found.damage],
        "pairs": [asdict(p) for p in found.pairs],
        "same": [asdict(p) for p in found.same],
        "suspects": [asdict(s) for s in found.suspects],
    }
    storage.write_text(path, json.dumps(raw))


def read_findings(path: str) -> Findings:
    """Read what `write_findings` wrote."""
    raw = json.loads(storage.read_bytes(path))
    found = Findings(
        damage=[audit.Finding(**f) for f in raw["damage"]],
        pairs=[duplicates.Pair(**p) for p in raw["pairs"]],
        same=[duplicates.Pair(**p) for p in raw["same"]],
        suspects=[suspects.Suspect(**s) for s in raw["suspects"]],
    )
    found.counts.update({tuple(key): n for *key, n in raw["counts"]})
    return found


def build(pipeline: beam.Pipeline, work: list[FileToCheck], clips: str, model: str, path: str) -> None:
    """Lay out the pass over the files of `clips`, heard by `model`, to findings at `path`."""
    checked = (
        pipeline
        | "files" >> beam.Create(work)
        | "spread" >> beam.Reshuffle()
        | "check" >> beam.FlatMap(check, clips, model).with_outputs("findings", main="facts")
    )
    together = checked.facts | "together" >> beam.CombineGlobally(concat)
    others = AsSingleton(together | "rank" >> beam.Map(duplicates.ranked))
    media = (
        checked.facts
        | "by media" >> beam.FlatMap(by_media)
        | "same media" >> beam.GroupByKey()
        | "shared" >> beam.Map(shared)
    )
    sounds = checked.facts | "near" >> beam.Map(near, others)
    _ = (
        (checked.findings, media, sounds)
        | beam.Flatten()
        | "add" >> beam.CombineGlobally(audit.add_findings)
        | "write" >> beam.Map(write_findings, path)
    )


def plan(commits: Sequence[shards.Commit]) -> list[FileToCheck]:
    """List the files to check."""
    standing = shards.rejection_files(commits)
    work: list[FileToCheck] = []
    for c in commits:
        if c.clips:
            work.append(("clips", c.clips, c.digest, frozenset()))
        if c.rejections:
            work.append(("rejections", c.rejections, c.digest, frozenset(standing.get(c.rejections.path, ()))))
    return work


def find_configuration(clips: str, commits: Sequence[shards.Commit]) -> dict[str, Any] | None:
    """Return what the clips were made with, as the first of their files that can be read says; None where none can."""
    for file in (c.clips for c in commits if c.clips):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            return shards.configuration_in(storage.join(clips, file.path))
    return None


def run(arguments: argparse.Namespace, options: Any) -> int:
    """Audit a folder of clips."""
    console.absolute(arguments, "clips", "out", "model")
    console.keep_apart(arguments, "clips")
    clips, out = arguments.clips, arguments.out
    if not storage.exists(storage.join(clips, "commits")):
        fail(f"{clips} holds no commits/; give the folder that pipelines.extract wrote with --out")
    writing = lock.is_held(storage.join(clips, shards.LOCK_FILE))
    commits, findings = audit.check_commits(clips, writing=writing)
    if not commits and not findings:
        fail(f"{clips} holds no commit records; run pipelines.extract to it first")
    made_with, model = find_configuration(clips, commits), arguments.model or starter.PATH
    check_model(arguments.model, made_with)
    work = plan(commits)
    say(f"checking {len(work)} files of {len(commits)} commits")
    path = storage.join(out, "_audit_in_progress.json")
    storage.make_directory(out)
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline, work, clips, model, path)
        pipeline.run().wait_until_finish()
        found = audit.add_findings([Findings(damage=findings), read_findings(path)])
    finally:
        storage.delete_file(path)
    files = {i: c.clips.path for c in commits if c.clips for i in c.clip_ids}
    found.suspects += suspects.same_recordings(found.same, files)
    suspects.write_lists(out, found.suspects)
    card = datacard.make_card(found, made_with)
    write_card(card, out, storage.name(clips.rstrip("/")), writing)
    return say_card(card, out)


def check_model(model: str | None, made_with: dict[str, Any] | None) -> None:
    """Raise UsageError for a model that can't listen to the clips."""
    if model is None or made_with is None:
        return
    config = Model.load(model).config  # damaged weights are told here, not by each worker
    extraction = DataConfig.from_dict(made_with).extraction
    if not suspects.is_heard(config, extraction):
        its, ours = (f"{c.stft} and {c.n_bases} bases" for c in (config.extraction, extraction))
        fail(f"--model {model} works on {its}, the clips have {ours}: give a model trained on such clips")


def write_card(card: dict[str, Any], out: str, name: str, writing: bool) -> None:
    """Write the card: JSON, Markdown and plots."""
    present = list(card["cooccurrence"])
    together = np.array([[card["cooccurrence"][a].get(b, 0) for b in present] for a in present], float)
    together = together.reshape(len(present), len(present))
    panels = [
        (label, card[key]["edges"], card[key]["counts"])
        for label, key in (("duration in s", "duration_s"), ("RMS level in dB of full scale", "rms_db"))
    ]
    storage.write_bytes(storage.join(out, "cooccurrence.png"), plots.cooccurrence(together, present))
    storage.write_bytes(storage.join(out, "distributions.png"), plots.histograms(panels))
    title = f"Data card: {name}" + (" (extraction still running)" if writing else "")
    storage.write_text(storage.join(out, "card.md"), datacard.markdown(card, title))
    storage.write_text(storage.join(out, "card.json"), json.dumps(card, indent=1) + "\n")


def say_card(card: dict[str, Any], out: str) -> int:
    """Say what was found; return the exit status."""
    splits = ", ".join(f"{split} {n:,}" for split, n in card["clips"].items())
    say(f"{sum(card['clips'].values()):,} clips ({splits}), {sum(card['rejections'].values()):,} rejections")
    kinds = [p["kind"] for p in card["duplicates"]]
    if kinds:
        said = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        say(f"{len(kinds)} pairs of clips in different splits share sound or source ({said}); see the card")
    for kind, one in card["suspects"].items():
        n, unknown = sum(one["clips"].values()), sum(one["unknown"].values())
        if n or unknown:
            said = f"; of {unknown:,} others that can't be told" * bool(unknown)
            say(f"{n:,} clip{'s' * (n != 1)} in {suspects.list_file(kind)}: {suspects.KINDS[kind]}{said}")
    for finding in card["damage"]:
        say(f"damaged: {finding['path']}: {finding['detail']}")
    say(f"written: {storage.join(out, 'card.md')}, card.json")
    return console.SHORTFALL if card["damage"] else console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    try:
        arguments, others = parser().parse_known_args(argv)
        options = runners.beam_options(others)
    except ValueError as error:
        complain(f"pipelines.audit: {error}")
        return UNUSABLE
    return console.guarded(lambda: run(arguments, options), "pipelines.audit")


if __name__ == "__main__":
    from pipelines.audit import main as run_main  # other processes know our functions by this name

    sys.exit(run_main())
