"""The statements about operations: append, complete, look up. Plain functions over a connection."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import Connection, and_, bindparam, func, insert, select, update

from tinkercloud.ledger import catalog, segments, usage
from tinkercloud.ledger.records import CatalogRecord, Entry, Usage
from tinkercloud.ledger.retention import needed_for_replay
from tinkercloud.ledger.schema import IS_ACCEPTED, entries, models, small_blobs
from tinkercloud.ledger.segments import Blob
from tinkercloud.ledger.timeline import Times
from tinkercloud.ledger.writer import Transaction

CLIENT_SEQ_IDS = 1_000_000_000
"""The n-th client of a sampler numbers its samples from n times this."""

_ENTRY_FIELDS = [name for name in Entry.__struct_fields__ if name not in ("repeated", "expired")]
_ENTRY_COLUMNS = [entries.c[name] for name in (*_ENTRY_FIELDS, "expired_at")]

# The statements of every operation, made once: making one costs more than running it.
_APPEND = insert(entries)
_BY_REQUEST_ID = select(*_ENTRY_COLUMNS).where(entries.c.request_id.in_(bindparam("keys", expanding=True)))
_WHERE_IT_IS = select(entries).where(entries.c.request_id == bindparam("key"))
_SMALL_BLOB = select(small_blobs.c.data, small_blobs.c.crc).where(
    and_(small_blobs.c.request_id == bindparam("key"), small_blobs.c.part == bindparam("part"))
)


Draft = Callable[[int], tuple[bytes, dict[str, Any]]]
"""The (payload, details) of an operation that names its own seq_id, once that is known; the same each time."""


class NewEntry(Struct, frozen=True):
    """An operation as it arrives. `seq_id` None is the next after the stream's highest."""

    stream: str
    seq_id: int | None
    kind: str
    payload: bytes | Draft
    """A draft's details are added to `details`."""
    num_tokens: int
    created_at: float
    details: dict[str, Any]
    refusal: bytes | None = None
    """The encoded failure of an operation that was refused on arrival."""
    expires_at: float | None = None
    """When a refusal is forgotten."""


class Completion(Struct, frozen=True):
    """How an operation ended, and what must become true together with it."""

    request_id: str
    outcome: bytes
    failed: bool
    result_bytes: int
    expires_at: float
    kept_until: float | None = None
    cleared_gradients: bool = False
    build: str | None = None
    also: tuple[CatalogRecord, ...] = ()
    spent: tuple[Usage, ...] = ()
    times: Times | None = None


def request_id(stream: str, seq_id: int) -> str:
    """An operation's id: the same for every repeat, and another for every other (stream, seq_id)."""
    return f"{stream}:{seq_id}"


# ---------------------------------------------------------------- writes


def append(transaction: Transaction, arrivals: list[NewEntry]) -> list[Entry]:
    """The entry of each arrival: a new one, or the first one of a repeat."""
    connection = transaction.connection
    known = _by_request_id(
        connection, [request_id(new.stream, new.seq_id) for new in arrivals if new.seq_id is not None]
    )
    rows: list[dict[str, Any]] = []
    results: list[Entry] = []
    for new in arrivals:
        seq_id = new.seq_id
        if seq_id is None:
            just_now = [row["seq_id"] for row in rows if row["stream"] == new.stream]
            seq_id = max(highest_seq(connection, new.stream), *just_now, -1) + 1
        key = request_id(new.stream, seq_id)
        if key in known:
            results.append(_repeat(known[key]))
            continue
        row = _row(transaction, new, key, seq_id)
        rows.append(row)
        known[key] = _entry(row)
        results.append(known[key])
    if rows:
        connection.execute(_APPEND, rows)
    return results


def _row(transaction: Transaction, new: NewEntry, key: str, seq_id: int) -> dict[str, Any]:
    is_refused = new.refusal is not None
    payload, details = new.payload(seq_id) if callable(new.payload) else (new.payload, {})
    return {
        "request_id": key,
        "stream": new.stream,
        "seq_id": seq_id,
        "kind": new.kind,
        "state": "refused" if is_refused else "accepted",
        "num_tokens": new.num_tokens,
        "created_at": new.created_at,
        "expires_at": new.expires_at,
        "kept_until": None,
        "completion": transaction.next_completion() if is_refused else 0,
        "result_bytes": len(new.refusal or b""),
        "cleared_gradients": False,
        "expired_at": None,
        "build": None,
        "started_at": None,
        "ended_at": None,
        "steps": None,
        "details": new.details | details,
        **_place("payload", transaction.store(key, "payload", payload)),
        **_place("outcome", transaction.store(key, "outcome", new.refusal or b"")),
    }


_COMPLETE = (
    update(entries)
    .where(entries.c.request_id == bindparam("key"))
    .values(
        {
            name: bindparam(name)
            for name in (
                "state",
                "expires_at",
                "kept_until",
                "completion",
                "result_bytes",
                "cleared_gradients",
                "build",
                "started_at",
                "ended_at",
                "steps",
                "outcome_segment",
                "outcome_offset",
                "outcome_length",
            )
        }
    )
)
_ADVANCE = (
    update(models)
    .where(and_(models.c.model_id == bindparam("model"), models.c.applied_seq < bindparam("seq")))
    .values(applied_seq=bindparam("seq"))
)
_UNLOAD = update(models).where(models.c.model_id == bindparam("model")).values(state="unloaded")


def complete(transaction: Transaction, completions: list[Completion]) -> list[Entry]:
    """The ended entries. One that had ended before stays as it was (repeated=True); its `also` and `spent`
    are left out.

    The entry of an unknown request is a KeyError. A stream that is a model's has its applied_seq advanced; a done
    unload_model makes the model unloaded.
    """
    connection = transaction.connection
    known = _by_request_id(connection, [completion.request_id for completion in completions])
    rows: list[dict[str, Any]] = []
    applied: dict[str, int] = {}
    unloaded: list[dict[str, str]] = []
    spent: list[Usage] = []
    results: list[Entry] = []
    for completion in completions:
        before = known.get(completion.request_id)
        if before is None:
            raise KeyError(f"no operation {completion.request_id!r} was ever accepted")
        if before.state != "accepted":
            results.append(_repeat(before))
            continue
        row = {
            "key": completion.request_id,
            "state": "failed" if completion.failed else "done",
            "expires_at": max(completion.expires_at, completion.kept_until or 0.0),
            "kept_until": completion.kept_until,
            "completion": transaction.next_completion(),
            "result_bytes": completion.result_bytes,
            "cleared_gradients": completion.cleared_gradients,
            "build": completion.build,
            "started_at": completion.times and completion.times.started,
            "ended_at": completion.times and completion.times.ended,
            "steps": completion.times and completion.times.steps,
            **_place("outcome", transaction.store(completion.request_id, "outcome", completion.outcome)),
        }
        rows.append(row)
        applied[before.stream] = max(before.seq_id, applied.get(before.stream, -1))
        if before.kind == "unload_model" and not completion.failed:
            unloaded.append({"model": before.stream})
        for record in completion.also:
            catalog.put(transaction, record)
        spent += completion.spent
        known[completion.request_id] = replace(
            before,
            state=row["state"],
            completion=row["completion"],
            result_bytes=row["result_bytes"],
            cleared_gradients=row["cleared_gradients"],
            build=row["build"],
        )
        results.append(known[completion.request_id])
    if rows:
        connection.execute(_COMPLETE, rows)
        connection.execute(_ADVANCE, [{"model": stream, "seq": seq} for stream, seq in applied.items()])
    if unloaded:
        connection.execute(_UNLOAD, unloaded)
    usage.add(connection, spent)
    return results


# ---------------------------------------------------------------- reads


def find(connection: Connection, key: str) -> Entry | None:
    """By request id."""
    return _by_request_id(connection, [key]).get(key)


def load(connection: Connection, folder: Path, key: str, part: str) -> bytes | None:
    """An operation's "payload" or "outcome" by request id; None if it has none, or none any more. Raises `Corrupt`."""
    row = connection.execute(_WHERE_IT_IS, {"key": key}).first()
    if row is None or row.expired_at is not None or (part == "outcome" and row.state == "accepted"):
        return None
    segment, offset, length = (row._mapping[f"{part}_{field}"] for field in Blob._fields)
    if segment is not None:
        return segments.read(folder, Blob(segment, offset, length))
    small = connection.execute(_SMALL_BLOB, {"key": key, "part": part}).first()
    if small is None:
        return b""
    if zlib.crc32(small.data) != small.crc:
        raise segments.Corrupt(f"the {part} of operation {key} in the database is damaged (checksum differs)")
    return small.data


def pending(connection: Connection, stream: str) -> list[Entry]:
    """Accepted and not ended, by seq_id."""
    where = and_(entries.c.stream == stream, IS_ACCEPTED)
    return _list(connection, where, entries.c.seq_id)


def pending_streams(connection: Connection) -> list[str]:
    """The streams in which something was accepted and has not ended."""
    query = select(entries.c.stream).where(IS_ACCEPTED).distinct()
    return sorted(connection.scalars(query))


def history(connection: Connection, stream: str, after_seq: int) -> list[Entry]:
    """Ended and refused, by seq_id."""
    where = and_(entries.c.stream == stream, entries.c.seq_id > after_seq, entries.c.state != "accepted")
    return _list(connection, where, entries.c.seq_id)


def replayable(connection: Connection, kind: str, stream: str | None) -> list[Entry]:
    """The operations of a kind, in one model's log or in all, that have not ended or that a replay may run again."""
    where = and_(entries.c.kind == kind, entries.c.state.in_(("accepted", "done")), needed_for_replay())
    if stream is not None:
        where = and_(where, entries.c.stream == stream)
    return _list(connection, where, entries.c.seq_id)


def completions(connection: Connection, stream: str, client: int, after: int) -> list[Entry]:
    """Ended entries of one client of a sampler, in order of completion, behind the one numbered `after`."""
    first = client * CLIENT_SEQ_IDS
    where = and_(
        entries.c.stream == stream,
        entries.c.completion > after,
        entries.c.seq_id.between(first, first + CLIENT_SEQ_IDS - 1),
    )
    return _list(connection, where, entries.c.completion)


def last_arrival(connection: Connection, stream: str) -> float | None:
    """When the newest operation of a log arrived."""
    return connection.scalar(select(func.max(entries.c.created_at)).where(entries.c.stream == stream))


def highest_seq(connection: Connection, stream: str) -> int:
    """-1 for an empty stream."""
    highest = connection.scalar(select(func.max(entries.c.seq_id)).where(entries.c.stream == stream))
    return -1 if highest is None else highest


def last_step(connection: Connection, stream: str) -> int:
    """seq_id of the newest optim_step that left no accumulated gradients; -1 if there is none."""
    left_none = (entries.c.state == "done") | entries.c.cleared_gradients
    where = and_(entries.c.stream == stream, entries.c.kind == "optim_step", left_none)
    newest = connection.scalar(select(entries.c.seq_id).where(where).order_by(entries.c.seq_id.desc()).limit(1))
    return -1 if newest is None else newest


def highest_completion(connection: Connection) -> int:
    return connection.scalar(select(func.max(entries.c.completion))) or 0


# ---------------------------------------------------------------- rows


def _by_request_id(connection: Connection, keys: Sequence[str]) -> dict[str, Entry]:
    if not keys:
        return {}
    rows = connection.execute(_BY_REQUEST_ID, {"keys": keys})
    return {row.request_id: _entry(row._mapping) for row in rows}


def _list(connection: Connection, where: Any, order: Any) -> list[Entry]:
    rows = connection.execute(select(*_ENTRY_COLUMNS).where(where).order_by(order))
    return [_entry(row._mapping) for row in rows]


def _entry(row: Any) -> Entry:
    return Entry(expired=row["expired_at"] is not None, **{name: row[name] for name in _ENTRY_FIELDS})


def _repeat(entry: Entry) -> Entry:
    return replace(entry, repeated=True)


def _place(name: str, blob: Blob | None) -> dict[str, int | None]:
    segment, offset, length = blob or (None, None, None)
    return {f"{name}_segment": segment, f"{name}_offset": offset, f"{name}_length": length}
