"""Copies of checkpoints: records of their own that share the files of the ones that they were made from."""

from __future__ import annotations

import time
import uuid

from msgspec.structs import replace

from tinkercloud.control.checkpoints import Allow, Checkpoints, run_that_holds
from tinkercloud.control.folders import checkpoint_path, parse_checkpoint_path
from tinkercloud.control.runs import TrainingRuns
from tinkercloud.control.storage import Storage
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SessionRecord

COPIED_FROM = "copied_from"
"""The user metadata of a copy's training run that names the checkpoint."""

_KEYS = uuid.UUID("6f4f7b1e-5d0c-4f0a-9d5b-2f1f0a4f8c11")
"""The namespace of the sessions that idempotency keys stand for."""


class Copies:
    """Makes copies. A copy is the checkpoint of a training run in which nothing can be trained."""

    def __init__(self, ledger: Ledger, checkpoints: Checkpoints, storage: Storage):
        self._ledger = ledger
        self._storage = storage
        self._checkpoints = checkpoints

    async def into_project(
        self,
        source: str,
        owner: str,
        project_id: str,
        ttl_seconds: int | None,
        key: str | None,
        allow: Allow,
        reader: str | None = None,
    ) -> CheckpointRecord:
        """A copy in a session of its own, which belongs to the project. A repeat with the same idempotency key gives
        the first one. `reader` as in `Checkpoints.get`. NotFound, InvalidRequest, and what `allow` raises."""
        session_id = uuid.uuid5(_KEYS, f"{owner}\0{key}") if key else uuid.uuid4()
        session = await self._ledger.get(SessionRecord, str(session_id))
        if session is not None:
            return await self.into_session(source, session, 0, ttl_seconds, allow, reader)
        await self._checkpoints.get(source, owner, reader)
        now = time.time()
        session = SessionRecord(
            session_id=str(session_id),
            owner=owner,
            created_at=now,
            last_heartbeat=now,
            state="finished",
            display_name=f"copy of {source}",
            project_id=project_id,
            finish_reason="success",
        )
        return await self.into_session(source, session, 0, ttl_seconds, allow, reader, is_new=True)

    async def into_session(
        self,
        source: str,
        session: SessionRecord,
        model_seq_id: int,
        ttl_seconds: int | None,
        allow: Allow,
        reader: str | None = None,
        is_new: bool = False,
    ) -> CheckpointRecord:
        """A copy as training run `model_seq_id` of a session, which is recorded with it if it `is_new`. A repeat gives
        the first one. NotFound, InvalidRequest if there is another run of that number, and what `allow` raises."""
        model_id = TrainingRuns.id_of(session, model_seq_id)
        _, kind, name = parse_checkpoint_path(source)
        path = checkpoint_path(model_id, kind, name)
        async with self._storage.saving[session.owner]:  # of many at once each is allowed after the ones before
            first = await self._ledger.get(ModelRecord, model_id)
            there = await self._ledger.get(CheckpointRecord, path)
            if first is not None:
                _check_same(first, source)
            if there is not None:
                return there
            await allow()
            now = time.time()
            async with self._checkpoints.held(source, session.owner, reader) as checkpoint:
                run = run_that_holds(
                    checkpoint, model_id, session.session_id, model_seq_id, session.owner, now, {COPIED_FROM: source}
                )
                copy = replace(
                    checkpoint,
                    path=path,
                    model_id=model_id,
                    owner=session.owner,
                    created_at=now,
                    expires_at=None if ttl_seconds is None else now + ttl_seconds,
                    public=False,
                )
                _check_same(await self._ledger.insert(run, copy, *([session] if is_new else [])), source)
                return await self._ledger.insert(copy)


def _check_same(run: ModelRecord, source: str) -> None:
    if run.state != "unloaded" or run.user_metadata.get(COPIED_FROM) != source:
        raise InvalidRequest(
            f"there is a training run {run.model_id} already, which is no copy of {source}; take another model_seq_id, "
            "or another X-Idempotency-Key"
        )
