"""Searches over sessions and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

from tinkercloud.ledger.catalog import record_of
from tinkercloud.ledger.deferred import Deferred
from tinkercloud.ledger.readers import Readers
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SessionRecord
from tinkercloud.ledger.schema import checkpoints, models, sessions

BATCH = 500
"""Rows that are looked at together."""

Place = tuple[float, str]
"""(created_at, session_id): where a page ends."""


class Access(NamedTuple):
    """What somebody may look at beside their own."""

    owner: str
    project_id: str | None = None
    """Everybody's things in this project, if any."""

    def includes(self, owner: str, project_id: str | None) -> bool:
        """Whether that is a thing of this owner, in this project."""
        return owner == self.owner or (project_id is not None and project_id == self.project_id)


class Holdings(NamedTuple):
    """What is saved of a session."""

    checkpoints: int
    bytes: int


class Searches:
    """Finds what somebody may look at; only reads."""

    def __init__(self, readers: Readers, deferred: Deferred, clock: Callable[[], float]) -> None:
        self._readers = readers
        self._deferred = deferred
        self._clock = clock

    async def sessions(
        self, access: Access, wanted: Callable[[SessionRecord], bool], limit: int, behind: Place | None = None
    ) -> list[SessionRecord]:
        """Up to `limit` sessions that somebody may look at and that are wanted, newest first, behind a place in that
        order."""
        return await self._readers.read(_find_sessions, access, wanted, limit, behind)

    async def valid_checkpoints(self, owner: str, limit: int, offset: int) -> tuple[list[CheckpointRecord], int]:
        """(a page of an owner's checkpoints whose time is not over, newest first; how many there are)."""
        return await self._readers.read(_valid_checkpoints, owner, self._clock(), limit, offset)

    async def holdings(self, session_ids: Sequence[str]) -> dict[str, Holdings]:
        """What is saved of each of these sessions; those without a checkpoint are left out."""
        return await self._readers.read(_holdings, session_ids)

    async def runs_of_project(
        self, owner: str, project_id: str, limit: int, offset: int
    ) -> tuple[list[ModelRecord], int]:
        """(a page of the owner's training runs in a project, newest first; how many there are)."""
        found, total = await self._readers.read(_runs_of_project, owner, project_id, limit, offset)
        return [self._deferred.fresh(run) for run in found], total

    async def accessible_runs(
        self, access: Access, limit: int, offset: int, **fields: str
    ) -> tuple[list[ModelRecord], int]:
        """(a page of training runs, newest first; how many there are): the owner's, those in the project, and those of
        which a checkpoint is published. `fields`: the project_id or model_id that they have."""
        read = partial(_accessible_runs, **fields)
        found, total = await self._readers.read(read, access, self._clock(), limit, offset)
        return [self._deferred.fresh(run) for run in found], total

    async def accessible_sessions(self, access: Access, limit: int, offset: int) -> list[SessionRecord]:
        """A page of sessions, newest first: the owner's, and those in the project."""
        found = await self._readers.read(_accessible_sessions, access, limit, offset)
        return [self._deferred.fresh(session) for session in found]


def _find_sessions(
    connection: Connection,
    access: Access,
    wanted: Callable[[SessionRecord], bool],
    limit: int,
    behind: Place | None,
) -> list[SessionRecord]:
    found: list[SessionRecord] = []
    while True:
        where = _may_see(access)
        if behind is not None:
            time, session_id = behind
            same = and_(sessions.c.created_at == time, sessions.c.session_id < session_id)
            where = and_(where, or_(sessions.c.created_at < time, same))
        query = select(sessions).where(where).order_by(sessions.c.created_at.desc(), sessions.c.session_id.desc())
        batch = [record_of(SessionRecord, row._mapping) for row in connection.execute(query.limit(BATCH))]
        found += [session for session in batch if wanted(session)]
        if len(found) >= limit or len(batch) < BATCH:
            return found[:limit]
        behind = batch[-1].created_at, batch[-1].session_id


def _holdings(connection: Connection, session_ids: Sequence[str]) -> dict[str, Holdings]:
    query = (
        select(models.c.session_id, func.count(), func.sum(checkpoints.c.size_bytes))
        .join_from(checkpoints, models, checkpoints.c.model_id == models.c.model_id)
        .where(models.c.session_id.in_(session_ids))
        .group_by(models.c.session_id)
    )
    return {session_id: Holdings(count, int(size)) for session_id, count, size in connection.execute(query)}


def _runs_of_project(
    connection: Connection, owner: str, project_id: str, limit: int, offset: int
) -> tuple[list[ModelRecord], int]:
    where = and_(models.c.owner == owner, sessions.c.project_id == project_id)
    return _page_of_runs(connection, where, limit, offset)


def _accessible_runs(
    connection: Connection, access: Access, now: float, limit: int, offset: int, **fields: str
) -> tuple[list[ModelRecord], int]:
    published = exists().where(
        checkpoints.c.model_id == models.c.model_id,
        checkpoints.c.public,
        or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now),
    )
    where = or_(models.c.owner == access.owner, published)
    if access.project_id is not None:
        where = or_(where, sessions.c.project_id == access.project_id)
    columns = {"project_id": sessions.c.project_id, "model_id": models.c.model_id}
    where = and_(where, *(columns[name] == value for name, value in fields.items()))
    return _page_of_runs(connection, where, limit, offset)


def _page_of_runs(
    connection: Connection, where: ColumnElement[bool], limit: int, offset: int
) -> tuple[list[ModelRecord], int]:
    joined = models.join(sessions, models.c.session_id == sessions.c.session_id)
    query = select(models).select_from(joined).where(where)
    rows = connection.execute(
        query.order_by(models.c.created_at.desc(), models.c.model_id.desc()).limit(limit).offset(offset)
    )
    found = [record_of(ModelRecord, row._mapping) for row in rows]
    return found, connection.scalar(select(func.count()).select_from(joined).where(where)) or 0


def _accessible_sessions(connection: Connection, access: Access, limit: int, offset: int) -> list[SessionRecord]:
    query = (
        select(sessions).where(_may_see(access)).order_by(sessions.c.created_at.desc(), sessions.c.session_id.desc())
    )
    return [record_of(SessionRecord, row._mapping) for row in connection.execute(query.limit(limit).offset(offset))]


def _may_see(access: Access) -> ColumnElement[bool]:
    if access.project_id is None:
        return sessions.c.owner == access.owner
    return or_(sessions.c.owner == access.owner, sessions.c.project_id == access.project_id)


def _valid_checkpoints(
    connection: Connection, owner: str, now: float, limit: int, offset: int
) -> tuple[list[CheckpointRecord], int]:
    where = and_(checkpoints.c.owner == owner, or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now))
    query = select(checkpoints).where(where).order_by(checkpoints.c.created_at.desc(), checkpoints.c.path.desc())
    rows = connection.execute(query.limit(limit).offset(offset))
    found = [record_of(CheckpointRecord, row._mapping) for row in rows]
    return found, connection.scalar(select(func.count()).select_from(checkpoints).where(where)) or 0
