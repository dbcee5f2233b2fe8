from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.ledger.conftest import MODEL, Clock, OpenLedger, model_record
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import SamplerRecord, SnapshotRecord
from tinkercloud.ledger.retention import (
    ACKNOWLEDGED_RETENTION,
    EXPIRE_ENTRIES,
    KEEP_ENTRIES,
    RESULT_RETENTION,
    UNRETRIEVED_RETENTION,
)
from tinkercloud.ledger.schema import entries
from tinkercloud.ledger.segments import SEGMENT_BYTES

pytestmark = pytest.mark.anyio


async def end(ledger: Ledger, stream: str, seq_id: int, size: int = 10, kind: str = "forward") -> str:
    entry = await ledger.append(stream, seq_id, kind, b"p" * size)
    await ledger.complete(entry.request_id, b"o" * size)
    return entry.request_id


async def is_expired(ledger: Ledger, request_id: str) -> bool:
    entry = await ledger.entry(request_id)
    outcome = await ledger.outcome(request_id)
    assert entry is not None and entry.expired == (outcome is None)
    return entry.expired


async def test_a_result_goes_a_while_after_it_was_retrieved(ledger: Ledger, clock: Clock) -> None:
    retrieved, waiting = await end(ledger, "s", 0), await end(ledger, "s", 1)
    accepted = (await ledger.append("s", 2, "forward", b"p")).request_id
    await ledger.retrieved(retrieved)
    clock.now += RESULT_RETENTION - 1
    await ledger.retrieved(retrieved)
    assert await ledger.expire() == 0
    clock.now += 2
    assert await ledger.expire() == 1
    assert await is_expired(ledger, retrieved) and not await is_expired(ledger, waiting)
    with pytest.raises(KeyError, match="expired"):
        await ledger.payload(retrieved)
    repeat = await ledger.append("s", 0, "forward", b"p")
    assert repeat.repeated and repeat.expired
    clock.now += UNRETRIEVED_RETENTION
    assert await ledger.expire() == 1
    assert await is_expired(ledger, waiting)
    assert await ledger.payload(accepted) == b"p"


async def test_a_result_goes_soon_after_its_client_said_that_it_has_it(ledger: Ledger, clock: Clock) -> None:
    """Whether it said so before or after the retrieval was written down; what has not ended is not touched."""
    written, unwritten, kept = [await end(ledger, "s", seq_id) for seq_id in range(3)]
    accepted = (await ledger.append("s", 3, "forward", b"p")).request_id
    for key in (written, unwritten, kept):
        await ledger.retrieved(key)
        if key == written:
            await ledger.expire()
    for key in (written, unwritten, accepted, "s:99"):
        await ledger.retrieved(key, acknowledged=True)
    await ledger.retrieved(unwritten)
    clock.now += ACKNOWLEDGED_RETENTION + 1
    assert await ledger.expire() == 2
    assert [await is_expired(ledger, key) for key in (written, unwritten, kept)] == [True, True, False]
    await ledger.complete(accepted, b"o")
    clock.now += RESULT_RETENTION
    assert await ledger.expire() == 1 and not await is_expired(ledger, accepted)


async def test_what_a_replay_needs_stays(ledger: Ledger, clock: Clock) -> None:
    await ledger.insert(model_record())
    await ledger.insert(model_record("another", 1))
    await end(ledger, "another", 2)
    await ledger.insert(SnapshotRecord("another", 1, "folder", 1.0))
    ids = [await end(ledger, MODEL, seq_id) for seq_id in range(6)]
    clock.now += UNRETRIEVED_RETENTION + 1
    assert await ledger.expire() == 0
    await ledger.insert(SnapshotRecord(MODEL, 1, "folder", 1.0))
    await ledger.insert(SnapshotRecord(MODEL, 3, "folder", 1.0))
    assert await ledger.expire() == 2
    assert [await is_expired(ledger, key) for key in ids] == [True, True, False, False, False, False]
    await ledger.prune_snapshots(MODEL, keep=1)
    assert await ledger.expire() == 0, "should the only one be damaged, there is the log"
    unload = await ledger.append(MODEL, 6, "unload_model", b"")
    await ledger.complete(unload.request_id, b"o")
    assert await ledger.expire() == 4


async def test_many_expire_in_several_writes(ledger: Ledger, clock: Clock) -> None:
    number = EXPIRE_ENTRIES + 10
    await asyncio.gather(*(end(ledger, "s", n) for n in range(number)))
    clock.now += UNRETRIEVED_RETENTION + 1
    assert await ledger.expire() == number


async def test_nothing_is_left_of_the_samples_of_a_sampler_that_is_gone(ledger: Ledger, clock: Clock) -> None:
    """Whether they expire before it goes or after; as long as it is there, a repeat of one is known for what it is."""
    number = EXPIRE_ENTRIES + 10
    record = SamplerRecord("s", "session", "alice", "base", None, "", 1.0)
    await ledger.insert(record)
    before = [f"s:{n}" for n in range(number)]
    await asyncio.gather(*(end(ledger, "s", n, kind="sample") for n in range(number)))
    clock.now += UNRETRIEVED_RETENTION + 1
    after = [await end(ledger, "s", number, kind="sample"), await end(ledger, MODEL, 0)]
    assert await ledger.expire() == number
    assert all([await is_expired(ledger, key) for key in before])
    await ledger.forget_samples("s")
    await ledger.remove(SamplerRecord, "s")
    clock.now += UNRETRIEVED_RETENTION + 1
    assert await ledger.expire() == 2
    left = select(entries.c.request_id)
    assert await ledger.searches._readers.read(lambda connection: connection.scalars(left).all()) == after[1:]


async def test_an_empty_segment_file_goes_and_the_others_stay(
    tmp_path: Path, open_ledger: OpenLedger, clock: Clock
) -> None:
    ledger = await open_ledger(clock=clock)
    half = SEGMENT_BYTES // 4
    gone = await end(ledger, "s", 0, half)
    also_gone = await end(ledger, "s", 1, half)
    stays = await end(ledger, "s", 2, half)
    assert len(list((tmp_path / "segments").iterdir())) == 2
    await ledger.retrieved(gone)
    clock.now += RESULT_RETENTION + 1
    await ledger.expire()
    assert len(list((tmp_path / "segments").iterdir())) == 2
    await ledger.retrieved(also_gone)
    clock.now += RESULT_RETENTION + 1
    await ledger.expire()
    assert len(list((tmp_path / "segments").iterdir())) == 1
    await ledger.close()
    ledger = await open_ledger(clock=clock)
    assert await ledger.outcome(stays) == b"o" * half
    assert await is_expired(ledger, gone)
    new = await end(ledger, "s", 3, half)
    await ledger.close()
    ledger = await open_ledger(clock=clock)
    assert await ledger.payload(new) == b"p" * half
    await ledger.close()


async def test_what_is_kept_outlives_its_retrieval_and_each_keep_begins_the_time_anew(
    ledger: Ledger, clock: Clock
) -> None:
    day = 86400.0
    kept, other = [(await ledger.append("s", n, "forward", b"p")).request_id for n in range(2)]
    await ledger.complete(kept, b"o", keep_seconds=day)
    await ledger.complete(other, b"o")
    for request_id in (kept, other):
        await ledger.retrieved(request_id)
    clock.now += RESULT_RETENTION + 1
    assert await ledger.expire() == 1
    assert await is_expired(ledger, other) and not await is_expired(ledger, kept)
    assert await ledger.keep([kept, other, "unknown"], day) == {kept}
    clock.now += day - 1
    assert await ledger.expire() == 0
    assert await ledger.payload(kept) == b"p" and await ledger.outcome(kept) == b"o"
    assert await ledger.keep([kept], day) == {kept}
    clock.now += day - 1
    assert await ledger.expire() == 0
    clock.now += 2
    assert await ledger.keep([kept], day) == set(), "its time has run out, whether or not it was swept"
    assert await ledger.expire() == 1
    assert await is_expired(ledger, kept)
    assert await ledger.keep([kept], day) == set()


async def test_what_is_kept_is_kept_by_the_next_server_too(open_ledger: OpenLedger, clock: Clock) -> None:
    ledger = await open_ledger(clock=clock)
    appended = await asyncio.gather(*(ledger.append("s", n, "forward", b"p") for n in range(KEEP_ENTRIES + 1)))
    request_ids = [entry.request_id for entry in appended]
    long = 10 * UNRETRIEVED_RETENTION
    await asyncio.gather(*(ledger.complete(request_id, b"o", keep_seconds=long) for request_id in request_ids))
    await ledger.close()
    ledger = await open_ledger(clock=clock)
    clock.now += 5 * UNRETRIEVED_RETENTION
    assert await ledger.expire() == 0
    assert await ledger.keep(request_ids, 100.0) == set(request_ids)
    assert await ledger.expire() == 0, "a keep never brings forward when something goes"
    await ledger.close()
