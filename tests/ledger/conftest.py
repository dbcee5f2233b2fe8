from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tinkercloud.engine.operations import LoraConfig
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord

MODEL = "session-1:train:0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    """A clock that goes on when the test says so (seconds)."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


OpenLedger = Callable[..., Awaitable[Ledger]]


@pytest.fixture
def open_ledger(tmp_path: Path, database_url: str | None) -> OpenLedger:
    """`await open_ledger(**options)`: the ledger of one data directory, on each kind of database."""

    async def open_it(**options: Any) -> Ledger:
        return await Ledger.open(tmp_path, database_url, **options)

    return open_it


@pytest.fixture
async def ledger(open_ledger: OpenLedger, clock: Clock) -> AsyncIterator[Ledger]:
    opened = await open_ledger(clock=clock)
    yield opened
    await opened.close()


def model_record(model_id: str = MODEL, model_seq_id: int = 0, **fields: object) -> ModelRecord:
    values = {
        "session_id": "session-1",
        "owner": "alice",
        "base_model": "base",
        "lora": LoraConfig(rank=8),
        "created_at": 1.0,
        "last_request_at": 1.0,
        "state": "live",
        "applied_seq": -1,
    }
    return ModelRecord(model_id=model_id, model_seq_id=model_seq_id, **{**values, **fields})
