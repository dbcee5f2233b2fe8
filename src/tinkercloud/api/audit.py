"""Who did what: what a route says of itself is on disk before its caller is told that it happened."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkercloud.api.auth import Caller, require_operator
from tinkercloud.api.dependencies import ServiceOf, fields_of
from tinkercloud.api.errors import refused
from tinkercloud.api.wire.answers import iso
from tinkercloud.errors import RequestError
from tinkercloud.ledger.records import AuditRecord, AuditResource

router = APIRouter(tags=["administration"])

FIELDS = (
    "session_id",
    "model_id",
    "sampling_session_id",
    "path",
    "tinker_path",
    "source_path",
    "model_path",
    "base_model",
    "name",
    "folder",
    "project_id",
    "destination_project_id",
    "ttl_seconds",
)
"""What of a request's body says what it was about."""

MAX_CHARACTERS = 300
"""Of a text that is recorded: names and paths that mean something are shorter."""

DAY_SECONDS = 86400.0


class Event:
    """For a route's `dependencies`: `<resource>_<action>`, as in the SDK's `AuditLogEntry`, which the route is when it
    succeeds."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, request: Request) -> None:
        request.state.event, request.state.about = self.name, {}


def note(request: Request, **about: Any) -> None:
    """What the event was about, where the request's body does not say it."""
    request.state.about |= about


def leave_out(request: Request) -> None:
    """This time it is not worth recording."""
    if hasattr(request.state, "event"):
        del request.state.event


class Audit:
    """Records the events that routes have named and that succeeded, before they are answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def record_first(message: Message) -> None:
            if message["type"] == "http.response.start" and "event" in state and message["status"] < 400:
                try:
                    await scope["app"].state.service.audit(_record(scope, state))
                except RequestError as error:  # a full disk: the caller is not told that it happened, and asks again
                    state["unrecorded"] = True
                    await refused(Request(scope), error)(scope, receive, send)
            if "unrecorded" not in state:
                await send(message)

        await self._app(scope, receive, record_first)


def _record(scope: Scope, state: dict[str, Any]) -> AuditRecord:
    caller: Caller = state["caller"]
    given, known = state.get("given", {}), fields_of(scope.get("route"))
    about = {name: given[name] for name in FIELDS if name in known and name in given}
    about |= scope.get("path_params", {}) | state["about"] | {"user": caller.owner}
    about = {name: short for name, value in about.items() if (short := _short(value)) is not None}
    event: str = state["event"]
    key_id = None if caller.key is None else caller.key.key_id
    return AuditRecord(time.time(), caller.owner, key_id, event, resource_of(event), about)


def _short(value: Any) -> str | float | None:
    """A text, of a long one its beginning, or a number; None for anything else."""
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARACTERS else f"{value[: MAX_CHARACTERS - 1]}…"
    return value if isinstance(value, int | float) and abs(value) < 2**63 else None


def resource_of(event: str) -> AuditResource:
    """What the SDK's event types call it; sessions, keys and base models are the organization's."""
    kinds: dict[str, AuditResource] = {"checkpoint": "checkpoints", "project": "projects"}
    return kinds.get(event.partition("_")[0], "organizations")


@router.get("/audit", dependencies=[Depends(require_operator)])
async def get_audit_log(
    service: ServiceOf,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> dict[str, Any]:
    """What users and operators have done on a day (UTC), today by default. For operators."""
    start = datetime.combine(day or datetime.now(UTC).date(), datetime.min.time(), UTC)
    found = await service.events(start.timestamp(), start.timestamp() + DAY_SECONDS)
    return {"entries": [_entry(record) for record in found if event_type in ("all", record.resource)]}


def _entry(record: AuditRecord) -> dict[str, Any]:
    """The SDK's `AuditLogEntry`."""
    details = {"actor": record.actor, "key_id": record.key_id} | record.details
    paths = [details.get(name) for name in ("tinker_path", "path", "source_path", "model_path")]
    of_checkpoint = record.resource == "checkpoints"
    return {
        "timestamp": iso(record.at),
        "event": record.event,
        "event_details": details,
        "model_id": details.get("model_id") if of_checkpoint else None,
        "tinker_path": next((p for p in paths if p and str(p).startswith("tinker://")), None)
        if of_checkpoint
        else None,
        "purpose": None,
    }


def event_of(route: Any) -> str | None:
    """The event that a route names; None if it names none."""
    named = (dependency.dependency for dependency in getattr(route, "dependencies", ()))
    return next((event.name for event in named if isinstance(event, Event)), None)
