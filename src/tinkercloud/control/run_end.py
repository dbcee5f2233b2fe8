"""The end of a training run, in the ledger and on disk."""

from __future__ import annotations

from tinkercloud.codec import encode
from tinkercloud.control.arrivals import Arrivals
from tinkercloud.control.storage import Storage
from tinkercloud.engine.results import Failure
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import Entry, ModelRecord


class RunEnd:
    """Ends runs for good. Every step may be repeated, and what a crash left half done is done again at the start."""

    def __init__(self, ledger: Ledger, arrivals: Arrivals, storage: Storage):
        self._ledger = ledger
        self._arrivals = arrivals
        self._storage = storage
        self._begun: dict[str, str] = {}
        """Why, of each run whose end something has kept from being done."""

    async def end(self, model_id: str, why: str) -> None:
        """Unload a run: what waits in its log fails with `why`, what recovery kept of it goes. If that cannot be done
        now, `resume` does it."""
        self._begun[model_id] = why
        # First of all: whatever is recorded from here on sees that the run is gone, whatever was before is found below.
        await self._ledger.change(ModelRecord, model_id, state="unloaded")
        for entry in await self._ledger.pending(model_id):
            await self.fail(entry, why)
        await self._storage.forget(model_id)
        self._begun.pop(model_id, None)

    async def resume(self) -> None:
        """End the runs for which something, such as a full disk, has kept that from being done before."""
        for model_id, why in list(self._begun.items()):
            await self.end(model_id, why)

    async def fail(self, entry: Entry, why: str) -> None:
        """End an operation that came too late for its run."""
        await self._ledger.complete(entry.request_id, encode(Failure(why, "user")), failed=True)
        self._arrivals.announce(entry.request_id)

    async def complete(self) -> None:
        """End what still waits in the logs of runs that were unloaded."""
        for stream in await self._ledger.pending_streams():
            model = await self._ledger.get(ModelRecord, stream)
            if model is not None and model.state == "unloaded":
                await self.end(stream, unloaded(stream))


def unloaded(model_id: str) -> str:
    """Why an operation is not run that came behind an unload_model."""
    return f"training run {model_id} was unloaded before this; create a new one from its last checkpoint"


def stopped(model_id: str) -> str:
    """Why an operation is not run whose training run an operator has stopped."""
    return f"training run {model_id} was stopped by the operator; its checkpoints are still there"


def finished(model_id: str) -> str:
    """Why an operation is not run whose session has finished."""
    return f"the session of training run {model_id} has finished; create a new ServiceClient"
