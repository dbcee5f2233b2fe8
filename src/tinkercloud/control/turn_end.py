"""The end of a turn: what it gave goes into the ledger, with the records it makes; what they replace, from the disk."""

from __future__ import annotations

import logging
import time

from tinkercloud.codec import encode
from tinkercloud.control.metering import tokens_of
from tinkercloud.control.outcomes import SamplerDetails, SaveDetails, conclude, details_of
from tinkercloud.control.quotas import beyond_storage
from tinkercloud.control.sampler_desk import SamplerDesk
from tinkercloud.control.storage import Storage
from tinkercloud.control.training_run import TrainingRun
from tinkercloud.engine.results import Failure, Result, SaveOutput
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import CatalogRecord, CheckpointRecord, Entry, SamplerRecord
from tinkercloud.ledger.timeline import Times

log = logging.getLogger(__name__)


class TurnEnd:
    """Ends the turns of the training runs over one base model. What the ledger holds as ended has ended."""

    def __init__(self, ledger: Ledger, storage: Storage, desk: SamplerDesk):
        self._ledger = ledger
        self._storage = storage
        self._desk = desk

    async def end(self, run: TrainingRun, result: Result, times: Times | None, build: str | None) -> Entry:
        """Store what an operation gave, and when it ran and by which build, if it did; the entry as it is now."""
        details = details_of(run.turn.entry)
        if not (isinstance(result, SaveOutput) and isinstance(details, SaveDetails) and details.limit):
            return await self._record(run, result, times, build)
        async with self._storage.saving[run.record.owner]:
            why = await beyond_storage(self._ledger, run.record.owner, details.limit, time.time())
            if why is not None:
                await self._storage.free(result.folder)
            return await self._record(run, result if why is None else Failure(why, "user"), times, build)

    async def recorded(self, run: TrainingRun) -> Entry | None:
        """How a run's turn ended of which it is not known whether it was stored, if the ledger holds it as ended."""
        entry = run.turn and await self._ledger.entry(run.turn.entry.request_id)
        details = entry and details_of(entry)
        saved = None
        if isinstance(details, SamplerDetails) and details.inflight:
            saved = await self._ledger.get(SamplerRecord, details.sampler_id)
        if not entry or entry.state == "accepted":
            return None
        run.ended(entry)
        if saved is not None:
            self._desk.publish(saved)
        return entry

    async def _record(self, run: TrainingRun, result: Result, times: Times | None, build: str | None) -> Entry:
        turn, entry = run.turn, run.turn.entry
        outcome, records = conclude(entry, run.record, result)
        replaced = await self._replaced(records)
        failed = isinstance(outcome, Failure)
        # A step that fails clears what it was to apply, like one whose batch was incomplete.
        failed_step = failed and turn.failure is None and entry.kind == "optim_step"
        if failed_step and outcome.category == "server":
            run.mistrust()  # the engine may not have come so far as to clear it
        cleared = turn.clear_gradients or failed_step
        ended = await self._ledger.complete(
            entry.request_id,
            encode(outcome),
            failed=failed,
            cleared_gradients=cleared,
            build=build,
            also=records,
            tokens=tokens_of(entry, result),
            of=run.record,
            times=times,
        )
        run.ended(ended)
        for record in records:
            if isinstance(record, SamplerRecord) and record.follows is not None:
                self._desk.publish(record)
        for folder in replaced:
            try:
                await self._storage.free(folder)
            except Exception:  # the turn has ended all the same, and somebody waits to hear so
                log.exception("%s, which nothing needs any more, stays until the next start", folder)
        return ended

    async def _replaced(self, records: list[CatalogRecord]) -> list[str]:
        """The folders of the checkpoints in whose place these records are stored."""
        replaced: list[str] = []
        for new in records:
            if isinstance(new, CheckpointRecord):
                old = await self._ledger.get(CheckpointRecord, new.path)
                # A save that runs again after a crash has the folder that its record may name already.
                if old is not None and old.folder != new.folder:
                    replaced.append(old.folder)
        return replaced
