"""The keys that are valid now, in memory: no request waits for the database to be let in."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from tinkercloud.ledger.keys import digest
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import KeyRecord

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
"""How often keys are read again: `tinkercloud keys` changes them behind the server's back."""


class Keys:
    """Every key of the server. Make one with `open`, and `close` it before its ledger."""

    @classmethod
    async def open(cls, ledger: Ledger) -> Keys:
        keys = cls(ledger)
        await keys.refresh()
        keys._task = asyncio.create_task(keys._refresh_regularly(), name="keys")
        return keys

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._by_digest: dict[str, KeyRecord] = {}
        self._by_id: dict[int, KeyRecord] = {}
        self._refreshing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def configured(self) -> bool:
        """Whether there ever was a key. One that is revoked or expired does not open the server to everybody."""
        return bool(self._by_id)

    def find(self, secret: str) -> KeyRecord | None:
        """The valid key that this is."""
        # The time that the lookup takes depends on the hash, of which nobody can choose a beginning.
        wanted = digest(secret)
        key = self._by_digest.get(wanted)
        return key if key is not None and hmac.compare_digest(key.digest, wanted) and _is_valid(key) else None

    def get(self, key_id: int) -> KeyRecord | None:
        """The valid key of this id."""
        key = self._by_id.get(key_id)
        return key if key is not None and _is_valid(key) else None

    async def revoke(self, key: KeyRecord) -> None:
        """For good, and at once."""
        await self._ledger.revoke_key(key.key_id)
        await self.refresh()

    async def refresh(self) -> None:
        """Read the keys again."""
        async with self._refreshing:  # what was read first must not be kept last
            keys = await self._ledger.keys()
            self._by_digest = {key.digest: key for key in keys}
            self._by_id = {key.key_id: key for key in keys}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _refresh_regularly(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except Exception:
                log.exception("the keys could not be read again; those that were valid stay so meanwhile")


def _is_valid(key: KeyRecord) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > time.time())
