"""Results to read, see and hear: tables, chart and clips of a report, and a terminal's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from avsep import baselines, plots, stages
from avsep.evaluation import FIGURES, GAINS, LOST_DB, PERFECT_DB, Case, ClipResult, bounded, told
from avsep.records import Segment
from avsep.report import Report
from avsep.results import HEARD
from avsep.separation import Explanation, Separates, render_whole
from avsep.stft import STFT

BOUNDS = ("mixture", "oracle_assignment", "ideal_mask")
BLIND = ("nmf_clustering", "harmonic_percussive")
TERMS = (
    ("SDR", "signal-to-distortion ratio: how much louder a sound is than all that is wrong with its estimate, in dB."),
    ("SIR", "signal-to-interference ratio: the same, but only what is left of other objects counts as wrong."),
    ("SAR", "signal-to-artefacts ratio: the same, but only what the separation itself added counts as wrong."),
    ("SI-SDR", "the SDR of the estimate at its best volume."),
    ("SI-SAR", "how free of artefacts it is, at that volume."),
    ("mixture", "no separation: the whole sound as the estimate of each object. The floor."),
    ("nmf clustering", "the clip's bases grouped by likeness alone, in the best order: nothing is learned."),
    ("harmonic percussive", "steady sounds told from struck ones by their shapes alone: nothing is learned."),
    ("paper", "the published method, trained by its own recipe."),
    ("default", "this project's method."),
    ("oracle assignment", "the clip's bases given to their true objects: the best that any assignment can do."),
    ("ideal mask", "masks made of the true sounds: the best that any mask can do. The ceiling."),
)
_SILENT = 1e-4  # of full scale
_FIGURES = [figure.upper().replace("_", "-") for figure in FIGURES]


def everywhere(results: dict[str, Any]) -> dict[str, Any]:
    """Return the separators that were run on every clip, with their figures."""
    entries = results["separators"]
    return {n: e for n, e in entries.items() if e["clips"] == entries["mixture"]["clips"]}


def table_rows(results: dict[str, Any], figures: Sequence[str] = FIGURES) -> list[tuple[str, list[str]]]:
    """Format separators that were run on every clip for a report's table, a row each."""
    rows = []
    for name, entry in everywhere(results).items():
        means = [decibels(entry["mean"][f]) for f in figures]
        by_sources = [decibels(group["sdr"]) for group in entry["by_sources"].values()]
        rows.append((_kind(name), [_name(name), *means, *_intervals(name, entry), *by_sources]))
    return rows


def table_header(results: dict[str, Any]) -> list[str]:
    """Return the header of `table_rows`."""
    mixture = results["separators"]["mixture"]
    names = [*_FIGURES, *(["95 % of SDR"] if mixture["clips"] > 1 else []), "default ahead by"]
    return ["separator", *names, *(f"SDR, {plural(int(k), 'source')}" for k in mixture["by_sources"])]


def _intervals(name: str, entry: dict[str, Any]) -> list[str]:
    ahead = entry["default_ahead"]
    span = _span(ahead["interval_95"])
    return [
        *([_span(entry["interval_95"])] if entry["clips"] > 1 else []),
        "–" if name == "default" else " ".join([decibels(ahead["sdr"]), *([f"({span})"] if span != "–" else [])]),
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


def leaks(results: dict[str, Any]) -> list[str]:
    """Say how much each separator gave to objects that aren't there."""
    found = {n: e.get("leak_db") for n, e in results["separators"].items()}
    return [
        f"{_name(n)} gave an object that isn't there a sound {decibels(leak['mean'])} dB from the mixture's level"
        + ("" if (span := _span(leak["interval_95"])) == "–" else f" (95 % {span})")
        for n, leak in found.items()
        if leak
    ]


def verdicts(results: dict[str, Any]) -> list[str]:
    """Say what the mean SDRs mean where a separator is no use: a sentence each. Of sounds alone it says nothing."""
    sdr = mean_sdr(results)
    if sdr.get("mixture", 0.0) > PERFECT_DB:
        return []
    ours = sdr.get("default", float("inf"))
    lost = {n: sdr["mixture"] - v for n, v in sdr.items() if n not in BOUNDS and v < sdr["mixture"]}
    text = "{} is worse than doing nothing: {} dB below the mixture as it is"
    said = [text.format(_name(n), decibels(by)) for n, by in lost.items()]
    blind = {n: v - ours for n, v in sdr.items() if n in BLIND and v > ours and n not in lost}
    said += [f"default is {decibels(by)} dB worse than {_name(n)}, which learns nothing" for n, by in blind.items()]
    return [f"{s}; more training clips may help" if "default" in s else s for s in said]


def _span(interval: Sequence[float | None]) -> str:
    low, high = map(decibels, interval)
    return "–" if low == "–" else f"{low} … {high}"


def _kind(name: str) -> str:
    return "bound" if name in BOUNDS else "ours" if name == "default" else ""


def decibels(value: float | None) -> str:
    """Write a figure in dB, a dash where there is none."""
    if value is None or np.isnan(value):  # None: as results.json has it
        return "–"
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")  # zero has no sign


def clip_section(
    segments: Sequence[Segment],
    case: Case,
    separator: Separates,
    given: str = "objects",
    clip: ClipResult | None = None,
) -> Report:
    """Show one case: players of mixture, references and estimates; folded, the relation map and the figures.

    The map is there where the separator explains itself, with each basis's true owner ringed; the figures where a
    `clip` has them. `segments` are what the case was made of.
    """
    plan, parts = render_whole(separator, case.mixture.numpy(), **told(case, given))
    found = dict(zip(plan.objects, parts[:-1], strict=True))
    sounds = [("mixture", case.mixture.numpy())]
    for name, reference in zip(case.names, case.references.numpy(), strict=True):
        if name in found:
            sounds.append((f"{name}, separated", found[name]))
        sounds.append((f"{name}, reference", reference))
    sounds.append(("rest, separated", parts[-1]))
    if case.rest.abs().max() > _SILENT:
        sounds.append(("rest, reference", case.rest.numpy()))
    rate = separator.sample_rate
    stft = plan.explanation.stft if plan.explanation else STFT(rate, rate // 10, rate // 20)
    loudest = case.mixture.numpy()  # one scale for all: what is faint looks faint
    section, more = Report(""), Report("")
    section.heading(f"{case.segment.segment_id}: {', '.join(case.names)}", 3)
    section.sounds([(c, w, plots.spectrogram(w, stft, beside=loudest)) for c, w in sounds], rate)
    folded = []
    if plan.explanation:
        folded.append("Relation map")
        what = f"Relation map of {case.segment.segment_id} beside a frame of it; rings: the true owners"
        more.image(_relation_map(segments, case, plan.explanation, plan.objects), what)
    if clip is not None:
        folded.append("figures" if folded else "Figures")
        more.table(
            ["SDR, dB", *case.names],
            [(_kind(n), [_name(n), *map(decibels, f["sdr"])]) for n, f in clip.figures.items()],
            why(clip),
        )
    if folded:
        section.fold(f"{' and '.join(folded)} of {case.segment.segment_id}", more)
    return section


def _relation_map(segments: Sequence[Segment], case: Case, window: Explanation, objects: Sequence[str]) -> bytes:
    """Draw a first window's relation map beside a frame of each clip, each basis's true owner ringed."""
    n = window.n_samples
    owner = baselines.true_owners(case.everything[:, :n], window.factors, window.stft)
    rows = {name: row for row, name in enumerate(window.objects)}
    owners = [*(rows.get(name, len(rows)) for name in case.names), len(rows)]  # whose row there isn't is noise to it
    images = [f for f in (stages.middle_image(s.source, s.start_s, s.end_s) for s in segments) if f is not None]
    return plots.relation_map(
        window.relation.numpy(),
        window.objects,
        window.factors.basis_energy.numpy(),
        np.concatenate(images, 1) if images else None,
        objects,
        [owners[o] for o in owner.tolist()],
    )


def why(clip: ClipResult) -> str:
    """Say where a clip's dB go: to bases with the wrong object, to bases that hold two, to the phase.

    "" where the default has no bases.
    """
    if not clip.basis_energy:
        return ""
    mean = {n: float(np.nanmean(bounded(f["sdr"]))) for n, f in clip.figures.items()}
    energy, right = np.asarray(clip.basis_energy), np.asarray(clip.basis_right, bool)
    share = f"{energy[right].sum() / energy.sum():.0%}" if len(energy) and energy.sum() else "none"
    return (
        f"Of the objects' bases, by energy, {share} were given to the right object. True owners would bring "
        f"{decibels(mean['oracle_assignment'] - mean['default'])} dB, and ideal masks another "
        f"{decibels(mean['ideal_mask'] - mean['oracle_assignment'])} dB."
    )


def add_results(report: Report, results: dict[str, Any], given: str) -> None:
    """Add a chart, what its words mean, and the tables, folded, to a report."""
    told_what = {
        "objects": "The separators are told which objects are audible.",
        "labels": "The separators are told the table's weak labels, to which the sound may add.",
        "none": "The separators are told nothing and use what they hear.",
    }[given]
    for sentence in [*verdicts(results), *leaks(results)]:
        report.paragraph(f"{sentence[0].upper()}{sentence[1:]}.")
    clips = plural(results["separators"]["mixture"]["clips"], "clip")
    bars = [(_kind(n), _name(n), sdr, decibels(sdr)) for n, sdr in mean_sdr(results).items()]
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
        ["gain over the mixture", *_FIGURES],
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
        (_kind(n), [_name(n), *(decibels(e["by_object"][o][figure]) for o in objects)])
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
    lines += [*verdicts(results), *leaks(results)]
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join([r[0].ljust(first), *(c.rjust(w) for c, w in zip(r[1:], others, strict=True))]) for r in rows]
