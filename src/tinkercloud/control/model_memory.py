"""What a data directory remembers of base models: those that were added while a server ran, and what was last known of
each."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.ledger.files import sync
from tinkercloud.model_settings import ModelSettings

log = logging.getLogger(__name__)

FILE = "base_models.json"


class _Remembered(Struct):
    added: dict[str, dict[str, Any]] = {}
    """The settings of those that the next start serves again, by name."""
    known: dict[str, dict[str, Any]] = {}
    """The `BaseModelInfo` of those that clients have used, by name."""
    folders: dict[str, str] = {}
    """Where weights lay when clients used them last, by their fingerprint."""


class ModelMemory:
    """One small file, written whole. Use it while the data directory is locked."""

    def __init__(self, data_dir: Path):
        self._file = data_dir / FILE
        self._remembered = self._read()
        self._known: dict[str, BaseModelInfo] = {}
        """As in the file, decoded: every operation of a client asks."""
        for name, fields in self._remembered.known.items():
            with suppress(msgspec.ValidationError):  # of an older version of this server
                self._known[name] = msgspec.convert(fields, BaseModelInfo)
        self._writing = asyncio.Lock()

    # ------------------------------------------------------------ those that were added

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """The fields of each one's `ModelSettings`, by name."""
        return dict(self._remembered.added)

    async def add(self, model: ModelSettings) -> None:
        """The next start serves it again, with the settings that were given. OSError."""
        self._remembered.added[model.name] = model.model_dump(mode="json", include=model.model_fields_set)
        await self._write()

    async def forget(self, name: str) -> bool:
        """The next start does not serve it; whether it would have. OSError."""
        if name not in self._remembered.added:
            return False
        del self._remembered.added[name]
        await self._write()
        return True

    # ------------------------------------------------------------ what was known of them

    def info(self, name: str) -> BaseModelInfo | None:
        """What was known of a base model when it was served last; None if nothing is."""
        return self._known.get(name)

    def folder(self, fingerprint: str) -> str | None:
        """Where weights lay when clients used them last; None if that is not known."""
        return self._remembered.folders.get(fingerprint)

    async def learn(self, info: BaseModelInfo) -> None:
        """This is known of a base model that is served."""
        if self.info(info.name) == info:
            return
        self._known[info.name] = info
        self._remembered.known[info.name] = msgspec.to_builtins(info)
        if info.fingerprint:
            self._remembered.folders[info.fingerprint] = info.folder
        try:
            await self._write()
        except OSError:  # it is only needed when this model is not served any more
            log.exception("what is known of base model %s could not be written to %s", info.name, self._file)

    # ------------------------------------------------------------ the file

    def _read(self) -> _Remembered:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Remembered)
        except FileNotFoundError:
            return _Remembered()
        except msgspec.MsgspecError as error:
            aside = self._file.with_suffix(".damaged")
            os.replace(self._file, aside)
            log.error("%s cannot be read (%s); it is %s now: add its models again", self._file, error, aside.name)
            return _Remembered()

    async def _write(self) -> None:
        async with self._writing:
            content = msgspec.json.format(msgspec.json.encode(self._remembered))
            await asyncio.to_thread(_replace, self._file, content)


def _replace(file: Path, content: bytes) -> None:
    """Put a file in the place of the one before: whole, also after a power cut."""
    draft = file.with_suffix(".draft")
    with draft.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, file)
    sync(file.parent)
