"""Every error as an HTTP answer: a status that the SDK does not retry for nothing, and `{"detail": a sentence}`.

The SDK retries 402, 408, 409, 429 and 5xx for minutes to an hour, so a permanent error is never one of those.
"""

from __future__ import annotations

import logging
import time
import uuid

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkercloud.api.wire.answers import Json
from tinkercloud.errors import (
    Ended,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    Unauthorized,
    Unavailable,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 1
"""What `retry-after` says where waiting helps."""


class TooLarge(InvalidRequest):
    """The body is larger than the server takes (413)."""


STATUSES: dict[type[RequestError], int] = {
    TooLarge: 413,
    InvalidRequest: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Ended: 410,
    Overloaded: 429,
    Unavailable: 503,
}


def refused(request: Request, error: RequestError) -> Response:
    """The answer to a request that cannot be served."""
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    headers = {"retry-after": str(getattr(error, "retry_seconds", RETRY_SECONDS))} if status in (429, 503) else None
    if isinstance(error, Unauthorized):
        # The SDK takes a new token, and repeats the request, only where it is told so (RFC 6750).
        wrong = ', error="invalid_token"' if error.invalid_token else ""
        headers = {"www-authenticate": f'Bearer realm="tinkercloud"{wrong}'}
    return Json({"detail": str(error)}, status, headers)


def _unroutable(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code in (404, 405):
        detail = (
            f"there is no {request.method} {request.url.path} here; this is a tinkercloud server, and /docs on it has "
            "all that it serves"
        )
    return Json({"detail": detail}, error.status_code, error.headers)


def _bad_parameters(request: Request, error: RequestValidationError) -> Response:
    problems = (f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']} (it is {p['input']!r:.80})" for p in error.errors())
    return Json({"detail": "; ".join(problems)}, 422)


async def drain(receive: Receive) -> None:
    """Read what is left of a body and keep nothing of it: a sender that is not through does not read the answer."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass


class Guard:
    """The outermost layer: one DEBUG line for each request, and for a crash a 500 that names its place in the log.

    Pure ASGI, so that a held poll costs no task of its own, and without anything that could fail on the error's
    content.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception:
            request_id = uuid.uuid4().hex
            log.exception("%s %s crashed; request %s", scope["method"], scope["path"], request_id)
            if status:
                raise
            detail = f"the server failed on this request; its log has the reason under {request_id}"
            await Json({"detail": detail, "request_id": request_id}, 500)(scope, receive, watch)
        if log.isEnabledFor(logging.DEBUG):
            milliseconds = 1000 * (time.perf_counter() - started)
            log.debug("%s %s %d in %.1f ms", scope["method"], scope["path"], status, milliseconds)


def install(app: FastAPI) -> None:
    """Give the app its error answers."""
    app.add_exception_handler(RequestError, refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _unroutable)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _bad_parameters)  # type: ignore[arg-type]
