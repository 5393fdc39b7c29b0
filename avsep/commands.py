"""What `avsep separate`, `inspect` and `label` do."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import soundfile
from tqdm import tqdm

from avsep import plots, shards, storage
from avsep.model import CONFIG_FILE, Model, label_config
from avsep.objects import OBJECT_NAMES
from avsep.records import ClipError, Reason
from avsep.separation import REST
from avsep.stages import ExtractionConfig
from avsep.videos import Step, VideoSeparator, pictures
from avsep.vision import DEFAULT_ARCHITECTURE, NO_DOWNLOAD, ImageLabeller, LabellerUnavailable

_REPORT = "separation.json"
_SAY_EVERY_S = 5.0
_REMEDIES = {
    Reason.MISSING: "check the path",
    Reason.NO_AUDIO: "give a file with sound",
    Reason.UNREADABLE: "give a video or sound that ffmpeg reads",
}


def separate_file(
    video: str, model_dir: str, out: str, objects: Sequence[str] | None, weights: str | None, track: int = 1
) -> dict[str, object]:
    """Separate a whole file, whatever its length, into float32 WAVs that add up to its sound.

    `video` and `out` may be URIs. Returns what goes to `separation.json`. Raises ClipError for a file
    without usable sound, ValueError for unknown objects or a folder that holds other WAVs.
    """
    separate_video = VideoSeparator.load(model_dir, weights)
    if weights is not None:
        _ = separate_video.labeller  # a mistake is told where there is no picture, too
    earlier = _earlier_files(out)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(storage.local_file(video))
        remote = storage.is_uri(out)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if remote else out)
        done = separate_video(path, folder, objects, step=stack.enter_context(_progress()), track=track)
        names = [f"{name}.wav" for name in (*done.plan.objects, REST)]
        for name in names if remote else ():
            with pa.memory_map(str(folder / name)) as f:
                storage.write_bytes(storage.join(out, name), f.read_buffer())
    for file in earlier:
        if storage.name(file) not in names and storage.exists(file):
            storage.delete_file(file)
    report = {"source": video, "model": model_dir, **done.report, "relation_map": "relation_map.png"}
    report["note"] = "; ".join(filter(None, (report.pop("unlearned"), report["note"])))
    storage.write_text(storage.join(out, _REPORT), json.dumps(report, indent=1) + "\n")  # says that the WAVs are ours
    window = done.plan.first_window.first(separate_video.separator.model.config.n_bases)
    picture = done.pictures[len(done.pictures) // 2] if len(done.pictures) else None
    figure = plots.relation_map(
        window.relation.numpy(), OBJECT_NAMES, window.factors.basis_energy.numpy(), picture, done.plan.objects
    )
    storage.write_bytes(storage.join(out, "relation_map.png"), figure)
    return report


@contextlib.contextmanager
def _progress() -> Iterator[Step]:
    """Show how far a separation is: a bar on a terminal, elsewhere a line now and then, on stderr."""
    said = time.monotonic()
    with tqdm(total=100, unit="%", disable=None, leave=False) as bar:

        def step(stage: str, done: float) -> None:
            nonlocal said
            bar.set_description(stage)
            bar.update(int(100 * done) - bar.n)
            if bar.disable and time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                print(f"{stage}: {done:.0%}", file=sys.stderr)

        yield step


def _earlier_files(out: str) -> list[str]:
    """List an earlier separation's WAVs in the folder, whole or not; ValueError for others, or no folder."""
    if storage.exists(out) and not storage.is_directory(out):
        raise ValueError(f"--out {out} is a file; give a folder")
    ours: set[str] = set()
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        earlier = json.loads(storage.read_bytes(storage.join(out, _REPORT)))
        ours = {f"{n}.wav" for n in (*(o["name"] for o in earlier["objects"]), REST)}
    files = storage.list_files(out)
    found = [path for path in files if path.endswith(".wav")]
    for path in found:
        name = storage.name(path)
        if name not in ours or name.removesuffix(".wav") not in (*OBJECT_NAMES, REST):
            raise ValueError(f"{out} holds {name}, which no separation wrote; give an --out without other WAVs")
    unfinished = {f"{n}.wav.part" for n in (*OBJECT_NAMES, REST)}  # what a killed separation left
    return found + [path for path in files if storage.name(path) in unfinished]


def separate(video: str, model: str, out: str, objects: str | None, weights: str | None, track: int = 1) -> int:
    """Run `avsep separate`."""
    names = None
    if objects is not None:
        names = list(dict.fromkeys(n.strip() for n in objects.split(",") if n.strip()))
        if not names:
            raise ValueError(f"--objects {objects!r} names no object; the objects are {', '.join(OBJECT_NAMES)}")
    report = separate_file(video, model, out, names, weights, track)
    if report["labeller"]:
        print(f"pictures: {report['labeller']}")
    if report["note"]:
        print(f"note: {report['note']}")
    for entry in report["objects"]:  # type: ignore[attr-defined]
        state = "silent" if entry["silent"] else f"{entry['sound_score']:.0%} of the sound"
        print(f"{storage.join(out, entry['file'])}: {state}, from {entry['from']}")
    for name in (str(report["rest"]), _REPORT):
        print(storage.join(out, name))
    return 0


def inspect(path: str) -> int:
    """Run `avsep inspect`."""
    if not storage.exists(path):
        raise FileNotFoundError(f"{path} doesn't exist; give a .parquet file, an extraction's folder or a model")
    if path.endswith(".parquet"):
        with storage.open_input(path) as f:
            import pyarrow.parquet as pq

            try:
                file = pq.ParquetFile(f)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from None
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


def label(video: str, weights: str | None, labeller: str | None) -> int:
    """Run `avsep label`."""
    with storage.local_file(video) as path:
        found = pictures(path, ExtractionConfig.image_size)
    if len(found) == 0:
        raise ValueError(f"{video} has no pictures")
    network = _labeller(labeller, weights)
    way = network.looking(ExtractionConfig.looks).way
    print(f"pictures: {network.architecture}, looks: {way}")
    config = label_config(network.architecture, way)
    scores = config.scores(network.evidence(found, way))
    labels = config.choose(scores)
    for i in scores.argsort(descending=True).tolist()[:10]:
        print(f"{scores[i]:.3f}  {OBJECT_NAMES[i]}{'  (label)' if labels[i] else ''}")
    return 0


def _labeller(name: str | None, weights: str | None) -> ImageLabeller:
    """Load the picture network named, or that of a file; else the first to be had of the usual two."""
    if name is None and weights is None:
        with contextlib.suppress(LabellerUnavailable):
            return ImageLabeller.load()
        return ImageLabeller.load(NO_DOWNLOAD)
    return ImageLabeller.load(name or DEFAULT_ARCHITECTURE, weights)


def run(command: str, **arguments: Any) -> int:
    """Run a command with its arguments' values; a user's mistake is one line and status 2."""
    commands: dict[str, Callable[..., int]] = {"separate": separate, "inspect": inspect, "label": label}
    try:
        return commands[command](**arguments)
    except ClipError as error:
        remedy = _REMEDIES.get(error.reason, "give another file, or copy it again")
        mistake = f"{arguments['video']}: {error}; {remedy}"
    except soundfile.LibsndfileError as error:  # of writing: what is read goes through ffmpeg
        mistake = f"{arguments['out']} can't be written: {error} Is the disk full?"
    except (LabellerUnavailable, OSError, ValueError) as error:
        mistake = str(error)
    print(f"avsep {command}: {mistake}", file=sys.stderr)
    return 2
