"""What was used and what it costs, hour by hour: tokens, checkpoints made, and storage.

Prices are settings (`price_*`), zero by default. A checkpoint's storage is its files' size for as long as its record is
there, also where it shares them with a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from tinkercloud.config import Settings
from tinkercloud.control.base_models import BaseModels
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import SessionRecord, UsageKind
from tinkercloud.ledger.stored import Life
from tinkercloud.ledger.usage import HOUR_SECONDS

GIGABYTE = 1e9
HOURS_PER_MONTH = 720

EventKind = UsageKind | Literal["checkpoint", "storage"]


class UsageEvent(Struct, frozen=True):
    """What one session used of one kind, of one base model, in one hour."""

    hour: int
    """When it began, in seconds since the epoch."""
    kind: EventKind
    session_id: str | None
    base_model: str
    quantity: float
    """Tokens; checkpoints; gigabyte hours."""
    rate: float | None
    """USD for a million tokens, or for a gigabyte in a month."""
    cost: float | None
    """USD."""


class StorageUse(Struct, frozen=True):
    """What is stored now in one project."""

    project_id: str | None
    checkpoints: int
    size_bytes: int
    monthly_cost: float
    """USD."""


class Billing:
    """Answers what an owner has used."""

    def __init__(self, ledger: Ledger, models: BaseModels, settings: Settings):
        self._ledger = ledger
        self._models = models
        self._settings = settings

    @property
    def storage_rate(self) -> float:
        """USD for a gigabyte in a month of 720 hours."""
        return self._settings.price_storage

    async def usage(self, owner: str, start: float, end: float, now: float) -> list[UsageEvent]:
        """The events of the hours that begin in [start, end), by hour, those of most tokens first."""
        quantities: defaultdict[tuple[int, EventKind, str | None, str], float] = defaultdict(float)
        for used in await self._ledger.accounts.usage(start, end, owner):
            quantities[used.hour, used.kind, used.session_id, used.base_model] += used.tokens
        for life in await self._ledger.accounts.lives(owner, start, end):
            if start <= life.created_at < end:
                quantities[_hour(life.created_at), "checkpoint", life.session_id, life.base_model] += 1
            for hour, seconds in _hours(life, start, min(end, now)):
                gigabyte_hours = life.size_bytes / GIGABYTE * seconds / HOUR_SECONDS
                quantities[hour, "storage", life.session_id, life.base_model] += gigabyte_hours
        events = [self._event(*key, quantity) for key, quantity in quantities.items()]
        return sorted(events, key=lambda event: (event.hour, -event.quantity, event.kind, event.session_id or ""))

    async def sessions(self, events: list[UsageEvent]) -> dict[str, SessionRecord]:
        """The sessions that appear in these events."""
        ids = {event.session_id for event in events if event.session_id is not None}
        found = [await self._ledger.get(SessionRecord, session_id) for session_id in sorted(ids)]
        return {session.session_id: session for session in found if session is not None}

    async def stored(self, owner: str, project_id: str | None, now: float) -> list[StorageUse]:
        """What is stored now, by project, or in one project."""
        by_project: defaultdict[str | None, list[int]] = defaultdict(list)
        for life in await self._ledger.accounts.lives(owner, now, now):
            if life.removed_at is None and project_id in (None, life.project_id):
                by_project[life.project_id].append(life.size_bytes)
        return [
            StorageUse(project, len(sizes), sum(sizes), sum(sizes) / GIGABYTE * self.storage_rate)
            for project, sizes in sorted(by_project.items(), key=lambda item: item[0] or "")
        ]

    def _event(
        self, hour: int, kind: EventKind, session_id: str | None, base_model: str, quantity: float
    ) -> UsageEvent:
        rate = cost = None
        if kind == "storage":
            rate = self.storage_rate
            cost = rate * quantity / HOURS_PER_MONTH
        elif kind != "checkpoint":
            rate = self._price(base_model, kind)
            cost = rate * quantity / 1e6
        return UsageEvent(hour, kind, session_id, base_model, quantity, rate, cost)

    def _price(self, base_model: str, kind: UsageKind) -> float:
        """USD for a million tokens: the base model's own price where it is served and has one, else the server's."""
        served = self._models.get(base_model).settings if base_model in self._models else None
        own = served is not None and f"price_{kind}" in served.model_fields_set
        prices = served if own else self._settings
        of_kind = {
            "train": prices.price_train,
            "prefill": prices.price_prefill,
            "cached": prices.price_cached,
            "sample": prices.price_sample,
        }
        return of_kind[kind]


def _hour(time: float) -> int:
    return int(time // HOUR_SECONDS * HOUR_SECONDS)


def _hours(life: Life, start: float, end: float) -> Iterator[tuple[int, float]]:
    """(hour, seconds in it) for which a checkpoint was stored in [start, end)."""
    start = max(start, life.created_at)
    end = min(end, life.removed_at or end)
    while start < end:
        hour = _hour(start)
        until = min(end, hour + HOUR_SECONDS)
        yield hour, until - start
        start = until
