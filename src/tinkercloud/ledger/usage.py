"""What was computed for whom: tokens by owner, session, training run or sampler, kind and hour.

Written in the transaction that records an operation's end, so an operation counts once, whatever crashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec.structs import asdict, replace
from sqlalchemy import Connection, and_, bindparam, func, insert, select, update

from tinkercloud.ledger.records import ModelRecord, SamplerRecord, Usage, UsageKind
from tinkercloud.ledger.schema import usage

HOUR_SECONDS = 3600

_KEY = ("owner", "hour", "session_id", "model_id", "kind")

_ADD = (
    update(usage)
    .where(and_(*(usage.c[name] == bindparam(f"its_{name}") for name in _KEY)))
    .values(tokens=usage.c.tokens + bindparam("more"))
)


def spent(tokens: Mapping[UsageKind, int], of: ModelRecord | SamplerRecord, now: float) -> tuple[Usage, ...]:
    """Tokens that are used now, by the owner of a training run or sampler."""
    stream = of.model_id if isinstance(of, ModelRecord) else of.sampler_id
    hour = int(now // HOUR_SECONDS * HOUR_SECONDS)
    return tuple(
        Usage(of.owner, hour, of.session_id, stream, kind, of.base_model, number) for kind, number in tokens.items()
    )


def add(connection: Connection, used: Sequence[Usage]) -> None:
    """Add these tokens to what their hours have."""
    sums: Counter[Usage] = Counter()
    for item in used:
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
