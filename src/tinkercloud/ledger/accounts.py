"""What owners have had computed and what they have: what bills and limits are made from."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, and_, func, or_, select, union_all

from tinkercloud.ledger import stored, usage
from tinkercloud.ledger.readers import Readers
from tinkercloud.ledger.records import Usage
from tinkercloud.ledger.schema import IS_ACCEPTED, checkpoints, entries, models, samplers, sessions


class Accounts:
    """Questions about owners. Only reads; `sampled` is counted by the ledger."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.sampled: Counter[str] = Counter()
        """Tokens that were drawn for each owner since the start: what `tokens_since` finds has them too."""

    async def usage(self, start: float, end: float, owner: str | None = None) -> list[Usage]:
        """What was computed in the hours that begin in [start, end), for one owner or for all, oldest first."""
        return await self._readers.read(usage.find, owner, start, end)

    async def lives(self, owner: str, start: float, end: float) -> list[stored.Life]:
        """The checkpoints of an owner that were stored at some time in [start, end)."""
        return await self._readers.read(stored.lives, owner, start, end)

    async def tokens_since(self, start: float, owner: str) -> int:
        """All tokens that were computed for an owner in the hours that begin at `start` or later."""
        return await self._readers.read(usage.total, owner, start)

    async def pending_tokens(self, owner: str) -> int:
        """Tokens of an owner's operations that were accepted and have not ended; of samples, those of the prompts."""
        return await self._readers.read(_pending_tokens, owner)

    async def live_models(self, owner: str) -> int:
        """How many training runs of an owner have not ended, in sessions that are alive."""
        return await self._readers.read(_live_models, owner)

    async def stored_bytes(self, owner: str, now: float) -> tuple[int, float | None]:
        """(bytes of an owner's checkpoints; when the next of them expires)."""
        return await self._readers.read(_stored_bytes, owner, now)


def _pending_tokens(connection: Connection, owner: str) -> int:
    streams = union_all(
        select(models.c.model_id).where(models.c.owner == owner),
        select(samplers.c.sampler_id).where(samplers.c.owner == owner),
    )
    where = and_(entries.c.stream.in_(streams), IS_ACCEPTED)
    return int(connection.scalar(select(func.coalesce(func.sum(entries.c.num_tokens), 0)).where(where)) or 0)


def _live_models(connection: Connection, owner: str) -> int:
    where = and_(models.c.owner == owner, models.c.state == "live", sessions.c.state == "active")
    query = select(func.count()).select_from(models.join(sessions, sessions.c.session_id == models.c.session_id))
    return connection.scalar(query.where(where)) or 0


def _stored_bytes(connection: Connection, owner: str, now: float) -> tuple[int, float | None]:
    mine = and_(checkpoints.c.owner == owner, or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now))
    row = connection.execute(
        select(func.coalesce(func.sum(checkpoints.c.size_bytes), 0), func.min(checkpoints.c.expires_at)).where(mine)
    ).one()
    return int(row[0]), row[1]
