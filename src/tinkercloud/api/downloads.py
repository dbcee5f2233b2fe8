"""Links to files that need no key: signed, and good for an hour. Browsers, curl and urllib can follow them."""

from __future__ import annotations

import hmac
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import jwt
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from tinkercloud.api.auth import caller_of
from tinkercloud.api.dependencies import ServiceOf
from tinkercloud.api.tokens import secret
from tinkercloud.errors import NotFound
from tinkercloud.ledger.records import CheckpointRecord

router = APIRouter(tags=["downloads"])

LINK_SECONDS: Final = 3600
"""How long a link is good."""

ARCHIVE: Final = "archive.tar"
COMPLETE: Final = "checkpoint_complete"
"""An empty file in archives, by which older SDKs know that they have all of it."""

BLOCK_BYTES = 2**20


def link(request: Request, name: str, claims: dict[str, Any]) -> tuple[str, float]:
    """(a URL that downloads `name`, when it ends in seconds since the epoch). `claims` say what it is of. It ends
    earlier with the caller's key, and when the caller may not read that any more."""
    expires = int(time.time()) + LINK_SECONDS
    caller = caller_of(request)
    asked = {"reader": caller.owner, "key_id": None if caller.key is None else caller.key.key_id}
    token = jwt.encode(claims | asked | {"name": name, "exp": expires}, _key(request), algorithm="HS256")
    base = request.app.state.settings.public_url or str(request.base_url)
    return f"{base.rstrip('/')}/api/v1/downloads/{token}/{quote(name)}", expires


def file_link(request: Request, checkpoint: CheckpointRecord, name: str) -> tuple[str, float]:
    """As `link`, to one file of a checkpoint, or to its `ARCHIVE`."""
    return link(request, name, {"path": checkpoint.path, "folder": checkpoint.folder})


@router.get("/downloads/{token}/{name}", response_model=None)
async def download(token: str, name: str, request: Request, service: ServiceOf) -> Response:
    """A file behind a signed link, as `external_weights_urls`, `archive` and `trace_export` give them. Needs no key."""
    try:
        options = {"require": ["exp", "name", "reader"]}
        claims = jwt.decode(token, _key(request), algorithms=["HS256"], options=options)
    except jwt.ExpiredSignatureError:
        raise NotFound("this link was good for an hour and has expired; ask for a new one") from None
    except jwt.InvalidTokenError:
        raise NotFound("this is no link of this server") from None
    if claims["name"] != name:
        raise NotFound(f"this link is to {claims['name']!r:.200}")
    key_id = claims.get("key_id")
    if service.keys.configured and (key_id is None or service.keys.get(key_id) is None):
        raise NotFound("the key that this link was made with is not valid any more; ask for a new link with another")
    if "session" in claims:
        trace = await service.sessions.trace(claims["session"], claims["reader"])
        return Response(trace, media_type="application/octet-stream")
    checkpoint = await service.checkpoints.get(claims["path"], claims["reader"])
    folder = service.checkpoints.folder(checkpoint)
    if checkpoint.folder == claims["folder"]:
        await service.checkpoints.bring(checkpoint)
    if checkpoint.folder != claims["folder"] or not folder.is_dir():
        raise NotFound("the checkpoint behind this link was replaced; ask for a new link")
    names = await service.checkpoints.files(checkpoint) if name == ARCHIVE else [name]
    await service.checkpoints.check(checkpoint, *names)
    if name == ARCHIVE:
        files = [folder / file for file in names]
        return StreamingResponse(
            _tar(files), media_type="application/x-tar", headers={"content-length": str(_tar_bytes(files))}
        )
    return FileResponse(folder / name, media_type="application/octet-stream")


def _key(request: Request) -> bytes:
    """Derived from the secret that tokens are signed with: what is signed as a link is no good as a token."""
    return hmac.digest(secret(request.app.state.settings.data_dir), b"downloads", "sha256")


def _tar(files: list[Path]) -> Iterator[bytes]:
    """The bytes of a tar archive of these files and of an empty `COMPLETE`."""
    for file in files:
        size = file.stat().st_size
        yield _header(file.name, size)
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield _header(COMPLETE, 0)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _tar_bytes(files: list[Path]) -> int:
    padded = (-(-file.stat().st_size // tarfile.BLOCKSIZE) for file in files)
    return tarfile.BLOCKSIZE * (sum(padded) + len(files) + 3)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)
