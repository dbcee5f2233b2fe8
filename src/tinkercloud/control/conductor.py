"""Runs the logs of all training runs over one base model, cycle by cycle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from tinkercloud.config import Settings
from tinkercloud.control.arrivals import Arrivals, within
from tinkercloud.control.base_weights import fits
from tinkercloud.control.engine_handle import EngineDied, EngineHandle
from tinkercloud.control.engines import KeptEngine
from tinkercloud.control.folders import is_stored
from tinkercloud.control.gathering import Gathering
from tinkercloud.control.passing import PASSING, RETRY_SECONDS
from tinkercloud.control.preparation import Preparation
from tinkercloud.control.publications import Publications
from tinkercloud.control.run_end import RunEnd, finished, unloaded
from tinkercloud.control.sampler_desk import SamplerDesk
from tinkercloud.control.storage import Storage
from tinkercloud.control.suspects import MAX_DEATHS
from tinkercloud.control.training_run import TrainingRun, all_of
from tinkercloud.control.turn_end import TurnEnd
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.results import Failure, LoadOutput, Result, SaveOutput
from tinkercloud.errors import Unavailable
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.order import ModelLog, Turn
from tinkercloud.ledger.records import Entry, ModelRecord
from tinkercloud.ledger.timeline import Times
from tinkercloud.scheduler.cycle import Waiting, charge, next_cycle

log = logging.getLogger(__name__)

SAVED_TOGETHER = 32
"""Runs that are put on disk together: their files wait for the disk at the same time, and their records too."""

GAP_CHECK_SECONDS = 5.0
"""How often, at least, the logs are looked through for gaps that stayed open too long."""


class Unfinished(NamedTuple):
    """What a stop waits for."""

    operations: int
    """That are running; they end first."""
    runs: int
    """Training runs whose state is not on disk yet."""


class Conductor:
    """The training loop of one base model.

    Only this class runs operations of training runs. It owns their logs: whatever else wants to touch a run's state (a
    park, a stop) asks it, and is served between two cycles.
    """

    def __init__(
        self,
        engine: KeptEngine,
        ledger: Ledger,
        arrivals: Arrivals,
        storage: Storage,
        end: RunEnd,
        desk: SamplerDesk,
        settings: Settings,
    ):
        self._engine = engine
        self._ledger = ledger
        self._arrivals = arrivals
        self._storage = storage
        self._run_end = end
        self._settings = settings
        self._preparation = Preparation(ledger)
        self._turn_end = TurnEnd(ledger, storage, desk)
        self._runs: dict[str, TrainingRun] = {}
        self._early: dict[str, list[Entry]] = {}
        self._work = asyncio.Event()
        self._gathering = Gathering()
        self._between_cycles = asyncio.Lock()
        self._running = 0
        self._publications = Publications(storage)
        self._served_tokens: dict[str, float] = {}
        self._deaths: Counter[str] = Counter()
        self._doubtful: list[TrainingRun] = []
        """Runs of a cycle that failed, of whose turns it is not known whether the ledger holds them as ended."""
        self._stopping = False
        self._task = asyncio.create_task(self._conduct(), name=f"conductor {engine.name}")
        self._task.add_done_callback(self._task_ended)

    # ------------------------------------------------------------ what the service calls

    def add_run(self, record: ModelRecord, order: ModelLog) -> None:
        """Take a run in, with the log of what has not ended yet. No-op if it is here already."""
        if record.model_id in self._runs:
            return
        for entry in self._early.pop(record.model_id, ()):  # accepted while the log was being read
            order.add(entry, now=time.monotonic())
        self._runs[record.model_id] = TrainingRun(record, order, self._ledger, self._storage)
        self._work.set()

    def has(self, model_id: str) -> bool:
        """Whether a run was taken in and has not ended."""
        return model_id in self._runs

    def lacks_before(self, model_id: str, seq_id: int) -> bool:
        """Whether an operation of a run before this one has not arrived yet."""
        run = self._runs.get(model_id)
        return run is not None and run.order.lacks_before(seq_id)

    @contextmanager
    def arriving(self, model_id: str) -> Iterator[None]:
        """An operation is on its way to `accept` for as long as this is entered; a cycle may wait a moment for it."""
        try:
            with self._gathering.arriving(model_id):
                yield
        finally:
            self._work.set()  # also if nothing came of it

    async def accept(self, entry: Entry) -> None:
        """An entry is in the ledger: run it when its turn comes. It fails if its run has ended meanwhile. No-op if it
        is here already."""
        if entry.stream not in self._runs:
            model = await self._ledger.get(ModelRecord, entry.stream)
            if model is not None and model.state == "unloaded":
                await self._run_end.fail(entry, unloaded(entry.stream))
                return
        run = self._runs.get(entry.stream)
        if run is None:
            self._early.setdefault(entry.stream, []).append(entry)
        else:
            run.order.add(entry, now=time.monotonic())
            self._work.set()

    async def park(self, model_ids: list[str]) -> None:
        """Put runs on disk, after the running cycle; operations that wait bring them back at once."""
        async with self._between_cycles:
            if self._engine.state != "ready":
                return  # nothing is resident, and what is on disk is enough to rebuild it
            engine = await self._engine.running()
            runs = [self._runs[model_id] for model_id in model_ids if model_id in self._runs]
            for start in range(0, len(runs), SAVED_TOGETHER):
                together = runs[start : start + SAVED_TOGETHER]
                try:
                    await TrainingRun.park(together, engine)
                except EngineDied:
                    return
                except PASSING:  # the ledger has the logs: the runs are rebuilt from them
                    names = ", ".join(run.model_id for run in together)
                    log.exception("one or more of these training runs could not be put on disk: %s", names)

    async def end_runs(self, model_ids: list[str], why: Callable[[str], str] = finished) -> None:
        """Let go of the runs of a finished session, after the running cycle."""
        async with self._between_cycles:
            for model_id in model_ids:
                if (run := self._runs.pop(model_id, None)) is not None:
                    with suppress(EngineDied):
                        await run.release(self._engine.handle)
                await self._run_end.end(model_id, why(model_id))
                self._early.pop(model_id, None)

    async def park_all(self) -> None:
        """Put every run on disk, after the running cycle."""
        await self.park(list(self._runs))

    async def stop(self) -> None:
        """Finish the running cycle, then snapshot every run whose state is only in the engine."""
        async with self._between_cycles:
            self._stopping = True
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._publications.settle()
        await self.park_all()

    @property
    def failure(self) -> str | None:
        """Why no operation of this base model will run any more; None as long as they do. It would be a mistake in
        this server: no failure of the machine ends the loop."""
        if not self._task.done() or self._stopping or self._engine.released:
            return None
        return "its training loop has ended, which is a mistake in the server: see its log, report it, and restart it"

    @property
    def busy(self) -> bool:
        """Whether an operation is runnable or running."""
        waiting = (run for run in self._runs.values() if run.turn or len(run.order))
        return self._between_cycles.locked() or any(self._may_run(run, self._engine.info) for run in waiting)

    @property
    def unfinished(self) -> Unfinished:
        """What a stop has to wait for."""
        unsaved = (run for run in self._runs.values() if run.unsaved_operations and run.resident(self._engine.handle))
        return Unfinished(self._running + len(self._publications), sum(1 for _ in unsaved))

    # ------------------------------------------------------------ the loop

    async def _conduct(self) -> None:
        while True:
            try:
                await within(self._work, GAP_CHECK_SECONDS)
                self._work.clear()
                while await self._advance():
                    pass
                await self._save_idle()
            except EngineDied as error:
                log.error("%s; its operations run again on the next one", error)
                self._work.set()
            except Exception:
                log.exception("a cycle of %s failed; its operations run again from what is on disk", self._engine.name)
                await asyncio.sleep(RETRY_SECONDS)
                self._work.set()

    async def _advance(self) -> bool:
        """Run the next cycle; False if nothing waits."""
        await self._gather()
        async with self._between_cycles:
            await self._begin_again()
            waiting = self._waiting()
            if not waiting:
                return False
            cycle = next_cycle(waiting, self._settings.cycle_tokens, self._served_tokens)
            runs = [self._runs[w.model_id] for w in cycle]
            self._running = len(runs)
            lane = self._engine.lane
            is_suspect = any(self._deaths[w.request_id] for w in cycle)
            began = time.monotonic()
            try:
                async with lane.apart() if is_suspect else lane.together():  # no sample takes part in the blame
                    await self._run_cycle(runs)
            except EngineDied:
                raise
            except Exception:
                # What the engine has done may not be in the ledger (a full disk): the ledger is the truth.
                self._doubtful = runs
                for run in runs:
                    run.mistrust()
                raise
            finally:
                self._running = 0
        self._served_tokens = charge(self._served_tokens, cycle, {w.owner for w in waiting})
        live = [w.model_id for w in cycle if w.model_id in self._runs]
        self._gathering.answered(live, sum(w.num_tokens for w in cycle), began, time.monotonic())
        return True

    async def _save_idle(self) -> None:
        """Snapshot the runs whose newest operations are older than `snapshot_seconds`."""
        engine = self._engine.handle
        late = [run for run in self._runs.values() if run.wants_snapshot(self._settings, time.monotonic())]
        if engine is None or not late:
            return
        for run in late:
            async with self._between_cycles:
                await TrainingRun.snapshot([run], engine)
            if self._runnable():
                return  # the others have time until there is nothing to do again

    def _runnable(self) -> set[str]:
        now = time.monotonic()
        has_one = (run for run in self._runs.values() if run.turn or run.order.peek(now))
        return {run.model_id for run in has_one if self._may_run(run, self._engine.info)}

    def _may_run(self, run: TrainingRun, info: BaseModelInfo | None) -> bool:
        """Whether the run's turn is not running already, the engine can be loaded, and its weights are those that the
        run was made on; to be unloaded, it needs none."""
        if run.model_id in self._publications or self._engine.failure is not None:
            return False
        return fits(run.record, info) or (run.turn is not None and run.turn.entry.kind == "unload_model")

    async def _gather(self) -> None:
        """Let operations that are about to come take part in the next cycle."""
        since = time.monotonic()
        while True:
            left = self._gathering.deadline(self._runnable(), since) - time.monotonic()
            if left <= 0:
                return
            self._work.clear()
            await within(self._work, left)

    def _waiting(self) -> list[Waiting]:
        waiting = []
        for run in self._runs.values():
            if run.turn is None:
                run.turn = run.order.take(time.monotonic())
            if run.turn is not None and self._may_run(run, self._engine.info):
                entry = run.turn.entry
                waiting.append(
                    Waiting(run.model_id, run.record.owner, entry.request_id, entry.num_tokens, entry.created_at)
                )
        suspects = [w for w in waiting if self._deaths[w.request_id]]
        return suspects[:1] or waiting  # whatever ran when an engine died runs alone, so that others are not blamed

    async def _run_cycle(self, runs: list[TrainingRun]) -> None:
        try:
            engine = await self._engine.running()
        except Unavailable:
            return  # what was accepted waits for a server that can load the model: see `_may_run`
        ready: list[tuple[TrainingRun, bytes]] = []
        for run in (run for run in runs if self._may_run(run, engine.info)):  # it may have been loaded just now
            prepared = await self._prepared(run, engine)
            if isinstance(prepared, Failure):
                await self._end(run, prepared)
            else:
                ready.append((run, prepared))
        if not ready:
            return
        began = time.time()
        try:
            results = await engine.run_cycle([payload for _, payload in ready])
        except EngineDied:
            self._deaths.update(run.turn.entry.request_id for run, _ in ready)
            raise
        times = Times(began, time.time(), engine.steps)
        ended: list[tuple[TrainingRun, Result]] = []
        for (run, payload), result in zip(ready, results, strict=True):
            run.unsaved_bytes += len(payload)
            if isinstance(result, LoadOutput):
                run.loaded_into(engine)
            if isinstance(result, SaveOutput) and is_stored(result.folder):
                then = partial(self._published, run, run.turn, times, result.folder)
                self._publications.start(run.model_id, result, then, self._work.set)
            else:
                ended.append((run, result))
        await all_of(*(self._end(run, result, times) for run, result in ended))
        # A load should not be replayed for long: until a snapshot has passed it, its checkpoint's files are held.
        now = time.monotonic()
        full = [run for run, end in ended if isinstance(end, LoadOutput) or run.wants_snapshot(self._settings, now)]
        await TrainingRun.snapshot(full, engine)

    async def _published(self, run: TrainingRun, turn: Turn, times: Times, folder: str, result: Result) -> None:
        """The store has what a run's turn has saved, or has not taken it: now the turn has ended."""
        async with self._between_cycles:
            if self._runs.get(run.model_id) is not run or run.turn is not turn:
                await self._storage.free(folder)  # the run has ended meanwhile
                return
            try:
                await self._end(run, result, times)
            except Exception:
                log.exception("%s was published and not recorded; it is saved again", folder)
                self._doubtful.append(run)

    async def _prepared(self, run: TrainingRun, engine: EngineHandle) -> bytes | Failure:
        """The bytes to run for a run's turn, or why its operation fails."""
        entry = run.turn.entry
        if self._deaths[entry.request_id] >= MAX_DEATHS:  # the run's state went with the engine and is rebuilt later
            return Failure(
                f"{entry.kind} (seq_id {entry.seq_id}) ended the engine process {MAX_DEATHS} times and was given up; "
                "the model goes on as if it had not been sent. The server's log has the details",
                "server",
            )
        try:
            return await self._preparation.prepare(run, engine)
        except EngineDied:
            self._deaths[entry.request_id] += 1
            raise

    async def _end(self, run: TrainingRun, result: Result, times: Times | None = None) -> None:
        """Store what an operation gave and when it ran, if it did; then let the next one and its client go on."""
        info = self._engine.info
        await self._has_ended(run, await self._turn_end.end(run, result, times, info and info.build))

    async def _has_ended(self, run: TrainingRun, entry: Entry) -> None:
        self._deaths.pop(entry.request_id, None)
        self._arrivals.announce(entry.request_id)
        if entry.kind == "unload_model" and entry.state == "done":
            del self._runs[run.model_id]
            run.mistrust()
            await self._run_end.end(run.model_id, unloaded(run.model_id))

    async def _begin_again(self) -> None:
        """After a cycle that failed, take what the ledger holds as ended for ended; the rest runs again."""
        while self._doubtful:
            run = self._doubtful[-1]
            ended = await self._turn_end.recorded(run)
            self._doubtful.pop()
            if ended is not None:
                await self._has_ended(run, ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if self.failure is not None:
            error = None if task.cancelled() else task.exception()
            log.critical("%s: %s", self._engine.name, self.failure, exc_info=error)
