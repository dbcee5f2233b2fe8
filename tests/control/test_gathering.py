"""For whom a cycle waits, and how long; and that operations sent together run together."""

import asyncio

import pytest

from tests.control.conftest import BATCH, Client
from tinkercloud.control.engine_handle import EngineHandle
from tinkercloud.control.gathering import LEAST, MOST, SHARE, Gathering
from tinkercloud.engine.operations import ForwardBackward


@pytest.fixture
def gathering() -> Gathering:
    return Gathering()


def test_a_run_alone_waits_for_nothing(gathering):
    gathering.answered({"a"}, num_tokens=100, began=0.0, ended=10.0)
    with gathering.arriving("a"):  # its own next operation would not run in this cycle
        assert gathering.deadline({"a"}, since=10.0) == 10.0
    assert gathering.deadline(set(), since=10.0) == 10.0


def test_what_is_being_recorded_is_waited_for_until_it_is_there(gathering):
    with gathering.arriving("b"), gathering.arriving("b"):
        assert gathering.deadline({"a"}, since=5.0) == 5.0 + LEAST
        assert gathering.deadline({"a", "b"}, since=5.0) == 5.0
    assert gathering.deadline({"a"}, since=5.0) == 5.0


def test_runs_of_the_last_cycle_are_waited_for_a_part_of_what_it_took(gathering):
    gathering.answered({"a", "b"}, num_tokens=100, began=10.0, ended=10.1)
    assert gathering.deadline({"a"}, since=10.102) == pytest.approx(10.1 + 0.1 * SHARE)
    assert gathering.deadline({"a", "b"}, since=10.102) == 10.102
    assert gathering.deadline({"c"}, since=20.0) == 20.0, "who sent nothing right after it is not expected any more"
    gathering.answered({"a", "b"}, num_tokens=0, began=10.2, ended=10.3)  # steps: their passes say what time is worth
    assert gathering.deadline({"a"}, since=10.302) == pytest.approx(10.31)
    gathering.answered({"a", "b"}, num_tokens=100, began=20.0, ended=90.0)
    assert gathering.deadline({"a"}, since=90.0) == 90.0 + MOST
    gathering.answered({"a"}, num_tokens=100, began=100.0, ended=110.0)
    assert gathering.deadline({"a"}, since=110.0) == 110.0, "who stayed away once is not waited for again"


def test_operations_that_are_sent_together_run_together(serving, run, monkeypatch):
    """Though the first is recorded long before the last."""
    monkeypatch.setattr("tinkercloud.control.gathering.LEAST", 30.0)
    cycles = []
    run_cycle = EngineHandle.run_cycle

    async def noted(self, operations):
        cycles.append(len(operations))
        return await run_cycle(self, operations)

    async def story():
        async with serving() as service:
            clients = [await Client.create(service, seed) for seed in range(4)]
            append, recorded = service._ledger.append, asyncio.Event()

            async def slowly(model_id, *arguments, **options):
                if model_id != clients[0].model.model_id:
                    await recorded.wait()
                return await append(model_id, *arguments, **options)

            monkeypatch.setattr(service._ledger, "append", slowly)
            monkeypatch.setattr(EngineHandle, "run_cycle", noted)
            operations = [ForwardBackward(client.model.model_id, BATCH, "cross_entropy") for client in clients]

            async def send(client, operation):
                with service.runs.arriving(client.model):
                    return await client.send("forward_backward", operation)

            sends = [asyncio.create_task(send(*each)) for each in zip(clients, operations, strict=True)]
            await sends[0]
            for _ in range(1000):  # turns of the event loop, a few of which would begin a cycle
                await asyncio.sleep(0)
            assert not cycles
            recorded.set()
            for client, entry in zip(clients, await asyncio.gather(*sends), strict=True):
                await client.result(entry)
            assert cycles == [4]

    run(story)
