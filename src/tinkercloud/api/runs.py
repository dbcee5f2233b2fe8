"""Training runs as they are listed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tinkercloud.api.auth import AccessScope, Owner, access_of, caller_of
from tinkercloud.api.checkpoints import checkpoint_json
from tinkercloud.api.dependencies import Limit, Offset, ServiceOf
from tinkercloud.api.wire.answers import iso, text_metadata
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord

router = APIRouter(tags=["training runs"])


@router.get("/training_runs")
async def list_training_runs(
    request: Request,
    service: ServiceOf,
    owner: Owner,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: str | None = None,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    """A page of the owner's training runs, of one project or of all, newest first.

    `accessible` are also those of others of which a checkpoint is published, or that are in the project of the key.
    """
    if access_scope == "owned":
        models, total = await service.runs.list(owner, limit, offset, project_id)
    else:
        access = access_of(caller_of(request))
        models, total = await service.runs.list_accessible(access, limit, offset, project_id)
    runs = [_run_json(model, await service.checkpoints.readable_of_run(model.model_id, owner)) for model in models]
    return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{training_run_id}")
async def get_training_run(
    training_run_id: str, request: Request, service: ServiceOf, owner: Owner, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    """One training run, also one that was unloaded."""
    if access_scope == "owned":
        model = await service.runs.find(training_run_id, owner)
    else:
        model = await service.runs.accessible(training_run_id, access_of(caller_of(request)))
    return _run_json(model, await service.checkpoints.readable_of_run(training_run_id, owner))


def _run_json(model: ModelRecord, checkpoints: list[CheckpointRecord]) -> dict[str, Any]:
    def newest(kind: str) -> dict[str, Any] | None:
        of_kind = [checkpoint for checkpoint in checkpoints if checkpoint.kind == kind]
        return checkpoint_json(max(of_kind, key=lambda checkpoint: checkpoint.created_at)) if of_kind else None

    return {
        "training_run_id": model.model_id,
        "base_model": model.base_model,
        "model_owner": model.owner,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": model.lora.rank,
        "last_request_time": iso(model.last_request_at),
        "last_checkpoint": newest("training"),
        "last_sampler_checkpoint": newest("sampler"),
        "user_metadata": text_metadata(model.user_metadata),
    }
