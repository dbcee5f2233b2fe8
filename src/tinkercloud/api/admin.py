"""What the operator changes while the server runs: the command line's `models` and `checkpoints import`.

Only for operators: with keys, whoever has one that was made with `--operator`, and commands that can read the data
directory; without, whoever may reach the server itself. Bodies must say that they are JSON, and without keys requests
must name the server by an address: a web page in the operator's browser can do neither across origins without asking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from msgspec import to_builtins
from pydantic import ValidationError

from tinkercloud.api.auth import Owner, require_operator
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.validate import check_name
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import read, read_json
from tinkercloud.base_models import ModelError, missing_tokenizer
from tinkercloud.config import ModelSettings, is_loopback, sentences
from tinkercloud.errors import Forbidden, InvalidRequest


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
    """The base models that are served, the state of each, and what its adapters take once it has trained."""
    return {
        "models": [
            {
                "name": served.settings.name,
                "state": served.engine.state,
                "source": served.settings.source,
                "lazy": served.engine.lazy,
                "adapters": to_builtins(served.engine.handle and served.engine.handle.adapters),
            }
            for served in service.models
        ]
    }


@router.post("/models", openapi_extra=body_of(wire.AddModel))
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
        raise InvalidRequest(sentences(error)) from None
    state = await service.models.add(model)
    return {"name": model.name, "state": state, "warning": missing_tokenizer(model.name, model.source)}


@router.delete("/models/{name:path}")
async def remove_model(name: str, service: ServiceOf) -> dict[str, Any]:
    """Stop serving a base model after what is running on it, and forget that it was added; its training runs wait for
    a model of its name, and its checkpoints stay on disk."""
    return {"name": name, "waiting_runs": await service.models.remove(name)}


@router.post("/checkpoints/import", openapi_extra=body_of(wire.ImportCheckpoint))
async def import_checkpoint(request: Request, service: ServiceOf, owner: Owner) -> dict[str, Any]:
    """Take in an adapter in PEFT's layout from a folder of the server's machine, to sample from or to train on."""
    given = await read(request, wire.ImportCheckpoint)
    check_name(given.name, None)
    checkpoint = await service.checkpoints.import_folder(Path(given.folder), given.name, given.base_model, owner)
    return {"path": checkpoint.path}
