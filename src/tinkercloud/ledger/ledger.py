"""The ledger as the rest of the server uses it: asyncio in front, one writer thread and a few readers behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace
from sqlalchemy import Connection, Engine

from tinkercloud.codec import encode
from tinkercloud.engine.types import Failure
from tinkercloud.ledger import catalog, database, entries, retention, segments
from tinkercloud.ledger.cache import LRU
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.order import GAP_TIMEOUT, ModelLog
from tinkercloud.ledger.records import CatalogRecord, Entry, ModelRecord, SessionRecord, SnapshotRecord
from tinkercloud.ledger.writer import Writer

READERS = 4
"""Threads that read."""

CACHE_BYTES = 64 * 2**20
"""Recent payloads and outcomes kept in memory."""

CACHE_ENTRIES = 20_000
"""Recent entries kept in memory."""

FLUSH_SECONDS = 10.0
"""How long heartbeats, last uses and retrievals may wait in memory for a write that takes them along."""

MAX_UNFLUSHED = 10_000
"""How many of them may wait."""

R = TypeVar("R", bound=CatalogRecord)
T = TypeVar("T")
log = logging.getLogger(__name__)


class Ledger:
    """The durable, ordered, idempotent log of operations and their results, and the catalogue of what exists.

    What a method has returned is on disk (heartbeats, last uses and marks of retrieval excepted: they may lose
    `FLUSH_SECONDS`). Use it on the event loop that opened it.
    """

    @classmethod
    async def open(
        cls,
        data_dir: Path,
        url: str | None = None,
        *,
        result_retention: float = retention.RESULT_RETENTION,
        unretrieved_retention: float = retention.UNRETRIEVED_RETENTION,
        clock: Callable[[], float] = time.time,
    ) -> Ledger:
        """Open, or make, the ledger in a data directory. `url` is SQLAlchemy's, by default SQLite in that directory.

        Raises `DataDirInUse` if another process has it open and `WrongVersion` if a newer server wrote it.
        """
        return cls(*await asyncio.to_thread(_open, data_dir, url), result_retention, unretrieved_retention, clock)

    def __init__(
        self,
        folder: Path,
        lock: DataDirLock,
        engine: Engine,
        segment_writer: segments.SegmentWriter,
        last_completion: int,
        result_retention: float,
        unretrieved_retention: float,
        clock: Callable[[], float],
    ) -> None:
        """Use `open`."""
        self._folder = folder
        self._lock = lock
        self._engine = engine
        self._segments = segment_writer
        self._result_retention = result_retention
        self._unretrieved_retention = unretrieved_retention
        self._clock = clock
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")
        self._writer = Writer(engine, segment_writer, count(last_completion + 1))
        self._blobs: LRU[bytes] = LRU(CACHE_BYTES)
        self._entries: LRU[Entry] = LRU(CACHE_ENTRIES)
        self._touches = catalog.Touches({}, {})
        self._retrieved: dict[str, float] = {}
        self._flusher = asyncio.create_task(self._flush_regularly(), name="ledger-flusher")

    async def close(self) -> None:
        """Return when everything is on disk and the data directory is free."""
        self._flusher.cancel()
        await self._flush()
        await self._writer.close()
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()
        self._segments.close()
        self._lock.release()

    # ------------------------------------------------------------ operations

    async def append(
        self,
        stream: str,
        seq_id: int | None,
        kind: str,
        payload: bytes,
        *,
        num_tokens: int = 0,
        refusal: Failure | None = None,
        details: dict[str, Any] | None = None,
    ) -> Entry:
        """Record an operation at its place in a model's or sampler's log; None is the next after the highest.

        A repeat of a (stream, seq_id) returns the first one's entry as it is now, with `repeated`. With `refusal` the
        operation has ended at once, with that outcome. `details` is small JSON that stays with the entry.
        """
        now = self._clock()
        outcome = None if refusal is None else encode(refusal)
        new = entries.NewEntry(stream, seq_id, kind, payload, num_tokens, now, details or {}, outcome)
        entry: Entry = await self._writer.write(entries.append, new, len(payload))
        self._remember(entry)
        if not entry.repeated:
            self._touches.models[stream] = now
            if outcome is None:
                self._blobs.put(f"payload {entry.request_id}", payload, len(payload))
        return entry

    async def complete(
        self,
        request_id: str,
        outcome: bytes,
        *,
        failed: bool = False,
        result_bytes: int | None = None,
        cleared_gradients: bool = False,
        also: Sequence[CatalogRecord] = (),
    ) -> Entry:
        """Record how an accepted operation ended; KeyError if there is none. The first outcome stays for ever.

        In the same transaction: `completion` is the next number of the whole ledger, a model's applied_seq reaches the
        operation, a done unload_model makes its model unloaded, and the records in `also` are stored (in place of
        ones with their key). `result_bytes` is the size that a client is told; by default the outcome's.
        """
        size = len(outcome) if result_bytes is None else result_bytes
        completion = entries.Completion(
            request_id, outcome, failed, size, self._clock(), cleared_gradients, tuple(also)
        )
        entry: Entry = await self._writer.write(entries.complete, completion, len(outcome))
        self._remember(entry)
        if not entry.repeated:
            self._blobs.drop(f"payload {request_id}")
            self._blobs.put(f"outcome {request_id}", outcome, len(outcome))
        return entry

    async def entry(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id) or await self._read(entries.find, request_id)

    async def payload(self, request_id: str) -> bytes:
        """KeyError if there is no such operation or its payload has expired."""
        found = self._blobs.get(f"payload {request_id}")
        if found is None:
            found = await self._read(self._load, request_id, "payload")
        if found is None:
            raise KeyError(f"operation {request_id!r} has no payload: it is unknown or has expired")
        return found

    async def outcome(self, request_id: str) -> bytes | None:
        """None while it has not ended, and after its retention (`entry.expired`)."""
        found = self._blobs.get(f"outcome {request_id}")
        if found is None:
            found = await self._read(self._load, request_id, "outcome")
        return found

    async def pending(self, stream: str) -> list[Entry]:
        """Accepted and not ended, by seq_id."""
        return await self._read(entries.pending, stream)

    async def pending_streams(self) -> list[str]:
        """The models and samplers in whose logs something has not ended."""
        return await self._read(entries.pending_streams)

    async def history(self, stream: str, after_seq: int) -> list[Entry]:
        """Ended and refused operations behind `after_seq`, by seq_id: what a replay runs through."""
        return await self._read(entries.history, stream, after_seq)

    async def completions(self, stream: str, client: int, after: int) -> list[Entry]:
        """A sampler's ended operations of one client (seq_id // 10**9), behind the completion `after`, in order."""
        return await self._read(entries.completions, stream, client, after)

    async def highest_seq(self, stream: str) -> int:
        """-1 for an empty log."""
        return await self._read(entries.highest_seq, stream)

    async def model_log(self, model_id: str, gap_timeout: float = GAP_TIMEOUT) -> ModelLog:
        """The order of a model's operations as it stands, with all that waits. KeyError if there is no such model."""
        return await self._read(_model_log, model_id, gap_timeout, self._clock())

    # ------------------------------------------------------------ sessions, models, samplers, checkpoints, snapshots

    async def insert(self, record: R) -> R:
        """The stored record: this one, or the one that was first under its key."""
        return self._fresh(await self._writer.write(catalog.insert, record))

    async def get(self, kind: type[R], *key: Any) -> R | None:
        """By key: session_id, model_id, sampler_id, a checkpoint's path, a snapshot's model_id and seq_id."""
        return self._fresh(await self._read(catalog.get, kind, key))

    async def find(self, kind: type[R], *, limit: int | None = None, offset: int = 0, **fields: Any) -> list[R]:
        """The records that have these values, newest first."""
        return [self._fresh(record) for record in await self._read(catalog.find, kind, fields, limit, offset)]

    async def count(self, kind: type[CatalogRecord], **fields: Any) -> int:
        return await self._read(catalog.count, kind, fields)

    async def change(self, kind: type[R], *key: Any, **values: Any) -> R | None:
        """The record with new values; None if there is none. ValueError for a field that never changes."""
        return self._fresh(await self._writer.write(catalog.change, catalog.Change(kind, key, values)))

    async def remove(self, kind: type[R], *key: Any) -> R | None:
        """The record that was there."""
        return await self._writer.write(catalog.remove, (kind, key))

    async def join_sampler(self, sampler_id: str) -> int | None:
        """The number of a new client (the first, its creator, is 0); None if there is no such sampler."""
        return await self._writer.write(catalog.join_sampler, sampler_id)

    async def prune_snapshots(self, model_id: str, keep: int = 2) -> list[SnapshotRecord]:
        """Remove all but the newest snapshots of a model; the removed, whose folders may now go."""
        return await self._writer.write(catalog.prune_snapshots, (model_id, keep))

    # ------------------------------------------------------------ what may wait a little for the disk

    def heartbeat(self, session_id: str) -> None:
        """The session is alive now. Readers see it at once, the disk within `FLUSH_SECONDS`."""
        self._touches.sessions[session_id] = self._clock()

    async def retrieved(self, request_id: str) -> None:
        """Its outcome has reached the client: the retention time begins."""
        self._retrieved.setdefault(request_id, self._clock())
        if len(self._retrieved) >= MAX_UNFLUSHED:
            await self._flush()

    async def expire(self, now: float | None = None) -> int:
        """Drop what is past its retention: how many entries lost payload and outcome."""
        await self._flush()
        now = self._clock() if now is None else now
        cutoff = retention.Cutoff(now - self._result_retention, now - self._unretrieved_retention, now)
        expired = 0
        while gone := await self._writer.write(retention.expire, cutoff):
            expired += len(gone)
            for request_id in gone:
                self._entries.drop(request_id)
                self._blobs.drop(f"payload {request_id}")
                self._blobs.drop(f"outcome {request_id}")
        empty = await self._writer.write(retention.remove_empty, self._segments.segment)
        for segment in empty:
            await asyncio.to_thread(segments.path(self._folder, segment).unlink, missing_ok=True)
        return expired

    async def _flush(self) -> None:
        touches = catalog.Touches(dict(self._touches.sessions), dict(self._touches.models))
        retrieved = dict(self._retrieved)
        if any(touches):
            await self._writer.write(catalog.touch, touches)
            _forget(self._touches.sessions, touches.sessions)
            _forget(self._touches.models, touches.models)
        if retrieved:
            await self._writer.write(retention.mark_retrieved, retrieved)
            _forget(self._retrieved, retrieved)

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self._flush()
            except Exception:
                log.exception("heartbeats and retrievals of the last %s s were not recorded", FLUSH_SECONDS)

    # ------------------------------------------------------------ helpers

    async def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        def run() -> T:
            with self._engine.connect() as connection:
                return function(connection, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    def _load(self, connection: Connection, request_id: str, which: str) -> bytes | None:
        """An entry's "payload" or "outcome"; None if it has none, or none any more."""
        stored = entries.stored(connection, request_id)
        if stored is None:
            return None
        blob: segments.Blob | None = getattr(stored, which)
        if blob is None:
            is_there = not stored.entry.expired and (which == "payload" or stored.entry.state != "accepted")
            return b"" if is_there else None
        return segments.read(self._folder, blob)

    def _remember(self, entry: Entry) -> None:
        self._entries.put(entry.request_id, replace(entry, repeated=False) if entry.repeated else entry)

    def _fresh(self, record: R) -> R:
        """The record with the heartbeat or last use that is not on disk yet."""
        if isinstance(record, SessionRecord) and record.session_id in self._touches.sessions:
            return replace(record, last_heartbeat=self._touches.sessions[record.session_id])
        if isinstance(record, ModelRecord) and record.model_id in self._touches.models:
            return replace(record, last_request_at=self._touches.models[record.model_id])
        return record


def _forget(times: dict[str, float], written: dict[str, float]) -> None:
    """Drop the times that are on disk; one that has changed since stays."""
    for key, time_written in written.items():
        if times.get(key) == time_written:
            del times[key]


def _open(data_dir: Path, url: str | None) -> tuple[Path, DataDirLock, Engine, segments.SegmentWriter, int]:
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = DataDirLock(data_dir)
    try:
        engine = database.connect(url or f"sqlite:///{data_dir.absolute() / 'ledger.db'}", READERS + 1)
        database.migrate(engine)
        folder = data_dir / "segments"
        segment_writer = segments.SegmentWriter(folder)
        with engine.connect() as connection:
            last_completion = entries.highest_completion(connection)
            for segment in retention.unreferenced(connection, segments.present(folder), segment_writer.segment):
                segments.path(folder, segment).unlink()
    except BaseException:
        lock.release()
        raise
    return folder, lock, engine, segment_writer, last_completion


def _model_log(connection: Connection, model_id: str, gap_timeout: float, now: float) -> ModelLog:
    model = catalog.get(connection, ModelRecord, (model_id,))
    if model is None:
        raise KeyError(f"no model {model_id!r}")
    last_step = entries.last_step(connection, model_id)
    waiting = entries.pending(connection, model_id)
    ended = entries.history(connection, model_id, last_step)
    in_order = sorted(waiting + ended, key=lambda entry: entry.seq_id)
    return ModelLog.recovered(model.applied_seq, last_step, in_order, now, gap_timeout)
