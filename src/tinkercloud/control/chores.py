"""Rounds of chores of which one may fail, or take long, without the others waiting for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

CHORE_SECONDS = 30.0
"""How long the others wait for one chore. What parks a run waits for its engine, which may compute for minutes, or not
go on at all."""

Begin = Callable[[], Coroutine[Any, Any, object]]

Chore = tuple[str, Begin]
"""What it is called, and how it is begun."""


class Chores:
    """Runs chores one after the other. One that takes long is left to itself, and nothing of its name is begun again
    before it ends."""

    def __init__(self) -> None:
        self._left: dict[str, asyncio.Task[None]] = {}

    async def round(self, *chores: Chore) -> None:
        """Do every chore, also when one before it has failed: it may be what frees the disk."""
        for name, begin in chores:
            if name in self._left:
                continue
            self._left[name] = asyncio.create_task(self._attempt(name, begin), name=name)
            await asyncio.wait([self._left[name]], timeout=CHORE_SECONDS)
            if name in self._left:
                log.warning("housekeeping: %s takes long; the others do not wait for it", name)

    async def end(self) -> None:
        """Give up what still runs."""
        tasks = list(self._left.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(self, name: str, begin: Begin) -> None:
        try:
            await attempt(name, begin)
        finally:
            del self._left[name]


async def attempt(name: str, begin: Begin) -> None:
    """Do a chore; what keeps it from being done is logged, and whoever asked for it goes on."""
    try:
        await begin()
    except Exception:
        log.exception("housekeeping: %s failed", name)
