"""Train the MIML network on clip shards with Ray Train, and write the model directory.

The default recipe then mixes clips in which one object plays alone, learns on the mixtures which bases
belong together, and trains the network a second time, on them too. After every epoch a checkpoint is
written to OUT; a killed run goes on with --resume.

With --start MODEL a trained model learns some tens of clips of one's own instead, in a minute or two, and keeps
what it knew. Two halves of the clips judge it, each by the other's labels; where they show no gain, the model
stays as it was, and that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from avsep import starter
from pipelines import RECIPES, WITHOUT, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.train --clips out/clips --out out/run
  python -m pipelines.train --clips out/clips --out out/paper --recipe paper
  python -m pipelines.train --clips out/clips --out out/run --without out/audit/again.csv out/audit/still.csv
  python -m pipelines.train --clips out/clips --out out/run --resume
  python -m pipelines.train --clips out/clips --out out/run --replace
  python -m pipelines.train --clips out/clips --out out/run --tensorboard out/board
  python -m pipelines.train --clips out/clips --out out/mine --start starter
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("train", __doc__, EXAMPLES)
    p.add_argument("--clips", required=True, help="what pipelines.extract wrote")
    p.add_argument("--out", required=True, help="folder or URI of the run; the model goes to OUT/model")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="a run configuration")
    p.add_argument("--without", nargs="+", action="extend", default=[], metavar="LIST", help=WITHOUT)
    p.add_argument(
        "--start",
        metavar="MODEL",
        type=lambda text: starter.PATH if text == "starter" else text,
        help="go on from a trained model: its folder, or the word starter for the one that comes with the package",
    )
    p.add_argument("--epochs", type=int, help="of each pass, instead of the recipe's, or an adaptation's 8")
    p.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint")
    p.add_argument("--replace", action="store_true", help="train anew; OUT's last model is kept in OUT/previous")
    board = "folder or URI: figures for TensorBoard, not with --start (default: what AVSEP_TENSORBOARD names)"
    p.add_argument("--tensorboard", metavar="DIR", help=board)
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds


from avsep import shards, storage, suspects
from avsep.factors import DataConfig
from avsep.learning import bags, steps
from avsep.learning import run as runs
from avsep.learning.logs import TensorBoard
from avsep.learning.run import HISTORY_FILE, MIXTURES_FILE, VAL_MIXTURES_FILE, TrainingRun
from avsep.model import (
    LABELLER_FILE,
    MODEL_FILES,
    LabellerConfig,
    ModelConfig,
    describe_training,
    label_config,
    versions,
)
from pipelines import adaptation, console, recipes, runners, training_steps
from pipelines.console import fail, say
from pipelines.epochs import Log, following
from pipelines.training_workers import train_workers

_READERS = 16  # files read at the same time to count their clips
_FEW_CLIPS = 200
_MADE = (  # in OUT, by a training; the model's configuration comes first
    *(f"model/{f}" for f in MODEL_FILES), HISTORY_FILE, "checkpoint.pt", "checkpoint-2.pt", MIXTURES_FILE,
    VAL_MIXTURES_FILE, *adaptation.HALVES,
)  # fmt: skip


def run(arguments: argparse.Namespace, log: Log | None = None) -> int:
    """Train, write the model, and draw its figures; `log` gets every row of the history."""
    if not arguments.start:
        arguments.tensorboard = arguments.tensorboard or os.environ.get("AVSEP_TENSORBOARD") or None
    console.absolute(arguments, "clips", "out", "start", "tensorboard")
    console.keep_apart(arguments, "clips", "start", writes=("model",))
    recipe = recipes.get(arguments.recipe)
    if arguments.epochs is not None and arguments.epochs < 1:
        fail(f"--epochs {arguments.epochs}: at least one epoch is needed")
    if arguments.resume and arguments.replace:
        fail("--resume goes on with a training and --replace begins anew; give one of them")
    if arguments.start:
        if arguments.tensorboard or log:
            fail("--start with --tensorboard or a log: an adaptation has no figures for them; leave them out")
        return adapt(arguments)
    out = arguments.out
    first = plan(arguments, recipe)
    storage.make_directory(out)
    with contextlib.ExitStack() as stack:
        logs = [log] if log else []
        if arguments.tensorboard:
            logs.append(stack.enter_context(contextlib.closing(TensorBoard(arguments.tensorboard))))
        runner = stack.enter_context(runners.session(arguments.in_process))
        if not arguments.resume:
            console.put_aside(out, _MADE)
        stack.enter_context(following(out, (2 if recipe.second_pass else 1) * first.training.epochs, logs))
        train(runner, first, recipe)
    say(f"train: {describe_training(steps.remember_training(first))}")
    labeller = storage.join(arguments.clips, LABELLER_FILE)
    if storage.exists(labeller):  # the clips' own picture network goes with the model
        storage.write_bytes(storage.join(first.model, LABELLER_FILE), storage.read_bytes(labeller))
    steps.draw_figures(out, arguments.clips)
    say(f"model in {first.model}")
    return console.DONE


def adapt(arguments: argparse.Namespace) -> int:
    """Go on from a trained model."""
    out, planned = arguments.out, adaptation.plan(arguments)
    if not (arguments.resume and adaptation.has_begun(planned)):  # nothing of it is done: it begins
        check_free(out, arguments.replace)
    storage.make_directory(out)
    with runners.session(arguments.in_process) as runner:
        if not arguments.resume:
            console.put_aside(out, _MADE)
        adaptation.adapt(runner, planned)
    say(f"train: {describe_training(ModelConfig.read(planned.model))}")
    steps.draw_figures(out, arguments.clips)
    say(f"model in {planned.model}")
    return console.DONE


def plan(arguments: argparse.Namespace, recipe: recipes.Recipe) -> TrainingRun:
    """Describe the first pass from the clips and the recipe, and say what it learns from."""
    files = shards.clip_files(arguments.clips)
    config = configure(arguments.clips, recipe)
    settings = {
        "recipe": recipe.name,
        "network": asdict(recipe.network),
        "training": {k: v for k, v in asdict(recipe.training).items() if k != "epochs"},
    }
    without, note = suspects.left_out(arguments.without, arguments.clips)
    if without:
        settings["without"] = shards.configuration_digest({"without": sorted(without)})
    if arguments.resume:
        check_resumable(arguments.out, settings)
    else:
        check_free(arguments.out, arguments.replace)
    with ThreadPoolExecutor(_READERS) as pool:  # an object store takes its time for each
        counts = list(pool.map(lambda file: bags.count_clips(file, config.labelling, without), files))
    by_split = steps.by_split([c for c, _ in counts])
    clips_by_label = {name: n for name in config.objects if (n := sum(c[name] for _, c in counts))}
    if not clips_by_label:  # clips that show nothing teach no object
        fail(
            f"{arguments.clips} has no clip of split train with labels: give them in the table, or give "
            "pipelines.extract the --weights of a picture network, and extract to another folder"
        )
    n_train, n_val = by_split["train"], by_split["val"]
    left_out = steps.left_out(arguments.clips, by_split, len(without))
    say(f"train: {n_train} clips, {n_val} for validation, recipe {recipe.name}{left_out}")
    if note:
        say(f"train: {note}")
    if n_train < _FEW_CLIPS:
        say(f"train: {n_train} clips are few: some hundreds are needed, or separation may be worse than none")
    if not n_val:
        say("train: no clip of split val, so the last epoch's network is taken")
    return TrainingRun(
        files,
        [c["train"] for c, _ in counts],
        arguments.out,
        config,
        replace(recipe.training, epochs=arguments.epochs or recipe.training.epochs),
        settings,
        clips_by_label,
        without,
        threads=min(2, os.cpu_count() or 1),
    )


def configure(clips: str, recipe: recipes.Recipe) -> ModelConfig:
    """Put the model's configuration together: the recipe's, for clips as they were extracted."""
    made_with = DataConfig.from_dict(shards.read_configuration(clips))
    labels = label_config(made_with.labeller, made_with.extraction.looks)
    if recipe.labels:
        labels = replace(recipe.labels, joined=labels.joined)  # that is how the clips' evidence is
    return ModelConfig(
        vocabulary=made_with.vocabulary,
        extraction=made_with.extraction,
        network=recipe.network,
        n_networks=recipe.n_networks,
        labels=labels,
        labeller=LabellerConfig(made_with.labeller or recipe.labeller, made_with.labeller_sha256),
        separation=recipe.separation,
        recipe=recipe.name,
        versions=versions(),
    )


def check_resumable(out: str, settings: dict[str, Any]) -> None:
    """Raise UsageError where there is no checkpoint, or one of other settings."""
    path, saved = runs.checkpoint(out), runs.settings_of(out)
    if saved is None:
        fail(f"--resume: {path} doesn't exist; train without --resume first")
    if saved != settings:
        fail(f"--resume: {path} has recipe {saved['recipe']!r} or other settings; give its --recipe, or another --out")


def check_free(out: str, replace: bool) -> None:
    """Raise UsageError where there is an earlier training, unless it is to be replaced."""
    epochs = len(runs.read_history(out))
    what = f"a training of {epochs} epoch{'s' * (epochs != 1)}; --resume goes on with it"
    if not storage.exists(runs.checkpoint(out)):
        begun = any(storage.exists(storage.join(out, half)) for half in adaptation.HALVES)
        what = "an adaptation; --start with --resume goes on with it" if begun else "a model"
    what = f"--out {out} holds {what}; another --out leaves it alone"
    console.check_free(out, _MADE, what, replace)


def train(runner: runners.Runner, first: TrainingRun, recipe: recipes.Recipe) -> None:
    """Do every pass, and what lies between them."""
    train_pass(runner, first)
    if not recipe.practice:
        return
    judged = replace(first, quality=training_steps.judge(runner, first))
    practices = training_steps.make_mixtures(runner, judged, min(recipe.practice, 2 * sum(first.counts)))
    if not practices:
        return
    training_steps.learn_context(runner, judged, practices, epochs=20 if recipe.second_pass else 40)
    if recipe.second_pass:
        earlier = [r for r in runs.read_history(first.out) if r["pass"] == 1]
        train_pass(runner, replace(judged, number=2, earlier_rows=earlier))
        training_steps.learn_context(runner, judged, practices)


def train_pass(runner: runners.Runner, this_pass: TrainingRun) -> None:
    """Train the network over all epochs."""
    if isinstance(runner, runners.InProcess):
        runs.fit(this_pass)
    else:
        train_workers(fit, this_pass, this_pass.out, runner)


def fit(this_pass: TrainingRun, device: str) -> None:
    """Run one Ray Train worker."""
    import ray.train

    runs.fit(this_pass, device, ray.train.report)


def main(argv: Sequence[str] | None = None, log: Log | None = None) -> int:
    """Run the command; from Python, `log` is called with each row of the history: any function of a dict."""
    return console.run(
        functools.partial(run, log=log), parser(), argv, "the same command with --resume goes on from the last epoch"
    )


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.train import main as run_main

    sys.exit(run_main())
