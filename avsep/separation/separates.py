"""What a separator is, and what it makes of a sound; a function of a whole sound as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avsep.separation.windows import Explanation, Window
from avsep.stft import STFT

_SHOWN_S = 60  # of a sound in a notebook


class Planned(Protocol):
    """What a separator decided about one sound, ready to be rendered in a second pass over it.

    It may say more, which reports show where it is there: `sound_scores` and `familiarity` (by name, in [0, 1]),
    `doubts` (sentences by name) and `window_scores`, as `Plan` does.
    """

    @property
    def objects(self) -> Sequence[str]:
        """The names of what is separated, J of them."""

    @property
    def confidence(self) -> Mapping[str, float]:
        """How sure it is, in [0, 1], that an object sounds, at least of each of `objects`."""

    @property
    def silent(self) -> Sequence[str]:
        """Those of `objects` that aren't heard: their estimates are zero."""

    @property
    def explanation(self) -> Explanation | None:
        """The bases that decided the sound's first window, and their relation to the objects; None: there are none."""

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`, in order; together they are as long as the sound.

        The blocks `(S,)` are the same sound's again. In each sample the estimates and the rest add up to it.
        """


@runtime_checkable
class Separates(Protocol):
    """Whatever turns a sound into its objects: a trained model, a baseline, a network of somebody's own."""

    @property
    def sample_rate(self) -> int:
        """The sample rate in Hz of the sounds that it takes."""

    @property
    def objects(self) -> Sequence[str]:
        """The names that it knows."""

    def plan(
        self,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Planned:
        """Listen to a whole mono sound, given in blocks `(S,)`, and decide what to separate from it.

        `objects` are there for certain; else `seen` are what pictures show, of which some may be silent; without
        either it is what is heard. Raises ValueError for an unknown object, and for a sound without a sample.
        """


def render_whole(
    separator: Separates,
    waveform: NDArray[np.float32],
    objects: Sequence[str] | None = None,
    seen: Sequence[str] | None = None,
) -> tuple[Planned, NDArray[np.float32]]:
    """Separate a waveform `(S,)` in memory: the plan, and the estimates and, last, the rest, `(J + 1, S)`."""
    blocks = np.array_split(waveform, max(1, len(waveform) // (1 << 20)))
    plan = separator.plan(blocks, objects, seen)
    return plan, np.concatenate(list(plan.render(blocks)), 1)


@dataclass
class _WholePlan:
    """What a function made of a whole sound."""

    objects: tuple[str, ...]
    estimates: NDArray[np.float32]  # (J, S)
    confidence: Mapping[str, float]
    silent: tuple[str, ...] = ()
    explanation: None = None

    def render(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates and, last, the rest, `(J + 1, …)`, block by block."""
        start = 0
        for block in blocks:
            parts = self.estimates[:, start : start + len(block)]
            start += len(block)
            yield np.concatenate([parts, (block - parts.sum(0))[None]])


@dataclass
class Whole:
    """A separator of sounds that fit into memory: `estimate` takes one, `(S,)`, and J names, and gives `(J, S)`.

    What its estimates leave of the sound is the rest. Where nobody names objects it gives all of its own, of which it
    doesn't know whether they sound.

    >>> halves = Whole(lambda mixture, names: mixture.expand(len(names), -1) / len(names), 8000, ("dog", "violin"))
    >>> plan, parts = render_whole(halves, np.ones(3, np.float32))
    >>> parts
    array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5],
           [0. , 0. , 0. ]], dtype=float32)
    """

    estimate: Callable[[Tensor, Sequence[str]], Tensor]
    sample_rate: int
    objects: tuple[str, ...]

    def plan(
        self,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Planned:
        """Separate the sound; as `Separates.plan`, but that `seen` changes nothing."""
        names = self.objects if objects is None else tuple(objects)
        if unknown := [n for n in names if n not in self.objects]:
            raise ValueError(f"objects are {', '.join(unknown)}; this separator knows {', '.join(self.objects)}")
        mixture = np.concatenate([np.zeros(0, np.float32), *blocks])
        if not len(mixture):
            raise ValueError("there is no sample to separate")
        estimates = self.estimate(torch.from_numpy(mixture), names).numpy()
        return _WholePlan(names, estimates, dict.fromkeys(names, 0.5 if objects is None else 1.0))


@dataclass(repr=False)
class Separation:
    """A separated waveform: `estimates` and `rest` add up to the mixture. In a notebook it shows players."""

    objects: tuple[str, ...]
    estimates: Tensor  # (J, S)
    rest: Tensor  # (S,)
    sound_scores: dict[str, float]  # every object's share of the sound
    confidence: dict[str, float]  # every object's probability of sounding, by sound and pictures
    silent: tuple[str, ...]  # asked for, but not heard: their estimates are zero
    first_window: Window
    stft: STFT  # the model's

    @property
    def sample_rate(self) -> int:
        """The waveforms' sample rate in Hz."""
        return self.stft.sample_rate

    def __repr__(self) -> str:
        """Say in a line what was found.

        >>> Separator.load("out/demo/model")("duet.mp4")           # doctest: +SKIP
        <Separation of 10.0 s at 48000 Hz: violin 45 %, dog 9 %, cat silent; the rest>
        """
        found = ", ".join(self._caption(name) for name in self.objects) or "no object"
        return f"<Separation of {len(self.rest) / self.sample_rate:.1f} s at {self.sample_rate} Hz: {found}; the rest>"

    def _caption(self, name: str) -> str:
        return f"{name} silent" if name in self.silent else f"{name} {100 * self.sound_scores[name]:.0f} %"

    def _repr_html_(self) -> str:
        """Show players and spectrograms of the sounds, of the first minute where they are longer."""
        from avsep import plots
        from avsep.report import players

        mixture = (self.estimates.sum(0) + self.rest).numpy()
        names = [*map(self._caption, self.objects), "the rest"]
        sounds = [("mixture", mixture), *zip(names, [*self.estimates.numpy(), self.rest.numpy()], strict=True)]
        shown = [(name, x[: _SHOWN_S * self.sample_rate]) for name, x in sounds]
        top_hz = min(8000.0, self.sample_rate / 2)
        figures = [plots.spectrogram(x, self.stft, top_hz=top_hz, beside=shown[0][1]) for _, x in shown]
        note = "" if len(self.rest) <= len(shown[0][1]) else f"The first {_SHOWN_S} s of {repr(self)[1:-1]}"
        return players([(*s, f) for s, f in zip(shown, figures, strict=True)], self.sample_rate, note)
