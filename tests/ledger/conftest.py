from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tinkercloud.engine.types import LoraConfig
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


@pytest.fixture
async def ledger(tmp_path: Path, clock: Clock) -> AsyncIterator[Ledger]:
    opened = await Ledger.open(tmp_path, clock=clock)
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
