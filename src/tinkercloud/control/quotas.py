"""What a key lets its user have: training runs at a time, bytes of checkpoints, tokens a day.

A key without limits costs nothing here. Limits are of the key that a request came with, over all that its user has.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from msgspec import Struct

from tinkercloud.control.outcomes import StorageLimit
from tinkercloud.errors import Forbidden, Overloaded
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import KeyRecord, ModelRecord

DAY_SECONDS = 86400
KNOWN_SECONDS = 1.0
"""How long what an owner has used is taken for known; what is let in and what is drawn meanwhile is added to it."""

RETRY_SECONDS = 15
"""When to ask again for a training run; a session that is closed or silent frees its own within two minutes."""


class _Used(Struct):
    """Tokens of an owner's day, as far as it is known."""

    tokens: int
    day: float
    read_at: float
    sampled: int
    """Of all that were drawn since the server's start, those that `tokens` has."""


class Quotas:
    """Refuses what would be beyond a key's limits, with a sentence that says which, how much, and until when."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.time):
        self._ledger = ledger
        self._clock = clock
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._counting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._used: dict[str, _Used] = {}

    @asynccontextmanager
    async def new_model(self, key: KeyRecord | None, model_id: str) -> AsyncIterator[None]:
        """To be entered while a training run is made; a repeat of one that is there is always let in. Overloaded."""
        if key is None or key.max_models is None:
            yield
            return
        async with self._making[key.owner]:  # so that two at once are not both the last one
            alive = await self._ledger.accounts.live_models(key.owner)
            if alive >= key.max_models and await self._ledger.get(ModelRecord, model_id) is None:
                raise Overloaded(
                    f"user {key.owner} has {alive} training runs in live sessions, and key {key.hint}… allows "
                    f"{key.max_models} at a time (max_models); this one can be made when the session of another is "
                    "closed, or has been silent for two minutes",
                    retry_seconds=RETRY_SECONDS,
                )
            yield

    async def storage(self, key: KeyRecord | None) -> None:
        """Before something is saved. Forbidden."""
        if (limit := storage_limit(key)) is not None:
            why = await beyond_storage(self._ledger, key.owner, limit, self._clock())
            if why is not None:
                raise Forbidden(why)

    async def tokens(self, key: KeyRecord | None, more: int, repeats: str | None = None) -> None:
        """Before `more` tokens are computed. Forbidden. If there is an operation `repeats` this is its repeat, which is
        let in: it computes nothing."""
        if key is None or key.max_daily_tokens is None:
            return
        if repeats is not None and await self._ledger.entry(repeats) is not None:
            return
        async with self._counting[key.owner]:  # so that many at once are not all the last one
            used = await self._used_today(key.owner)
            if used.tokens + more > key.max_daily_tokens:
                raise Forbidden(
                    f"user {key.owner} has used {used.tokens} tokens today, this request has {more}, and key "
                    f"{key.hint}… allows {key.max_daily_tokens} a day (max_daily_tokens); they are counted anew from "
                    f"{_utc(used.day + DAY_SECONDS)}"
                )
            used.tokens += more

    async def _used_today(self, owner: str) -> _Used:
        """What has been computed, and what was accepted and has still to be."""
        now = self._clock()
        day = now // DAY_SECONDS * DAY_SECONDS
        known, accounts = self._used.get(owner), self._ledger.accounts
        if known is None or known.day != day or now - known.read_at > KNOWN_SECONDS:
            tokens = await accounts.tokens_since(day, owner) + await accounts.pending_tokens(owner)
            known = self._used[owner] = _Used(tokens, day, now, accounts.sampled[owner])
        known.tokens += accounts.sampled[owner] - known.sampled
        known.sampled = accounts.sampled[owner]
        return known


def storage_limit(key: KeyRecord | None) -> StorageLimit | None:
    """What a save remembers of the key that it came with; None if that has no limit."""
    return None if key is None or key.max_storage_bytes is None else StorageLimit(key.max_storage_bytes, key.hint)


async def beyond_storage(ledger: Ledger, owner: str, limit: StorageLimit, now: float) -> str | None:
    """Why an owner may save nothing more; None if it may."""
    stored, frees_at = await ledger.accounts.stored_bytes(owner, now)
    if stored < limit.max_bytes:
        return None
    until = "" if frees_at is None else f"; the next one expires at {_utc(frees_at)}"
    return (
        f"the checkpoints of user {owner} take {stored} bytes, and key {limit.key_hint}… allows {limit.max_bytes} "
        f"(max_storage): nothing more can be saved until some are deleted{until}"
    )


def _utc(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"
