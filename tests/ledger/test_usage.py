from __future__ import annotations

import pytest

from tests.ledger.conftest import MODEL, Clock, model_record
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import SamplerRecord, Usage

pytestmark = pytest.mark.anyio

HOUR = 3600
FIRST = 997200
"""The hour in which the clock of the tests begins."""


async def test_an_operation_counts_once_in_its_owners_hour(ledger: Ledger, clock: Clock) -> None:
    run = await ledger.insert(model_record())
    sampler = await ledger.insert(SamplerRecord("s", "session-2", "bob", "other", None, "", 1.0))
    for seq, tokens in enumerate((10, 5)):
        entry = await ledger.append(MODEL, seq, "forward_backward", b"", num_tokens=tokens)
        for _ in range(2):
            await ledger.complete(entry.request_id, b"", tokens={"train": tokens}, of=run)
    drawn = await ledger.append("s", 0, "sample", b"")
    await ledger.complete(drawn.request_id, b"", tokens={"prefill": 7, "cached": 0, "sample": 3}, of=sampler)
    clock.now += HOUR
    later = await ledger.append(MODEL, 2, "forward_backward", b"")
    await ledger.complete(later.request_id, b"", tokens={"train": 1}, of=run)
    failed = await ledger.append(MODEL, 3, "forward_backward", b"")
    await ledger.complete(failed.request_id, b"", failed=True, tokens={}, of=run)

    trained = Usage("alice", FIRST, "session-1", MODEL, "train", "base", 15)
    assert await ledger.accounts.usage(FIRST, FIRST + HOUR, "alice") == [trained]
    of_all = await ledger.accounts.usage(FIRST, FIRST + 2 * HOUR)
    assert {(u.owner, u.hour - FIRST, u.model_id, u.kind, u.base_model): u.tokens for u in of_all} == {
        ("alice", 0, MODEL, "train", "base"): 15,
        ("bob", 0, "s", "prefill", "other"): 7,
        ("bob", 0, "s", "sample", "other"): 3,
        ("alice", HOUR, MODEL, "train", "base"): 1,
    }
    assert await ledger.accounts.usage(FIRST + 2 * HOUR, FIRST + 9 * HOUR) == []
    begun = (FIRST, FIRST + 1, FIRST + HOUR + 1)
    assert [await ledger.accounts.tokens_since(start, "alice") for start in begun] == [16, 1, 0]
