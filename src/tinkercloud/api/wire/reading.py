"""A request's body as one of the JSON forms, or a sentence that names what is wrong with it."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from tinkercloud.api.wire.body import Unreadable, find_address, off_loop, read_body
from tinkercloud.errors import InvalidRequest

W = TypeVar("W", bound=BaseModel)


async def read_json(request: Request) -> dict[str, Any]:
    """The body's JSON object. Raises `Unreadable`."""
    body = await read_body(request)
    given = await off_loop(len(body), json_object, body)
    if hasattr(request.state, "event"):  # the audit log says what it was about
        request.state.given = given
    return given


_FORWARD_ONLY = re.compile(rb'"forward_only"\s*:\s*true\b')


def json_object(body: bytes) -> dict[str, Any]:
    """What a body says. Raises `Unreadable`."""
    try:
        value = from_json(body or b"{}", allow_inf_nan=False)
    except ValueError as error:
        raise _unreadable(body, f"the body is not JSON: {error}") from None
    if b"\\u0000" in body and _has_nul(value):  # which PostgreSQL cannot store
        raise _unreadable(body, "a text in the body has the character NUL (\\u0000); send it without")
    if not isinstance(value, dict):
        raise Unreadable(f"the body must be a JSON object, not {type(value).__name__}", None)
    return value


def _unreadable(body: bytes, why: str) -> Unreadable:
    address = find_address(body[:4096], body[-4096:], protobuf=False)
    return Unreadable(why, address, forward_only=_FORWARD_ONLY.search(body) is not None)


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any("\0" in name or _has_nul(inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(map(_has_nul, value))
    return isinstance(value, str) and "\0" in value


def as_request(kind: type[W], value: dict[str, Any]) -> W:
    """A JSON object as one of the forms in `wire/json.py`. Raises InvalidRequest, naming each field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False, include_context=False)[:5]:
            place = ".".join(str(part) for part in problem["loc"])
            given = "" if problem["type"] in ("missing", "value_error") else f" (it is {problem['input']!r:.80})"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "float_type" and problem["input"] is None:
                message, given = "must be a finite number (it is null, which is how JSON writes NaN and infinity)", ""
            problems.append(f"{place}: {message}{given}" if place else f"{message}{given}")
        raise InvalidRequest("; ".join(problems)) from None


async def read(request: Request, kind: type[W]) -> W:
    """The body as one of the forms in `wire/json.py`. Raises InvalidRequest."""
    return as_request(kind, await read_json(request))
