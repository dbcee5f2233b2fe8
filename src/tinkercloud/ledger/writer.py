"""Group commit: one thread turns all writes that wait into one transaction.

A write is a function over a list of arguments (so that 1,000 appends become one INSERT) and one of those arguments.
What waits when a commit ends makes up the next one, so under load the cost of reaching the disk is shared, and alone a
write does not wait for company. No waiter hears of its write before blobs and SQL are both on disk, blobs first.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import sqlite3
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, insert, update
from sqlalchemy.exc import DBAPIError, OperationalError

from tinkercloud.errors import Unavailable
from tinkercloud.ledger import database, schema
from tinkercloud.ledger.segments import Blob, SegmentWriter

SMALL_BYTES = 128 * 2**10
"""Blobs up to this size go into SQL, so that their write waits for one file to reach the disk and not for two."""

MAX_BATCH_WRITES = 1024
MAX_BATCH_BYTES = 64 * 2**20
"""Bytes of blobs after which a batch is closed."""

_FULL_DATABASE = {sqlite3.SQLITE_FULL, "53100"}
"""SQLite's code, and the SQLSTATE of PostgreSQL."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


_KEEP_SMALL = insert(schema.small_blobs)


class DiskFull(Unavailable):
    """A write did not fit on the disk; nothing of it is kept. Works again when there is space."""


class _CommitFailed(Exception):
    """It may have reached the disk all the same."""


class Transaction:
    """What a write function works with: a connection, a place for blobs, and the order of completion."""

    def __init__(self, connection: Connection, segments: SegmentWriter, completions: Iterator[int]) -> None:
        self.connection = connection
        self._segments = segments
        self._completions = completions
        self.oldest_open_segment = segments.segment
        """The segments before this one get no more blobs, neither from this transaction nor from a later one."""
        self._small_blobs: list[dict[str, Any]] = []
        self._blobs: Counter[int] = Counter()

    def store(self, request_id: str, part: str, data: bytes) -> Blob | None:
        """Keep an operation's "payload" or "outcome"; None unless it went into a segment. Empty data needs no place."""
        if len(data) <= SMALL_BYTES:
            if data:
                row = {"request_id": request_id, "part": part, "data": data, "crc": zlib.crc32(data)}
                self._small_blobs.append(row)
            return None
        blob = self._segments.append(data)
        self._blobs[blob.segment] += 1
        return blob

    def release(self, segment: int, blobs: int) -> None:
        """That many blobs of a segment are no longer referenced."""
        self._blobs[segment] -= blobs

    def next_completion(self) -> int:
        return next(self._completions)

    def finish(self) -> None:
        """Write small blobs and how many blobs of each segment are referenced; return when segments are on disk."""
        if self._small_blobs:
            self.connection.execute(_KEEP_SMALL, self._small_blobs)
        table = schema.segments
        for segment, change in self._blobs.items():
            known = update(table).where(table.c.segment == segment).values(blobs=table.c.blobs + change)
            if change and self.connection.execute(known).rowcount == 0:
                self.connection.execute(insert(table).values(segment=segment, blobs=change))
        self._segments.sync()


WriteFunction = Callable[[Transaction, list[Any]], list[Any]]
"""Applies its arguments in order and returns a result for each. May run again after a rollback."""


class _Write(NamedTuple):
    function: WriteFunction
    argument: Any
    size: int
    then: Callable[[Any], None] | None
    waiter: asyncio.Future[Any]


class Writer:
    """The only thread that writes to the ledger's database and segments."""

    def __init__(
        self, engine: Engine, segments: SegmentWriter, completions: Iterator[int], on_doubt: Callable[[], None]
    ) -> None:
        """`completions` gives numbers above every one in the database. `on_doubt` is called when a commit failed that
        may have reached the disk, on the event loop, before callers hear of it. Call on the event loop."""
        self._engine = engine
        self._on_doubt = on_doubt
        self._segments = segments
        self._completions = completions
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    async def write(
        self, function: WriteFunction, argument: Any, size: int = 0, then: Callable[[Any], None] | None = None
    ) -> Any:
        """The function's result for this argument, once it is on disk. `size` is that of its blobs, in bytes.

        Raises what the function raised for it alone, and `DiskFull`. A cancelled caller's write still happens. `then`
        is called with the result in any case, on the event loop, in the order of the writes, before callers go on.
        """
        if self._closed:
            raise RuntimeError("the ledger is closed")
        waiter = self._loop.create_future()
        self._queue.put(_Write(function, argument, size, then, waiter))
        return await waiter

    async def close(self) -> None:
        """Return when everything that was handed in is on disk and the thread has ended."""
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while batch := self._next_batch():
            self._commit(batch)

    def _next_batch(self) -> list[_Write]:
        """All that waits, at least one; empty when the writer was closed and nothing is left."""
        batch: list[_Write] = []
        size = 0
        while len(batch) < MAX_BATCH_WRITES and size < MAX_BATCH_BYTES:
            try:
                write = self._queue.get(block=not batch)
            except queue.Empty:
                break
            if write is None:
                if batch:
                    self._queue.put(None)
                break
            batch.append(write)
            size += write.size
        return batch

    def _commit(self, batch: list[_Write]) -> None:
        """Write a batch. If a write in it is at fault, find it by halving, so that it fails alone."""
        try:
            results = self._transact(batch)
        except _CommitFailed as failed:  # halving would write again what may be there
            self._loop.call_soon_threadsafe(self._doubt, batch, _explained(failed.__cause__))
        except Exception as error:
            if len(batch) == 1 or isinstance(error, OSError | OperationalError | Unavailable):
                self._loop.call_soon_threadsafe(_fail, batch, _explained(error))
                return
            middle = len(batch) // 2
            self._commit(batch[:middle])
            self._commit(batch[middle:])
        else:
            self._loop.call_soon_threadsafe(_resolve, batch, results)

    def _transact(self, batch: list[_Write]) -> list[Any]:
        results: list[Any] = []
        start = self._segments.position()
        with self._engine.connect() as connection:
            transaction = Transaction(connection, self._segments, self._completions)
            try:
                for function, writes in groupby(batch, key=lambda write: write.function):
                    results += function(transaction, [write.argument for write in writes])
                transaction.finish()
            except BaseException:
                connection.rollback()
                self._segments.rewind(start)
                raise
            # From here on a failure may come after the commit has reached the disk: the blobs stay.
            try:
                connection.commit()
            except Exception as error:
                raise _CommitFailed from error
        return results

    def _doubt(self, batch: list[_Write], error: Exception) -> None:
        self._on_doubt()
        _fail(batch, error)


def _resolve(batch: list[_Write], results: list[Any]) -> None:
    for write, result in zip(batch, results, strict=True):
        if write.then is not None:
            write.then(result)
        if not write.waiter.done():
            write.waiter.set_result(result)


def _fail(batch: list[_Write], error: Exception) -> None:
    for write in batch:
        if not write.waiter.done():
            write.waiter.set_exception(error)


def _explained(error: Exception) -> Exception:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) or getattr(cause, "sqlstate", None)
    if code in _FULL_DATABASE or (isinstance(cause, OSError) and cause.errno in _NO_SPACE):
        full = DiskFull("the server's disk is full: free space in its data directory; nothing was recorded")
        full.__cause__ = error
        return full
    return database.explained(error) if isinstance(error, DBAPIError) else error
