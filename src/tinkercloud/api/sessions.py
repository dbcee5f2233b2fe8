"""Sessions: what a client opens once, keeps alive with heartbeats, and finishes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api.audit import Event, note
from tinkercloud.api.auth import AccessScope, Owner, access_of, caller_of, project_for
from tinkercloud.api.dependencies import Limit, Offset, ServiceOf, body_of
from tinkercloud.api.downloads import link
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.answers import iso, text_metadata
from tinkercloud.api.wire.reading import read
from tinkercloud.control.session_query import SessionQuery, status_of
from tinkercloud.ledger.records import SessionRecord
from tinkercloud.ledger.search import Access, Holdings

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
    await service.sessions.finish(session_id, owner, given.reason.type, given.detail)
    return {"type": "finish_session"}


@router.put(
    "/sessions/{session_id}/project",
    status_code=204,
    openapi_extra=body_of(wire.AssignProject),
    dependencies=[Depends(Event("project_session_assign"))],
)
async def assign_project(session_id: str, request: Request, service: ServiceOf, owner: Owner) -> None:
    """Move a session, and with it its training runs and samplers, into a project."""
    given = await read(request, wire.AssignProject)
    await service.sessions.assign(session_id, owner, project_for(caller_of(request), given.project_id))


@router.post("/sessions/search", openapi_extra=body_of(wire.SearchSessions))
async def search_sessions(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A page of the sessions that match, newest first. `next_cursor` is null on the last one."""
    given = await read(request, wire.SearchSessions)
    if given.owner.type == "user" and owner not in (given.owner.owner_urns or ()):
        return {"sessions": [], "next_cursor": None}
    access = access_of(caller_of(request)) if given.owner.type == "accessible" else Access(owner)
    found = await service.sessions.search(access, _query(given))
    cursor = None
    if len(found) > given.limit:
        found = found[: given.limit]
        last, _ = found[-1]
        cursor = {"last_created_at": iso(last.created_at), "last_session_id": last.session_id}
    return {"sessions": [_summary(*item) for item in found], "next_cursor": cursor}


def _query(given: wire.SearchSessions) -> SessionQuery:
    behind = None
    if given.cursor is not None:
        behind = given.cursor.last_created_at.timestamp(), given.cursor.last_session_id
    statuses = None
    if given.statuses is not None:  # no session fails here: one goes on after whatever failed in it
        asked = [status for status in given.statuses if status.type != "failed"]
        statuses = tuple((status.type, None if status.reasons is None else tuple(status.reasons)) for status in asked)
    return SessionQuery(
        session_id=given.session_id,
        display_name=given.display_name,
        project_ids=None if given.project_ids is None else tuple(given.project_ids),
        user_metadata=given.user_metadata,
        statuses=statuses,
        limit=given.limit + 1,  # whether there is another page
        behind=behind,
    )


def _summary(session: SessionRecord, saved: Holdings) -> dict[str, Any]:
    """The SDK's `SessionSummary`."""
    return {
        "session_id": session.session_id,
        "created_at": iso(session.created_at),
        "owner": session.owner,
        "project_id": session.project_id or "",
        "status": _status(session),
        "checkpoints_count": saved.checkpoints,
        "display_name": session.display_name,
        "user_metadata": text_metadata(session.user_metadata),
        "checkpoint_storage_bytes": saved.bytes,
    }


def _status(session: SessionRecord) -> dict[str, Any] | None:
    match status_of(session):
        case "active":
            return {"type": "active"}
        case "client_finished":
            return {
                "type": "client_finished",
                "reason": {"type": session.finish_reason},
                "detail": session.finish_detail,
            }
        case "cancelled":
            return {"type": "cancelled", "detail": session.finish_reason}
        case _:
            return None


@router.get("/sessions")
async def list_sessions(
    request: Request,
    service: ServiceOf,
    owner: Owner,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    """Ids of the owner's sessions, newest first; `accessible` are also those of others in the project of the key."""
    if access_scope == "owned":
        sessions = await service.sessions.list(owner, limit, offset)
    else:
        sessions = await service.sessions.list_accessible(access_of(caller_of(request)), limit, offset)
    return {"sessions": [session.session_id for session in sessions]}


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(session_id: str, request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A link to the session's timeline as a Perfetto trace: what waited, what ran, in which cycles and steps. The trace
    is made when the link is followed, so that it is as new as can be."""
    await service.sessions.get(session_id, owner)
    url, _ = link(request, f"{session_id}.pftrace", {"session": session_id})
    return {"status": "ready", "url": url, "error": None}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, request: Request, service: ServiceOf, owner: Owner, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    """A session's training runs and samplers."""
    if access_scope == "owned":
        session = await service.sessions.get(session_id, owner)
    else:
        session = await service.sessions.accessible(session_id, access_of(caller_of(request)))
    models, samplers = await service.sessions.members(session_id)
    return {
        "training_run_ids": models,
        "sampler_ids": samplers,
        "user_metadata": text_metadata(session.user_metadata),
        "display_name": session.display_name,
    }
