"""Samplers, and samples from them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api.audit import Event
from tinkercloud.api.auth import Owner, caller_of
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.validate import sample_from
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.body import off_loop
from tinkercloud.api.wire.reading import read
from tinkercloud.control.stability import sequence_id
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.entries import request_id

router = APIRouter(tags=["sampling"])


@router.post(
    "/create_sampling_session",
    openapi_extra=body_of(wire.CreateSamplingSession),
    dependencies=[Depends(Event("sampler_create"))],
)
async def create_sampling_session(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A sampler of a checkpoint (`model_path`) or of a base model. Its weights never change."""
    given = await read(request, wire.CreateSamplingSession)
    session = await service.sessions.active(given.session_id, owner)
    sampler = await service.samplers.create(session, given.sampling_session_seq_id, given.base_model, given.model_path)
    return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A sampler's base model and the checkpoint that it was made from, if any."""
    sampler = await service.samplers.get(sampler_id, owner)
    return {"sampler_id": sampler.sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/join_sampling_session", openapi_extra=body_of(wire.JoinSamplingSession))
async def join_sampling_session(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A number for one more client of a sampler: its seq_ids begin at 10^9 times it."""
    given = await read(request, wire.JoinSamplingSession)
    sampler = await service.samplers.get(given.sampling_session_id, owner)
    return {"type": "join_sampling_session", "client_counter": await service.samplers.join(sampler)}


@router.post("/asample", openapi_extra=body_of(wire.Sample))
async def asample(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Draw `num_samples` continuations of a prompt, from a sampling session or from weights named in the request."""
    given = await read(request, wire.Sample)
    if given.sampling_session_id is not None:
        sampler = await service.samplers.get(given.sampling_session_id, owner)
    elif given.base_model is not None or given.model_path is not None:
        if given.record_stability_info:
            raise InvalidRequest(
                "record_stability_info needs a sampling_session_id: records belong to the session that trains on them"
            )
        sampler = await service.samplers.unbound(owner, given.base_model, given.model_path)
    else:
        raise InvalidRequest("send sampling_session_id, model_path or base_model: there is nothing to sample from")
    info = await service.models.last_info(sampler.base_model)
    raw = request.app.state.settings.raw_sample_logprobs
    ids = len(given.target_prompt_logprobs.data) if given.target_prompt_logprobs is not None else 0
    operation = await off_loop(8 * ids, sample_from, given, sampler.sampler_id, info, raw)
    seq_id = given.seq_id if given.sampling_session_id is not None else None
    repeats = None if seq_id is None else request_id(sampler.sampler_id, seq_id)
    await service.quotas.tokens(caller_of(request).key, operation.num_tokens, repeats)
    entry = await service.samplers.sample(sampler, seq_id, operation)
    sequence_ids = [sequence_id(entry.request_id, number) for number in range(operation.num_samples)]
    return {"request_id": entry.request_id, "sample_sequence_ids": sequence_ids}
