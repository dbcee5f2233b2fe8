"""Who a request is from: the only place that decides the owner of what it makes and sees.

Without configured keys the server listens on the loopback address and takes any key, or none: everything belongs to one
local owner, who is the operator too. With keys, whatever is under `PREFIX` wants one that is valid now, or a token that
was given for one; what belongs to another owner does not exist for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from msgspec import Struct
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tinkercloud.api import tokens
from tinkercloud.api.errors import drain, refused
from tinkercloud.config import Settings
from tinkercloud.control.keys import Keys
from tinkercloud.control.service import Service
from tinkercloud.errors import Forbidden, Unauthorized
from tinkercloud.ledger.records import KeyRecord
from tinkercloud.ledger.search import Access

LOCAL_OWNER = "local"
"""Whose everything is that was made without keys; a key for this user gets at it."""

PREFIX = "/api/v1"
OPEN = (f"{PREFIX}/healthz", f"{PREFIX}/downloads/")
"""What paths begin with that need no key: a load balancer has none, and links to downloads are signed."""

DRAINED_BYTES = 64 * 2**10
"""Bodies up to this size are read to their end before a request is refused, so that its sender reads the answer."""

JWT_START = "eyJ"
"""How every JWT begins: an encoded brace."""


class Caller(Struct, frozen=True):
    """Who a request is from."""

    owner: str
    key: KeyRecord | None = None
    """None without configured keys, and for a command on the server's own machine."""
    is_operator: bool = False


def caller_of(request: Request) -> Caller:
    """As `Authentication` has found out."""
    return request.state.caller


async def _owner_of(request: Request) -> str:  # async, since FastAPI runs any other dependency in a thread
    return caller_of(request).owner


Owner = Annotated[str, Depends(_owner_of)]
"""The owner that a request acts for."""


AccessScope = Literal["owned", "accessible"]
"""What a list has: the caller's own, or also what others have published, and what is in the project of its key."""


def access_of(caller: Caller) -> Access:
    """What the caller may look at."""
    return Access(caller.owner, None if caller.key is None else caller.key.project_id)


def project_for(caller: Caller, wanted: str | None) -> str | None:
    """The project of something that a caller makes, or moves there: the one that was asked for, or its key's. Forbidden
    where a key is for another one."""
    own = None if caller.key is None else caller.key.project_id
    if own is not None and wanted not in (None, own):
        raise Forbidden(f"this key is for project {own!r} and cannot be used for project {wanted!r:.80}; leave it out")
    return own if wanted is None else wanted


def owner_of_token(request: Request, service: Service, token: str | None) -> str | None:
    """Whose weights a `weights_access_token` lets a request read: a key, or a token that was given for one. None
    without one, and where there are no keys. Forbidden if it is not valid."""
    if not token or not service.keys.configured:
        return None
    try:
        return identify(token, service.keys, request.app.state.settings.data_dir).owner
    except Unauthorized:
        raise Forbidden(
            "the weights_access_token is not valid here: send an API key of the checkpoint's owner, or a token from "
            "auth/token that was given for one"
        ) from None


def require_operator(request: Request) -> None:
    """Forbidden for keys that may not administer the server."""
    if not caller_of(request).is_operator:
        raise Forbidden(
            "this key may not administer the server; use one that was made with `tinkercloud keys create NAME "
            "--operator`, or a command on the server's machine that can read its data directory"
        )


class Authentication:
    """Finds out who a request is from, or refuses it before anything else is read of it."""

    def __init__(self, app: ASGIApp, settings: Settings | None) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX) and not scope["path"].startswith(OPEN):
            try:
                keys: Keys = scope["app"].state.service.keys
                scope.setdefault("state", {})["caller"] = self._caller(keys, Headers(scope=scope))
            except Unauthorized as error:
                length = Headers(scope=scope).get("content-length", "0")
                if error.invalid_token or (length.isdecimal() and int(length) <= DRAINED_BYTES):
                    await drain(receive)
                await refused(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, keys: Keys, headers: Headers) -> Caller:
        if not keys.configured:
            return Caller(LOCAL_OWNER, is_operator=True)
        secret = presented(headers)
        if secret is None:
            raise Unauthorized("this server wants an API key: set TINKER_API_KEY to one of `tinkercloud keys create`")
        return identify(secret, keys, self._settings.data_dir)


def presented(headers: Headers) -> str | None:
    """The key or token of a request: `X-API-Key`, else a bearer's."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else None) or None


def identify(secret: str, keys: Keys, data_dir: Path) -> Caller:
    """Whose key or token this is. Raises Unauthorized."""
    if secret.startswith(JWT_START):
        return _identify_token(secret, keys, data_dir)
    key = keys.find(secret)
    if key is None:
        raise Unauthorized("this API key is not valid here: it is unknown, revoked or expired")
    return Caller(key.owner, key, key.is_operator)


def _identify_token(token: str, keys: Keys, data_dir: Path) -> Caller:
    try:
        claims = tokens.read(token, data_dir)
    except tokens.TokenRefused as error:
        raise Unauthorized(str(error), invalid_token=True) from None
    if claims.get("operator") is True:
        return Caller(LOCAL_OWNER, is_operator=True)
    key_id = claims.get("key_id")
    key = keys.get(key_id) if isinstance(key_id, int) else None
    if key is None:
        raise Unauthorized("the key of this token was revoked or has expired", invalid_token=True)
    return Caller(key.owner, key, key.is_operator)
