"""Removing what nothing names any more."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import SamplerRecord


async def remove_unused(ledger: Ledger, data_dir: Path, folder: str) -> None:
    """Remove a folder that no checkpoint names any more, unless a sampler still draws from it."""
    if not await ledger.count(SamplerRecord, folder=folder):
        await asyncio.to_thread(shutil.rmtree, data_dir / folder, ignore_errors=True)
