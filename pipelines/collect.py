"""Gather each object's bases over the training clips, and add the dictionary to the model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from pipelines import WITHOUT, arguments_of, begin

EXAMPLES = """examples:
  python -m pipelines.collect --model out/run/model --clips out/clips
"""


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = arguments_of("collect", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, help="the model folder that pipelines.train wrote")
    p.add_argument("--clips", required=True, help="the clips it was trained on")
    p.add_argument("--without", nargs="+", action="extend", default=[], metavar="LIST", help=WITHOUT)
    p.add_argument("--replace", action="store_true", help="collect anew; the last one is kept in MODEL/previous")
    p.add_argument("--in-process", action="store_true", help="a plain loop without Ray")
    return p


if __name__ == "__main__":
    begin(parser())  # what follows takes seconds

from avsep import shards, suspects
from avsep.dictionary import BasisDictionary, Candidate, candidate_bases
from avsep.factors import DataConfig
from avsep.model import DICTIONARY_FILE, Model
from avsep.records import check_vocabularies, clips_from_table
from pipelines import cluster, console, runners
from pipelines.console import fail, say
from pipelines.progress import Progress


def candidates_of_file(model_dir: str, path: str, without: frozenset[str]) -> list[Candidate]:
    """Offer the bases of one file's training clips."""
    cluster.one_thread()
    model = Model.load(model_dir)
    candidates: list[Candidate] = []
    for record in clips_from_table(shards.read_table(path, without=without)):
        if record.split != "train":
            continue
        labels = model.config.labelling.decide(record.labels, record.image_logits)
        if labels is not None and labels.any():
            candidates += candidate_bases(model.network, record, labels)
    return candidates


def run(arguments: argparse.Namespace) -> int:
    """Collect the dictionary."""
    console.absolute(arguments, "model", "clips")
    model = Model.load(arguments.model)
    what = f"--model {arguments.model} has a dictionary already"
    console.check_free(arguments.model, [DICTIONARY_FILE], what, arguments.replace)
    files = shards.clip_files(arguments.clips)
    clips = DataConfig.from_dict(shards.read_configuration(arguments.clips))
    if clips.extraction.stft != model.config.stft:
        fail(
            f"{arguments.clips} has {clips.extraction.stft}, the model {model.config.stft}: "
            "use the clips that it was trained on"
        )
    check_vocabularies(f"--clips {arguments.clips}", clips.vocabulary, "the model", model.config.vocabulary)
    without, note = suspects.left_out(arguments.without, arguments.clips)
    for line in filter(None, (f"{len(without):,} of the clips are left out by --without" * bool(without), note)):
        say(f"collect: {line}")
    with (
        runners.session(arguments.in_process) as runner,
        Progress("collect", len(files), "files") as progress,
    ):

        def gathered() -> Iterator[Candidate]:
            for part in runner.map(candidates_of_file, ((arguments.model, f, without) for f in files)):
                progress.add(1)
                yield from part

        model.dictionary = BasisDictionary.collect(gathered(), model.config.objects)
    if not model.dictionary.bases:
        say(f"no basis of {arguments.clips} is sure enough for a dictionary; train longer, or on more clips")
        return console.SHORTFALL
    console.put_aside(arguments.model, [DICTIONARY_FILE])
    model.save(arguments.model)
    counts = ", ".join(f"{name} {count}" for name, count in model.dictionary.counts().items())
    say(f"dictionary in {arguments.model}: {counts}")
    return console.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return console.run(run, parser(), argv)


if __name__ == "__main__":
    # the module itself, which workers can import, and not its copy here
    from pipelines.collect import main as run_main

    sys.exit(run_main())
