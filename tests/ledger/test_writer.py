from __future__ import annotations

import asyncio
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.ledger.conftest import MODEL, OpenLedger, model_record
from tinkercloud.errors import Unavailable
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord
from tinkercloud.ledger.writer import SMALL_BYTES, DiskFull

pytestmark = pytest.mark.anyio


async def test_a_write_that_cannot_be_stored_fails_alone(ledger: Ledger) -> None:
    async def append(seq_id: int) -> object:
        too_large_for_sql = 2**70 if seq_id in (0, 50, 99) else 1
        return await ledger.append("stream", seq_id, "sample", b"x" * 100, num_tokens=too_large_for_sql)

    results = await asyncio.gather(*(append(n) for n in range(100)), return_exceptions=True)
    assert [n for n, result in enumerate(results) if isinstance(result, Exception)] == [0, 50, 99]
    assert len(await ledger.pending("stream")) == 97


async def test_a_full_disk_is_said_and_outlived(ledger: Ledger, tmp_path: Path) -> None:
    payload = b"x" * 2_000_000
    await ledger.append("stream", 0, "sample", payload)
    (file,) = (tmp_path / "segments").iterdir()
    size = file.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1_000_000, limits[1]))
    try:
        with pytest.raises(DiskFull, match="free space"):
            await ledger.append("stream", 1, "sample", payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert issubclass(DiskFull, Unavailable)
    assert file.stat().st_size == size
    assert await ledger.entry("stream:1") is None
    assert not (await ledger.append("stream", 1, "sample", payload)).repeated
    assert await ledger.payload("stream:0") == await ledger.payload("stream:1") == payload


async def test_a_write_whose_caller_left_still_happens_and_is_seen(ledger: Ledger) -> None:
    await ledger.append("stream", 0, "sample", b"payload")
    leaving = asyncio.create_task(ledger.complete("stream:0", b"outcome"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    await ledger.append("stream", 1, "sample", b"behind it")
    entry = await ledger.entry("stream:0")
    assert entry is not None and entry.state == "done"
    assert await ledger.outcome("stream:0") == b"outcome"


async def test_a_commit_that_failed_and_reached_the_disk_is_not_taken_for_undone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialect = ledger._writer._engine.dialect
    commit = dialect.do_commit

    def lose_the_answer(connection: Any) -> None:
        commit(connection)
        monkeypatch.undo()
        raise dialect.loaded_dbapi.DatabaseError("the answer was lost")

    await ledger.insert(model_record())
    await ledger.append(MODEL, 0, "forward_backward", b"payload")
    assert (await ledger.get(ModelRecord, MODEL)).applied_seq == -1
    monkeypatch.setattr(dialect, "do_commit", lose_the_answer)
    writes = (ledger.complete(f"{MODEL}:0", b"outcome"), ledger.append(MODEL, 1, "optim_step", b""))
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert any("the answer was lost" in str(result) for result in results) and ledger.doubts == 1
    ended = await ledger.entry(f"{MODEL}:0")
    assert ended is not None and ended.state == "done" and await ledger.outcome(f"{MODEL}:0") == b"outcome"
    assert (await ledger.get(ModelRecord, MODEL)).applied_seq == 0
    again = await ledger.append(MODEL, 0, "forward_backward", b"payload")
    assert again.repeated and again.state == "done"


async def test_what_was_handed_in_before_close_is_on_disk(open_ledger: OpenLedger) -> None:
    ledger = await open_ledger()
    large = b"x" * (SMALL_BYTES + 1)
    tasks = [asyncio.create_task(ledger.append("stream", n, "sample", large)) for n in range(50)]
    await asyncio.sleep(0)
    await ledger.close()
    await asyncio.gather(*tasks)
    with pytest.raises(RuntimeError, match="closed"):
        await ledger.append("stream", 50, "sample", large)
    again = await open_ledger()
    assert [entry.seq_id for entry in await again.pending("stream")] == list(range(50))
    assert await again.payload("stream:49") == large
    await again.close()
