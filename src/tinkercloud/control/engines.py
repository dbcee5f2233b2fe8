"""An engine process that is kept alive for as long as its base model is served."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from tinkercloud.control.engine_handle import EngineDied, EngineHandle, EngineLoadError
from tinkercloud.control.engine_state import EngineState
from tinkercloud.control.silence import silence_of, watch
from tinkercloud.control.suspects import Lane
from tinkercloud.engine.base_model import BaseModelInfo, EngineOptions
from tinkercloud.errors import InvalidRequest, Unavailable

log = logging.getLogger(__name__)

RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Pauses before a dead engine is started again; the last one repeats."""

MAX_LOAD_DEATHS = 3
"""An engine that was never ready and died this often is not started again."""

STEADY_SECONDS = 60.0
"""An engine that lived this long starts the next time without a pause."""

OnProgress = Callable[[str, float, str], None]
"""Called with (base model, fraction loaded, what is being done)."""


class KeptEngine:
    """One base model: how to load it, what is known of it, and the engine process that has it now."""

    def __init__(
        self,
        options: EngineOptions,
        data_dir: Path,
        lazy: bool,
        idle_seconds: float,
        stuck_seconds: float,
        on_progress: OnProgress,
    ):
        self.options = options
        self._data_dir = data_dir
        self.lazy = lazy
        self.idle_seconds = idle_seconds
        self.stuck_seconds = stuck_seconds
        self.state: EngineState = "idle"
        self.failure: str | None = None
        """Why the model can never be served as it is configured; None as long as it may."""
        self.info: BaseModelInfo | None = None
        """Known from the first time that the model was loaded."""
        self.lane = Lane()
        """Taken by whoever has operations or samples run in the engine."""
        self.last_used = time.monotonic()
        self._on_progress = on_progress
        self._handle: EngineHandle | None = None
        self._changed = asyncio.Condition()
        self._supervisor: asyncio.Task[None] | None = None
        self._released: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def status(self) -> str:
        """The state as users see it: a sound one is its word alone; else with why, or with what is to be known of an
        engine that does not go on."""
        if self.failure is not None:
            return f"{self.state}: {self.failure}"
        silence = silence_of(self._handle)
        return f"{self.state}, but {silence}" if silence else self.state

    @property
    def released(self) -> bool:
        """Whether it is stopping for good, and whoever waits for it is let go."""
        return self._closed or self._released is not None

    @property
    def handle(self) -> EngineHandle | None:
        """The running engine, if there is one now."""
        return self._handle

    def start(self) -> None:
        """Begin to load the model, if it is not loaded or loading already."""
        if self._supervisor is None or self._supervisor.done():
            self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.name}")

    async def running(self) -> EngineHandle:
        """The running engine; waits while it loads or restarts, starts a lazy one. Unavailable, for good, if it cannot
        load; cancels whoever waits for it once it is released."""
        self.last_used = time.monotonic()
        async with self._changed:
            while self._handle is None:
                if self.released:
                    raise asyncio.CancelledError(f"engine {self.name} is released")
                if self.failure is not None:
                    raise Unavailable(f"base model {self.name} cannot be served: {self.failure}")
                if self.state in ("idle", "stopped"):
                    self.start()
                await self._changed.wait()
            return self._handle

    @property
    def idle(self) -> bool:
        """A lazy model that is loaded and was not used for its idle time."""
        return self.lazy and self.state == "ready" and time.monotonic() - self.last_used > self.idle_seconds

    async def settled(self) -> None:
        """Wait until the model is ready, has failed for good or is released."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state == "ready" or self.failure is not None or self._released)

    async def loaded(self, now: bool = False) -> BaseModelInfo:
        """What is known of the model, loading it if that is not yet known, or if it is not loaded `now`. InvalidRequest
        if a lazy one cannot load: who asks for it should not come again for the same answer. Unavailable if it is
        released meanwhile, or will be, since a server does not go on without one that is not lazy."""
        if self.info is None or now:
            try:
                await self.running()
            except Unavailable as error:
                if not self.lazy:
                    raise
                raise InvalidRequest(str(error)) from None
            except asyncio.CancelledError:
                if not self.released:
                    raise
                raise Unavailable("the server is stopping; ask again when it is back") from None
        assert self.info is not None
        return self.info

    def release(self) -> None:
        """The server stops. An engine that is not ready ends at once, and whoever waits for it is let go; one that is
        ready runs until `stop`."""
        if self._handle is None and self._released is None:
            self._released = asyncio.create_task(self._end(), name=f"release {self.name}")

    async def stop(self) -> None:
        """Let the running cycle end and end the process; the next `running()` starts it again."""
        await (self._released or self._end())

    async def close(self) -> None:
        """As `stop`, but for good: whoever needs the engine from here on is let go."""
        self._closed = True
        await self.stop()

    async def _end(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        handle, self._handle = self._handle, None
        await self._enter("stopping")  # whoever needs the engine from here on waits, and starts it again after
        if handle is not None:
            await handle.stop()
        await self._enter("stopped")

    async def _supervise(self) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            await self._enter("loading" if self.info is None else "restarting" if failures else "loading")
            handle = EngineHandle(self.options, self._data_dir, self._progress)
            try:
                self.info = await handle.start()
                self._handle = handle
                await self._enter("ready")
                log.info("engine %s ready (pid %d) after %.1f s", self.name, handle.pid, time.monotonic() - started)
                await watch(self.name, handle, self.stuck_seconds)
            except EngineLoadError as error:
                await self._enter("failed", str(error))
                return
            except EngineDied:
                pass
            except Exception:  # of the fork server too, which has errors of its own when it ends
                log.exception("engine %s could not be started", self.name)
            except asyncio.CancelledError:
                if self._handle is None:  # stopped while loading: nobody else knows this process
                    await handle.stop()
                raise
            self._handle = None
            failures = 0 if time.monotonic() - started > STEADY_SECONDS else failures + 1
            if self.info is None and failures >= MAX_LOAD_DEATHS:
                why = f"its engine process ended {failures} times while loading; see the log"
                await self._enter("failed", why)
                return
            pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS)) - 1] if failures else 0.0
            log.error("engine %s died; starting it again in %.0f s", self.name, pause)
            await self._enter("restarting")
            await asyncio.sleep(pause)

    def _progress(self, fraction: float, text: str) -> None:
        self._on_progress(self.name, fraction, text)

    async def _enter(self, state: EngineState, failure: str | None = None) -> None:
        async with self._changed:
            self.state, self.failure = state, failure
            self._changed.notify_all()
