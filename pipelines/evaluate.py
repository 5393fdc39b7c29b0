"""Measure separators on mixtures with known sources: results.json and report.html.

Floor (the mixture) and ceiling (the ideal mask) are rows of the table like the others. The
published protocols take the clips in which one object sounds alone: `pairs` mixes each two of
different objects as they are (200 of them, drawn once, where there are more), `denoising` adds
white noise as loud as the clip, and the SDR gain is then NSDR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import arguments_of

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
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    parser().parse_args()  # help and mistakes at once: what follows takes seconds

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
from avsep.records import ClipError, Segment, read_segments
from avsep.report import Report
from avsep.separation import Separator
from pipelines import execution
from pipelines.execution import fail, say

BOUNDS = ("mixture", "oracle_assignment", "ideal_mask")
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
    runner: execution.Runner, segments: Sequence[Segment], job: Job
) -> tuple[list[tuple[Segment, ...]], list[str]]:
    """Return what a protocol measures, clips or pairs of them, and what is wrong with clips that can't be used."""
    if job.protocol == "mixtures":
        return [(s,) for s in segments], []
    found = execution.map_in_order(runner, alone, [(job.references, s) for s in segments])
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
    execution.one_thread()
    separator = Separator.load(job.model)
    try:
        case = build_case(segments, job.references, separator.stft.sample_rate, job.protocol)
        paper = Separator.load(job.paper_model) if job.paper_model else None
        return measure(case, separator, paper, job.given, job.protocol == "denoising")
    except (ClipError, ValueError) as error:
        return ClipResult(segments[0].segment_id, [], {}, error=str(error))


def table_rows(results: dict[str, Any], figures: Sequence[str] = FIGURES) -> list[tuple[str, list[str]]]:
    """Format separators that were run on every clip for a report's table, a row each."""
    entries = results["separators"]
    rows = []
    for name, entry in entries.items():
        if entry["clips"] == entries["mixture"]["clips"]:
            means = [_db(entry["mean"][f]) for f in figures]
            by_sources = [_db(group["sdr"]) for group in entry["by_sources"].values()]
            rows.append((_kind(name), [name.replace("_", " "), *means, *_intervals(name, entry), *by_sources]))
    return rows


def table_header(results: dict[str, Any]) -> list[str]:
    """Return the header of `table_rows`."""
    counts = results["separators"]["mixture"]["by_sources"]
    names = ["SDR", "SIR", "SAR", "SI-SDR", "95 % of SDR", "default ahead by"]
    return ["separator", *names, *(f"SDR, {k} source{'s' * (k != '1')}" for k in counts)]


def _intervals(name: str, entry: dict[str, Any]) -> list[str]:
    ahead = entry["default_ahead"]
    span = _span(ahead["interval_95"])
    return [
        _span(entry["interval_95"]),
        "–" if name == "default" else " ".join([_db(ahead["sdr"]), *([f"({span})"] if span != "–" else [])]),
    ]


def _span(interval: Sequence[float | None]) -> str:
    low, high = map(_db, interval)
    return "–" if low == "–" else f"{low} … {high}"


def _kind(name: str) -> str:
    return "bound" if name in BOUNDS else "ours" if name == "default" else ""


def _db(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.1f}"  # None: as results.json has it


def clip_section(job: Job, segments: Sequence[Segment], clip: ClipResult | None = None) -> Report:
    """Show one clip: frame and relation map, figures if there are any, players of mixture, references and estimates.

    On the map each basis's true owner is ringed.
    """
    execution.one_thread()
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
    section.image(figure, f"Relation map of {case.segment.segment_id} beside a frame of it; rings: the true owners")
    if clip is not None:
        section.table(
            ["SDR, dB", *case.names],
            [(_kind(n), [n.replace("_", " "), *map(_db, f["sdr"])]) for n, f in clip.figures.items()],
            why(clip),
        )
    sounds = [("mixture", case.mixture.numpy())]
    for name, reference in zip(case.names, case.references.numpy(), strict=True):
        sounds.append((f"{name}, reference", reference))
        if name in found:
            sounds.append((f"{name}, separated", found[name]))
    sounds += [("rest, reference", case.rest.numpy()), ("rest, separated", separation.rest.numpy())]
    loudest = case.mixture.numpy()  # one scale for all: what is faint looks faint
    section.sounds([(c, w, plots.spectrogram(w, stft, beside=loudest)) for c, w in sounds], stft.sample_rate)
    return section


def why(clip: ClipResult) -> str:
    """Say where a clip's dB go: to bases with the wrong object, to bases that hold two, to the phase."""
    mean = {n: float(np.nanmean(bounded(f["sdr"]))) for n, f in clip.figures.items()}
    energy, right = np.asarray(clip.basis_energy), np.asarray(clip.basis_right, bool)
    share = f"{energy[right].sum() / energy.sum():.0%}" if len(energy) and energy.sum() else "none"
    return (
        f"Of the bases' energy {share} went to the right object. True owners would bring "
        f"{mean['oracle_assignment'] - mean['default']:.1f} dB, and ideal masks another "
        f"{mean['ideal_mask'] - mean['oracle_assignment']:.1f} dB."
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write results.json and report.html."""
    execution.absolute(arguments, "model", "paper_model", "references", "out")
    inputs = ("model", "paper_model", "segments", "references")
    execution.keep_apart(arguments, *inputs, writes=("results.json", "report.html", "clips.csv"))
    protocol, out = arguments.protocol, arguments.out
    if protocol != "mixtures" and arguments.given != "objects":
        fail(f"--given {arguments.given}: with --protocol {protocol} the audible objects are told; leave --given out")
    segments = sorted(
        (s for s in read_segments(arguments.segments) if s.split == arguments.split), key=lambda s: s.segment_id
    )
    if not segments:
        fail(f"{arguments.segments} holds no segments of --split {arguments.split}")
    if arguments.given == "labels" and (untold := sum(s.labels is None for s in segments)):
        if untold == len(segments):
            fail(f"--given labels: {arguments.segments} gives none; add a column `labels`, or say --given none")
        say(f"evaluate: {untold} of {len(segments)} clips have no labels: of them the separators are told nothing")
    models = [m for m in (arguments.model, arguments.paper_model) if m]
    rates = [Separator.load(m).stft.sample_rate for m in models]  # a mistake is told before the work begins
    if rates[0] != rates[-1]:
        fail(f"--paper-model {models[-1]} works at {rates[-1]} Hz and --model at {rates[0]} Hz; give two of one rate")
    storage.make_directory(out)
    job = Job(arguments.model, arguments.paper_model, arguments.references, arguments.given, protocol)
    with execution.session(arguments.in_process) as runner:
        cases, errors = choose(runner, segments, job)
        if not cases:
            fail(f"{arguments.segments} has nothing for --protocol {protocol}: too few clips with one object alone")
        clips = []
        with execution.Progress("evaluate", len(cases), "clips") as progress:
            for clip in runner.map(evaluate_clip, ((job, c) for c in cases)):
                clips.append(clip)
                progress.add(1)
        usable = sorted((c for c in clips if not c.error), key=lambda c: c.segment_id)
        errors += [f"{c.segment_id}: {c.error}" for c in clips if c.error]
        if not usable:
            fail(f"no clip of split {arguments.split} could be measured; the first: {errors[0]}")
        worst = sorted(usable, key=lambda c: float(np.nanmean(bounded(c.figures["default"]["sdr"]))))[:_WORST]
        by_id = {" + ".join(s.segment_id for s in c): c for c in cases}
        sections = execution.map_in_order(runner, clip_section, [(job, by_id[c.segment_id], c) for c in worst])
    results = summarise(usable) | {"protocol": protocol}
    storage.write_text(storage.join(out, "results.json"), json.dumps(_without_nan(results), indent=1))
    title = {"mixtures": "clips", "pairs": "pairs of single-source clips", "denoising": "single-source clips in noise"}
    report = Report(f"Separation of {len(usable)} {arguments.split} {title[protocol]}")
    add_results(report, results, arguments.given)
    report.heading("The worst clips")
    for section in sections:
        report.append(section)
    storage.write_text(storage.join(out, "report.html"), report.html())
    for line in console_table(results):
        say(line)
    for error in errors:
        say(f"not measured: {error}")
    say(f"{storage.join(out, 'results.json')} and {storage.join(out, 'report.html')}")
    return execution.SHORTFALL if errors else execution.DONE


def add_results(report: Report, results: dict[str, Any], given: str) -> None:
    """Add the tables and the other figures to a report."""
    caption = {
        "objects": "The separators are told which objects are audible.",
        "labels": "The separators are told the table's weak labels, to which the sound may add.",
        "none": "The separators are told nothing and use what they hear.",
    }[given]
    bounds = (
        "All figures in dB; italic rows are bounds. 95 % intervals are bootstrapped over clips. "
        f"In means a sound that was lost altogether counts {LOST_DB:.0f} dB."
    ).replace("-", "−")
    report.table(table_header(results), table_rows(results), f"{caption} {bounds}")
    nsdr = " The SDR gain is NSDR." if results.get("protocol") == "denoising" else ""
    report.table(
        ["gain over the mixture", "SDR", "SIR", "SAR", "SI-SDR"],
        [(kind, [row[0], *row[1 : 1 + len(GAINS)]]) for kind, row in table_rows(results, GAINS)],
        f"The mixture has no artefacts, so whatever separates loses SAR.{nsdr}",
    )
    report.paragraph(_summary(results) + ".")
    report.heading("By object")
    report.table(*_by_object(results, "sdr", "SDR, dB"), "In brackets the number of clips in which it sounds.")
    report.table(*_by_object(results, "sdr_improvement", "SDR gain, dB"))
    struck = results["struck_beside_pitched"]
    if struck["clips"]:
        report.heading("Harmonic–percussive separation")
        header, rows = table_header(struck), table_rows(struck)
        report.table(header, rows, f"Over the {struck['clips']} duets of a struck object and a pitched one.")
    curves = {k.replace("_", " "): c for k, c in results["calibration"].items() if c}
    if curves:
        report.heading("Calibration")
        figure = plots.reliability({k: c["bins"] for k, c in curves.items()})
        report.image(figure, "How often objects are audible, by score")
        errors = " and ".join(f"{c['expected_calibration_error']:.3f} for the {k}" for k, c in curves.items())
        report.paragraph(
            f"Objects that are shown, or heard from {HEARD:.0%} of the sound up. "
            f"Expected calibration error: {errors}. The sound score is a share of the sound, so an audible object's "
            "is below one where others play."
        )


def _by_object(results: dict[str, Any], figure: str, title: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    entries = results["separators"]
    objects = list(entries["mixture"]["by_object"])
    counts = Counter(o for c in results["clips"] for o in c["objects"])
    rows = [
        (_kind(n), [n.replace("_", " "), *(_db(e["by_object"][o][figure]) for o in objects)])
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
        lines.append(f"duets of a struck object and a pitched one ({struck['clips']}):")
        lines += _aligned([r for _, r in table_rows(struck)])
    lines.append(_summary(results))
    for name, curve in results["calibration"].items():
        if curve:
            error = curve["expected_calibration_error"]
            lines.append(f"{name.replace('_', ' ')}, expected calibration error: {error:.3f}")
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
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.evaluate import main as run_main

    sys.exit(run_main())
