"""Waking whoever waits for a request to end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Arrivals:
    """Wake-ups by key. Carries no results: who is woken reads the ledger."""

    def __init__(self) -> None:
        self._listening: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.closed = False

    @contextmanager
    def listen(self, key: str) -> Iterator[asyncio.Event]:
        """An event that is set at the next announcement of the key. Look at the ledger after entering, then wait."""
        event = asyncio.Event()
        if self.closed:
            event.set()
        self._listening[key].add(event)
        try:
            yield event
        finally:
            self._listening[key].discard(event)
            if not self._listening[key]:
                del self._listening[key]

    def announce(self, *keys: str) -> None:
        """Wake everyone who listens to one of the keys."""
        for key in keys:
            for event in self._listening.get(key, ()):
                event.set()

    def close(self) -> None:
        """Release everyone: the server is stopping, its clients will ask again."""
        self.closed = True
        self.announce(*self._listening)


async def within(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than this."""
    with suppress(TimeoutError):
        # Not `wait_for`: on Python 3.11 it swallows a cancellation that comes together with the event.
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
