"""Samplers: weights, and the samples that are drawn from them."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from typing import Any

from msgspec.structs import replace

from tinkercloud.codec import encode
from tinkercloud.control.arrivals import Arrivals
from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.checkpoints import Checkpoints
from tinkercloud.control.sampler_desk import CANCELLED, NUM_SAMPLES, client_of
from tinkercloud.control.sampler_keeper import UNBOUND, SamplerKeeper
from tinkercloud.control.sessions import Sessions
from tinkercloud.engine.operations import Sample
from tinkercloud.engine.results import Failure
from tinkercloud.errors import InvalidRequest, NotFound, Overloaded
from tinkercloud.ledger.entries import request_id
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import Entry, ModelRecord, SamplerRecord, SessionRecord


class Samplers:
    """The samplers of all clients. A sample is on disk, its seed with it, before its entry is returned."""

    def __init__(
        self,
        ledger: Ledger,
        arrivals: Arrivals,
        models: BaseModels,
        sessions: Sessions,
        checkpoints: Checkpoints,
        keeper: SamplerKeeper,
        max_pending: int,
    ):
        """`max_pending`: sequences that may wait for one base model (`_make_sure_of_room`)."""
        self._ledger = ledger
        self._arrivals = arrivals
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._keeper = keeper
        self._max_pending = max_pending
        self._arriving: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Sequences for each base model that are on their way into the ledger, by session."""

    async def create(
        self, session: SessionRecord, seq_id: int, base_model: str | None, path: str | None
    ) -> SamplerRecord:
        """A sampler of a checkpoint (training or sampler), or of a base model. NotFound, InvalidRequest."""
        if path is not None:
            checkpoint = await self._checkpoints.get(path, session.owner)
            if base_model is not None and base_model != checkpoint.base_model:
                raise InvalidRequest(f"{path} was trained on {checkpoint.base_model}, not on {base_model}")
            if checkpoint.kind == "external":
                raise InvalidRequest(
                    f"{path} was exported for other programs; sample from a /sampler_weights/ checkpoint"
                )
            base_model = checkpoint.base_model
        if base_model is None:
            raise InvalidRequest("base_model or model_path is required: there is nothing to sample from")
        info = await self._models.info(base_model)
        if path is not None:
            await self._models.check_weights(checkpoint)
            await self._checkpoints.bring(checkpoint)  # whoever cannot have it is told here, not by each sample
        await self._sessions.touch(session)
        record = SamplerRecord(
            sampler_id=f"{session.session_id}:sample:{seq_id}",
            session_id=session.session_id,
            owner=session.owner,
            base_model=base_model,
            model_path=path,
            folder="",
            created_at=time.time(),
            base_fingerprint=info.fingerprint,
        )
        async with self._keeper.changing:
            if path is None:
                sampler = await self._ledger.insert(record)
            else:
                async with self._checkpoints.held(path, session.owner) as checkpoint:
                    sampler = await self._ledger.insert(replace(record, folder=checkpoint.folder))
            self._keeper.touch(sampler.sampler_id)
        if (sampler.base_model, sampler.model_path, bool(sampler.folder)) != (base_model, path, path is not None):
            raise InvalidRequest(f"sampling session {sampler.sampler_id} has other weights; take another seq_id")
        return sampler

    async def unbound(self, owner: str, base_model: str | None, path: str | None) -> SamplerRecord:
        """The sampler of requests that name weights instead of a sampling session: one for the same weights, in one
        session of the owner's that is made for all of these."""
        now = time.time()
        session = await self._ledger.insert(
            SessionRecord(
                session_id=f"{UNBOUND}{owner}", owner=owner, created_at=now, last_heartbeat=now, state="active"
            )
        )
        if session.state == "finished":  # finishing it ends what it had, not the owner's right to sample
            session = await self._ledger.change(SessionRecord, session.session_id, state="active") or session
        folder = (await self._checkpoints.get(path, owner)).folder if path else ""  # another one after an overwrite
        info = None if base_model is None else await self._models.info(base_model)
        base = f"{base_model} {info.fingerprint}" if info else base_model
        weights = hashlib.sha256(f"{base} {path} {folder}".encode()).digest()
        return await self.create(session, int.from_bytes(weights[:8]), base_model, path)

    async def get(self, sampler_id: str, owner: str) -> SamplerRecord:
        """NotFound."""
        sampler = await self._ledger.get(SamplerRecord, sampler_id)
        if sampler is None or sampler.owner != owner or self._keeper.is_going(sampler_id):
            raise NotFound(
                f"there is no sampler {sampler_id!r}: it was never made, or dropped some time after its session "
                "had finished; create one with create_sampling_client"
            )
        self._keeper.touch(sampler_id)
        return sampler

    async def join(self, sampler: SamplerRecord) -> int:
        """A client number, unique in this sampling session; the creator is 0. NotFound, Ended."""
        with self._keeper.in_use(sampler):
            await self._sessions.active(sampler.session_id, sampler.owner)
            await self._keeper.check(sampler)
            number = await self._ledger.join_sampler(sampler.sampler_id)
            if number is None:
                raise NotFound(f"sampler {sampler.sampler_id} has just been dropped; create a new sampling client")
            return number

    async def sample(self, sampler: SamplerRecord, seq_id: int | None, operation: Sample) -> Entry:
        """Accept a sample; `seq_id` None takes the next free one. Overloaded if too many sequences wait, NotFound if
        the sampler's weights are gone, InvalidRequest if its base model has others now, Ended."""
        await self._models.check_weights(sampler)
        self._make_sure_of_room(sampler, operation.num_samples)
        arriving = self._arriving[sampler.base_model]
        arriving[sampler.session_id] += operation.num_samples
        try:
            with self._keeper.in_use(sampler):
                await self._sessions.heartbeat(sampler.session_id, sampler.owner)
                await self._keeper.check(sampler)
                return await self._accept(sampler, seq_id, operation)
        finally:
            arriving[sampler.session_id] -= operation.num_samples
            if not arriving[sampler.session_id]:
                del arriving[sampler.session_id]

    def _make_sure_of_room(self, sampler: SamplerRecord, sequences: int) -> None:
        """Overloaded if more than `max_pending` sequences would wait and the session has its even share of them, or
        twice as many whoever's they are. Alone, a request of any size has room."""
        waiting = self._arriving[sampler.base_model].copy()
        if sampler.base_model in self._models:  # else samples wait in the ledger until it is
            waiting.update(self._models.get(sampler.base_model).desk.pending_of)
        total, own = waiting.total(), waiting[sampler.session_id]
        share = self._max_pending // len(waiting.keys() | {sampler.session_id})
        is_full = total + sequences > self._max_pending and own + sequences > share
        if total and (is_full or total + sequences > 2 * self._max_pending):
            raise Overloaded(
                f"{total} sequences wait for {sampler.base_model} already, {own} of them of this session, and "
                f"{self._max_pending} may; send the {sequences} of this request again later"
            )

    async def _accept(self, sampler: SamplerRecord, seq_id: int | None, operation: Sample) -> Entry:
        details = {NUM_SAMPLES: operation.num_samples} if operation.num_samples > 1 else {}

        def draft(seq_id: int) -> tuple[bytes, dict[str, Any]]:
            own = request_id(sampler.sampler_id, seq_id)
            return encode(replace(operation, request_id=own, tenant=sampler.session_id)), details

        entry = await self._ledger.append(sampler.sampler_id, seq_id, "sample", draft, num_tokens=operation.num_tokens)
        if entry.state == "accepted" and sampler.base_model in self._models:  # a repeat too: see TrainingRuns._accept
            self._models.get(sampler.base_model).desk.start(entry, sampler)
        return entry

    async def cancel(self, sample_id: str, owner: str) -> None:
        """Stop a sample: it has failed, and stays so, when this returns. No error if it is unknown, done or another
        owner's; InvalidRequest if it is not a sample."""
        entry = await self._ledger.entry(sample_id)
        if entry is None:
            return
        if entry.kind != "sample":
            model = await self._ledger.get(ModelRecord, entry.stream)
            if model is not None and model.owner == owner:
                raise InvalidRequest(f"{sample_id} is a {entry.kind}; only samples can be cancelled")
            return
        try:
            sampler = await self.get(entry.stream, owner)
        except NotFound:
            return
        await self.end(entry, sampler, CANCELLED)

    async def end(self, sample: Entry, sampler: SamplerRecord, failure: Failure) -> None:
        """Stop a sample: it has failed, and stays so, when this returns. No-op if it has ended."""
        # What the engine answers comes too late if the server ends first, and never while the model is not served.
        await self._ledger.complete(sample.request_id, encode(failure), failed=True)
        self._arrivals.announce(sample.request_id, client_of(sample))
        if sampler.base_model in self._models:
            await self._models.get(sampler.base_model).desk.cancel(sample.request_id)
