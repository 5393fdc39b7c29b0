"""Measure separators on mixtures with known sources: results.json and report.html.

Floor (the mixture) and ceiling (the ideal mask) are rows of the table like the others. The
published protocols take the clips in which one object sounds alone: `pairs` mixes each two of
different objects as they are (200 of them, drawn once, where there are more), `denoising` adds
white noise as loud as the clip, and the SDR gain is then NSDR.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.evaluate --model out/run/model --segments clips/segments.csv --references clips/references \\
      --out out/results
  python -m pipelines.evaluate --model out/run/model --paper-model out/paper/model --segments out/manifest \\
      --references clips/references --out out/results --given labels
  python -m pipelines.evaluate --model out/run/model --segments out/manifest --references clips/references \\
      --out out/pairs --protocol pairs
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("evaluate", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, help="the model folder")
    p.add_argument("--paper-model", help="a model trained with --recipe paper, as a row beside it")
    p.add_argument("--segments", required=True, help="a table, or a manifest's folder")
    p.add_argument("--references", required=True, help="folder of SEGMENT_ID/OBJECT.flac (or .wav) and _rest")
    p.add_argument("--out", required=True, help="folder of results.json and report.html")
    p.add_argument("--split", default="test", help="train, val or test")
    p.add_argument(
        "--given",
        choices=("objects", "labels", "none"),
        default="objects",
        help="what the separator is told is there: the true objects, the table's labels, or nothing",
    )
    p.add_argument(
        "--protocol",
        choices=("mixtures", "pairs", "denoising"),
        default="mixtures",
        help="the clips as they are, all pairs of single-source clips, or those with noise at 0 dB",
    )
    p.add_argument("--replace", action="store_true", help="write over another model's results, kept in OUT/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np

from avsep import baselines, plots, stages, storage
from avsep.evaluation import (
    FIGURES,
    GAINS,
    HEARD,
    LOST_DB,
    ClipResult,
    alone,
    bounded,
    build_case,
    measure,
    summarise,
    told,
    whole_window,
)
from avsep.model import MODEL_FILES
from avsep.records import ClipError, Segment, read_segments
from avsep.report import Report
from avsep.separation import Separator
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress

BOUNDS = ("mixture", "oracle_assignment", "ideal_mask")
BLIND = ("nmf_clustering", "harmonic_percussive")
TERMS = (
    ("SDR", "signal-to-distortion ratio: how much louder a sound is than all that is wrong with its estimate, in dB."),
    ("SIR", "signal-to-interference ratio: the same, but only what is left of other objects counts as wrong."),
    ("SAR", "signal-to-artefacts ratio: the same, but only what the separation itself added counts as wrong."),
    ("SI-SDR", "the SDR of the estimate at its best volume."),
    ("mixture", "no separation: the whole sound as the estimate of each object. The floor."),
    ("nmf clustering", "the clip's bases grouped by likeness alone, in the best order: nothing is learned."),
    ("harmonic percussive", "steady sounds told from struck ones by their shapes alone: nothing is learned."),
    ("paper", "the published method, trained by its own recipe."),
    ("default", "this project's method."),
    ("oracle assignment", "the clip's bases given to their true objects: the best that any assignment can do."),
    ("ideal mask", "masks made of the true sounds: the best that any mask can do. The ceiling."),
)
RESULTS = ("results.json", "report.html")
_SILENT = 1e-4  # of full scale
_WORST = 10
_MOST_PAIRS = 200


@dataclass(frozen=True)
class Job:
    """What to measure with, and how."""

    model: str
    paper_model: str | None
    references: str
    given: str = "objects"
    protocol: str = "mixtures"


def choose(
    runner: runners.Runner, segments: Sequence[Segment], job: Job
) -> tuple[list[tuple[Segment, ...]], list[str]]:
    """Return what a protocol measures, clips or pairs of them, and what is wrong with clips that can't be used."""
    if job.protocol == "mixtures":
        return [(s,) for s in segments], []
    found = runners.map_in_order(runner, alone, [(job.references, s) for s in segments])
    errors = [error for _, error in found if error]
    singles = [(s, name) for s, (name, _) in zip(segments, found, strict=True) if name is not None]
    say(f"evaluate: one object sounds alone in {len(singles)} of {len(segments)} clips")
    if job.protocol == "denoising":
        return [(s,) for s, _ in singles], errors
    pairs = [(a, b) for (a, x), (b, y) in itertools.combinations(singles, 2) if x != y]
    if len(pairs) > _MOST_PAIRS:
        say(f"evaluate: {_MOST_PAIRS} of their {len(pairs)} pairs of different objects are measured")
        chosen = np.random.default_rng(0).choice(len(pairs), _MOST_PAIRS, replace=False)
        pairs = [pairs[i] for i in sorted(chosen)]
    return list(pairs), errors


def evaluate_clip(job: Job, segments: Sequence[Segment]) -> ClipResult:
    """Run every separator on one clip, or pair of clips, and measure it."""
    cluster.one_thread()
    separator = Separator.load(job.model)
    try:
        case = build_case(segments, job.references, separator.stft.sample_rate, job.protocol)
        paper = Separator.load(job.paper_model) if job.paper_model else None
        return measure(case, separator, paper, job.given, job.protocol == "denoising")
    except (ClipError, ValueError) as error:
        return ClipResult(segments[0].segment_id, [], {}, error=str(error))


def everywhere(results: dict[str, Any]) -> dict[str, Any]:
    """Return the separators that were run on every clip, with their figures."""
    entries = results["separators"]
    return {n: e for n, e in entries.items() if e["clips"] == entries["mixture"]["clips"]}


def table_rows(results: dict[str, Any], figures: Sequence[str] = FIGURES) -> list[tuple[str, list[str]]]:
    """Format separators that were run on every clip for a report's table, a row each."""
    rows = []
    for name, entry in everywhere(results).items():
        means = [_db(entry["mean"][f]) for f in figures]
        by_sources = [_db(group["sdr"]) for group in entry["by_sources"].values()]
        rows.append((_kind(name), [_name(name), *means, *_intervals(name, entry), *by_sources]))
    return rows


def table_header(results: dict[str, Any]) -> list[str]:
    """Return the header of `table_rows`."""
    mixture = results["separators"]["mixture"]
    names = ["SDR", "SIR", "SAR", "SI-SDR", *(["95 % of SDR"] if mixture["clips"] > 1 else []), "default ahead by"]
    return ["separator", *names, *(f"SDR, {plural(int(k), 'source')}" for k in mixture["by_sources"])]


def _intervals(name: str, entry: dict[str, Any]) -> list[str]:
    ahead = entry["default_ahead"]
    span = _span(ahead["interval_95"])
    return [
        *([_span(entry["interval_95"])] if entry["clips"] > 1 else []),
        "–" if name == "default" else " ".join([_db(ahead["sdr"]), *([f"({span})"] if span != "–" else [])]),
    ]


def plural(count: int, word: str) -> str:
    """Say how many there are.

    >>> plural(1, "duet"), plural(3, "duet")
    ('1 duet', '3 duets')
    """
    return f"{count} {word}{'s' * (count != 1)}"


def _name(separator: str) -> str:
    return separator.replace("_", " ")


def mean_sdr(results: dict[str, Any]) -> dict[str, float]:
    """Return the mean SDR of each separator that was run on every clip, and has one."""
    means = {n: e["mean"]["sdr"] for n, e in everywhere(results).items()}
    return {n: m for n, m in means.items() if m is not None and np.isfinite(m)}


def verdicts(results: dict[str, Any]) -> list[str]:
    """Say what the mean SDRs mean where a separator is no use: a sentence each."""
    sdr = mean_sdr(results)
    lost = {n: sdr["mixture"] - v for n, v in sdr.items() if n not in BOUNDS and v < sdr["mixture"]}
    text = "{} is worse than doing nothing: {} dB below the mixture as it is"
    said = [text.format(_name(n), _db(by)) for n, by in lost.items()]
    blind = {n: v - sdr["default"] for n, v in sdr.items() if n in BLIND and v > sdr["default"] and n not in lost}
    said += [f"default is {_db(by)} dB worse than {_name(n)}, which learns nothing" for n, by in blind.items()]
    return [f"{s}; more training clips may help" if "default" in s else s for s in said]


def _span(interval: Sequence[float | None]) -> str:
    low, high = map(_db, interval)
    return "–" if low == "–" else f"{low} … {high}"


def _kind(name: str) -> str:
    return "bound" if name in BOUNDS else "ours" if name == "default" else ""


def _db(value: float | None) -> str:
    if value is None or np.isnan(value):  # None: as results.json has it
        return "–"
    return f"{round(value, 1) + 0.0:.1f}"  # zero has no sign


def clip_section(job: Job, segments: Sequence[Segment], clip: ClipResult | None = None) -> Report:
    """Show one clip: frame and relation map, figures if there are any, players of mixture, references and estimates.

    On the map each basis's true owner is ringed.
    """
    cluster.one_thread()
    separator = Separator.load(job.model)
    stft, names = separator.stft, separator.model.config.objects
    case = build_case(segments, job.references, stft.sample_rate, job.protocol)
    separation = separator(case.mixture, **told(case, job.given))
    found = dict(zip(separation.objects, separation.estimates.numpy(), strict=True))
    section = Report("")
    section.heading(f"{case.segment.segment_id}: {', '.join(case.names)}", 3)
    window = whole_window(separator, separation, case).first(separator.extraction.n_bases)
    _, owner = baselines.oracle_assignment(case.mixture, case.everything, window.factors, stft)
    rows = [*(names.index(n) for n in case.names), len(names)]
    frames = [f for f in (stages.middle_picture(s.source, s.start_s, s.end_s) for s in segments) if f is not None]
    figure = plots.relation_map(
        window.relation.numpy(),
        names,
        window.factors.basis_energy.numpy(),
        np.concatenate(frames, 1) if frames else None,
        separation.objects,
        [rows[o] for o in owner.tolist()],
    )
    sounds = [("mixture", case.mixture.numpy())]
    for name, reference in zip(case.names, case.references.numpy(), strict=True):
        if name in found:
            sounds.append((f"{name}, separated", found[name]))
        sounds.append((f"{name}, reference", reference))
    sounds.append(("rest, separated", separation.rest.numpy()))
    if case.rest.abs().max() > _SILENT:
        sounds.append(("rest, reference", case.rest.numpy()))
    loudest = case.mixture.numpy()  # one scale for all: what is faint looks faint
    section.sounds([(c, w, plots.spectrogram(w, stft, beside=loudest)) for c, w in sounds], stft.sample_rate)
    more = Report("")
    more.image(figure, f"Relation map of {case.segment.segment_id} beside a frame of it; rings: the true owners")
    if clip is not None:
        more.table(
            ["SDR, dB", *case.names],
            [(_kind(n), [_name(n), *map(_db, f["sdr"])]) for n, f in clip.figures.items()],
            why(clip),
        )
    section.fold(f"Relation map{' and figures' if clip else ''} of {case.segment.segment_id}", more)
    return section


def why(clip: ClipResult) -> str:
    """Say where a clip's dB go: to bases with the wrong object, to bases that hold two, to the phase."""
    mean = {n: float(np.nanmean(bounded(f["sdr"]))) for n, f in clip.figures.items()}
    energy, right = np.asarray(clip.basis_energy), np.asarray(clip.basis_right, bool)
    share = f"{energy[right].sum() / energy.sum():.0%}" if len(energy) and energy.sum() else "none"
    return (
        f"Of the bases' energy {share} went to the right object. True owners would bring "
        f"{_db(mean['oracle_assignment'] - mean['default'])} dB, and ideal masks another "
        f"{_db(mean['ideal_mask'] - mean['oracle_assignment'])} dB."
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write results.json and report.html."""
    console.absolute(arguments, "model", "paper_model", "references", "out")
    inputs = ("model", "paper_model", "segments", "references")
    console.keep_apart(arguments, *inputs, writes=("results.json", "report.html", "clips.csv"))
    protocol, out = arguments.protocol, arguments.out
    if protocol != "mixtures" and arguments.given != "objects":
        fail(f"--given {arguments.given}: with --protocol {protocol} the audible objects are told; leave --given out")
    everything = read_segments(arguments.segments, say)
    segments = sorted((s for s in everything if s.split == arguments.split), key=lambda s: s.segment_id)
    if not segments:
        splits = ", ".join(sorted({s.split for s in everything})) or "none"
        fail(f"{arguments.segments} holds no segments of --split {arguments.split}; its splits: {splits}")
    if arguments.given == "labels" and (untold := sum(s.labels is None for s in segments)):
        if untold == len(segments):
            fail(f"--given labels: {arguments.segments} gives none; add a column `labels`, or say --given none")
        say(f"evaluate: {untold} of {len(segments)} clips have no labels: of them the separators are told nothing")
    models = [m for m in (arguments.model, arguments.paper_model) if m]
    rates = [Separator.load(m).stft.sample_rate for m in models]  # a mistake is told before the work begins
    if rates[0] != rates[-1]:
        fail(f"--paper-model {models[-1]} works at {rates[-1]} Hz and --model at {rates[0]} Hz; give two of one rate")
    source = provenance(arguments, segments)
    check_free(out, source, arguments.replace)
    storage.make_directory(out)
    job = Job(arguments.model, arguments.paper_model, arguments.references, arguments.given, protocol)
    with runners.session(arguments.in_process) as runner:
        cases, errors = choose(runner, segments, job)
        if not cases:
            fail(f"--protocol {protocol}: {arguments.segments} has too few clips with one object alone; leave it out")
        clips = []
        with Progress("evaluate", len(cases), "clips") as progress:
            for clip in runner.map(evaluate_clip, ((job, c) for c in cases)):
                clips.append(clip)
                progress.add(1)
        usable = sorted((c for c in clips if not c.error), key=lambda c: c.segment_id)
        errors += [f"{c.segment_id}: {c.error}" for c in clips if c.error]
        if not usable:
            fail(f"no clip of split {arguments.split} could be measured; the first: {errors[0]}")
        worst = sorted(usable, key=lambda c: float(np.nanmean(bounded(c.figures["default"]["sdr"]))))[:_WORST]
        by_id = {" + ".join(s.segment_id for s in c): c for c in cases}
        sections = runners.map_in_order(runner, clip_section, [(job, by_id[c.segment_id], c) for c in worst])
    results = summarise(usable) | {"protocol": protocol, "source": source}
    console.put_aside(out, RESULTS)
    storage.write_text(storage.join(out, "results.json"), json.dumps(_without_nan(results), indent=1))
    many = len(usable) != 1
    title = {
        "mixtures": f"clip{'s' * many}",
        "pairs": f"pair{'s' * many} of single-source clips",
        "denoising": f"single-source clip{'s' * many} in noise",
    }
    report = Report(f"Separation of {len(usable)} {arguments.split} {title[protocol]}")
    add_results(report, results, arguments.given)
    report.heading(f"Listen to the worst {plural(len(sections), 'clip')}")
    for section in sections:
        report.append(section)
    storage.write_text(storage.join(out, "report.html"), report.html())
    for line in console_table(results):
        say(line)
    for error in errors:
        say(f"not measured: {error}")
    say(f"{storage.join(out, 'results.json')} and {storage.join(out, 'report.html')}")
    return console.SHORTFALL if errors else console.DONE


def provenance(arguments: argparse.Namespace, segments: Sequence[Segment]) -> dict[str, str]:
    """Say what results are of: hashes of the models and of the segments, and the settings."""

    def sha256(model: str | None) -> str:
        files = [storage.join(model, f) for f in MODEL_FILES] if model else []
        data = b"".join(storage.read_bytes(f) for f in files if storage.exists(f))
        return hashlib.sha256(data).hexdigest() if model else ""

    return {
        "model": sha256(arguments.model),
        "paper model": sha256(arguments.paper_model),
        "segments": hashlib.sha256(repr(segments).encode()).hexdigest(),
        **{f"--{name}": str(getattr(arguments, name)) for name in ("split", "given", "protocol")},
    }


def check_free(out: str, source: dict[str, str], replace: bool) -> None:
    """Raise UsageError where OUT has results of something else, unless they are to be replaced."""
    path = storage.join(out, RESULTS[0])
    if not storage.exists(path):
        return
    try:
        there = json.loads(storage.read_bytes(path)).get("source", {})
    except (ValueError, AttributeError):
        there = {}
    other = next((name for name, value in source.items() if there.get(name) != value), None)
    if other:
        what = f"--out {out} holds results of another {other.removeprefix('--')}; another --out leaves them alone"
        console.check_free(out, RESULTS, what, replace)


def add_results(report: Report, results: dict[str, Any], given: str) -> None:
    """Add a chart, what its words mean, and the tables, folded, to a report."""
    told_what = {
        "objects": "The separators are told which objects are audible.",
        "labels": "The separators are told the table's weak labels, to which the sound may add.",
        "none": "The separators are told nothing and use what they hear.",
    }[given]
    for sentence in verdicts(results):
        report.paragraph(f"{sentence[0].upper()}{sentence[1:]}.")
    clips = plural(results["separators"]["mixture"]["clips"], "clip")
    bars = [(_kind(n), _name(n), sdr, _db(sdr)) for n, sdr in mean_sdr(results).items()]
    report.bars(bars, f"Mean SDR over {clips}, in dB; more is better. {told_what}")
    report.terms([("dB", "decibels: 3 dB more are twice the power."), *(t for t in TERMS if _occurs(t[0], results))])
    report.fold("Every figure", _tables(results))
    curves = {k.replace("_", " "): c for k, c in results["calibration"].items() if c}
    if curves:
        more = Report("")
        figure = plots.reliability({k: c["bins"] for k, c in curves.items()})
        more.image(figure, "How often objects are audible, by score")
        errors = " and ".join(f"{c['expected_calibration_error']:.3f} for the {k}" for k, c in curves.items())
        more.paragraph(
            f"Objects that are shown, or heard from {HEARD:.0%} of the sound up. "
            f"Expected calibration error: {errors}. The sound score is a share of the sound, so an audible object's "
            "is below one where others play."
        )
        report.fold("Calibration: how often objects are audible, by score", more)


def _occurs(term: str, results: dict[str, Any]) -> bool:
    """Tell whether a term is that of a figure, or of a separator that was run."""
    return term.isupper() or term.replace(" ", "_") in results["separators"]


def _tables(results: dict[str, Any]) -> Report:
    """Return the tables: figures, gains, by object, and of a struck object beside a pitched one."""
    report = Report("")
    entry = results["separators"]["mixture"]
    several = " 95 % intervals are bootstrapped over clips." if entry["clips"] > 1 else ""
    bounds = f"All figures in dB; italic rows are bounds.{several} In means a lost sound counts −{-LOST_DB:.0f} dB."
    report.table(table_header(results), table_rows(results), bounds)
    nsdr = " The SDR gain is NSDR." if results.get("protocol") == "denoising" else ""
    report.table(
        ["gain over the mixture", "SDR", "SIR", "SAR", "SI-SDR"],
        [(kind, [row[0], *row[1 : 1 + len(GAINS)]]) for kind, row in table_rows(results, GAINS)],
        f"The mixture has no artefacts, so whatever separates loses SAR.{nsdr}",
    )
    report.paragraph(_summary(results) + ".")
    report.table(*_by_object(results, "sdr", "SDR, dB"), "In brackets the number of clips in which an object sounds.")
    report.table(*_by_object(results, "sdr_improvement", "SDR gain, dB"))
    struck = results["struck_beside_pitched"]
    if struck["clips"]:
        what = f"{plural(struck['clips'], 'duet')} of a struck object and a pitched one"
        report.table(table_header(struck), table_rows(struck), f"Harmonic–percussive separation: {what}.")
    return report


def _by_object(results: dict[str, Any], figure: str, title: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    entries = results["separators"]
    objects = list(entries["mixture"]["by_object"])
    counts = Counter(o for c in results["clips"] for o in c["objects"])
    rows = [
        (_kind(n), [_name(n), *(_db(e["by_object"][o][figure]) for o in objects)])
        for n, e in entries.items()
        if e["clips"] == entries["mixture"]["clips"]
    ]
    return [title, *(f"{o} ({counts[o]})" for o in objects)], rows


def _summary(results: dict[str, Any]) -> str:
    auc = results["silent_auc"]
    by_sources = ", ".join(f"{k}: {_share(a)}" for k, a in results["basis_accuracy_by_sources"].items())
    return (
        f"Bases given to the right object, by energy: {_share(results['basis_accuracy'])} "
        f"(by number of sources {by_sources}); "
        f"mAP of what is heard: {_share(results['map'])}"
        + ("" if auc is None else f"; silent visible objects told apart, AUC: {auc:.3f}")
    )


def _share(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3f}"


def console_table(results: dict[str, Any]) -> list[str]:
    """Format the results for a terminal."""
    lines = _aligned([table_header(results), *(r for _, r in table_rows(results))])
    struck = results["struck_beside_pitched"]
    if struck["clips"]:
        lines.append(f"{plural(struck['clips'], 'duet')} of a struck object and a pitched one:")
        lines += _aligned([r for _, r in table_rows(struck)])
    lines.append(_summary(results))
    for name, curve in results["calibration"].items():
        if curve:
            error = curve["expected_calibration_error"]
            lines.append(f"{name.replace('_', ' ')}, expected calibration error: {error:.3f}")
    lines += verdicts(results)
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join([r[0].ljust(first), *(c.rjust(w) for c, w in zip(r[1:], others, strict=True))]) for r in rows]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null for what is undefined, −30 and 300 dB for nothing and everything."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else LOST_DB if value < 0 else 300.0
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.evaluate import main as run_main

    sys.exit(run_main())
