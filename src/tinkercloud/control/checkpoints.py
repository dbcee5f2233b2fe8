"""Named checkpoints: finding them, taking in foreign ones, dropping those whose time is over."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from tinkercloud.control.folders import parse_checkpoint_path
from tinkercloud.errors import NotFound
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import CheckpointRecord


class Checkpoints:
    """The named checkpoints of all clients, in the data directory."""

    def __init__(self, ledger: Ledger, data_dir: Path):
        self._ledger = ledger
        self._data_dir = data_dir

    async def get(self, path: str, owner: str) -> CheckpointRecord:
        """By its tinker:// path. NotFound if there is none, InvalidRequest if it is no such path."""
        parse_checkpoint_path(path)
        checkpoint = await self._ledger.get(CheckpointRecord, path)
        expired = checkpoint is not None and checkpoint.expires_at is not None and checkpoint.expires_at < time.time()
        if checkpoint is None or expired or checkpoint.owner != owner:
            raise NotFound(f"there is no checkpoint {path}; `tinkercloud checkpoints list` shows those that there are")
        return checkpoint

    async def list(self, owner: str, model_id: str | None) -> list[CheckpointRecord]:
        """All of the owner's checkpoints, or those of one training run, newest first."""
        if model_id is not None:
            return await self._ledger.find(CheckpointRecord, owner=owner, model_id=model_id)
        return await self._ledger.find(CheckpointRecord, owner=owner)

    async def drop_expired(self, now: float) -> None:
        """Remove the checkpoints whose time is over, records first."""
        for checkpoint in await self._ledger.find(CheckpointRecord):
            if checkpoint.expires_at is not None and checkpoint.expires_at <= now:
                await self._ledger.remove(CheckpointRecord, checkpoint.path)
                await asyncio.to_thread(shutil.rmtree, self._data_dir / checkpoint.folder, ignore_errors=True)
