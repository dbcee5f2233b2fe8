"""Who a request is from: the only place that decides the owner of what it makes and sees.

Without configured keys the server listens on the loopback address and takes any key, or none: everything belongs to one
local owner.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Annotated

import jwt
from fastapi import Depends, Request

LOCAL_OWNER = "local"
TOKEN_SECONDS = 3600
"""How long a token from auth/token is valid; the SDK takes a new one at half of it."""


async def owner_of(request: Request) -> str:
    """The owner that a request acts for. Async, since FastAPI runs any other dependency in a thread."""
    return LOCAL_OWNER


Owner = Annotated[str, Depends(owner_of)]


def issue_token(owner: str, data_dir: Path) -> str:
    """A short-lived JWT (HS256, signed with the data directory's own secret) with the claims that the SDK reads."""
    now = int(time.time())
    claims = {"sub": owner, "org_id": owner, "email": f"{owner}@localhost", "iat": now, "exp": now + TOKEN_SECONDS}
    return jwt.encode(claims, _secret(data_dir), algorithm="HS256")


def _secret(data_dir: Path) -> bytes:
    path = data_dir / "token.secret"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        draft = data_dir / f"token.secret.{secrets.token_hex(8)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(draft, path)  # whoever is first wins, and nobody reads half a secret
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()
