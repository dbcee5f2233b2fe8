"""Engines that live and do not go on: they are noticed, named, and ended where the settings say so."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from tinkercloud.control.engine_handle import EngineHandle

log = logging.getLogger(__name__)

SILENT_SECONDS = 60.0
"""From when on an engine that has something to do, and comes no further with it, is said to be silent."""

LOOK_SECONDS = 5.0
"""How often it is looked."""


def silence_of(handle: EngineHandle | None) -> str:
    """What whoever asks for an engine's state should know of its silence; empty if it is not silent."""
    silent = 0.0 if handle is None else handle.silent_seconds
    return f"has come no further for {silent:.0f} s" if silent >= SILENT_SECONDS else ""


async def watch(name: str, handle: EngineHandle, stuck_seconds: float) -> None:
    """Look after an engine until it has died: warn when it is silent, and end it when it has been for `stuck_seconds`
    (0: never). Whoever waits for it then goes on with the next one, as after any other death."""
    warned, suspected = False, None
    while not handle.died.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await handle.died.wait()
        silence, is_stuck = silence_of(handle), 0 < stuck_seconds < handle.silent_seconds
        # What came while this process itself stood still may be read behind this look: the next one ends the engine.
        before, suspected = suspected, handle.heard_at if is_stuck else None
        if is_stuck and before == handle.heard_at:
            log.error("engine %s has come no further for %.0f s (stuck_seconds); ending it", name, stuck_seconds)
            handle.kill()
            await handle.died.wait()
        elif silence and not warned:
            log.warning(
                "engine %s (pid %d) %s. A long step ends by itself; if this one does not, `kill -9 %d` loses nothing: "
                "the engine is started again, and what it was doing runs again. The setting stuck_seconds does that "
                "without being told",
                name, handle.pid, silence, handle.pid,
            )  # fmt: skip
        elif warned and not silence:
            log.info("engine %s goes on", name)
        warned = bool(silence)
