"""Custom losses: judged here once, run where their batches are."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tinkercloud.api.auth import Owner
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import read
from tinkercloud.engine.custom_loss import custom_loss_from, loss_id_of
from tinkercloud.engine.operations import OperationError
from tinkercloud.errors import InvalidRequest

router = APIRouter(tags=["training"])


@router.post("/create_custom_loss", openapi_extra=body_of(wire.CreateCustomLoss))
async def create_custom_loss(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Judge a traced loss. Its id holds the whole graph and is at once the future's, so nothing is stored, and the same
    loss sent again gets the same id."""
    given = await read(request, wire.CreateCustomLoss)
    session = await service.sessions.active(given.session_id, owner)
    try:
        loss = custom_loss_from(given.name, given.inputs, given.graph.nodes)
    except OperationError as error:
        raise InvalidRequest(str(error)) from None
    return {"request_id": loss_id_of(session.session_id, loss)}
