"""What an operator may do to any user's sessions, training runs and samplers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from tinkercloud.control.base_models import BaseModels
from tinkercloud.control.futures import Futures
from tinkercloud.control.run_end import stopped
from tinkercloud.control.runs import TrainingRuns
from tinkercloud.control.sampler_desk import left_to_draw
from tinkercloud.control.sampler_keeper import SamplerKeeper
from tinkercloud.control.samplers import Samplers
from tinkercloud.control.sessions import Sessions
from tinkercloud.engine.results import Failure
from tinkercloud.errors import NotFound
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord, SamplerRecord, SessionRecord

REASON = "stopped by the operator"
"""What the clients of a session are told that was stopped or drained."""

LOOK_SECONDS = 0.2
"""How often it is looked whether the samples of a sampler have ended."""


class Operator:
    """Lists, drains and stops. Whose things they are does not matter here: `api/` lets nobody else in."""

    def __init__(
        self,
        ledger: Ledger,
        models: BaseModels,
        sessions: Sessions,
        runs: TrainingRuns,
        samplers: Samplers,
        futures: Futures,
        keeper: SamplerKeeper,
    ):
        self._ledger = ledger
        self._models = models
        self._sessions = sessions
        self._runs = runs
        self._samplers = samplers
        self._futures = futures
        self._keeper = keeper

    async def list(self, finished: bool, limit: int, offset: int) -> list[dict[str, Any]]:
        """A page of the sessions, newest first, with the training runs and samplers of each; those that have not
        finished, or all."""
        sessions = [
            session for session in await self._ledger.find(SessionRecord) if finished or session.state != "finished"
        ]
        return [await self._described(session) for session in sessions[offset : offset + limit]]

    async def stop_session(self, session_id: str) -> None:
        """End a session now: what waits in it fails, and its samplers go with what they draw. NotFound."""
        session = await self._session(session_id)
        await self._sessions.finish(session_id, session.owner, REASON)
        for sampler in await self._ledger.find(SamplerRecord, session_id=session_id):
            with suppress(NotFound):  # it went by itself meanwhile
                await self.stop_sampler(sampler.sampler_id)

    async def drain_session(self, session_id: str, timeout: float) -> bool:
        """Let what was accepted in a session end, and nothing behind it; then end it. False if that takes longer than
        `timeout` seconds: nothing is lost, ask again. NotFound."""
        session = await self._session(session_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        for model in await self._ledger.find(ModelRecord, session_id=session_id, state="live"):
            entry = await self._runs.unload(model)
            _, outcome = await self._futures.outcome(entry.request_id, session.owner, deadline - loop.time())
            if outcome is None:
                return False
        for sampler in await self._ledger.find(SamplerRecord, session_id=session_id):
            while await self._ledger.pending(sampler.sampler_id):
                if loop.time() >= deadline:
                    return False
                await asyncio.sleep(LOOK_SECONDS)
        await self._sessions.finish(session_id, session.owner, REASON)
        return True

    async def stop_run(self, model_id: str) -> None:
        """End a training run now: what waits in its log fails; its checkpoints stay. NotFound."""
        model = await self._ledger.get(ModelRecord, model_id)
        if model is None:
            raise NotFound(f"there is no training run {model_id!r}; `tinkercloud sessions list` shows them")
        await self._models.end_runs([model], stopped)

    async def stop_sampler(self, sampler_id: str) -> None:
        """Cancel what a sampler draws, and remove it. NotFound."""
        sampler = await self._ledger.get(SamplerRecord, sampler_id)
        if sampler is None:
            raise NotFound(f"there is no sampler {sampler_id!r}; `tinkercloud sessions list` shows them")
        async with self._keeper.stopping(sampler):
            while waiting := await self._ledger.pending(sampler_id):
                failure = Failure(f"sampler {sampler_id} was {REASON}", "user")
                await asyncio.gather(*(self._samplers.end(entry, sampler, failure) for entry in waiting))

    async def _session(self, session_id: str) -> SessionRecord:
        session = await self._ledger.get(SessionRecord, session_id)
        if session is None:
            whole, is_part, _ = session_id.partition(":")
            known = is_part and await self._ledger.get(SessionRecord, whole)
            mend = f"name the whole one, {whole}" if known else "`tinkercloud sessions list` shows them"
            raise NotFound(f"there is no session {session_id!r}; {mend}")
        return session

    async def _described(self, session: SessionRecord) -> dict[str, Any]:
        models = await self._ledger.find(ModelRecord, session_id=session.session_id)
        samplers = await self._ledger.find(SamplerRecord, session_id=session.session_id)
        return {
            "session_id": session.session_id,
            "owner": session.owner,
            "project_id": session.project_id,
            "state": session.state,
            "created_at": session.created_at,
            "last_heartbeat": session.last_heartbeat,
            "training_runs": [
                {"model_id": m.model_id, "base_model": m.base_model, "state": m.state, "applied_seq": m.applied_seq}
                for m in models
            ],
            "samplers": [
                {
                    "sampler_id": s.sampler_id,
                    "base_model": s.base_model,
                    "sequences": await left_to_draw(self._ledger, s.sampler_id),
                }
                for s in samplers
            ],
        }
