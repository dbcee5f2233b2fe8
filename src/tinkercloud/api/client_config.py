"""What the SDK asks before anything else: how to talk to this server, and a token to do it with."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends, Request

from tinkercloud.api import tokens
from tinkercloud.api.audit import Event
from tinkercloud.api.auth import caller_of
from tinkercloud.api.dependencies import ServiceOf, body_of
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import read
from tinkercloud.errors import InvalidRequest

router = APIRouter(tags=["client"])

FLAGS = {
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": True,
    "proto_write_fwdbwd": True,  # SDKs before 0.23 send JSON without it, and to /forward without the next
    "fwd_via_fwdbwd": True,
    "fwdbwd_max_chunk_len": 1024,  # datums
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_max_concurrent_requests": 2000,
    "sample_use_retrieve_futures": True,  # one held poll for all samples of a sampling client, which then has no limit
    "sample_join_sampling_session": True,
}
"""The SDK's `ClientConfigResponse`; what is not here has the SDK's own default."""

DYNAMIC_FLAGS = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}
"""The SDK's `ClientDynamicConfigResponse`."""


def lets_pyqwest_exit(python: str) -> bool:
    """Whether a client whose Python has this version ("3.13.2") can end without a crash after using pyqwest.

    The threads of pyqwest (0.12, the SDK's HTTP library unless it is told to take httpx) tell Python of each answer.
    One that still does so when the interpreter ends, before 3.14, is made to exit by it, which a thread of Rust answers
    with SIGABRT: the program has done everything, but loses what it has not flushed, and its exit status is 134. That
    happened to 8 of 100 short programs on busy cores, to 1 of 100 on idle ones. From 3.14 on such a thread just waits.
    """
    version = re.match(r"(\d{1,4})\.(\d{1,4})", python)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 14)


@router.post("/client/config", openapi_extra=body_of(wire.ClientConfig))
async def client_config(request: Request, service: ServiceOf) -> dict[str, Any]:
    """Flags that an SDK reads when it starts; the same for each of its versions, which ignore what they do not know.
    `use_pyqwest_transport` goes by the client's Python (`X-Stainless-Runtime-Version`). With keys, SDKs exchange
    theirs for tokens."""
    await read(request, wire.ClientConfig)
    return FLAGS | {
        "use_pyqwest_transport": lets_pyqwest_exit(request.headers.get("x-stainless-runtime-version", "")),
        "pjwt_auth_enabled": service.keys.configured,
        "custom_loss_server_side": request.app.state.settings.custom_loss_server_side,
    }


@router.post("/client/dynamic_config", openapi_extra=body_of(wire.ClientConfig))
async def client_dynamic_config(request: Request) -> dict[str, Any]:
    """Flags that an SDK reads again every few minutes."""
    await read(request, wire.ClientConfig)
    return DYNAMIC_FLAGS


@router.post("/auth/token")
async def auth_token(request: Request) -> dict[str, Any]:
    """A short-lived JWT in exchange for the key; it is valid in the key's place."""
    caller = caller_of(request)
    return {"jwt": tokens.issue(caller.owner, caller.key, request.app.state.settings.data_dir)}


@router.get("/auth/apikey/me")
async def get_own_key(request: Request, service: ServiceOf) -> dict[str, Any]:
    """What is known of the key of this request; id 0 where the server has no keys, and for a command on its machine."""
    caller = caller_of(request)
    without = "a command on the server's machine needs no key" if service.keys.configured else tokens.NO_KEYS
    return {
        "key_id": 0 if caller.key is None else caller.key.key_id,
        "name": caller.owner if caller.key is None else caller.key.name,
        "note": without if caller.key is None else f"{caller.key.hint}…",
        "details": {
            "org_details": {"name": tokens.ORGANIZATION},
            "user_details": {"email": tokens.email_of(caller.owner)},
        },
    }


@router.delete("/auth/apikey/me", dependencies=[Depends(Event("key_revoke"))])
async def revoke_own_key(request: Request, service: ServiceOf) -> dict[str, Any]:
    """Revoke the key of this request, and no other one."""
    key = caller_of(request).key
    if key is None:
        raise InvalidRequest("this request has no key that could be revoked")
    await service.keys.revoke(key)
    return {"key_id": key.key_id}
