"""The statements about what exists: sessions, models, samplers, checkpoints and snapshots.

The five kinds of record are stored alike, a column for each field, so one set of functions serves them all.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, TypeVar

import msgspec
from sqlalchemy import Column, ColumnElement, Connection, Table, and_, bindparam, case, delete, func, select, update
from sqlalchemy import insert as insert_into

from tinkercloud.ledger import schema, stored
from tinkercloud.ledger.records import (
    CatalogRecord,
    CheckpointRecord,
    ModelRecord,
    SamplerRecord,
    SessionRecord,
    SnapshotRecord,
)
from tinkercloud.ledger.writer import Transaction

R = TypeVar("R", bound=CatalogRecord)


class _Kind(NamedTuple):
    table: Table
    key: tuple[str, ...]
    unique: tuple[str, ...]
    """Another set of fields by which a repeat is known; the key again if there is none."""
    newest: str
    """The field that puts a list in order, highest first."""
    mutable: frozenset[str]


_KINDS: dict[type, _Kind] = {
    SessionRecord: _Kind(
        schema.sessions,
        ("session_id",),
        ("session_id",),
        "created_at",
        frozenset({"state", "finish_reason", "finish_detail", "project_id", "last_heartbeat"}),
    ),
    ModelRecord: _Kind(
        schema.models,
        ("model_id",),
        ("session_id", "model_seq_id"),
        "created_at",
        frozenset({"state", "last_request_at", "base_fingerprint"}),
    ),
    SamplerRecord: _Kind(
        schema.samplers, ("sampler_id",), ("sampler_id",), "created_at", frozenset({"folder", "version"})
    ),
    CheckpointRecord: _Kind(
        schema.checkpoints,
        ("path",),
        ("path",),
        "created_at",
        frozenset({"expires_at", "public", "user_metadata"}),
    ),
    SnapshotRecord: _Kind(schema.snapshots, ("model_id", "seq_id"), ("model_id", "seq_id"), "seq_id", frozenset()),
}


def key_of(record: CatalogRecord) -> tuple[Any, ...]:
    """What `get` finds the record by."""
    return tuple(getattr(record, name) for name in _KINDS[type(record)].key)


class Change(NamedTuple):
    """New values for fields of one record."""

    kind: type
    key: tuple[Any, ...]
    values: dict[str, Any]
    only: dict[str, Any]
    """What its fields must have for that."""


# ---------------------------------------------------------------- writes


def insert(transaction: Transaction, together: list[tuple[CatalogRecord, ...]]) -> list[CatalogRecord]:
    """The stored record for the first of each: itself, or the one that was there before under the same key; then
    nothing is stored of the others either."""
    stored = []
    for record, *others in together:
        stored.append(_first(transaction.connection, record))
        if stored[-1] is None:
            stored[-1] = put(transaction, record)
            for other in others:
                put(transaction, other)
    return stored


def put(transaction: Transaction, record: R) -> R:
    """Store a record in place of one that has its key."""
    kind = _KINDS[type(record)]
    row = msgspec.to_builtins(record)
    _delete(transaction.connection, kind.table, _where(kind.table, {name: row[name] for name in kind.key}))
    transaction.connection.execute(insert_into(kind.table), row)
    return record


def change(transaction: Transaction, changes: list[Change]) -> list[CatalogRecord | None]:
    """The records as they are then; None where there is no such record. ValueError for a field that never changes."""
    results = []
    for item in changes:
        kind = _KINDS[item.kind]
        if fixed := sorted(item.values.keys() - kind.mutable):
            raise ValueError(f"{item.kind.__name__}.{fixed[0]} never changes; these do: {sorted(kind.mutable)}")
        values = msgspec.to_builtins(item.values)
        where = _where(kind.table, dict(zip(kind.key, item.key, strict=True)) | item.only)
        transaction.connection.execute(update(kind.table).where(where).values(values))
        results.append(get(transaction.connection, item.kind, item.key))
    return results


def remove(transaction: Transaction, keys: list[tuple[type, tuple[Any, ...]]]) -> list[CatalogRecord | None]:
    """The removed records; None where there was none."""
    results = []
    for record_type, key in keys:
        kind = _KINDS[record_type]
        results.append(get(transaction.connection, record_type, key))
        where = _where(kind.table, dict(zip(kind.key, key, strict=True)))
        _delete(transaction.connection, kind.table, where)
    return results


def _delete(connection: Connection, table: Table, where: ColumnElement[bool]) -> None:
    if table is schema.checkpoints:
        stored.remember(connection, where, time.time())
    connection.execute(delete(table).where(where))


def join_sampler(transaction: Transaction, sampler_ids: list[str]) -> list[int | None]:
    """The number of each new client; None where there is no such sampler."""
    table = schema.samplers
    results: list[int | None] = []
    for sampler_id in sampler_ids:
        clients = transaction.connection.scalar(select(table.c.clients).where(table.c.sampler_id == sampler_id))
        if clients is not None:
            where = table.c.sampler_id == sampler_id
            transaction.connection.execute(update(table).where(where).values(clients=clients + 1))
        results.append(clients)
    return results


def prune_snapshots(transaction: Transaction, limits: list[tuple[str, int]]) -> list[list[SnapshotRecord]]:
    """For each (model, how many to keep): the older snapshots, now removed."""
    table = schema.snapshots
    results = []
    for model_id, keep in limits:
        old = find(transaction.connection, SnapshotRecord, {"model_id": model_id}, None, keep)
        if old:
            where = and_(table.c.model_id == model_id, table.c.seq_id <= old[0].seq_id)
            transaction.connection.execute(delete(table).where(where))
        results.append(old)
    return results


def remove_expired(transaction: Transaction, times: list[float]) -> list[list[CheckpointRecord]]:
    """For each time: the checkpoints that expire until then, now removed."""
    table = schema.checkpoints
    results = []
    for now in times:
        over = table.c.expires_at <= now
        rows = transaction.connection.execute(select(table).where(over)).all()
        if rows:
            stored.remember(transaction.connection, over, now)
            transaction.connection.execute(delete(table).where(over))
        results.append([record_of(CheckpointRecord, row._mapping) for row in rows])
    return results


_TOUCH_SESSION = (
    update(schema.sessions)
    .where(schema.sessions.c.session_id == bindparam("key"))
    .values(last_heartbeat=bindparam("time"))
)
_TOUCH_MODEL = (
    update(schema.models).where(schema.models.c.model_id == bindparam("key")).values(last_request_at=bindparam("time"))
)


class Touches(NamedTuple):
    """The last time at which each session was heard of and each model was used."""

    sessions: dict[str, float]
    models: dict[str, float]


def touch(transaction: Transaction, touches: list[Touches]) -> list[None]:
    for item in touches:
        for statement, times in ((_TOUCH_SESSION, item.sessions), (_TOUCH_MODEL, item.models)):
            if times:
                rows = [{"key": key, "time": time} for key, time in times.items()]
                transaction.connection.execute(statement, rows)
    return [None] * len(touches)


class Downtime(NamedTuple):
    """When no session could be heard of."""

    seconds: float
    now: float


def forgive(transaction: Transaction, downtimes: list[Downtime]) -> list[None]:
    """Bring forward when the sessions that have not finished were heard of last, up to now at most."""
    table = schema.sessions
    for seconds, now in downtimes:
        later = case((table.c.last_heartbeat < now - seconds, table.c.last_heartbeat + seconds), else_=now)
        silent = update(table).where(table.c.state != "finished", table.c.last_heartbeat < now)
        transaction.connection.execute(silent.values(last_heartbeat=later))
    return [None] * len(downtimes)


# ---------------------------------------------------------------- reads


def get(connection: Connection, record_type: type[R], key: tuple[Any, ...]) -> R | None:
    kind = _KINDS[record_type]
    return _one(connection, record_type, dict(zip(kind.key, key, strict=True)))


def find(
    connection: Connection, record_type: type[R], where: dict[str, Any], limit: int | None, offset: int
) -> list[R]:
    """The records whose fields have these values, newest first."""
    kind = _KINDS[record_type]
    keys = [kind.table.c[name].desc() for name in kind.key]
    query = select(kind.table).where(_where(kind.table, where)).order_by(kind.table.c[kind.newest].desc(), *keys)
    rows = connection.execute(query.limit(limit).offset(offset))
    return [record_of(record_type, row._mapping) for row in rows]


def count(connection: Connection, record_type: type, where: dict[str, Any]) -> int:
    table = _KINDS[record_type].table
    return connection.scalar(select(func.count()).select_from(table).where(_where(table, where))) or 0


def _first(connection: Connection, record: R) -> R | None:
    """The record that was stored first under this one's key or unique fields."""
    kind = _KINDS[type(record)]
    for fields in dict.fromkeys((kind.key, kind.unique)):
        found = _one(connection, type(record), {name: getattr(record, name) for name in fields})
        if found is not None:
            return found
    return None


def _one(connection: Connection, record_type: type[R], where: dict[str, Any]) -> R | None:
    table = _KINDS[record_type].table
    row = connection.execute(select(table).where(_where(table, where))).first()
    return None if row is None else record_of(record_type, row._mapping)


def _where(table: Table, values: dict[str, Any]) -> ColumnElement[bool]:
    conditions = [_equals(table.c[name], value) for name, value in values.items()]
    return and_(True, *conditions)


def _equals(column: Column[Any], value: Any) -> ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def record_of(record_type: type[R], row: Any) -> R:
    return msgspec.convert({name: row[name] for name in record_type.__struct_fields__}, record_type)
