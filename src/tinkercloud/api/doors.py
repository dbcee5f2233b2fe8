"""What is looked at before a request reaches its route: whom it takes the server for, and whether there is room for it.

Without keys the server trusts whoever can reach it, and so can every web page in a browser on its machine: by asking
for a loopback address, or for a name of the page's own that it lets resolve to one (DNS rebinding). The browser says so
in `Host` and `Origin`, which a page cannot forge; a page that posts without asking first cannot say that it sends JSON.
With keys the server may be called anything: such a page has none.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkercloud.addresses import is_loopback
from tinkercloud.api.auth import PREFIX
from tinkercloud.api.errors import drain, refused
from tinkercloud.api.wire.body import HOLD
from tinkercloud.config import Settings
from tinkercloud.errors import Forbidden, InvalidRequest, Overloaded, RequestError

SMALL_BYTES = 64 * 1024
"""Bodies of up to this many bytes are let in however many others there are."""

ANY = "*"
"""In `allowed_hosts`: every name, for a server whose proxy looks at them."""

FORMS: Final = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
"""What a page may post anywhere without asking; no client sends it."""


class HostCheck:
    """Refuses requests under names that are not the server's, from pages that are not its own, and forms; and URLs
    with NUL, which PostgreSQL cannot look for."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._own = settings.host
        self._allowed = {host.lower() for host in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope), _has_keys(scope))
                if scope["path"].startswith(PREFIX) and ("\0" in scope["path"] or b"%00" in scope["query_string"]):
                    raise InvalidRequest("the URL has the character NUL (%00); there is nothing of such a name")
            except RequestError as error:
                await refused(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers, has_keys: bool) -> None:
        host = headers.get("host", "")
        if ANY not in self._allowed:
            name = _hostname(f"//{host}")
            if not (has_keys or is_loopback(name) or name == self._own or name in self._allowed):
                raise Forbidden(
                    f"this server is not called {name!r:.200}; reach it at a loopback address such as 127.0.0.1, or "
                    "add the name to its setting allowed_hosts"
                )
            origin = headers.get("origin")
            # The page's own server may have another port of this machine, and is somebody else then.
            if origin is not None and _netloc(origin) != host and _hostname(origin) not in self._allowed:
                raise Forbidden(
                    f"pages of {origin!r:.200} may not use this server; if they shall, add the host to its setting "
                    "allowed_hosts"
                )
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() in FORMS:
            raise InvalidRequest("send the body as application/json (curl: -H 'content-type: application/json')")


def _has_keys(scope: Scope) -> bool:
    app = scope.get("app")
    return app is not None and app.state.service.keys.configured


def _hostname(url: str) -> str:
    """The host of a URL in lower case, without brackets; "" if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _netloc(url: str) -> str | None:
    """The host and port of a URL as it has them; None if it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


class BodyBudget:
    """Bounds the bytes of request bodies that the server holds at a time; beyond, a client is told to come again.

    A body counts from its announcement until its request is answered, as it was sent and as it was decompressed. One
    alone is always let in, since its own size has its own limit, and so are small ones: polls, heartbeats, cancels.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limit = int(settings.max_bodies_bytes)
        self._held = 0
        """Bytes of all bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if own + size > SMALL_BYTES and self._held > own and self._held + size > self._limit:
                raise Overloaded(
                    f"the server has {self._held} bytes of requests in hand, and may have {self._limit} "
                    "(max_bodies_bytes); send this one again later"
                )
            own += size
            self._held += size

        scope[HOLD] = hold
        received = 0

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > own:  # it was not announced
                hold(received - own)
            return message

        try:
            hold(int(announced) if announced.isdecimal() else 0)
            await self._app(scope, receive_and_count, send)
        except Overloaded as error:
            await drain(receive)
            await refused(Request(scope), error)(scope, receive, send)
        finally:
            self._held -= own
