"""Runs the samples over one base model: opens their samplers' weights in the engine and hands the requests over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from contextlib import suppress

from tinkercloud.codec import encode
from tinkercloud.config import Settings
from tinkercloud.control.arrivals import Arrivals
from tinkercloud.control.base_weights import fits, other_weights
from tinkercloud.control.engine_handle import EngineDied, EngineHandle
from tinkercloud.control.engines import KeptEngine
from tinkercloud.control.inflight import InflightWeights
from tinkercloud.control.metering import tokens_of
from tinkercloud.control.passing import PASSING, RETRY_SECONDS
from tinkercloud.control.stability import is_recorded
from tinkercloud.control.storage import Storage
from tinkercloud.control.suspects import MAX_DEATHS, SUSPECTS_TOGETHER
from tinkercloud.engine.operations import AskLoad, CancelSample, CloseSampler, FindSample, OpenSampler
from tinkercloud.engine.results import Failure, Place, Result, SamplerLoad
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.entries import CLIENT_SEQ_IDS
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import Entry, SamplerRecord
from tinkercloud.ledger.timeline import Times

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""How long an engine is waited for that need not answer now: it may be busy with a batch, or not go on at all."""

CANCELLED = Failure("the sample was cancelled", "user")

NUM_SAMPLES = "num_samples"
"""The detail of an entry that says how many sequences it asks for; without it, one."""


async def left_to_draw(ledger: Ledger, sampler_id: str) -> int:
    """Sequences of a sampler that were accepted and have not ended, also while its base model is not served."""
    return sum(entry.details.get(NUM_SAMPLES, 1) for entry in await ledger.pending(sampler_id))


class SamplerDesk:
    """Samples pass straight through to the engine, whose own loop batches them; the desk keeps their samplers open.

    At most `open_samplers` are open in the engine; beyond that the least recently used one without running samples is
    closed (its weights stay on disk and are opened again when needed).

    Samples during which the engine died run again with the same seed, so with the same tokens. After `MAX_DEATHS` they
    run apart, and only one that ends the engine alone is failed.
    """

    def __init__(
        self,
        engine: KeptEngine,
        ledger: Ledger,
        arrivals: Arrivals,
        storage: Storage,
        inflight: InflightWeights,
        settings: Settings,
    ):
        self._engine = engine
        self._ledger = ledger
        self._arrivals = arrivals
        self._storage = storage
        self.inflight = inflight
        self._limit = settings.open_samplers
        self._record_seconds = settings.stability_retention_seconds
        self._opened: OrderedDict[str, asyncio.Future[Result]] = OrderedDict()
        self._opened_in: EngineHandle | None = None
        self._running: Counter[str] = Counter()
        """Samples of each sampler that have not ended."""
        self._closing: set[str] = set()
        """Samplers to close when their last sample has ended."""
        self._waits_in: dict[str, EngineHandle] = {}
        self._died_in: EngineHandle | None = None
        """Samplers whose samples wait for other weights than the engine's."""
        self._deaths: Counter[str] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        """Of each sample that has not ended."""
        self._unawaited: set[asyncio.Task[None]] = set()
        self.pending_of: Counter[str] = Counter()
        """Sequences accepted and not ended, by session."""

    @property
    def pending(self) -> int:
        """Sequences accepted and not ended."""
        return self.pending_of.total()

    def runs(self, sampler_id: str) -> bool:
        """Whether a sample of this sampler has not ended."""
        return sampler_id in self._running

    def start(self, entry: Entry, sampler: SamplerRecord) -> None:
        """Run a sample that is in the ledger. No-op if it is running already."""
        if entry.request_id not in self._tasks:
            self.pending_of[sampler.session_id] += entry.details.get(NUM_SAMPLES, 1)
            self._running[sampler.sampler_id] += 1
            self._closing.discard(sampler.sampler_id)
            self._cancelled[entry.request_id] = asyncio.Event()
            task = asyncio.create_task(self._run(entry, sampler), name=f"sample {entry.request_id}")
            self._tasks[entry.request_id] = task

    def _forget(self, entry: Entry, sampler: SamplerRecord) -> None:
        del self._tasks[entry.request_id]
        del self._cancelled[entry.request_id]
        self._deaths.pop(entry.request_id, None)
        self.pending_of[sampler.session_id] -= entry.details.get(NUM_SAMPLES, 1)
        if not self.pending_of[sampler.session_id]:
            del self.pending_of[sampler.session_id]
        self._running[entry.stream] -= 1
        if not self._running[entry.stream]:
            del self._running[entry.stream]
            self._waits_in.pop(entry.stream, None)

    async def cancel(self, request_id: str) -> None:
        """Stop a sample if it waits or runs; its future then fails."""
        if request_id not in self._tasks:
            return
        self._cancelled[request_id].set()  # for one that has not reached the engine yet
        if self._opened_in is not None:
            with suppress(EngineDied):  # gone with the engine, and it does not run again on the next one
                await self._tell(self._opened_in, CancelSample(request_id))

    async def place(self, request_id: str) -> Place | None:
        """Where a sample stands in the engine; None if that is not known now."""
        found = await _answer(self._opened_in, FindSample(request_id)) if request_id in self._tasks else None
        return found if isinstance(found, Place) else None

    async def load(self) -> SamplerLoad | None:
        """What all samples take in the engine; None if it is not loaded, or does not say so at once."""
        load = await _answer(self._engine.handle, AskLoad())
        return load if isinstance(load, SamplerLoad) else None

    async def close(self, sampler_id: str) -> None:
        """Free a sampler's weights in the engine, when its last sample has ended; they stay on disk."""
        if self.runs(sampler_id):
            self._closing.add(sampler_id)
            return
        self._closing.discard(sampler_id)
        opening, engine = self._opened.pop(sampler_id, None), self._opened_in
        if opening is not None and engine is not None:
            await asyncio.wait([opening])  # or the engine would be told to open it behind this
            with suppress(EngineDied):
                await self._tell(engine, CloseSampler(sampler_id))

    async def _tell(self, engine: EngineHandle, operation: CancelSample | CloseSampler) -> None:
        """Have something done before whatever the engine is asked next. EngineDied."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await engine.ask(encode(operation))

    def publish(self, sampler: SamplerRecord) -> None:
        """An inflight sampler is in the ledger: from now on its run's samples are of its weights, running ones too as
        soon as the engine has them. Then the folders of the weights before go."""
        self.inflight.publish(sampler)
        self._begin(self._publish(sampler), f"publish {sampler.sampler_id}")

    def _begin(self, work: Coroutine[None, None, None], name: str) -> None:
        """Something that nobody waits for."""
        task = asyncio.create_task(work, name=name)
        self._unawaited.add(task)
        task.add_done_callback(self._unawaited.discard)

    async def _publish(self, sampler: SamplerRecord) -> None:
        engine = self._engine.handle
        if engine is None:
            return  # the next one opens the newest weights
        try:
            await self._open(engine, sampler)
        except EngineDied:
            return
        except Exception:
            log.exception("inflight weights of %s could not be opened; the next sample opens them", sampler.follows)

    async def stop(self) -> None:
        """Let go of the running samples: they are in the ledger and run again after the next start."""
        tasks = [*self._tasks.values(), *self._unawaited]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, entry: Entry, sampler: SamplerRecord) -> None:
        try:
            await self._run_to_the_end(entry, sampler)
        finally:
            self._forget(entry, sampler)
        if sampler.sampler_id in self._closing:
            await self.close(sampler.sampler_id)

    async def _run_to_the_end(self, entry: Entry, sampler: SamplerRecord) -> None:
        result: Result | None = None
        began = time.time()
        while True:
            try:
                if result is None:
                    payload = await self._ledger.payload(entry.request_id)
                    began = time.time()
                    result = await self._sample(entry.request_id, payload, sampler)
                await self._ledger.complete(
                    entry.request_id,
                    encode(result),
                    failed=isinstance(result, Failure),
                    keep_seconds=self._record_seconds if is_recorded(result) else None,
                    tokens=tokens_of(entry, result),
                    of=sampler,
                    times=Times(began, time.time()),
                )
                return self._arrivals.announce(entry.request_id, client_of(entry))
            except PASSING:
                log.exception("sample %s failed for a reason that is not its own; it runs again", entry.request_id)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                log.exception("sample %s cannot be run", entry.request_id)
                if result is not None:
                    await asyncio.sleep(RETRY_SECONDS)
                result = Failure(f"the stored sample cannot be read: {error}", "server")

    async def _sample(self, request_id: str, payload: bytes, sampler: SamplerRecord) -> Result:
        while True:
            if self._cancelled[request_id].is_set():
                return CANCELLED
            together = self._may_run_with(request_id)
            lane = self._engine.lane
            async with lane.together() if together is None else lane.apart(together):
                try:
                    engine = await self._engine.running()
                except Unavailable:
                    break
                if engine.died.is_set():  # and nobody has noticed: it has not died of this
                    await asyncio.sleep(0)
                    continue
                has_its_weights = fits(sampler, engine.info)
                try:
                    if has_its_weights:
                        return await self._sample_in(engine, request_id, payload, sampler)
                except EngineDied as error:
                    self._deaths[request_id] += 1
                    self._say_that_it_died(engine, error, request_id)
            if not has_its_weights:
                # The next engine may have been loaded from what its base model was before.
                self._say_what_it_waits_for(sampler, engine)
                await _first_of(engine.died, self._cancelled[request_id])
            elif together == 1:
                return Failure(
                    f"the engine process ended {self._deaths[request_id]} times during this sample, at last while it "
                    "ran alone, and it was given up; the server's log has the details",
                    "server",
                )
        await self._cancelled[request_id].wait()  # else it waits for a server that can load the model
        return CANCELLED

    def _say_that_it_died(self, engine: EngineHandle, error: EngineDied, request_id: str) -> None:
        """Once for all samples that were in it, and of each that may be the reason."""
        if self._died_in is not engine:
            self._died_in = engine
            log.error("%s; the samples in it run again on the next one", error)
        if self._deaths[request_id] >= MAX_DEATHS:
            log.error("sample %s was in %d engines that died; it runs beside few others", request_id, MAX_DEATHS)

    def _say_what_it_waits_for(self, sampler: SamplerRecord, engine: EngineHandle) -> None:
        """Once for all samples of a sampler: they were accepted before it was known, and an SDK does not say it."""
        if self._waits_in.get(sampler.sampler_id) is not engine:
            self._waits_in[sampler.sampler_id] = engine
            log.warning("samples wait. %s", other_weights(sampler, engine.info, None))

    async def _sample_in(self, engine: EngineHandle, request_id: str, payload: bytes, sampler: SamplerRecord) -> Result:
        opened = await self._open(engine, sampler)
        if self._cancelled[request_id].is_set():
            return CANCELLED
        return opened if isinstance(opened, Failure) else await engine.ask(payload)

    def _may_run_with(self, request_id: str) -> int | None:
        """How many suspects may run together with this one, itself included; None if it is none."""
        deaths = self._deaths[request_id]
        if deaths < MAX_DEATHS:
            return None
        suspects = sum(known >= MAX_DEATHS for known in self._deaths.values())
        return SUSPECTS_TOGETHER if deaths == MAX_DEATHS and suspects > 1 else 1

    async def _open(self, engine: EngineHandle, sampler: SamplerRecord) -> Result:
        """Make the sampler's weights available; many samples of a new sampler wait for one opening."""
        if self._opened_in is not engine:
            self._opened.clear()
            self._opened_in = engine
        opening = self._opened.get(sampler.sampler_id)
        if opening is None:
            opening = self._opened[sampler.sampler_id] = asyncio.ensure_future(self._ask_to_open(engine, sampler))
            opening.add_done_callback(lambda ended: self._keep_if_open(sampler.sampler_id, ended))
            await self._close_unused(sampler.sampler_id)
        else:
            self._opened.move_to_end(sampler.sampler_id)
        return await asyncio.shield(opening)

    def _keep_if_open(self, sampler_id: str, opening: asyncio.Future[Result]) -> None:
        """What did not work the next sample tries again."""
        is_open = not opening.cancelled() and not opening.exception() and not isinstance(opening.result(), Failure)
        if not is_open and self._opened.get(sampler_id) is opening:
            del self._opened[sampler_id]

    async def _ask_to_open(self, engine: EngineHandle, sampler: SamplerRecord) -> Result:
        refusal: Failure | None = None
        while True:
            weights = await self.inflight.of(sampler)  # nobody else runs from here to the engine: none is newer
            try:
                await self._storage.bring(weights.folder)  # at once, but for a stored checkpoint's
            except (NotFound, InvalidRequest) as error:
                return Failure(f"{sampler.model_path} cannot be sampled from: {error}", "user")
            shared = sampler.follows or ""
            opened = await engine.ask(encode(OpenSampler(sampler.sampler_id, weights.folder, shared, sampler.owner)))
            if not isinstance(opened, Failure):
                self.inflight.opened(weights)
                self._begin(self._remove_superseded(weights), f"superseded by {weights.sampler_id}")
                return opened
            if opened.category == "server":
                return opened  # it may work the next time
            refusal = refusal or opened
            if sampler.follows is not None:
                log.error("inflight weights of %s cannot be sampled from: %s", sampler.follows, opened.error)
                self.inflight.cannot_open(weights)
            if weights.sampler_id == sampler.sampler_id:
                return refusal  # what is wrong with the newest: those before may only be gone

    async def _remove_superseded(self, weights: SamplerRecord) -> None:
        try:
            for folder in await self.inflight.superseded(weights):
                await self._storage.remove(folder)
        except Exception:
            log.exception("weights before those of %s stay until newer ones are opened", weights.sampler_id)

    async def _close_unused(self, spared: str) -> None:
        for sampler_id in list(self._opened):
            if len(self._opened) <= self._limit:
                return
            if sampler_id != spared and not self.runs(sampler_id):
                await self.close(sampler_id)


async def _answer(engine: EngineHandle | None, question: FindSample | AskLoad) -> Result | None:
    """None if there is no engine, or it does not answer at once."""
    with suppress(TimeoutError, EngineDied):
        if engine is not None:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await engine.ask(encode(question))
    return None


async def _first_of(*events: asyncio.Event) -> None:
    """Until one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def client_of(entry: Entry) -> str:
    """What is announced at the end of each sample of one client of a sampler."""
    return client_key(entry.stream, entry.seq_id // CLIENT_SEQ_IDS)


def client_key(sampler_id: str, client: int) -> str:
    """As `client_of` a sample of the client of this number."""
    return f"{sampler_id}/{client}"
