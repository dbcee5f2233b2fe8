"""Sessions: what a client opens once, keeps alive with heartbeats, and finishes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api.audit import Event, note
from tinkercloud.api.auth import Owner, caller_of, project_for
from tinkercloud.api.dependencies import Limit, Offset, ServiceOf, body_of
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.answers import text_metadata
from tinkercloud.api.wire.reading import read

router = APIRouter(tags=["sessions"])


@router.post(
    "/create_session", openapi_extra=body_of(wire.CreateSession), dependencies=[Depends(Event("session_create"))]
)
async def create_session(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Open a session; training runs and samplers live in one."""
    given = await read(request, wire.CreateSession)
    session = await service.sessions.create(
        owner=owner,
        tags=given.tags,
        user_metadata=given.user_metadata or {},
        sdk_version=given.sdk_version,
        project_id=project_for(caller_of(request), given.project_id),
        display_name=given.display_name,
    )
    note(request, session_id=session.session_id)
    return {"type": "create_session", "session_id": session.session_id}


@router.post("/session_heartbeat", openapi_extra=body_of(wire.SessionHeartbeat))
async def session_heartbeat(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Keep a session; a parked one comes back. 410 if it has finished."""
    given = await read(request, wire.SessionHeartbeat)
    await service.sessions.heartbeat(given.session_id, owner)
    return {"type": "session_heartbeat"}


@router.post(
    "/sessions/{session_id}/finish",
    openapi_extra=body_of(wire.FinishSession),
    dependencies=[Depends(Event("session_finish"))],
)
async def finish_session(session_id: str, request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """End a session for good; the first reason stays."""
    given = await read(request, wire.FinishSession)
    await service.sessions.finish(session_id, owner, given.reason.type)
    return {"type": "finish_session"}


@router.get("/sessions")
async def list_sessions(service: ServiceOf, owner: Owner, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
    """Ids of the owner's sessions, newest first."""
    sessions = await service.sessions.list(owner, limit, offset)
    return {"sessions": [session.session_id for session in sessions]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A session's training runs and samplers."""
    session = await service.sessions.get(session_id, owner)
    models, samplers = await service.sessions.members(session_id)
    return {
        "training_run_ids": models,
        "sampler_ids": samplers,
        "user_metadata": text_metadata(session.user_metadata),
        "display_name": session.display_name,
    }
