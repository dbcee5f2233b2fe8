"""The threads that read the ledger's database, beside the one that writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Engine

from tinkercloud.ledger import database

READERS = 4
"""Threads that read."""

T = TypeVar("T")


class Readers:
    """Runs functions over a connection off the event loop, a few at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function(connection, *arguments)` gives."""

        def run() -> T:
            with database.answering(), self._engine.connect() as connection:
                return function(connection, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    async def close(self) -> None:
        """Return when every read has ended."""
        await asyncio.to_thread(self._threads.shutdown)
