"""Saving and loading a training run's weights."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api.audit import Event, leave_out, note
from tinkercloud.api.auth import Owner, caller_of, owner_of_token
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.refusals import accepted, read_operation, recorded
from tinkercloud.api.validate import check_name, check_recipients, optimizer_from
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import as_request
from tinkercloud.control.quotas import storage_limit
from tinkercloud.control.service import Service
from tinkercloud.errors import InvalidRequest, NotFound
from tinkercloud.ledger.records import CheckpointRecord, Entry

router = APIRouter(tags=["weights"])


@router.post(
    "/save_weights", openapi_extra=body_of(wire.SaveWeights), dependencies=[Depends(Event("checkpoint_create"))]
)
async def save_weights(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Save weights and optimizer state, to go on training from."""
    raw = await read_operation(request, service, owner, "save_weights")
    address = as_request(wire.Address, raw)
    model = await service.runs.live(address.model_id, owner)
    async with recorded(service, model, address.seq_id, "save_weights"):
        given = as_request(wire.SaveWeights, raw)
        check_name(given.path, given.ttl_seconds)
        await service.quotas.storage(caller_of(request).key)
        entry = await service.runs.save_weights(
            model,
            given.seq_id,
            given.path,
            kind="training",
            ttl_seconds=given.ttl_seconds,
            overwrite=given.overwrite,
            user_metadata=given.user_metadata,
            limit=storage_limit(caller_of(request).key),
        )
    _note_repeat(request, entry)
    return await accepted(service, owner, entry, "save_weights")


@router.post(
    "/save_weights_for_sampler",
    openapi_extra=body_of(wire.SaveWeightsForSampler),
    dependencies=[Depends(Event("checkpoint_create"))],
)
async def save_weights_for_sampler(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Save weights to sample from: as a checkpoint by `path`, or as a sampling session by `sampling_session_seq_id`.

    A sampling session of `kind` `snapshot` keeps these weights. Those of kind `inflight` share one set for each
    training run: a save gives the new weights to all of them, and a running sequence goes on with them and the keys and
    values that it has.
    """
    raw = await read_operation(request, service, owner, "save_weights_for_sampler")
    address = as_request(wire.Address, raw)
    model = await service.runs.live(address.model_id, owner)
    async with recorded(service, model, address.seq_id, "save_weights_for_sampler"):
        given = as_request(wire.SaveWeightsForSampler, raw)
        if given.kind not in ("snapshot", "inflight"):
            raise InvalidRequest(
                f"there is no kind {given.kind!r:.80}; use 'snapshot', which keeps its weights, or 'inflight', which "
                "goes on with those that are saved later"
            )
        if given.kind == "inflight" and given.sampling_session_seq_id is None:
            raise InvalidRequest("kind 'inflight' makes a sampling session: send sampling_session_seq_id, and no path")
        check_name(given.path, given.ttl_seconds)
        if given.sampling_session_seq_id is not None and given.path is None:
            leave_out(request)  # one for each step of a reinforcement learning loop
            entry = await service.runs.save_ephemeral_sampler(
                model, given.seq_id, given.sampling_session_seq_id, inflight=given.kind == "inflight"
            )
        elif given.sampling_session_seq_id is None:
            await service.quotas.storage(caller_of(request).key)
            entry = await service.runs.save_weights(
                model,
                given.seq_id,
                given.path,
                kind="sampler",
                ttl_seconds=given.ttl_seconds,
                user_metadata=given.user_metadata,
                limit=storage_limit(caller_of(request).key),
            )
        else:
            raise InvalidRequest("path makes a checkpoint and sampling_session_seq_id a sampling session; send one")
    _note_repeat(request, entry)
    return await accepted(service, owner, entry, "save_weights_for_sampler")


@router.post(
    "/save_weights_external",
    openapi_extra=body_of(wire.SaveWeightsExternal),
    dependencies=[Depends(Event("checkpoint_create"))],
)
async def save_weights_external(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Save weights for other programs, in the published form, if wished encrypted with age; `external_weights_urls` has
    the links to the files."""
    raw = await read_operation(request, service, owner, "save_weights_external")
    address = as_request(wire.Address, raw)
    model = await service.runs.live(address.model_id, owner)
    async with recorded(service, model, address.seq_id, "save_weights_external"):
        given = as_request(wire.SaveWeightsExternal, raw)
        check_name(given.path, given.ttl_seconds)
        recipients = given.age_encryption_recipients or ()
        check_recipients(recipients)
        await service.quotas.storage(caller_of(request).key)
        entry = await service.runs.save_weights(
            model,
            given.seq_id,
            given.path,
            kind="external",
            ttl_seconds=given.ttl_seconds,
            recipients=recipients,
            limit=storage_limit(caller_of(request).key),
        )
    _note_repeat(request, entry)
    return await accepted(service, owner, entry, "save_weights_external")


@router.post("/load_weights", openapi_extra=body_of(wire.LoadWeights), dependencies=[Depends(Event("checkpoint_read"))])
async def load_weights(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Load a checkpoint into a training run (`model_id`), or start one from it (`session_id` and `model_seq_id`)."""
    raw = await read_operation(request, service, owner, "load_weights")
    if raw.get("model_id") is None:
        return await _create_from(request, service, as_request(wire.LoadWeights, raw))
    address = as_request(wire.Address, raw)
    model = await service.runs.live(address.model_id, owner)
    async with recorded(service, model, address.seq_id, "load_weights"):
        given = as_request(wire.LoadWeights, raw)
        if given.session_id is not None or given.model_seq_id is not None:
            raise InvalidRequest("model_id loads into a training run, session_id makes a new one; send one of them")
        if given.optimizer_config is not None and optimizer_from(given.optimizer_config) != model.optimizer:
            raise InvalidRequest(
                f"this training run's optimizer is {model.optimizer}, chosen when it was created; leave "
                "optimizer_config out, or create a training client from the checkpoint"
            )
        checkpoint = await _loadable(request, service, owner, given)
        entry = await service.runs.load_weights(model, given.seq_id, checkpoint, given.optimizer)
    return await accepted(service, owner, entry, "load_weights")


def _note_repeat(request: Request, entry: Entry) -> None:
    """It is recorded too: the server may have ended before it had recorded the first one."""
    if entry.repeated:
        note(request, repeated=True)


async def _create_from(request: Request, service: Service, given: wire.LoadWeights) -> dict[str, Any]:
    caller = caller_of(request)
    owner = caller.owner
    if given.session_id is None or given.model_seq_id is None:
        raise InvalidRequest("send model_id and seq_id to load into a training run, or session_id and model_seq_id")
    session = await service.sessions.active(given.session_id, owner)
    optimizer = None if given.optimizer_config is None else optimizer_from(given.optimizer_config)
    try:
        checkpoint = await _loadable(request, service, owner, given)
    except NotFound:  # if this is a repeat, the checkpoint may have gone since
        first = await service.runs.created(session, given.model_seq_id)
        if first is None:
            raise
        return await accepted(service, owner, first, "load_weights")
    await service.models.info(checkpoint.base_model)  # a lazy one is loaded before others of this user have to wait
    async with service.quotas.new_model(caller.key, service.runs.id_of(session, given.model_seq_id)):
        entry = await service.runs.create_from(
            session, given.model_seq_id, checkpoint, given.optimizer, given.user_metadata or {}, optimizer
        )
    return await accepted(service, owner, entry, "load_weights")


async def _loadable(request: Request, service: Service, owner: str, given: wire.LoadWeights) -> CheckpointRecord:
    reader = owner_of_token(request, service, given.weights_access_token)
    checkpoint = await service.checkpoints.get(given.path, owner, reader)
    if checkpoint.kind == "external":
        raise InvalidRequest(f"{given.path} was exported for other programs; load a /weights/ checkpoint")
    if given.optimizer and checkpoint.kind != "training":
        raise InvalidRequest(f"{given.path} has no optimizer state; load a /weights/ checkpoint, or without optimizer")
    if given.base_model not in (None, checkpoint.base_model):
        raise InvalidRequest(f"{given.path} was trained on {checkpoint.base_model}, not on {given.base_model}")
    return checkpoint
