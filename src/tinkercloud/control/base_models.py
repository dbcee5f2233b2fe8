"""The base models of a server: for each, its engine, the conductor of its training runs and the desk of its samples."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import ValidationError

from tinkercloud.base_models import ModelError
from tinkercloud.config import Settings
from tinkercloud.control.arrivals import Arrivals
from tinkercloud.control.base_weights import MadeOnBase, fits, other_weights
from tinkercloud.control.conductor import Conductor, Unfinished
from tinkercloud.control.engines import KeptEngine, OnProgress
from tinkercloud.control.inflight import InflightWeights
from tinkercloud.control.model_memory import ModelMemory
from tinkercloud.control.run_end import RunEnd, finished
from tinkercloud.control.sampler_desk import SamplerDesk, left_to_draw
from tinkercloud.control.storage import Storage
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord, SamplerRecord
from tinkercloud.model_settings import ModelSettings
from tinkercloud.setting_errors import sentences

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """One base model and what runs on it."""

    settings: ModelSettings
    engine: KeptEngine
    conductor: Conductor
    desk: SamplerDesk


class Waiting(NamedTuple):
    """What goes on when a base model is served again."""

    runs: int
    """Training runs that have not ended."""
    sequences: int
    """Of samples, accepted and not ended."""


class BaseModels:
    """All base models of a server, by the names that clients use."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        arrivals: Arrivals,
        storage: Storage,
        inflight: InflightWeights,
        on_progress: OnProgress,
    ):
        self._settings = settings
        self._ledger = ledger
        self._arrivals = arrivals
        self._storage = storage
        self._inflight = inflight
        self._run_end = RunEnd(ledger, arrivals, storage)
        self._on_progress = on_progress
        self._memory = ModelMemory(settings.data_dir)
        self._served: dict[str, Served] = {}
        self._was_ready = False
        self._doubts = 0

    # ------------------------------------------------------------ what is served

    def get(self, name: str) -> Served:
        """NotFound names the models that are served, and how to serve this one."""
        if name not in self._served:
            served = ", ".join(sorted(self._served)) or "none"
            raise NotFound(
                f"base model {name!r} is not served here; served are: {served}. Whoever runs the server can "
                f"{how_to_serve(name)}"
            )
        return self._served[name]

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def states(self) -> dict[str, str]:
        """State of each base model: loading, ready, restarting, idle (lazy and not loaded), failed: why. Of one that
        computes and comes no further, also for how long."""
        failures = {served.engine.name: f"failed: {served.conductor.failure}" for served in self.broken}
        return {name: served.engine.status for name, served in self._served.items()} | failures

    def known(self) -> list[tuple[str, BaseModelInfo | None]]:
        """(name, what is known of it) of each base model; None for a lazy one that was never loaded."""
        return [(name, served.engine.info) for name, served in self._served.items()]

    async def info(self, name: str) -> BaseModelInfo:
        """What is known of a base model, loading a lazy one first. NotFound, Unavailable."""
        info = await self.get(name).engine.loaded()
        await self._memory.learn(info)
        return info

    async def last_info(self, name: str) -> BaseModelInfo:
        """As `info`, but for what is of a base model already: also while that is not served, as it was when it was
        served last. Unavailable if nothing is known of it."""
        if name in self._served:
            return await self.info(name)
        info = self._memory.info(name)
        if info is None:
            raise Unavailable(
                f"base model {name} is not served now; send this again later, or whoever runs the server can "
                f"{how_to_serve(name)}"
            )
        return info

    def other_weights(self, made: MadeOnBase) -> str | None:
        """Why nothing can be computed with this now: the name of its base model stands for other weights. None if it
        does not, or if that is not known yet."""
        info = self._served[made.base_model].engine.info if made.base_model in self._served else None
        if info is None or fits(made, info):
            return None
        return other_weights(made, info, self._memory.folder(made.base_fingerprint))

    async def check_weights(self, made: MadeOnBase) -> None:
        """InvalidRequest if nothing can be computed with this now. A base model that is not loaded is loaded before
        that is said: whoever runs the server may have put its former weights back."""
        if self.other_weights(made) is not None:
            await self.get(made.base_model).engine.loaded(now=True)
            if (why := self.other_weights(made)) is not None:
                raise InvalidRequest(why)

    # ------------------------------------------------------------ readiness

    def ready(self) -> bool:
        """True from the first moment at which every preloaded model was ready (a restart does not take it back)."""
        if not self._was_ready:
            self._was_ready = all(served.engine.lazy or served.engine.state == "ready" for served in self)
        return self._was_ready

    @property
    def broken(self) -> list[Served]:
        """The base models that nothing but a restart of the server brings back."""
        return [served for served in self if served.conductor.failure]

    async def settled(self) -> None:
        """Wait until every preloaded base model is ready or has failed for good."""
        await asyncio.gather(*(served.engine.settled() for served in self if not served.engine.lazy))
        for served in self:
            name, failure = served.settings.name, served.engine.failure
            if failure and name in self._memory.added:
                _warn_of_added(name, failure)
                await self.withdraw(name)
            else:
                await self._warn_of_other_weights(name)

    def failures(self) -> list[str]:
        """A sentence for each base model that cannot be loaded."""
        return [f"{served.engine.name}: {served.engine.failure}" for served in self if served.engine.failure]

    # ------------------------------------------------------------ coming and going

    async def serve(self, model: ModelSettings) -> None:
        """Serve one more base model, and take up its training runs and samples where the ledger says that they are; a
        lazy one loads when it is first used. InvalidRequest if the name is taken."""
        if model.name in self._served:
            raise InvalidRequest(f"a base model called {model.name} is served already; choose another name")
        engine = KeptEngine(
            self._settings.engine_options(model),
            self._settings.data_dir,
            lazy=model.lazy,
            idle_seconds=self._settings.for_model(model, "idle_seconds"),
            stuck_seconds=self._settings.for_model(model, "stuck_seconds"),
            on_progress=self._on_progress,
        )
        desk = SamplerDesk(engine, self._ledger, self._arrivals, self._storage, self._inflight, self._settings)
        conductor = Conductor(engine, self._ledger, self._arrivals, self._storage, self._run_end, desk, self._settings)
        self._served[model.name] = Served(model, engine, conductor, desk)
        if not model.lazy:
            engine.start()
        await self._resume(self._served[model.name])

    async def serve_added(self) -> None:
        """At the start: serve the base models that were added before and not removed, except those whose names are
        taken; one that cannot be served is named in the log, and so are runs that wait for a model."""
        for name, fields in self._memory.added.items():
            if name in self._served:
                continue
            try:
                model = ModelSettings.model_validate(fields)
            except ModelError as error:
                _warn_of_added(name, str(error))
            except ValidationError as error:
                _warn_of_added(name, sentences(error, ModelSettings))
            else:
                log.info("base model %s (%s) is served again: `models add` has added it", name, model.source)
                await self.serve(model)
        live = Counter(run.base_model for run in await self._ledger.find(ModelRecord, state="live"))
        for name in sorted(live.keys() - self._served.keys()):
            log.warning(
                "%s for base model %s, which is not served; you can %s",
                "1 training run that has not ended waits"
                if live[name] == 1
                else f"{live[name]} training runs that have not ended wait",
                name,
                how_to_serve(name),
            )

    async def add(self, model: ModelSettings) -> str:
        """Serve one more base model, from now on and after the next start; its state when it is loaded (of a lazy one
        at once). InvalidRequest if it cannot be loaded, or its name is taken."""
        await self.serve(model)
        engine = self.get(model.name).engine
        if not model.lazy:
            await engine.settled()
            if failure := engine.failure:
                await self.withdraw(model.name)
                raise InvalidRequest(f"{model.name} cannot be served: {failure}")
            await self._warn_of_other_weights(model.name)
        await self._memory.add(model)
        return engine.state

    async def remove(self, name: str) -> Waiting:
        """Stop serving a base model, and forget that it was added; what waits for it from now on. NotFound."""
        was_added = await self._memory.forget(name)
        if name in self._served:
            await self.withdraw(name)
        elif not was_added:
            there = ", ".join(sorted({*self._served, *self._memory.added})) or "none"
            raise NotFound(f"there is no base model {name!r:.300}; there are: {there}")
        samplers = [await self._ledger.get(SamplerRecord, stream) for stream in await self._ledger.pending_streams()]
        sequences = [
            await left_to_draw(self._ledger, sampler.sampler_id)
            for sampler in samplers
            if sampler is not None and sampler.base_model == name
        ]
        return Waiting(await self._ledger.count(ModelRecord, base_model=name, state="live"), sum(sequences))

    async def withdraw(self, name: str) -> None:
        """Stop serving a base model after its running cycle. Its training runs stay on disk and go on when a model of
        this name is served again. NotFound."""
        served = self.get(name)
        del self._served[name]
        await _end(served)

    async def unload_idle(self, served: Served) -> None:
        """End the engine of a lazy base model that nobody has used for a while."""
        if served.engine.idle and not served.conductor.busy and not served.desk.pending:
            log.info("base model %s is idle; unloaded", served.engine.name)
            await served.conductor.park_all()
            await served.engine.stop()

    def release(self) -> None:
        """The server is about to stop: end the engines that are not ready, and let go of whoever waits for them."""
        for served in self:
            served.engine.release()

    @property
    def unfinished(self) -> Unfinished:
        """What a stop has to wait for."""
        each = [served.conductor.unfinished for served in self]
        return Unfinished(sum(one.operations for one in each), sum(one.runs for one in each))

    async def stop(self) -> None:
        """Finish the running cycles, put every training run on disk, end the engines."""
        await asyncio.gather(*(_end(served) for served in self))

    async def _warn_of_other_weights(self, name: str) -> None:
        """Say in the log how many runs a base model's new weights keep from going on."""
        runs = await self._ledger.find(ModelRecord, base_model=name, state="live")
        waiting = [why for run in runs if (why := self.other_weights(run)) is not None]
        if waiting:
            runs_text = "1 training run" if len(waiting) == 1 else f"{len(waiting)} training runs"
            log.warning("%s cannot go on. %s", runs_text, waiting[0])

    async def _resume(self, served: Served) -> None:
        name = served.engine.name
        for model in await self._ledger.find(ModelRecord, base_model=name, state="live"):
            await self.add_run(model)
        for stream in await self._ledger.pending_streams():
            sampler = await self._ledger.get(SamplerRecord, stream)
            if sampler is not None and sampler.base_model == name:
                for entry in await self._ledger.pending(stream):
                    served.desk.start(entry, sampler)

    async def take_up(self) -> None:
        """Do what could not be done: end runs, and run what was recorded by a commit that seemed to have failed
        (`Ledger.doubts`), and that nobody runs."""
        await self._run_end.resume()
        doubts = self._ledger.doubts
        if doubts == self._doubts:
            return
        await self._run_end.complete()
        for served in self:
            await self._resume(served)
        for stream in await self._ledger.pending_streams():
            run = await self._ledger.get(ModelRecord, stream)
            if run is not None and run.base_model in self:
                for entry in await self._ledger.pending(stream):
                    await self.get(run.base_model).conductor.accept(entry)
        self._doubts = doubts

    async def end_runs(self, runs: list[ModelRecord], why: Callable[[str], str] = finished) -> None:
        """Let go of the runs of a finished session, also of those whose base model is not served now. What waits in
        their logs fails with `why` of its run's id."""
        by_base_model: defaultdict[str, list[str]] = defaultdict(list)
        for run in runs:
            by_base_model[run.base_model].append(run.model_id)
        for name, model_ids in by_base_model.items():
            if name in self:
                await self.get(name).conductor.end_runs(model_ids, why)
            else:
                for model_id in model_ids:
                    await self._run_end.end(model_id, why(model_id))

    async def complete_ends(self) -> None:
        """At the start: end what still waits in the logs of unloaded runs, as a crash leaves it."""
        await self._run_end.complete()

    async def add_run(self, model: ModelRecord) -> None:
        """Let a training run's operations run, beginning with those that the ledger has already. No-op if they do."""
        conductor = self.get(model.base_model).conductor
        if not conductor.has(model.model_id):
            conductor.add_run(model, await self._ledger.model_log(model.model_id, self._settings.gap_timeout_seconds))


def how_to_serve(name: str) -> str:
    """What whoever runs the server can do, in words that follow "can"."""
    return (
        f"say `tinkercloud models add {name}` (`models add {name}=FOLDER` if its files are in a folder), or start it "
        "with --model"
    )


def _warn_of_added(name: str, why: str) -> None:
    log.warning(
        "base model %s, which `models add` has added, is not served: %s. Mend that and start again, or forget it with "
        "`tinkercloud models remove %s`",
        name,
        why,
        name,
    )


async def _end(served: Served) -> None:
    await served.desk.stop()
    served.engine.release()
    await served.conductor.stop()
    await served.engine.close()
