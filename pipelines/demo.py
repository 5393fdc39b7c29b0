"""The whole story on generated clips, on this machine: from video files to separated sounds and a report.

It renders clips with known sources, and trains a small picture network on drawn pictures in place of an ImageNet one.
Then it runs the pipelines that a user runs: manifest, extract, train, collect, separate, evaluate. It ends by naming
DIR/report.html.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines import INTERRUPTED, UNUSABLE, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.demo
  python -m pipelines.demo --out out/quick --clips 40
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("demo", __doc__, EXAMPLES)
    p.add_argument("--out", default="out/demo", help="folder of everything that the demo makes")
    p.add_argument("--clips", type=int, default=120, help="how many clips of ten seconds to render")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avsep import cli, evaluation, plots, results_report, stages, starter, storage, synthetic
from avsep.model import LABELLER_FILE, ModelConfig, add_training_facts, describe_training
from avsep.objects import OBJECTS
from avsep.records import Segment, read_segments
from avsep.report import Report
from avsep.separation import Separator
from pipelines import cluster, collect, console, evaluate, extract, manifest, runners, train
from pipelines.console import fail, say
from pipelines.progress import Progress

SEED = 1
_LEAST_CLIPS = 8
_MARKER = ".avsep-demo"
_MADE = (  # by a demo, in its folder
    "clips", "manifest", "shards", "model", "paper", "results", "separated", "starter", "relation_maps", "ray",
    "history.json",
    "checkpoint.pt", "checkpoint-2.pt", "practice.pt", "practice-val.pt", "loss.png", "overview.png", "report.html",
    LABELLER_FILE,
)  # fmt: skip
_EMPTY_SCENE = 819  # ImageNet's "stage": what the picture network answers when it sees none of the objects
_PICTURES_A_CLASS, _HELD_OUT = 85, 10
_PAPER_EPOCHS = 20
_SHOWN = 3  # test clips in the report
_CANT_KNOW = (
    "A model that learned for two minutes from synthesised sounds knows these alone. It can't know real instruments, "
    "rooms and microphones, nor objects that weren't among its clips; of a sound unlike them it says so. The starter "
    "model, which comes with the package, learned from open recordings, and has never heard these clips."
)


def render(folder: str, split: str, number: int, n_objects: int | None) -> Segment:
    """Render one clip and its references to files."""
    cluster.one_thread()
    return synthetic.write_scene(synthetic.render_scene(number, split, SEED, n_objects=n_objects), folder)


def draw_images(object_name: str | None, count: int, seed: int) -> NDArray[np.uint8]:
    """Draw pictures of one object (None: of none), framed as the look at the middle frames a video's."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        image = synthetic.draw(object_name, rng)
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        images.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    return np.stack(images)


def train_labeller(path: str) -> float:
    """Train the picture network on drawn pictures and save it; return its accuracy on others."""
    cluster.one_thread()
    names: list[str | None] = [*synthetic.OBJECTS, None]
    index = {o.name: o.imagenet[0] for o in OBJECTS if o.imagenet}
    classes = [index[n] if n else _EMPTY_SCENE for n in names]
    drawn = [draw_images(n, _PICTURES_A_CLASS + _HELD_OUT, SEED * 100 + i) for i, n in enumerate(names)]
    shown, kept = (np.concatenate([d[part] for d in drawn]) for part in (slice(_HELD_OUT, None), slice(_HELD_OUT)))
    targets = np.repeat(np.arange(len(names)), _PICTURES_A_CLASS)
    labeller = synthetic.train_small_labeller(shown, targets.tolist(), classes)
    labeller.save(path)
    guesses = labeller(kept).argmax(1).reshape(len(names), _HELD_OUT)
    return float((guesses.numpy() == np.array(classes)[:, None]).mean())


def split_clips(n_clips: int) -> dict[str, int]:
    """Divide clips among the splits, none of which is empty."""
    n_val, n_test = max(1, round(0.10 * n_clips)), max(1, round(0.15 * n_clips))
    return {"train": n_clips - n_val - n_test, "val": n_val, "test": n_test}


def prepare(runner: runners.Runner, folder: Path, n_clips: int, labeller: Path) -> float:
    """Render all clips and the table that names them, and meanwhile train the picture network."""
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(train_labeller, (str(labeller),))]
    for split, count in split_clips(n_clips).items():
        for number in range(count):
            # tests are duets, with a trio now and then, so that there is something to separate
            n_objects = None if split == "train" else 3 if number % 4 == 3 else 2
            jobs.append((render, (str(folder), split, number, n_objects)))
    segments, accuracy = [], 0.0
    with Progress("render", len(jobs) - 1, "clips") as progress:
        for result in runner.map(_call, jobs):
            if isinstance(result, Segment):
                segments.append(result)
                progress.add(1)
            else:
                accuracy = result
    synthetic.write_table(sorted(segments, key=lambda s: s.segment_id), folder / "segments.csv")
    return accuracy


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def step(title: str, main: Callable[[Sequence[str]], int], *arguments: str) -> None:
    """Run one pipeline as a user would, and say how."""
    say(f"\n$ {title} {' '.join(arguments)}")
    began = time.monotonic()
    status = main(arguments)
    say(f"({time.monotonic() - began:.0f} s)")
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status == UNUSABLE:
        fail(f"{title} failed; its message is above")


def write_report(runner: runners.Runner, out: Path, started: float, labeller_accuracy: float) -> Path:
    """Put the run on one page."""
    results = json.loads((out / "results" / "results.json").read_text())
    segments = [s for s in read_segments(str(out / "manifest")) if s.split == "test"]
    model, references = str(out / "model"), str(out / "clips" / "references")
    shown: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(draw_overview, (model, segments[0], references))]
    shown += [(show_clip, (model, s, references)) for s in segments[:_SHOWN]]
    shown += [(show_clip, (starter.PATH, segments[0], references))]
    overview, *sections, of_starter = runners.map_in_order(runner, _call, shown)
    (out / "overview.png").write_bytes(overview)
    report = Report("avsep demo: what do objects sound like?")
    report.paragraph(summary(results, time.monotonic() - started))
    report.heading("Listen")
    report.image(overview, "A frame, its sound, and the sounds separated from it")
    for section in sections:
        report.append(section)
    report.heading("The starter model on the same clip")
    report.paragraph(_CANT_KNOW)
    report.paragraph(f"Of the starter model: {describe_training(ModelConfig.read(starter.PATH))}.")
    report.append(of_starter)
    report.heading("How good it is")
    results_report.add_results(report, results, "objects")
    report.heading("How it was learned")
    report.paragraph(f"The small picture network names {labeller_accuracy:.0%} of held-out drawings.")
    loss, maps = Report(""), Report("")
    loss.image((out / "loss.png").read_bytes(), "Loss and validation figures by epoch")
    report.fold("Loss by epoch", loss)
    for path in sorted((out / "relation_maps").glob("*.png")):
        maps.image(path.read_bytes(), f"Relation map of {path.stem} beside a frame of it")
    report.fold("Relation maps of validation clips", maps)
    storage.write_text(str(out / "report.html"), report.html())
    return out / "report.html"


def summary(results: dict[str, Any], seconds: float) -> str:
    """Say in a paragraph what was done and how well."""
    sdr = results_report.mean_sdr(results)
    above, under, ahead = (
        sdr["default"] - sdr["mixture"], sdr["ideal_mask"] - sdr["default"], sdr["default"] - sdr["paper"],
    )  # fmt: skip
    return (
        "Clips with one to three objects were rendered. From their pictures and sound alone a network learned "
        "which sound belongs to which object. It then separated "
        f"{results_report.plural(len(results['clips']), 'clip')} that it had not seen, at a mean SDR of "
        f"{sdr['default']:.1f} dB: {abs(above):.1f} dB {'above' if above >= 0 else 'under'} no separation, "
        f"{under:.1f} dB under the ideal mask, {abs(ahead):.1f} dB {'above' if ahead >= 0 else 'under'} the published "
        f"method. The run took {seconds / 60:.1f} minutes."
    )


def show_clip(model: str, segment: Segment, references: str) -> Report:
    """Show one test clip as a model separates it."""
    cluster.one_thread()
    separator = Separator.load(model)
    case = evaluation.Case.load(segment, references, separator.sample_rate, separator.vocabulary)
    return results_report.clip_section([segment], case, separator)


def draw_overview(model: str, segment: Segment, references: str) -> bytes:
    """Draw one test clip's frame, mixture and separated sounds."""
    cluster.one_thread()
    separator = Separator.load(model)
    case = evaluation.Case.load(segment, references, separator.sample_rate, separator.vocabulary)
    separation = separator(case.mixture, case.names)
    sounds = [("mixture", case.mixture.numpy()), *zip(separation.objects, separation.estimates.numpy(), strict=True)]
    image = stages.middle_image(segment.source, segment.start_s, segment.end_s)
    return plots.overview(image if image is not None else np.zeros((1, 1, 3), np.uint8), sounds, separator.stft)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    if arguments.clips < _LEAST_CLIPS:
        fail(f"--clips {arguments.clips}: at least {_LEAST_CLIPS} are needed for three splits")
    started = time.monotonic()
    if storage.is_uri(arguments.out):
        fail(f"--out {arguments.out}: the demo writes to this machine; give a folder")
    out = Path(arguments.out).absolute()
    clear(out)
    if not arguments.in_process:
        say("starting Ray on this machine …")
    with runners.session(arguments.in_process) as runner:
        began = time.monotonic()
        if not arguments.in_process:
            say(f"({began - started:.0f} s)")
        say("rendering clips with known sources, and training a small picture network on drawings")
        accuracy = prepare(runner, out / "clips", arguments.clips, out / LABELLER_FILE)
        say(f"the picture network names {accuracy:.0%} of held-out drawings ({time.monotonic() - began:.0f} s)")
        run_steps(out, ["--in-process"] if arguments.in_process else [])
        report = write_report(runner, out, started, accuracy)
    say(f"\n{(time.monotonic() - started) / 60:.1f} minutes. The report: {report}")
    return console.DONE


def clear(out: Path) -> None:
    """Make the folder ready: what an earlier demo made there goes; UsageError where somebody else made it."""
    earlier = [out / name for name in _MADE if (out / name).exists()]
    if earlier and not (out / _MARKER).exists():
        name = earlier[0].name + "/" * earlier[0].is_dir()
        fail(f"--out {out} holds {name}, which no demo made; give another folder, or remove it")
    storage.make_directory(str(out))
    storage.write_text(str(out / _MARKER), "A demo's folder: the next one deletes what this one made.\n")
    if earlier:
        say(f"replacing the earlier demo in {out}")
    for path in earlier:  # perhaps with another --clips
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def run_steps(out: Path, how: Sequence[str]) -> None:
    """Run the pipelines on the rendered clips, as a user would."""
    shards, model, paper = str(out / "shards"), str(out / "model"), str(out / "paper")
    segments, references = str(out / "manifest"), str(out / "clips" / "references")
    table, weights = str(out / "clips" / "segments.csv"), str(out / LABELLER_FILE)
    step("python -m pipelines.manifest", manifest.main, "--table", table, "--out", segments)
    step(
        "python -m pipelines.extract", extract.main,
        "--segments", segments, "--out", shards, "--weights", weights, *how,
    )  # fmt: skip
    step("python -m pipelines.train", train.main, "--clips", shards, "--out", str(out), *how)
    add_training_facts(model, about="clips that the demo drew and rendered")
    step("python -m pipelines.collect", collect.main, "--model", model, "--clips", shards, *how)
    step(
        "python -m pipelines.train", train.main,
        "--clips", shards, "--out", paper, "--recipe", "paper", "--epochs", str(_PAPER_EPOCHS), *how,
    )  # fmt: skip
    first = next(s for s in read_segments(segments) if s.split == "test")
    step(
        "avsep separate", lambda a: cli.main(["separate", *a]),
        first.source, "--model", model, "--out", str(out / "separated"),
    )  # fmt: skip
    step("avsep separate", lambda a: cli.main(["separate", *a]), first.source, "--out", str(out / "starter"))
    step(
        "python -m pipelines.evaluate", evaluate.main,
        "--model", model, "--paper-model", f"{paper}/model", "--segments", segments,
        "--references", references, "--out", str(out / "results"), *how,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
