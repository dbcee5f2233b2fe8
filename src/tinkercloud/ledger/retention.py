"""Forgetting: payloads and outcomes that nobody needs any more, and the segment files that become empty by it."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, exists, func, or_, select, update

from tinkercloud.ledger.schema import IS_KEPT, entries, models, segments, snapshots
from tinkercloud.ledger.writer import Transaction

RESULT_RETENTION = 3600.0
"""Seconds for which a result is kept after it was retrieved."""

UNRETRIEVED_RETENTION = 7 * 86400.0
"""Seconds for which a result that nobody retrieved is kept after its operation ended."""

EXPIRE_ENTRIES = 1000
"""Entries that one write expires, so that others need not wait long for their turn."""


class Cutoff(NamedTuple):
    """Times (seconds since the epoch): results retrieved, or ended, before the first two expire now."""

    retrieved: float
    ended: float
    now: float


def expire(transaction: Transaction, cutoffs: list[Cutoff]) -> list[list[str]]:
    """For each cutoff: the request ids of at most `EXPIRE_ENTRIES` entries whose payload and outcome are now gone."""
    return [_expire(transaction, cutoff) for cutoff in cutoffs]


def _expire(transaction: Transaction, cutoff: Cutoff) -> list[str]:
    connection = transaction.connection
    is_old = or_(entries.c.retrieved_at < cutoff.retrieved, entries.c.ended_at < cutoff.ended)
    where = and_(entries.c.ended_at.is_not(None), IS_KEPT, is_old, ~_needed_for_replay())
    rows = connection.execute(select(entries).where(where).limit(EXPIRE_ENTRIES)).all()
    if not rows:
        return []
    released = Counter(
        segment for row in rows for segment in (row.payload_segment, row.outcome_segment) if segment is not None
    )
    for segment, blobs in released.items():
        transaction.release(segment, blobs)
    names = [f"{blob}_{part}" for blob in ("payload", "outcome") for part in ("segment", "offset", "length")]
    forget = update(entries).where(entries.c.request_id == bindparam("key"))
    connection.execute(
        forget.values(expired_at=cutoff.now, **dict.fromkeys(names)), [{"key": row.request_id} for row in rows]
    )
    return [row.request_id for row in rows]


def _needed_for_replay() -> ColumnElement[bool]:
    """The entry is in a live model's log behind its oldest snapshot (all of it, if the model has none)."""
    oldest = select(func.min(snapshots.c.seq_id)).where(snapshots.c.model_id == entries.c.stream).scalar_subquery()
    return exists().where(
        models.c.model_id == entries.c.stream,
        models.c.state == "live",
        entries.c.seq_id > func.coalesce(oldest, -1),
    )


def remove_empty(transaction: Transaction, newest: list[int]) -> list[list[int]]:
    """For each newest segment: those before it that hold nothing any more. Their files may be deleted."""
    results = []
    for segment in newest:
        where = and_(segments.c.blobs == 0, segments.c.segment < segment)
        empty = list(transaction.connection.scalars(select(segments.c.segment).where(where)))
        transaction.connection.execute(delete(segments).where(segments.c.segment.in_(empty)))
        results.append(empty)
    return results


def unreferenced(connection: Connection, present: list[int], newest: int) -> list[int]:
    """Which of the segment files before the newest nothing refers to: a crash came before their commit."""
    known = set(connection.scalars(select(segments.c.segment)))
    return [segment for segment in present if segment < newest and segment not in known]


def mark_retrieved(transaction: Transaction, times: list[dict[str, float]]) -> list[None]:
    """Note for request ids when their outcome was first retrieved."""
    first = and_(entries.c.request_id == bindparam("key"), entries.c.retrieved_at.is_(None))
    statement = update(entries).where(first).values(retrieved_at=bindparam("time"))
    for batch in times:
        if batch:
            rows = [{"key": key, "time": time} for key, time in batch.items()]
            transaction.connection.execute(statement, rows)
    return [None] * len(times)
