"""What the server does by itself from time to time."""

from __future__ import annotations

import asyncio
import time

from tinkercloud.control.service import Service

ROUND_SECONDS = 5.0
"""Pause between two rounds."""


async def keep_house(service: Service) -> None:
    """Look after the server until cancelled. A chore that fails is logged by `tidy`; the next round tries again."""
    while True:
        await asyncio.sleep(ROUND_SECONDS)
        await service.tidy(time.time())
