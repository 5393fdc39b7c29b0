"""Measure separators on mixtures with known sources: results.json and report.html.

Floor (the mixture) and ceiling (the ideal mask) are rows of the table like the others.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from avsep import baselines, media, metrics, plots, stages, storage, training
from avsep.objects import OBJECT_NAMES
from avsep.records import ClipError, Segment, read_segments
from avsep.report import Report
from avsep.separation import REST, Separator
from pipelines import execution
from pipelines.execution import fail, say

EXAMPLES = """examples:
  python -m pipelines.evaluate --model out/run/model --segments clips/segments.csv --references clips/references \\
      --out out/results
  python -m pipelines.evaluate --model out/run/model --paper-model out/paper/model --segments out/manifest \\
      --references clips/references --out out/results --given labels
"""
FIGURES = ("sdr", "sir", "sar", "si_sdr", "sdr_improvement")
BOUNDS = ("mixture", "oracle_assignment", "ideal_mask")
_LOST_DB = -30.0  # what a sound that was lost altogether counts, instead of −inf
_WORST = 10


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = argparse.ArgumentParser(
        "pipelines.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


@dataclass
class ClipResult:
    """One clip's figures."""

    segment_id: str
    objects: list[str]  # audible, with a reference
    figures: dict[str, dict[str, list[float]]]  # separator → figure → one value an object
    basis_energy: list[float] = field(default_factory=list)  # of bases that belong to an object
    basis_right: list[bool] = field(default_factory=list)
    sound_scores: dict[str, float] = field(default_factory=dict)
    visible: list[str] | None = None  # as the table's labels say
    error: str = ""


def references_of(folder: str, segment_id: str) -> tuple[dict[str, NDArray[np.float32]], int]:
    """Read `folder/segment_id/OBJECT.flac` (or .wav); return waveforms by name and their rate.

    Raises ValueError when there is none, or rates or lengths differ.
    """
    waveforms: dict[str, NDArray[np.float32]] = {}
    shapes = set()
    for path in storage.list_files(storage.join(folder, segment_id)):
        stem, _, kind = storage.name(path).rpartition(".")
        if kind in ("flac", "wav"):
            samples, rate = soundfile.read(io.BytesIO(storage.read_bytes(path)), dtype="float32", always_2d=True)
            waveforms[stem] = samples.mean(1)
            shapes.add((len(samples), rate))
    if len(shapes) != 1:
        what = "no references" if not shapes else f"references of several lengths or rates {sorted(shapes)}"
        raise ValueError(f"{storage.join(folder, segment_id)}: {what}")
    return waveforms, shapes.pop()[1]


@dataclass
class Case:
    """A mixture with its true sources, all `(S,)`."""

    segment: Segment
    mixture: Tensor
    names: list[str]
    references: Tensor  # (J, S)
    rest: Tensor

    @classmethod
    def load(cls, segment: Segment, folder: str, sample_rate: int) -> Case:
        """Decode the clip and read its references."""
        waveforms, rate = references_of(folder, segment.segment_id)
        if rate != sample_rate:
            raise ValueError(f"references of {segment.segment_id} have {rate} Hz; the model works at {sample_rate} Hz")
        rest = waveforms.pop(REST, None)
        names = sorted(n for n, w in waveforms.items() if np.abs(w).max() > 1e-6)
        if unknown := set(names) - set(OBJECT_NAMES):
            raise ValueError(f"references of {segment.segment_id} hold {sorted(unknown)}, which are no objects")
        if not names:
            raise ValueError(f"references of {segment.segment_id} hold no audible object")
        with storage.local_file(segment.source) as path:
            clip = media.decode(path, segment.start_s, segment.end_s, sample_rate=sample_rate)
        length = len(waveforms[names[0]])
        mixture = np.pad(clip.waveform[:length], (0, max(0, length - len(clip.waveform))))
        return cls(
            segment,
            torch.from_numpy(mixture),
            names,
            torch.from_numpy(np.stack([waveforms[n] for n in names])),
            torch.from_numpy(rest if rest is not None else np.zeros(length, np.float32)),
        )


def told(case: Case, given: str) -> dict[str, list[str]]:
    """Return the arguments by which a separator is told what is there."""
    if given == "objects":
        return {"objects": case.names}
    if given == "labels" and case.segment.labels is not None:
        return {"seen": list(case.segment.labels)}
    return {}


def evaluate_clip(model_dir: str, paper_dir: str | None, references: str, segment: Segment, given: str) -> ClipResult:
    """Run every separator on one clip and measure it."""
    execution.one_thread()
    separator = Separator.load(model_dir)
    try:
        case = Case.load(segment, references, separator.stft.sample_rate)
        return _measure(case, separator, Separator.load(paper_dir) if paper_dir else None, given)
    except (ClipError, ValueError) as error:
        return ClipResult(segment.segment_id, [], {}, error=str(error))


def _measure(case: Case, separator: Separator, paper: Separator | None, given: str) -> ClipResult:
    estimates, analysis = separate_case(case, separator, paper, given)
    r = case.references.numpy()
    figures: dict[str, dict[str, list[float]]] = {}
    for name, estimate in estimates.items():
        e = estimate.numpy()
        bss = metrics.bss_eval(r, e)
        figures[name] = {
            "sdr": bss.sdr.tolist(),
            "sir": bss.sir.tolist(),
            "sar": bss.sar.tolist(),
            "si_sdr": metrics.si_sdr(r, e).tolist(),
        }
    floor = figures["mixture"]["sdr"]
    for values in figures.values():
        values["sdr_improvement"] = metrics.improvement(_bounded(values["sdr"]), _bounded(floor)).tolist()
    labels = case.segment.labels
    visible = None if labels is None else list(labels)
    return ClipResult(case.segment.segment_id, case.names, figures, visible=visible, **analysis)


def separate_case(
    case: Case, separator: Separator, paper: Separator | None, given: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return each separator's estimates of the case's objects, `(J, S)`, and what the default made of its bases.

    An object that a separator was not told of and did not find gets the mixture: that is all
    its listener has.
    """
    known = told(case, given)
    n_sources = len(case.names)
    separation = separator(case.mixture, **known)
    window = separation.first_window
    if window.factors.H.shape[1] != separator.stft.n_frames(len(case.mixture)):  # it is one of several
        window = separator.analyse(case.mixture)
    everything = torch.cat([case.references, case.rest.unsqueeze(0)])
    oracle, owner = baselines.oracle_assignment(case.mixture, everything, window.factors, separator.stft)
    estimates = {
        "mixture": baselines.mixture_as_estimate(case.mixture, n_sources),
        "nmf_clustering": baselines.blind_clustering(case.mixture, case.references, window.factors, separator.stft),
    }
    if n_sources == 2:
        estimates["harmonic_percussive"] = baselines.harmonic_percussive(case.mixture, case.references, separator.stft)
    if paper is not None:
        estimates["paper"] = _matched(case, paper(case.mixture, **known))
    estimates["default"] = _matched(case, separation)
    estimates["oracle_assignment"] = oracle[:-1]
    estimates["ideal_mask"] = baselines.ideal_ratio_mask(case.mixture, everything, separator.stft)[:-1]
    index = [OBJECT_NAMES.index(n) for n in case.names]
    guess = separator.shares(window, index)[:-1].argmax(0)
    belongs = owner < n_sources
    energy = window.factors.basis_energy
    return estimates, {
        "basis_energy": energy[belongs].tolist(),
        "basis_right": (guess == owner)[belongs].tolist(),
        "sound_scores": separation.sound_scores,
    }


def _matched(case: Case, separation: Any) -> Tensor:
    found = dict(zip(separation.objects, separation.estimates, strict=True))
    return torch.stack([found.get(n, case.mixture) for n in case.names])


def _bounded(values: Sequence[float]) -> NDArray[np.float64]:
    """A sound lost altogether counts −30 dB; what is undefined stays NaN."""
    return np.maximum(np.asarray(values, np.float64), _LOST_DB)


def summarise(clips: Sequence[ClipResult]) -> dict[str, Any]:
    """Average clips into the contract's `results.json`."""
    names = list(dict.fromkeys(n for c in clips for n in c.figures))
    separators = {}
    for name in names:
        with_it = [c for c in clips if name in c.figures]
        separators[name] = {
            "mean": _means(with_it, name),
            "interval_95": _interval(with_it, name),
            "by_sources": {
                str(k): _means([c for c in with_it if len(c.objects) == k], name)
                for k in sorted({len(c.objects) for c in with_it})
            },
            "by_object": {o: _means(with_it, name, only=o) for o in sorted({o for c in with_it for o in c.objects})},
        }
    return {
        "separators": separators,
        "clips": [{k: v for k, v in vars(c).items() if not k.startswith("basis_")} for c in clips],
        "basis_accuracy": basis_accuracy(clips),
        "silent_auc": silent_auc(clips),
        "map": clip_map(clips),
    }


def _values(clips: Sequence[ClipResult], name: str, figure: str, only: str | None = None) -> list[NDArray[np.float64]]:
    return [
        _bounded([v for v, o in zip(c.figures[name][figure], c.objects, strict=True) if only in (None, o)])
        for c in clips
    ]


def _means(clips: Sequence[ClipResult], name: str, only: str | None = None) -> dict[str, float]:
    means = {}
    for figure in FIGURES:
        values = np.concatenate([np.zeros(0), *_values(clips, name, figure, only)])
        means[figure] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return means


def _interval(clips: Sequence[ClipResult], name: str) -> list[float]:
    """Return a 95 % bootstrap interval of the mean SDR, over clips."""
    values = _values(clips, name, "sdr")
    sums, counts = np.array([np.nansum(v) for v in values]), np.array([np.isfinite(v).sum() for v in values])
    rows = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    means = sums[rows].sum(1) / np.maximum(counts[rows].sum(1), 1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def basis_accuracy(clips: Sequence[ClipResult]) -> float:
    """Return the energy share of bases given to their true object, among bases that belong to one."""
    energy = np.concatenate([np.zeros(0), *(np.asarray(c.basis_energy) for c in clips)])
    right = np.concatenate([np.zeros(0, bool), *(np.asarray(c.basis_right, bool) for c in clips)])
    return float((energy * right).sum() / energy.sum()) if energy.sum() else float("nan")


def silent_auc(clips: Sequence[ClipResult]) -> float | None:
    """Return the AUC of telling visible objects that sound from silent ones; None when all are of one kind."""
    pairs = [(o in c.objects, c.sound_scores[o]) for c in clips if c.visible for o in c.visible]
    if len({audible for audible, _ in pairs}) < 2:
        return None
    return float(roc_auc_score([a for a, _ in pairs], [s for _, s in pairs]))


def clip_map(clips: Sequence[ClipResult]) -> float:
    """Return the mean average precision of sound scores against what is audible."""
    scored = [c for c in clips if c.sound_scores]
    labels = torch.tensor([[n in c.objects for n in OBJECT_NAMES] for c in scored])
    scores = torch.tensor([[c.sound_scores[n] for n in OBJECT_NAMES] for c in scored])
    return training.mean_average_precision(labels, scores) if scored else float("nan")


def table_rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Format the separators for a report's table."""
    rows = []
    for name, entry in results["separators"].items():
        kind = "bound" if name in BOUNDS else "ours" if name == "default" else ""
        low, high = entry["interval_95"]
        counts = entry["by_sources"]
        by_sources = [_db(counts[k]["sdr"]) if k in counts else "–" for k in _source_counts(results)]
        means = [_db(entry["mean"][f]) for f in FIGURES]
        rows.append((kind, [name.replace("_", " "), *means, f"{low:.1f} … {high:.1f}", *by_sources]))
    return rows


def table_header(results: dict[str, Any]) -> list[str]:
    """Return the header of `table_rows`."""
    return [
        "separator",
        "SDR",
        "SIR",
        "SAR",
        "SI-SDR",
        "SDR gain",
        "95 % of SDR",
        *(f"SDR, {k} sources" for k in _source_counts(results)),
    ]


def _source_counts(results: dict[str, Any]) -> list[str]:
    """Every separator can do the mixture's counts; some do fewer."""
    return list(results["separators"]["mixture"]["by_sources"])


def _db(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def clip_section(model_dir: str, references: str, segment: Segment, given: str, note: str = "") -> Report:
    """Show one clip: a frame and relation map, then players of mixture, references and estimates."""
    execution.one_thread()
    separator = Separator.load(model_dir)
    case = Case.load(segment, references, separator.stft.sample_rate)
    separation = separator(case.mixture, **told(case, given))
    found = dict(zip(separation.objects, separation.estimates.numpy(), strict=True))
    section = Report("")
    section.heading(f"{segment.segment_id}: {', '.join(case.names)}{note}", 3)
    window, stft = separation.first_window, separator.stft
    section.image(
        plots.relation_map(
            window.relation.numpy(),
            separator.model.config.objects,
            window.factors.basis_energy.numpy(),
            stages.middle_picture(segment.source, segment.start_s, segment.end_s),
            separation.objects,
        ),
        f"Relation map of {segment.segment_id} beside a frame of it",
    )
    sounds = [("mixture", case.mixture.numpy())]
    for name, reference in zip(case.names, case.references.numpy(), strict=True):
        sounds.append((f"{name}, reference", reference))
        if name in found:
            sounds.append((f"{name}, separated", found[name]))
    sounds.append(("rest, separated", separation.rest.numpy()))
    section.sounds([(c, w, plots.spectrogram(w, stft)) for c, w in sounds], stft.sample_rate)
    return section


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write results.json and report.html."""
    execution.absolute(arguments, "model", "paper_model", "references", "out")
    segments = {s.segment_id: s for s in read_segments(arguments.segments) if s.split == arguments.split}
    if not segments:
        fail(f"{arguments.segments} holds no segments of --split {arguments.split}")
    for model in filter(None, (arguments.model, arguments.paper_model)):
        Separator.load(model)  # a mistake is told before the work begins
    with (
        execution.session(arguments.in_process) as runner,
        execution.Progress("evaluate", len(segments), "clips") as progress,
    ):
        clips = []
        fixed = (arguments.model, arguments.paper_model, arguments.references)
        for clip in runner.map(evaluate_clip, ((*fixed, s, arguments.given) for s in segments.values())):
            clips.append(clip)
            progress.add(1)
        usable = sorted((c for c in clips if not c.error), key=lambda c: c.segment_id)
        unusable = [c for c in clips if c.error]
        if not usable:
            fail(f"no clip of split {arguments.split} could be measured; the first: {unusable[0].error}")
        worst = sorted(usable, key=lambda c: float(np.nanmean(_bounded(c.figures["default"]["sdr"]))))[:_WORST]
        sections = execution.map_in_order(
            runner,
            clip_section,
            [
                (arguments.model, arguments.references, segments[c.segment_id], arguments.given, _sdr_note(c))
                for c in worst
            ],
        )
    results = summarise(usable)
    storage.write_text(storage.join(arguments.out, "results.json"), json.dumps(_without_nan(results), indent=1))
    report = Report(f"Separation of {len(usable)} {arguments.split} clips")
    add_results(report, results, arguments.given)
    report.heading("The worst clips")
    for section in sections:
        report.append(section)
    storage.write_text(storage.join(arguments.out, "report.html"), report.html())
    for line in console_table(results):
        say(line)
    for clip in unusable:
        say(f"not measured: {clip.segment_id}: {clip.error}")
    say(f"{storage.join(arguments.out, 'results.json')} and {storage.join(arguments.out, 'report.html')}")
    return execution.SHORTFALL if unusable else execution.DONE


def _sdr_note(clip: ClipResult) -> str:
    pairs = zip(clip.objects, clip.figures["default"]["sdr"], strict=True)
    return f" ({', '.join(f'{o} {s:.1f} dB' for o, s in pairs)})"


def add_results(report: Report, results: dict[str, Any], given: str) -> None:
    """Add the table and the other figures to a report."""
    caption = {
        "objects": "The separators are told which objects are audible.",
        "labels": "The separators are told the table's weak labels, to which the sound may add.",
        "none": "The separators are told nothing and use what they hear.",
    }[given]
    report.table(table_header(results), table_rows(results), f"{caption} All figures in dB; italic rows are bounds.")
    auc = results["silent_auc"]
    report.paragraph(
        f"Bases given to the right object, by energy: {results['basis_accuracy']:.2f}. "
        f"mAP of what is heard: {results['map']:.2f}. "
        + ("" if auc is None else f"Silent visible objects told apart, AUC: {auc:.3f}.")
    )
    separators = results["separators"]
    objects = list(separators["default"]["by_object"])
    report.heading("By object")
    report.table(
        ["SDR, dB", *objects],
        [
            (
                "bound" if n in BOUNDS else "ours" if n == "default" else "",
                [
                    n.replace("_", " "),
                    *(_db(e["by_object"][o]["sdr"]) if o in e["by_object"] else "–" for o in objects),
                ],
            )
            for n, e in separators.items()
        ],
    )


def console_table(results: dict[str, Any]) -> list[str]:
    """Format the results for a terminal."""
    rows = [table_header(results), *(r for _, r in table_rows(results))]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows
    ]
    auc = results["silent_auc"]
    lines.append(
        f"basis accuracy {results['basis_accuracy']:.3f}, mAP {results['map']:.3f}"
        + ("" if auc is None else f", silent AUC {auc:.3f}")
    )
    return lines


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null for what is undefined, −30 and 300 dB for nothing and everything."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else _LOST_DB if value < 0 else 300.0
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
