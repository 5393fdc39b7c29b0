"""What the service answers, as schemas with an example each: for the OpenAPI document and the page of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from avsep.model import ModelConfig
from avsep.objects import AUDIOSET_23, Vocabulary

_ID = "8c2f4f0de1a54b0d9a4f3f1f0c7be6a1"
_BASE = f"/v1/separations/{_ID}"


def _audio(track: str) -> dict[str, str]:
    return {kind: f"{_BASE}/tracks/{track}.{kind}" for kind in ("wav", "flac", "mp3", "ogg")}


def _object(name: str, **values: Any) -> dict[str, Any]:
    values |= {"familiarity": 0.9, "learned": True, "doubt": "", "audio": _audio(name)}
    values |= {"boxes": [{"time_s": 0.5, "box": [0.1, 0.2, 0.45, 0.9]}]}
    return {"name": name, "found": "given", **values}


OBJECT: dict[str, Any] = {"name": "violin", "learned": True, "imagenet": [889], "audioset": "/m/07y_7"}
RESULT: dict[str, Any] = {
    "duration_s": 10.0,
    "sample_rate": 44100,
    "channels": 2,
    "format": "wav",
    "two_stems": "",
    "objects_from": "given",
    "note": "",
    "bases": "own",
    "objects": [
        _object("violin", confidence=0.97, sound_score=0.62, picture_score=0.81, visible=True, silent=False),
        _object("dog", confidence=0.94, sound_score=0.29, picture_score=0.55, visible=True, silent=False),
    ],
    "rest": _audio("_rest"),
    "mixture": _audio("_mixture"),
    "heard": {"violin": 0.62, "dog": 0.29},
    "windows": [{"start_s": 0.0, "end_s": 10.0, "heard": {"violin": 0.62, "dog": 0.29}}],
    "relation": {"data": f"{_BASE}/relation", "png": f"{_BASE}/relation.png"},
    "edits": f"{_BASE}/edits",
    "edited": False,
    "frame": f"{_BASE}/frame.png",
    "locations": f"{_BASE}/locations",
    "archive": f"{_BASE}/archive.zip",
    "mix": {"sound": f"{_BASE}/mix", "video": f"{_BASE}/mix.mp4"},
    "timings": {"queued_s": 0.01, "decode_s": 0.4, "look_s": 0.9, "listen_s": 2.1, "separate_s": 0.3, "total_s": 3.7},
    "model": {"recipe": "default", "avsep": "0.1.0"},
    "trained_on": {"clips": 40_000, "clips_by_label": {"dog": 9000, "violin": 12_000}},
}
EDITS: dict[str, Any] = {
    "moves": [{"window": 0, "basis": 3, "to": "violin"}, {"window": 0, "basis": 7, "to": "_rest"}],
    "spans": [{"start_s": 2.0, "end_s": 4.5, "object": "violin", "present": False}],
    "add": ["cat"],
    "remove": ["dog"],
}
JOB: dict[str, Any] = {
    "id": _ID,
    "status": "done",
    "stage": "done",
    "progress": 1.0,
    "created": "2025-06-01T12:00:00Z",
    "expires": "2025-06-01T13:00:05Z",
    "error": None,
    "result": RESULT,
}
PROBLEM: dict[str, Any] = {
    "title": "Request Entity Too Large",
    "status": 413,
    "detail": "the sound is too long: more than 600 s, the most that this service takes; send a part of it, "
    "or use the command 'avsep separate', which takes any length",
    "reason": "too_long",
}


def _text(description: str, **settings: Any) -> Any:
    return Field(description=description, **settings)


class ProblemBody(BaseModel):
    """Why a request failed."""

    title: str
    status: int = _text("HTTP's")
    detail: str = _text("to read")
    reason: str | None = _text("to branch on: unreadable, too_long, busy, storage_full, …", default=None)
    cause: str | None = _text("the decoder's own words", default=None)


class Audio(BaseModel):
    """Where a sound is; null where a format can't hold its channels or sample rate."""

    wav: str = _text("float32")
    flac: str | None = _text("24 bits, lossless", default=None)
    mp3: str | None = _text("small", default=None)
    ogg: str | None = _text("Vorbis, a fifth of FLAC's size, for listening", default=None)


class Where(BaseModel):
    """Where an object is in one picture. Two of the same object share a box, or have it around one of them."""

    time_s: float
    box: tuple[float, float, float, float] = _text("left, top, right, bottom, as fractions of width and height")


class SeparatedObject(BaseModel):
    """One object of a result. In each channel the sounds of all objects and the rest add up to the mixture."""

    name: str
    found: Literal["given", "pictures", "sound"] = _text("why it is here: it was named, seen or heard")
    confidence: float = _text("the probability that it sounds, by sound and pictures")
    familiarity: float | None = _text(
        "how like the model's training its sound is, in [0, 1]; it bounds the confidence; null where nobody measures it"
    )
    sound_score: float | None = _text(
        "its share of the sound by the model, or of the energy after edits; null where the separator doesn't say"
    )
    picture_score: float | None = _text("how much it is seen; null where nobody looked")
    visible: bool | None = _text("whether it is seen; null where nobody looked")
    silent: bool = _text("here, but not heard: its sound is zero")
    learned: bool = _text("whether the model was trained on this object; else its answer means little", default=True)
    doubt: str = _text("why its sound may not be its own, or nothing", default="")
    boxes: list[Where] | None = _text("where it is, picture by picture; null where that isn't known", default=None)
    audio: Audio | None = _text("null where it is a part of the rest: of two stems, only the first is apart")


class Relation(BaseModel):
    """Where the relation map is."""

    data: str
    png: str


class Mixes(BaseModel):
    """Where the sounds are mixed anew, by `gains=violin:0.5,_rest:0`, from 0 to 4 each, 1 unless given."""

    sound: str = _text("in `format` wav, flac or mp3")
    video: str | None = _text("the pictures as they were uploaded, with the mix; null where there are none")


class WindowHeard(BaseModel):
    """What is heard in one stretch of a sound."""

    start_s: float
    end_s: float
    heard: dict[str, float]


class MoveBody(BaseModel):
    """A basis that goes to another object, as a whole."""

    window: int = _text("counted from 0", default=0, ge=0)
    basis: int = _text("its number, as the relation map's `basis` gives it", ge=0)
    to: str = _text("an object's name, or _rest")


class SpanBody(BaseModel):
    """A stretch of time in which an object sounds, or doesn't."""

    start_s: float
    end_s: float
    object: str
    present: bool


class EditsBody(BaseModel):
    """Corrections by hand, all of them optional; as `avsep separate --edit` takes them."""

    model_config = ConfigDict(json_schema_extra={"examples": [EDITS]})

    moves: list[MoveBody] = []
    spans: list[SpanBody] = []
    add: list[str] = _text("objects that are there, too", default=[])
    remove: list[str] = _text("objects that are not", default=[])
    duration_s: float | None = _text("of the sound that they are of; refused for another one", default=None)


class Result(BaseModel):
    """What became of a video."""

    duration_s: float
    sample_rate: int = _text("of the sounds, in Hz: the file's own, or with `mono` the model's")
    channels: int = _text("of the sounds: the file's own, or with `mono` one")
    format: Literal["wav", "flac", "mp3"] = _text("of the archive's sounds")
    two_stems: str = _text("the object that alone was set apart, or nothing")
    objects_from: Literal["given", "pictures", "sound"] = _text("how the objects were found")
    note: str = _text("what to know of this result, or nothing")
    bases: Literal["own", "learned", "both"] | None = _text(
        "what it was taken apart into; null for nothing of that kind"
    )
    objects: list[SeparatedObject]
    rest: Audio = _text("what is no object's")
    mixture: Audio
    heard: dict[str, float] = _text("every object's share of the sound, from 1 % up")
    windows: list[WindowHeard] = _text("the same over time, from 5 % up")
    relation: Relation | None = _text("null where the separator has no bases to relate")
    edits: str | None = _text("what was corrected by hand; null where nothing can be", default=None)
    edited: bool = _text("whether anything was", default=False)
    frame: str | None = _text("a picture of the video, with a box around each object; ?marked=false without")
    locations: str | None = _text("where the objects are, as maps; null where that isn't known", default=None)
    archive: str = _text("all of it in a ZIP")
    mix: Mixes
    timings: dict[str, float] = _text("in seconds")
    model: dict[str, str]
    trained_on: dict[str, Any] = _text("what the model learned from, as far as it says so", default_factory=dict)


class Job(BaseModel):
    """A separation, finished or not."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB]})

    id: str
    status: Literal["uploading", "queued", "running", "done", "failed"]
    stage: str | None = _text("fetching, decoding, looking, listening, separating, done", default=None)
    progress: float = _text("from 0 to 1")
    created: datetime
    expires: datetime | None = _text("when its files will be deleted, once it is finished", default=None)
    error: ProblemBody | None = _text("why it failed", default=None)
    result: Result | None = _text("once it is done", default=None)


class RelationMap(BaseModel):
    """How the first window's M bases relate to the L objects, the loudest basis first."""

    objects: list[str] = _text("L names, then noise")
    posteriors: list[list[float]] = _text("(L + 1, M), a column sums to one")
    audible: list[str] = _text("J names, then _rest")
    shares: list[list[float]] = _text("(J + 1, M), what became of each basis")
    basis: list[int] = _text("(M,), numbers to ask for its sound by")
    energy: list[float] = _text("(M,)")
    start_s: float
    duration_s: float


class LocationMaps(BaseModel):
    """Where J objects are in n pictures from all over the video. Two of the same object share a map."""

    objects: list[str] = _text("J names")
    times_s: list[float] = _text("(n,), when each picture is shown")
    height: int = _text("cells of a map")
    width: int
    maps: str = _text("(n, J, height, width) bytes, base64; 255 is certainty that the object is there")
    frame: int = _text("which of the pictures `frame` is, from 0")


class ObjectInfo(BaseModel):
    """An object that the model has a name for."""

    model_config = ConfigDict(json_schema_extra={"examples": [OBJECT]})

    name: str
    learned: bool = _text("whether the model was trained on it; else it can't tell its sound")
    imagenet: list[int] = _text("its classes of ImageNet")
    audioset: str = _text("its class of AudioSet")


class Limits(BaseModel):
    """What the service takes and keeps."""

    max_upload_bytes: int
    max_duration_s: float
    max_pixels: int
    results_ttl_s: float
    allow_urls: bool
    free_bytes: int = _text("the room that there is now for one more upload with its result")


class Card(BaseModel):
    """What a model says of itself; null for what its separator hasn't."""

    recipe: str | None = None
    objects: list[str]
    learned: list[str] = _text("those that it was trained on")
    trained_on: dict[str, Any] = _text(
        "what it learned from, as far as it says so: clips, clips_by_label, …", default_factory=dict
    )
    sample_rate: int
    n_fft: int | None = None
    hop_length: int | None = None
    n_bases: int | None = None
    bases: str | None = None
    dictionary: bool = False
    labeller: str | None = _text("the picture network in use; null where there is none", default=None)
    window_s: float | None = None
    versions: dict[str, str] = {}
    _vocabulary: Vocabulary = PrivateAttr(AUDIOSET_23)
    _config: ModelConfig | None = PrivateAttr(None)

    @property
    def vocabulary(self) -> Vocabulary:
        """What its objects are, and what clients may call them."""
        return self._vocabulary

    @property
    def config(self) -> ModelConfig | None:
        """How the model works; None of a separator without bases."""
        return self._config

    def knowing(self, vocabulary: Vocabulary, config: ModelConfig | None = None) -> Self:
        """Return it with a vocabulary and a model's configuration."""
        self._vocabulary, self._config = vocabulary, config
        return self


class ModelInfo(Card):
    """The model in use."""

    limits: Limits


class Health(BaseModel):
    """Whether the service works."""

    status: Literal["ok"]
    version: str
    pending: int = _text("uploads and separations in progress")
    busy: bool = _text("whether an upload would be told to come later")


class Example(BaseModel):
    """A file to try the service with."""

    name: str
    url: str
