"""What comes before a turn runs: its run's state in the engine, and a look at what would make it fail."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from tinkercloud.codec import decode, encode
from tinkercloud.control.engine_handle import EngineDied, EngineHandle
from tinkercloud.control.folders import checkpoint_path
from tinkercloud.control.outcomes import SamplerDetails, SaveDetails, details_of
from tinkercloud.control.passing import PASSING
from tinkercloud.control.training_run import ReplayError, TrainingRun
from tinkercloud.engine.operations import ClearGradients, DropModel
from tinkercloud.engine.results import Failure
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.order import what_became_of
from tinkercloud.ledger.records import CheckpointRecord, Entry, Outcome, SamplerRecord

log = logging.getLogger(__name__)

LOST_STATE = (
    "Go on from a saved checkpoint: load it into this training run with load_state, or make a new one of it with "
    "create_training_client_from_state"
)
"""What the client of a run can do whose state cannot be rebuilt."""


class Preparation:
    """Makes turns ready for an engine, each for itself: what is wrong with one run is that run's alone."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    async def prepare(self, run: TrainingRun, engine: EngineHandle) -> bytes | Failure:
        """Bring a run's state into the engine; the bytes to run for its turn, or why the operation fails. EngineDied,
        and what is in `PASSING`."""
        try:
            return await self._prepare(run, engine)
        except (EngineDied, *PASSING):
            raise
        except Exception as error:
            log.exception("training run %s could not be prepared", run.model_id)
            return Failure(f"the stored state of training run {run.model_id} cannot be read: {error}", "server")

    async def _prepare(self, run: TrainingRun, engine: EngineHandle) -> bytes | Failure:
        entry = run.turn.entry
        if entry.kind == "unload_model" and run.turn.failure is None:
            return encode(DropModel(run.model_id))
        try:
            await run.bring_into(engine)
        except ReplayError as error:
            log.error("%s", error)
            if entry.kind != "load_weights":  # which puts another state in its place
                return Failure(f"{error}. {LOST_STATE}", "server")
        if run.turn.clear_gradients:
            await engine.run_cycle([encode(ClearGradients(run.model_id))])
        if run.turn.failure is not None:
            return await self._with_cause(run.turn.failure, run.turn.lacks)
        return await self._taken(run, entry) or await self._ledger.payload(entry.request_id)

    async def _taken(self, run: TrainingRun, entry: Entry) -> Failure | None:
        """Why a save fails whose name another one has; None if it may run."""
        details = details_of(entry)
        if isinstance(details, SamplerDetails) and await self._ledger.get(SamplerRecord, details.sampler_id):
            return Failure(
                f"there is a sampler {details.sampler_id} already; take another sampling_session_seq_id", "user"
            )
        if isinstance(details, SaveDetails) and not details.overwrite:
            path = checkpoint_path(run.model_id, details.kind, details.name)
            if await self._ledger.get(CheckpointRecord, path) is not None:
                or_else = ", or save with overwrite=True" if details.kind == "training" else ""
                return Failure(f"{path} exists already; choose another name{or_else}", "user")
        return None

    async def _with_cause(self, failure: Failure, lacks: Entry | None) -> Failure:
        """The failure of a step, with the sentence that the client got for what its gradients lack."""
        stored = lacks and await self._ledger.outcome(lacks.request_id)
        cause = decode(stored, Outcome) if stored else None
        if not lacks or not isinstance(cause, Failure):
            return failure
        why = f"That {lacks.kind} {what_became_of(lacks)} because: {cause.error}"
        return replace(failure, error=f"{failure.error}. {why}")
