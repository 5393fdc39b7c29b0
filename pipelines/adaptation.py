"""Going on from a trained model with some clips of one's own: `pipelines.train --start MODEL`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from avsep import shards, storage, suspects
from avsep.factors import DataConfig
from avsep.learning import adapting, bags, steps
from avsep.learning.run import HISTORY_FILE
from avsep.model import LABELLER_FILE, LabellerConfig, Model, ModelConfig, fingerprint, label_config, versions
from avsep.records import check_vocabularies
from pipelines import cluster, runners
from pipelines.console import fail, say

HALVES = ("adapting-1.json", "adapting-2.json")  # in OUT: what each half said of what the other taught


@dataclass(frozen=True)
class Adaptation:
    """What the parts of an adaptation need to know."""

    start: str  # a model folder
    clips: str
    files: list[str]  # of the clips
    without: frozenset[str]  # ids of clips that are left out
    labelled: bool  # a picture network looked at the clips
    out: str
    config: ModelConfig  # the start's, with the clips' picture network and its labels
    adapting: adapting.AdaptingConfig
    settings: dict[str, Any]  # what a half that was judged earlier must agree with

    @property
    def model(self) -> str:
        """Where the model goes."""
        return storage.join(self.out, "model")


def plan(arguments: argparse.Namespace) -> Adaptation:
    """Check that model and clips go together; UsageError or ValueError where they don't."""
    if arguments.recipe != "default":
        fail(f"--recipe {arguments.recipe}: with --start the network is the model's; leave --recipe out")
    start = ModelConfig.read(arguments.start)
    made_with = DataConfig.from_dict(shards.read_configuration(arguments.clips))
    check_vocabularies(arguments.clips, made_with.vocabulary, f"--start {arguments.start}", start.vocabulary)
    check_extraction(arguments, made_with, start)
    if start.network.published_head:
        fail(
            f"--start {arguments.start} is of recipe {start.recipe!r}, whose network can't be adapted; give a model of "
            "recipe default, audioset or both_passes, or train anew without --start"
        )
    config = start if made_with.labeller is None else seen_by(made_with, start)
    chosen = adapting.AdaptingConfig()
    chosen = replace(chosen, epochs=arguments.epochs or chosen.epochs)
    without, note = suspects.left_out(arguments.without, arguments.clips)
    if note:
        say(f"train: {note}")
    files = shards.clip_files(arguments.clips)
    settings: dict[str, Any] = {"start": fingerprint(arguments.start), "adapting": asdict(chosen)}
    settings["clips"] = shards.configuration_digest({"files": sorted(map(storage.name, files))})
    if without:
        settings["without"] = shards.configuration_digest({"without": sorted(without)})
    return Adaptation(
        arguments.start,
        arguments.clips,
        files,
        without,
        bool(made_with.labeller),
        arguments.out,
        config,
        chosen,
        settings,
    )


def seen_by(made_with: DataConfig, start: ModelConfig) -> ModelConfig:
    """Return the start's configuration with the clips' picture network and way of looking, and the labels of these.

    What the start knows of its own picture network's scores holds for no other.
    """
    assert made_with.labeller is not None
    labels = label_config(made_with.labeller, made_with.extraction.looks)
    labeller = LabellerConfig(made_with.labeller, made_with.labeller_sha256)
    same = labels == start.labels and labeller.architecture == start.labeller.architecture
    evidence = start.evidence
    if not same or start.labeller.sha256 not in (None, labeller.sha256):
        evidence = replace(evidence, picture_slope=0.0, picture_offset=0.0)
    looked = made_with.extraction
    extraction = replace(start.extraction, looks=looked.looks, image_size=looked.image_size)
    return replace(start, labels=labels, labeller=labeller, extraction=extraction, evidence=evidence)


def check_extraction(arguments: argparse.Namespace, made_with: DataConfig, start: ModelConfig) -> None:
    """Raise UsageError where the clips' sound was factorised otherwise than the model's."""
    for name, theirs in start.extraction.as_dict().items():
        ours = made_with.extraction.as_dict().get(name)
        if name not in ("image_size", "looks") and ours != theirs:
            fail(
                f"{arguments.clips} was extracted with {name} {_said(ours, theirs)}, --start {arguments.start} with "
                f"{_said(theirs, ours)}: extract the clips again, to another folder, as the model's were "
                "(the starter's are what pipelines.extract makes without --recipe)"
            )


def _said(value: Any, other: Any) -> str:
    """Say a setting; of several in one, those that differ."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in value.items() if v != other.get(k))


def has_begun(adaptation: Adaptation) -> bool:
    """Tell whether a part of it is done; UsageError where that is of another adaptation, or of other clips."""
    done = [path for half in HALVES if storage.exists(path := storage.join(adaptation.out, half))]
    for path in done:
        if json.loads(storage.read_bytes(path))["settings"] != adaptation.settings:
            fail(
                f"--resume: {path} is of other clips, or another --start, --epochs or --without; give those, or "
                "another --out"
            )
    return bool(done)


def adapt(runner: runners.Runner, adaptation: Adaptation) -> None:
    """Judge an adaptation on both halves, and write the adapted model, or the start where it is no better."""
    counts = [bags.count_clips(file, adaptation.config.labelling, adaptation.without) for file in adaptation.files]
    labelled, n_clips = Counter[str](), sum(c["train"] for c, _ in counts)
    for _, by_label in counts:
        labelled.update({k: n for k, n in by_label.items() if n})
    left_out = steps.left_out(adaptation.clips, steps.by_split([c for c, _ in counts]), len(adaptation.without))
    say(f"train: {n_clips} clips, going on from {adaptation.start}{left_out}")
    judgement = None
    if n_clips >= adapting.LEAST_CLIPS and labelled:
        todo = [(adaptation, half) for half in (0, 1) if not storage.exists(storage.join(adaptation.out, HALVES[half]))]
        for half in runner.map(judge_half, todo):
            say(f"train: half {half + 1} of 2 has judged what the other one taught")
        judgement = read_judgement(adaptation)
    if judgement and judgement.clips < adapting.LEAST_CLIPS:  # the others show nothing
        judgement = None
    if judgement:
        say(
            f"train: agreement with held-back clips' labels, beyond chance: {judgement.before:.3f} before, "
            f"{judgement.after:.3f} after (gain ± {judgement.error:.3f}, {judgement.clips} clips)"
        )
    facts = {
        "from": storage.name(adaptation.start.rstrip("/")),
        "from_sha256": adaptation.settings["start"],
        "clips": n_clips,
        "clips_by_label": dict(labelled),
        "sources": steps.count_sources(adaptation.files, adaptation.without),
        "judgement": asdict(judgement) if judgement else None,
        "kept_start": not (judgement and judgement.better),
    }
    for line in runner.map(write_model, [(adaptation, facts)]):
        say(f"train: {line}")


def read_judgement(adaptation: Adaptation) -> adapting.Judgement:
    """Put together what both halves said."""
    parts = [json.loads(storage.read_bytes(storage.join(adaptation.out, half))) for half in HALVES]
    return adapting.Judgement.of(*([x for p in parts for x in p[when]] for when in ("before", "after")))


def _load(adaptation: Adaptation) -> tuple[Model, bags.Bags, Any]:
    cluster.one_thread()
    start = Model.load(adaptation.start)
    found = adapting.load_clips(start, adaptation.config.labelling, adaptation.files, adaptation.without)
    assert found is not None  # counted before
    return start, *found


def judge_half(adaptation: Adaptation, half: int) -> int:
    """Run one Ray task: learn from a half, and keep what the other one says."""
    before, after = adapting.judge_half(*_load(adaptation), adaptation.adapting, half)
    said = {"settings": adaptation.settings, "before": before, "after": after}
    storage.write_text(storage.join(adaptation.out, HALVES[half]), json.dumps(said) + "\n")
    return half


def write_model(adaptation: Adaptation, facts: dict[str, Any]) -> str:
    """Run one Ray task: write the model, adapted or as it was; say which."""
    rows: list[dict[str, Any]] = []
    if facts["kept_start"]:
        model = Model.load(adaptation.start)
    else:
        model, clips, quality = _load(adaptation)
        model, rows = adapting.adapt(model, clips, quality, adaptation.adapting)
        model = adapting.remember(model, adaptation.config, adaptation.files, facts, adaptation.without)
    model.config = replace(model.config, training=model.config.training | {"adapted": facts}, versions=versions())
    storage.write_text(storage.join(adaptation.out, HISTORY_FILE), json.dumps(rows, indent=1))
    theirs = adaptation.labelled and not facts["kept_start"]
    labeller = storage.join(adaptation.clips if theirs else adaptation.start, LABELLER_FILE)
    if storage.exists(labeller):  # the picture network goes with the model
        storage.write_bytes(storage.join(adaptation.model, LABELLER_FILE), storage.read_bytes(labeller))
    model.save(adaptation.model)
    if not facts["kept_start"]:
        return f"adapted to {facts['clips']} clips"
    if facts["judgement"] is None:
        return (
            f"the start is kept as it was: too few of {facts['clips']} clips have labels to show whether an adaptation "
            f"helps; {adapting.LEAST_CLIPS} are needed, by --labeller or in the table"
        )
    return "the start is kept as it was: held-back clips show no gain beyond twice its standard error"
