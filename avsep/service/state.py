"""A job's state: what its JSON file says, and what every process of a service knows of it."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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


class Failure(_Kept):
    """Why a job failed, for its client."""

    status: int  # HTTP's
    detail: str  # to read
    reason: str = ""  # to branch on
    cause: str = ""  # the decoder's own words


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


class Heard(_Kept):
    """Objects' shares of one stretch of the sound."""

    start_s: float
    end_s: float
    heard: dict[str, float]


class Outcome(_Kept):
    """What a separation found; its sounds and its first window are files beside it."""

    duration_s: float
    sample_rate: int
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
    explained: bool = False  # whether its first window was kept


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
