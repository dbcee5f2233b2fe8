"""Named checkpoints: finding and changing them, taking in foreign ones, dropping those whose time is over."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tinkercloud.codec import encode
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.engine_handle import EngineDied
from tinkercloud.control.folders import (
    checkpoint_folder,
    checkpoint_path,
    checkpoints_folder,
    draft_of,
    import_id,
    parse_checkpoint_path,
)
from tinkercloud.control.storage import Storage
from tinkercloud.engine import checksums
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.external_weights import AGE_SUFFIX
from tinkercloud.engine.operations import CloseSampler, LoraConfig, OpenSampler, OperationError
from tinkercloud.engine.peft_layout import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_base_model
from tinkercloud.engine.results import Failure
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.files import sync, sync_names
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SessionRecord

Allow = Callable[[], Awaitable[None]]
"""Raises if nothing more may be stored; not asked about what is there."""


async def no_limit() -> None:
    """An `Allow` that allows everything."""


class Checkpoints:
    """The named checkpoints of all clients, in the data directory."""

    def __init__(self, ledger: Ledger, models: BaseModels, storage: Storage, data_dir: Path):
        self._ledger = ledger
        self._models = models
        self._storage = storage
        self._data_dir = data_dir

    async def get(self, path: str, owner: str, reader: str | None = None) -> CheckpointRecord:
        """To read, by its tinker:// path: one of the owner's, or of `reader`'s, whose token the request has, or a
        published one. NotFound if there is none, InvalidRequest if it is no such path."""
        parse_checkpoint_path(path)
        checkpoint = await self._ledger.get(CheckpointRecord, path)
        if checkpoint is None or _is_over(checkpoint) or not (checkpoint.owner in (owner, reader) or checkpoint.public):
            raise NotFound(f"there is no checkpoint {path}; `tinker checkpoint list` shows those that there are")
        return checkpoint

    async def owned(self, path: str, owner: str) -> CheckpointRecord:
        """As `get`, to change it: a published one of somebody else is NotFound too."""
        checkpoint = await self.get(path, owner)
        if checkpoint.owner != owner:
            raise NotFound(f"there is no checkpoint {path} of yours; only its owner can change a published checkpoint")
        return checkpoint

    @asynccontextmanager
    async def held(self, path: str, owner: str, reader: str | None = None) -> AsyncIterator[CheckpointRecord]:
        """As `get`; its folder does not go while the body records who else has it."""
        async with self._storage.lock:
            yield await self.get(path, owner, reader)

    async def of_run(self, model_id: str, owner: str) -> list[CheckpointRecord]:
        """All checkpoints of one of the owner's training runs, newest first."""
        found = await self._ledger.find(CheckpointRecord, owner=owner, model_id=model_id)
        return [checkpoint for checkpoint in found if not _is_over(checkpoint)]

    async def readable_of_run(self, model_id: str, owner: str) -> list[CheckpointRecord]:
        """As `of_run`, of anybody's training run: those of the owner, and those that are published."""
        found = await self._ledger.find(CheckpointRecord, model_id=model_id)
        return [each for each in found if (each.owner == owner or each.public) and not _is_over(each)]

    async def list(self, owner: str, limit: int, offset: int) -> tuple[list[CheckpointRecord], int]:
        """(a page of the owner's checkpoints, newest first; how many there are)."""
        return await self._ledger.searches.valid_checkpoints(owner, limit, offset)

    def folder(self, checkpoint: CheckpointRecord) -> Path:
        """Where its files are."""
        return self._data_dir / checkpoint.folder

    async def bring(self, checkpoint: CheckpointRecord) -> None:
        """Make sure that its files are in its `folder`, for some minutes at least. NotFound or InvalidRequest if they
        are gone or damaged, Unavailable if the store that has them does not answer."""
        await self._storage.bring(checkpoint.folder)

    async def files(self, checkpoint: CheckpointRecord) -> list[str]:
        """The names of those that hold its weights and say what they are: not those that only this server reads. They
        are in its `folder`; as `bring`."""
        await self.bring(checkpoint)
        names = {file.name.removesuffix(AGE_SUFFIX): file.name for file in self.folder(checkpoint).iterdir()}
        return sorted(names[name] for name in (CONFIG_FILE, WEIGHTS_FILE) if name in names)

    async def check(self, checkpoint: CheckpointRecord, *names: str) -> None:
        """InvalidRequest if one of these files in its `folder` is not what was written."""
        try:
            await asyncio.to_thread(checksums.check, self.folder(checkpoint), *names)
        except OperationError as error:
            raise InvalidRequest(str(error)) from error

    # ------------------------------------------------------------ changing what there is

    async def delete(self, path: str, owner: str) -> None:
        """Forget a checkpoint. Its files go with the last copy and the last sampler that has them; a load that was
        accepted before has its own hold on them."""
        await self.owned(path, owner)
        removed = await self._ledger.remove(CheckpointRecord, path)  # an overwrite may have come in between
        if removed is not None:
            await self._storage.free(removed.folder)

    async def publish(self, path: str, owner: str, public: bool) -> None:
        """Let every owner read a checkpoint, or no other any more. What others made of it meanwhile stays theirs."""
        await self.owned(path, owner)
        await self._ledger.change(CheckpointRecord, path, public=public)

    async def set_ttl(self, path: str, owner: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint go so many seconds from now; None keeps it for good."""
        await self.owned(path, owner)
        expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
        await self._ledger.change(CheckpointRecord, path, expires_at=expires_at)

    # ------------------------------------------------------------ taking in foreign ones

    async def import_folder(
        self, folder: Path, name: str, base_model: str | None, owner: str, allow: Allow = no_limit
    ) -> CheckpointRecord:
        """Copy an adapter in PEFT's layout into the data directory, after an engine has been able to load it.

        `base_model` is the served name of the model that it belongs to; without it, the one that the adapter names.
        InvalidRequest says what is wrong with the folder, NotFound names the base models that are served, Unavailable
        that the engine could not say. And what `allow` raises.
        """
        await allow()  # before anything is copied
        try:
            lora = read_adapter_config(folder)
            await asyncio.to_thread(checksums.check, folder, CONFIG_FILE, WEIGHTS_FILE)
            named = base_model or read_base_model(folder)
        except OperationError as error:
            raise InvalidRequest(f"{folder} cannot be imported: {error}") from None
        if base_model is None and named not in self._models:
            served = ", ".join(sorted(name for name, _ in self._models.known()))
            raise InvalidRequest(
                f"the adapter was made for {named!r}, which is not served under that name; say which model it is for "
                f"with `--base-model NAME` (served are: {served})"
            )
        base_model = named
        info = await self._models.info(base_model)
        if lora.rank > info.max_rank:
            raise InvalidRequest(
                f"the adapter has rank {lora.rank}, above max_rank {info.max_rank} of {base_model}; "
                "serve the model with a larger max_rank"
            )
        model_id = import_id()
        stored = self._storage.has_store
        drafts = self._data_dir / checkpoints_folder(draft_of(model_id))
        draft = checkpoint_folder(draft_of(model_id), "training", name, 0)
        try:
            await asyncio.to_thread(_copy_adapter, folder, self._data_dir / draft, drafts)
            await self._check_loads(base_model, draft)
            place = self._data_dir / checkpoints_folder(model_id, stored=stored)
            await asyncio.to_thread(_move, drafts, place, self._data_dir)
        finally:
            await asyncio.to_thread(shutil.rmtree, drafts, ignore_errors=True)
        target = checkpoint_folder(model_id, "training", name, 0, stored=stored)
        checkpoint = self._imported(model_id, name, owner, info, lora, target)
        session = _session_of(checkpoint)
        run = run_that_holds(checkpoint, model_id, model_id, 0, owner, checkpoint.created_at)
        try:
            async with self._storage.saving[owner]:
                await allow()
                if not stored:
                    return await self._ledger.insert(checkpoint, run, session)
                await self._ledger.insert(run, session)  # by which a start knows what a crash left of it in the store
                await self._publish(checkpoint)
                return await self._ledger.insert(checkpoint)
        except Exception:  # not of a caller that was cancelled: its write may still happen
            await self._storage.free(target)
            raise

    async def _publish(self, imported: CheckpointRecord) -> None:
        try:
            await self._storage.publish(imported.folder)
        except Unavailable:
            await self._ledger.remove(ModelRecord, imported.model_id)
            await self._ledger.remove(SessionRecord, imported.model_id)
            raise

    def _imported(
        self, model_id: str, name: str, owner: str, info: BaseModelInfo, lora: LoraConfig, folder: str
    ) -> CheckpointRecord:
        return CheckpointRecord(
            path=checkpoint_path(model_id, "training", name),
            model_id=model_id,
            kind="training",
            name=name,
            owner=owner,
            base_model=info.name,
            lora=lora,
            folder=folder,
            size_bytes=sum(file.stat().st_size for file in (self._data_dir / folder).iterdir()),
            created_at=time.time(),
            base_fingerprint=info.fingerprint,
        )

    async def _check_loads(self, base_model: str, folder: str) -> None:
        """Let the engine open the adapter as a sampler and close it again. InvalidRequest is what it says, Unavailable
        that it ended."""
        engine = await self._models.get(base_model).engine.running()
        try:
            result = await engine.ask(encode(OpenSampler(folder, folder)))
            if isinstance(result, Failure):
                raise InvalidRequest(f"the adapter does not fit {base_model}: {result.error}")
            await engine.ask(encode(CloseSampler(folder)))
        except EngineDied as error:
            raise Unavailable(
                f"the engine of {base_model} ended while it opened the adapter, which was not imported; import it "
                "again, and should that end the engine too, the server's log has the details"
            ) from error

    async def drop_expired(self, now: float) -> None:
        """Remove the checkpoints whose time is over, records first."""
        for checkpoint in await self._ledger.remove_expired(now):
            await self._storage.free(checkpoint.folder)


def _is_over(checkpoint: CheckpointRecord) -> bool:
    """Whether its time is over, and housekeeping has not come by yet."""
    return checkpoint.expires_at is not None and checkpoint.expires_at <= time.time()


def _copy_adapter(source: Path, target: Path, top: Path) -> None:
    """On disk when this returns, with checksums, but for the name of `top`."""
    target.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / file, target / file)
    checksums.write_checksums(target)
    for file in target.iterdir():
        sync(file)
    sync_names(target, top)


def _move(folder: Path, place: Path, top: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    sync_names(place.parent, top)


def _session_of(imported: CheckpointRecord) -> SessionRecord:
    """The session that an import's training run is in, alone."""
    return SessionRecord(
        session_id=imported.model_id,
        owner=imported.owner,
        created_at=imported.created_at,
        last_heartbeat=imported.created_at,
        state="finished",
        display_name=f"import of {imported.name}",
        finish_reason="success",
    )


def run_that_holds(
    checkpoint: CheckpointRecord,
    model_id: str,
    session_id: str,
    model_seq_id: int,
    owner: str,
    now: float,
    user_metadata: dict[str, Any] | None = None,
) -> ModelRecord:
    """A training run that has no operations and never will, only a checkpoint that was made elsewhere."""
    return ModelRecord(
        model_id=model_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        owner=owner,
        base_model=checkpoint.base_model,
        lora=checkpoint.lora,
        created_at=now,
        last_request_at=now,
        state="unloaded",
        applied_seq=-1,
        user_metadata=user_metadata or {},
        optimizer=checkpoint.optimizer,
        base_fingerprint=checkpoint.base_fingerprint,
    )
