"""The control process's end of one engine process: starting it, asking it, noticing that it died."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tinkercloud.codec import decode
from tinkercloud.control.engine_process import EngineProcess
from tinkercloud.control.folders import FINGERPRINTS, scratch_folder
from tinkercloud.engine.base_model import AdapterMemory, BaseModelInfo, EngineOptions
from tinkercloud.engine.messages import (
    LENGTH_BYTES,
    Answer,
    Ask,
    CycleDone,
    FromEngine,
    LoadFailed,
    Progress,
    Ready,
    RunCycle,
    Start,
    Stop,
    ToEngine,
    frame,
    frame_length,
)
from tinkercloud.engine.results import Result

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long an engine may take to end after `Stop` before it is killed."""

EXIT_SECONDS = 5.0
"""How long an engine that closed its socket may take to exit."""


class EngineDied(Exception):
    """The engine process ended while it was loading or had something to do."""


class EngineLoadError(Exception):
    """The base model cannot be served; the text says why. Starting again would not help."""


class EngineHandle:
    """One run of one engine process; a restart is a new handle."""

    def __init__(self, options: EngineOptions, data_dir: Path, on_progress: Callable[[float, str], None]):
        """`data_dir`: what the folders in operations are relative to."""
        self._options = options
        self._data_dir = data_dir
        self._on_progress = on_progress
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future] = {}
        self._ready: asyncio.Future[BaseModelInfo] = asyncio.get_running_loop().create_future()
        self.died = asyncio.Event()
        self.adapters: AdapterMemory | None = None
        """What its adapters took after its last cycle."""
        self.steps: tuple[tuple[float, float], ...] = ()
        """(start, end) of the steps of its last cycle, in seconds since the epoch."""
        self._reading: asyncio.Task[None] | None = None
        self.heard_at = 0.0
        """When it last said anything, or was given something to do after it had nothing; on the monotonic clock."""

    async def start(self) -> BaseModelInfo:
        """Start the process and wait until its base model is loaded. EngineLoadError, EngineDied."""
        self._on_progress(0.0, "loading torch")
        ours, theirs = socket.socketpair()
        try:
            self._process = await EngineProcess.start(self._options.name, self._data_dir, theirs)
        except BaseException:
            ours.close()  # an engine that is started all the same finds nobody and ends
            raise
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read())
        self._send(Start(self._options, scratch_folder(self._options.name), FINGERPRINTS))
        try:
            return await asyncio.shield(self._ready)
        except EngineLoadError:
            await self._reading  # the process ends by itself, and nobody else waits for it
            raise

    @property
    def info(self) -> BaseModelInfo:
        """Of an engine that has been ready."""
        return self._ready.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_seconds(self) -> float:
        """For how long it has had something to do and has come no further; 0 while it has nothing to do."""
        return time.monotonic() - self.heard_at if self._waiting else 0.0

    async def run_cycle(self, operations: Sequence[bytes]) -> tuple[Result, ...]:
        """Run operations of different models; results in the same order. EngineDied."""
        cycle_id, future = self._expect()
        self._send(RunCycle(cycle_id, tuple(operations)))
        return await future

    async def ask(self, operation: bytes) -> Result:
        """One operation of the sampler. EngineDied."""
        ask_id, future = self._expect()
        self._send(Ask(ask_id, operation))
        return await future

    async def stop(self) -> None:
        """Let the running cycle end, then end the process; one that is still loading at once."""
        if self._reading is None:
            return  # it was never started
        if not self._ready.done():
            self._process.kill(connected=True)
        elif not self.died.is_set():
            with contextlib.suppress(ConnectionError):
                self._send(Stop())
            # Not for the process: it seems to have ended when the fork server has.
            await asyncio.wait([self._reading], timeout=STOP_SECONDS)
            if not self._reading.done():
                log.warning("engine %s did not stop within %.0f s; killing it", self._options.name, STOP_SECONDS)
                self._process.kill(connected=True)
        await self._reading

    def kill(self) -> None:
        """End the process now, whatever it does; `died` is set when it has ended."""
        self._process.kill(connected=True)

    def _expect(self) -> tuple[int, asyncio.Future]:
        if self.died.is_set():
            raise EngineDied(self._options.name)
        if not self._waiting:
            self.heard_at = time.monotonic()
        message_id = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._waiting[message_id] = future
        return message_id, future

    def _send(self, message: ToEngine) -> None:
        """What is sent to an engine that is about to be known as dead gets its `EngineDied` when it is: a closed
        transport would raise an error of its own."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _read(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(LENGTH_BYTES)
                body = await self._reader.readexactly(frame_length(header))
                self._receive(decode(body, FromEngine))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            await self._ended()

    def _receive(self, message: FromEngine) -> None:
        self.heard_at = time.monotonic()
        match message:
            case Progress():
                self._on_progress(message.fraction, message.text)
            case Ready():
                self._ready.set_result(message.info)
            case LoadFailed():
                self._ready.set_exception(EngineLoadError(message.error))
            case CycleDone():
                self.adapters = message.adapters
                self.steps = message.steps
                self._resolve(message.cycle_id, message.results)
            case Answer():
                self._resolve(message.ask_id, message.result)

    def _resolve(self, message_id: int, value: object) -> None:
        future = self._waiting.pop(message_id)
        if not future.done():
            future.set_result(value)

    async def _ended(self) -> None:
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        except TimeoutError:  # it hangs while exiting, or it lives without its socket: either way it is of no use
            self._process.kill()
        code = await self._process.wait()
        self.died.set()
        error = EngineDied(f"engine {self._options.name} ended with code {code}")
        for future in (self._ready, *self._waiting.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: whoever waits gets it, and nobody may be waiting
        self._waiting.clear()
