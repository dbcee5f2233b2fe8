"""How a base model is written on the command line, and where its files are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EMBEDDED = "tinkercloud/nano"
"""The model that comes with the package."""

NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(/[A-Za-z0-9][\w.-]*)?(:[\w.:-]+)?", re.ASCII)
"""A model's name: a Hugging Face id, behind which a `/variant` and a `:suffix` may stand."""

MAX_NAME = 200
"""Letters of a name; the Hugging Face hub has shorter ones."""

OPTIONS = re.compile(r"(.*?)((?:,[a-z_]+=[^,/=]*)*)", re.DOTALL)
"""What a model is, and the settings behind it."""


VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    "*.tiktoken",
)
"""Files that hold a tokenizer's vocabulary. transformers makes an empty tokenizer for a folder without any."""


class ModelError(ValueError):
    """A model cannot be served as it was written; the text says why."""


def parse_model(text: str) -> dict[str, Any]:
    """`NAME`, `FOLDER` or `NAME=FOLDER`, each with `,setting=value` behind it, as the fields of a model's settings.

    >>> parse_model("Qwen/Qwen3-8B,max_rank=64,lazy=true")
    {'name': 'Qwen/Qwen3-8B', 'max_rank': '64', 'lazy': 'true'}
    """
    head, tail = OPTIONS.fullmatch(text).groups()
    fields: dict[str, Any] = {"name": head}
    if "=" in head and not _is_folder(head):
        fields["name"], folder = head.split("=", 1)
        fields["source"] = folder
        if folder not in (EMBEDDED, "builtin") and not _is_folder(folder):
            raise ModelError(f"model {text}: {_no_folder(folder)}")
    return fields | dict(option.split("=", 1) for option in tail.split(",")[1:])


def option_text(settings: Mapping[str, Any]) -> str:
    """Settings as they stand behind a model on the command line, without the first comma.

    >>> option_text({"max_rank": 64, "trust_remote_code": True})
    'max_rank=64,trust_remote_code=true'
    """
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return ",".join(f"{name}={value}" for name, value in values.items())


def resolve_source(name: str, source: str) -> tuple[str, str]:
    """(name, source) with the source as an absolute folder, a Hugging Face id or `builtin`.

    A folder that is given as a name is called by that name if clients can use it as one, else by its last part.
    """
    if source in (EMBEDDED, "builtin") or (not source and name == EMBEDDED):
        return _checked(name), "builtin"
    if _is_folder(source or name):
        folder = Path(source or name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the folder {folder} has no config.json; a model's folder is as `save_pretrained` writes it"
            )
        return _checked(name if source or NAME.fullmatch(name) else folder.resolve().name), str(folder.resolve())
    hub = NAME.fullmatch(source or name)
    if not hub and (file := Path(source or name).expanduser()).exists():
        raise ModelError(_no_folder(str(file)))
    if not hub:
        raise ModelError(f"{_short(source or name)} is neither a folder nor a Hugging Face id such as Qwen/Qwen3-8B")
    return _checked(name), _checked(hub["id"])


def source_folder(source: str) -> str:
    """`builtin` as the embedded model's folder; anything else as it is."""
    if source != "builtin":
        return source
    from tinkercloud.nano import FOLDER

    return str(FOLDER)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer, of whatever kind."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES)


NO_TOKENIZER = "without it, clients can send token ids, but no stop strings, and `get_tokenizer()` fails"
"""What the lack of one means."""


def missing_tokenizer(name: str, source: str) -> str | None:
    """A sentence if a served model's folder has no tokenizer; None if it has, or is not here yet."""
    folder = Path(source)
    if not folder.is_dir() or has_tokenizer(folder):
        return None
    return f"{name}: {folder} has no tokenizer; {NO_TOKENIZER}. `save_pretrained` writes one there"


def hub_refusal(error: Exception) -> str:
    """Why the hub does not give a model, in a few words, from what its client has raised."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    why = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(why, OfflineModeIsEnabled):
        return "offline (HF_HUB_OFFLINE)"
    if isinstance(why, GatedRepoError):
        return "the hub asks who you are: get access there, then `hf auth login`"
    if isinstance(why, RepositoryNotFoundError):
        return "the hub has no such model, or keeps it private"
    return f"the hub cannot be asked ({type(why).__name__}: {' '.join(str(why).split()):.200})"


def _is_folder(path: str) -> bool:
    """Whether there is such a folder. ModelError if the system cannot say."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{_short(path)} is neither a model's folder ({why}) nor the name of one, which has at most {MAX_NAME} "
            "letters"
        ) from None


def _short(text: str) -> str:
    return repr(text) if len(text) <= MAX_NAME else f"{text[:40]!r} ... ({len(text)} letters)"


def _no_folder(path: str) -> str:
    if Path(path).expanduser().exists():
        return f"{path!r} is a file; give the folder that it is in"
    return f"there is no folder {path!r}"


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ModelError(f"{_short(name)} cannot be a model's name; use one such as my-model or me/my-model")
    if len(name) > MAX_NAME:
        raise ModelError(f"{_short(name)} is too long for a model's name, which has at most {MAX_NAME} letters")
    return name
