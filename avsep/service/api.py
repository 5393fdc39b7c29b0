"""The service's HTTP API and page, as a FastAPI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from avsep.service import about, separations
from avsep.service.failures import as_failure
from avsep.service.guard import Guard
from avsep.service.problems import Problem, problem
from avsep.service.results import NoSuchJob, StoreFull
from avsep.service.service import VERSION, Service, log
from avsep.service.uploads import BadUpload


def make_app(service: Service) -> FastAPI:
    """Build the application that answers for a service."""
    app = FastAPI(
        title="avsep",
        version=VERSION,
        description="Separate a video's sound into its objects.",
        docs_url=None,  # FastAPI's own loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.add_middleware(Guard, service=service)
    app.include_router(separations.router)
    app.include_router(about.router)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    for job_id in service.store.unfinished():  # of an ingress that died
        service.start(job_id)
    sweeper = asyncio.create_task(service.sweep_forever())
    yield
    sweeper.cancel()


async def _problem(_: Request, error: Problem) -> Response:
    return error.response()


async def _no_such_job(_: Request, __: NoSuchJob) -> Response:
    return problem(404, "there is no such separation; it may have expired")


async def _http(_: Request, error: HTTPException) -> Response:
    return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _any(request: Request, error: Exception) -> Response:
    failure = as_failure(error)
    if failure.status == 500 and isinstance(error, OSError):  # others reach the server, which logs them
        log.error("%s %r", request.method, request.scope["path"], exc_info=error)
    return Problem.of(failure).response()


_HANDLERS: dict[type[Exception], Any] = {
    Problem: _problem,
    NoSuchJob: _no_such_job,
    HTTPException: _http,
    RequestValidationError: _invalid,
    BadUpload: _any,
    OSError: _any,
    StoreFull: _any,
    Exception: _any,
}
