"""What a request asks for."""

from __future__ import annotations

import http
from datetime import UTC, datetime
from typing import Any

from avsep.objects import find
from avsep.separation import REST
from avsep.service.answers import Audio, Job, ProblemBody, Relation, Result, SeparatedObject
from avsep.service.config import ServiceConfig
from avsep.service.problems import AUDIO, JSON, Problem
from avsep.service.window import TRACKS
from avsep.videos import MIXTURE

_MAX_WAIT_S = 60.0
_LONGEST_NAME = 40  # of an object
_ZIP = "application/zip"


def describe(job: dict[str, Any], ttl_s: float) -> Job:
    """Turn a job's state into what clients get: links in place of files, nothing of the server."""
    base = f"/v1/separations/{job['id']}"

    def audio(track: str) -> Audio:
        return Audio(**{kind: f"{base}/{TRACKS}/{track}.{kind}" for kind in AUDIO})

    result = None
    if job["status"] == "done":
        r = job["result"]
        result = Result(
            objects=[SeparatedObject(found=o["from"], audio=audio(o["name"]), **o) for o in r["objects"]],
            rest=audio(REST),
            mixture=audio(MIXTURE),
            relation=Relation(data=f"{base}/relation", png=f"{base}/relation.png"),
            frame=f"{base}/frame.png" if r["has_frame"] else None,
            archive=f"{base}/archive.zip",
            **{k: v for k, v in r.items() if k not in ("objects", "rest")},
        )
    error = job.get("error")
    finished = job.get("finished")
    return Job(
        id=job["id"],
        status=job["status"],
        stage=job.get("stage"),
        progress=job["progress"],
        created=datetime.fromtimestamp(job["created"], UTC),
        expires=datetime.fromtimestamp(finished + ttl_s, UTC) if finished else None,
        error=None if error is None else ProblemBody(title=http.HTTPStatus(error["status"]).phrase, **error),
        result=result,
    )


def parse_options(fields: dict[str, list[str]], *, has_file: bool, urls: bool, dictionary: bool) -> dict[str, Any]:
    """Check a request's fields; Problem says what is wrong with them."""
    known = {"url", "objects", "bases"}
    for name, values in fields.items():
        if name not in known:
            raise Problem(422, f"unknown field {name[:40]!r}; there are file, {', '.join(sorted(known))}")
        if len(values) > 1 and name != "objects":
            raise Problem(422, f"the field {name!r} is there {len(values)} times")
    options: dict[str, Any] = {}
    url = fields.get("url", [""])[0].strip()
    if has_file == bool(url):
        raise Problem(422, "send either a 'file' or a 'url'" if url else "send a video or sound as the field 'file'")
    if url:
        if not urls:
            raise Problem(403, "this service takes files only, no URLs")
        if not url.startswith(("http://", "https://", "youtube:")):
            raise Problem(422, "a 'url' is http://…, https://… or youtube:ID")
        options["url"] = url
    if "objects" in fields:
        names = [n.strip() for value in fields["objects"] for n in value.split(",")]
        try:
            options["objects"] = list(dict.fromkeys(find(n[:_LONGEST_NAME]) for n in names if n))
        except ValueError as error:
            raise Problem(422, str(error)) from None
        if not options["objects"]:
            raise Problem(422, "'objects' names none; leave it out to have them found")
    bases = fields.get("bases", [""])[0]
    if bases:
        if bases not in ("own", "learned", "both"):
            raise Problem(422, f"'bases' is {bases[:40]!r}; it is own, learned or both")
        if bases != "own" and not dictionary:
            raise Problem(422, "this model has learned no bases; leave 'bases' out")
        options["bases"] = bases
    return options


def wants_archive(accept: str) -> bool:
    """Tell whether a client would rather have the sounds than a description; Problem (406) for neither."""
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    if kinds & {"", "*/*", "application/*", JSON}:
        return False
    if _ZIP in kinds:
        return True
    raise Problem(406, f"the answer is {JSON} or {_ZIP}")


def preferences(header: str, config: ServiceConfig) -> float:
    """Read how many seconds a client waits (RFC 7240: `respond-async`, `wait=N`)."""
    wait_s = config.answer_within_s
    for token in header.split(","):
        name, _, value = token.strip().partition("=")
        if name.lower() == "respond-async":
            return 0.0
        if name.lower() == "wait" and value.strip('" ').isdecimal():
            wait_s = min(float(value.strip('" ')), _MAX_WAIT_S)
    return wait_s
