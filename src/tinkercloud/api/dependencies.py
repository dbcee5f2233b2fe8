"""What every route is given: the service behind the API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Query, Request

from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.json import Wire
from tinkercloud.control.service import Service


async def _service_of(request: Request) -> Service:
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(_service_of)]


def body_of(kind: type[Wire], *also: str) -> dict[str, Any]:
    """A route's `openapi_extra`: its JSON body, and other content types that it takes.

    Bodies are read by hand, so that a request that cannot be decoded still uses up its seq_id.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    content |= {media: {"schema": {"type": "string", "format": "binary"}} for media in also}
    return {"requestBody": {"required": True, "content": content}}


def fields_of(route: Any) -> set[str]:
    """Those that a route's JSON body has, by `body_of`."""
    extra = getattr(route, "openapi_extra", None) or {}
    content = extra.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return set()
    kind: type[Wire] = getattr(wire, content["schema"]["$ref"].rpartition("/")[2])
    return set(kind.model_fields)


Limit = Annotated[int, Query(ge=1, le=1000, description="The most items to return.")]
Offset = Annotated[int, Query(ge=0, lt=2**31, description="How many items to skip.")]
