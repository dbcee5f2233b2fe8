"""The server behind the API: what a client can ask for, room by room, without HTTP and without torch.

`api/` decodes and validates a request, calls one method of one of these rooms, and encodes what comes back. Everything
that must survive is on disk before a method returns. All raise `tinkercloud.errors` with a sentence for the client.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from tinkercloud.addresses import is_loopback
from tinkercloud.config import Settings
from tinkercloud.control.arrivals import Arrivals
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.billing import Billing
from tinkercloud.control.checkpoint_cache import CheckpointCache
from tinkercloud.control.checkpoint_store import CheckpointStore, UnusableStore
from tinkercloud.control.checkpoints import Checkpoints
from tinkercloud.control.chores import Chores, attempt
from tinkercloud.control.copies import Copies
from tinkercloud.control.engines import OnProgress
from tinkercloud.control.futures import Futures
from tinkercloud.control.inflight import InflightWeights
from tinkercloud.control.keys import Keys
from tinkercloud.control.operator import Operator
from tinkercloud.control.quotas import Quotas
from tinkercloud.control.runs import TrainingRuns
from tinkercloud.control.sampler_keeper import SamplerKeeper
from tinkercloud.control.samplers import Samplers
from tinkercloud.control.sessions import Sessions
from tinkercloud.control.stability import StabilityRecords
from tinkercloud.control.storage import Storage
from tinkercloud.control.store_owner import StoreOwner
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import AuditRecord


class NoKeys(Exception):
    """Other machines could reach the server, and it has no keys. The text says what to do."""


class Service:
    """The rooms of a running server. Make one with `start`."""

    def __init__(self, settings: Settings, ledger: Ledger, keys: Keys, on_progress: OnProgress):
        self._settings = settings
        self.keys = keys
        self._ledger = ledger
        self._arrivals = Arrivals()
        data_dir = Path(settings.data_dir)
        self._cache: CheckpointCache | None = None
        if settings.checkpoints_url is not None:
            store = CheckpointStore(settings.checkpoints_url, StoreOwner(data_dir))
            self._cache = CheckpointCache(store, data_dir, int(settings.checkpoints_cache_bytes))
        self.storage = Storage(ledger, data_dir, self._cache)
        self._sweeping: asyncio.Task[None] | None = None
        self._chores = Chores()
        inflight = InflightWeights(ledger)
        self.models = BaseModels(settings, ledger, self._arrivals, self.storage, inflight, on_progress)
        self._keeper = SamplerKeeper(ledger, self.models, self.storage, inflight, settings)
        self.sessions = Sessions(ledger, self.models, self._keeper, settings)
        self.runs = TrainingRuns(ledger, self.models, self.sessions, self.storage)
        self.checkpoints = Checkpoints(ledger, self.models, self.storage, settings.data_dir)
        self.billing = Billing(ledger, self.models, settings)
        self.copies = Copies(ledger, self.checkpoints, self.storage)
        self.samplers = Samplers(
            ledger,
            self._arrivals,
            self.models,
            self.sessions,
            self.checkpoints,
            self._keeper,
            settings.max_pending_samples,
        )
        self.futures = Futures(ledger, self._arrivals, self.models)
        self.quotas = Quotas(ledger)
        self.operator = Operator(
            ledger, self.models, self.sessions, self.runs, self.samplers, self.futures, self._keeper
        )
        self.stability = StabilityRecords(ledger, settings.stability_retention_seconds)

    @classmethod
    async def start(cls, settings: Settings, on_progress: OnProgress) -> Service:
        """Open the data directory, begin to load the base models, and take up what the last run left unfinished.

        Raises NoKeys and UnusableStore.
        """
        ledger = await Ledger.open(
            settings.data_dir,
            settings.database_url,
            result_retention=settings.result_retention_seconds,
            unretrieved_retention=settings.unretrieved_retention_seconds,
            sync_to_disk=settings.sync_to_disk,
        )
        keys = await Keys.open(ledger)
        if not keys.configured and not is_loopback(settings.host):
            await keys.close()
            await ledger.close()
            raise NoKeys(
                f"{settings.host} can be reached from other machines, and this server has no keys to tell its users "
                "apart: make one first (`tinkercloud keys create NAME`), or listen on 127.0.0.1 and reach it through "
                "an SSH tunnel (ssh -L 8000:127.0.0.1:8000 HOST)"
            )
        try:
            service = cls(settings, ledger, keys, on_progress)
            if service._cache is not None:
                await service._cache.claim()
        except UnusableStore:
            await keys.close()
            await ledger.close()
            raise
        await attempt("forgive downtime", ledger.forgive_downtime)
        await attempt("complete ends", service.sessions.complete_ends)
        await attempt("sweep", service.storage.sweep)
        for model in settings.models:
            await service.models.serve(model)
        await service.models.serve_added()
        service._sweeping = asyncio.create_task(service.storage.sweep_store(), name="sweep store")
        return service

    async def audit(self, record: AuditRecord) -> None:
        """Add to the log of who did what; on disk when this returns."""
        await self._ledger.record_event(record)

    async def events(self, start: float, end: float) -> list[AuditRecord]:
        """Who did what in [start, end), oldest first."""
        return await self._ledger.events(start, end)

    async def tidy(self, now: float) -> None:
        """One round of housekeeping: take up what a lost answer has left, park silent sessions, unload idle models,
        drop what is past its retention."""
        await self._chores.round(
            ("take up", self.models.take_up),
            ("mark silent sessions", partial(self.sessions.mark_silent, now)),
        )
        # A chore for each base model: an engine that hangs keeps nothing of the others from being done.
        await self._chores.round(
            *((f"let go in {name}", partial(self.sessions.let_go, name)) for name in self.sessions.leaving),
            *((f"unload {one.engine.name}", partial(self.models.unload_idle, one)) for one in self.models),
            ("expire", partial(self._ledger.expire, now)),
            ("drop ended samplers", partial(self._keeper.drop_ended, now)),
            ("keep samplers within budget", self._keeper.keep_within_budget),
            ("drop expired checkpoints", partial(self.checkpoints.drop_expired, now)),
            ("evict", self.storage.evict),
        )

    async def stop(self) -> None:
        """Release waiting clients, finish the running cycles, put every run on disk, end the engines."""
        self.release()
        await self._chores.end()
        await self.models.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        if self._cache is not None:
            await self._cache.close()
        await self.keys.close()
        await self._ledger.close()

    def release(self) -> None:
        """The server is about to stop: answer every held poll, and end the engines that are still loading."""
        self._arrivals.close()
        self.models.release()
