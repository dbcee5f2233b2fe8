"""What the ledger keeps in memory: what was used last, within a budget, so that the common way reads no disk."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from msgspec.structs import replace

from tinkercloud.ledger.entries import CLIENT_SEQ_IDS
from tinkercloud.ledger.records import Entry

BLOB_BYTES = 64 * 2**20
"""Recent payloads and outcomes."""

ENTRIES = 20_000
"""Recent entries."""

RECORDS = 10_000
"""Recent sessions, models, samplers and checkpoints."""

CLIENTS, ENDS = 400, 256
"""Clients whose samples have ended lately, and how many of these each."""

T = TypeVar("T")


class LRU(Generic[T]):
    """A map that forgets its least recently used values when their sizes add up to more than `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Any, tuple[T, int]] = OrderedDict()
        self.size = 0

    def get(self, key: Any) -> T | None:
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: T, size: int = 1) -> None:
        self.drop(key)
        if size > self._capacity:
            return
        self._values[key] = (value, size)
        self.size += size
        while self.size > self._capacity:
            self.size -= self._values.popitem(last=False)[1][1]

    def drop(self, key: Any) -> None:
        """No error if it is not there."""
        found = self._values.pop(key, None)
        if found is not None:
            self.size -= found[1]

    def clear(self) -> None:
        self._values.clear()
        self.size = 0


class Ends:
    """The samples of one client of a sampler that have ended last, in order of completion: all behind `since`."""

    def __init__(self, first: Entry) -> None:
        self.since = first.completion - 1
        self._entries = deque([first])

    def add(self, entry: Entry) -> None:
        """One that is told of again changes nothing."""
        if entry.completion > self._entries[-1].completion:
            if len(self._entries) == ENDS:
                self.since = self._entries.popleft().completion
            self._entries.append(entry)

    def after(self, completion: int) -> list[Entry] | None:
        """Those behind this one; None if there may be others, which are not in memory."""
        if completion < self.since:
            return None
        return [entry for entry in self._entries if entry.completion > completion]


class Recent:
    """Entries, blobs and records as the newest commit left them.

    Entries and blobs come from commits only, in their order. Records come from reads, which may be overtaken by a
    commit: a read notes `version` before, and its result is kept only if nothing has changed since.
    """

    def __init__(self) -> None:
        self.entries: LRU[Entry] = LRU(ENTRIES)
        self.blobs: LRU[bytes] = LRU(BLOB_BYTES)
        self._ends: LRU[Ends] = LRU(CLIENTS)
        self._records: LRU[tuple[Any]] = LRU(RECORDS)
        self.version = 0

    def appended(self, entry: Entry, payload: bytes) -> None:
        self._entry(entry)
        if not entry.repeated and entry.state == "accepted":
            self.blobs.put((entry.request_id, "payload"), payload, len(payload))

    def completed(self, entry: Entry, outcome: bytes) -> None:
        self._entry(entry)
        self._ended(entry)
        if not entry.repeated:
            self.blobs.drop((entry.request_id, "payload"))
            self.blobs.put((entry.request_id, "outcome"), outcome, len(outcome))

    def expired(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            stream, _, seq_id = request_id.rpartition(":")
            self._ends.drop((stream, int(seq_id) // CLIENT_SEQ_IDS))
            self.entries.drop(request_id)
            self.blobs.drop((request_id, "payload"))
            self.blobs.drop((request_id, "outcome"))

    def ends(self, stream: str, client: int, after: int) -> list[Entry] | None:
        """What has ended of a client's samples (`entries.completions`) behind a completion, if that is known."""
        known = self._ends.get((stream, client))
        return None if known is None else known.after(after)

    def record(self, kind: type, key: tuple[Any, ...]) -> tuple[Any] | None:
        """(the record, or None where there is none such,) if it is known."""
        return self._records.get((kind, key))

    def read(self, kind: type, key: tuple[Any, ...], record: Any, version: int) -> None:
        """A read that began at `version` has found this."""
        if version == self.version:
            self._records.put((kind, key), (record,))

    def changed(self, kind: type, key: tuple[Any, ...]) -> None:
        """A commit has changed a record."""
        self.version += 1
        self._records.drop((kind, key))

    def forget(self) -> None:
        """Anything may have changed."""
        self.version += 1
        for each in (self.entries, self.blobs, self._ends, self._records):
            each.clear()

    def _ended(self, entry: Entry) -> None:
        """Numbers of completion only grow, and so do those of the commits whose results come here: what is behind the
        first one that is known of a client has all come here too."""
        if entry.kind != "sample" or entry.repeated:
            return
        key = (entry.stream, entry.seq_id // CLIENT_SEQ_IDS)
        known = self._ends.get(key)
        if known is None:
            self._ends.put(key, Ends(entry))
        else:
            known.add(entry)

    def _entry(self, entry: Entry) -> None:
        self.entries.put(entry.request_id, replace(entry, repeated=False) if entry.repeated else entry)
