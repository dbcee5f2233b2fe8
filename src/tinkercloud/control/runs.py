"""Training runs: each is one adapter with a log of operations, which these methods append to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from msgspec.structs import replace

from tinkercloud.codec import encode
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.folders import CheckpointKind, checkpoint_folder, sampler_folder
from tinkercloud.control.outcomes import LoadDetails, SamplerDetails, SaveDetails, StorageLimit, details_of, remember
from tinkercloud.control.sessions import Sessions
from tinkercloud.control.storage import Storage
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.operations import (
    CreateModel,
    DropModel,
    ForwardBackward,
    LoadWeights,
    LoraConfig,
    OptimizerFamily,
    OptimStep,
    SaveWeights,
    TrainOperation,
)
from tinkercloud.engine.results import Failure
from tinkercloud.errors import InvalidRequest, NotFound
from tinkercloud.ledger.entries import Draft, request_id
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import CheckpointRecord, Entry, ModelRecord, SessionRecord
from tinkercloud.ledger.search import Access

MAX_AHEAD = 100_000
"""How many operations a client may send ahead. A seq_id beyond is a mistake that would cost the whole run: when its gap
times out, the log would go on behind it, and every operation in between would come too late."""

SAVES: dict[CheckpointKind, str] = {
    "training": "save_weights",
    "sampler": "save_weights_for_sampler",
    "external": "save_weights_external",
}
"""The operation that makes each kind of checkpoint."""

AHEAD = "ahead"
"""The detail of a refusal that came ahead of an operation before it."""


class TrainingRuns:
    """The training runs of all clients. An operation is on disk before its entry is returned."""

    def __init__(self, ledger: Ledger, models: BaseModels, sessions: Sessions, storage: Storage):
        self._ledger = ledger
        self._models = models
        self._sessions = sessions
        self._storage = storage
        self._creating = asyncio.Lock()

    # ------------------------------------------------------------ making and finding

    async def create(
        self,
        session: SessionRecord,
        model_seq_id: int,
        base_model: str,
        lora: LoraConfig,
        user_metadata: dict[str, Any],
        optimizer: OptimizerFamily = "adamw",
    ) -> Entry:
        """seq_id 0 of a new log; entry.stream is the model's id. A repeat returns the first entry. InvalidRequest if
        the first one had other parameters."""
        info = await self._models.info(base_model)
        model = self._new_model(session, model_seq_id, info, lora, user_metadata, optimizer)
        model = await self._recorded(session, model)
        operation = CreateModel(model.model_id, model.lora, model.optimizer)
        return await self._begin(model, "create_model", operation, {})

    async def create_from(
        self,
        session: SessionRecord,
        model_seq_id: int,
        checkpoint: CheckpointRecord,
        with_optimizer: bool,
        user_metadata: dict[str, Any],
        optimizer: OptimizerFamily | None = None,
    ) -> Entry:
        """Create-via-load: seq_id 0 of a new log loads a checkpoint.

        `with_optimizer` restores the checkpoint's optimizer; InvalidRequest if `optimizer` is another. Without it the
        new run has `optimizer` (None: AdamW). InvalidRequest if the rank is above the base model's `max_rank`, or the
        base model has other weights now.
        """
        if with_optimizer and optimizer not in (None, checkpoint.optimizer):
            raise InvalidRequest(
                f"{checkpoint.path} holds the state of {checkpoint.optimizer}, which cannot go on as {optimizer}; "
                "leave optimizer_config out, or load without optimizer state"
            )
        info = await self._models.info(checkpoint.base_model)
        if checkpoint.lora.rank > info.max_rank and await self.created(session, model_seq_id) is None:
            raise InvalidRequest(
                f"{checkpoint.path} has rank {checkpoint.lora.rank}, which exceeds max LoRA rank {info.max_rank} of "
                f"new training runs for model {info.name}; whoever runs the server can set a larger max_rank"
            )
        await self._models.check_weights(checkpoint)
        optimizer = checkpoint.optimizer if with_optimizer else optimizer or "adamw"
        model = self._new_model(session, model_seq_id, info, checkpoint.lora, user_metadata, optimizer)
        async with self._storage.pinned(model.model_id, checkpoint) as pin:
            model = await self._recorded(session, model)
            load = LoadWeights(model.model_id, pin, with_optimizer=with_optimizer, optimizer=optimizer)
            entry = await self._begin(model, "load_weights", load, remember(LoadDetails(checkpoint.path, pin)))
        first = details_of(entry)
        if isinstance(first, LoadDetails) and first.path != checkpoint.path:
            raise InvalidRequest(
                f"training run {model.model_id} was created from {first.path} before, not from {checkpoint.path}; "
                "take another model_seq_id for another run"
            )
        return entry

    async def created(self, session: SessionRecord, model_seq_id: int) -> Entry | None:
        """How a training run was begun; None if it was not."""
        return await self._ledger.entry(request_id(self.id_of(session, model_seq_id), 0))

    @staticmethod
    def id_of(session: SessionRecord, model_seq_id: int) -> str:
        """What a session's training run is called, whether there is one or not."""
        return f"{session.session_id}:train:{model_seq_id}"

    async def find(self, model_id: str, owner: str) -> ModelRecord:
        """A model's record, also after it was unloaded. NotFound if there is none."""
        model = await self._ledger.get(ModelRecord, model_id)
        if model is None or model.owner != owner:
            raise NotFound(f"there is no training run {model_id!r}; create one with create_lora_training_client")
        return model

    async def live(self, model_id: str, owner: str) -> ModelRecord:
        """NotFound if there is none (or it was unloaded)."""
        model = await self.find(model_id, owner)
        if model.state == "unloaded":
            raise NotFound(f"training run {model_id} was unloaded; create a new one from its last checkpoint")
        return model

    async def list(
        self, owner: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[ModelRecord], int]:
        """(a page of training runs, of one project or of all, newest first; how many there are)."""
        if project_id is not None:
            return await self._ledger.searches.runs_of_project(owner, project_id, limit, offset)
        models = await self._ledger.find(ModelRecord, owner=owner, limit=limit, offset=offset)
        return models, await self._ledger.count(ModelRecord, owner=owner)

    async def accessible(self, model_id: str, access: Access) -> ModelRecord:
        """As `find`, also one of somebody else that the caller may look at."""
        found, _ = await self._ledger.searches.accessible_runs(access, 1, 0, model_id=model_id)
        return found[0] if found else await self.find(model_id, access.owner)

    async def list_accessible(
        self, access: Access, limit: int, offset: int, project_id: str | None
    ) -> tuple[list[ModelRecord], int]:
        """As `list`, with those of others that the caller may look at."""
        fields = {} if project_id is None else {"project_id": project_id}
        return await self._ledger.searches.accessible_runs(access, limit, offset, **fields)

    # ------------------------------------------------------------ operations

    def arriving(self, model: ModelRecord) -> AbstractContextManager[None]:
        """To be entered while an operation of the model is read and submitted: a cycle may wait a moment for it."""
        served = model.base_model in self._models
        return self._models.get(model.base_model).conductor.arriving(model.model_id) if served else nullcontext()

    async def submit(
        self, model: ModelRecord, seq_id: int | None, kind: str, operation: ForwardBackward | OptimStep
    ) -> Entry:
        """Append a forward, forward_backward or optim_step to the model's log. `seq_id` None (hand-written clients)
        takes the next free one. An entry in state "refused" is the repeat of a refused one."""
        tokens = operation.num_tokens if isinstance(operation, ForwardBackward) else 0
        return await self._append(model, seq_id, kind, operation, num_tokens=tokens)

    async def refuse(self, model: ModelRecord, seq_id: int | None, kind: str, error: str) -> Entry | None:
        """Record a refusal at its seq_id, so that what comes after it runs. None without a seq_id that can be one."""
        if seq_id is None or not 0 <= seq_id <= _last_possible(model):
            return None
        served = model.base_model in self._models
        ahead = served and self._models.get(model.base_model).conductor.lacks_before(model.model_id, seq_id)
        entry = await self._ledger.append(
            model.model_id, seq_id, kind, b"", refusal=Failure(error, "user"), details={AHEAD: True} if ahead else {}
        )
        if served:
            await self._accept(model, entry)
        return entry

    async def save_weights(
        self,
        model: ModelRecord,
        seq_id: int | None,
        name: str | None,
        *,
        kind: CheckpointKind,
        ttl_seconds: int | None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
        recipients: Sequence[str] = (),
        limit: StorageLimit | None = None,
    ) -> Entry:
        """Append the saving of a named checkpoint; without a name, one is made of the seq_id. A name that is taken
        fails the future (category user) unless `overwrite`. External weights are encrypted to the `recipients`. What is
        beyond the `limit` when its turn comes fails likewise."""

        def draft(seq_id: int) -> tuple[bytes, dict[str, Any]]:
            details = SaveDetails(
                name=name or f"{seq_id:06d}",
                kind=kind,
                overwrite=overwrite,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
                limit=limit,
            )
            save = SaveWeights(
                model.model_id,
                checkpoint_folder(model.model_id, details.kind, details.name, seq_id, stored=self._storage.has_store),
                with_optimizer=kind == "training",
                replace=True,  # what is there already a crash left: this very operation was run and not recorded
                external=kind == "external",
                recipients=tuple(recipients),
            )
            return encode(save), remember(details)

        return await self._append(model, seq_id, SAVES[kind], draft)

    async def save_ephemeral_sampler(
        self, model: ModelRecord, seq_id: int | None, sampling_session_seq_id: int, *, inflight: bool = False
    ) -> Entry:
        """Append the making of a sampler from the model's weights at this point of its log. With `inflight` all the
        model's inflight samplers go on with these weights, and this one with those that are saved later."""
        sampler_id = f"{model.session_id}:sample:{sampling_session_seq_id}"
        save = SaveWeights(model.model_id, sampler_folder(sampler_id), replace=True)
        details = remember(SamplerDetails(sampler_id, inflight))
        return await self._append(model, seq_id, "save_weights_for_sampler", save, details=details)

    async def load_weights(
        self, model: ModelRecord, seq_id: int | None, checkpoint: CheckpointRecord, with_optimizer: bool
    ) -> Entry:
        """Append the loading of a checkpoint. InvalidRequest if it is of another base model or shape."""
        await self._models.check_weights(model)
        await self._models.check_weights(checkpoint)
        if checkpoint.base_model != model.base_model:
            raise InvalidRequest(
                f"{checkpoint.path} was trained on {checkpoint.base_model}, this training run on {model.base_model}; "
                "create a training client from the checkpoint instead"
            )
        if replace(checkpoint.lora, seed=0) != replace(model.lora, seed=0):
            raise InvalidRequest(
                f"{checkpoint.path} is of another shape than this training run: "
                f"{_differences(checkpoint.lora, model.lora)}; create a training client from the checkpoint instead"
            )
        if with_optimizer and checkpoint.optimizer != model.optimizer:
            raise InvalidRequest(
                f"{checkpoint.path} holds the state of {checkpoint.optimizer}, this training run's optimizer is "
                f"{model.optimizer}; load without optimizer state, or create a training client from the checkpoint"
            )
        async with self._storage.pinned(model.model_id, checkpoint) as pin:
            load = LoadWeights(model.model_id, pin, with_optimizer=with_optimizer, optimizer=model.optimizer)
            details = remember(LoadDetails(checkpoint.path, pin))
            return await self._append(model, seq_id, "load_weights", load, details=details)

    async def unload(self, model: ModelRecord) -> Entry:
        """Free the model after everything before it in its log has run."""
        return await self._append(model, None, "unload_model", DropModel(model.model_id))

    # ------------------------------------------------------------ inside

    def _new_model(
        self,
        session: SessionRecord,
        model_seq_id: int,
        info: BaseModelInfo,
        lora: LoraConfig,
        user_metadata: dict[str, Any],
        optimizer: OptimizerFamily,
    ) -> ModelRecord:
        now = time.time()
        return ModelRecord(
            model_id=self.id_of(session, model_seq_id),
            session_id=session.session_id,
            model_seq_id=model_seq_id,
            owner=session.owner,
            base_model=info.name,
            lora=lora,
            created_at=now,
            last_request_at=now,
            state="live",
            applied_seq=-1,
            user_metadata=user_metadata,
            optimizer=optimizer,
            base_fingerprint=info.fingerprint,
        )

    async def _recorded(self, session: SessionRecord, model: ModelRecord) -> ModelRecord:
        """The model as the ledger has it: this one, or the first of its name, which must have the same parameters."""
        self._models.get(model.base_model)
        await self._sessions.touch(session)
        first = await self._ledger.insert(model)
        if first.state == "unloaded" and await self.created(session, model.model_seq_id) is None:
            raise InvalidRequest(f"training run {first.model_id} is a copy of weights; take another model_seq_id")
        for name, was, wanted in (
            ("base_model", first.base_model, model.base_model),
            ("lora_config", replace(first.lora, seed=0), replace(model.lora, seed=0)),  # it may have been drawn
            ("optimizer_config", first.optimizer, model.optimizer),
        ):
            if was != wanted:
                raise InvalidRequest(
                    f"training run {first.model_id} was created before with {name} {was}, not {wanted}; "
                    "take another model_seq_id for another run"
                )
        return first

    async def _begin(self, model: ModelRecord, kind: str, operation: Any, details: dict[str, Any]) -> Entry:
        async with self._creating:  # a repeat that overtakes the first must not open a second log
            entry = await self._ledger.append(model.model_id, 0, kind, encode(operation), details=details)
            if not entry.repeated:
                await self._models.add_run(model)
            elif entry.state == "accepted":  # perhaps its first was recorded, and the answer lost
                first = await self._ledger.get(ModelRecord, model.model_id)
                if first is not None and first.state == "live":
                    await self._models.add_run(first)
            await self._accept(model, entry)
        await self._sessions.end_if_finished(model.session_id)
        return entry

    async def _append(
        self,
        model: ModelRecord,
        seq_id: int | None,
        kind: str,
        operation: TrainOperation | Draft,
        *,
        num_tokens: int = 0,
        details: dict[str, Any] | None = None,
    ) -> Entry:
        if seq_id is not None and seq_id > _last_possible(model):
            raise InvalidRequest(
                f"seq_id {seq_id} is too far ahead: the next one of {model.model_id} is {model.applied_seq + 1}, and "
                f"at most {MAX_AHEAD} may wait behind it; count up by one for each operation"
            )
        if kind != "unload_model":
            await self._models.check_weights(model)
        await self._sessions.heartbeat(model.session_id, model.owner)
        payload = operation if callable(operation) else encode(operation)
        entry = await self._ledger.append(model.model_id, seq_id, kind, payload, num_tokens=num_tokens, details=details)
        await self._accept(model, entry)
        return entry

    async def _accept(self, model: ModelRecord, entry: Entry) -> None:
        """Hand an entry over; one whose base model is not served now is taken up when that is served again. A repeat
        too: the first may have been recorded without an answer, and handed over by nobody."""
        if entry.state in ("accepted", "refused") and model.base_model in self._models:
            await self._models.get(model.base_model).conductor.accept(entry)


def _differences(saved: LoraConfig, own: LoraConfig) -> str:
    """In what two shapes differ; the seed decides none."""
    names = [name for name in LoraConfig.__struct_fields__ if name != "seed"]
    pairs = [(name, getattr(saved, name), getattr(own, name)) for name in names]
    return ", ".join(f"{name} {there} and not {here}" for name, there, here in pairs if there != here)


def _last_possible(model: ModelRecord) -> int:
    return model.applied_seq + MAX_AHEAD
