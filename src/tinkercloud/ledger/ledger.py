"""The ledger as the rest of the server uses it: asyncio in front, one writer thread and a few readers behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from tinkercloud.codec import encode
from tinkercloud.engine.results import Failure
from tinkercloud.ledger import audit, catalog, database, entries, keys, retention, segments, stored, timeline, usage
from tinkercloud.ledger.accounts import Accounts
from tinkercloud.ledger.catalog import R
from tinkercloud.ledger.deferred import Deferred
from tinkercloud.ledger.files import make_private
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.order import GAP_TIMEOUT, ModelLog
from tinkercloud.ledger.readers import READERS, Readers
from tinkercloud.ledger.recent import Recent
from tinkercloud.ledger.records import (
    AuditRecord,
    CatalogRecord,
    CheckpointRecord,
    Entry,
    KeyRecord,
    ModelRecord,
    SamplerRecord,
    SnapshotRecord,
    UsageKind,
)
from tinkercloud.ledger.search import Searches
from tinkercloud.ledger.verify import used_segments
from tinkercloud.ledger.writer import Writer

FLUSH_SECONDS = 10.0
"""How long heartbeats, last uses and retrievals may wait in memory before they are written together."""

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
        sync_to_disk: bool = True,
    ) -> Ledger:
        """Open, or make, the ledger in a data directory. `url` is SQLAlchemy's, by default SQLite in that directory.
        Without `sync_to_disk` a power cut may lose what was acknowledged.

        Raises `DataDirInUse` or `DatabaseInUse` if another process has it open, `WrongVersion` if a newer server wrote
        it and `UnusableDatabase` if it cannot be opened.
        """
        opened = await asyncio.to_thread(_open, data_dir, url, sync_to_disk)
        return cls(*opened, result_retention, unretrieved_retention, clock)

    def __init__(
        self,
        lock: DataDirLock,
        reading: Engine,
        writing: Engine,
        segment_writer: segments.SegmentWriter,
        last_completion: int,
        result_retention: float,
        unretrieved_retention: float,
        clock: Callable[[], float],
    ) -> None:
        """Use `open`."""
        self._lock = lock
        self.downtime = max(0.0, clock() - lock.last_alive)
        """Seconds for which no server was alive on the data directory before this one."""
        self._is_forgiven = False
        self._engines = reading, writing
        self._segments = segment_writer
        self._result_retention = result_retention
        self._unretrieved_retention = unretrieved_retention
        self._clock = clock
        self._readers = Readers(reading)
        self._recent = Recent()
        self.doubts = 0
        """How many commits failed that may have reached the disk: what was to be appended, and was refused for that,
        may be there."""
        self._writer = Writer(writing, segment_writer, count(last_completion + 1), self._doubt)
        self._deferred = Deferred(self._writer, self._recent)
        self.searches = Searches(self._readers, self._deferred, clock)
        """Of what somebody may look at."""
        self.accounts = Accounts(self._readers)
        """Of owners: what they have used, and what they store."""
        self._flusher = asyncio.create_task(self._flush_regularly(), name="ledger-flusher")

    async def close(self) -> None:
        """Return when everything is on disk and the data directory is free."""
        self._flusher.cancel()
        try:
            self._say_alive()
            await self._deferred.flush()
        finally:
            await self._writer.close()
            await self._readers.close()
            for engine in self._engines:
                engine.dispose()
            self._segments.close()
            self._lock.release()

    # ------------------------------------------------------------ operations

    async def append(
        self,
        stream: str,
        seq_id: int | None,
        kind: str,
        payload: bytes | entries.Draft,
        *,
        num_tokens: int = 0,
        refusal: Failure | None = None,
        details: dict[str, Any] | None = None,
    ) -> Entry:
        """Record an operation at its place in a model's or sampler's log; None is the next after the highest.

        A repeat of a (stream, seq_id) returns the first one's entry as it is now, with `repeated`. With `refusal` the
        operation has ended at once, with that outcome. `details` is small JSON that stays with the entry. A payload
        that depends on the seq_id is a function of it.
        """
        now = self._clock()
        outcome = None if refusal is None else encode(refusal)
        expires_at = None if refusal is None else now + self._unretrieved_retention
        if callable(payload) and seq_id is not None:
            payload, drafted = payload(seq_id)
            details = (details or {}) | drafted
        new = entries.NewEntry(stream, seq_id, kind, payload, num_tokens, now, details or {}, outcome, expires_at)
        self._deferred.used(stream, now)

        def then(entry: Entry) -> None:
            self._recent.appended(entry, payload(entry.seq_id)[0] if callable(payload) else payload)

        return await self._writer.write(entries.append, new, 0 if callable(payload) else len(payload), then)

    async def complete(
        self,
        request_id: str,
        outcome: bytes,
        *,
        failed: bool = False,
        result_bytes: int | None = None,
        cleared_gradients: bool = False,
        keep_seconds: float | None = None,
        build: str | None = None,
        also: Sequence[CatalogRecord] = (),
        tokens: Mapping[UsageKind, int] | None = None,
        of: ModelRecord | SamplerRecord | None = None,
        times: timeline.Times | None = None,
    ) -> Entry:
        """Record how an accepted operation ended; KeyError if there is none. The first outcome stays for ever.

        In the same transaction: `completion` is the next number of the whole ledger, a model's applied_seq reaches the
        operation, a done unload_model makes its model unloaded, and the records in `also` are stored (in place of
        ones with their key). `result_bytes` is the size that a client is told; by default the outcome's. Payload and
        outcome stay for at least `keep_seconds`, and for as long again after each `keep`. `build`: what computed the
        outcome. `tokens` that it has cost are counted as used by the owner of the training run or sampler `of`.
        """
        now = self._clock()
        completion = entries.Completion(
            request_id,
            outcome,
            failed,
            result_bytes=len(outcome) if result_bytes is None else result_bytes,
            expires_at=now + self._unretrieved_retention,
            kept_until=None if keep_seconds is None else now + keep_seconds,
            cleared_gradients=cleared_gradients,
            build=build,
            also=tuple(also),
            spent=usage.spent(tokens, of, now) if tokens and of else (),
            times=times,
        )

        def then(entry: Entry) -> None:
            self._recent.completed(entry, outcome)
            if tokens and of:
                self.accounts.sampled[of.owner] += tokens.get("sample", 0)
            self._recent.changed(ModelRecord, (entry.stream,))
            for record in also:
                self._recent.changed(type(record), catalog.key_of(record))

        return await self._writer.write(entries.complete, completion, len(outcome), then)

    async def keep(self, request_ids: Sequence[str], seconds: float) -> set[str]:
        """Keep payload and outcome for so long from now, of those of the operations that were completed with
        `keep_seconds` and whose time has not run out; these."""
        now, kept = self._clock(), set[str]()
        for start in range(0, len(request_ids), retention.KEEP_ENTRIES):
            some = tuple(request_ids[start : start + retention.KEEP_ENTRIES])
            kept |= await self._writer.write(retention.keep, retention.Keeping(some, now, now + seconds))
        return kept

    async def entry(self, request_id: str) -> Entry | None:
        return self._recent.entries.get(request_id) or await self._readers.read(entries.find, request_id)

    async def payload(self, request_id: str) -> bytes:
        """KeyError if there is no such operation or its payload has expired."""
        found = await self._load(request_id, "payload")
        if found is None:
            raise KeyError(f"operation {request_id!r} has no payload: it is unknown or has expired")
        return found

    async def outcome(self, request_id: str) -> bytes | None:
        """None while it has not ended, and after its retention (`entry.expired`)."""
        return await self._load(request_id, "outcome")

    async def pending(self, stream: str) -> list[Entry]:
        """Accepted and not ended, by seq_id."""
        return await self._readers.read(entries.pending, stream)

    async def pending_streams(self) -> list[str]:
        """The models and samplers in whose logs something has not ended."""
        return await self._readers.read(entries.pending_streams)

    async def history(self, stream: str, after_seq: int) -> list[Entry]:
        """Ended and refused operations behind `after_seq`, by seq_id: what a replay runs through."""
        return await self._readers.read(entries.history, stream, after_seq)

    async def replayable(self, kind: str, model_id: str | None = None) -> list[Entry]:
        """The operations of a kind, of one model or of all, that a replay may run, now or after their end."""
        return await self._readers.read(entries.replayable, kind, model_id)

    async def completions(self, stream: str, client: int, after: int) -> list[Entry]:
        """A sampler's ended operations of one client (seq_id // 10**9), behind the completion `after`, in order."""
        known = self._recent.ends(stream, client, after)
        return await self._readers.read(entries.completions, stream, client, after) if known is None else known

    async def highest_seq(self, stream: str) -> int:
        """-1 for an empty log."""
        return await self._readers.read(entries.highest_seq, stream)

    async def last_arrival(self, stream: str) -> float | None:
        """When the newest operation of a log arrived; None for an empty one."""
        return await self._readers.read(entries.last_arrival, stream)

    async def model_log(self, model_id: str, gap_timeout: float = GAP_TIMEOUT) -> ModelLog:
        """The order of a model's operations as it stands, with all that waits since now (`time.monotonic`).

        KeyError if there is no such model.
        """
        return await self._readers.read(_model_log, model_id, gap_timeout)

    async def timeline(self, session_id: str) -> list[timeline.Moment]:
        """The operations of a session's training runs and samplers, in the order in which they came."""
        return await self._readers.read(timeline.timeline, session_id)

    # ------------------------------------------------------------ sessions, models, samplers, checkpoints, snapshots

    async def insert(self, record: R, *others: CatalogRecord) -> R:
        """The stored record: this one, or the one that was first under its key. If it is this one, the `others` are
        stored in the same transaction, each in place of one that has its key."""

        def then(_: R) -> None:
            for written in (record, *others):
                self._recent.changed(type(written), catalog.key_of(written))

        return self._deferred.fresh(await self._writer.write(catalog.insert, (record, *others), then=then))

    async def get(self, kind: type[R], *key: Any) -> R | None:
        """By key: session_id, model_id, sampler_id, a checkpoint's path, a snapshot's model_id and seq_id."""
        known = self._recent.record(kind, key)
        if known is not None:
            return self._deferred.fresh(known[0])
        version = self._recent.version
        record = await self._readers.read(catalog.get, kind, key)
        self._recent.read(kind, key, record, version)
        return self._deferred.fresh(record)

    async def find(self, kind: type[R], *, limit: int | None = None, offset: int = 0, **fields: Any) -> list[R]:
        """The records that have these values, newest first."""
        found = await self._readers.read(catalog.find, kind, fields, limit, offset)
        return [self._deferred.fresh(record) for record in found]

    async def count(self, kind: type[CatalogRecord], **fields: Any) -> int:
        return await self._readers.read(catalog.count, kind, fields)

    async def without_checkpoints(self, prefix: str) -> list[ModelRecord]:
        """The runs whose ids begin so and that never had a checkpoint."""
        ids = await self._readers.read(stored.never_held, prefix)
        return [run for model_id in ids if (run := await self.get(ModelRecord, model_id)) is not None]

    async def change(self, kind: type[R], *key: Any, only: Mapping[str, Any] | None = None, **values: Any) -> R | None:
        """The record with new values; None if there is none. With `only` it is changed if its fields have these values,
        and returned as it is. ValueError for a field that never changes."""
        change = catalog.Change(kind, key, values, dict(only or {}))
        return self._deferred.fresh(await self._change(catalog.change, change, kind, key))

    async def remove(self, kind: type[R], *key: Any) -> R | None:
        """The record that was there."""
        return await self._change(catalog.remove, (kind, key), kind, key)

    async def join_sampler(self, sampler_id: str) -> int | None:
        """The number of a new client (the first, its creator, is 0); None if there is no such sampler."""
        return await self._change(catalog.join_sampler, sampler_id, SamplerRecord, (sampler_id,))

    async def remove_expired(self, now: float) -> list[CheckpointRecord]:
        """Remove the checkpoints whose time is over; the removed, whose folders may now go."""

        def then(removed: list[CheckpointRecord]) -> None:
            for record in removed:
                self._recent.changed(CheckpointRecord, catalog.key_of(record))

        return await self._writer.write(catalog.remove_expired, now, then=then)

    async def prune_snapshots(self, model_id: str, keep: int = 2) -> list[SnapshotRecord]:
        """Remove all but the newest snapshots of a model; the removed, whose folders may now go."""

        def then(removed: list[SnapshotRecord]) -> None:
            for record in removed:
                self._recent.changed(SnapshotRecord, catalog.key_of(record))

        return await self._writer.write(catalog.prune_snapshots, (model_id, keep), then=then)

    # ------------------------------------------------------------ keys, and what was done with them

    async def keys(self) -> list[KeyRecord]:
        """Every key that there ever was, oldest first."""
        return await self._readers.read(keys.find_all)

    async def revoke_key(self, key_id: int) -> bool:
        """Revoke a key for good; whether it was still valid."""
        return await self._writer.write(keys.revoke_all, (key_id, self._clock()))

    async def record_event(self, record: AuditRecord) -> None:
        """Add to the audit log."""
        await self._writer.write(audit.append, record)

    async def events(self, start: float, end: float) -> list[AuditRecord]:
        """The audit log of [start, end), oldest first."""
        return await self._readers.read(audit.find, start, end)

    # ------------------------------------------------------------ what may wait a little for the disk

    def heartbeat(self, session_id: str) -> None:
        """The session is alive now. Readers see it at once, the disk within `FLUSH_SECONDS`."""
        self._deferred.heard_of(session_id, self._clock())

    async def forgive_downtime(self) -> None:
        """No session could be heard of while no server was there: that does not count as silence. To be called until
        it has not failed; only from then on is the time of the next start's `downtime` that of this one."""
        if self._is_forgiven:
            return
        downtime = catalog.Downtime(self.downtime, self._clock())
        await self._writer.write(catalog.forgive, downtime, then=lambda _: self._recent.forget())
        self._is_forgiven = True
        self._say_alive()

    async def retrieved(self, request_id: str, acknowledged: bool = False) -> None:
        """Its outcome was sent: the retention time begins. With `acknowledged` the client says that it has it, and it
        may go soon."""
        retention_time = retention.ACKNOWLEDGED_RETENTION if acknowledged else self._result_retention
        await self._deferred.retrieved(request_id, self._clock() + retention_time)

    async def expire(self, now: float | None = None) -> int:
        """Drop what is past its retention: how many entries lost payload and outcome."""
        await self._deferred.flush()
        now = self._clock() if now is None else now
        expired = 0
        while gone := await self._writer.write(retention.expire, now, then=self._recent.expired):
            expired += len(gone)
        empty = await self._writer.write(retention.empty_segments, None)
        for segment in empty:
            await asyncio.to_thread(self._segments.delete, segment)
        if empty:
            await self._writer.write(retention.forget_segments, empty)
        return expired

    async def forget_samples(self, sampler_id: str) -> None:
        """Forget the samples of a sampler that is about to go, as far as they are past their retention; the rest is
        forgotten when it is."""
        while await self._writer.write(retention.forget_samples, sampler_id):
            pass

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                self._say_alive()
                await self._deferred.flush()
            except Exception:
                log.exception("heartbeats and retrievals could not be recorded; they wait for the next round")

    # ------------------------------------------------------------ inside

    def _say_alive(self) -> None:
        if self._is_forgiven:
            self._lock.alive()

    def _doubt(self) -> None:
        self.doubts += 1
        self._recent.forget()

    async def _load(self, request_id: str, part: str) -> bytes | None:
        found = self._recent.blobs.get((request_id, part))
        if found is not None:
            return found
        try:
            return await self._readers.read(entries.load, self._segments.folder, request_id, part)
        except segments.Corrupt:
            # It may have expired, and its file gone, between the look into SQL and the one into the file.
            entry = await self.entry(request_id)
            if entry is not None and entry.expired:
                return None
            raise

    async def _change(self, function: Callable[..., Any], argument: Any, kind: type, key: tuple[Any, ...]) -> Any:
        """Write something that changes this record."""
        return await self._writer.write(function, argument, then=lambda _: self._recent.changed(kind, key))


def _open(
    data_dir: Path, url: str | None, sync_to_disk: bool
) -> tuple[DataDirLock, Engine, Engine, segments.SegmentWriter, int]:
    make_private(data_dir)
    lock = DataDirLock(data_dir)
    try:
        address = database.address_in(data_dir, url)
        with database.opening(address):
            writing = database.connect_writer(address, sync_to_disk)
            database.check(writing)
            database.migrate(writing)
            reading = database.connect(address, READERS)
            with reading.connect() as connection:
                last_completion = entries.highest_completion(connection)
                for file in used_segments(connection, data_dir):  # before the writer makes the newest one anew
                    if not file.is_file():
                        log.error("%s is missing; stop and let `tinkercloud fsck %s` say what is lost", file, data_dir)
            segment_writer = segments.SegmentWriter(data_dir / "segments", sync_to_disk=sync_to_disk)
    except BaseException:
        lock.release()
        raise
    return lock, reading, writing, segment_writer, last_completion


def _model_log(connection: Connection, model_id: str, gap_timeout: float) -> ModelLog:
    model = catalog.get(connection, ModelRecord, (model_id,))
    if model is None:
        raise KeyError(f"no model {model_id!r}")
    last_step = entries.last_step(connection, model_id)
    waiting = entries.pending(connection, model_id)
    ended = entries.history(connection, model_id, last_step)
    in_order = sorted(waiting + ended, key=lambda entry: entry.seq_id)
    return ModelLog.recovered(model.applied_seq, last_step, in_order, time.monotonic(), gap_timeout)
