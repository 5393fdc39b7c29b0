"""The whole story on generated clips, on this machine: from video files to separated sounds and a report.

Renders clips with known sources, trains a small picture network on drawn pictures in place of an
ImageNet one, then runs the pipelines that a user runs: manifest, extract, train, collect,
separate, evaluate. It ends by naming DIR/report.html.
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

from pipelines import arguments_of

EXAMPLES = """examples:
  python -m pipelines.demo
  python -m pipelines.demo --out out/quick --clips 40
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("demo", __doc__, EXAMPLES)
    p.add_argument("--out", default="out/demo", help="folder of everything that the demo makes")
    p.add_argument("--clips", type=int, default=120, help="how many clips of ten seconds to render")
    return p


if __name__ == "__main__":
    parser().parse_args()  # help and mistakes at once: what follows takes seconds

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avsep import cli, evaluation, plots, stages, storage, synthetic, vision
from avsep.model import LABELLER_FILE, add_training_facts
from avsep.objects import OBJECTS
from avsep.records import Segment, read_segments
from avsep.report import Report
from avsep.separation import Separator
from pipelines import collect, evaluate, execution, extract, manifest, train
from pipelines.execution import fail, say

SEED = 1
_LEAST_CLIPS = 8
_MARKER = ".avsep-demo"
_FOLDERS = ("clips", "manifest", "shards", "model", "paper", "results", "separated", "relation_maps")  # it makes
_EMPTY_SCENE = 819  # ImageNet's "stage": what the picture network answers when it sees none of the objects
_PICTURES_A_CLASS, _HELD_OUT = 85, 10
_PAPER_EPOCHS = 20
_SHOWN = 3  # test clips in the report


def render(folder: str, split: str, number: int, n_objects: int | None) -> Segment:
    """Render one clip and its references to files."""
    execution.one_thread()
    return synthetic.write_scene(synthetic.render_scene(number, split, SEED, n_objects=n_objects), folder)


def draw_pictures(object_name: str | None, count: int, seed: int) -> NDArray[np.uint8]:
    """Draw pictures of one object (None: of none), framed as the decoder frames a video's."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        image = synthetic.picture(object_name, rng)
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pictures.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    return np.stack(pictures)


def train_labeller(path: str) -> float:
    """Train the picture network on drawn pictures and save it; return its accuracy on others."""
    execution.one_thread()
    names: list[str | None] = [*synthetic.OBJECTS, None]
    index = {o.name: o.imagenet[0] for o in OBJECTS}
    classes = [index[n] if n else _EMPTY_SCENE for n in names]
    drawn = [draw_pictures(n, _PICTURES_A_CLASS + _HELD_OUT, SEED * 100 + i) for i, n in enumerate(names)]
    shown, kept = (np.concatenate([d[part] for d in drawn]) for part in (slice(_HELD_OUT, None), slice(_HELD_OUT)))
    targets = np.repeat(np.arange(len(names)), _PICTURES_A_CLASS)
    labeller = vision.train_small_labeller(shown, targets.tolist(), classes)
    labeller.save(path)
    guesses = labeller(kept).argmax(1).reshape(len(names), _HELD_OUT)
    return float((guesses.numpy() == np.array(classes)[:, None]).mean())


def split_clips(n_clips: int) -> dict[str, int]:
    """Divide clips among the splits, none of which is empty."""
    n_val, n_test = max(1, round(0.10 * n_clips)), max(1, round(0.15 * n_clips))
    return {"train": n_clips - n_val - n_test, "val": n_val, "test": n_test}


def prepare(runner: execution.Runner, folder: Path, n_clips: int, labeller: Path) -> float:
    """Render all clips and the table that names them, and meanwhile train the picture network."""
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(train_labeller, (str(labeller),))]
    for split, count in split_clips(n_clips).items():
        for number in range(count):
            # tests are duets, with a trio now and then, so that there is something to separate
            n_objects = None if split == "train" else 3 if number % 4 == 3 else 2
            jobs.append((render, (str(folder), split, number, n_objects)))
    segments, accuracy = [], 0.0
    with execution.Progress("render", len(jobs) - 1, "clips") as progress:
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
    if main(arguments) == execution.UNUSABLE:
        raise RuntimeError(f"{title} failed; its message is above")


def write_report(out: Path, seconds: float, labeller_accuracy: float) -> Path:
    """Put the run on one page."""
    results = json.loads((out / "results" / "results.json").read_text())
    figures = {n: e["mean"]["sdr"] for n, e in results["separators"].items()}
    report = Report("avsep demo: what do objects sound like?")
    ahead = figures["default"] - figures["paper"]
    n_clips = len(results["clips"])
    report.paragraph(
        f"Clips with one to three objects were rendered, a network learned from their pictures and sound alone "
        f"which sound belongs to which object, and then separated {n_clips} clip{'s' * (n_clips > 1)} that it had not "
        f"seen. On them its mean SDR is {figures['default']:.1f} dB: {figures['default'] - figures['mixture']:.1f} dB "
        f"above the mixture as it is, {figures['ideal_mask'] - figures['default']:.1f} dB under the ideal mask "
        f"({figures['ideal_mask']:.1f} dB), {abs(ahead):.1f} dB {'above' if ahead >= 0 else 'under'} the published "
        f"recipe trained on the same clips. The run took {seconds / 60:.1f} minutes."
    )
    separator = Separator.load(str(out / "model"))
    segments = [s for s in read_segments(str(out / "manifest")) if s.split == "test"]
    report.image(draw_overview(separator, segments[0], out), "A frame, its sound, and the sounds separated from it")
    report.heading("Separation")
    evaluate.add_results(report, results, "objects")
    report.heading("Listen")
    for segment in segments[:_SHOWN]:
        job = evaluate.Job(str(out / "model"), None, str(out / "clips" / "references"))
        report.append(evaluate.clip_section(job, [segment]))
    report.heading("Training")
    report.image((out / "loss.png").read_bytes(), "Loss and validation figures by epoch")
    report.paragraph(f"The small picture network names {labeller_accuracy:.0%} of held-out drawings.")
    report.heading("Relation maps of validation clips")
    for path in sorted((out / "relation_maps").glob("*.png")):
        report.image(path.read_bytes(), f"Relation map of {path.stem} beside a frame of it")
    storage.write_text(str(out / "report.html"), report.html())
    return out / "report.html"


def draw_overview(separator: Separator, segment: Segment, out: Path) -> bytes:
    """Draw one test clip's frame, mixture and separated sounds, and keep the figure in overview.png."""
    case = evaluation.Case.load(segment, str(out / "clips" / "references"), separator.stft.sample_rate)
    separation = separator(case.mixture, case.names)
    sounds = [("mixture", case.mixture.numpy()), *zip(separation.objects, separation.estimates.numpy(), strict=True)]
    picture = stages.middle_picture(segment.source, segment.start_s, segment.end_s)
    figure = plots.overview(picture if picture is not None else np.zeros((1, 1, 3), np.uint8), sounds, separator.stft)
    (out / "overview.png").write_bytes(figure)
    return figure


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    if arguments.clips < _LEAST_CLIPS:
        fail(f"--clips {arguments.clips}: at least {_LEAST_CLIPS} are needed for three splits")
    started = time.monotonic()
    out = Path(arguments.out).absolute()
    labeller = out / LABELLER_FILE
    earlier = [out / name for name in _FOLDERS if (out / name).exists()]
    if earlier and not (out / _MARKER).exists():
        fail(f"--out {arguments.out} holds {earlier[0].name}/, which no demo made; give another folder, or remove it")
    storage.make_directory(str(out))
    storage.write_text(str(out / _MARKER), "A demo's folder: the next one deletes what this one made.\n")
    for folder in earlier:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps with another --clips
    shards, model = str(out / "shards"), str(out / "model")
    say("starting Ray on this machine …")
    with execution.session() as runner:
        say("rendering clips with known sources, and training a small picture network on drawings")
        accuracy = prepare(runner, out / "clips", arguments.clips, labeller)
        say(f"the picture network names {accuracy:.0%} of held-out drawings")
        table = str(out / "clips" / "segments.csv")
        step("python -m pipelines.manifest", manifest.main, "--table", table, "--out", str(out / "manifest"))
        step(
            "python -m pipelines.extract", extract.main,
            "--segments", str(out / "manifest"), "--out", shards, "--weights", str(labeller),
        )  # fmt: skip
        step("python -m pipelines.train", train.main, "--clips", shards, "--out", str(out))
        add_training_facts(model, about="clips that the demo drew and rendered")
        step("python -m pipelines.collect", collect.main, "--model", model, "--clips", shards)
        step(
            "python -m pipelines.train", train.main,
            "--clips", shards, "--out", str(out / "paper"), "--recipe", "paper",
            "--epochs", str(_PAPER_EPOCHS), "--in-process",
        )  # fmt: skip
        first = next(s for s in read_segments(str(out / "manifest")) if s.split == "test")
        step(
            "avsep separate",
            lambda a: cli.main(["separate", *a]),
            first.source,
            "--model",
            model,
            "--out",
            str(out / "separated"),
        )
        step(
            "python -m pipelines.evaluate", evaluate.main,
            "--model", model, "--paper-model", str(out / "paper" / "model"), "--segments", str(out / "manifest"),
            "--references", str(out / "clips" / "references"), "--out", str(out / "results"),
        )  # fmt: skip
    report = write_report(out, time.monotonic() - started, accuracy)
    say(f"\n{(time.monotonic() - started) / 60:.1f} minutes. The report: {report}")
    return execution.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return execution.run(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
