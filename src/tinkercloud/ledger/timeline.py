"""When the operations of a session came, ran and ended."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, or_, select

from tinkercloud.ledger.schema import entries, models, samplers

MAX_OPERATIONS = 20_000
"""The most operations of a session that are told of; of more, the newest."""


class Times(NamedTuple):
    """When an operation ran, in seconds since the epoch."""

    started: float
    """When its cycle began, or when its sample was handed to the engine."""
    ended: float
    steps: tuple[tuple[float, float], ...] = ()
    """(start, end) of each of the engine's steps in its cycle."""


class Moment(NamedTuple):
    """One operation and its times."""

    stream: str
    seq_id: int
    kind: str
    state: str
    num_tokens: int
    created_at: float
    started_at: float | None
    """None if it has not run, or did so before the server recorded it."""
    ended_at: float | None
    steps: list[tuple[float, float]] | None


def timeline(connection: Connection, session_id: str) -> list[Moment]:
    """The operations of a session's training runs and samplers, in the order in which they came."""
    runs = select(models.c.model_id).where(models.c.session_id == session_id)
    drawn = select(samplers.c.sampler_id).where(samplers.c.session_id == session_id)
    query = (
        select(*(entries.c[name] for name in Moment._fields))
        .where(or_(entries.c.stream.in_(runs), entries.c.stream.in_(drawn)))
        .order_by(entries.c.created_at.desc())
        .limit(MAX_OPERATIONS)
    )
    return [Moment(*row) for row in connection.execute(query)][::-1]
