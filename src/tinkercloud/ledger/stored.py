"""How long checkpoints were stored: those that there are, and those that have gone.

Written in the transaction that removes or replaces a checkpoint's record, so no crash loses or doubles a life.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, exists, insert, literal, null, select

from tinkercloud.ledger.schema import checkpoints, models, past_checkpoints, sessions

_FIELDS = ("path", "model_id", "owner", "base_model", "size_bytes", "created_at")


class Life(NamedTuple):
    """From when to when a checkpoint took how much."""

    session_id: str | None
    """None for one of no session, such as an import."""
    project_id: str | None
    base_model: str
    size_bytes: int
    created_at: float
    removed_at: float | None
    """None as long as it is there."""


def remember(connection: Connection, where: ColumnElement[bool], now: float) -> None:
    """The checkpoints of which this is true are about to be removed."""
    columns = (checkpoints.c[name] for name in _FIELDS)
    going = select(*columns, literal(now)).where(where)
    connection.execute(insert(past_checkpoints).from_select([*_FIELDS, "removed_at"], going))


def never_held(connection: Connection, prefix: str) -> list[str]:
    """The training runs whose ids begin so and that have no checkpoint, and never had one."""
    held = [exists().where(table.c.model_id == models.c.model_id) for table in (checkpoints, past_checkpoints)]
    where = and_(models.c.model_id.startswith(prefix, autoescape=True), *(~of_it for of_it in held))
    return list(connection.scalars(select(models.c.model_id).where(where)))


def lives(connection: Connection, owner: str, start: float, end: float) -> list[Life]:
    """The checkpoints of an owner that were stored at some time in [start, end)."""
    found: list[Life] = []
    for table, removed_at in ((checkpoints, null()), (past_checkpoints, past_checkpoints.c.removed_at)):
        where = and_(table.c.owner == owner, table.c.created_at < end)
        if table is past_checkpoints:
            where = and_(where, past_checkpoints.c.removed_at > start)
        query = (
            select(
                models.c.session_id,
                sessions.c.project_id,
                table.c.base_model,
                table.c.size_bytes,
                table.c.created_at,
                removed_at,
            )
            .join_from(table, models, table.c.model_id == models.c.model_id, isouter=True)
            .join(sessions, models.c.session_id == sessions.c.session_id, isouter=True)
            .where(where)
        )
        found += [Life(*row) for row in connection.execute(query)]
    return found
