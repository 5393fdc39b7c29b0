"""`avsep separate | inspect | label`: the model on files."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from avsep import media, plots, shards, storage
from avsep.model import CONFIG_FILE, LABELLER_FILE, Model
from avsep.objects import OBJECT_NAMES, object_index, object_scores, weak_labels
from avsep.records import ClipError
from avsep.separation import REST, Plan, Separator
from avsep.vision import DEFAULT_ARCHITECTURE, ImageLabeller, LabellerUnavailable

_MAX_PICTURES = 60  # of a file that are labelled; a longer one is sampled evenly
_BLOCK = 1 << 20  # samples read at a time
_REPORT = "separation.json"
EXAMPLES = """examples:
  avsep separate duet.mp4 --model out/run/model --out out/duet
  avsep separate duet.mp4 --model out/run/model --out out/duet --objects violin,dog
  avsep inspect out/run/model
  avsep label duet.mp4 --weights resnet152-394f9c45.pth
"""


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    p = argparse.ArgumentParser(
        "avsep",
        description="Separate a video's sound into its objects.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("separate", help="one WAV per object, and the rest")
    s.add_argument("video", type=Path, help="any file that ffmpeg reads; sound alone will do")
    s.add_argument("--model", required=True, help="the model folder that pipelines.train wrote")
    s.add_argument("--out", type=Path, required=True, help="folder for the WAVs and separation.json")
    s.add_argument("--objects", help="comma-separated names; without it the pictures decide, or the sound")
    s.add_argument("--weights", help="weights of the picture network, unless the model carries its own")
    i = commands.add_parser("inspect", help="what is in a shard, an extraction's folder or a model")
    i.add_argument("path", help="a .parquet file or a folder")
    la = commands.add_parser("label", help="what the pictures show")
    la.add_argument("video", type=Path)
    la.add_argument("--weights", help="a .pth or .safetensors file; else torchvision's ImageNet weights")
    la.add_argument("--architecture", default=DEFAULT_ARCHITECTURE, help="any torchvision classifier")
    return p


def separate_file(
    video: Path, model_dir: str, out: Path, objects: Sequence[str] | None, weights: str | None
) -> dict[str, object]:
    """Separate a whole file, whatever its length, into float32 WAVs that add up to its sound.

    Returns what goes to `separation.json`. Raises ClipError for a file without usable sound,
    ValueError for unknown objects or a folder that holds other WAVs.
    """
    separator = Separator.load(model_dir)
    for name in objects or ():
        object_index(name)
    earlier = _earlier_files(out)
    pictures = _pictures(video)
    scores, note = _picture_scores(separator, model_dir, weights, pictures)
    seen = None
    if objects is None and scores is not None:
        labels = separator.model.config.labels
        marks = weak_labels(scores, labels.threshold, labels.best_threshold)
        seen = [OBJECT_NAMES[i] for i in marks.nonzero().flatten().tolist()]
    source = "given" if objects is not None else "sound" if seen is None else "pictures"
    rate = separator.stft.sample_rate

    def blocks() -> Iterator[NDArray[np.float32]]:
        return media.iter_audio(video, sample_rate=rate, block=_BLOCK)

    plan = separator.plan(blocks(), objects, seen)
    out.mkdir(parents=True, exist_ok=True)
    _write_wavs(plan, blocks, out, rate, earlier)
    window = plan.first_window
    picture = pictures[len(pictures) // 2] if len(pictures) else None
    first = slice(separator.model.config.n_bases)  # of the factorisations
    figure = plots.relation_map(
        window.relation[:, first].numpy(),
        OBJECT_NAMES,
        window.factors.basis_energy[first].numpy(),
        picture,
        plan.objects,
    )
    (out / "relation_map.png").write_bytes(figure)
    report: dict[str, object] = {
        "source": str(video),
        "model": model_dir,
        "sample_rate": rate,
        "duration_s": plan.n_samples / rate,
        "objects_from": source,
        "note": note,
        "objects": [
            {
                "name": name,
                "file": f"{name}.wav",
                "from": source if seen is None or name in seen else "sound",
                "confidence": plan.confidence[name],
                "sound_score": plan.sound_scores[name],
                "picture_score": None if scores is None else float(scores[OBJECT_NAMES.index(name)]),
                "silent": name in plan.silent,
            }
            for name in plan.objects
        ],
        "rest": f"{REST}.wav",
        "heard": {n: s for n, s in sorted(plan.sound_scores.items(), key=lambda x: -x[1]) if s >= 0.01},
        "relation_map": "relation_map.png",
        "bases": separator.config.bases,
    }
    storage.write_text(str(out / _REPORT), json.dumps(report, indent=1) + "\n")
    return report


def _earlier_files(out: Path) -> list[Path]:
    """List the WAVs of an earlier separation in the folder; ValueError for WAVs of other origin."""
    ours: set[str] = set()
    if (out / _REPORT).is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            earlier = json.loads((out / _REPORT).read_text())
            ours = {f"{n}.wav" for n in (*(o["name"] for o in earlier["objects"]), REST)}
    for path in sorted(out.glob("*.wav")):
        if path.name not in ours or path.stem not in (*OBJECT_NAMES, REST):
            raise ValueError(f"{out} holds {path.name}, which no separation wrote; give an --out without other WAVs")
    return sorted(out.glob("*.wav"))


def _pictures(video: Path) -> NDArray[np.uint8]:
    """Decode pictures from all over a file, at most a minute's worth."""
    none = np.zeros((0, 224, 224, 3), np.uint8)
    info = media.probe(video)
    if not info.has_video:
        return none
    if info.duration_s is None or info.duration_s <= _MAX_PICTURES:
        return media.decode(video, 0, None if info.duration_s else _MAX_PICTURES).images
    found = [none]
    for start in np.linspace(0, info.duration_s - 1, _MAX_PICTURES):
        with contextlib.suppress(ClipError):  # a damaged stretch
            found.append(media.decode(video, float(start), float(start) + 1).images)
    return np.concatenate(found)


def _picture_scores(
    separator: Separator, model_dir: str, weights: str | None, pictures: NDArray[np.uint8]
) -> tuple[torch.Tensor | None, str]:
    """Score the objects in pictures, `(L,)`; None and why when there is no picture or no picture network."""
    if len(pictures) == 0:
        return None, "the file has no pictures"
    config = separator.model.config.labeller
    own = storage.join(model_dir, LABELLER_FILE)
    if weights is not None:  # a mistake in them is the user's to know
        return object_scores(ImageLabeller.load(config.architecture, weights)(pictures)), ""
    try:
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(storage.local_file(own)) if storage.exists(own) else None
            labeller = ImageLabeller.load(config.architecture, path)
    except LabellerUnavailable as error:
        return None, str(error)
    if config.sha256 not in (None, labeller.sha256):
        return (
            None,
            f"the model's clips were labelled with other weights of {config.architecture}; pass them as --weights",
        )
    return object_scores(labeller(pictures)), ""


def _write_wavs(
    plan: Plan, blocks: Callable[[], Iterator[NDArray[np.float32]]], out: Path, rate: int, earlier: Sequence[Path]
) -> None:
    """Render to OBJECT.wav and _rest.wav, under other names until all are whole; then earlier ones go."""
    names = [*plan.objects, REST]
    kind = "WAV" if plan.n_samples * 4 < 4_000_000_000 else "RF64"  # WAV's sizes have 32 bits
    parts = [out / f"{name}.wav.part" for name in names]
    try:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(soundfile.SoundFile(p, "w", rate, 1, subtype="FLOAT", format=kind)) for p in parts
            ]
            for estimates in plan.render(blocks()):
                for file, samples in zip(files, estimates, strict=True):
                    file.write(samples)
        for path in earlier:
            path.unlink()
        for part in parts:
            part.replace(part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def separate(arguments: argparse.Namespace) -> int:
    """Run `avsep separate`."""
    objects = None
    if arguments.objects is not None:
        objects = list(dict.fromkeys(n.strip() for n in arguments.objects.split(",") if n.strip()))
        if not objects:
            raise ValueError(
                f"--objects {arguments.objects!r} names no object; the objects are {', '.join(OBJECT_NAMES)}"
            )
    report = separate_file(arguments.video, arguments.model, arguments.out, objects, arguments.weights)
    if report["note"]:
        print(f"note: {report['note']}")
    for entry in report["objects"]:  # type: ignore[attr-defined]
        state = "silent" if entry["silent"] else f"{entry['sound_score']:.0%} of the sound"
        print(f"{arguments.out / entry['file']}: {state}, from {entry['from']}")
    print(f"{arguments.out / str(report['rest'])}\n{arguments.out / _REPORT}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Run `avsep inspect`."""
    path = str(arguments.path)
    if not storage.exists(path):
        raise FileNotFoundError(f"{path} doesn't exist; give a .parquet file, an extraction's folder or a model")
    if path.endswith(".parquet"):
        with storage.open_input(path) as f:
            import pyarrow.parquet as pq

            file = pq.ParquetFile(f)
            metadata = file.schema_arrow.metadata or {}
            print(f"{file.metadata.num_rows} rows in {file.metadata.num_row_groups} row groups")
            for field in file.schema_arrow:
                print(f"  {field.name}: {field.type}")
            for key in (b"avsep.schema_version", b"avsep.digest", b"avsep.configuration"):
                if key in metadata:
                    print(f"{key.decode()}: {metadata[key].decode()}")
    elif storage.exists(storage.join(path, CONFIG_FILE)):
        model = Model.load(path)
        print(json.dumps(asdict(model.config), indent=1))
        print(f"network: {sum(p.numel() for p in model.network.parameters()):,} parameters")
        counts = model.dictionary.counts() if model.dictionary else None
        print(f"dictionary: {dict(counts) if counts else 'none; pipelines.collect makes one'}")
    else:
        clips, rejections = shards.read_ids(path)
        commits = shards.read_commits(path)
        if not commits:
            raise ValueError(f"{path} is neither a model nor an extraction: it holds no {CONFIG_FILE} and no commits")
        print(f"{len(clips)} clips and {len(rejections)} rejections in {len(commits)} commits")
        for reason, count in Counter(r.reason for r in shards.read_rejections(path)).most_common():
            print(f"  rejected, {reason}: {count}")
    return 0


def label(arguments: argparse.Namespace) -> int:
    """Run `avsep label`."""
    pictures = _pictures(arguments.video)
    if len(pictures) == 0:
        raise ValueError(f"{arguments.video} has no pictures")
    scores = object_scores(ImageLabeller.load(arguments.architecture, arguments.weights)(pictures))
    labels = weak_labels(scores)
    for i in scores.argsort(descending=True).tolist()[:10]:
        print(f"{scores[i]:.3f}  {OBJECT_NAMES[i]}{'  (label)' if labels[i] else ''}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and status 2."""
    arguments = parser().parse_args(argv)
    command = {"separate": separate, "inspect": inspect, "label": label}[arguments.command]
    try:
        return command(arguments)
    except (ClipError, LabellerUnavailable, OSError, ValueError) as error:
        print(f"avsep {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
