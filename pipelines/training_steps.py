"""What lies between the passes of a training, on Ray or here: judge labels, mix solos, learn the context."""

from __future__ import annotations

from typing import Any

from avsep import evidence
from avsep.learning import practice, steps
from avsep.learning.run import TrainingRun
from avsep.model import Model
from pipelines import cluster, runners
from pipelines.console import say
from pipelines.progress import Progress


def judge(runner: runners.Runner, first: TrainingRun) -> evidence.LabelQuality:
    """Estimate how good the labels are from what the first pass's network hears."""
    item = (first.model, first.files[: steps.EVIDENCE_FILES], first.without)
    ((quality, recall),) = runner.map(judge_files, [item])
    say(f"train: the labels seem to name {recall:.0%} of the objects that sound; training goes by that")
    return quality


def judge_files(model_dir: str, files: list[str], without: frozenset[str]) -> tuple[evidence.LabelQuality, float]:
    """Run one Ray task."""
    cluster.one_thread()
    return steps.judge(model_dir, files, without)


def make_mixtures(runner: runners.Runner, judged: TrainingRun, n_mixtures: int) -> list[practice.Practice]:
    """Mix clips in which one object plays alone; return training clips' mixtures, and keep them and validation's."""
    assert judged.quality is not None
    looked_for = [(judged.model, file, judged.quality, judged.without) for file in judged.files[: steps.SOLO_FILES]]
    parts = runners.map_in_order(runner, find_solos, looked_for)
    made: dict[str, list[practice.Practice]] = {}
    for split, wanted in (("train", n_mixtures), ("val", min(steps.VAL_MIXTURES, n_mixtures))):
        batches = steps.plan_mixtures(parts, split, wanted, judged.config)
        if not batches:
            continue
        solos = runner.share(batches[0][0])
        done: dict[int, list[practice.Practice]] = {}
        with Progress(f"practise ({split})", wanted, "mixtures") as progress:
            for first, mixtures in runner.map(mix_batch, ((solos, *others) for _, *others in batches)):
                done[first] = mixtures
                progress.add(len(mixtures))
        made[split] = [p for first in sorted(done) for p in done[first]]
    if "train" not in made:
        say("train: the clips hold no solos of two objects to practise on: bases are assigned one by one, in one pass")
        return []
    return steps.keep_mixtures(judged.out, made)


def find_solos(model_dir: str, path: str, quality: evidence.LabelQuality, without: frozenset[str]) -> steps.Solos:
    """Run one Ray task."""
    cluster.one_thread()
    return steps.find_solos(model_dir, path, quality, without)


def mix_batch(*batch: Any) -> tuple[int, list[practice.Practice]]:
    """Run one Ray task."""
    cluster.one_thread()
    return steps.mix_batch(*batch)


def learn_context(
    runner: runners.Runner, judged: TrainingRun, practices: list[practice.Practice], epochs: int = 40
) -> None:
    """Learn on practice mixtures which bases belong together, and add it to the model."""
    model = Model.load(judged.model)
    files = judged.files[: steps.EVIDENCE_FILES]
    item = (judged.out, model, practices, files, epochs, judged.training.seed, judged.without)
    ((model, figures),) = runner.map(fit_context, [item])
    say(
        f"train: cross-entropy of bases of held-out mixtures: {figures['before']:.3f} one by one, "
        f"{figures['after']:.3f} together"
    )
    heard, silent = model.config.evidence.shown_when_heard, model.config.evidence.shown_when_silent
    say(f"train: labels name {heard:.0%} of the objects that sound, and {silent:.1%} of those that don't")
    model.save(judged.model)


def fit_context(*item: Any) -> tuple[Model, dict[str, float]]:
    """Run one Ray task."""
    cluster.one_thread()
    return steps.fit_context(*item)
