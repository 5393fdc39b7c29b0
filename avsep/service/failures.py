"""What exceptions mean to a client."""

from __future__ import annotations

import soundfile

from avsep import storage
from avsep.outputs import CannotHold
from avsep.records import ClipError, Reason
from avsep.service.config import log
from avsep.service.elsewhere import Busy, OutOfTime, WorkerLost
from avsep.service.results import StoreFull
from avsep.service.state import Failure
from avsep.service.uploads import BadUpload

_TOO_MUCH = (Reason.TOO_LONG, Reason.TOO_LARGE)
_PLAIN = {  # with the decoder's own words, where they help
    Reason.EMPTY: "the file has nothing in it that can be heard",
    Reason.UNREADABLE: "this can't be read as a video or sound: it is damaged, protected, or another kind of file; "
    "what can be read is MP4, MOV, MKV, WebM, AVI, MP3, M4A, WAV, FLAC, OGG and most others",
    Reason.NO_AUDIO: "the file has no sound; there is nothing to separate",
    Reason.TRUNCATED: "the file is incomplete: it {}; copy or download it again",
    Reason.TOO_SHORT: "the sound is too short to separate: {}",
    Reason.TOO_LONG: "the sound is too long: {}, the most that this service takes; send a part of it, "
    "or use the command 'avsep separate', which takes any length",
    Reason.TOO_LARGE: "the pictures or streams are too large: {}; send a smaller version, or the sound alone",
    Reason.TIMEOUT: "it took too long to decode the file; convert it to MP4 or WAV first",
    Reason.CRASHED_DECODER: "the decoder gives up on this file; convert it to MP4 or WAV first",
}


_FULL = Failure(status=507, reason="storage_full", detail="there is no room for results; try again later")


def as_failure(error: BaseException) -> Failure:
    """Say what an exception means to a client."""
    match error:
        case ClipError():
            return _of_clip(error)
        case BadUpload():
            return Failure(status=error.status, reason="upload", detail=error.detail)
        case Busy():
            return Failure(status=503, reason="busy", detail="too many separations wait; try again later")
        case WorkerLost():
            return Failure(status=503, reason="worker_lost", detail="the work was lost; try again later")
        case OutOfTime():
            return Failure(status=503, reason="out_of_time", detail="the work took longer than this service allows")
        case StoreFull():
            return _FULL
        case OSError() if error.errno in storage.FULL:
            return _FULL
        case soundfile.LibsndfileError():  # it forgets errno: a short write
            return Failure(status=507, reason="storage_full", detail="the result can't be written; try again later")
        case CannotHold():
            remedy = "give another 'format'" + ", or 'mono'" * error.mono
            return Failure(status=422, reason="format", detail=f"{error.fact}: {remedy}")
        case ValueError():
            log.warning("unusable: %s", error)
            return Failure(status=422, reason="unusable", detail="this can't be separated")
    return Failure(status=500, reason="internal", detail="the service failed; its log says why")


def _of_clip(error: ClipError) -> Failure:
    if error.transient and error.reason != Reason.TIMEOUT:
        return Failure(status=503, reason=str(error.reason), detail="the work was disturbed; try again")
    status = 413 if error.reason in _TOO_MUCH else 422
    plain = _PLAIN.get(error.reason, "{}").format(error.detail)
    cause = "" if error.detail in plain else error.detail
    return Failure(status=status, reason=str(error.reason), detail=plain, cause=cause)
