"""What can be wrong with a request, independent of how it came in. `api/errors.py` gives each its HTTP status."""

from __future__ import annotations


class RequestError(Exception):
    """A request that cannot be served. The text says what was wrong and what would be right; clients see it."""


class InvalidRequest(RequestError):
    """Something in the request is wrong (400)."""


class Unauthorized(RequestError):
    """No key, or one that is not valid (401)."""

    def __init__(self, why: str, invalid_token: bool = False) -> None:
        """`invalid_token`: it was a token, so a new one in exchange for its key would do."""
        super().__init__(why)
        self.invalid_token = invalid_token


class Forbidden(RequestError):
    """The caller may not do this (403)."""


class NotFound(RequestError):
    """There is nothing of that name, or it is another owner's (404)."""


class Ended(RequestError):
    """The session has finished, or the result is past its retention (410); the SDK stops for good."""


class Overloaded(RequestError):
    """Too much is waiting; it frees itself within minutes (429 with retry-after)."""

    def __init__(self, why: str, retry_seconds: int = 1) -> None:
        super().__init__(why)
        self.retry_seconds = retry_seconds


class Unavailable(RequestError):
    """The server cannot do this yet, such as while an engine loads (503 with retry-after)."""
