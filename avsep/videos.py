"""Separate whole files: a video or a sound in, one WAV an object and a report out."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep import media, storage
from avsep.factors import ExtractionConfig, Factors
from avsep.model import LABELLER_FILE, Labelling, label_config
from avsep.records import ClipError, Reason
from avsep.separation import REST, Plan, Separator
from avsep.vision import NO_DOWNLOAD, ImageLabeller, LabellerUnavailable

MIXTURE = "_mixture"
SUFFIXES = (  # of the files of a folder that are taken for videos and sounds, in small letters
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm"),
    *(".wmv", ".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".mka", ".mp2", ".mp3", ".oga"),
    *(".ogg", ".opus", ".rf64", ".w64", ".wav", ".weba", ".wma", ".wv"),
)
_HELD_S = 60.0  # a file up to this long is decoded once and held; a longer one is read twice, in blocks
_MAX_PICTURES = 60  # of a file that are labelled; a longer one is sampled evenly
_BLOCK = 1 << 20  # samples read at a time
_LOOK_S = 0.25  # between steps while other processes work
_UNLIKE = 0.7  # familiarity below which an object's sound is said to be unlike the training
_LISTENING, _SEPARATING = 0.7, 0.3  # shares of the time
_LIMITS = media.DecodeLimits()

Step = Callable[[str, float], None]  # is told the stage and how much is done in [0, 1]; raises to stop the work


def _no_step(stage: str, done: float) -> None:
    pass


@dataclass(frozen=True)
class FileLimits:
    """What one file may be, and what reading it may use."""

    max_duration_s: float = float("inf")
    decode: media.DecodeLimits = field(default_factory=media.DecodeLimits)


@dataclass
class FileSeparation:
    """What became of a file; the sounds are in WAVs."""

    report: dict[str, Any]  # for `separation.json`
    plan: Plan
    pictures: NDArray[np.uint8]  # (n, height, width, 3)
    notes: tuple[str, ...] = ()  # on the file itself


@dataclass
class VideoSeparator:
    """Separate files with a trained model and, where its weights can be had, the picture network."""

    separator: Separator
    model_dir: str
    weights: str | None = None  # of the picture network, in place of the model's own or torchvision's
    limits: FileLimits = field(default_factory=FileLimits)
    device: str = "cpu"  # the picture network's

    @classmethod
    def load(
        cls, model_dir: str, weights: str | None = None, limits: FileLimits = FileLimits(), device: str = "cpu"
    ) -> VideoSeparator:
        """Load the model directory that `pipelines.train` (and `collect`) wrote."""
        return cls(Separator.load(model_dir), model_dir, weights, limits, device)

    @cached_property
    def labeller(self) -> ImageLabeller | str:
        """The picture network, or why there is none; weights that are there and unusable raise LabellerUnavailable.

        That of `weights`, else the model's own, else one that needs no download.
        """
        config = self.separator.model.config.labeller
        if self.weights is not None:
            return ImageLabeller.load(config.architecture, self.weights, self.device)
        own = storage.join(self.model_dir, LABELLER_FILE)
        if storage.exists(own):
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
        config = self.separator.model.config
        if isinstance(self.labeller, str) or self.labeller.sha256 == config.labeller.sha256:
            return config.labelling
        way = self.labeller.looking(config.extraction.looks).way
        own = label_config(self.labeller.architecture, way, config.labels.classes)
        return Labelling(own, config.vocabulary)

    def __call__(
        self,
        video: Path,
        out: Path,
        objects: Sequence[str] | None = None,
        bases: str | None = None,
        step: Step = _no_step,
        mixture: bool = False,
        elsewhere: Callable[..., Future] | None = None,
        parents: bool = True,
        track: int = 1,
    ) -> FileSeparation:
        """Separate a file of any length into float32 WAVs that add up to its sound.

        Writes `OBJECT.wav`, `_rest.wav` and, if asked, `_mixture.wav` into `out`, under other names
        until all are whole; without `parents`, only the last folder of `out` is made where there is
        none. `objects` are those that are there; None lets pictures and sound decide. `bases` (own,
        learned, both) overrides the model's choice. `elsewhere` starts a stage in another process:
        `("label", pictures, sha256)`, which may give None for a network that it hasn't, and
        `("factorize", waveform, seeds, config)`. `track` counts the file's audio tracks from 1.

        Raises ClipError for a file without usable sound, ValueError for unknown objects or bases
        that the model hasn't, and whatever `step` raises.
        """
        separator = self.separator
        if bases is not None and bases != separator.config.bases:
            separator = Separator(separator.model, replace(separator.config, bases=bases))
        objects = None if objects is None else [separator.model.config.vocabulary.find(name) for name in objects]
        others = None if elsewhere is None else _Elsewhere(elsewhere, step)
        if others is not None:
            step = others.tell
            separator = Separator(separator.model, separator.config)  # for this file alone
            separator.factorize_all = functools.partial(others.factorize, config=separator.extraction)
        timings, clock = {}, _Clock()
        step("decoding", 0.0)
        rate = separator.stft.sample_rate
        source = _Source(video, rate, separator.extraction.image_size, self.limits, step, track)
        timings["decode_s"] = clock()
        scores, note = self._picture_scores(source.pictures, step, others)
        note = "; ".join(filter(None, (*source.notes, note)))
        learned = separator.model.config.training.get("clips_by_label", separator.model.config.objects)
        unknown = unlearned([name for name in objects or () if name not in learned])
        seen = None
        if scores is not None:
            marks = self.labels.choose(scores)
            seen = [separator.model.config.objects[i] for i in marks.nonzero().flatten().tolist()]
        timings["look_s"] = clock()
        total = source.n_samples
        plan = separator.plan(
            _told(source.blocks(), 2 * rate, lambda done: step("listening", _LISTENING * min(1.0, done / total))),
            objects,
            seen if objects is None else None,
        )
        timings["listen_s"] = clock()
        strange = unlike([name for name in plan.objects if plan.familiarity[name] < _UNLIKE])

        def rendered(blocks: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
            done = 0
            for estimates in plan.render(blocks):
                yield estimates
                done += estimates.shape[1]
                step("separating", _LISTENING + _SEPARATING * min(1.0, done / plan.n_samples))

        write_wavs(plan, rendered(source.blocks()), out, rate, mixture, parents)
        timings["separate_s"] = clock()
        origin = "given" if objects is not None else "sound" if seen is None else "pictures"
        report: dict[str, Any] = {
            "sample_rate": rate,
            "duration_s": plan.n_samples / rate,
            "objects_from": origin,
            "note": note,
            "labeller": None if scores is None or isinstance(self.labeller, str) else self.labeller.architecture,
            "unlearned": "; ".join(filter(None, (unknown, strange))),
            "objects": [
                {
                    "name": name,
                    "file": f"{name}.wav",
                    "from": origin if origin != "pictures" or name in (seen or ()) else "sound",
                    "confidence": plan.confidence[name],
                    "familiarity": plan.familiarity[name],
                    "sound_score": plan.sound_scores[name],
                    "picture_score": None
                    if scores is None
                    else float(scores[separator.model.config.vocabulary.index(name)]),
                    "visible": None if seen is None else name in seen,
                    "silent": name in plan.silent,
                    "doubt": plan.doubts.get(name, ""),
                }
                for name in plan.objects
            ],
            "rest": f"{REST}.wav",
            "heard": _heard(plan, torch.tensor(list(plan.sound_scores.values())), 0.01),
            "windows": [
                {"start_s": start / rate, "end_s": end / rate, "heard": _heard(plan, scores, 0.05)}
                for start, end, scores in plan.window_scores
            ],
            "bases": separator.config.bases,
            "timings": {name: round(seconds, 3) for name, seconds in timings.items()},
        }
        return FileSeparation(report, plan, source.pictures, tuple(source.notes))

    def _picture_scores(
        self, pictures: NDArray[np.uint8], step: Step, others: _Elsewhere | None
    ) -> tuple[Tensor | None, str]:
        """Score the objects in pictures, `(L,)`; None and why when there is no picture or no picture network."""
        if len(pictures) == 0:
            return None, "there are no pictures to look at"
        if isinstance(self.labeller, str):
            return None, self.labeller
        step("looking", 0.0)
        views = self.labeller.looking(self.separator.extraction.looks)(pictures)
        logits = self.labeller(views.crops) if others is None else others.label(self.labeller, views.crops)
        return self.labels.scores(views.evidence(logits)), ""


class _Elsewhere:
    """One file's stages that other processes do; what ends the work by `step` ends the wait for them."""

    def __init__(self, start: Callable[..., Future], step: Step) -> None:
        self._start, self._step = start, step
        self._told = ("decoding", 0.0)

    def tell(self, stage: str, done: float) -> None:
        self._told = (stage, done)
        self._step(stage, done)

    def _ask(self, *arguments: Any) -> Any:
        future = self._start(*arguments)
        try:
            while not wait([future], _LOOK_S).done:
                self._step(*self._told)
            return future.result()
        finally:
            future.cancel()

    def label(self, own: ImageLabeller, pictures: NDArray[np.uint8]) -> Tensor:
        logits = self._ask("label", pictures, own.sha256)
        return own(pictures) if logits is None else torch.tensor(logits)

    def factorize(self, waveform: Tensor, seeds: Sequence[int], config: ExtractionConfig) -> Sequence[Factors]:
        return self._ask("factorize", waveform.numpy(), seeds, config)


def _heard(plan: Plan, scores: Tensor, least: float) -> dict[str, float]:
    """Name the objects of at least a share of the sound, the loudest first."""
    names = plan.separator.model.config.objects
    order = scores.argsort(descending=True).tolist()
    return {names[i]: float(scores[i]) for i in order if scores[i] >= least}


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> float:
        """Give the seconds since the last call."""
        last, self._last = self._last, time.monotonic()
        return self._last - last


class _Source:
    """One file's pictures and sound; the sound can be read more than once."""

    def __init__(
        self,
        video: Path,
        sample_rate: int,
        image_size: int,
        limits: FileLimits,
        step: Step = _no_step,
        track: int = 1,
    ) -> None:
        self._video, self._rate, self._limits = video, sample_rate, limits
        self._held: NDArray[np.float32] | None = None
        held = min(_HELD_S, limits.max_duration_s, limits.decode.max_duration_s)
        try:
            shorter = replace(limits.decode, max_duration_s=held)
            clip = media.decode(video, sample_rate=sample_rate, image_size=image_size, limits=shorter, track=track)
        except ClipError as error:
            if error.reason != Reason.TOO_LONG or held < _HELD_S:
                raise
            info = media.probe(video, timeout_s=limits.decode.timeout_s)
            duration_s = info.duration_s
            too_long = duration_s is not None and duration_s > limits.max_duration_s  # says the header; is it true?
            if too_long and media.reaches(video, limits.max_duration_s, limits=limits.decode):
                raise _too_long(limits) from None
            self._listening, self.notes = media.listen(video, limits=limits.decode, track=track)
            self.n_samples = round(sample_rate * (duration_s or 2 * held))  # a guess, where the header doesn't say
            self.pictures = pictures(video, image_size, info, limits.decode, step)
        else:
            self._held, self.pictures, self.notes = clip.waveform, clip.images, clip.notes
            self.n_samples = len(clip.waveform)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Read the sound from its start, `(S,)` at a time."""
        if self._held is not None:
            yield self._held
            return
        n_samples = 0
        reading: dict[str, Any] = {"sample_rate": self._rate, "block": _BLOCK, "limits": self._limits.decode}
        for block in media.iter_audio(self._video, listening=self._listening, **reading):
            n_samples += len(block)
            if n_samples > self._limits.max_duration_s * self._rate:  # headers may promise too little
                raise _too_long(self._limits)
            yield block


def _too_long(limits: FileLimits) -> ClipError:
    return ClipError(Reason.TOO_LONG, f"more than {limits.max_duration_s:g} s")


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


def unlearned(objects: Sequence[str]) -> str:
    """Say what a model's answer is worth about objects that no clip of its training had; "" for none."""
    return f"the model was trained on no clip of {', '.join(objects)}: it can't tell their sound" if objects else ""


def unlike(objects: Sequence[str]) -> str:
    """Say that a sound is unlike a model's training, as far as it was taken for some objects; "" for none."""
    if not objects:
        return ""
    return f"the sound is unlike what the model was trained on: {', '.join(objects)} may be something else"


def pictures(
    video: Path,
    image_size: int,
    info: media.MediaInfo | None = None,
    limits: media.DecodeLimits = _LIMITS,
    step: Step = _no_step,
) -> NDArray[np.uint8]:
    """Decode pictures from all over a file, at most a minute's worth, as `media.decode` gives them."""
    found: list[NDArray[np.uint8]] = []
    info = info or media.probe(video)
    if not info.has_video:
        return np.zeros((0, 0, 0, 3), np.uint8)
    decode = functools.partial(media.decode, video, image_size=image_size, limits=limits, sound=False)
    if info.duration_s is None or info.duration_s <= _MAX_PICTURES:
        return decode(0, None if info.duration_s else _MAX_PICTURES).images
    for start in np.linspace(0, info.duration_s - 1, _MAX_PICTURES):
        step("decoding", 0.0)
        with contextlib.suppress(ClipError):  # a damaged stretch
            found.append(decode(float(start), float(start) + 1).images)
    same = [f for f in found if f.shape[1:] == found[0].shape[1:]]  # where a stream changes its size, the first
    return np.concatenate(same) if same else np.zeros((0, 0, 0, 3), np.uint8)


def write_wavs(
    plan: Plan,
    rendered: Iterator[NDArray[np.float32]],
    out: Path,
    sample_rate: int,
    mixture: bool = False,
    parents: bool = True,
) -> None:
    """Write `OBJECT.wav`, `_rest.wav` and perhaps `_mixture.wav`, under other names until all are whole."""
    names = [*plan.objects, REST, *([MIXTURE] if mixture else [])]
    kind = "WAV" if plan.n_samples * 4 < 4_000_000_000 else "RF64"  # WAV's sizes have 32 bits
    parts = [out / f"{name}.wav.part" for name in names]
    out.mkdir(parents=parents, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(soundfile.SoundFile(p, "w", sample_rate, 1, subtype="FLOAT", format=kind))
                for p in parts
            ]
            for estimates in rendered:
                rows = [*estimates, estimates.sum(0)] if mixture else estimates
                for file, samples in zip(files, rows, strict=True):
                    file.write(samples)
        for part in parts:
            part.replace(part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
