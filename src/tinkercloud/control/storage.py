"""The folders of saved weights: those that something may still read are held, those that nothing names go.

A folder outlives what names it only by a crash between two steps, and then until the next start, which sweeps. So the
order is always: files first, then the record that names them; and back: the record first, then the files.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from tinkercloud.control.checkpoint_cache import CheckpointCache, left_over
from tinkercloud.control.checkpoint_store import StoreUnavailable, UnusableStore, is_whole
from tinkercloud.control.folders import (
    CACHE,
    IMPORT_PREFIX,
    TREES,
    is_import,
    is_import_draft,
    is_stored,
    key_of,
    pin_folder,
    pins_folder,
    run_part,
    session_of,
    session_part,
    snapshots_folder,
)
from tinkercloud.control.outcomes import LoadDetails, details_of
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.files import link_files
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import (
    CheckpointRecord,
    Entry,
    ModelRecord,
    SamplerRecord,
    SessionRecord,
    SnapshotRecord,
)

log = logging.getLogger(__name__)


class Storage:
    """Holds and frees the folders of one data directory, and of its store if it has one."""

    def __init__(self, ledger: Ledger, data_dir: Path, cache: CheckpointCache | None = None):
        """`cache`: of the store that new checkpoints go to."""
        self._ledger = ledger
        self._data_dir = data_dir
        self._cache = cache
        self.lock = asyncio.Lock()
        """Held from the look at a checkpoint's record until its files are held too, and while a folder goes."""
        self.saving: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By owner: held from the look at how much is stored until one more checkpoint is recorded."""
        self._pinning: set[str] = set()
        self._since = time.time()

    # ------------------------------------------------------------ what lies in a store

    @property
    def has_store(self) -> bool:
        """Whether named checkpoints are to be published (`checkpoint_folder`'s `stored`)."""
        return self._cache is not None

    async def publish(self, folder: str) -> None:
        """Put a checkpoint that was saved where it is to be kept; durable when this returns. Nothing is to be done for
        one in the data directory. StoreUnavailable if it failed, and nothing is kept."""
        if not is_stored(folder):
            return
        try:
            if self._cache is None:
                raise StoreUnavailable(_no_store(folder))
            await self._cache.publish(folder)
        except StoreUnavailable:
            await self.remove(folder)
            raise

    async def bring(self, folder: str) -> None:
        """Make sure that a folder's files are here, for some minutes at least. NotFound or InvalidRequest if its
        checkpoint is gone or damaged in the store, StoreUnavailable."""
        if is_stored(folder):
            if self._cache is not None:
                await self._cache.fetch(folder)
            elif not await asyncio.to_thread(is_whole, self._data_dir / folder):
                raise InvalidRequest(_no_store(folder))

    async def evict(self) -> None:
        """Remove copies of stored checkpoints for which there is no room."""
        if self._cache is not None:
            await self._cache.evict()

    async def sweep_store(self) -> None:
        """Remove what a crash left in the store that no record names. Beside everything else."""
        if self._cache is None:
            return
        try:
            keys = await self._cache.keys()
            pending = {run_part(stream) for stream in await self._ledger.pending_streams()}
            applied = {run_part(run.model_id): self._ended(run) for run in await self._ledger.find(ModelRecord)}
            unnamed = left_over(keys, await self._named(), applied, pending)
        except (StoreUnavailable, UnusableStore, SQLAlchemyError) as error:
            log.warning("what a crash may have left in the store was not looked for: %s", error)
            return
        if unnamed:
            log.info("%d checkpoints in the store that nothing names are removed, as a crash leaves them", len(unnamed))
        for key in unnamed:
            self._cache.discard(f"{CACHE}/{key}")
        await self._forget_imports({key.partition("/")[0] for key in keys})

    async def _forget_imports(self, stored: set[str]) -> None:
        """Let go of imports that a crash kept from being stored, and of which nothing is left there."""
        for run in await self._ledger.without_checkpoints(IMPORT_PREFIX):
            if run.created_at < self._since and run_part(run.model_id) not in stored:
                await self._ledger.remove(SessionRecord, run.session_id)
                await self._ledger.remove(ModelRecord, run.model_id)

    def _ended(self, run: ModelRecord) -> int:
        """The newest seq_id of a run whose save has ended: of an import, whose only one is 0, if a server before this
        one has begun it."""
        return 0 if is_import(run.model_id) and run.created_at < self._since else run.applied_seq

    # ------------------------------------------------------------ loads hold what they load

    @asynccontextmanager
    async def pinned(self, model_id: str, checkpoint: CheckpointRecord) -> AsyncIterator[str]:
        """A folder with the checkpoint's files that stays, whatever becomes of the checkpoint, for as long as the log
        of `model_id` has a load that names it (`LoadDetails.pin`) and that a replay may run again. Record the load in
        the body. NotFound if the checkpoint is gone, Unavailable if the disk is full or the store does not answer."""
        folder = pin_folder(model_id)
        self._pinning.add(folder)
        try:
            while (lacking := await self._pin(checkpoint.path, folder)) is not None:
                await self.bring(lacking)
            yield folder
        except OSError as error:
            raise Unavailable(f"{checkpoint.path} cannot be held for loading: {error}") from error
        finally:
            # A write whose caller was cancelled may still happen: its pin stays until the next start looks.
            if not _cancelled():
                self._pinning.discard(folder)
                await self.unpin(model_id)

    async def _pin(self, path: str, folder: str) -> str | None:
        """Give a checkpoint's files a second place; its folder if that has to be brought first, None if it is done."""
        async with self.lock:
            current = await self._ledger.get(CheckpointRecord, path)
            if current is None:
                raise NotFound(f"there is no checkpoint {path} any more; load another one")
            source = self._data_dir / current.folder
            if is_stored(current.folder) and not await asyncio.to_thread(is_whole, source):
                return current.folder
            await asyncio.to_thread(link_files, source, self._data_dir / folder, self._data_dir)
            return None

    async def unpin(self, model_id: str) -> None:
        """Let go of the pins that no replay of this run needs any more."""
        there = await asyncio.to_thread(_folders, self._data_dir, f"{pins_folder(model_id)}/*")
        unused = [folder for folder in there if folder not in self._pinning]
        if unused:
            needed = _pins(await self._ledger.replayable("load_weights", model_id))
            await asyncio.to_thread(self._remove, [folder for folder in unused if folder not in needed])

    # ------------------------------------------------------------ what nothing names goes

    async def free(self, folder: str) -> None:
        """Remove the folder of a checkpoint, unless its record still names it or a sampler has it."""
        async with self.lock:
            named = await self._ledger.count(CheckpointRecord, folder=folder)
            if not named and not await self._ledger.count(SamplerRecord, folder=folder):
                await asyncio.to_thread(self._remove, [folder])
                if self._cache is not None and is_stored(folder):
                    self._cache.discard(folder)

    async def remove(self, folder: str) -> None:
        """Remove a folder that nothing reads any more, whatever record names it; of a stored one the copy here."""
        await asyncio.to_thread(self._remove, [folder])

    async def forget(self, model_id: str) -> None:
        """Remove what recovery kept of a run whose log has ended."""
        await self._ledger.prune_snapshots(model_id, keep=0)
        await asyncio.to_thread(self._remove, [snapshots_folder(model_id), pins_folder(model_id)])

    async def sweep(self) -> None:
        """Remove what a crash left that no record names. Only at the start, before anything is saved or loaded.

        Folders of sessions that this ledger does not know are not touched: they are another ledger's.
        """
        sessions, named = await self._ledger.find(SessionRecord), await self._named()
        unnamed, others = await asyncio.to_thread(unnamed_folders, self._data_dir, named, sessions)
        if unnamed:
            log.info("%d folders that nothing names are removed, as a crash leaves them", len(unnamed))
        if others:
            log.warning("%d folders are of no session of this ledger; `tinkercloud fsck` names them", len(others))
        await asyncio.to_thread(self._remove, unnamed)
        await asyncio.to_thread(self._remove_empty)

    async def _named(self) -> set[str]:
        return named_folders(
            await self._ledger.find(SessionRecord),
            await self._ledger.find(CheckpointRecord),
            await self._ledger.find(SnapshotRecord),
            await self._ledger.find(SamplerRecord),
            await self._ledger.replayable("load_weights"),
            await self._ledger.pending_streams(),
        )

    def _remove(self, folders: Iterable[str]) -> None:
        for folder in folders:
            shutil.rmtree(self._data_dir / folder, ignore_errors=True)

    def _remove_empty(self) -> None:
        """Remove the folders above those that went, where nothing is left in them. Only while no engine writes."""
        saved = [f"{tree}{below}" for tree in ("checkpoints", CACHE) for below in ("/*/*/*", "/*/*", "/*")]
        for pattern in (*saved, "snapshots/*", "pins/*"):
            for folder in self._data_dir.glob(pattern):
                if not any(folder.iterdir()):
                    folder.rmdir()


def named_folders(
    sessions: list[SessionRecord],
    checkpoints: list[CheckpointRecord],
    snapshots: list[SnapshotRecord],
    samplers: list[SamplerRecord],
    loads: list[Entry],
    pending_streams: list[str],
) -> set[str]:
    """The folders that must stay: `loads` are the load_weights that a replay may run, `pending_streams` the runs and
    samplers whose accepted operations have not ended."""
    named = _pins(loads)
    named |= {checkpoint.folder for checkpoint in checkpoints}
    named |= {snapshot.folder for snapshot in snapshots}
    finished = {session.session_id for session in sessions if session.state == "finished"}
    pending = set(pending_streams)
    sampled = {sampler.follows or sampler.sampler_id for sampler in samplers if sampler.sampler_id in pending}
    # The end of a session ends its ephemeral samplers, when the accepted samples of their weights have ended; a
    # checkpoint stays for as long as any sampler was made from it. Older inflight weights are those of their run
    # where the newest cannot be opened.
    named |= {
        sampler.folder
        for sampler in samplers
        if sampler.model_path is not None
        or sampler.session_id not in finished
        or (sampler.follows or sampler.sampler_id) in sampled
    }
    return named


def _pins(loads: list[Entry]) -> set[str]:
    return {load.pin for load in map(details_of, loads) if isinstance(load, LoadDetails)}


def unnamed_folders(data_dir: Path, named: set[str], sessions: list[SessionRecord]) -> tuple[list[str], list[str]]:
    """The folders in the data directory that are not in `named`: (of these sessions or of no ledger, of others)."""
    known = {session_part(session.session_id) for session in sessions}
    ours: list[str] = []
    others: list[str] = []
    for folder in (folder for tree in TREES for folder in _folders(data_dir, tree) if folder not in named):
        is_ours = session_of(folder) in known or is_import_draft(folder)  # drafts are no ledger's
        (ours if is_ours else others).append(folder)
    return ours, others


def _no_store(folder: str) -> str:
    return (
        f"the checkpoint {key_of(folder)} lies in a store, and this server has none now: whoever runs it can give the "
        "checkpoints_url again that it was saved with"
    )


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _folders(data_dir: Path, pattern: str) -> list[str]:
    return [folder.relative_to(data_dir).as_posix() for folder in data_dir.glob(pattern)]
