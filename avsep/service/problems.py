"""Errors as problem details (RFC 9457)."""

from __future__ import annotations

import http
from collections.abc import Iterable
from typing import Any

from fastapi.responses import JSONResponse

from avsep.service.answers import PROBLEM, EditsBody, ProblemBody
from avsep.service.state import Failure

_RETRY_S = 2
JSON = "application/json"
_PROBLEM = "application/problem+json"


class Problem(Exception):
    """An answer that isn't what was asked for (RFC 9457)."""

    def __init__(self, status: int, detail: str, reason: str = "", cause: str = "") -> None:
        super().__init__(detail)
        self.status, self.detail, self.reason, self.cause = status, detail, reason, cause

    @classmethod
    def of(cls, failure: Failure) -> Problem:
        """Answer with a job's failure."""
        return cls(failure.status, failure.detail, failure.reason, failure.cause)

    def response(self) -> JSONResponse:
        """Return the answer."""
        return problem(self.status, self.detail, self.reason, self.cause)


def problem(
    status: int, detail: str, reason: str = "", cause: str = "", headers: dict[str, str] | None = None
) -> JSONResponse:
    """Answer with `application/problem+json`."""
    body = {"title": http.HTTPStatus(status).phrase, "status": status, "detail": detail}
    body |= {name: text for name, text in (("reason", reason), ("cause", cause)) if text}
    headers = dict(headers or {})
    if status in (429, 503, 507):
        headers.setdefault("Retry-After", str(_RETRY_S))
    return JSONResponse(body, status, headers, media_type=_PROBLEM)


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe problem answers for OpenAPI."""
    return {
        code: {"description": http.HTTPStatus(code).phrase, "content": {_PROBLEM: {"schema": _PROBLEM_SCHEMA}}}
        for code in codes
    }


def file_response(kinds: Iterable[str], *codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe an answer that is a file for OpenAPI."""
    return {
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}},
        **problems(*codes),
    }


_PROBLEM_SCHEMA = {**ProblemBody.model_json_schema(), "examples": [PROBLEM]}
UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "a video or sound"},
                        "url": {"type": "string", "description": "instead of a file, where the operator allows it"},
                        "objects": {"type": "string", "description": "comma-separated names; else they are found"},
                        "bases": {"type": "string", "enum": ["own", "learned", "both"]},
                        "format": {
                            "type": "string", "enum": ["wav", "flac", "mp3"], "default": "wav",
                            "description": "of the archive's sounds: 32-bit floats, 24 bits, or small",
                        },
                        "mono": {
                            "type": "boolean", "default": False,
                            "description": "one channel at the model's sample rate, not as the file is",
                        },
                        "two_stems": {"type": "string", "description": "an object: it and all the rest, nothing else"},
                    },
                }
            }
        },
    }
}  # fmt: skip
EDITS_SCHEMA = {"requestBody": {"required": True, "content": {JSON: {"schema": EditsBody.model_json_schema()}}}}


AUDIO = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg"}
VIDEO = {"mp4": "video/mp4", "mkv": "video/x-matroska"}
