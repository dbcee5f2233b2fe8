"""The server behind the API: one method per thing that a client can ask for, no HTTP and no torch.

`api/` decodes and validates a request, calls one method here, and encodes what comes back. Everything that must survive
is written to the ledger before a method returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import time
import uuid
from typing import Any

from msgspec.structs import replace

from tinkercloud.codec import decode, encode
from tinkercloud.config import ModelSettings, Settings
from tinkercloud.control.arrivals import Arrivals, within
from tinkercloud.control.conductor import Conductor
from tinkercloud.control.engines import OnProgress, ServedModels
from tinkercloud.control.folders import checkpoint_folder, parse_checkpoint_path, sampler_folder
from tinkercloud.control.outcomes import LoadDetails, SamplerDetails, SaveDetails, remember
from tinkercloud.control.sampler_desk import SamplerDesk
from tinkercloud.engine.types import (
    BaseModelInfo,
    CreateModel,
    DropModel,
    Failure,
    ForwardBackward,
    LoadWeights,
    LoraConfig,
    OptimStep,
    Sample,
    SaveWeights,
)
from tinkercloud.errors import Ended, InvalidRequest, NotFound, Overloaded
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import (
    CheckpointRecord,
    Entry,
    ModelRecord,
    Outcome,
    SamplerRecord,
    SessionRecord,
)

log = logging.getLogger(__name__)


class Service:
    """See the methods. All raise `tinkercloud.errors` with a sentence for the client."""

    def __init__(self, settings: Settings, ledger: Ledger, on_progress: OnProgress):
        self.settings = settings
        self._ledger = ledger
        self._models = ServedModels(settings.data_dir, on_progress)
        self._arrivals = Arrivals()
        self._conductors: dict[str, Conductor] = {}
        self._desks: dict[str, SamplerDesk] = {}
        self._creating = asyncio.Lock()

    # ------------------------------------------------------------ life

    @classmethod
    async def start(cls, settings: Settings, on_progress: OnProgress) -> Service:
        """Open the data directory, begin to load the base models, and take up what the last run left unfinished."""
        ledger = await Ledger.open(
            settings.data_dir, settings.database_url, result_retention=settings.result_retention_seconds
        )
        service = cls(settings, ledger, on_progress)
        for model in settings.models:
            service.serve_model(model)
            await service._resume(model.name)
        return service

    async def stop(self) -> None:
        """Release waiting clients, finish the running cycles, put every run on disk, end the engines."""
        self.release()
        await asyncio.gather(*(desk.stop() for desk in self._desks.values()))
        await asyncio.gather(*(conductor.stop() for conductor in self._conductors.values()))
        await self._models.stop()
        await self._ledger.close()

    def release(self) -> None:
        """Answer every held poll: the server is about to stop."""
        self._arrivals.close()

    async def _resume(self, base_model: str) -> None:
        """Take up the training runs and samples of a base model where the ledger says that they are."""
        for model in await self._ledger.find(ModelRecord, base_model=base_model, state="live"):
            await self._add_run(model)
        for stream in await self._ledger.pending_streams():
            sampler = await self._ledger.get(SamplerRecord, stream)
            if sampler is not None and sampler.base_model == base_model:
                for entry in await self._ledger.pending(stream):
                    self._desks[base_model].start(entry, sampler)

    async def _add_run(self, model: ModelRecord) -> None:
        log = await self._ledger.model_log(model.model_id, self.settings.gap_timeout_seconds)
        self._conductors[model.base_model].add_run(model, log)

    # ------------------------------------------------------------ the server itself

    def ready(self) -> bool:
        """True from the first moment at which every preloaded engine was ready."""
        return self._models.ready()

    def engines(self) -> dict[str, str]:
        """State of each base model: loading, ready, restarting, idle (lazy and not loaded), failed: why."""
        return {model.name: model.state for model in self._models}

    async def preloaded(self) -> None:
        """Wait until every preloaded base model is ready or has failed for good."""
        await asyncio.gather(*(model.settled() for model in self._models if not model.lazy))

    def load_failures(self) -> list[str]:
        """A sentence for each base model that cannot be loaded."""
        return [f"{model.name}: {model.state}" for model in self._models if model.state.startswith("failed")]

    def served_models(self) -> list[tuple[str, BaseModelInfo | None]]:
        """(name, what is known of it) of each base model; None for a lazy one that was never loaded."""
        return [(model.name, model.info) for model in self._models]

    async def base_model(self, name: str) -> BaseModelInfo:
        """What is known of a base model, loading a lazy one first. NotFound names the ones that are served."""
        return await self._models.get(name).loaded()

    def serve_model(self, model: ModelSettings) -> None:
        """Serve one more base model. InvalidRequest if the name is taken."""
        if model.name in self._models:
            raise InvalidRequest(f"a base model called {model.name} is served already; choose another name")
        options = self.settings.engine_options(model)
        idle_seconds = self.settings.for_model(model, "idle_seconds")
        served = self._models.add(options, lazy=model.lazy, idle_seconds=idle_seconds)
        self._conductors[model.name] = Conductor(served, self._ledger, self._arrivals, self.settings)
        self._desks[model.name] = SamplerDesk(served, self._ledger, self._arrivals, self.settings)

    async def withdraw_model(self, name: str) -> None:
        """Stop serving a base model after its running cycle. Its training runs stay on disk and go on when a model of
        this name is served again. NotFound."""
        self._models.get(name)
        await self._desks.pop(name).stop()
        await self._conductors.pop(name).stop()
        await self._models.remove(name)

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
    ) -> SessionRecord:
        now = time.time()
        return await self._ledger.insert(
            SessionRecord(
                session_id=str(uuid.uuid4()),
                owner=owner,
                created_at=now,
                last_heartbeat=now,
                state="active",
                sdk_version=sdk_version,
                tags=tuple(tags),
                user_metadata=user_metadata,
                display_name=display_name,
                project_id=project_id,
            )
        )

    async def session(self, session_id: str, owner: str) -> SessionRecord:
        """NotFound if there is none; a finished one is returned too."""
        session = await self._ledger.get(SessionRecord, session_id)
        if session is None or session.owner != owner:
            raise NotFound(
                f"Session not found: {session_id}. It was made on another server or data directory, or dropped after "
                "its retention time; create a new ServiceClient, and load your last checkpoint"
            )
        return session

    async def active_session(self, session_id: str, owner: str) -> SessionRecord:
        """A session that can still be used. NotFound, Ended."""
        session = await self.session(session_id, owner)
        if session.state == "finished":
            raise Ended(f"Session {session_id} has finished ({session.finish_reason}); create a new ServiceClient")
        return session

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Keeps the session; brings a parked one back. Ended if it has finished."""
        session = await self.active_session(session_id, owner)
        await self._touch(session)

    async def _touch(self, session: SessionRecord) -> None:
        """A sign of life; a parked session's state comes back with its next operation."""
        if session.state == "parked":
            await self._ledger.change(SessionRecord, session.session_id, state="active")
        self._ledger.heartbeat(session.session_id)

    async def finish_session(self, session_id: str, owner: str, reason: str) -> None:
        """The first reason wins; a repeat changes nothing."""
        session = await self.session(session_id, owner)
        if session.state != "finished":
            await self._ledger.change(SessionRecord, session_id, state="finished", finish_reason=reason)
            await self.free_session(session_id)

    async def free_session(self, session_id: str) -> None:
        """Put a session's runs on disk and close its samplers in the engines."""
        models = await self._ledger.find(ModelRecord, session_id=session_id)
        for name, conductor in self._conductors.items():
            await conductor.park([m.model_id for m in models if m.base_model == name])
        for sampler in await self._ledger.find(SamplerRecord, session_id=session_id):
            if sampler.base_model in self._desks:
                await self._desks[sampler.base_model].close(sampler.sampler_id)

    async def list_sessions(self, owner: str, limit: int, offset: int) -> list[SessionRecord]:
        """A page of the owner's sessions, newest first."""
        return await self._ledger.find(SessionRecord, owner=owner, limit=limit, offset=offset)

    async def session_members(self, session_id: str) -> tuple[list[str], list[str]]:
        """(model ids, sampler ids) of a session."""
        models = await self._ledger.find(ModelRecord, session_id=session_id)
        samplers = await self._ledger.find(SamplerRecord, session_id=session_id)
        return [m.model_id for m in models], [s.sampler_id for s in samplers]

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
        model = self._new_model(session, model_seq_id, base_model, lora, user_metadata)
        return await self._begin(session, model, "create_model", CreateModel(model.model_id, lora), {})

    async def create_model_from(
        self,
        session: SessionRecord,
        model_seq_id: int,
        checkpoint: CheckpointRecord,
        with_optimizer: bool,
        user_metadata: dict[str, Any],
    ) -> Entry:
        """Create-via-load: seq_id 0 of a new log loads a checkpoint."""
        model = self._new_model(session, model_seq_id, checkpoint.base_model, checkpoint.lora, user_metadata)
        load = LoadWeights(model.model_id, checkpoint.folder, with_optimizer=with_optimizer)
        return await self._begin(session, model, "load_weights", load, remember(LoadDetails(checkpoint.path)))

    def _new_model(
        self,
        session: SessionRecord,
        model_seq_id: int,
        base_model: str,
        lora: LoraConfig,
        user_metadata: dict[str, Any],
    ) -> ModelRecord:
        now = time.time()
        return ModelRecord(
            model_id=f"{session.session_id}:train:{model_seq_id}",
            session_id=session.session_id,
            model_seq_id=model_seq_id,
            owner=session.owner,
            base_model=base_model,
            lora=lora,
            created_at=now,
            last_request_at=now,
            state="live",
            applied_seq=-1,
            user_metadata=user_metadata,
        )

    async def _begin(
        self, session: SessionRecord, model: ModelRecord, kind: str, operation: Any, details: dict[str, Any]
    ) -> Entry:
        self._models.get(model.base_model)
        await self._touch(session)
        async with self._creating:  # a repeat that overtakes the first must not open a second log
            await self._ledger.insert(model)
            entry = await self._ledger.append(model.model_id, 0, kind, encode(operation), details=details)
            if not entry.repeated:
                await self._add_run(model)
        return entry

    async def training_run(self, model_id: str, owner: str) -> ModelRecord:
        """A model's record, also after it was unloaded. NotFound if there is none."""
        model = await self._ledger.get(ModelRecord, model_id)
        if model is None or model.owner != owner:
            raise NotFound(f"there is no training run {model_id!r}; create one with create_lora_training_client")
        return model

    async def model(self, model_id: str, owner: str) -> ModelRecord:
        """NotFound if there is none (or it was unloaded)."""
        model = await self.training_run(model_id, owner)
        if model.state == "unloaded":
            raise NotFound(f"training run {model_id} was unloaded; create a new one from its last checkpoint")
        return model

    async def submit(
        self, model: ModelRecord, seq_id: int | None, kind: str, operation: ForwardBackward | OptimStep
    ) -> Entry:
        """Append a forward, forward_backward or optim_step to the model's log. `seq_id` None (hand-written clients)
        takes the next free one. An entry in state "refused" is the repeat of a refused one."""
        tokens = operation.num_tokens if isinstance(operation, ForwardBackward) else 0
        return await self._append(model, seq_id, kind, operation, num_tokens=tokens)

    async def refuse(self, model: ModelRecord, seq_id: int | None, kind: str, error: str) -> Entry | None:
        """Record a refusal at its seq_id, so that what comes after it runs. None without a seq_id."""
        if seq_id is None:
            return None
        entry = await self._ledger.append(model.model_id, seq_id, kind, b"", refusal=Failure(error, "user"))
        self._accept(model, entry)
        return entry

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
        if seq_id is None:
            seq_id = await self._ledger.highest_seq(model.model_id) + 1
        details = SaveDetails(
            name=name or f"{seq_id:06d}",
            kind="sampler" if for_sampler else "training",
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata,
        )
        folder = checkpoint_folder(model.model_id, details.kind, details.name)
        # Whether the name is free is the ledger's to say; a folder without a record is what a crash left behind.
        save = SaveWeights(model.model_id, folder, with_optimizer=not for_sampler, replace=True)
        kind = "save_weights_for_sampler" if for_sampler else "save_weights"
        return await self._append(model, seq_id, kind, save, details=remember(details))

    async def save_ephemeral_sampler(
        self, model: ModelRecord, seq_id: int | None, sampling_session_seq_id: int
    ) -> Entry:
        """Append the making of a sampler from the model's weights at this point of its log."""
        sampler_id = f"{model.session_id}:sample:{sampling_session_seq_id}"
        save = SaveWeights(model.model_id, sampler_folder(sampler_id), replace=True)
        details = remember(SamplerDetails(sampler_id))
        return await self._append(model, seq_id, "save_weights_for_sampler", save, details=details)

    async def load_weights(
        self, model: ModelRecord, seq_id: int | None, checkpoint: CheckpointRecord, with_optimizer: bool
    ) -> Entry:
        """Append the loading of a checkpoint. InvalidRequest if it is of another base model or shape."""
        if checkpoint.base_model != model.base_model:
            raise InvalidRequest(
                f"{checkpoint.path} was trained on {checkpoint.base_model}, this training run on {model.base_model}; "
                "create a training client from the checkpoint instead"
            )
        if replace(checkpoint.lora, seed=0) != replace(model.lora, seed=0):
            raise InvalidRequest(
                f"{checkpoint.path} holds {checkpoint.lora}, this training run is {model.lora}; "
                "create a training client from the checkpoint instead"
            )
        load = LoadWeights(model.model_id, checkpoint.folder, with_optimizer=with_optimizer)
        return await self._append(model, seq_id, "load_weights", load, details=remember(LoadDetails(checkpoint.path)))

    async def unload_model(self, model: ModelRecord) -> Entry:
        """Free the model after everything before it in its log has run."""
        return await self._append(model, None, "unload_model", DropModel(model.model_id))

    async def _append(
        self,
        model: ModelRecord,
        seq_id: int | None,
        kind: str,
        operation: Any,
        *,
        num_tokens: int = 0,
        details: dict[str, Any] | None = None,
    ) -> Entry:
        await self._touch(await self.active_session(model.session_id, model.owner))
        entry = await self._ledger.append(
            model.model_id, seq_id, kind, encode(operation), num_tokens=num_tokens, details=details or {}
        )
        self._accept(model, entry)
        return entry

    def _accept(self, model: ModelRecord, entry: Entry) -> None:
        if not entry.repeated:
            self._conductor(model.base_model).accept(entry)

    async def list_models(self, owner: str, limit: int, offset: int) -> tuple[list[ModelRecord], int]:
        """(a page of training runs, newest first; how many there are)."""
        models = await self._ledger.find(ModelRecord, owner=owner, limit=limit, offset=offset)
        return models, await self._ledger.count(ModelRecord, owner=owner)

    # ------------------------------------------------------------ checkpoints

    async def checkpoint(self, path: str, owner: str) -> CheckpointRecord:
        """By its tinker:// path. NotFound if there is none, InvalidRequest if it is no such path."""
        parse_checkpoint_path(path)
        checkpoint = await self._ledger.get(CheckpointRecord, path)
        expired = checkpoint is not None and checkpoint.expires_at is not None and checkpoint.expires_at < time.time()
        if checkpoint is None or expired or checkpoint.owner != owner:
            raise NotFound(f"there is no checkpoint {path}; `tinkercloud checkpoints list` shows those that there are")
        return checkpoint

    async def list_checkpoints(self, owner: str, model_id: str | None) -> list[CheckpointRecord]:
        """All of the owner's checkpoints, or those of one training run, newest first."""
        if model_id is not None:
            return await self._ledger.find(CheckpointRecord, owner=owner, model_id=model_id)
        return await self._ledger.find(CheckpointRecord, owner=owner)

    # ------------------------------------------------------------ sampling

    async def create_sampler(
        self, session: SessionRecord, seq_id: int, base_model: str | None, path: str | None
    ) -> SamplerRecord:
        """A sampler of a checkpoint (training or sampler), or of a base model. NotFound, InvalidRequest."""
        folder = ""
        if path is not None:
            checkpoint = await self.checkpoint(path, session.owner)
            if base_model is not None and base_model != checkpoint.base_model:
                raise InvalidRequest(f"{path} was trained on {checkpoint.base_model}, not on {base_model}")
            base_model, folder = checkpoint.base_model, checkpoint.folder
        if base_model is None:
            raise InvalidRequest("base_model or model_path is required: there is nothing to sample from")
        await self._models.get(base_model).loaded()
        await self._touch(session)
        return await self._ledger.insert(
            SamplerRecord(
                sampler_id=f"{session.session_id}:sample:{seq_id}",
                session_id=session.session_id,
                owner=session.owner,
                base_model=base_model,
                model_path=path,
                folder=folder,
                created_at=time.time(),
            )
        )

    async def unbound_sampler(self, owner: str, base_model: str | None, path: str | None) -> SamplerRecord:
        """The sampler of requests that name weights instead of a sampling session: one for the same weights, in one
        session of the owner's that is made for all of these."""
        now = time.time()
        session = await self._ledger.insert(
            SessionRecord(
                session_id=f"unbound-{owner}", owner=owner, created_at=now, last_heartbeat=now, state="active"
            )
        )
        weights = hashlib.sha256(f"{base_model} {path}".encode()).digest()
        return await self.create_sampler(session, int.from_bytes(weights[:4]), base_model, path)

    async def sampler(self, sampler_id: str, owner: str) -> SamplerRecord:
        """NotFound."""
        sampler = await self._ledger.get(SamplerRecord, sampler_id)
        if sampler is None or sampler.owner != owner:
            raise NotFound(f"there is no sampler {sampler_id!r}; create one with create_sampling_client")
        return sampler

    async def join_sampler(self, sampler: SamplerRecord) -> int:
        """A client number, unique in this sampling session; the creator is 0."""
        number = await self._ledger.join_sampler(sampler.sampler_id)
        assert number is not None, "samplers are never removed"
        return number

    async def sample(self, sampler: SamplerRecord, seq_id: int | None, operation: Sample) -> Entry:
        """Accept a sample; `seq_id` None takes the next free one. Overloaded if too many wait."""
        desk = self._desk(sampler.base_model)
        if desk.pending >= self.settings.max_pending_samples:
            raise Overloaded(f"{desk.pending} samples wait for {sampler.base_model} already; send this one again later")
        await self._touch(await self.active_session(sampler.session_id, sampler.owner))
        entry = await self._ledger.append(
            sampler.sampler_id, seq_id, "sample", encode(operation), num_tokens=operation.num_tokens
        )
        if not entry.repeated:
            desk.start(entry, sampler)
        return entry

    async def cancel(self, request_id: str, owner: str) -> None:
        """Stop a sample. No error if it is unknown or done; InvalidRequest if it is not a sample."""
        entry = await self._ledger.entry(request_id)
        if entry is None:
            return
        if entry.kind != "sample":
            raise InvalidRequest(f"{request_id} is a {entry.kind}; only samples can be cancelled")
        sampler = await self.sampler(entry.stream, owner)
        await self._desk(sampler.base_model).cancel(request_id)

    # ------------------------------------------------------------ futures

    async def outcome(self, request_id: str, owner: str, timeout: float) -> tuple[Entry, Outcome | None]:
        """Wait up to `timeout` seconds for a request to end; (entry, None) if it has not. NotFound, Ended."""
        with self._arrivals.listen(request_id) as arrived:
            entry = await self._owned_entry(request_id, owner)
            if entry.state == "accepted":
                await within(arrived, timeout)
                entry = await self._owned_entry(request_id, owner)
        if entry.state == "accepted":
            return entry, None
        stored = None if entry.expired else await self._ledger.outcome(request_id)
        if stored is None:
            raise Ended(f"the result of {request_id} was retrieved and is past its retention; send the request again")
        await self._ledger.retrieved(request_id)
        return entry, decode(stored, Outcome)

    async def _owned_entry(self, request_id: str, owner: str) -> Entry:
        entry = await self._ledger.entry(request_id)
        stream = None
        if entry is not None:
            kind = SamplerRecord if entry.kind == "sample" else ModelRecord
            stream = await self._ledger.get(kind, entry.stream)
        if entry is None or stream is None or stream.owner != owner:
            raise NotFound(f"there is no request {request_id!r}")
        return entry

    async def completions(self, sampler: SamplerRecord, client: int, after: int, timeout: float) -> list[Entry]:
        """Ended samples of one client of a sampler, in order of completion, after a cursor; waits for the first one."""
        deadline = time.monotonic() + timeout
        while True:
            with self._arrivals.listen(sampler.sampler_id) as arrived:
                ended = await self._ledger.completions(sampler.sampler_id, client, after)
                if ended or time.monotonic() >= deadline or self._arrivals.closed:
                    return ended
                await within(arrived, deadline - time.monotonic())

    # ------------------------------------------------------------ housekeeping

    async def park_silent_sessions(self, now: float) -> None:
        """Put the state of sessions without a sign of life on disk and free their engines' memory."""
        for session in await self._ledger.find(SessionRecord, state="active"):
            if session.last_heartbeat > now - self.settings.session_timeout_seconds:
                continue
            log.info("session %s is silent; parked", session.session_id)
            await self._ledger.change(SessionRecord, session.session_id, state="parked")
            await self.free_session(session.session_id)

    async def unload_idle_models(self, now: float) -> None:
        """End the engines of lazy base models that nobody has used for a while."""
        for model in self._models:
            conductor, desk = self._conductors[model.name], self._desks[model.name]
            if model.idle and not conductor.busy and not desk.pending:
                log.info("base model %s is idle; unloaded", model.name)
                await conductor.park_all()
                await model.stop()

    async def drop_expired(self, now: float) -> None:
        """Drop results past their retention, checkpoints past their time, sessions past coming back."""
        await self._ledger.expire(now)
        for checkpoint in await self._ledger.find(CheckpointRecord):
            if checkpoint.expires_at is not None and checkpoint.expires_at <= now:
                await self._ledger.remove(CheckpointRecord, checkpoint.path)
                await asyncio.to_thread(shutil.rmtree, self.settings.data_dir / checkpoint.folder, ignore_errors=True)

    # ------------------------------------------------------------ rooms of one base model

    def _conductor(self, base_model: str) -> Conductor:
        self._models.get(base_model)
        return self._conductors[base_model]

    def _desk(self, base_model: str) -> SamplerDesk:
        self._models.get(base_model)
        return self._desks[base_model]
