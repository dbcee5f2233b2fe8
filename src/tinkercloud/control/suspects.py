"""What happens to what was running when its engine died: who may be blamed, and how that is found out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MAX_DEATHS = 2
"""What was running when the engine died this often may not run with everybody else any more."""

SUSPECTS_TOGETHER = 16
"""How many suspects run together at first: most of thousands are innocent, and not to be run one after another."""


class Lane:
    """An engine's road: all together, or while there are suspects, a few of them and nobody else.

    Whoever has come before suspects still gets to the end; whoever comes after waits until they are through.
    """

    def __init__(self) -> None:
        self._together = 0
        self._waiting_suspects = 0
        self._suspects: list[int] = []
        """Of each suspect that runs, how many may run with it, itself included."""
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Run with everybody who is no suspect."""
        while self._waiting_suspects or self._suspects:
            await self._change()
        self._together += 1
        try:
            yield
        finally:
            self._together -= 1
            self._changed.set()

    @asynccontextmanager
    async def apart(self, together: int = 1) -> AsyncIterator[None]:
        """Run as one of at most `together` suspects, with nobody else: 1 is alone."""
        self._waiting_suspects += 1
        try:
            while self._together or len(self._suspects) >= min([together, *self._suspects]):
                await self._change()
            self._suspects.append(together)
        finally:
            self._waiting_suspects -= 1
            self._changed.set()
        try:
            yield
        finally:
            self._suspects.remove(together)
            self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
