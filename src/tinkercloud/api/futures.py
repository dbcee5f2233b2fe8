"""Futures: how clients wait for results."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tinkercloud.api.auth import Owner
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.answers import Json
from tinkercloud.api.wire.body import PROTOBUF, off_loop
from tinkercloud.api.wire.reading import read
from tinkercloud.api.wire.results import answer
from tinkercloud.engine.custom_loss import is_loss_id
from tinkercloud.engine.results import Failure

router = APIRouter(tags=["futures"])

COMPLETIONS_SECONDS = 25
"""How long retrieve_futures waits where the client leaves it open; the SDK's own limit is 45 s."""


@router.post("/retrieve_future", openapi_extra=body_of(wire.RetrieveFuture), response_model=None)
async def retrieve_future(request: Request, service: ServiceOf, owner: Owner) -> Response:
    """The result of a request. Held while there is none, then 408 with `{"type": "try_again"}`: ask again at once.
    Its `queue_state` is `paused_capacity`, with the reason, while the request's base model is not served, and for a
    sample that has not begun because others run.

    A failure is 200 with `{"error", "category"}`. With `allow_metadata_only` a large result is announced by its size
    first. Results of samples, forward and forward_backward are protobuf if `Accept` says so, else everything is JSON.
    """
    given = await read(request, wire.RetrieveFuture)
    if is_loss_id(given.request_id):
        return Json({"type": "create_custom_loss", "loss_id": given.request_id})
    settings = request.app.state.settings
    entry, outcome = await service.futures.outcome(given.request_id, owner, settings.poll_seconds)
    if outcome is None:
        why = await service.futures.paused(entry)
        again = {"type": "try_again", "request_id": given.request_id, "queue_state": "active"}
        if why is not None:
            again |= {"queue_state": "paused_capacity", "queue_state_reason": why}
        return Json(again, 408)
    size = entry.result_bytes
    if given.allow_metadata_only and size > settings.inline_result_bytes and not isinstance(outcome, Failure):
        return Json({"status": "complete_metadata", "response_payload_size": size})
    protobuf = PROTOBUF in request.headers.get("accept", "")
    return await off_loop(size, answer, outcome, protobuf)


@router.post("/retrieve_futures", openapi_extra=body_of(wire.RetrieveFutures))
async def retrieve_futures(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Which samples of one client of a sampler have ended since a cursor; waits for the first, `timeout` 0 for none
    (but up to 2 s where `retrieved_request_ids` lacks the newest sample that the client was told of).

    Results in `retrieved_request_ids` have reached the client and are dropped soon.
    """
    given = await read(request, wire.RetrieveFutures)
    sampler = await service.samplers.get(given.target.sampling_session_id, owner)
    client, cursor = given.target.cloned_sampler_id, given.prev_cursor
    seconds = COMPLETIONS_SECONDS if given.timeout is None else min(max(given.timeout, 0), COMPLETIONS_SECONDS)
    ended = await service.futures.completions(sampler, client, cursor, given.retrieved_request_ids, seconds)
    completions = [
        {"state": "failed", "request_id": entry.request_id}
        if entry.state != "done"
        else {
            "state": "finished",
            "request_id": entry.request_id,
            "response_payload_uncompressed_size": entry.result_bytes,
        }
        for entry in ended
    ]
    return {"completions": completions, "cursor": ended[-1].completion if ended else cursor}


@router.post("/cancel_future", openapi_extra=body_of(wire.CancelFuture))
async def cancel_future(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Stop a sample that nobody waits for any more."""
    given = await read(request, wire.CancelFuture)
    await service.samplers.cancel(given.request_id, owner)
    return {"type": "cancel_future"}
