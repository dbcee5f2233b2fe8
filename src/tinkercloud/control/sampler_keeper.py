"""How long samplers stay: their records, and the folders of the ephemeral ones."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tinkercloud.config import Settings
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.folders import SAMPLERS
from tinkercloud.control.inflight import InflightWeights
from tinkercloud.control.storage import Storage
from tinkercloud.errors import NotFound
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import SamplerRecord, SessionRecord

log = logging.getLogger(__name__)

ROUND_SECONDS = 600.0
"""How often samplers are looked for that nobody can use any more."""

UNBOUND = "unbound-"
"""How the id begins of a session that an owner's requests without a sampling session share: it never finishes, and its
samplers are made again when they are asked for."""


class SamplerKeeper:
    """Removes samplers whose time is over, and ephemeral ones for which there is no room; never one that is in use.

    A checkpoint's folder goes with the last sampler that was made from it, if the checkpoint itself is gone.
    """

    def __init__(
        self, ledger: Ledger, models: BaseModels, storage: Storage, inflight: InflightWeights, settings: Settings
    ):
        self._ledger = ledger
        self._models = models
        self._storage = storage
        self._inflight = inflight
        self._data_dir = Path(settings.data_dir)
        self._retention = settings.sampler_retention_seconds
        self._budget = int(settings.ephemeral_sampler_bytes)
        self._used_at: dict[str, float] = {}
        self._in_use: Counter[str] = Counter()
        self._removing: set[str] = set()
        self._sizes: dict[str, int] = {}
        """Bytes of each ephemeral folder; they never change."""
        self._looked_at = 0.0
        self.changing = asyncio.Lock()
        """Held while a sampler is made or removed, and its weights with it."""

    # ------------------------------------------------------------ what those who use samplers say

    def touch(self, sampler_id: str) -> None:
        """Somebody has asked for this sampler."""
        self._used_at[sampler_id] = time.time()

    @contextmanager
    def in_use(self, sampler: SamplerRecord) -> Iterator[None]:
        """The sampler is not removed inside, nor until its accepted samples have ended."""
        self.touch(sampler.sampler_id)
        self._in_use[sampler.sampler_id] += 1
        try:
            yield
        finally:
            self._in_use[sampler.sampler_id] -= 1
            if not self._in_use[sampler.sampler_id]:
                del self._in_use[sampler.sampler_id]

    def is_going(self, sampler_id: str) -> bool:
        """Whether it is being removed now."""
        return sampler_id in self._removing

    async def check(self, sampler: SamplerRecord) -> None:
        """NotFound if its weights were removed; the text says why, and what to do."""
        weights = await self._inflight.of(sampler)
        if _is_ephemeral(sampler) and not (self._data_dir / weights.folder).is_dir():
            raise NotFound(
                f"sampler {sampler.sampler_id} is gone: the weights of sampling clients without a name may take "
                f"{self._budget} bytes together (the setting ephemeral_sampler_bytes), and it was unused for longest. "
                "Make a new sampling client, and one that must stay with save_weights_for_sampler and a name"
            )

    async def close(self, sampler: SamplerRecord) -> None:
        """Free a sampler's weights in its engine, when its last sample has ended; they stay on disk."""
        if sampler.base_model in self._models:
            await self._models.get(sampler.base_model).desk.close(sampler.sampler_id)

    async def end(self, sampler: SamplerRecord) -> None:
        """Its session has finished: free its weights, those of an ephemeral one on disk too. With samples that have not
        ended they stay, and go with the record, after its retention, or at the next start."""
        async with self.changing:
            has_weights = _is_ephemeral(sampler) and (await self._inflight.of(sampler)).sampler_id == sampler.sampler_id
            if has_weights and await self._is_free(sampler):
                await self._drop_folder(sampler)
            else:
                await self.close(sampler)

    @asynccontextmanager
    async def stopping(self, sampler: SamplerRecord) -> AsyncIterator[None]:
        """Nobody can use the sampler from here on; behind the body, which ends what it draws, it is removed."""
        self._removing.add(sampler.sampler_id)
        try:
            yield
            async with self.changing:
                is_left = await self._inflight.leave(sampler)
                await self._ledger.forget_samples(sampler.sampler_id)
                await self._ledger.remove(SamplerRecord, sampler.sampler_id)
                await (self.close(sampler) if is_left else self._drop_folder(sampler))
        finally:
            self._removing.discard(sampler.sampler_id)
        self._used_at.pop(sampler.sampler_id, None)

    # ------------------------------------------------------------ housekeeping

    async def drop_ended(self, now: float) -> None:
        """Remove the samplers of finished sessions, and the unbound ones, that were unused for the retention time."""
        if now - self._looked_at < ROUND_SECONDS:
            return
        self._looked_at = now
        for sampler in await self._ledger.find(SamplerRecord):
            session = await self._ledger.get(SessionRecord, sampler.session_id)
            is_ended = session is None or session.state == "finished"
            if not (is_ended or sampler.session_id.startswith(UNBOUND)):
                continue
            used_at = await self._last_use(sampler)
            if is_ended and session is not None:
                used_at = max(used_at, session.last_heartbeat)
            if used_at <= now - self._retention:
                async with self.changing:
                    await self._remove(sampler, now - self._retention)

    async def keep_within_budget(self) -> None:
        """Remove ephemeral weights until they fit: the least recently used of sessions that are silent, then those of
        the others. Of a session that is alive the newest stays, since its client may be about to use it, and so do the
        inflight weights of each run, which there is nothing else in place of."""
        async with self.changing:
            await asyncio.to_thread(self._measure)
            await self._drop_over_budget()

    async def _drop_over_budget(self) -> None:
        over = sum(self._sizes.values()) - self._budget
        if over <= 0:
            return
        order: list[tuple[bool, float, SamplerRecord]] = []
        alive: set[str] = set()
        for sampler in await self._ledger.find(SamplerRecord, model_path=None):  # newest first
            if sampler.folder not in self._sizes:
                continue
            session = await self._ledger.get(SessionRecord, sampler.session_id)
            is_alive = session is not None and session.state == "active"
            if is_alive and (sampler.follows or sampler.session_id not in alive):
                alive.add(sampler.session_id)
                continue
            order.append((is_alive, await self._last_use(sampler), sampler))
        for _, _, sampler in sorted(order, key=lambda item: item[:2]):
            if over <= 0:
                return
            if await self._is_free(sampler):
                over -= self._sizes[sampler.folder]
                await self._drop_folder(sampler)
                log.info("ephemeral sampler %s was dropped to stay within ephemeral_sampler_bytes", sampler.sampler_id)

    # ------------------------------------------------------------ inside

    async def _is_free(self, sampler: SamplerRecord) -> bool:
        """Whether none of the accepted samples of its weights has still to end, nor one is being accepted: true until
        the caller awaits something else."""
        sharing = [sampler]
        if sampler.follows is not None and (await self._inflight.of(sampler)).sampler_id == sampler.sampler_id:
            sharing = await self._ledger.find(SamplerRecord, follows=sampler.follows)
        pending = set(await self._ledger.pending_streams())  # also of a base model that is not served now
        desk = self._models.get(sampler.base_model).desk if sampler.base_model in self._models else None
        return not any(
            one.sampler_id in pending or self._in_use[one.sampler_id] or (desk and desk.runs(one.sampler_id))
            for one in sharing
        )

    async def _last_use(self, sampler: SamplerRecord) -> float:
        known = self._used_at.get(sampler.sampler_id)
        if known is None:
            known = await self._ledger.last_arrival(sampler.sampler_id) or sampler.created_at
            known = self._used_at.setdefault(sampler.sampler_id, known)
        return known

    async def _remove(self, sampler: SamplerRecord, unused_since: float) -> None:
        if not await self._is_free(sampler) or self._used_at[sampler.sampler_id] > unused_since:
            return  # somebody came while others were looked at
        self._removing.add(sampler.sampler_id)
        try:
            await self._ledger.forget_samples(sampler.sampler_id)
            await self._ledger.remove(SamplerRecord, sampler.sampler_id)
            await self._drop_folder(sampler)
        finally:
            self._removing.discard(sampler.sampler_id)
        del self._used_at[sampler.sampler_id]

    async def _drop_folder(self, sampler: SamplerRecord) -> None:
        """Free the weights in the engine, and on the disk if they are nobody else's. Out of sight at once, before
        anybody else can come."""
        folder = self._data_dir / sampler.folder
        gone = folder.with_name(f".{folder.name}.removed")
        if _is_ephemeral(sampler) and folder.is_dir():
            folder.rename(gone)
        await self.close(sampler)
        if _is_ephemeral(sampler):
            self._sizes.pop(sampler.folder, None)
            await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)
        elif sampler.folder:
            await self._storage.free(sampler.folder)

    def _measure(self) -> None:
        """Bring `_sizes` to what is on the disk."""
        there = {path.relative_to(self._data_dir).as_posix(): path for path in self._data_dir.glob(f"{SAMPLERS}/[!.]*")}
        for folder, path in there.items():
            if folder not in self._sizes:
                self._sizes[folder] = sum(file.stat().st_size for file in path.glob("*"))
        for folder in self._sizes.keys() - there.keys():
            del self._sizes[folder]


def _is_ephemeral(sampler: SamplerRecord) -> bool:
    """Whether its folder is its own."""
    return sampler.model_path is None and bool(sampler.folder)
