"""Whether the server is ready, what it serves, and where clients report to."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tinkercloud.api.dependencies import ServiceOf
from tinkercloud.api.errors import RETRY_SECONDS
from tinkercloud.api.wire.answers import Json
from tinkercloud.api.wire.reading import read_json

router = APIRouter(tags=["server"])


@router.get("/healthz", response_model=None)
async def healthz(service: ServiceOf) -> Response:
    """503 until every preloaded base model was ready once, then 200; always with the state of each engine, which says
    so when one has something to do and has come no further with it for a minute. 503 with the status "failed" when only
    a restart of the server helps."""
    engines = service.models.states()
    if broken := service.models.broken:
        detail = "; ".join(f"{served.engine.name}: {served.conductor.failure}" for served in broken)
        return Json({"status": "failed", "detail": detail, "engines": engines}, 503)
    if service.models.ready():
        return Json({"status": "ok", "engines": engines})
    detail = "base models are loading: " + ", ".join(f"{name} is {state}" for name, state in engines.items())
    return Json({"status": "loading", "detail": detail, "engines": engines}, 503, {"retry-after": str(RETRY_SECONDS)})


@router.get("/get_server_capabilities")
async def get_server_capabilities(service: ServiceOf) -> dict[str, Any]:
    """The base models that can be trained and sampled."""
    return {
        "supported_models": [
            {
                "model_name": name,
                "max_context_length": None if info is None else info.max_context,
                "trainable": True,
                "sampleable": True,
            }
            for name, info in service.models.known()
        ]
    }


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, Any]:
    """Accepts the SDK's events and keeps none of them."""
    await read_json(request)
    return {"status": "accepted"}
