"""The served models' tokenizers in the Hugging Face hub's protocol.

A client with `HF_ENDPOINT=http://<this server>/hf` loads the tokenizer of any model that this server serves by its
name, also of one that no hub has. Only files that make a tokenizer are given out, never weights, and to anyone who can
reach the server: hub clients do not send this server's keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from msgspec import Struct

from tinkercloud.api.dependencies import ServiceOf
from tinkercloud.api.wire.answers import Json
from tinkercloud.control.service import Service
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.errors import NotFound

router = APIRouter(tags=["tokenizers"])

TOKENIZER_FILE = re.compile(
    r"tokenizer[\w.-]*\.(json|model)|[\w.-]*\.tiktoken|tekken\.json|spiece\.model|sentencepiece[\w.-]*\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(json|jinja)|additional_chat_templates/[\w-]+\.jinja|config\.json|generation_config\.json",
    re.ASCII,
)
"""Names of the files that are given out."""


FETCHED = ["tokenizer*", "*.tiktoken", "*.jinja", "*.txt", "*.model", "*config.json", "*tokens*.json", "*vocab.json"]
"""The files of a hub's repository that those are among."""

HEADER_CHARACTERS = 500
"""The most of an error's text that goes into a header; the body has all of it."""

_fetching = asyncio.Lock()
"""One at a time: a server whose own HF_ENDPOINT is itself must not ask itself on and on."""


class Repository(Struct, frozen=True):
    """A served model as a hub repository with one revision, whatever revision is asked for."""

    name: str
    commit: str
    """40 hexadecimal digits, made of the files' contents."""
    files: dict[str, tuple[Path, str]]
    """By name: where it is, and its ETag."""


def is_hub_folder(info: BaseModelInfo) -> bool:
    """Whether a model was downloaded under its own name, so that clients can download its tokenizer too."""
    return f"models--{_hub_name(info.name).replace('/', '--')}" in Path(info.folder).parts


@router.get("/{repository:path}/resolve/{revision}/{file:path}", response_model=None)
@router.head("/{repository:path}/resolve/{revision}/{file:path}", response_model=None, include_in_schema=False)
async def resolve(repository: str, revision: str, file: str, service: ServiceOf) -> Response:
    """A file of a tokenizer."""
    found = await _repository(service, repository)
    if found is None:
        return _no_repository(service, repository)
    if file not in found.files:
        return _missing("EntryNotFound", f"{repository} has no tokenizer file {file} here", found.commit)
    path, etag = found.files[file]
    return FileResponse(path, headers={"etag": f'"{etag}"', "x-repo-commit": found.commit})


@router.get("/api/models/{repository:path}/tree/{revision}", response_model=None)
@router.get("/api/models/{repository:path}/tree/{revision}/{folder:path}", response_model=None)
async def tree(repository: str, revision: str, service: ServiceOf, folder: str = "") -> Response:
    """The files in a folder of a repository."""
    found = await _repository(service, repository)
    if found is None:
        return _no_repository(service, repository)
    inside = f"{folder}/" if folder else ""
    entries = [
        {"type": "file", "path": name, "oid": etag, "size": path.stat().st_size}
        for name, (path, etag) in found.files.items()
        if name.startswith(inside)
    ]
    if not entries:
        return _missing("EntryNotFound", f"{repository} has no folder {folder} here", found.commit)
    return Json(entries, headers={"x-repo-commit": found.commit})


@router.get("/api/models/{repository:path}", response_model=None)
@router.get("/api/models/{repository:path}/revision/{revision}", response_model=None)  # the lowest is matched first
async def model_info(repository: str, service: ServiceOf, revision: str = "main") -> Response:
    """What the hub says of a model."""
    found = await _repository(service, repository)
    if found is None:
        return _no_repository(service, repository)
    described: dict[str, Any] = {
        "id": found.name,
        "modelId": found.name,
        "sha": found.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": ["transformers"],
        "siblings": [{"rfilename": name} for name in found.files],
    }
    return Json(described, headers={"x-repo-commit": found.commit})


def _hub_name(name: str) -> str:
    """The SDK leaves a base model's `:suffix` out when it asks for the tokenizer."""
    return name.split(":")[0]


async def _repository(service: Service, name: str) -> Repository | None:
    engines = (served.engine for served in service.models)
    source = next((e.options.source for e in engines if name in (e.name, _hub_name(e.name))), None)
    if source is None:
        return None
    folder = Path(source)
    if not folder.is_dir():
        async with _fetching:
            folder = await asyncio.to_thread(_from_hub, source)
    return await asyncio.to_thread(_read_repository, name, folder)


def _from_hub(source: str) -> Path:
    """Where the tokenizer of a hub's model is: in the hub's cache, else fetched into it. That takes no engine, which a
    lazy model may not have. NotFound if the hub does not give it."""
    from huggingface_hub import snapshot_download  # takes 0.3 s to import

    try:
        cached = Path(snapshot_download(source, local_files_only=True))
        if any(cached.glob("tokenizer*")):
            return cached
    except FileNotFoundError:
        pass
    try:
        return Path(snapshot_download(source, allow_patterns=FETCHED))
    except Exception as error:  # the hub's client lets those of its HTTP library through
        raise NotFound(f"the tokenizer of {source} cannot be fetched: {' '.join(str(error).split())}") from None


def _read_repository(name: str, folder: Path) -> Repository:
    files = {}
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        relative = path.relative_to(folder).as_posix()
        if TOKENIZER_FILE.fullmatch(relative) and path.is_file():
            state = path.stat()
            files[relative] = (path, _digest(path, state.st_mtime_ns, state.st_size))
    names = hashlib.sha1()
    for file in sorted(files):
        names.update(f"{file} {files[file][1]}\n".encode())
    return Repository(name=name, commit=names.hexdigest(), files=files)


@lru_cache(maxsize=1024)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    """Of a file's content; its time and size are there to forget it when the file changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _no_repository(service: Service, name: str) -> Response:
    served = ", ".join(model for model, _ in service.models.known())
    return _missing("RepoNotFound", f"this server does not serve {name}; it serves {served}", None)


def _missing(code: str, message: str, commit: str | None) -> Response:
    # It repeats what was asked for, and a header can hold only printable ASCII.
    printable = "".join(c if " " <= c <= "~" else "?" for c in message[:HEADER_CHARACTERS])
    headers = {"x-error-code": code, "x-error-message": printable}
    if commit is not None:
        headers["x-repo-commit"] = commit
    return Json({"detail": message}, 404, headers)
