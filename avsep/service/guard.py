"""Headers, limits and addresses that every request passes."""

from __future__ import annotations

import asyncio
import hmac
import time

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avsep.service.problems import problem
from avsep.service.service import Service

_BODY_SLACK = 1 << 20  # of a multipart body, beside its file

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
FILES = (
    ("/", "index.html", "text/html"),
    ("/docs", "docs.html", "text/html"),
    ("/static/page.js", "page.js", "text/javascript"),
    ("/static/locate.js", "locate.js", "text/javascript"),
    ("/static/mix.js", "mix.js", "text/javascript"),
    ("/static/edit.js", "edit.js", "text/javascript"),
    ("/static/docs.js", "docs.js", "text/javascript"),
    ("/static/page.css", "page.css", "text/css"),
    ("/static/icon.svg", "icon.svg", "image/svg+xml"),
)
_OPEN = {"/healthz", *(path for path, *_ in FILES)}  # without a token: they tell nothing


class Guard:
    """Around everything: the token, other sites' requests, declared lengths, headers, counts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # whoever asked leaves the body out

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                extra = HEADERS if b"cache-control" in present else {**HEADERS, "cache-control": "no-store"}
                if (status >= 400 and unbounded) or status in (408, 429):
                    extra = {**extra, "connection": "close"}  # else the rest of the body would be waited for
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in present),
                ]
            await send(message)

        request = Request(scope)
        unbounded = "transfer-encoding" in request.headers
        try:
            refused = self._refuse(request)
            await (refused or self._app)(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = 499  # the client is gone
            raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "PATCH", "DELETE") else "other"
            self._service.metrics.requests.labels(method, path, str(status)).inc()
            self._service.metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _refuse(self, request: Request) -> ASGIApp | None:
        config = self._service.config
        if config.token and request.scope["path"] not in _OPEN:  # not the URL's: a Host header is in that
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), config.token.encode()):
                return problem(401, "send the service's token as 'Authorization: Bearer …'",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if request.method not in ("GET", "HEAD") and request.headers.get("sec-fetch-site") == "cross-site":
            return problem(403, "other sites' pages may not use this service")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal():
            return problem(400, "the content length is no number")
        if int(length[:20]) > config.max_upload_bytes + _BODY_SLACK:
            return problem(413, f"the body may have {config.max_upload_bytes} bytes", headers={"Connection": "close"})
        return None
