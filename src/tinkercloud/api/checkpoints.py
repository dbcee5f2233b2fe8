"""Saved weights: what there is, what they fit, who may read them and for how long they stay."""

from __future__ import annotations

from email.utils import formatdate
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from tinkercloud.api.audit import Event, note
from tinkercloud.api.auth import Owner, caller_of, owner_of_token, project_for
from tinkercloud.api.dependencies import Limit, Offset, ServiceOf, body_of
from tinkercloud.api.downloads import ARCHIVE, file_link
from tinkercloud.api.validate import check_name, optimizer_json
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.answers import iso
from tinkercloud.api.wire.reading import read
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.records import CheckpointRecord

router = APIRouter(tags=["checkpoints"])


def checkpoint_json(checkpoint: CheckpointRecord) -> dict[str, Any]:
    """The SDK's `Checkpoint`."""
    return {
        "checkpoint_id": "/".join(checkpoint.path.split("/")[-2:]),
        "checkpoint_type": checkpoint.kind,
        "time": iso(checkpoint.created_at),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": None if checkpoint.expires_at is None else iso(checkpoint.expires_at),
    }


@router.post("/weights_info", openapi_extra=body_of(wire.WeightsInfo))
async def weights_info(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """What a training run must be to load a checkpoint."""
    given = await read(request, wire.WeightsInfo)
    checkpoint = await service.checkpoints.get(given.tinker_path, owner)
    return {
        "base_model": checkpoint.base_model,
        "optimizer_config": optimizer_json(checkpoint.optimizer),
        "is_lora": True,
        "lora_rank": checkpoint.lora.rank,
        "train_unembed": checkpoint.lora.train_unembed,
        "train_mlp": checkpoint.lora.train_mlp,
        "train_attn": checkpoint.lora.train_attn,
    }


@router.post("/copy_weights", openapi_extra=body_of(wire.CopyWeights), dependencies=[Depends(Event("checkpoint_copy"))])
async def copy_weights(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Copy a checkpoint into a project, or into a session as training run `model_seq_id`; the copy shares the files.

    A repeat, known by `X-Idempotency-Key` or by the session and `model_seq_id`, answers with the first one's path.
    """
    given = await read(request, wire.CopyWeights)
    check_name(None, given.ttl_seconds)
    token = given.weights_access_token or request.headers.get("x-tinker-weights-access-token")
    reader = owner_of_token(request, service, token)
    allow = partial(service.quotas.storage, caller_of(request).key)
    if given.session_id is not None and given.model_seq_id is not None and given.destination_project_id is None:
        session = await service.sessions.active(given.session_id, owner)
        run = given.model_seq_id
        copy = await service.copies.into_session(given.source_path, session, run, given.ttl_seconds, allow, reader)
    elif given.destination_project_id is not None and given.session_id is None and given.model_seq_id is None:
        copy = await service.copies.into_project(
            given.source_path,
            owner,
            project_for(caller_of(request), given.destination_project_id),
            given.ttl_seconds,
            request.headers.get("x-idempotency-key"),
            allow,
            reader,
        )
    else:
        raise InvalidRequest("send destination_project_id, or session_id and model_seq_id: whose is the copy to be?")
    note(request, tinker_path=copy.path)
    return {"tinker_path": copy.path}


@router.get("/training_runs/{training_run_id}/checkpoints")
async def list_run_checkpoints(training_run_id: str, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """All checkpoints of a training run, newest first."""
    await service.runs.find(training_run_id, owner)
    found = await service.checkpoints.of_run(training_run_id, owner)
    return {"checkpoints": [checkpoint_json(checkpoint) for checkpoint in found]}


@router.get("/checkpoints")
async def list_checkpoints(service: ServiceOf, owner: Owner, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    """A page of all the owner's checkpoints, newest first."""
    found, total = await service.checkpoints.list(owner, limit, offset)
    return {
        "checkpoints": [checkpoint_json(checkpoint) for checkpoint in found],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


def _path_of(training_run_id: str, segment: str, name: str, request: Request) -> str:
    """A checkpoint's tinker:// path. Its id in a URL is two segments: the SDK does not escape the slash in it."""
    path = f"tinker://{training_run_id}/{segment}/{name}"
    if hasattr(request.state, "about"):
        note(request, tinker_path=path, model_id=training_run_id)
    return path


PathOf = Annotated[str, Depends(_path_of)]
CHECKPOINT = "/training_runs/{training_run_id}/checkpoints/{segment}/{name}"


@router.get(f"{CHECKPOINT}/external_weights_urls", dependencies=[Depends(Event("checkpoint_read"))])
async def external_weights_urls(path: PathOf, request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Links to the files of external weights, by their names; they are good until `expires` and need no key."""
    checkpoint = await service.checkpoints.get(path, owner)
    if checkpoint.kind != "external":
        raise InvalidRequest(f"{path} is a {checkpoint.kind} checkpoint; save_weights_external makes one to download")
    links = {name: file_link(request, checkpoint, name) for name in await service.checkpoints.files(checkpoint)}
    return {
        "urls": {name: url for name, (url, _) in links.items()},
        "expires": iso(min(expires for _, expires in links.values())),
    }


@router.get(
    f"{CHECKPOINT}/archive", status_code=302, response_class=Response, dependencies=[Depends(Event("checkpoint_read"))]
)
async def archive(path: PathOf, request: Request, service: ServiceOf, owner: Owner) -> Response:
    """Redirects to a tar of the adapter in PEFT's layout (SDKs before 0.36); `Expires` says until when it is there."""
    checkpoint = await service.checkpoints.get(path, owner)
    url, expires = file_link(request, checkpoint, ARCHIVE)
    return Response(status_code=302, headers={"location": url, "expires": formatdate(expires, usegmt=True)})


@router.delete(CHECKPOINT, status_code=204, dependencies=[Depends(Event("checkpoint_delete"))])
async def delete_checkpoint(path: PathOf, service: ServiceOf, owner: Owner) -> None:
    """Delete a checkpoint; samplers and copies that were made from it stay."""
    await service.checkpoints.delete(path, owner)


@router.post(f"{CHECKPOINT}/publish", status_code=204, dependencies=[Depends(Event("checkpoint_publish"))])
async def publish_checkpoint(path: PathOf, service: ServiceOf, owner: Owner) -> None:
    """Let every user load, sample from and copy a checkpoint. One that is published already stays so."""
    await service.checkpoints.publish(path, owner, public=True)


@router.delete(f"{CHECKPOINT}/publish", status_code=204, dependencies=[Depends(Event("checkpoint_unpublish"))])
async def unpublish_checkpoint(path: PathOf, service: ServiceOf, owner: Owner) -> None:
    """Keep a checkpoint from other users again; one that is private already stays so."""
    await service.checkpoints.publish(path, owner, public=False)


@router.put(
    f"{CHECKPOINT}/ttl",
    status_code=204,
    openapi_extra=body_of(wire.SetTtl),
    dependencies=[Depends(Event("checkpoint_ttl_set"))],
)
async def set_checkpoint_ttl(path: PathOf, request: Request, service: ServiceOf, owner: Owner) -> None:
    """Let a checkpoint go `ttl_seconds` from now, an hour to ten years; null keeps it."""
    given = await read(request, wire.SetTtl)
    check_name(None, given.ttl_seconds)
    await service.checkpoints.set_ttl(path, owner, given.ttl_seconds)
