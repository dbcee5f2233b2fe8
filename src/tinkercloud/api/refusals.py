"""A refused operation of a training run uses up its seq_id: the SDK goes on with the next one.

A refusal that comes ahead of an earlier operation is not answered with an error, but as an accepted operation whose
future fails. The SDK sends chunks 2 to n of a batch before the first one; told of an error, it would never send that
first chunk, and wait for ever for its turn to send anything else. And the repeat of an operation that was accepted gets
that one's future, also if it would be refused by now, such as a load whose checkpoint has gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response

from tinkercloud.api.audit import leave_out
from tinkercloud.api.wire.answers import Json
from tinkercloud.api.wire.body import Unreadable
from tinkercloud.api.wire.reading import read_json
from tinkercloud.control.runs import AHEAD
from tinkercloud.control.service import Service
from tinkercloud.engine.results import Failure
from tinkercloud.errors import Forbidden, InvalidRequest, NotFound
from tinkercloud.ledger.records import Entry, ModelRecord

PERMANENT = (InvalidRequest, Forbidden, NotFound)
"""Errors that a repeat of the request would meet again."""


class AnsweredByFuture(Exception):
    """A request is refused, but its answer is a future: that of a refusal ahead, which fails, or the first one's."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.request_id)
        self.is_refusal = AHEAD in entry.details
        self.future = {"request_id": entry.request_id, "model_id": entry.stream}


def install(app: FastAPI) -> None:
    """Give the app its answer to refusals that come ahead."""
    app.add_exception_handler(AnsweredByFuture, _future)  # type: ignore[arg-type]


def _future(request: Request, error: AnsweredByFuture) -> Response:
    if error.is_refusal:
        leave_out(request)
    return Json(error.future)


@asynccontextmanager
async def recorded(service: Service, model: ModelRecord, seq_id: int | None, kind: str) -> AsyncIterator[None]:
    """Around the reading and submitting of an operation: let a cycle know that it comes, and record a permanent error
    as a refusal at its seq_id, and pass it on, or raise AnsweredByFuture."""
    try:
        with service.runs.arriving(model):
            yield
    except PERMANENT as error:
        await _refuse(service, model, seq_id, kind, error)
        raise


async def _refuse(service: Service, model: ModelRecord, seq_id: int | None, kind: str, error: Exception) -> None:
    entry = await service.runs.refuse(model, seq_id, kind, str(error))
    if entry is None:
        return
    was_accepted = entry.repeated and entry.state != "refused" and entry.kind == kind
    if was_accepted or AHEAD in entry.details:
        raise AnsweredByFuture(entry) from None


async def read_operation(request: Request, service: Service, owner: str, kind: str) -> dict[str, Any]:
    """The JSON body of an operation. One that cannot be decoded is a refusal too, if it still says whose it was."""
    try:
        return await read_json(request)
    except Unreadable as error:
        await record_unreadable(service, owner, kind, error)
        raise


async def record_unreadable(service: Service, owner: str, kind: str, error: Unreadable) -> None:
    """Record the refusal of a body that could not be decoded, if there is a log that could wait for it."""
    if error.address is None:
        return
    model_id, seq_id = error.address
    if kind == "forward_backward" and error.forward_only:
        kind = "forward"
    with suppress(NotFound):
        await _refuse(service, await service.runs.live(model_id, owner), seq_id, kind, error)


async def accepted(service: Service, owner: str, entry: Entry, kind: str) -> dict[str, Any]:
    """The SDK's untyped future of an operation. InvalidRequest if its seq_id was refused before, or was another's."""
    if AHEAD in entry.details:
        raise AnsweredByFuture(entry)
    if entry.state == "refused":
        _, outcome = await service.futures.outcome(entry.request_id, owner, 0)
        raise InvalidRequest(outcome.error if isinstance(outcome, Failure) else "this operation was refused before")
    if entry.kind != kind:
        raise InvalidRequest(f"seq_id {entry.seq_id} of {entry.stream} was a {entry.kind} before; send the next one")
    return {"request_id": entry.request_id, "model_id": entry.stream}
