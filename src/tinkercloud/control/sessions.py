"""Sessions: whose they are, whether their client is alive, and what happens when it is not."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from typing import Any

from tinkercloud.config import Settings
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.sampler_keeper import SamplerKeeper
from tinkercloud.control.session_query import SessionQuery
from tinkercloud.errors import Ended, NotFound
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord, SamplerRecord, SessionRecord
from tinkercloud.ledger.search import Access, Holdings

log = logging.getLogger(__name__)


class Sessions:
    """The sessions of all clients. A session without heartbeats is parked: its state goes to disk, and comes back with
    its next request."""

    def __init__(self, ledger: Ledger, models: BaseModels, keeper: SamplerKeeper, settings: Settings):
        self._ledger = ledger
        self._models = models
        self._keeper = keeper
        self._timeout = settings.session_timeout_seconds
        self._retention = settings.session_retention_seconds
        self._tracing = asyncio.Lock()
        self._leaving: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """By base model: the sessions, in the order of their silence, of which something may be in its engine that has
        to go."""

    async def create(
        self,
        *,
        owner: str,
        tags: list[str],
        user_metadata: dict[str, Any],
        sdk_version: str,
        project_id: str | None,
        display_name: str | None,
    ) -> SessionRecord:
        now = time.time()
        return await self._ledger.insert(
            SessionRecord(
                session_id=str(uuid.uuid4()),
                owner=owner,
                created_at=now,
                last_heartbeat=now,
                state="active",
                sdk_version=sdk_version,
                tags=tuple(tags),
                user_metadata=user_metadata,
                display_name=display_name,
                project_id=project_id,
            )
        )

    async def get(self, session_id: str, owner: str) -> SessionRecord:
        """NotFound if there is none; a finished one is returned too."""
        session = await self._ledger.get(SessionRecord, session_id)
        if session is None or session.owner != owner:
            raise NotFound(
                f"Session not found: {session_id}. It was made on another server or data directory, or dropped after "
                "its retention time; create a new ServiceClient, and load your last checkpoint"
            )
        return session

    async def active(self, session_id: str, owner: str) -> SessionRecord:
        """A session that can still be used. NotFound, Ended."""
        session = await self.get(session_id, owner)
        if session.state == "finished":
            raise Ended(f"Session {session_id} has finished ({session.finish_reason}); create a new ServiceClient")
        return session

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Keeps the session; brings a parked one back. Ended if it has finished."""
        session = await self.active(session_id, owner)
        await self.touch(session)

    async def touch(self, session: SessionRecord) -> None:
        """A sign of life; a parked session's state comes back with its next operation. Ended."""
        if session.state == "parked":
            await self._ledger.change(SessionRecord, session.session_id, only={"state": "parked"}, state="active")
            await self.active(session.session_id, session.owner)
        self._ledger.heartbeat(session.session_id)

    async def finish(self, session_id: str, owner: str, reason: str, detail: str | None = None) -> None:
        """The first reason wins; a repeat only does again what the first may have left undone."""
        await self._end(await self.get(session_id, owner), reason, detail)

    async def complete_ends(self) -> None:
        """At the start, before any model is served: end the runs of finished sessions, as a crash leaves them."""
        for model in await self._ledger.find(ModelRecord, state="live"):
            session = await self._ledger.get(SessionRecord, model.session_id)
            if session is not None and session.state == "finished":
                await self._models.end_runs([model])
        await self._models.complete_ends()

    async def end_if_finished(self, session_id: str) -> None:
        """End what was added to a session while it finished."""
        session = await self._ledger.get(SessionRecord, session_id)
        if session is not None and session.state == "finished":
            await self._end(session, session.finish_reason or "")

    async def accessible(self, session_id: str, access: Access) -> SessionRecord:
        """As `get`, also one of somebody else in the project that the caller's key is for."""
        session = await self._ledger.get(SessionRecord, session_id)
        if session is not None and access.includes(session.owner, session.project_id):
            return session
        return await self.get(session_id, access.owner)

    async def list_accessible(self, access: Access, limit: int, offset: int) -> list[SessionRecord]:
        """As `list`, with those of others in the project that the caller's key is for."""
        return await self._ledger.searches.accessible_sessions(access, limit, offset)

    async def list(self, owner: str, limit: int, offset: int) -> list[SessionRecord]:
        """A page of the owner's sessions, newest first."""
        return await self._ledger.find(SessionRecord, owner=owner, limit=limit, offset=offset)

    async def assign(self, session_id: str, owner: str, project_id: str) -> None:
        """Move a session, and with it its training runs and samplers, into a project. NotFound."""
        await self.get(session_id, owner)
        await self._ledger.change(SessionRecord, session_id, project_id=project_id)

    async def search(self, access: Access, query: SessionQuery) -> list[tuple[SessionRecord, Holdings]]:
        """A page of the sessions that somebody may look at and that match, newest first, each with what is saved of
        it."""
        behind = query.behind
        last = behind and await self._ledger.get(SessionRecord, behind[1])
        if last is not None and access.includes(last.owner, last.project_id):
            behind = last.created_at, last.session_id  # the client's time has microseconds only
        found = await self._ledger.searches.sessions(access, query.matches, query.limit, behind)
        saved = await self._ledger.searches.holdings([session.session_id for session in found])
        return [(session, saved.get(session.session_id, Holdings(0, 0))) for session in found]

    async def trace(self, session_id: str, owner: str) -> bytes:
        """The session's timeline as the file of a Perfetto trace. NotFound."""
        session = await self.get(session_id, owner)
        from tinkercloud.control.trace import perfetto_trace  # a third of a second, for whoever asks for one

        async with self._tracing:  # each takes seconds of a core, and memory
            moments = await self._ledger.timeline(session_id)
            return await asyncio.to_thread(perfetto_trace, session, moments, time.time())

    async def members(self, session_id: str) -> tuple[list[str], list[str]]:
        """(model ids, sampler ids) of a session."""
        models = await self._ledger.find(ModelRecord, session_id=session_id)
        samplers = await self._ledger.find(SamplerRecord, session_id=session_id)
        return [m.model_id for m in models], [s.sampler_id for s in samplers]

    async def mark_silent(self, now: float) -> None:
        """Park the sessions without a sign of life, and finish those that have been silent for the whole retention
        time; `let_go` does what follows from it. No engine is asked anything."""
        await self._ledger.forgive_downtime()  # which a full disk may have kept the start from
        for session in await self._ledger.find(SessionRecord, state="parked"):
            if session.last_heartbeat <= now - self._retention:
                reason, silent = "silent for too long", {"state": "parked"}
                ended = await self._ledger.change(
                    SessionRecord, session.session_id, only=silent, state="finished", finish_reason=reason
                )
                if ended is not None and ended.state == "finished":
                    log.info("session %s did not come back; finished", session.session_id)
                    await self._leave(session.session_id)
        for session in await self._ledger.find(SessionRecord, state="active"):
            if session.last_heartbeat > now - self._timeout:
                continue
            parked = await self._ledger.change(
                SessionRecord, session.session_id, only={"state": "active"}, state="parked"
            )
            if parked is None or parked.state != "parked":
                continue  # it has finished meanwhile
            log.info("session %s is silent; parked", session.session_id)
            await self._leave(session.session_id)

    @property
    def leaving(self) -> list[str]:
        """The base models that `let_go` has something to do for."""
        return [name for name, sessions in self._leaving.items() if sessions]

    async def let_go(self, base_model: str) -> None:
        """Free what parked sessions have in one base model's engine, with their state on disk, and end what finished
        ones have of it. What fails is tried again by the next call."""
        leaving = self._leaving[base_model]
        while leaving:
            session_id = next(iter(leaving))
            del leaving[session_id]  # before its state is read: from here on it may be put there again
            try:
                await self._let_go(session_id, base_model)
            except Exception:
                leaving[session_id] = None
                raise

    async def _leave(self, session_id: str) -> None:
        for kind in (ModelRecord, SamplerRecord):
            for record in await self._ledger.find(kind, session_id=session_id):
                self._leaving[record.base_model][session_id] = None

    async def _let_go(self, session_id: str, base_model: str) -> None:
        session = await self._ledger.get(SessionRecord, session_id)
        if session is None or session.state == "active":
            return  # it has come back meanwhile
        held = {"session_id": session_id, "base_model": base_model}
        if session.state == "finished":
            await self._end_members(**held)
            return
        if base_model in self._models:
            models = await self._ledger.find(ModelRecord, **held)
            await self._models.get(base_model).conductor.park([model.model_id for model in models])
        for sampler in await self._ledger.find(SamplerRecord, **held):
            await self._keeper.close(sampler)

    async def _end(self, session: SessionRecord, reason: str, detail: str | None = None) -> None:
        """Finish a session: its runs end and its ephemeral samplers go; named checkpoints stay. Every step may be
        repeated: a crash in between leaves the rest to the next start, or to a repeat."""
        session_id = session.session_id
        if session.state != "finished":
            ended = {"finish_reason": reason, "finish_detail": detail}
            await self._ledger.change(SessionRecord, session_id, state="finished", **ended)
        await self._end_members(session_id=session_id)

    async def _end_members(self, **which: str) -> None:
        await self._models.end_runs(await self._ledger.find(ModelRecord, state="live", **which))
        for sampler in await self._ledger.find(SamplerRecord, **which):
            await self._keeper.end(sampler)
