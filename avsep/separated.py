"""A file or an array in, a sound per object out, as arrays: `avsep.separate_file("duet.mp4")["violin"].samples`."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from avsep import starter, storage
from avsep.edits import Edits
from avsep.inputs import check_sound
from avsep.model import CONFIG_FILE
from avsep.objects import Vocabulary
from avsep.outputs import AS_IT_IS, FORMATS, Output, Shape
from avsep.separation import REST
from avsep.videos import VideoSeparator

_MODELS = 2  # kept loaded


@dataclass(frozen=True, eq=False)
class Sound:
    """One sound: samples `(C, S)` float32, full scale 1, at `sample_rate` Hz."""

    samples: NDArray[np.float32]
    sample_rate: int

    def save(self, path: storage.AnyPath) -> None:
        """Write it as .wav (float32), .flac (24 bits) or .mp3, which its suffix says; what is there is replaced.

        Raises ValueError for another suffix, or a format that can't hold the sound; OSError where it can't be written.
        A warning tells of samples above full scale, which all but WAV clip.
        """
        target = Path(path)
        kind = target.suffix.lower().removeprefix(".")
        if kind not in FORMATS:
            raise ValueError(f"{target}: the suffix must be {', '.join(f'.{f}' for f in FORMATS)}")
        n_channels, length = self.samples.shape
        Output(format=kind).check(Shape(self.sample_rate, n_channels))
        rf64 = kind == "wav" and 4 * n_channels * length >= 4_000_000_000
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            soundfile.write(
                part, self.samples.T, self.sample_rate, FORMATS[kind], format="RF64" if rf64 else kind.upper()
            )
            part.replace(target)
        except soundfile.LibsndfileError as error:
            raise OSError(f"{target} can't be written: {error} Does its folder exist, and is the disk full?") from None
        finally:
            part.unlink(missing_ok=True)
        if kind != "wav" and np.abs(self.samples).max(initial=0) > 1:
            warnings.warn(f"{target}: louder than full scale, where {kind} clips; wav doesn't", stacklevel=2)


class Separated(Mapping[str, Sound]):
    """A separation's sounds by name, those of the objects and, last, `_rest`; they add up to what was separated.

    Objects are found by what people call them, too: `separated["Acoustic guitar"]`.

    >>> separated = separate_sound(waveform, 48000, ["violin", "dog"])  # doctest: +SKIP
    >>> list(separated), separated["Fiddle"].samples.shape              # doctest: +SKIP
    (['violin', 'dog', '_rest'], (1, 480000))
    """

    def __init__(self, sounds: Mapping[str, Sound], report: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        self._sounds, self.report, self._vocabulary = dict(sounds), report, vocabulary

    def __getitem__(self, name: str) -> Sound:
        """Return a sound; KeyError says which there are."""
        if name not in self._sounds:
            try:
                return self._sounds[self._vocabulary.find(name)]
            except (KeyError, ValueError):
                raise KeyError(f"{name!r} is not in this separation; there are {', '.join(self._sounds)}") from None
        return self._sounds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sounds)

    def __len__(self) -> int:
        return len(self._sounds)

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the objects."""
        return tuple(name for name in self._sounds if name != REST)

    @property
    def sample_rate(self) -> int:
        """The sounds' sample rate in Hz."""
        return int(self.report["sample_rate"])

    def __repr__(self) -> str:
        """Say in a line what was found."""
        shares = [
            f"{o['name']} silent" if o["silent"] else f"{o['name']} {o['sound_score']:.0%}"
            for o in self.report["objects"]
        ]
        length = f"{self.report['duration_s']:.1f} s at {self.sample_rate} Hz"
        return f"<Separated {length}: {', '.join(shares) or 'no object'}; the rest>"


def separate_file(
    path: storage.AnyPath,
    objects: Sequence[str] | None = None,
    model: storage.AnyPath | None = None,
    *,
    track: int = 1,
    mono: bool = False,
    edits: Edits | None = None,
) -> Separated:
    """Separate a video or sound into a sound per object, in the file's own channels and sample rate.

    `objects` are those that are there; without them pictures and sound decide. `model` is a folder that
    `pipelines.train` wrote; None: the starter model. `track` counts audio tracks from 1; `mono` gives one channel at
    the model's sample rate; `edits` are corrections by hand. What else is known is in `report`, as in
    `separation.json`. All sounds are held in memory.

    Raises ClipError for a file without usable sound, ValueError for unknown objects or a folder that is no model,
    FileNotFoundError where there is no such file.

    >>> s = separate_file("duet.mp4")                                 # doctest: +SKIP
    >>> s["violin"].save("violin.wav")                                # doctest: +SKIP
    """
    output = Output(mono=mono) if mono else AS_IT_IS
    with storage.local_file(os.fspath(path)) as file, tempfile.TemporaryDirectory() as folder:
        if not file.exists():
            raise FileNotFoundError(f"{path} doesn't exist; check the path")
        check_sound(file, track, output)  # a mistake is told before the model is loaded
        separator = _loaded(os.fspath(starter.PATH if model is None else model))
        done = separator(file, Path(folder), objects, track=track, output=output, edits=edits)
        sounds = {}
        for name in done.files:
            samples, rate = soundfile.read(Path(folder, name), dtype="float32", always_2d=True)
            sounds[name.rpartition(".")[0]] = Sound(np.ascontiguousarray(samples.T), rate)
    return Separated(sounds, done.report, separator.config.vocabulary)


def separate_sound(
    samples: NDArray[np.floating[Any]],
    sample_rate: int,
    objects: Sequence[str] | None = None,
    model: storage.AnyPath | None = None,
    *,
    edits: Edits | None = None,
) -> Separated:
    """Separate samples `(S,)` or `(C, S)`, full scale 1, at any sample rate in Hz; as `separate_file`.

    Raises ValueError for samples of another shape, not finite ones, and what `separate_file` raises.

    >>> s = separate_sound(samples, 44100, ["violin", "dog"])         # doctest: +SKIP
    >>> s["violin"].samples                                           # doctest: +SKIP
    """
    sound = np.atleast_2d(np.asarray(samples, np.float32))
    if sound.ndim != 2 or len(sound) > sound.shape[1]:
        raise ValueError(f"the samples are {np.shape(samples)}; give (S,) or (C, S), channels first")
    if not np.isfinite(sound).all():
        raise ValueError("the samples hold NaN or infinity; full scale is 1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sound.wav")
        Sound(sound, sample_rate).save(file)
        return separate_file(file, objects, model, edits=edits)


def _loaded(model: str) -> VideoSeparator:
    """Load a model, or give the one loaded before, unless its folder has changed."""
    config = Path(model, CONFIG_FILE)
    written = 0 if storage.is_uri(model) or not config.exists() else config.stat().st_mtime_ns
    return _load(model, written)


@functools.lru_cache(_MODELS)
def _load(model: str, written: int) -> VideoSeparator:
    return VideoSeparator.load(model)
