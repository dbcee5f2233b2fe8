"""Short-lived JWTs (HS256), signed with the data directory's own secret."""

from __future__ import annotations

import os
import secrets
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jwt

from tinkercloud.ledger.files import make_private, sync
from tinkercloud.ledger.records import KeyRecord

TOKEN_SECONDS = 3600
"""How long a token from auth/token is valid; the SDK takes a new one at half of it."""

OPERATOR_SECONDS = 60
"""How long a token is valid that a command on the server's machine makes for itself."""

NO_KEYS = "this server has no keys"
"""Said of a request's key where any would do."""

ORGANIZATION = "tinkercloud"
ALGORITHM = "HS256"
SECRET_FILE = "token.secret"
SECRET_BYTES = 32


class TokenRefused(Exception):
    """A token is not this server's, or its time is over; the text says which."""


class UnusableSecret(Exception):
    """The data directory's secret is none, as a copy that was cut short. The text says what would be right."""


def email_of(owner: str) -> str:
    """Users are known by name; who is called by an address keeps it."""
    return owner if "@" in owner else f"{owner}@localhost"


def issue(owner: str, key: KeyRecord | None, data_dir: Path) -> str:
    """A token that stands for a key, with the claims that the SDK reads. It never outlives the key."""
    now = int(time.time())
    ends = now + TOKEN_SECONDS
    if key is not None and key.expires_at is not None:
        ends = min(ends, int(key.expires_at))
    claims = {"sub": owner, "org_id": ORGANIZATION, "email": email_of(owner), "iat": now, "exp": ends}
    return _sign(claims | {"key_id": key.key_id if key is not None else None}, data_dir)


def issue_operators(data_dir: Path) -> str | None:
    """A token for whoever can read the data directory, who needs no key to administer its server; None for one that
    cannot be read, or that no server has begun."""
    if not os.access(data_dir / SECRET_FILE, os.R_OK):
        return None
    now = int(time.time())
    return _sign({"sub": "operator", "iat": now, "exp": now + OPERATOR_SECONDS, "operator": True}, data_dir)


def read(token: str, data_dir: Path) -> dict[str, Any]:
    """The claims of a token. Raises TokenRefused."""
    try:
        claims = _signed(token, data_dir)
    except jwt.InvalidTokenError:
        raise TokenRefused("the token is not one of this server; exchange a key for one at auth/token") from None
    if claims["exp"] <= time.time():
        raise TokenRefused("the token has expired; exchange the key for a new one at auth/token")
    return claims


@lru_cache(maxsize=1024)
def _signed(token: str, data_dir: Path) -> dict[str, Any]:
    """The claims of a token with a good signature, whatever the time: the same few come with every request."""
    options = {"require": ["exp", "sub"], "verify_exp": False}
    return jwt.decode(token, secret(data_dir), algorithms=[ALGORITHM], options=options)


def _sign(claims: dict[str, Any], data_dir: Path) -> str:
    return jwt.encode(claims, secret(data_dir), algorithm=ALGORITHM)


@lru_cache(maxsize=16)
def secret(data_dir: Path) -> bytes:
    """The data directory's, made when it is first asked for. Nobody but its owner can read the file. UnusableSecret."""
    path = data_dir / SECRET_FILE
    if not path.exists():
        make_private(data_dir)
        draft = data_dir / f"{SECRET_FILE}.{secrets.token_hex(8)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        sync(draft)
        try:
            os.link(draft, path)  # whoever is first wins, and nobody reads half a secret
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        sync(data_dir)
    found = path.read_bytes()
    if len(found) != SECRET_BYTES:
        raise UnusableSecret(
            f"{path} has {len(found)} bytes and is no secret of {SECRET_BYTES}: remove it, and the server makes a new "
            "one (tokens and links that were given before end)"
        )
    return found
