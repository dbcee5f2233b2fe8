"""Forgetting: payloads and outcomes that nobody needs any more, and the segment files that become empty by it."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, bindparam, case, delete, exists, func, select, update

from tinkercloud.ledger.schema import IS_KEPT, entries, models, samplers, segments, small_blobs, snapshots
from tinkercloud.ledger.segments import Blob
from tinkercloud.ledger.writer import Transaction

RESULT_RETENTION = 3600.0
"""Seconds for which a result is kept after it was retrieved."""

UNRETRIEVED_RETENTION = 7 * 86400.0
"""Seconds for which a result that nobody retrieved is kept after its operation ended."""

ACKNOWLEDGED_RETENTION = 60.0
"""Seconds for which a result is kept after its client said that it has it."""

SAMPLE = "sample"
"""The kind of the entries whose stream is a sampler."""

EXPIRE_ENTRIES = 1000
"""Entries that one write expires, so that others need not wait long for their turn."""

KEEP_ENTRIES = 1000
"""Entries that one write keeps; a statement takes a limited number of them."""


def expire(transaction: Transaction, times: list[float]) -> list[list[str]]:
    """For each time: the request ids of at most `EXPIRE_ENTRIES` entries whose payload and outcome are now gone; those
    of samples with all that is known of them, if their sampler is gone too."""
    return [_expire(transaction, now) for now in times]


def _expire(transaction: Transaction, now: float) -> list[str]:
    connection = transaction.connection
    where = and_(IS_KEPT, entries.c.expires_at < now, ~needed_for_replay())
    columns = (entries.c.request_id, entries.c.payload_segment, entries.c.outcome_segment)
    rows = connection.execute(select(*columns).where(where).limit(EXPIRE_ENTRIES)).all()
    if not rows:
        return []
    released = Counter(
        segment for row in rows for segment in (row.payload_segment, row.outcome_segment) if segment is not None
    )
    for segment, blobs in released.items():
        transaction.release(segment, blobs)
    keys = [row.request_id for row in rows]
    connection.execute(delete(small_blobs).where(small_blobs.c.request_id.in_(keys)))
    names = [f"{part}_{field}" for part in ("payload", "outcome") for field in Blob._fields]
    forget = update(entries).where(entries.c.request_id.in_(keys))
    connection.execute(forget.values(expired_at=now, **dict.fromkeys(names)))
    of_no_sampler = ~exists().where(samplers.c.sampler_id == entries.c.stream)
    connection.execute(delete(entries).where(entries.c.request_id.in_(keys), entries.c.kind == SAMPLE, of_no_sampler))
    return keys


def forget_samples(transaction: Transaction, sampler_ids: list[str]) -> list[int]:
    """For each sampler: how many of its samples are now as if they had never been, at most `EXPIRE_ENTRIES` of those
    that have expired."""
    forgotten = []
    for sampler_id in sampler_ids:
        where = and_(entries.c.stream == sampler_id, entries.c.expired_at.is_not(None))
        some = select(entries.c.request_id).where(where).limit(EXPIRE_ENTRIES)
        forgotten.append(transaction.connection.execute(delete(entries).where(entries.c.request_id.in_(some))).rowcount)
    return forgotten


def needed_for_replay() -> ColumnElement[bool]:
    """That an entry is in a live model's log, behind the older one of its snapshots (anywhere, if the model has no two:
    should the only one be damaged, all of the log is run again)."""
    older = case((func.count() > 1, func.min(snapshots.c.seq_id)), else_=-1)
    behind = select(older).where(snapshots.c.model_id == entries.c.stream).correlate(entries).scalar_subquery()
    return exists().where(
        models.c.model_id == entries.c.stream,
        models.c.state == "live",
        entries.c.seq_id > behind,
    )


def empty_segments(transaction: Transaction, requests: list[None]) -> list[list[int]]:
    """For each request: the segments that are full and hold nothing any more, whose files may be deleted.

    Counted before this transaction's own blobs: what was empty and not the newest then is not written to again.
    """
    where = and_(segments.c.blobs == 0, segments.c.segment < transaction.oldest_open_segment)
    return [list(transaction.connection.scalars(select(segments.c.segment).where(where))) for _ in requests]


def forget_segments(transaction: Transaction, deleted: list[list[int]]) -> list[None]:
    """Their files are gone."""
    gone = [segment for batch in deleted for segment in batch]
    transaction.connection.execute(delete(segments).where(segments.c.segment.in_(gone)))
    return [None] * len(deleted)


def mark_retrieved(transaction: Transaction, times: list[dict[str, float]]) -> list[None]:
    """Bring forward when each of these request ids expires, but not to a time until which it is kept."""
    time = case((entries.c.kept_until > bindparam("time"), entries.c.kept_until), else_=bindparam("time"))
    is_later = and_(entries.c.request_id == bindparam("key"), entries.c.expires_at > time)
    statement = update(entries).where(is_later).values(expires_at=time)
    for batch in times:
        if batch:
            rows = [{"key": key, "time": time} for key, time in batch.items()]
            transaction.connection.execute(statement, rows)
    return [None] * len(times)


class Keeping(NamedTuple):
    """Keep entries that are kept at `now` until another time."""

    request_ids: tuple[str, ...]
    now: float
    until: float


def keep(transaction: Transaction, wishes: list[Keeping]) -> list[set[str]]:
    """For each: those of its request ids that were still kept."""
    kept = []
    for wish in wishes:
        where = and_(entries.c.request_id.in_(wish.request_ids), IS_KEPT, entries.c.kept_until > wish.now)
        alive = set(transaction.connection.scalars(select(entries.c.request_id).where(where)))
        until = case((entries.c.expires_at > wish.until, entries.c.expires_at), else_=wish.until)
        statement = update(entries).where(entries.c.request_id.in_(alive))
        transaction.connection.execute(statement.values(kept_until=wish.until, expires_at=until))
        kept.append(alive)
    return kept
