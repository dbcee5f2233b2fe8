"""Waking whoever waits for a request to end."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Arrivals:
    """Wake-ups by key. Carries no results: who is woken reads the ledger."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._closed = False

    def announce(self, *keys: str) -> None:
        """Wake everyone who waits for one of the keys."""
        for key in keys:
            for future in self._waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)

    async def wait(self, key: str, timeout: float) -> None:
        """Return at the next announcement of the key, after `timeout` seconds, or when the server stops."""
        if self._closed or timeout <= 0:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting[key].add(future)
        try:
            await asyncio.wait((future,), timeout=timeout)
        finally:
            waiters = self._waiting.get(key)
            if waiters is not None:
                waiters.discard(future)
                if not waiters:
                    del self._waiting[key]

    def close(self) -> None:
        """Release everyone: the server is stopping, its clients will ask again."""
        self._closed = True
        self.announce(*list(self._waiting))
