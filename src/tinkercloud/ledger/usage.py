"""What was computed for whom: tokens by owner, session, training run or sampler, kind and hour; and what owners have.

Written in the transaction that records an operation's end, so an operation counts once, whatever crashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import asdict, replace
from sqlalchemy import Connection, and_, bindparam, func, insert, or_, select, union_all, update

from tinkercloud.ledger.records import Usage
from tinkercloud.ledger.schema import IS_ACCEPTED, checkpoints, entries, models, samplers, sessions, usage

HOUR_SECONDS = 3600

_KEY = ("owner", "hour", "session_id", "model_id", "kind")

_ADD = (
    update(usage)
    .where(and_(*(usage.c[name] == bindparam(f"its_{name}") for name in _KEY)))
    .values(tokens=usage.c.tokens + bindparam("more"))
)


def add(connection: Connection, spent: Sequence[Usage]) -> None:
    """Add these tokens to what their hours have."""
    sums: Counter[Usage] = Counter()
    for item in spent:
        sums[replace(item, tokens=0)] += item.tokens
    for item, tokens in sums.items():
        key = {f"its_{name}": getattr(item, name) for name in _KEY}
        if tokens and connection.execute(_ADD, key | {"more": tokens}).rowcount == 0:
            connection.execute(insert(usage), asdict(item) | {"tokens": tokens})


def find(connection: Connection, owner: str | None, start: float, end: float) -> list[Usage]:
    """The rows whose hours begin in [start, end), of one owner or of all, oldest hour first."""
    where = and_(usage.c.hour >= start, usage.c.hour < end)
    if owner is not None:
        where = and_(where, usage.c.owner == owner)
    rows = connection.execute(select(usage).where(where).order_by(usage.c.hour, usage.c.session_id, usage.c.model_id))
    return [Usage(**row._mapping) for row in rows]


def total(connection: Connection, owner: str, start: float) -> int:
    """All tokens of an owner in the hours that begin at `start` or later."""
    where = and_(usage.c.owner == owner, usage.c.hour >= start)
    return int(connection.scalar(select(func.coalesce(func.sum(usage.c.tokens), 0)).where(where)) or 0)


def pending_tokens(connection: Connection, owner: str) -> int:
    """Tokens of an owner's operations that were accepted and have not ended; of samples, those of the prompts."""
    streams = union_all(
        select(models.c.model_id).where(models.c.owner == owner),
        select(samplers.c.sampler_id).where(samplers.c.owner == owner),
    )
    where = and_(entries.c.stream.in_(streams), IS_ACCEPTED)
    return int(connection.scalar(select(func.coalesce(func.sum(entries.c.num_tokens), 0)).where(where)) or 0)


def live_models(connection: Connection, owner: str) -> int:
    """How many training runs of an owner have not ended, in sessions that are alive."""
    where = and_(models.c.owner == owner, models.c.state == "live", sessions.c.state == "active")
    query = select(func.count()).select_from(models.join(sessions, sessions.c.session_id == models.c.session_id))
    return connection.scalar(query.where(where)) or 0


def stored_bytes(connection: Connection, owner: str, now: float) -> tuple[int, float | None]:
    """(bytes of an owner's checkpoints; when the next of them expires)."""
    mine = and_(checkpoints.c.owner == owner, or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now))
    row = connection.execute(
        select(func.coalesce(func.sum(checkpoints.c.size_bytes), 0), func.min(checkpoints.c.expires_at)).where(mine)
    ).one()
    return int(row[0]), row[1]
