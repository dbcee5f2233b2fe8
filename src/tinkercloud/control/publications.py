"""Checkpoints on their way to the store: the runs that have saved them wait, all others go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tinkercloud.control.passing import RETRY_SECONDS
from tinkercloud.control.storage import Storage
from tinkercloud.engine.results import Failure, Result, SaveOutput
from tinkercloud.errors import Unavailable

log = logging.getLogger(__name__)

STOP_SECONDS = 15.0
"""How long a stop waits for them."""

Then = Callable[[Result], Awaitable[None]]
"""Ends the save with what came of it: its own result when the store has it, else a failure."""


class Publications:
    """Those of the training runs over one base model: at most one of each run at a time."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, model_id: str) -> bool:
        """Whether the run's newest save is on its way."""
        return model_id in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, model_id: str, saved: SaveOutput, then: Then, always: Callable[[], None]) -> None:
        """Publish what a run has saved, then call `then`, and `always` when the run waits no more."""
        self._tasks[model_id] = asyncio.create_task(
            self._publish(model_id, saved, then, always), name=f"publish {saved.folder}"
        )

    async def _publish(self, model_id: str, saved: SaveOutput, then: Then, always: Callable[[], None]) -> None:
        try:
            result: Result = saved
            try:
                await self._storage.publish(saved.folder)
            except Unavailable as error:
                why = f"the checkpoint was not saved: {error}. Nothing is left of it; save it again"
                result = Failure(why, "server")
            await then(result)
        except Exception:
            log.exception("%s was not published; it is saved again in %g s", saved.folder, RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._tasks.pop(model_id, None)
            always()

    async def settle(self) -> None:
        """The base model stops being served: wait a while, then let go of the rest. Their operations have not ended,
        so they are saved again."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
