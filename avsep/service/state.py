"""A job's state: what its JSON file says, and what every process of a service knows of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from avsep.outputs import Output
from avsep.separation import REST

Status = Literal["uploading", "queued", "running", "done", "failed"]
UNFINISHED: tuple[Status, ...] = ("uploading", "queued", "running")
FINISHED: tuple[Status, ...] = ("done", "failed")


class _Kept(BaseModel):
    """Immutable; a field that is None isn't written, and fields of other versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Options(_Kept):
    """What a client asked for."""

    url: str | None = None
    objects: tuple[str, ...] | None = None  # None: they are to be found
    bases: Literal["own", "learned", "both"] | None = None  # None: the model's choice
    format: Literal["wav", "flac", "mp3"] = "wav"
    mono: bool = False  # one channel at the model's sample rate, else as the file is
    two_stems: str | None = None  # an object: it and all the rest

    @property
    def output(self) -> Output:
        """What is written: WAVs, from which every other format is made when it is asked for."""
        return Output(self.mono, self.format, self.two_stems, as_wav=True)

    def tracks(self, objects: Iterable[str]) -> dict[str, str]:
        """Name the sounds of a result's objects and, last, the rest: what each is of, and its file without suffix."""
        whose = [*objects, REST] if self.two_stems is None else [self.two_stems, REST]
        return dict(zip(whose, self.output.names(whose[:-1]), strict=True))


class Failure(_Kept):
    """Why a job failed, for its client."""

    status: int  # HTTP's
    detail: str  # to read
    reason: str = ""  # to branch on
    cause: str = ""  # the decoder's own words


class Where(_Kept):
    """Where an object is in one picture."""

    time_s: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, as fractions of width and height


class FoundObject(_Kept):
    """One object of a result."""

    name: str
    found: Literal["given", "pictures", "sound"] = Field(alias="from")
    confidence: float
    familiarity: float | None = None
    sound_score: float | None = None
    picture_score: float | None = None
    visible: bool | None = None
    silent: bool
    learned: bool = True
    doubt: str = ""
    boxes: tuple[Where, ...] | None = None  # None: not known


class Heard(_Kept):
    """Objects' shares of one stretch of the sound."""

    start_s: float
    end_s: float
    heard: dict[str, float]


class First(_Kept):
    """What a separation found, before anybody corrected it."""

    objects: tuple[FoundObject, ...]
    heard: dict[str, float] = {}
    windows: tuple[Heard, ...] = ()


class Outcome(_Kept):
    """What a separation found; its sounds and its first window are files beside it."""

    duration_s: float
    sample_rate: int
    channels: int = 1
    objects_from: Literal["given", "pictures", "sound"]
    note: str = ""
    bases: Literal["own", "learned", "both"] | None = None  # None: the separator has none
    objects: tuple[FoundObject, ...]
    heard: dict[str, float] = {}
    windows: tuple[Heard, ...] = ()
    timings: dict[str, float]  # in seconds
    model: dict[str, str] = {}
    trained_on: dict[str, Any] = {}
    has_image: bool = False
    located: bool = False  # whether maps of where objects are were kept
    explained: bool = False  # whether its first window was kept
    video: Literal["mp4", "mkv"] | None = None  # what can hold the upload's pictures; None: it has none
    editable: bool = False  # whether its bases were kept
    edited: str = ""  # the folder of the sounds rendered again, when it was
    edits: dict[str, Any] | None = None  # made by hand
    first: First | None = None  # where there are edits


class State(_Kept):
    """A job. Times are in seconds since 1970."""

    id: str
    status: Status
    created: float
    updated: float = 0.0  # when its file was written
    queued: float | None = None  # when its upload was whole
    started: float | None = None
    finished: float | None = None
    stage: str | None = None
    progress: float = 0.0  # from 0 to 1
    duration_s: float = 0.0  # of the upload, by its header
    sample_rate: int = 0  # of its sound in Hz, by its header
    channels: int = 0
    reserved: int = 0  # bytes that are kept free for it
    options: Options = Options()
    result: Outcome | None = None
    error: Failure | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it is done or has failed."""
        return self.status in FINISHED

    def changed(self, **values: Any) -> State:
        """Return a copy with other values. Raises TypeError for an unknown field, ValueError for a wrong value."""
        if unknown := values.keys() - State.model_fields.keys():
            raise TypeError(f"a job's state has no {', '.join(sorted(unknown))}")
        return State.model_validate({**dict(self), **values})

    @classmethod
    def read(cls, text: bytes) -> State:
        """Read what `written` returned, of this version or the one before; ValueError for anything else."""
        return cls.model_validate_json(text)

    def written(self) -> str:
        """Return the JSON to keep, with the present time."""
        return self.changed(updated=time.time()).model_dump_json(by_alias=True, exclude_none=True)
