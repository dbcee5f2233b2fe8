"""Checkpoints that lie in a store: published there when they are saved, and copied here when somebody reads them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from tinkercloud.control.checkpoint_store import CheckpointStore, StoreUnavailable, UnusableStore, is_whole
from tinkercloud.control.daemon_threads import DaemonThreads
from tinkercloud.control.folders import CACHE, is_stored, key_of
from tinkercloud.errors import NotFound

log = logging.getLogger(__name__)

PAUSES = (1.0, 5.0, 15.0)
"""Seconds before a publication that failed is tried again."""

STREAMS = 4
"""Checkpoints that are sent or fetched at a time."""

IN_USE_SECONDS = 600.0
"""What was used this recently is not evicted: somebody may be reading it."""

CLAIM_SECONDS = 5.0
"""How long a start waits for the store."""

STOP_SECONDS = 15.0
"""How long a stop waits for what is on its way; the rest is sent again, or removed, after the next start."""

T = TypeVar("T")


class CheckpointCache:
    """The copies, in `cache/` of one data directory. Folders are relative to that, as everywhere.

    A folder that is there is whole. It may go when it was not used for a while: who reads it asks for it first.
    """

    def __init__(self, store: CheckpointStore, data_dir: Path, budget: int):
        """`budget`: bytes that copies may take."""
        self.store = store
        self._data_dir = data_dir
        self._budget = budget
        self._streams = DaemonThreads(STREAMS, "checkpoint store")
        self._removals = DaemonThreads(1, "checkpoint store, removals")
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._publishing: set[str] = set()
        self._used_at: dict[str, float] = {}
        self._changing: dict[str, asyncio.Task[None]] = {}
        """By folder, the call that changes its key in the store; it goes on when its caller is cancelled."""
        self._discards: dict[str, asyncio.Task[None]] = {}

    async def publish(self, folder: str) -> None:
        """Put a folder into the store, durably. StoreUnavailable when it could not be done after some tries; then
        nothing of it is left there, as soon as the store answers again."""
        self._publishing.add(folder)
        self.touch(folder)
        given_up = threading.Event()
        try:
            while folder in self._discards:  # of an attempt before, whose end was not recorded
                await asyncio.wait([self._discards[folder]])
            for pause in (*PAUSES, None):
                try:
                    await self._change(folder, self._streams, lambda: self._put(folder, given_up))
                    return
                except (StoreUnavailable, NotFound, UnusableStore, OSError) as error:
                    if pause is None or isinstance(error, UnusableStore):
                        self.discard(folder)
                        raise StoreUnavailable(str(error)) from error
                    log.warning("%s was not published (%s); it is tried again in %g s", folder, error, pause)
                await asyncio.sleep(pause)
        finally:
            given_up.set()
            self._publishing.discard(folder)

    def _put(self, folder: str, given_up: threading.Event) -> None:
        self.store.put(self._data_dir / folder, key_of(folder), given_up.is_set)

    async def fetch(self, folder: str) -> None:
        """Make sure that a folder's copy is here. NotFound, InvalidRequest, StoreUnavailable."""
        self.touch(folder)
        place = self._data_dir / folder
        async with self._fetching.setdefault(folder, asyncio.Lock()):
            try:
                if not await asyncio.to_thread(is_whole, place):
                    await self._in_thread(self._streams, lambda: self._fetch(folder))
            except (OSError, UnusableStore) as error:
                raise StoreUnavailable(f"{key_of(folder)} cannot be copied from the store now: {error}") from error

    def _fetch(self, folder: str) -> None:
        place = self._data_dir / folder
        if place.is_dir():
            log.warning("%s is not what was written there; it is fetched again", folder)
            self._remove(folder)
        self.store.get(key_of(folder), place)

    def touch(self, folder: str) -> None:
        """Somebody is about to read it."""
        self._used_at[folder] = time.time()

    def discard(self, folder: str) -> None:
        """Remove a folder from the store, in the background: nobody waits for it, and what a crash leaves of it the
        next start removes. The copy here is the caller's to remove."""
        if folder not in self._discards:
            task = asyncio.create_task(self._discard(folder), name=f"discard {folder}")
            self._discards[folder] = task
            task.add_done_callback(lambda _: self._discards.pop(folder))

    async def _discard(self, folder: str) -> None:
        try:
            await self._change(folder, self._removals, lambda: self.store.remove(key_of(folder)))
        except (StoreUnavailable, NotFound, UnusableStore) as error:
            log.warning("%s is not needed any more and stays in the store until the next start: %s", folder, error)

    async def _change(self, folder: str, threads: Executor, work: Callable[[], None]) -> None:
        """Run what changes a folder's key in the store, when nothing else changes it any more."""
        while folder in self._changing:
            await asyncio.wait([self._changing[folder]])
        task = asyncio.create_task(self._in_thread(threads, work), name=f"change {folder}")
        self._changing[folder] = task
        task.add_done_callback(lambda _: self._changing.pop(folder))
        await asyncio.shield(task)

    async def claim(self) -> None:
        """Take the store for this data directory, before anything is put there; what does not answer soon is asked
        again by the first save. UnusableStore if it is another's."""
        try:
            async with asyncio.timeout(CLAIM_SECONDS):
                await self._in_thread(self._streams, self.store.claim)
        except (StoreUnavailable, NotFound, TimeoutError) as error:
            log.warning("the store of the checkpoints does not answer now: %s", error or self.store.url)

    async def keys(self) -> set[str]:
        """What the store has. StoreUnavailable, UnusableStore if it is another data directory's."""
        await self._in_thread(self._streams, self.store.claim)
        return await self._in_thread(self._streams, self.store.keys)

    async def evict(self) -> None:
        """Remove copies until they fit into the budget, the least recently used first."""
        there = await asyncio.to_thread(self._measure)
        over = sum(size for size, _ in there.values()) - self._budget
        latest = time.time() - IN_USE_SECONDS
        used_at = {folder: self._used_at.get(folder, written) for folder, (_, written) in there.items()}
        self._used_at = {folder: used for folder, used in self._used_at.items() if used > latest or folder in there}
        for folder in sorted(there, key=used_at.__getitem__):
            if over <= 0 or used_at[folder] > latest:
                return
            if folder not in self._publishing and self._used_at.get(folder, 0) <= latest:
                over -= there[folder][0]
                await asyncio.to_thread(self._remove, folder)

    def _measure(self) -> dict[str, tuple[int, float]]:
        """(bytes, when it was written) of each copy that is here."""
        found = {}
        for path in self._data_dir.glob(f"{CACHE}/*/*/*/[!.]*"):
            with suppress(FileNotFoundError):  # it goes just now
                size = sum(file.stat().st_size for file in path.iterdir())
                found[path.relative_to(self._data_dir).as_posix()] = (size, path.stat().st_mtime)
        return found

    def _remove(self, folder: str) -> None:
        """Out of sight at once: nobody must find half of it."""
        place = self._data_dir / folder
        gone = place.with_name(f".{place.name}.evicted")
        if place.is_dir():
            shutil.rmtree(gone, ignore_errors=True)  # of a time when it could not be removed
            place.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    async def close(self) -> None:
        """Wait a moment for what is on its way, also of publications that were given up. What a thread is still in
        after that ends with the process."""
        on_its_way = {*self._discards.values(), *self._changing.values()}
        if on_its_way:
            _, late = await asyncio.wait(on_its_way, timeout=STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._streams.shutdown()
        self._removals.shutdown()

    @staticmethod
    async def _in_thread(threads: Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def left_over(keys: Iterable[str], named: set[str], applied: dict[str, int], pending: set[str]) -> list[str]:
    """Which of a store's keys a crash has left: those of known runs (`applied`: the newest seq_id that has ended, by
    run) that no folder in `named` is, and whose operation has ended. Of `pending` runs none: their saves run again.

    What is of later operations than the ledger knows of is not touched: the ledger was restored from a backup.
    """
    unnamed = set(keys) - {key_of(folder) for folder in named if is_stored(folder)}
    found = []
    for key in unnamed:
        run, seq_id = key.split("/")[0], key.split("/")[-1]
        if run not in pending and seq_id.isdigit() and int(seq_id) <= applied.get(run, -1):
            found.append(key)
    return sorted(found)
