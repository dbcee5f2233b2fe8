"""What was used and what it costs, in the shapes that the SDK's AdminClient reads."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from tinkercloud.api.auth import Owner
from tinkercloud.api.dependencies import ServiceOf
from tinkercloud.api.wire.answers import iso, text_metadata
from tinkercloud.control.billing import GIGABYTE, UsageEvent
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.records import SessionRecord
from tinkercloud.ledger.usage import HOUR_SECONDS

router = APIRouter(prefix="/billing/usage", tags=["billing"])

MAX_DAYS: Final = 14
"""How much of the past one answer is of."""


@router.get("/events")
async def usage_events(
    service: ServiceOf,
    owner: Owner,
    starting_on: Annotated[AwareDatetime, Query(description="When the first hour begins.")],
    ending_before: Annotated[AwareDatetime, Query(description="When the last hour has ended, 14 days later at most.")],
) -> dict[str, Any]:
    """Tokens, checkpoints made and storage of each hour, by session and base model, with what they cost."""
    now = time.time()
    start, end = _hour_of("starting_on", starting_on), _hour_of("ending_before", ending_before)
    if start > now:
        raise InvalidRequest(f"starting_on {starting_on.isoformat()} is in the future")
    if not start < end <= start + MAX_DAYS * 86400:
        window = f"{starting_on.isoformat()} to {ending_before.isoformat()}"
        raise InvalidRequest(
            f"ending_before must be after starting_on and at most {MAX_DAYS} days later; {window} is not"
        )
    events = await service.billing.usage(owner, start, end, now)
    sessions = await service.billing.sessions(events)
    return {
        "data": [_event_json(event, owner, sessions.get(event.session_id or "")) for event in events],
        "sessions": {key: {"user_metadata": text_metadata(it.user_metadata) or None} for key, it in sessions.items()},
        "cost_data_through": None,
    }


@router.get("/checkpoints/current")
async def current_checkpoints(service: ServiceOf, owner: Owner, project_id: str | None = None) -> dict[str, Any]:
    """What is stored now, by project, and what a month of it costs."""
    return {
        "effective_rate_usd_per_gigabyte_month": service.billing.storage_rate,
        "data": [
            {
                "project_id": used.project_id,
                "org_user_urn": owner,
                "user_name": owner,
                "checkpoint_count": used.checkpoints,
                "size_bytes": used.size_bytes,
                "size_gigabytes": used.size_bytes / GIGABYTE,
                "estimated_monthly_cost_usd": used.monthly_cost,
            }
            for used in await service.billing.stored(owner, project_id, time.time())
        ],
    }


def _hour_of(name: str, given: datetime) -> float:
    seconds = given.timestamp()
    if seconds % HOUR_SECONDS:
        raise InvalidRequest(f"{name} {given.isoformat()} is not the beginning of an hour in UTC")
    return seconds


def _event_json(event: UsageEvent, owner: str, session: SessionRecord | None) -> dict[str, Any]:
    """The SDK's `BillingUsageEvent`."""
    is_storage = event.kind == "storage"
    return {
        "bucket_start": iso(event.hour),
        "bucket_end": iso(event.hour + HOUR_SECONDS),
        "base_model": event.base_model,
        "user_id": owner,
        "user_name": owner,
        "session_id": event.session_id,
        "project_id": session and session.project_id,
        "estimated_cost_usd": event.cost,
        "effective_rate_usd_per_million_tokens": None if is_storage else event.rate,
        "effective_rate_usd_per_gigabyte_month": event.rate if is_storage else None,
        "event_info": _info_json(event),
    }


def _info_json(event: UsageEvent) -> dict[str, Any]:
    match event.kind:
        case "train":
            return {"type": "training", "token_count": int(event.quantity)}
        case "prefill" | "cached":
            is_cached = event.kind == "cached"
            return {"type": "sampling_prefill", "cached": is_cached, "token_count": int(event.quantity)}
        case "sample":
            return {"type": "sampling_sample", "token_count": int(event.quantity)}
        case "checkpoint":
            return {"type": "checkpoint", "count": int(event.quantity)}
        case "storage":
            return {"type": "storage", "free": event.rate == 0, "gigabyte_hours": event.quantity}
