"""What `avsep separate`, `inspect` and `label` do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from avsep import shards, starter, storage
from avsep.console import complain, lost, say
from avsep.edits import Edits
from avsep.factors import ExtractionConfig
from avsep.files import VIDEOS, Step, images, no_step
from avsep.inputs import check_pictures, check_sound, describe_left_out, distinct, find_files, remedy, usable
from avsep.locating import Locations
from avsep.model import CONFIG_FILE, Labelling, Model, ModelConfig, describe_training, label_config, training_facts
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.outputs import AS_IT_IS, FORMATS, Output
from avsep.records import ClipError, Reason
from avsep.separation import Explanation, Separator
from avsep.videos import FileSeparation, VideoSeparator
from avsep.vision import DEFAULT_ARCHITECTURE, NO_DOWNLOAD, ImageLabeller, LabellerUnavailable

_REPORT, _MAP = "separation.json", "relation_map.png"
_FILE = re.compile(rf"[a-z0-9_]+\.({'|'.join(FORMATS)}|mp4|mkv)")  # an object's, or the rest's
_OUT = "separated"  # unless --out names another folder
_MANY = 20  # files, whose headers take a while
SAY_EVERY_S, SAY_NEXT_S = 5.0, 1.0  # how far a stage is, and that the next has begun, at the soonest


def separate(
    files: Sequence[str],
    model: str | None,
    out: str | None,
    objects: str | None,
    weights: str | None,
    track: int = 1,
    two_stems: str | None = None,
    format: str = "wav",
    mono: bool = False,
    with_video: bool = False,
    edit: str | None = None,
) -> int:
    """Run `avsep separate`; of several files those that can't be separated are told, and give status 1.

    What is wrong with the arguments, and with the files by their headers, is told before the networks are loaded.
    """
    model = starter.PATH if model is None else model
    vocabulary = ModelConfig.read(model).vocabulary
    names = None if objects is None else object_names(objects, vocabulary)
    one = None if two_stems is None else vocabulary.find(two_stems)
    output = Output(mono, format, one, with_video)
    edits = None if edit is None else Edits.from_json(storage.read_bytes(edit)).named(vocabulary.find)
    found, left_out = find_files(files)
    if left_out:
        say(describe_left_out(left_out))
    if edits is not None and len(found) > 1:
        raise ValueError(f"--edit {edit} is of one separation, and there are {len(found)} files; give one file")
    folders = _folders(out, found, alone=list(files) == found)
    check_outputs(folders, model, output)

    def refuse(file: str, error: Exception) -> None:
        complain(f"avsep separate: {_mistake(error, file, folders[file])}")

    good = _usable(found, functools.partial(check_sound, track=track, output=output), refuse)
    done = 0
    separate_video = _load(model, weights) if good else None
    if separate_video is not None:
        say(describe_training(separate_video.config))
    for file in good:
        try:
            report = separate_file(file, model, folders[file], names, weights, separate_video, track, output, edits)
        except (ClipError, LabellerUnavailable, OSError, ValueError, soundfile.LibsndfileError) as error:
            refuse(file, error)
        else:
            _tell(folders[file], report)
            done += 1
    return _status(done, len(found), "separated")


def _usable(files: list[str], check: Callable[[Path], None], refuse: Callable[[str, Exception], None]) -> list[str]:
    if len(files) > _MANY:
        say(f"reading the headers of {len(files)} files")
    return usable(files, check, refuse)


def _status(done: int, count: int, what: str) -> int:
    """Say how many of several files were done, and return the status: 1 for some of them, 2 for none."""
    if count > 1:
        say(f"{done} of {count} files {what}")
    return 0 if done == count else 1 if done else 2


def object_names(text: str, vocabulary: Vocabulary) -> list[str]:
    """Read what `--objects` names; ValueError for unknown ones, or none at all."""
    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    if not names:
        raise ValueError(f"--objects {text!r} names no object; the objects are {', '.join(vocabulary.names)}")
    return list(dict.fromkeys(vocabulary.find(name) for name in names))


def _load(model: str, weights: str | None) -> VideoSeparator:
    loaded = VideoSeparator.load(model, weights)
    if weights is not None:
        _ = loaded.labeller  # a mistake is told where there is no picture, too
    return loaded


def _folders(out: str | None, files: Sequence[str], *, alone: bool) -> dict[str, str]:
    """Give each file its folder: `out` itself for one that was named `alone`, else one of the file's name in it."""
    if out is not None and alone and len(files) == 1:
        return {files[0]: out}
    return {file: storage.join(out or _OUT, name) for file, name in zip(files, distinct(files), strict=True)}


def check_outputs(folders: Mapping[str, str], model: str | None, output: Output = AS_IT_IS) -> None:
    """Raise ValueError where a file to be separated, or the model's folder, is where a separation writes or deletes.

    By whatever name: through links, and in the folder of another file.
    """
    for folder in dict.fromkeys(folders.values()):
        if storage.exists(folder) and not storage.is_directory(folder):
            raise ValueError(f"--out {folder} is a file; give a folder")
        if model is not None and storage.same(folder, model):
            raise ValueError(f"--out {folder} is the model's folder; give another one")
        ours = _owned(folder)
        for path in storage.list_files(folder):
            name = storage.name(path).lower()
            written = _FILE.fullmatch(name) and name.endswith(output.suffixes)
            if not written and name not in (_REPORT, _MAP) and storage.name(path) not in ours:
                continue
            for file in folders:
                if storage.same(file, path):
                    raise ValueError(f"--out {folder} would overwrite or delete {file}; give another --out")


def separate_file(
    video: str,
    model_dir: str | None,
    out: str,
    objects: Sequence[str] | None,
    weights: str | None,
    separate_video: VideoSeparator | None = None,
    track: int = 1,
    output: Output = AS_IT_IS,
    edits: Edits | None = None,
) -> dict[str, Any]:
    """Separate a whole file, whatever its length, into sounds that add up to its own.

    `separate_video` may hold any separator; without it the model of `model_dir` is loaded. The relation map is drawn
    where the separator explains itself. `video` and `out` may be URIs. What an earlier separation wrote to `out` stays
    as it is until all of the new one is there. Returns what goes to `separation.json`. Raises ClipError for a file
    without usable sound, ValueError for unknown objects, a folder that holds others' files, or one where `video` would
    be overwritten.
    """
    check_outputs({video: out}, model_dir, output)
    _earlier_files(out, output)  # a mistake is told before the model is loaded
    if separate_video is None:
        if model_dir is None:
            raise ValueError("there is neither a model's folder nor a separator; give one")
        separate_video = _load(model_dir, weights)
    with storage.local_file(video) as path, progress() as step:
        said = {"source": video}
        return separate_local(path, said, model_dir, out, objects, separate_video, track, output, step, edits=edits)


def separate_local(
    path: Path,
    said: Mapping[str, Any],
    model_dir: str | None,
    out: str,
    objects: Sequence[str] | None,
    separate_video: VideoSeparator,
    track: int = 1,
    output: Output = AS_IT_IS,
    step: Step = no_step,
    draw: bool = True,
    edits: Edits | None = None,
) -> dict[str, Any]:
    """Do what `separate_file` does to a file on this machine; its report begins with what is `said` of the source.

    Without `draw` there is no relation map, which takes longer to draw than a short sound to separate.
    """
    earlier = _earlier_files(out, output)
    with _staging(out) as folder:
        done = separate_video(path, folder, objects, step=step, track=track, output=output, edits=edits)
        report = dict(said)
        if isinstance(separate_video.separator, Separator):
            report["model"] = {"path": model_dir, **training_facts(separate_video.config)}
        report |= done.report
        report["note"] = "; ".join(filter(None, (report.pop("unlearned"), report["note"])))
        written = list(done.files)
        if draw and done.plan.explanation is not None:
            report["relation_map"] = _MAP
            written.append(_MAP)
            (folder / _MAP).write_bytes(_relation_map(done, done.plan.explanation))
        (folder / _REPORT).write_text(json.dumps(report, indent=1) + "\n")
        _publish(folder, out, written, earlier)
    return report


def _relation_map(done: FileSeparation, window: Explanation) -> bytes:
    """Draw the first window's relation map beside the picture that shows most of the objects, and where they are."""
    from avsep import plots  # half a second, needed only at the end

    number = len(done.images) // 2 if done.locations is None else done.locations.best()
    image = done.images[number] if len(done.images) else None
    marks = {} if done.locations is None else done.locations.marks(number)
    relation, energy = window.relation.numpy(), window.factors.basis_energy.numpy()
    return plots.relation_map(relation, window.objects, energy, image, done.plan.objects, marks=marks)


@contextlib.contextmanager
def _staging(out: str) -> Iterator[Path]:
    """Give a local folder for files that are to appear in `out` together; it goes, and what was made for nothing."""
    if storage.is_uri(out):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    target = Path(out).absolute()
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    storage.make_directory(out)
    storage.sweep(out)  # what a killed separation left
    staging = target / f".separation.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for empty in made:
            with contextlib.suppress(OSError):  # there is something in it
                empty.rmdir()


def _publish(folder: Path, out: str, written: Sequence[str], earlier: Sequence[str]) -> None:
    """Move a finished separation to its place; whenever it is killed, the next one knows the files as its own."""
    files = {name for name in (*written, *(storage.name(f) for f in earlier)) if name != _MAP}
    begun = {"unfinished": True, "files": sorted(files)}
    storage.write_text(storage.join(out, _REPORT), json.dumps(begun) + "\n")
    for name in written:
        _place(folder / name, storage.join(out, name))
    for file in earlier:
        if storage.name(file) not in written:
            storage.delete_file(file)
    _place(folder / _REPORT, storage.join(out, _REPORT))


def _place(file: Path, target: str) -> None:
    if not storage.is_uri(target):
        file.replace(target)
        return
    import pyarrow as pa

    with pa.memory_map(str(file)) as f:
        storage.write_bytes(target, f.read_buffer())


@contextlib.contextmanager
def progress() -> Iterator[Step]:
    """Show how far a separation is: a bar on a terminal, elsewhere a line now and then, on stderr."""
    said, last = time.monotonic(), ""
    with tqdm(total=100, unit="%", disable=None, leave=False) as bar:

        def step(stage: str, done: float) -> None:
            nonlocal said, last
            bar.set_description(stage)
            bar.update(int(100 * done) - bar.n)
            if bar.disable and time.monotonic() - said > (SAY_EVERY_S if stage == last else SAY_NEXT_S):
                said, last = time.monotonic(), stage
                complain(f"{stage}: {done:.0%}" if done else stage)

        yield step


def _earlier_files(out: str, output: Output) -> list[str]:
    """List an earlier separation's sounds and map in a folder; ValueError for sounds there that are somebody else's."""
    there = storage.list_files(out)
    ours = _owned(out)  # after that: a twin's report is there before its files
    found = []
    for path in there:
        name = storage.name(path)
        if name not in ours:
            if not name.lower().endswith(output.suffixes) and name not in (_REPORT, _MAP):
                continue
            raise ValueError(f"{out} holds {name}, which no separation wrote; give another --out")
        if name != _REPORT:
            found.append(path)
    return found


def _owned(out: str) -> set[str]:
    """Return the names of an earlier separation's files in a folder, as its report tells them."""
    try:
        report = json.loads(storage.read_bytes(storage.join(out, _REPORT)))
        files = report.get("files")
        if files is None:  # of an earlier version
            files = [*(f"{o['name']}.wav" for o in report["objects"]), report["rest"]]
        known = all(map(_FILE.fullmatch, files))
    except (AttributeError, FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return set()
    return {*files, _REPORT, _MAP} if known else set()


def _tell(out: str, report: Mapping[str, Any]) -> None:
    """Say what became of a file."""
    if report["labeller"]:
        say(f"pictures: {report['labeller']}")
    if report["note"]:
        say(f"note: {report['note']}")
    claims = "" if "edits" in report else "claims "  # its file may hold more: doubted sound is given out, too
    for entry in report["objects"]:
        state = "silent" if entry["silent"] else f"{claims}{entry['sound_score']:.0%} of the sound"
        sure = 1 - entry["confidence"] if entry["silent"] else entry["confidence"]
        how = "" if entry["from"] == "given" else f", {sure:.0%} sure"
        how += f"; {entry['doubt']}" if entry["doubt"] else ""
        origin = "named" if entry["from"] == "given" else f"from {entry['from']}"
        where = storage.join(out, entry["file"]) if entry["file"] else f"{entry['name']}, in {report['rest']}"
        say(f"{where}: {state}, {origin}{how}")
    sounds = {report["rest"], *(entry["file"] for entry in report["objects"])}
    videos = [name for name in report["files"] if name not in sounds]
    say(f"{storage.join(out, report['rest'])}: everything else")
    for name in (*videos, _REPORT):
        say(storage.join(out, name))


def inspect(path: str) -> int:
    """Run `avsep inspect`."""
    if not storage.exists(path):
        raise FileNotFoundError(f"{path} doesn't exist; give a .parquet file, an extraction's folder or a model")
    if path.endswith(".parquet"):
        with storage.open_input(path) as f:
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                file = pq.ParquetFile(f)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from None
            metadata = file.schema_arrow.metadata or {}
            say(f"{file.metadata.num_rows} rows in {file.metadata.num_row_groups} row groups")
            for field in file.schema_arrow:
                say(f"  {field.name}: {field.type}")
            for key in (b"avsep.schema_version", b"avsep.digest", b"avsep.configuration"):
                if key in metadata:
                    say(f"{key.decode()}: {metadata[key].decode()}")
    elif storage.exists(storage.join(path, CONFIG_FILE)):
        model = Model.load(path)
        say(json.dumps(model.config.as_dict(), indent=1))
        say(describe_training(model.config))
        say(f"network: {sum(p.numel() for p in model.network.parameters()):,} parameters")
        counts = model.dictionary.counts() if model.dictionary else None
        say(f"dictionary: {dict(counts) if counts else 'none; pipelines.collect makes one'}")
    else:
        clips, rejections = shards.read_ids(path)
        commits = shards.read_commits(path)
        if not commits:
            raise ValueError(f"{path} is neither a model nor an extraction: it holds no {CONFIG_FILE} and no commits")
        say(f"{len(clips)} clips and {len(rejections)} rejections in {len(commits)} commits")
        for reason, count in Counter(r.reason for r in shards.read_rejections(path)).most_common():
            say(f"  rejected, {reason}: {count}")
    return 0


def label(files: Sequence[str], weights: str | None, labeller: str | None, model: str | None = None) -> int:
    """Run `avsep label`; of several files those that can't be looked at are told, and give status 1."""
    found, left_out = find_files(files, VIDEOS)
    if left_out:
        say(describe_left_out(left_out, VIDEOS))

    def refuse(file: str, error: Exception) -> None:
        blind = isinstance(error, ClipError) and error.reason == Reason.NO_VIDEO
        complain(f"avsep label: {f'{file} has no pictures; give a video' if blind else _mistake(error, file)}")

    good = _usable(found, check_pictures, refuse)
    done = 0
    if good:
        network, way, labelling = _labelling(labeller, weights, model)
        say(f"pictures: {network.architecture}, looks: {way}")
    for file in good:
        try:
            lines = _label(file, network, way, labelling)
        except (ClipError, OSError, ValueError) as error:
            refuse(file, error)
        else:
            for line in [f"{file}:", *lines] if len(found) > 1 else lines:
                say(line)
            done += 1
    return _status(done, len(found), "labelled")


def _label(file: str, network: ImageLabeller, way: str, labelling: Labelling) -> list[str]:
    """Say what a file's pictures show, and where, a line for each of the likeliest ten."""
    with storage.local_file(file) as path:
        check_pictures(path)
        found, times_s = images(path, ExtractionConfig.image_size)
    if len(found) == 0:
        raise ValueError(f"{file} has no pictures that decode; give another file, or copy it again")
    names = labelling.vocabulary.names
    evidence, maps = network.labels_and_maps(found, way, labelling.groups)
    lines = [] if maps is not None else [f"note: {network.no_maps}"]
    locations = None if maps is None else Locations.of(names, names, times_s, maps)
    scores = labelling.scores(evidence)
    labels = labelling.choose(scores)
    for i in scores.argsort(descending=True).tolist()[:10]:
        where = locations.surest(names[i]) if locations and labels[i] else None
        place = f"  {where['box']} at {where['time_s']:g} s" if where else ""
        lines.append(f"{scores[i]:.3f}  {names[i]}{'  (label)' if labels[i] else ''}{place}")
    return lines


def _labelling(name: str | None, weights: str | None, model: str | None) -> tuple[ImageLabeller, str, Labelling]:
    """Return a picture network, how it looks at pictures, and how labels follow: a model's own, unless others are said.

    Without a model the vocabulary is the default one.
    """
    if model is None:
        network = _labeller(name, weights)
        way = network.looking(ExtractionConfig.looks).way
        return network, way, Labelling(label_config(network.architecture, way), AUDIOSET_23)
    files = VideoSeparator.load(model, weights)
    if name is not None:
        files.labeller = ImageLabeller.load(name, weights)
    if isinstance(files.labeller, str):
        raise ValueError(f"--model {model}: {files.labeller}")
    return files.labeller, files.labeller.looking(files.config.extraction.looks).way, files.labels


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
        status = commands[command](**arguments)
    except (ClipError, LabellerUnavailable, OSError, ValueError) as error:
        if os.environ.get("AVSEP_TRACEBACK"):
            raise
        complain(f"avsep {command}: {_mistake(error, arguments.get('path', ''))}")
        return 2
    return 2 if lost() and command != "separate" else status  # all that the others do is say


def _mistake(error: Exception, file: str, out: str = "") -> str:
    """Put an error into one line: the value, the rule and the remedy."""
    if isinstance(error, ClipError):
        return f"{file}: {error}; {remedy(error)}"
    if isinstance(error, soundfile.LibsndfileError):  # of writing: what is read goes through ffmpeg
        return f"{out} can't be written: {error} Is the disk full?"
    return str(error)
