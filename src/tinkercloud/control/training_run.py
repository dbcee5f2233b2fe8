"""One training run: its log, and bringing its state into an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from tinkercloud.codec import decode, encode
from tinkercloud.config import Settings
from tinkercloud.control.engine_handle import EngineHandle
from tinkercloud.control.folders import snapshot_folder
from tinkercloud.control.storage import Storage
from tinkercloud.engine.operations import ClearGradients, DropModel, LoadWeights, SaveWeights
from tinkercloud.engine.results import Failure, LossOutput, Result, StepOutput
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.order import ModelLog, Turn
from tinkercloud.ledger.records import Entry, ModelRecord, Outcome, SnapshotRecord
from tinkercloud.ledger.segments import Corrupt

log = logging.getLogger(__name__)

STATE_CHANGES = frozenset({"create_model", "load_weights", "forward_backward", "optim_step"})
"""Kinds of operation that change a model's state: what a replay runs again."""

REPLAY_TOLERANCE = 1e-4
"""Largest relative difference between a replayed loss and the stored one before the run is stopped, where the same bits
cannot be expected."""


class ReplayError(Exception):
    """A run's state could not be rebuilt from its snapshot and log; the text says where it went wrong."""


class TrainingRun:
    """A model's log of operations, and where its state is now.

    The log is the truth. An engine's copy is rebuilt from the newest snapshot and the log behind it whenever the engine
    at hand is not the one that had it: after a crash, a restart of the server, or a park.
    """

    def __init__(self, record: ModelRecord, order: ModelLog, ledger: Ledger, storage: Storage):
        self.record = record
        self.order = order
        self.turn: Turn | None = None
        """The operation that was taken from the log and has not ended."""
        self._ledger = ledger
        self._storage = storage
        self._resident_in: EngineHandle | None = None
        self._applied_seq = record.applied_seq
        self.unsaved_operations = 0
        """Operations since the newest snapshot (or since the run's beginning)."""
        self.unsaved_bytes = 0
        """Of the payloads of those that were run."""
        self._unsaved_since = 0.0
        """When the first of them ended, or was run again (`time.monotonic`)."""

    @property
    def model_id(self) -> str:
        return self.record.model_id

    def ended(self, entry: Entry) -> None:
        """The turn's operation has ended, as the ledger recorded it."""
        self.turn = None
        self.order.ended(entry)
        self._applied_seq = max(self._applied_seq, entry.seq_id)
        if not self.unsaved_operations:
            self._unsaved_since = time.monotonic()
        self.unsaved_operations += 1

    def wants_snapshot(self, settings: Settings, now: float) -> bool:
        """Whether a recovery would have more to replay than the settings want, at `now` (`time.monotonic`)."""
        return self.unsaved_operations > 0 and (
            self.unsaved_operations >= settings.snapshot_operations
            or self.unsaved_bytes >= settings.snapshot_bytes
            or now - self._unsaved_since >= settings.snapshot_seconds
        )

    def resident(self, engine: EngineHandle | None) -> bool:
        return self._resident_in is not None and self._resident_in is engine

    def mistrust(self) -> None:
        """Rebuild the state before the next operation: the engine's may be ahead of the ledger."""
        self._resident_in = None

    async def bring_into(self, engine: EngineHandle) -> None:
        """Make sure that `engine` has the run's state as of its applied seq_id. ReplayError, EngineDied."""
        if self.resident(engine):
            return
        await self._drop(engine)
        self.unsaved_bytes = 0
        try:
            behind = await self._ledger.history(self.model_id, await self._begin(engine))
            self._warn_of_other_builds(engine, behind)
            for entry in behind:
                await self._replay(engine, entry)
        except ReplayError:
            await self._drop(engine)  # half a state is none
            raise
        self.unsaved_operations, self._unsaved_since = len(behind), time.monotonic()
        self._resident_in = engine
        if not self.record.base_fingerprint and engine.info.fingerprint:  # it was made before these were recorded
            known = engine.info.fingerprint
            self.record = await self._ledger.change(ModelRecord, self.model_id, base_fingerprint=known) or self.record

    def loaded_into(self, engine: EngineHandle) -> None:
        """A load_weights has ended well in `engine`: the whole state is there, whether or not it was before."""
        self._resident_in = engine

    async def _begin(self, engine: EngineHandle) -> int:
        """Load the newest whole state that can be read: a snapshot, or what the run loaded itself. The seq_id of the
        operation that it was the state after, -1 if there never was one."""
        snapshots = await self._ledger.find(SnapshotRecord, model_id=self.model_id)
        loads = await self._ledger.replayable("load_weights", self.model_id)
        beginnings = [*snapshots, *(load for load in loads if load.state == "done")]
        failures: list[ReplayError] = []
        for beginning in sorted(beginnings, key=lambda one: one.seq_id, reverse=True):
            try:
                if isinstance(beginning, Entry):
                    await self._run_again(engine, beginning)
                else:
                    folder, what = beginning.folder, f"its snapshot after operation {beginning.seq_id}"
                    load = LoadWeights(self.model_id, folder, with_optimizer=True, with_gradients=True)
                    await self._restore(engine, encode(load), what)
            except ReplayError as error:
                log.warning("%s; an older state and a longer replay are tried", error)
                failures.append(error)
            else:
                return beginning.seq_id
        if failures:
            raise failures[0]
        return -1

    async def _replay(self, engine: EngineHandle, entry: Entry) -> None:
        if entry.cleared_gradients:
            await self._restore(engine, encode(ClearGradients(self.model_id)), f"operation {entry.seq_id}")
        elif entry.kind in STATE_CHANGES and entry.state == "done":
            await self._compare(engine, entry, await self._run_again(engine, entry))

    async def _run_again(self, engine: EngineHandle, entry: Entry) -> Result:
        what = f"operation {entry.seq_id} ({entry.kind})"
        try:
            payload = await self._ledger.payload(entry.request_id)
        except (KeyError, Corrupt) as error:
            raise self._not_rebuilt(f"{what}: {error}") from error
        self.unsaved_bytes += len(payload)
        return await self._restore(engine, payload, what)

    async def _restore(self, engine: EngineHandle, payload: bytes, what: str) -> Result:
        (result,) = await engine.run_cycle([payload])
        if isinstance(result, Failure):
            raise self._not_rebuilt(f"{what}: {result.error}")
        return result

    def _not_rebuilt(self, why: str) -> ReplayError:
        return ReplayError(f"training run {self.model_id} could not be rebuilt: {why}")

    def _warn_of_other_builds(self, engine: EngineHandle, behind: list[Entry]) -> None:
        ran = {entry.build for entry in behind if entry.kind in STATE_CHANGES and entry.state == "done"}
        for other in ran - {engine.info.build}:
            log.warning(
                "training run %s was computed by %s and is rebuilt by %s: it goes on about where it was, with losses "
                "within %g, not bit for bit",
                self.model_id,
                other or "an engine that is not on record",
                engine.info.build,
                REPLAY_TOLERANCE,
            )

    async def _compare(self, engine: EngineHandle, entry: Entry, replayed: Result) -> None:
        """ReplayError if this is not what the operation gave before: the same bits where the same build computed it and
        can do so again, else about the same loss."""
        try:
            stored = await self._ledger.outcome(entry.request_id)
        except Corrupt as error:
            return log.warning("operation %d of %s is not compared: %s", entry.seq_id, self.model_id, error)
        if stored is None or not isinstance(replayed, LossOutput | StepOutput):
            return
        before = decode(stored, Outcome)
        assert isinstance(before, LossOutput | StepOutput)
        if engine.info.reproducible and entry.build == engine.info.build:
            differs = stored != encode(replayed)
        else:
            old, new = before.metrics.get("loss:sum", 0.0), replayed.metrics.get("loss:sum", 0.0)
            differs = not abs(old - new) <= REPLAY_TOLERANCE * max(1.0, abs(old))
        if differs:
            raise self._not_rebuilt(
                f"operation {entry.seq_id} ({entry.kind}) did not give again what was returned to its client: "
                f"{replayed.metrics} where it had been {before.metrics}"
            )

    @staticmethod
    async def snapshot(runs: Sequence[TrainingRun], engine: EngineHandle) -> None:
        """Write whole states together, and forget the logs behind them as far as recovery is concerned; not of runs
        whose state `engine` does not have. EngineDied, and what the ledger raises of one when all have been tried."""
        there = [run for run in runs if run.resident(engine)]
        saves = [
            SaveWeights(run.model_id, run._newest_snapshot, with_optimizer=True, with_gradients=True, replace=True)
            for run in there
        ]
        results = await engine.run_cycle([encode(save) for save in saves]) if saves else ()
        await all_of(*(run._has_saved(result) for run, result in zip(there, results, strict=True)))

    @property
    def _newest_snapshot(self) -> str:
        return snapshot_folder(self.model_id, self._applied_seq)

    async def _has_saved(self, result: Result) -> None:
        if isinstance(result, Failure):
            log.error("no snapshot of %s after operation %d: %s", self.model_id, self._applied_seq, result.error)
            return
        await self._ledger.insert(SnapshotRecord(self.model_id, self._applied_seq, self._newest_snapshot, time.time()))
        for record in await self._ledger.prune_snapshots(self.model_id):
            await self._storage.free(record.folder)
        await self._storage.unpin(self.model_id)
        self.unsaved_operations = self.unsaved_bytes = 0

    @staticmethod
    async def park(runs: Sequence[TrainingRun], engine: EngineHandle) -> None:
        """Put states on disk and free the engine's memory; the next operation brings each back. EngineDied, and as
        `snapshot`: whatever could not be put on disk is rebuilt from the log."""
        there = [run for run in runs if run.resident(engine)]
        try:
            await TrainingRun.snapshot([run for run in there if run.unsaved_operations], engine)
        finally:
            for run in there:
                run._resident_in = None
            if there:
                await engine.run_cycle([encode(DropModel(run.model_id)) for run in there])

    async def release(self, engine: EngineHandle | None) -> None:
        """Free the engine's memory without saving anything. EngineDied."""
        if self.resident(engine):
            await self._drop(engine)
        self._resident_in = None

    async def _drop(self, engine: EngineHandle) -> None:
        await engine.run_cycle([encode(DropModel(self.model_id))])


async def all_of(*endings: Coroutine[Any, Any, None]) -> None:
    """Wait for every one of them, then raise what the first raised that did."""
    for result in await asyncio.gather(*endings, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
