"""Separate whole files: a video or a sound in, one sound per object and a report out."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from avsep import media, stems, storage
from avsep.edits import Edits
from avsep.factors import ExtractionConfig, Factorize
from avsep.files import DECODED, NO_LIMITS, FileLimits, Step, WholeFile, no_step
from avsep.locating import Locations, whole_maps
from avsep.model import LABELLER_FILE, Labelling, ModelConfig, label_config
from avsep.objects import Vocabulary
from avsep.outputs import HEARD, MONO, Output, Shape, clipped, write_sounds
from avsep.separation import REST, EditedPlan, Plan, Planned, Separates, Separator, assignments
from avsep.stages import Label
from avsep.vision import NO_DOWNLOAD, ImageLabeller, LabellerUnavailable

_LOOK_S = 0.25  # between steps while other processes work
_UNLIKE = 0.7  # familiarity below which an object's sound is said to be unlike the training
_LISTENING, _ASSIGNING = 0.4, 0.8  # of the work done: when it has listened, and when bases are assigned to be edited


@dataclass
class FileSeparation:
    """What became of a file; the sounds are in files."""

    report: dict[str, Any]  # for `separation.json`
    plan: Planned
    images: NDArray[np.uint8]  # (n, height, width, 3)
    files: tuple[str, ...]  # names of those with sounds
    notes: tuple[str, ...] = ()  # on the file itself
    locations: Locations | None = None  # None: nobody looked, or the picture network can't say where
    loud: tuple[str, ...] = ()  # names of the sounds above full scale
    opening: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (S,), the window explained


@dataclass
class VideoSeparator:
    """Separate files by any separator and, where its weights can be had, a picture network that says what is there.

    Others can do a part: `label` asks the same picture network elsewhere, `factorize` has a model's windows factorised,
    as `Separator` takes it.
    """

    separator: Separates
    model_dir: str | None = None  # a model's folder
    weights: str | None = None  # of the picture network, in place of the model's own or torchvision's
    limits: FileLimits = field(default_factory=FileLimits)
    device: str = "cpu"  # the picture network's
    label: Label | None = None
    factorize: Factorize | None = None

    @classmethod
    def load(
        cls,
        model_dir: str,
        weights: str | None = None,
        limits: FileLimits = NO_LIMITS,
        device: str = "cpu",
        label: Label | None = None,
        factorize: Factorize | None = None,
    ) -> VideoSeparator:
        """Load the model directory that `pipelines.train` (and `collect`) wrote."""
        return cls(Separator.load(model_dir), model_dir, weights, limits, device, label, factorize)

    def elsewhere(self, label: Label | None, factorize: Factorize | None) -> VideoSeparator:
        """Return the same one, networks and all, with others to label and factorise."""
        other = copy.copy(self)
        other.label, other.factorize = label, factorize
        return other

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; of a separator without a model the defaults, which say how pictures are seen."""
        if isinstance(self.separator, Separator):
            return self.separator.model.config
        return ModelConfig(vocabulary=Vocabulary.of(self.separator.objects))

    @cached_property
    def labeller(self) -> ImageLabeller | str:
        """The picture network, or why there is none; weights that are there and unusable raise LabellerUnavailable.

        That of `weights`, else the model's own, else one that needs no download; none where no object has a look.
        """
        if not any(o.imagenet for o in self.config.vocabulary):
            return "pictures aren't looked at: none of the objects has ImageNet classes"
        config = self.config.labeller
        if self.weights is not None:
            return ImageLabeller.load(config.architecture, self.weights, self.device)
        own = None if self.model_dir is None else storage.join(self.model_dir, LABELLER_FILE)
        if own is not None and storage.exists(own):
            return ImageLabeller.load(config.architecture, own, self.device)
        with contextlib.suppress(LabellerUnavailable):
            labeller = ImageLabeller.load(config.architecture, None, self.device)
            if config.sha256 in (None, labeller.sha256):
                return labeller
        try:
            return ImageLabeller.load(NO_DOWNLOAD, None, self.device)
        except LabellerUnavailable as error:
            return str(error)

    @property
    def labels(self) -> Labelling:
        """How labels follow from what the picture network says: as for the model's clips, unless it is another one."""
        config = self.config
        if isinstance(self.labeller, str) or self.labeller.sha256 == config.labeller.sha256:
            return config.labelling
        way = self.labeller.looking(config.extraction.looks).way
        own = label_config(self.labeller.architecture, way, config.labels.classes)
        return Labelling(own, config.vocabulary)

    @property
    def sees(self) -> str:
        """Which picture network looks for what: who does it elsewhere compares this with its own."""
        network = "" if isinstance(self.labeller, str) else self.labeller.sha256
        return f"{network}/{self.config.vocabulary.digest}/{self.labels.config.classes}"

    def __call__(
        self,
        video: Path,
        out: Path,
        objects: Sequence[str] | None = None,
        bases: str | None = None,
        step: Step = no_step,
        mixture: bool = False,
        parents: bool = True,
        track: int = 1,
        output: Output = MONO,
        edits: Edits | None = None,
    ) -> FileSeparation:
        """Separate a file of any length into sounds that add up to its own.

        Writes `OBJECT.wav`, `_rest.wav` and, if asked, `_mixture.wav` into `out`, under other names until all are
        whole; `output` says in what channels, sample rate and format. Without `parents`, only the last folder of
        `out` is made where there is none. `objects` are those that are there; None lets pictures and sound decide.
        `bases` (own, learned, both) overrides the model's choice. `track` counts the file's audio tracks from 1.
        `edits` are made on what was decided.

        Raises ClipError for a file without usable sound, ValueError for unknown objects, bases that the separator
        hasn't, a format that can't hold the sound or edits that can't be of it, and whatever `step` raises.
        """
        patience = _Patience(step)
        separator = self._for_a_file(bases, patience)
        given = None if objects is None else self._given(objects, output.two_stems)
        timings, clock = {}, _Clock()
        patience.tell("decoding", 0.0)
        shape = self._shape(video, separator.sample_rate, track, output)
        image_size = self.config.extraction.image_size
        source = WholeFile(video, separator.sample_rate, image_size, self.limits, patience.tell, track)
        timings["decode_s"] = clock()
        looked = self._look(source.images, patience)
        timings["look_s"] = clock()
        plan, given = _decide(separator, source, given, looked, output.two_stems, patience.tell)
        if edits is not None:
            plan = _edited(plan, edits.named(self.config.vocabulary.find), output.two_stems, patience.tell)
        timings["listen_s"] = clock()
        tally = _Tally(keep=0 if plan.explanation is None else plan.explanation.n_samples)
        rendered = _rendered(plan, source, tally, patience.tell, _LISTENING if edits is None else _ASSIGNING)
        if mixture and shape.listening is not None:
            rendered = _keeping(rendered, out / f"{HEARD}.wav", separator.sample_rate)
        parts = _in_shape(rendered, separator, source, shape)
        shape = replace(shape, duration_s=source.n_samples / separator.sample_rate)
        files, loud = write_sounds(plan.objects, parts, out, shape, output, mixture, parents)
        files += self._write_videos(video, out, output.videos(plan.objects, shape), shape, patience)
        timings["separate_s"] = clock()
        locations = looked.where(plan.objects, self.config.objects, source.times_s)
        report = self._report(separator, plan, tally, given, looked, locations)
        report |= output.described(plan.objects, shape, files, report["objects"])
        told = (*source.notes, looked.note, clipped(loud, output.suffix), shape.note)
        report["note"] = "; ".join(filter(None, told))
        report["timings"] = {name: round(seconds, 3) for name, seconds in timings.items()}
        sounds, notes = tuple(files), tuple(source.notes)
        return FileSeparation(report, plan, source.images, sounds, notes, locations, tuple(loud), tally.opening())

    def _given(self, objects: Sequence[str], one: str | None) -> Sequence[str]:
        """Give the model's names of objects that people name, and the `one` that is to be written."""
        return list(dict.fromkeys([*(self.config.vocabulary.find(name) for name in objects), *([one] if one else [])]))

    def _write_videos(
        self, video: Path, out: Path, names: Mapping[str, str], shape: Shape, patience: _Patience
    ) -> list[str]:
        """Write a video for each of some sounds, both by their files' names, and return theirs."""
        limits = replace(self.limits.decode, timeout_s=max(self.limits.decode.timeout_s, shape.duration_s))
        for sound, name in names.items():
            patience.tell("writing videos", 1.0)
            media.mux(video, out / sound, shape.n_channels, out / name, limits=limits)
        return list(names.values())

    def _shape(self, video: Path, model_rate: int, track: int, output: Output) -> Shape:
        """Say in what channels and sample rate a file's sounds are written; ValueError where that can't be."""
        shape = Shape(model_rate)
        if not output.mono:
            rate, listening = media.as_it_is(video, limits=self.limits.decode, track=track)
            if (rate, listening.layout) != (model_rate, "mono"):
                shape = Shape(rate, listening.n_channels, listening)
        output.check(shape)
        return replace(shape, container=media.video_container(video, limits=self.limits.decode) if output.video else "")

    def _for_a_file(self, bases: str | None, patience: _Patience) -> Separates:
        """Return the separator, or one for a single file where bases are asked for or others factorise."""
        if not isinstance(self.separator, Separator):
            if bases is not None:
                raise ValueError(f"bases are {bases!r}, and this separator has no bases; leave them out")
            return self.separator
        config = self.separator.config if bases is None else replace(self.separator.config, bases=bases)
        if self.factorize is None:
            return self.separator if config == self.separator.config else Separator(self.separator.model, config)
        return Separator(self.separator.model, config, patience.with_others(self.factorize))

    def _look(self, images: NDArray[np.uint8], patience: _Patience) -> _Looked:
        """Ask the picture network what pictures show; or say why it can't be asked."""
        if len(images) == 0:
            return _Looked("there are no pictures to look at")
        if "labeller" not in vars(self):
            patience.tell("loading the picture network", DECODED)
        if isinstance(self.labeller, str):
            return _Looked(self.labeller)
        patience.tell("looking", DECODED)
        if self.label is None:
            views = self.labeller.looking(self.config.extraction.looks)(images)
            seen = self.labeller.see(views.crops, self.labels.groups)
        else:
            views = self.label.looking(images)
            seen = patience.wait(self.label.classify(views.crops))
        scores = self.labels.scores(views.evidence(seen.logits))
        marks = self.labels.choose(scores)
        names = self.config.objects
        found = [names[i] for i in marks.nonzero().flatten().tolist()]
        maps = None if seen.cells is None else whole_maps(images, views, seen.cells)
        named = dict(zip(names, scores.tolist(), strict=True))
        note = self.labeller.no_maps if maps is None and self.labeller.ending is None else ""  # else nobody asked
        same = self.labels == self.config.labelling and self._is_the_models(self.labeller)
        return _Looked(note, self.labeller.architecture, named, found, maps, same)

    def _is_the_models(self, labeller: ImageLabeller) -> bool:
        """Tell whether it is the picture network that the model's evidence was calibrated with."""
        known = self.config.labeller
        same = self.weights is None if known.sha256 is None else labeller.sha256 == known.sha256
        return same and labeller.architecture == known.architecture

    def _report(
        self,
        separator: Separates,
        plan: Planned,
        tally: _Tally,
        given: Sequence[str] | None,
        looked: _Looked,
        locations: Locations | None,
    ) -> dict[str, Any]:
        """Say what became of a file; what a plan or separator doesn't have is null, or left out."""
        rate, seen = separator.sample_rate, looked.seen
        origin = "given" if given is not None else "sound" if seen is None else "pictures"
        familiarity: Mapping[str, float] = getattr(plan, "familiarity", {})
        doubts: Mapping[str, str] = getattr(plan, "doubts", {})
        shares: Mapping[str, float] = getattr(plan, "sound_scores", None) or tally.shares(plan.objects)
        learned = self.config.training.get("clips_by_label", given or ())
        unknown = unlearned([name for name in given or () if name not in learned])
        strange = unlike([name for name in plan.objects if familiarity.get(name, 1.0) < _UNLIKE])
        return {
            "sample_rate": rate,
            "duration_s": tally.n_samples / rate,
            "objects_from": origin,
            "note": "",
            "labeller": looked.labeller,
            "unlearned": "; ".join(filter(None, (unknown, strange))),
            "objects": [
                {
                    "name": name,
                    "file": f"{name}.wav",
                    "from": _found(name, origin, seen, plan),
                    "confidence": plan.confidence[name],
                    "familiarity": familiarity.get(name),
                    "sound_score": shares.get(name),
                    "picture_score": looked.scores.get(name),
                    "visible": None if seen is None else name in seen,
                    "silent": name in plan.silent,
                    "boxes": None if locations is None else locations.boxes(name),
                    "doubt": doubts.get(name, ""),
                }
                for name in plan.objects
            ],
            "rest": f"{REST}.wav",
            "heard": _loudest_first(shares, 0.01),
            "windows": _windows(separator, plan),
            **({"bases": separator.config.bases} if isinstance(separator, Separator) else {}),
            **({"edits": plan.edits.as_dict()} if isinstance(plan, EditedPlan) else {}),
        }


@dataclass
class _Looked:
    """What the picture network made of a file's pictures; the note says why there are no scores, or no maps."""

    note: str
    labeller: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seen: Sequence[str] | None = None
    maps: torch.Tensor | None = None  # (n, L, h, w)
    comparable: bool = False  # the scores are such as the model's evidence was calibrated with

    def where(self, objects: Sequence[str], names: Sequence[str], times_s: Sequence[float]) -> Locations | None:
        """Say where some objects are; None where that isn't known. `names` are those of the maps."""
        return None if self.maps is None else Locations.of(objects, names, times_s, self.maps)


@dataclass
class _Tally:
    """What has been rendered, and the sum of its first `keep` samples, which is the sound itself."""

    n_samples: int = 0
    energy: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))  # of each object, and of the rest
    keep: int = 0
    _kept: list[NDArray[np.float32]] = field(default_factory=list)

    def opening(self) -> NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *self._kept])

    def add(self, estimates: NDArray[np.float32]) -> None:
        if self.n_samples < self.keep:
            self._kept.append(estimates[:, : self.keep - self.n_samples].sum(0))
        self.n_samples += estimates.shape[1]
        self.energy = self.energy + np.square(estimates, dtype=np.float64).sum(1)

    def shares(self, objects: Sequence[str]) -> dict[str, float]:
        """Return each object's share of what was rendered, by energy."""
        whole = max(float(self.energy.sum()), 1e-30)
        return {name: float(e) / whole for name, e in zip(objects, self.energy[:-1], strict=True)}


class _Patience:
    """Tells a step how far one file is, and again while other processes work: what it raises ends the wait, too."""

    def __init__(self, step: Step) -> None:
        self._step, self._told = step, ("decoding", 0.0)

    def tell(self, stage: str, done: float) -> None:
        self._told = (stage, done)
        self._step(stage, done)

    def wait(self, future: Future) -> Any:
        try:
            while not wait([future], _LOOK_S).done:
                self._step(*self._told)
            return future.result()
        finally:
            future.cancel()

    def with_others(self, factorize: Factorize) -> Factorize:
        """Have others factorise, and wait for them."""

        def factorize_patiently(
            waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], how: ExtractionConfig
        ) -> Future:
            future = factorize(waveforms, seeds, how)
            self.wait(future)
            return future

        return factorize_patiently


def _told(
    blocks: Iterator[NDArray[np.float32]], length: int, tell: Callable[[int], None]
) -> Iterator[NDArray[np.float32]]:
    """Pass blocks on in pieces of at most `length`, and tell how many samples have been taken."""
    done = 0
    for block in blocks:
        for start in range(0, len(block), length):
            tell(done)
            piece = block[start : start + length]
            yield piece
            done += len(piece)


def _listen(
    separator: Separates, source: WholeFile, given: Sequence[str] | None, looked: _Looked, step: Step
) -> Planned:
    """Have a separator listen to a file; of what is seen it is told what it knows."""
    seen = None
    if given is None and looked.seen is not None:
        seen = [name for name in looked.seen if name in separator.objects]
    total = source.n_samples
    pieces = _told(
        source.blocks(),
        2 * separator.sample_rate,
        lambda done: step("listening", DECODED + (_LISTENING - DECODED) * min(1.0, done / total)),
    )
    if isinstance(separator, Separator):
        return separator.plan(pieces, given, seen, looked.scores if looked.comparable else None)
    return separator.plan(pieces, given, seen)


def _edited(plan: Planned, edits: Edits, one: str | None, step: Step) -> Planned:
    """Make edits on a plan; ValueError where that can't be, or where the one object that is written goes."""
    if not isinstance(plan, Plan):
        raise ValueError("this separation can't be edited: its separator has no bases to move")
    assigned = plan.assigned
    assigned.check(edits)
    if one and one not in edits.objects(assigned.objects):
        raise ValueError(f"the edits take {one} away, which --two-stems asks for; leave one of the two out")
    for number, _ in enumerate(assigned.windows):  # made when first asked for
        step("separating", _LISTENING + (_ASSIGNING - _LISTENING) * number / len(assigned.windows))
    return assigned.edited(edits)


def _found(name: str, origin: str, seen: Sequence[str] | None, plan: Planned) -> str:
    """Say why an object is there: given, pictures or sound."""
    if isinstance(plan, EditedPlan) and name not in plan.assigned.objects:
        return "given"
    return origin if origin != "pictures" or name in (seen or ()) else "sound"


def _windows(separator: Separates, plan: Planned) -> list[dict[str, Any]]:
    """Say what is heard in each window and, where its bases can be moved, whose each is."""
    rate = separator.sample_rate
    found = [
        {
            "start_s": start / rate,
            "end_s": end / rate,
            "heard": _loudest_first(dict(zip(separator.objects, scores.tolist(), strict=True)), 0.05),
        }
        for start, end, scores in getattr(plan, "window_scores", ())
    ]
    edited = plan.assigned.edited(Edits()) if isinstance(plan, Plan) and plan.is_editable else plan
    if isinstance(edited, EditedPlan):
        n_bases = edited.assigned.how.n_bases
        for window, shares, energy in zip(found, edited.shares, edited.basis_energies, strict=True):
            window["bases"] = assignments(shares, energy, edited.objects, n_bases)
    return found


def _decide(
    separator: Separates,
    source: WholeFile,
    given: Sequence[str] | None,
    looked: _Looked,
    one: str | None,
    step: Step,
) -> tuple[Planned, Sequence[str] | None]:
    """Have a separator listen, and again where it didn't find the `one` object that is to be written.

    Returns the plan, and what it was given in the end.
    """
    plan = _listen(separator, source, given, looked, step)
    if one and (one not in plan.objects or one in plan.silent):
        given = list(dict.fromkeys([*plan.objects, one]))  # who asks for it says that it is there
        plan = _listen(separator, source, given, looked, step)
    return plan, given


def _rendered(
    plan: Planned, source: WholeFile, tally: _Tally, step: Step, done: float
) -> Iterator[NDArray[np.float32]]:
    for estimates in plan.render(source.blocks()):
        yield estimates
        tally.add(estimates)
        step("separating", done + (1 - done) * min(1.0, tally.n_samples / source.n_samples))


def _keeping(rendered: Iterator[NDArray[np.float32]], file: Path, rate: int) -> Iterator[NDArray[np.float32]]:
    """Write what estimates `(J + 1, …)` add up to into a WAV file as they pass."""
    with soundfile.SoundFile(file, "w", rate, 1, subtype="FLOAT", format="RF64") as heard:
        for estimates in rendered:
            heard.write(estimates.sum(0))
            yield estimates


def _in_shape(
    rendered: Iterator[NDArray[np.float32]], separator: Separates, source: WholeFile, shape: Shape
) -> Iterator[NDArray[np.float32]]:
    """Give estimates of the mono mix, `(J + 1, …)`, the channels and rate of what is written, `(J + 1, C, …)`."""
    if shape.listening is None:
        return (estimates[:, None] for estimates in rendered)
    channels = source.channels(shape.sample_rate, shape.listening)
    resolution = stems.gains_stft(separator, separator.sample_rate)
    return stems.carry_over(rendered, channels, shape.sample_rate, resolution)


def _loudest_first(shares: Mapping[str, float], least: float) -> dict[str, float]:
    """Name the objects of at least a share of the sound, the loudest first."""
    return {n: s for n, s in sorted(shares.items(), key=lambda x: -x[1]) if s >= least}


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> float:
        """Give the seconds since the last call."""
        last, self._last = self._last, time.monotonic()
        return self._last - last


def unlearned(objects: Sequence[str]) -> str:
    """Say what a model's answer is worth about objects that no clip of its training had; "" for none."""
    return f"the model was trained on no clip of {', '.join(objects)}: it can't tell their sound" if objects else ""


def unlike(objects: Sequence[str]) -> str:
    """Say that a sound is unlike a model's training, as far as it was taken for some objects; "" for none."""
    if not objects:
        return ""
    return f"the sound is unlike what the model was trained on: {', '.join(objects)} may be something else"
