"""What the server does by itself from time to time."""

from __future__ import annotations

import asyncio
import logging
import time

from tinkercloud.control.service import Service

log = logging.getLogger(__name__)

ROUND_SECONDS = 5.0
"""Pause between two rounds."""


async def keep_house(service: Service) -> None:
    """Look after the server until cancelled. A round that fails is logged; the next one tries again."""
    while True:
        await asyncio.sleep(ROUND_SECONDS)
        try:
            await service.tidy(time.time())
        except Exception:
            log.exception("a round of housekeeping failed")
