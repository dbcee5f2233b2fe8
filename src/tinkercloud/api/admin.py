"""What the operator changes while the server runs: the command line's `models`, `sessions` and `checkpoints
import`.

Only for operators: with keys, whoever has one that was made with `--operator`, and commands that can read the data
directory; without, whoever may reach the server itself. Bodies must say that they are JSON, and without keys requests
must name the server by an address: a web page in the operator's browser can do neither across origins without asking.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from msgspec import to_builtins
from msgspec.structs import asdict
from pydantic import ValidationError

from tinkercloud.addresses import is_loopback
from tinkercloud.api.audit import Event
from tinkercloud.api.auth import Owner, caller_of, require_operator
from tinkercloud.api.dependencies import Limit, Offset, ServiceOf, body_of
from tinkercloud.api.validate import check_name
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import read, read_json
from tinkercloud.base_models import ModelError, missing_tokenizer
from tinkercloud.errors import Forbidden, InvalidRequest
from tinkercloud.model_settings import ModelSettings
from tinkercloud.setting_errors import sentences

DRAIN_SECONDS = 60
"""How long one request waits for a session to drain."""


def _from_the_operator(request: Request) -> None:
    require_operator(request)
    host = (request.url.hostname or "").strip("[]")
    if not (is_loopback(host) or request.app.state.service.keys.configured):
        raise Forbidden(f"administration is reached at a loopback address, not at {host!r}")
    if request.method == "POST" and not request.headers.get("content-type", "").startswith("application/json"):
        raise InvalidRequest("send the body as application/json")


router = APIRouter(prefix="/admin", tags=["administration"], dependencies=[Depends(_from_the_operator)])


@router.get("/models")
async def list_models(service: ServiceOf) -> dict[str, Any]:
    """The base models that are served, the state of each, the settings that are its own and not the server's, what its
    adapters take once it has trained, and how full its sampler is (`sampling`; null while it is not loaded or busy for
    a second): sequences and pages of the KV cache."""
    models = list(service.models)
    loads = await asyncio.gather(*(served.desk.load() for served in models))
    return {
        "models": [
            {
                "name": served.settings.name,
                "state": served.engine.status,
                "source": served.settings.source,
                "lazy": served.engine.lazy,
                "settings": served.settings.own(),
                "adapters": to_builtins(served.engine.handle and served.engine.handle.adapters),
                "sampling": load and asdict(load),
            }
            for served, load in zip(models, loads, strict=True)
        ]
    }


@router.post("/models", openapi_extra=body_of(wire.AddModel), dependencies=[Depends(Event("base_model_add"))])
async def add_model(request: Request, service: ServiceOf) -> dict[str, Any]:
    """Serve one more base model, also after the next start; answers when it is loaded (a lazy one at once).

    `warning` is null or says what clients will miss.
    """
    given = await read_json(request)
    try:
        model = ModelSettings.model_validate(given)
    except ModelError as error:
        raise InvalidRequest(str(error)) from None
    except ValidationError as error:
        raise InvalidRequest(sentences(error, ModelSettings)) from None
    state = await service.models.add(model)
    return {"name": model.name, "state": state, "warning": missing_tokenizer(model.name, model.source)}


@router.delete("/models/{name:path}", dependencies=[Depends(Event("base_model_remove"))])
async def remove_model(name: str, service: ServiceOf) -> dict[str, Any]:
    """Stop serving a base model after the training step that is running on it, and forget that it was added; its
    training runs and samples wait for a model of its name, and its checkpoints stay on disk."""
    waiting = await service.models.remove(name)
    return {"name": name, "waiting_runs": waiting.runs, "waiting_sequences": waiting.sequences}


@router.post(
    "/checkpoints/import",
    openapi_extra=body_of(wire.ImportCheckpoint),
    dependencies=[Depends(Event("checkpoint_import"))],
)
async def import_checkpoint(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Take in an adapter in PEFT's layout from a folder of the server's machine, to sample from or to train on."""
    given = await read(request, wire.ImportCheckpoint)
    check_name(given.name, None)
    allow = partial(service.quotas.storage, caller_of(request).key)
    checkpoint = await service.checkpoints.import_folder(Path(given.folder), given.name, given.base_model, owner, allow)
    return {"path": checkpoint.path}


@router.get("/sessions")
async def list_all_sessions(
    service: ServiceOf, finished: bool = False, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """A page of all users' sessions, newest first, with their training runs and samplers; those that have not finished,
    or all. Times are seconds since the epoch."""
    return {"sessions": await service.operator.list(finished, limit, offset)}


@router.post("/sessions/{session_id}/stop", dependencies=[Depends(Event("session_stop"))])
async def stop_session(session_id: str, service: ServiceOf) -> dict[str, Any]:
    """End any user's session now: what waits in it fails, its checkpoints stay."""
    await service.operator.stop_session(session_id)
    return {"stopped": session_id}


@router.post("/sessions/{session_id}/drain", dependencies=[Depends(Event("session_drain"))])
async def drain_session(session_id: str, service: ServiceOf) -> dict[str, Any]:
    """End any user's session when everything that it was promised has run; nothing new is taken in by its training
    runs. `drained` is false if that takes longer than a request may: ask again."""
    return {"drained": await service.operator.drain_session(session_id, DRAIN_SECONDS)}


@router.post("/training_runs/{model_id}/stop", dependencies=[Depends(Event("training_run_stop"))])
async def stop_training_run(model_id: str, service: ServiceOf) -> dict[str, Any]:
    """End any user's training run now: what waits in its log fails, its checkpoints stay."""
    await service.operator.stop_run(model_id)
    return {"stopped": model_id}


@router.post("/samplers/{sampler_id}/stop", dependencies=[Depends(Event("sampler_stop"))])
async def stop_sampler(sampler_id: str, service: ServiceOf) -> dict[str, Any]:
    """Remove any user's sampler now: what it draws is cancelled."""
    await service.operator.stop_sampler(sampler_id)
    return {"stopped": sampler_id}
