"""What may wait a little for the disk: heartbeats, last uses and marks of retrieval."""

from __future__ import annotations

from msgspec.structs import replace

from tinkercloud.ledger import catalog, retention
from tinkercloud.ledger.catalog import R
from tinkercloud.ledger.recent import Recent
from tinkercloud.ledger.records import ModelRecord, SessionRecord
from tinkercloud.ledger.writer import Writer

MAX_UNFLUSHED = 10_000
"""How many retrievals may wait."""


class Deferred:
    """Times that are in memory until a flush writes all of them together. A crash loses them."""

    def __init__(self, writer: Writer, recent: Recent) -> None:
        self._writer = writer
        self._recent = recent
        self._touches = catalog.Touches({}, {})
        self._retrieved: dict[str, float] = {}

    def heard_of(self, session_id: str, now: float) -> None:
        """A session is alive."""
        self._touches.sessions[session_id] = now

    def used(self, stream: str, now: float) -> None:
        """An operation of a model has arrived."""
        self._touches.models[stream] = now

    async def retrieved(self, request_id: str, expires_at: float) -> None:
        """An outcome was sent, and is kept until then; the earliest time counts."""
        self._retrieved[request_id] = min(expires_at, self._retrieved.get(request_id, expires_at))
        if len(self._retrieved) >= MAX_UNFLUSHED:
            await self.flush()

    def fresh(self, record: R) -> R:
        """The record with the heartbeat or last use that is not on disk yet."""
        if isinstance(record, SessionRecord) and record.session_id in self._touches.sessions:
            return replace(record, last_heartbeat=self._touches.sessions[record.session_id])
        if isinstance(record, ModelRecord) and record.model_id in self._touches.models:
            return replace(record, last_request_at=self._touches.models[record.model_id])
        return record

    async def flush(self) -> None:
        """Return when all of it is on disk; what could not be written stays for the next time."""
        touches = catalog.Touches(dict(self._touches.sessions), dict(self._touches.models))
        retrieved = dict(self._retrieved)

        def then(_: None) -> None:
            _forget(self._touches.sessions, touches.sessions)
            _forget(self._touches.models, touches.models)
            for kind, times in ((SessionRecord, touches.sessions), (ModelRecord, touches.models)):
                for key in times:
                    self._recent.changed(kind, (key,))

        if any(touches):
            await self._writer.write(catalog.touch, touches, then=then)
        if retrieved:
            await self._writer.write(
                retention.mark_retrieved, retrieved, then=lambda _: _forget(self._retrieved, retrieved)
            )


def _forget(times: dict[str, float], written: dict[str, float]) -> None:
    """Drop the times that are on disk; one that has changed since stays."""
    for key, time_written in written.items():
        if times.get(key) == time_written:
            del times[key]
