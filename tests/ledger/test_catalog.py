from __future__ import annotations

import pytest
from msgspec.structs import replace
from sqlalchemy.exc import IntegrityError

from tests.ledger.conftest import MODEL, Clock, OpenLedger, model_record
from tinkercloud.engine.operations import LoraConfig
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import (
    CheckpointRecord,
    ModelRecord,
    SamplerRecord,
    SessionRecord,
    SnapshotRecord,
)

pytestmark = pytest.mark.anyio

SESSION = SessionRecord(
    "session-1",
    "alice",
    created_at=1.0,
    last_heartbeat=1.0,
    state="active",
    sdk_version="0.38.0",
    tags=("a", "b"),
    user_metadata={"nested": {"list": [1, None, "ü\ud800"]}},
)
CHECKPOINT = CheckpointRecord(
    "tinker://m/weights/a", "m", "training", "a", "alice", "base", LoraConfig(rank=4, train_mlp=False), "folder", 9, 1.0
)
SAMPLER = SamplerRecord("session-1:sample:0", "session-1", "alice", "base", None, "", 1.0)


async def test_records_come_back_whole(open_ledger: OpenLedger) -> None:
    records = [SESSION, model_record(), SAMPLER, CHECKPOINT, SnapshotRecord(MODEL, 3, "folder", 1.0)]
    keys = [("session-1",), (MODEL,), (SAMPLER.sampler_id,), (CHECKPOINT.path,), (MODEL, 3)]
    ledger = await open_ledger()
    for record in records:
        assert await ledger.insert(record) == record
    await ledger.close()
    ledger = await open_ledger()
    for _ in range(2):  # from disk, then from memory
        assert [await ledger.get(type(record), *key) for record, key in zip(records, keys, strict=True)] == records
    assert await ledger.get(SessionRecord, "nobody") is None
    await ledger.close()


async def test_the_first_record_under_a_key_stays(ledger: Ledger) -> None:
    first = await ledger.insert(model_record())
    assert await ledger.insert(model_record(owner="bob")) == first
    assert await ledger.insert(model_record("another id", owner="bob")) == first
    assert await ledger.get(ModelRecord, "another id") is None
    assert await ledger.insert(model_record("another id", model_seq_id=1)) != first


async def test_records_are_stored_together_or_not_at_all(ledger: Ledger) -> None:
    wrong = replace(CHECKPOINT, size_bytes=None)
    with pytest.raises(IntegrityError):
        await ledger.insert(model_record(), SESSION, wrong)
    assert await ledger.get(ModelRecord, MODEL) is None and await ledger.get(SessionRecord, "session-1") is None
    stored = await ledger.insert(model_record(), SESSION)
    assert [run.model_id for run in await ledger.without_checkpoints(MODEL[:2])] == [MODEL]
    assert await ledger.without_checkpoints("_" + MODEL[1:2]) == [], "the beginning of an id, not a pattern"
    assert await ledger.insert(model_record(owner="bob"), CHECKPOINT) == stored
    assert await ledger.get(SessionRecord, "session-1") == SESSION
    assert await ledger.get(CheckpointRecord, CHECKPOINT.path) is None, "nor what comes with a repeat"
    await ledger.insert(replace(CHECKPOINT, model_id=MODEL))
    for _ in range(2):  # one that has a checkpoint, then one that had one
        assert await ledger.without_checkpoints("") == []
        await ledger.remove(CheckpointRecord, CHECKPOINT.path)


async def test_what_may_change_changes_and_nothing_else(ledger: Ledger) -> None:
    await ledger.insert(SESSION)
    await ledger.insert(CHECKPOINT)
    changed = await ledger.change(SessionRecord, "session-1", state="finished", finish_reason="success")
    assert changed is not None and (changed.state, changed.finish_reason) == ("finished", "success")
    assert await ledger.get(SessionRecord, "session-1") == changed
    published = await ledger.change(CheckpointRecord, CHECKPOINT.path, public=True, expires_at=5.0)
    assert published is not None and published.public and published.expires_at == 5.0
    with pytest.raises(ValueError, match=r"SessionRecord\.owner never changes"):
        await ledger.change(SessionRecord, "session-1", owner="bob")
    assert await ledger.change(SessionRecord, "nobody", state="parked") is None
    assert await ledger.remove(CheckpointRecord, CHECKPOINT.path) == published
    assert await ledger.get(CheckpointRecord, CHECKPOINT.path) is None
    assert await ledger.remove(CheckpointRecord, CHECKPOINT.path) is None


async def test_lists_are_newest_first_and_in_pages(ledger: Ledger) -> None:
    for n in range(5):
        owner = "bob" if n == 2 else "alice"
        await ledger.insert(model_record(f"m{n}", model_seq_id=n, owner=owner, created_at=float(n)))
    ids = [model.model_id for model in await ledger.find(ModelRecord, owner="alice")]
    assert ids == ["m4", "m3", "m1", "m0"]
    page = await ledger.find(ModelRecord, owner="alice", limit=2, offset=1)
    assert [model.model_id for model in page] == ids[1:3]
    assert [model.model_id for model in await ledger.find(ModelRecord, owner="alice", offset=3)] == ids[3:]
    assert await ledger.count(ModelRecord, owner="alice") == 4
    assert await ledger.count(ModelRecord, session_id="nobody") == 0
    await ledger.insert(SESSION)
    assert await ledger.find(SessionRecord, display_name=None) == [SESSION]


async def test_clients_of_a_sampler_get_numbers_of_their_own(ledger: Ledger) -> None:
    await ledger.insert(SAMPLER)
    assert (await ledger.get(SamplerRecord, SAMPLER.sampler_id)).clients == 1
    assert [await ledger.join_sampler(SAMPLER.sampler_id) for _ in range(3)] == [1, 2, 3]
    assert (await ledger.get(SamplerRecord, SAMPLER.sampler_id)).clients == 4
    assert await ledger.join_sampler("nobody") is None


async def test_only_the_newest_snapshots_are_kept(ledger: Ledger) -> None:
    for seq_id in (3, 20, 9):
        await ledger.insert(SnapshotRecord(MODEL, seq_id, f"folder {seq_id}", created_at=1.0))
    await ledger.insert(SnapshotRecord("another", 1, "folder", 1.0))
    (newest,) = await ledger.find(SnapshotRecord, model_id=MODEL, limit=1)
    assert newest.seq_id == 20
    assert [record.seq_id for record in await ledger.prune_snapshots(MODEL, keep=2)] == [3]
    assert [record.seq_id for record in await ledger.find(SnapshotRecord, model_id=MODEL)] == [20, 9]
    assert await ledger.prune_snapshots(MODEL, keep=2) == []
    assert await ledger.count(SnapshotRecord) == 3


async def test_heartbeats_are_seen_at_once_and_on_disk_after_close(open_ledger: OpenLedger, clock: Clock) -> None:
    ledger = await open_ledger(clock=clock)
    await ledger.insert(SESSION)
    await ledger.insert(model_record())
    clock.now += 5
    for _ in range(10_000):
        ledger.heartbeat("session-1")
    await ledger.append(MODEL, 0, "create_model", b"")
    assert (await ledger.get(SessionRecord, "session-1")).last_heartbeat == clock.now
    assert (await ledger.find(ModelRecord, model_id=MODEL))[0].last_request_at == clock.now
    await ledger.close()
    ledger = await open_ledger()
    assert (await ledger.get(SessionRecord, "session-1")).last_heartbeat == clock.now
    assert (await ledger.get(ModelRecord, MODEL)).last_request_at == clock.now
    await ledger.close()


async def test_a_heartbeat_that_was_written_is_still_seen(ledger: Ledger, clock: Clock) -> None:
    await ledger.insert(SESSION)
    await ledger.get(SessionRecord, "session-1")
    clock.now += 5
    ledger.heartbeat("session-1")
    await ledger.expire()
    assert (await ledger.get(SessionRecord, "session-1")).last_heartbeat == clock.now
