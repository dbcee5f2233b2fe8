"""The server behind the API: one method per thing that a client can ask for, no HTTP and no torch.

`api/` decodes and validates a request, calls one method here, and encodes what comes back. Everything that must survive
is written to the ledger before a method returns.
"""

from __future__ import annotations

from typing import Any

from tinkercloud.engine.types import BaseModelInfo, ForwardBackward, LoraConfig, OptimStep, Sample
from tinkercloud.ledger.records import (
    CheckpointRecord,
    Entry,
    ModelRecord,
    Outcome,
    SamplerRecord,
    SessionRecord,
)


class Service:
    """See the methods. All raise `tinkercloud.errors` with a sentence for the client."""

    # ------------------------------------------------------------ the server itself

    def ready(self) -> bool:
        """True from the first moment at which every preloaded engine was ready."""

    def engines(self) -> dict[str, str]:
        """State of each base model: loading, ready, restarting, idle (lazy and not loaded), failed: why."""

    def served_models(self) -> list[tuple[str, BaseModelInfo | None]]:
        """(name, what is known of it) of each base model; None for a lazy one that was never loaded."""

    async def base_model(self, name: str) -> BaseModelInfo:
        """What is known of a base model, loading a lazy one first. NotFound names the ones that are served."""

    # ------------------------------------------------------------ sessions

    async def create_session(
        self,
        *,
        owner: str,
        tags: list[str],
        user_metadata: dict[str, Any],
        sdk_version: str,
        project_id: str | None,
        display_name: str | None,
    ) -> SessionRecord: ...

    async def session(self, session_id: str, owner: str) -> SessionRecord:
        """NotFound if there is none; a finished one is returned too."""

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Keeps the session; brings a parked one back. Ended if it has finished."""

    async def finish_session(self, session_id: str, owner: str, reason: str) -> None:
        """The first reason wins; a repeat changes nothing."""

    async def list_sessions(self, owner: str, limit: int, offset: int) -> list[SessionRecord]: ...

    async def session_members(self, session_id: str) -> tuple[list[str], list[str]]:
        """(model ids, sampler ids) of a session."""

    # ------------------------------------------------------------ training models

    async def create_model(
        self,
        session: SessionRecord,
        model_seq_id: int,
        base_model: str,
        lora: LoraConfig,
        user_metadata: dict[str, Any],
    ) -> Entry:
        """seq_id 0 of a new log; entry.stream is the model's id. A repeat returns the first entry."""

    async def create_model_from(
        self,
        session: SessionRecord,
        model_seq_id: int,
        checkpoint: CheckpointRecord,
        with_optimizer: bool,
        user_metadata: dict[str, Any],
    ) -> Entry:
        """Create-via-load: seq_id 0 of a new log loads a checkpoint."""

    async def model(self, model_id: str, owner: str) -> ModelRecord:
        """NotFound if there is none (or it was unloaded)."""

    async def submit(
        self, model: ModelRecord, seq_id: int | None, kind: str, operation: ForwardBackward | OptimStep
    ) -> Entry:
        """Append a forward, forward_backward or optim_step to the model's log. `seq_id` None (hand-written clients)
        takes the next free one. An entry in state "refused" is the repeat of a refused one."""

    async def save_weights(
        self,
        model: ModelRecord,
        seq_id: int | None,
        name: str | None,
        *,
        for_sampler: bool,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: dict[str, str] | None,
    ) -> Entry:
        """Append the saving of a named checkpoint (weights/NAME, or sampler_weights/NAME); without a name, one is made
        of the seq_id. A name that is taken fails the future (category user) unless `overwrite`."""

    async def save_ephemeral_sampler(self, model: ModelRecord, seq_id: int | None, sampling_session_seq_id: int) -> Entry:
        """Append the making of a sampler from the model's weights at this point of its log."""

    async def load_weights(
        self, model: ModelRecord, seq_id: int | None, checkpoint: CheckpointRecord, with_optimizer: bool
    ) -> Entry: ...

    async def unload_model(self, model: ModelRecord) -> Entry:
        """Free the model after everything before it in its log has run."""

    async def refuse(self, model: ModelRecord, seq_id: int | None, kind: str, error: str) -> Entry:
        """Record a refusal at its seq_id, so that what comes after it runs. No-op without a seq_id."""

    async def list_models(
        self, owner: str, limit: int, offset: int
    ) -> tuple[list[ModelRecord], int]:
        """(a page of training runs, newest first; how many there are)."""

    # ------------------------------------------------------------ checkpoints

    async def checkpoint(self, path: str, owner: str) -> CheckpointRecord:
        """By its tinker:// path. NotFound if there is none, InvalidRequest if it is no such path."""

    async def list_checkpoints(self, owner: str, model_id: str | None) -> list[CheckpointRecord]: ...

    # ------------------------------------------------------------ sampling

    async def create_sampler(
        self, session: SessionRecord, seq_id: int, base_model: str | None, path: str | None
    ) -> SamplerRecord: ...

    async def sampler(self, sampler_id: str, owner: str) -> SamplerRecord: ...

    async def join_sampler(self, sampler: SamplerRecord) -> int:
        """A client number, unique in this sampling session; the creator is 0."""

    async def sample(self, sampler: SamplerRecord, seq_id: int, operation: Sample) -> Entry: ...

    async def cancel(self, request_id: str, owner: str) -> None:
        """Stop a sample. No error if it is unknown or done; InvalidRequest if it is not a sample."""

    # ------------------------------------------------------------ futures

    async def outcome(self, request_id: str, owner: str, timeout: float) -> tuple[Entry, Outcome | None]:
        """Wait up to `timeout` seconds for a request to end; (entry, None) if it has not. NotFound, Ended."""

    async def completions(
        self, sampler: SamplerRecord, client: int, after: int, timeout: float
    ) -> list[Entry]:
        """Ended samples of one client of a sampler, in order of completion, after a cursor; waits for the first one."""
