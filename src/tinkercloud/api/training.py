"""Training runs: making them, feeding them batches, stepping them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api.audit import Event
from tinkercloud.api.auth import Owner, caller_of
from tinkercloud.api.datums import operation_from, sequences_named
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.hub import is_hub_folder
from tinkercloud.api.refusals import accepted, read_operation, record_unreadable, recorded
from tinkercloud.api.validate import lora_from, optimizer_from, optimizer_json, params_from
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire import json_arrays, protobuf
from tinkercloud.api.wire.arrays import Batch
from tinkercloud.api.wire.body import PROTOBUF, Unreadable, is_protobuf, off_loop, read_body
from tinkercloud.api.wire.reading import as_request, read
from tinkercloud.base_models import has_tokenizer
from tinkercloud.control.service import Service
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.operations import ForwardBackward, OptimStep
from tinkercloud.errors import InvalidRequest

router = APIRouter(tags=["training"])

QUICKSTART_HEADER = "x-tinker-gmi"
"""Sent by `tinker_gmi`: targets may have another length than the input."""


@router.post(
    "/create_model", openapi_extra=body_of(wire.CreateModel), dependencies=[Depends(Event("training_run_create"))]
)
async def create_model(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Start a training run: a fresh LoRA adapter over a base model."""
    given = await read(request, wire.CreateModel)
    session = await service.sessions.active(given.session_id, owner)
    info = await service.models.info(given.base_model)
    optimizer = optimizer_from(given.optimizer_config)
    lora = lora_from(given.lora_config, info)
    async with service.quotas.new_model(caller_of(request).key, service.runs.id_of(session, given.model_seq_id)):
        entry = await service.runs.create(
            session, given.model_seq_id, info.name, lora, given.user_metadata or {}, optimizer
        )
    return await accepted(service, owner, entry, "create_model")


@router.post("/get_info", openapi_extra=body_of(wire.ModelAddress))
async def get_info(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """A training run's base model, tokenizer, adapter and optimizer."""
    given = await read(request, wire.ModelAddress)
    model = await service.runs.live(given.model_id, owner)
    info = await service.models.last_info(model.base_model)
    return {
        "type": "get_info",
        "model_data": {
            "arch": info.architecture,
            "model_name": info.name,
            "tokenizer_id": tokenizer_id(info, request),
        },
        "model_id": model.model_id,
        "optimizer_config": optimizer_json(model.optimizer),
        "is_lora": True,
        "lora_rank": model.lora.rank,
        "model_name": info.name,
    }


def tokenizer_id(info: BaseModelInfo, request: Request) -> str:
    """What the client can give to `AutoTokenizer.from_pretrained`: a hub model's name; for a model that no hub has, its
    folder if the client is on this machine, else its name, which `HF_ENDPOINT=http://<this server>/hf` resolves."""
    try:
        here = ipaddress.ip_address(request.client.host if request.client else "").is_loopback
    except ValueError:
        here = False
    here = here and request.app.state.settings.clients_on_this_machine
    # The SDK cuts a tokenizer_id at its first colon, so such a folder cannot be named. From one that has no tokenizer
    # transformers would make an empty one, without a word.
    named = not is_hub_folder(info) and ":" not in info.folder and has_tokenizer(Path(info.folder))
    return info.folder if here and named else info.name


@router.post(
    "/unload_model", openapi_extra=body_of(wire.ModelAddress), dependencies=[Depends(Event("training_run_unload"))]
)
async def unload_model(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """End a training run, after everything before it has run. Its checkpoints stay."""
    given = await read(request, wire.ModelAddress)
    model = await service.runs.live(given.model_id, owner)
    return await accepted(service, owner, await service.runs.unload(model), "unload_model")


@router.post("/forward_backward", openapi_extra=body_of(wire.ForwardBackward, PROTOBUF))
async def forward_backward(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Loss of a batch and, unless `forward_only`, its gradients, added to what the next optim_step applies.

    The body is protobuf (`ForwardBackwardRequest`, optionally zstd) or JSON.
    """
    if not is_protobuf(request):
        raw = await read_operation(request, service, owner, "forward_backward")
        kind = "forward" if raw.get("forward_only") is True else "forward_backward"
        return await _submit_json(request, service, owner, raw, kind, wire.ForwardBackward, "forward_backward_input")
    try:
        body = await read_body(request)
        message = await off_loop(len(body), protobuf.parse_forward_backward, body)
    except Unreadable as error:
        await record_unreadable(service, owner, "forward_backward", error)
        raise
    kind = "forward" if message.forward_only else "forward_backward"
    dense_bytes = int(request.app.state.settings.max_decompressed_bytes)
    seq_id = message.seq_id or None  # a client without one cannot leave it out of the message
    decode = partial(protobuf.batch_from, message, dense_bytes)
    return await _submit_batch(request, service, owner, message.model_id, seq_id, kind, len(body), decode)


@router.post("/forward", openapi_extra=body_of(wire.Forward))
async def forward(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Loss and log-probabilities of a batch, no gradients (SDKs before 0.23; newer ones use forward_backward)."""
    raw = await read_operation(request, service, owner, "forward")
    return await _submit_json(request, service, owner, raw, "forward", wire.Forward, "forward_input")


async def _submit_json(
    request: Request, service: Service, owner: str, raw: dict[str, Any], kind: str, form: type[wire.Wire], field: str
) -> dict[str, Any]:
    dense_bytes = int(request.app.state.settings.max_decompressed_bytes)
    address = as_request(wire.Address, raw)

    def decode() -> Batch:
        return json_arrays.batch_from(getattr(as_request(form, raw), field), dense_bytes)

    size = int(request.headers.get("content-length") or 2**62)
    return await _submit_batch(request, service, owner, address.model_id, address.seq_id, kind, size, decode)


async def _submit_batch(
    request: Request,
    service: Service,
    owner: str,
    model_id: str,
    seq_id: int | None,
    kind: str,
    size: int,
    decode: Callable[[], Batch],
) -> dict[str, Any]:
    if seq_id is not None and seq_id < 0:
        raise InvalidRequest(f"seq_id must not be negative, but it is {seq_id}")
    _check_ids([model_id])
    model = await service.runs.live(model_id, owner)
    align = request.headers.get(QUICKSTART_HEADER) == "1"
    async with recorded(service, model, seq_id, kind):
        info = await service.models.last_info(model.base_model)

        batch = await off_loop(size, decode)
        sequences = sequences_named(batch)
        _check_ids(sequences)
        records = await service.stability.recall(model, sequences)

        def operation() -> ForwardBackward:
            return operation_from(batch, model_id, kind == "forward", info, align, model.session_id, records)

        decoded = await off_loop(size, operation)
        await service.quotas.tokens(caller_of(request).key, decoded.num_tokens)
        entry = await service.runs.submit(model, seq_id, kind, decoded)
    return await accepted(service, owner, entry, kind)


def _check_ids(ids: Iterable[str]) -> None:
    """InvalidRequest for an id of a protobuf body that PostgreSQL cannot look for."""
    if any("\0" in each for each in ids):
        raise InvalidRequest("an id in the body has the character NUL; there is nothing of such a name")


@router.post("/optim_step", openapi_extra=body_of(wire.OptimStep))
async def optim_step(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Apply the accumulated gradients with the training run's optimizer, and clear them.

    AdamW takes `adam_params`, Dimuon `optimizer_params`.
    """
    raw = await read_operation(request, service, owner, "optim_step")
    address = as_request(wire.Address, raw)
    model = await service.runs.live(address.model_id, owner)
    async with recorded(service, model, address.seq_id, "optim_step"):
        operation = OptimStep(model.model_id, params_from(as_request(wire.OptimStep, raw), model.optimizer))
        entry = await service.runs.submit(model, address.seq_id, "optim_step", operation)
    return await accepted(service, owner, entry, "optim_step")
