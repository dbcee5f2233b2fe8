from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.ledger.conftest import MODEL, Clock, OpenLedger, model_record
from tinkercloud.codec import decode
from tinkercloud.engine.operations import LoraConfig
from tinkercloud.engine.results import Failure
from tinkercloud.ledger import Ledger, entries, recent
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SamplerRecord, SnapshotRecord
from tinkercloud.ledger.retention import UNRETRIEVED_RETENTION
from tinkercloud.ledger.segments import Corrupt
from tinkercloud.ledger.writer import SMALL_BYTES

pytestmark = pytest.mark.anyio


async def test_a_repeat_gets_the_first_entry_whatever_its_state(ledger: Ledger) -> None:
    first = await ledger.append(MODEL, 3, "forward_backward", b"first", num_tokens=7, details={"path": "a"})
    repeat = await ledger.append(MODEL, 3, "optim_step", b"second", num_tokens=9)
    assert (first.repeated, first.state, first.num_tokens, first.details) == (False, "accepted", 7, {"path": "a"})
    assert repeat.repeated and repeat.kind == "forward_backward" and repeat.request_id == first.request_id
    assert await ledger.payload(first.request_id) == b"first"
    await ledger.complete(first.request_id, b"result")
    repeat = await ledger.append(MODEL, 3, "optim_step", b"third")
    assert (repeat.repeated, repeat.state) == (True, "done")
    seen = await ledger.entry(first.request_id)
    assert seen is not None and not seen.repeated


async def test_of_concurrent_duplicates_one_is_first(ledger: Ledger) -> None:
    entries = await asyncio.gather(*(ledger.append(MODEL, 0, "sample", bytes([n])) for n in range(20)))
    assert [entry.repeated for entry in entries] == [False] + [True] * 19
    assert await ledger.payload(entries[0].request_id) == b"\x00"


async def test_without_a_seq_id_it_is_the_next_free_one(ledger: Ledger) -> None:
    await ledger.append(MODEL, 4, "optim_step", b"")
    numbers = [5 + n for n in range(10)]
    entries = await asyncio.gather(*(ledger.append(MODEL, None, "optim_step", b"") for _ in numbers))
    assert [entry.seq_id for entry in entries] == numbers
    assert await ledger.highest_seq(MODEL) == 14
    assert await ledger.highest_seq("nothing") == -1


async def test_request_ids_are_apart_for_streams_that_share_a_prefix(ledger: Ledger) -> None:
    ids = {
        (await ledger.append(stream, seq_id, "sample", b"")).request_id
        for stream in ("s:train:1", "s:train:11", "s:sample:1")
        for seq_id in (0, 1, 10, 11, 110)
    }
    assert len(ids) == 15


async def test_a_refusal_is_an_entry_that_has_ended(ledger: Ledger) -> None:
    refusal = Failure("rank must be positive", "user")
    entry = await ledger.append(MODEL, 1, "forward_backward", b"", refusal=refusal)
    outcome = await ledger.outcome(entry.request_id)
    assert entry.state == "refused" and entry.completion > 0
    assert outcome is not None and decode(outcome, Failure) == refusal
    assert entry.result_bytes == len(outcome)
    ended = await ledger.complete(entry.request_id, b"something else")
    assert (ended.state, ended.repeated) == ("refused", True)
    assert await ledger.outcome(entry.request_id) == outcome


async def test_the_first_outcome_stays(ledger: Ledger) -> None:
    entry = await ledger.append(MODEL, 0, "sample", b"")
    assert await ledger.outcome(entry.request_id) is None
    first, second = await asyncio.gather(
        ledger.complete(entry.request_id, b"first", result_bytes=17),
        ledger.complete(entry.request_id, b"second", failed=True),
    )
    assert (first.state, first.result_bytes, first.repeated) == ("done", 17, False)
    assert (second.state, second.completion, second.repeated) == ("done", first.completion, True)
    assert await ledger.outcome(entry.request_id) == b"first"
    with pytest.raises(KeyError, match="nobody:0"):
        await ledger.complete("nobody:0", b"")


async def test_completions_come_in_order_of_completion_for_each_client(ledger: Ledger) -> None:
    seq_ids = [*range(5), *(1_000_000_000 + n for n in range(5))]
    for seq_id in seq_ids:
        await ledger.append("sampler", seq_id, "sample", b"")
    order = random.Random(0).sample(seq_ids, len(seq_ids))
    for seq_id in order:
        await ledger.complete(f"sampler:{seq_id}", b"r")
    for client in (0, 1):
        ended = await ledger.completions("sampler", client, after=0)
        assert [entry.seq_id for entry in ended] == [n for n in order if n // 1_000_000_000 == client]
        numbers = [entry.completion for entry in ended]
        assert numbers == sorted(set(numbers))
        assert await ledger.completions("sampler", client, after=numbers[2]) == ended[3:]


async def test_completions_are_the_same_from_memory_and_from_the_database(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in memory: before and behind what is kept there, with others between, told of twice, expired, and
    after a commit of which it is not known whether it happened."""
    monkeypatch.setattr(recent, "ENDS", 5)
    dice = random.Random(1)
    waiting = [(stream, seq_id) for stream in "ab" for seq_id in (*range(20), *range(10**9, 10**9 + 10))]
    for stream, seq_id in waiting:
        await ledger.append(stream, seq_id, "sample", b"")
    dice.shuffle(waiting)
    from_memory = 0
    for number, (stream, seq_id) in enumerate(waiting):
        key = f"{stream}:{seq_id}"
        if number % 10 == 9:
            lost = entries.Completion(key, b"r", failed=False, result_bytes=1, expires_at=clock.now + 1000)
            await ledger._writer.write(entries.complete, lost)  # it reached the disk, and its answer was lost
            ledger._doubt()
        ended = await ledger.complete(key, b"r")
        assert ended.repeated == (number % 10 == 9)
        await ledger.complete(key, b"r")
        if number == 30:
            clock.now += UNRETRIEVED_RETENTION + 1
            assert await ledger.expire() == 31
        for after in range(max(0, ended.completion - 12), ended.completion + 1):
            for name, client in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
                found = await ledger.completions(name, client, after)
                assert found == await ledger._readers.read(entries.completions, name, client, after)
                from_memory += ledger._recent.ends(name, client, after) is not None
    assert from_memory > 500


async def test_completion_numbers_go_on_after_a_restart(open_ledger: OpenLedger) -> None:
    numbers = []
    for seq_id in range(3):
        ledger = await open_ledger()
        await ledger.append(MODEL, seq_id, "sample", b"")
        numbers.append((await ledger.complete(f"{MODEL}:{seq_id}", b"r")).completion)
        await ledger.close()
    assert numbers == sorted(set(numbers))


async def test_pending_and_history_share_out_the_log(ledger: Ledger) -> None:
    for seq_id in (3, 1, 0, 2, 4):
        refusal = Failure("no", "user") if seq_id == 2 else None
        await ledger.append(MODEL, seq_id, "forward_backward", b"", refusal=refusal)
    await ledger.append("other", 0, "sample", b"")
    for seq_id in (1, 0):
        await ledger.complete(f"{MODEL}:{seq_id}", b"r")
    assert [entry.seq_id for entry in await ledger.pending(MODEL)] == [3, 4]
    assert [entry.seq_id for entry in await ledger.history(MODEL, after_seq=-1)] == [0, 1, 2]
    assert [entry.seq_id for entry in await ledger.history(MODEL, after_seq=0)] == [1, 2]
    assert await ledger.pending_streams() == ["other", MODEL]


async def test_an_end_moves_the_model_and_brings_its_records(ledger: Ledger) -> None:
    await ledger.insert(model_record())
    for seq_id, kind in enumerate(("create_model", "save_weights", "save_weights_for_sampler", "unload_model")):
        await ledger.append(MODEL, seq_id, kind, b"")
    path = f"tinker://{MODEL}/weights/a"
    saved = CheckpointRecord(path, MODEL, "training", "a", "alice", "base", LoraConfig(rank=8), "folder", 5, 1.0)
    sampler = SamplerRecord("sampler", "session-1", "alice", "base", None, "folder", 1.0)
    await ledger.complete(f"{MODEL}:0", b"r")
    assert await ledger.get(CheckpointRecord, path) is None
    await ledger.complete(f"{MODEL}:1", b"r", also=[saved, SnapshotRecord(MODEL, 1, "folder", 1.0)])
    model = await ledger.get(ModelRecord, MODEL)
    assert model is not None and (model.applied_seq, model.state) == (1, "live")
    assert await ledger.get(CheckpointRecord, path) == saved
    assert await ledger.get(SnapshotRecord, MODEL, 1) is not None
    await ledger.complete(f"{MODEL}:2", b"r", also=[sampler, CheckpointRecord(**{**fields(saved), "size_bytes": 6})])
    assert await ledger.get(SamplerRecord, "sampler") == sampler
    assert (await ledger.get(CheckpointRecord, path)).size_bytes == 6
    await ledger.complete(f"{MODEL}:3", b"r")
    model = await ledger.get(ModelRecord, MODEL)
    assert model is not None and (model.applied_seq, model.state) == (3, "unloaded")


def fields(record: CheckpointRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


async def test_an_end_and_its_records_are_one(ledger: Ledger) -> None:
    await ledger.insert(model_record())
    await ledger.append(MODEL, 0, "save_weights", b"")
    snapshot = SnapshotRecord(MODEL, 0, "folder", 1.0)
    cannot_be_stored = SnapshotRecord(MODEL, 2**70, "folder", 1.0)
    with pytest.raises(Exception, match=r"large|range"):
        await ledger.complete(f"{MODEL}:0", b"r", also=[snapshot, cannot_be_stored])
    assert await ledger.find(SnapshotRecord, model_id=MODEL) == []
    assert [entry.state for entry in await ledger.pending(MODEL)] == ["accepted"]
    model = await ledger.get(ModelRecord, MODEL)
    assert model is not None and model.applied_seq == -1


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1, 3_000_000])
async def test_blobs_of_every_size_come_back_from_disk(open_ledger: OpenLedger, size: int) -> None:
    payload, outcome = random.Random(size).randbytes(size), random.Random(size + 1).randbytes(size)
    ledger = await open_ledger()
    await ledger.append(MODEL, 0, "sample", payload)
    await ledger.complete(f"{MODEL}:0", outcome)
    await ledger.close()
    ledger = await open_ledger()
    assert await ledger.payload(f"{MODEL}:0") == payload
    assert await ledger.outcome(f"{MODEL}:0") == outcome
    await ledger.close()


async def test_damage_is_an_error_and_not_a_result(tmp_path: Path, open_ledger: OpenLedger, caplog) -> None:
    ledger = await open_ledger()
    await ledger.append(MODEL, 0, "sample", b"x" * (SMALL_BYTES + 1))
    await ledger.close()
    (file,) = (tmp_path / "segments").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"y")
    ledger = await open_ledger()
    with pytest.raises(Corrupt):
        await ledger.payload(f"{MODEL}:0")
    await ledger.close()
    assert "is missing" not in caplog.text
    file.unlink()
    ledger = await open_ledger()
    assert f"{file} is missing; stop and let `tinkercloud fsck {tmp_path}`" in caplog.text
    with pytest.raises(Corrupt, match="length or checksum"):
        await ledger.payload(f"{MODEL}:0")
    await ledger.close()


async def test_unknown_operations_have_nothing(ledger: Ledger) -> None:
    assert await ledger.entry("nobody:0") is None
    assert await ledger.outcome("nobody:0") is None
    with pytest.raises(KeyError, match="nobody:0"):
        await ledger.payload("nobody:0")


async def test_the_order_of_a_model_survives_a_restart(open_ledger: OpenLedger, clock: Clock) -> None:
    refusal = Failure("no", "user")
    ledger = await open_ledger(clock=clock)
    await ledger.insert(model_record())
    kinds = ["create_model", "forward_backward", "optim_step", "forward_backward", "forward_backward"]
    for seq_id, kind in enumerate(kinds):
        await ledger.append(MODEL, seq_id, kind, b"", refusal=refusal if seq_id == 3 else None)
    for seq_id in (0, 1, 2, 4):
        await ledger.complete(f"{MODEL}:{seq_id}", b"r")
    await ledger.append(MODEL, 6, "save_weights", b"")
    await ledger.append(MODEL, 5, "optim_step", b"")
    await ledger.close()
    ledger = await open_ledger()
    log = await ledger.model_log(MODEL)
    assert log.poisoned_by is not None and log.poisoned_by.seq_id == 3
    step, save = log.take(0.0), log.take(0.0)
    assert step is not None and step.clear_gradients and step.failure is not None
    assert save is not None and save.failure is None and save.entry.seq_id == 6
    ended = await ledger.complete(step.entry.request_id, b"r", failed=True, cleared_gradients=True)
    assert ended.cleared_gradients
    assert (await ledger.model_log(MODEL)).poisoned_by is None
    with pytest.raises(KeyError):
        await ledger.model_log("nobody")
    await ledger.close()
