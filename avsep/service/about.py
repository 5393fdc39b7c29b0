"""The routes of the service itself: its model, its state, files to try it with, and the page."""
# ruff: noqa: D103  (a route's summary says it)

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from avsep.service.answers import Example, Health, Limits, ModelInfo, ObjectInfo
from avsep.service.guard import FILES
from avsep.service.names import object_infos
from avsep.service.problems import Problem, problems
from avsep.service.service import VERSION, Service, service_of

PAGE = Path(__file__).parent / "page"
Served = Annotated[Service, Depends(service_of)]
router = APIRouter(redirect_slashes=False)


@router.get(
    "/v1/objects", response_model=list[ObjectInfo], responses=problems(503),
    summary="The objects, and which of them the model learned",
)  # fmt: skip
async def objects(service: Served) -> Any:
    card = service.card()
    return object_infos(card.vocabulary, card.learned)


@router.get("/v1/model", response_model=ModelInfo, responses=problems(503), summary="The model in use")
async def model(service: Served) -> Any:
    card = service.card()
    limits = {name: getattr(service.config, name) for name in Limits.model_fields if name != "free_bytes"}
    room = await run_in_threadpool(service.store.room)
    facts = {**dict(card), "labeller": service.store.network()}
    return ModelInfo(limits=Limits(free_bytes=room, **limits), **facts)


@router.get("/v1/examples", response_model=list[Example], summary="Files to try")
async def examples(service: Served) -> Any:
    return [Example(name=n, url=f"/v1/examples/{n}") for n in await service.examples()]


@router.get("/v1/examples/{name}", response_class=Response, responses=problems(404), summary="One of them")
async def example(name: str, service: Served) -> Response:
    files = await service.examples()
    if name not in files:
        raise Problem(404, "there is no such example")
    return FileResponse(files[name])


@router.get("/healthz", response_model=Health, summary="Whether the service works")
async def healthz(service: Served) -> Any:
    return Health(status="ok", version=VERSION, pending=service.pending, busy=service.busy)


@router.get("/metrics", response_class=Response, summary="For Prometheus")
async def metrics(service: Served) -> Response:
    text = await run_in_threadpool(service.metrics.expose)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _file(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(PAGE / name, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send


for _path, _name, _kind in FILES:
    router.add_api_route(_path, _file(_name, _kind), methods=["GET"], include_in_schema=False)
