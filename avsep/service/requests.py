"""What a request asks for."""

from __future__ import annotations

import http
from datetime import UTC, datetime
from typing import Any

from avsep.fetching import sources
from avsep.outputs import FORMATS, MIXTURE, lacks
from avsep.separation import REST
from avsep.service.answers import Audio, Card, Job, Mixes, ProblemBody, Relation, Result, SeparatedObject
from avsep.service.config import ServiceConfig
from avsep.service.names import find_objects
from avsep.service.problems import AUDIO, JSON, Problem
from avsep.service.state import Options, Outcome, State
from avsep.service.window import TRACKS

_MAX_WAIT_S = 60.0
_ZIP = "application/zip"


def describe(job: State, ttl_s: float) -> Job:
    """Turn a job's state into what clients get: links in place of files, nothing of the server."""
    error = job.error
    return Job(
        id=job.id,
        status=job.status,
        stage=job.stage,
        progress=job.progress,
        created=datetime.fromtimestamp(job.created, UTC),
        expires=datetime.fromtimestamp(job.finished + ttl_s, UTC) if job.finished else None,
        error=None if error is None else ProblemBody(
            title=http.HTTPStatus(error.status).phrase, status=error.status, detail=error.detail,
            reason=error.reason or None, cause=error.cause or None,
        ),
        result=_result(job, job.result) if job.result else None,
    )  # fmt: skip


def _result(job: State, found: Outcome) -> Result:
    base = f"/v1/separations/{job.id}"

    def audio(track: str) -> Audio:
        return Audio(**{kind: f"{base}/{TRACKS}/{track}.{kind}" for kind in kinds})

    tracks = job.options.tracks(o.name for o in found.objects)
    kinds = [kind for kind in AUDIO if not lacks(kind, found.sample_rate, found.channels)]
    return Result(
        objects=[
            SeparatedObject(audio=audio(tracks[o.name]) if o.name in tracks else None, **o.model_dump())
            for o in found.objects
        ],
        rest=audio(tracks[REST]),
        mixture=audio(MIXTURE),
        format=job.options.format,
        two_stems=job.options.two_stems or "",
        mix=Mixes(sound=f"{base}/mix", video=f"{base}/mix.{found.video}" if found.video else None),
        relation=Relation(data=f"{base}/relation", png=f"{base}/relation.png") if found.explained else None,
        edits=f"{base}/edits" if found.editable else None,
        edited=found.edits is not None,
        frame=f"{base}/frame.png" if found.has_image else None,
        locations=f"{base}/locations" if found.located else None,
        archive=f"{base}/archive.zip",
        **found.model_dump(
            exclude={
                *("objects", "has_image", "located", "explained", "video"),
                *("editable", "edited", "edits", "first"),
            }
        ),
    )


def parse_options(fields: dict[str, list[str]], *, has_file: bool, urls: bool, card: Card) -> Options:
    """Check a request's fields against what the service allows and the model has; Problem says what is wrong."""
    known = {"url", "objects", "bases", "format", "mono", "two_stems"}
    for name, values in fields.items():
        if name not in known:
            raise Problem(422, f"unknown field {name[:40]!r}; there are file, {', '.join(sorted(known))}")
        if len(values) > 1 and name != "objects":
            raise Problem(422, f"the field {name!r} is there {len(values)} times")
    url = fields.get("url", [""])[0].strip()
    if has_file == bool(url):
        raise Problem(422, "send either a 'file' or a 'url'" if url else "send a video or sound as the field 'file'")
    if url and not urls:
        raise Problem(403, "this service takes files only, no URLs")
    if url and not sources.is_fetched(url):
        raise Problem(422, f"a 'url' is {sources.forms()}")
    objects = _objects(fields["objects"], card) if "objects" in fields else None
    return Options(
        url=url or None,
        objects=objects,
        bases=_bases(fields.get("bases", [""])[0], card),
        format=check_format(fields.get("format", ["wav"])[0]),
        mono=_mono(fields.get("mono", ["false"])[0]),
        two_stems=_one(fields["two_stems"][0], card) if "two_stems" in fields else None,
    )


def check_format(format: str) -> Any:
    """Return a format of sounds; Problem (422) for what is none."""
    if format not in FORMATS:
        raise Problem(422, f"'format' is {format[:40]!r}; it is wav, flac or mp3")
    return format


def _mono(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise Problem(422, f"'mono' is {text[:40]!r}; it is true or false")
    return text.lower() in ("true", "1")


def _one(name: str, card: Card) -> str:
    """Find the one object of two stems."""
    try:
        found = find_objects([name], card.vocabulary)
    except ValueError as error:
        raise Problem(422, str(error)) from None
    if not found:
        raise Problem(422, "'two_stems' names no object; leave it out for a sound of each")
    return found[0]


def _objects(values: list[str], card: Card) -> tuple[str, ...]:
    try:
        objects = find_objects([n for value in values for n in value.split(",")], card.vocabulary)
    except ValueError as error:
        raise Problem(422, str(error)) from None
    if not objects:
        raise Problem(422, "'objects' names none; leave it out to have them found")
    return tuple(objects)


def _bases(bases: str, card: Card) -> Any:
    if not bases:
        return None
    if bases not in ("own", "learned", "both"):
        raise Problem(422, f"'bases' is {bases[:40]!r}; it is own, learned or both")
    if card.bases is None:
        raise Problem(422, "this model works without bases; leave 'bases' out")
    if bases != "own" and not card.dictionary:
        raise Problem(422, "this model has learned no bases; leave 'bases' out")
    return bases


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
