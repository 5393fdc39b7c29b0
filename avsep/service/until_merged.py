"""Stands in for what `avsep.separation` and `avsep.videos` are to give: delete this file once they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avsep import media
from avsep.factors import Factorize
from avsep.separation import REST, Window
from avsep.stages import Label
from avsep.videos import FileLimits, FileSeparation, Step, write_wavs


class Planned(Protocol):
    """A sound that a separator has listened to."""

    objects: Sequence[str]
    confidence: Mapping[str, float]
    silent: Sequence[str]

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`."""


class Separates(Protocol):
    """Anything that turns a sound into its objects: `separation.Separates`."""

    sample_rate: int
    objects: Sequence[str]

    def plan(
        self,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Planned:
        """Listen to a whole sound, given in blocks `(S,)`."""


def explanation_of(plan: Any) -> Window | None:
    """Return `plan.explanation`."""
    return getattr(plan, "explanation", None) or getattr(plan, "first_window", None)


def elsewhere(label: Label | None, factorize: Factorize | None) -> Callable[..., Future] | None:
    """Return what `VideoSeparator` takes as `elsewhere`; it is to take `label` and `factorize` themselves."""
    if factorize is None:
        return None

    def start(stage: str, *arguments: Any) -> Future:
        if stage == "label":
            if label is not None:
                return label.classify(arguments[0])
            none: Future = Future()
            none.set_result(None)
            return none
        waveform, seeds, _ = arguments
        return factorize([waveform] * len(seeds), seeds)

    return start


class AnyFiles:
    """`VideoSeparator` with a separator that has no model: the pictures aren't looked at."""

    labeller = "this separator has no picture network"

    def __init__(self, separator: Separates, limits: FileLimits) -> None:
        self.separator, self._limits = separator, limits

    def __call__(
        self,
        video: Path,
        out: Path,
        objects: Sequence[str] | None = None,
        bases: str | None = None,
        step: Step = lambda *_: None,
        mixture: bool = False,
        elsewhere: Callable[..., Future] | None = None,
        parents: bool = True,
    ) -> FileSeparation:
        """Separate a file, as `VideoSeparator` does."""
        rate, limits = self.separator.sample_rate, self._limits.decode
        started = time.monotonic()
        step("decoding", 0.0)
        listening, notes = media.listen(video, limits=limits)
        sound = media.iter_audio(video, sample_rate=rate, block=1 << 20, listening=listening, limits=limits)
        waveform = np.concatenate(list(sound))
        decoded = time.monotonic()
        step("listening", 0.0)
        plan: Any = self.separator.plan([waveform], objects)
        plan.n_samples = len(waveform)

        def rendered() -> Iterator[NDArray[np.float32]]:
            for estimates in plan.render([waveform]):
                yield estimates
                step("separating", 1.0)

        write_wavs(plan, rendered(), out, rate, mixture, parents)
        origin = "given" if objects is not None else "sound"
        report = {
            "sample_rate": rate,
            "duration_s": len(waveform) / rate,
            "objects_from": origin,
            "note": "",
            "labeller": None,
            "unlearned": "",
            "objects": [
                {"name": n, "from": origin, "confidence": plan.confidence[n], "silent": n in plan.silent}
                for n in plan.objects
            ],
            "rest": f"{REST}.wav",
            "timings": {"decode_s": decoded - started, "separate_s": time.monotonic() - decoded},
        }
        return FileSeparation(report, plan, np.zeros((0, 0, 0, 3), np.uint8), tuple(notes))
