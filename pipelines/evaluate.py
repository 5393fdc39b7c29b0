"""Measure separators on mixtures with known sources: results.json, clips.csv and report.html.

Floor (the mixture) and ceiling (the ideal mask) are rows of the table like the others. The published protocols take the
clips in which one object sounds alone. `pairs` mixes each two of different objects as they are: 200 of them, drawn
once, where there are more. `denoising` adds white noise as loud as the clip; the SDR gain is then NSDR. `absent` asks
of each clip for one object more, which isn't there, and measures what that gets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.evaluate --model out/run/model --segments clips/segments.csv --references clips/references \\
      --out out/results
  python -m pipelines.evaluate --model out/run/model --paper-model out/paper/model --segments out/manifest \\
      --references clips/references --out out/results --given labels
  python -m pipelines.evaluate --model out/run/model --segments out/music --media copies/music --protocol pairs \\
      --out out/results
  python -m pipelines.evaluate --model out/run/model --compare before=out/last/model --compare tuned=out/tuned/model \\
      --segments out/manifest --references clips/references --out out/results
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("evaluate", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, help="the model folder")
    p.add_argument("--paper-model", help="a model trained with --recipe paper, as a row beside it")
    p.add_argument(
        "--compare", action="append", default=[], metavar="NAME=DIR", help="another model or U-Net, a row by that name"
    )
    p.add_argument("--segments", required=True, help="a table, or a manifest's folder")
    p.add_argument(
        "--references",
        help="folder of SEGMENT_ID/OBJECT.flac (or .wav) and _rest; without it `pairs`, `denoising` and `absent` "
        "take clips of which the table knows one object, which are their own references",
    )
    p.add_argument("--media", metavar="URI", help="where extract found, or kept, the media of youtube:ID and the like")
    p.add_argument("--out", required=True, help="folder of results.json, clips.csv and report.html")
    p.add_argument("--split", default="test", help="train, val or test")
    p.add_argument(
        "--given",
        choices=("objects", "labels", "none"),
        default="objects",
        help="what the separator is told is there: the true objects, the table's labels, or nothing",
    )
    p.add_argument(
        "--protocol",
        choices=("mixtures", "pairs", "denoising", "absent"),
        default="mixtures",
        help="the clips; all pairs of single-source clips; these with noise at 0 dB; clips asked for an absent object",
    )
    p.add_argument("--pairs", metavar="FILE", help="measure the pairs of a pairs.csv that another run wrote")
    p.add_argument("--replace", action="store_true", help="write over another model's results, kept in OUT/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np

from avsep import protocols, results, results_report, storage
from avsep.evaluation import BESIDE, Case, Cases, ClipResult, alone, bounded, build_case, load, measure, together
from avsep.model import ModelConfig, fingerprint
from avsep.objects import Vocabulary
from avsep.records import ClipError, Segment, check_vocabularies, read_segments, read_vocabulary
from avsep.report import Report
from avsep.separation import Separator
from avsep.unet import UNetSeparator
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress

RESULTS = ("results.json", "clips.csv", protocols.PAIRS_FILE, "report.html")
_NAME = re.compile(r"[a-z0-9_]+")
_WORST = 10


@dataclass(frozen=True)
class Entry:
    """A model to measure, by its name in the results."""

    name: str
    directory: str
    sha256: str  # of its files


@dataclass(frozen=True)
class Setup:
    """What to measure with, and how."""

    models: tuple[Entry, ...]  # in the order of the tables; one of them is the default
    references: str | None
    given: str = "objects"
    protocol: str = "mixtures"
    objects: tuple[str, ...] = ()  # of which one that is absent is asked for


def choose(
    runner: runners.Runner, segments: Sequence[Segment], setup: Setup, listed: str | None
) -> tuple[Cases, list[str]]:
    """Return what a protocol measures, clips or pairs of them, and what is wrong with clips that can't be used."""
    if listed:
        return protocols.read_pairs(listed, segments), []
    if setup.protocol in ("mixtures", "absent") and setup.references:
        return [(s,) for s in segments], []
    found = runners.map_in_order(runner, alone, [(setup.references, s) for s in segments])
    errors = [error for _, error in found if error]
    singles = [(s, name) for s, (name, _) in zip(segments, found, strict=True) if name is not None]
    say(f"evaluate: one object sounds alone in {len(singles)} of {len(segments)} clips")
    if setup.protocol != "pairs":
        return [(s,) for s, _ in singles], errors
    pairs, n_pairs = protocols.draw_pairs(singles)
    if n_pairs > len(pairs):
        say(f"evaluate: {len(pairs)} of their {n_pairs} pairs of different objects are measured")
    return pairs, errors


@functools.lru_cache(maxsize=1)
def separators(models: tuple[Entry, ...]) -> dict[str, Separator | UNetSeparator]:
    """Load the models, once in each worker."""
    return together({m.name: load(m.directory) for m in models})


def case_of(setup: Setup, segments: Sequence[Segment]) -> Case:
    """Load or make what is measured."""
    default = separators(setup.models)["default"]
    return build_case(
        segments, setup.references, default.sample_rate, setup.protocol, default.vocabulary, setup.objects
    )


def evaluate_clip(setup: Setup, segments: Sequence[Segment]) -> ClipResult:
    """Run every separator on one clip, or pair of clips, and measure it."""
    cluster.one_thread()
    try:
        return measure(case_of(setup, segments), separators(setup.models), setup.given)
    except (ClipError, ValueError) as error:
        return ClipResult(segments[0].segment_id, [], {}, error=str(error))


def clip_section(setup: Setup, segments: Sequence[Segment], clip: ClipResult) -> Report:
    """Show one clip, or pair of clips, as the default separates it."""
    cluster.one_thread()
    default = separators(setup.models)["default"]
    return results_report.clip_section(segments, case_of(setup, segments), default, setup.given, clip)


def named_models(arguments: argparse.Namespace) -> tuple[Entry, ...]:
    """Read which models are to be measured, under which names; UsageError for names that can't be."""
    named = {"paper": arguments.paper_model, "default": arguments.model}
    for text in arguments.compare:
        name, _, directory = text.partition("=")
        if not directory or not _NAME.fullmatch(name):
            fail(f"--compare {text}: give NAME=DIR, with a name of small letters, digits and _, such as mine=out/model")
        if name in BESIDE or name in named:
            fail(f"--compare {text}: {name} is the name of another separator in the results; give another one")
        named[name] = directory
    here = {name: storage.resolve(directory, ".") for name, directory in named.items() if directory}
    return tuple(Entry(name, directory, fingerprint(directory)) for name, directory in here.items())


def check_models(models: Sequence[Entry]) -> None:
    """Load the models, so that a mistake is told before the work begins: several sample rates or vocabularies."""
    loaded = separators(tuple(models))
    rates = {name: separator.sample_rate for name, separator in loaded.items()}
    own = loaded["default"].vocabulary
    for m in models:
        check_vocabularies("--model", own, m.directory, loaded[m.name].vocabulary)
        if rates[m.name] != rates["default"]:
            flag = f"--paper-model {m.directory}" if m.name == "paper" else f"--compare {m.name}={m.directory}"
            fail(f"{flag} works at {rates[m.name]} Hz and --model at {rates['default']} Hz; give two of one rate")
        if lacking := [name for name in loaded["default"].objects if name not in loaded[m.name].objects]:
            say(f"evaluate: {m.name} knows no {', '.join(lacking)}: clips of them are measured for no separator")


def chosen_segments(arguments: argparse.Namespace, vocabulary: Vocabulary) -> list[Segment]:
    """Read the segments of the split; UsageError where there is none, or nothing of what they are to tell."""
    protocol = f"--protocol {arguments.protocol}"
    if arguments.protocol != "mixtures" and arguments.given != "objects":
        fail(f"--given {arguments.given}: with {protocol} the audible objects are told; leave --given out")
    if arguments.protocol == "mixtures" and not arguments.references:
        fail("--references is missing: the true sounds of each mixture are needed, but for the other protocols")
    if arguments.protocol != "pairs" and arguments.pairs:
        fail(f"--pairs {arguments.pairs}: {protocol} measures no pairs; leave it out, or say --protocol pairs")
    theirs = read_vocabulary(arguments.segments, vocabulary)
    check_vocabularies(f"--segments {arguments.segments}", theirs, f"--model {arguments.model}", vocabulary)
    everything = read_segments(arguments.segments, say, vocabulary)
    segments = sorted((s for s in everything if s.split == arguments.split), key=lambda s: s.segment_id)
    if not segments:
        splits = ", ".join(sorted({s.split for s in everything})) or "none"
        fail(f"{arguments.segments} holds no segments of --split {arguments.split}; its splits: {splits}")
    segments, lacking = protocols.located(segments, arguments.media, everything)
    if lacking:
        say(f"evaluate: {lacking.total()} clips are not in {arguments.media}: {protocols.describe(lacking)}")
    if arguments.given == "labels" and (untold := sum(s.labels is None for s in segments)):
        if untold == len(segments):
            fail(f"--given labels: {arguments.segments} gives none; add a column `labels`, or say --given none")
        say(f"evaluate: {untold} of {len(segments)} clips have no labels: of them the separators are told nothing")
    return segments


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write results.json, clips.csv and report.html."""
    models = named_models(arguments)
    arguments.compare = [m.directory for m in models if m.name not in ("paper", "default")]
    console.absolute(arguments, "model", "paper_model", "references", "media", "pairs", "out")
    inputs = ("model", "paper_model", "compare", "segments", "references", "media", "pairs")
    console.keep_apart(arguments, *inputs, writes=RESULTS)
    vocabulary = ModelConfig.read(arguments.model).vocabulary
    segments = chosen_segments(arguments, vocabulary)
    source = provenance(arguments, models, segments)
    check_free(arguments.out, source, arguments.replace)
    check_models(models)  # takes seconds: the rest is told first
    storage.make_directory(arguments.out)
    heard = protocols.heard_in(segments, vocabulary.names)
    setup = Setup(models, arguments.references, arguments.given, arguments.protocol, heard)
    with runners.session(arguments.in_process) as runner:
        cases, errors = choose(runner, segments, setup, arguments.pairs)
        if not cases:
            fail(f"--protocol {setup.protocol}: {arguments.segments} has too few clips with one object alone")
        clips = []
        with Progress("evaluate", len(cases), "clips") as progress:
            for clip in runner.map(evaluate_clip, ((setup, c) for c in cases)):
                clips.append(clip)
                progress.add(1)
        usable = sorted((c for c in clips if not c.error), key=lambda c: c.segment_id)
        errors += [f"{c.segment_id}: {c.error}" for c in clips if c.error]
        if not usable:
            fail(f"no clip of split {arguments.split} could be measured; the first: {errors[0]}")
        worst = sorted(usable, key=lambda c: float(np.nanmean(bounded(c.figures["default"]["sdr"]))))[:_WORST]
        by_id = {" + ".join(s.segment_id for s in c): c for c in cases}
        sections = runners.map_in_order(runner, clip_section, [(setup, by_id[c.segment_id], c) for c in worst])
    write(arguments, source, usable, sections)
    if setup.protocol == "pairs":
        storage.write_text(storage.join(arguments.out, protocols.PAIRS_FILE), protocols.pairs_table(cases))
    for error in errors:
        say(f"not measured: {error}")
    say(" and ".join(storage.join(arguments.out, f) for f in (RESULTS[0], RESULTS[-1])))
    return console.SHORTFALL if errors else console.DONE


def write(
    arguments: argparse.Namespace, source: dict[str, str], clips: Sequence[ClipResult], sections: Sequence[Report]
) -> None:
    """Write what RESULTS names to OUT, and the table to the terminal."""
    out, protocol = arguments.out, arguments.protocol
    found = results.summarize(clips) | {"protocol": protocol, "source": source}
    title = protocols.TITLES[protocol].format(s="s" * (len(clips) != 1))
    report = Report(f"Separation of {len(clips)} {arguments.split} {title}")
    results_report.add_results(report, found, arguments.given)
    report.heading(f"Listen to the worst {results_report.plural(len(sections), 'clip')}")
    for section in sections:
        report.append(section)
    console.put_aside(out, RESULTS)
    storage.write_text(storage.join(out, "results.json"), json.dumps(results.without_nan(found), indent=1))
    storage.write_text(storage.join(out, "clips.csv"), results.clip_table(clips))
    storage.write_text(storage.join(out, "report.html"), report.html())
    for line in results_report.console_table(found):
        say(line)


def provenance(arguments: argparse.Namespace, models: Sequence[Entry], segments: Sequence[Segment]) -> dict[str, str]:
    """Say what results are of: hashes of the models and of the segments, and the settings."""
    settings = {f"--{name}": str(getattr(arguments, name)) for name in ("split", "given", "protocol")}
    if arguments.pairs:
        settings["--pairs"] = hashlib.sha256(storage.read_bytes(arguments.pairs)).hexdigest()
    return results.provenance({m.name: m.sha256 for m in models}, segments, settings)


def check_free(out: str, source: dict[str, str], replace: bool) -> None:
    """Raise UsageError where OUT has results of something else, unless they are to be replaced."""
    path = storage.join(out, RESULTS[0])
    if storage.exists(path) and (other := results.differing(storage.read_bytes(path), source)):
        what = f"--out {out} holds results of another {other.removeprefix('--')}; another --out leaves them alone"
        console.check_free(out, RESULTS, what, replace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.evaluate import main as run_main

    sys.exit(run_main())
