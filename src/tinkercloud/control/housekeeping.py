"""What the server does by itself from time to time: parking, unloading, dropping what is past its retention."""

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
        for duty in (service.park_silent_sessions, service.unload_idle_models, service.drop_expired):
            try:
                await duty(time.time())
            except Exception:
                log.exception("housekeeping: %s failed", duty.__name__)
