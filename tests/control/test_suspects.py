"""Whose fault it is when an engine dies."""

import asyncio
import os
import signal

import numpy as np
import pytest

from tests.control.conftest import BATCH, NANO, OWNER, Client
from tinkercloud.control import engines
from tinkercloud.control.engine_handle import EngineHandle
from tinkercloud.control.suspects import Lane
from tinkercloud.engine.operations import ForwardBackward, Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput


async def sample(service, sampler, seq_id: int, number: int = 0, max_tokens: int = 300):
    """Sample of a given number: the same number gives the same tokens."""
    params = SamplingParams(max_tokens=max_tokens, seed=number)
    prompt = np.arange(5, 12 + number, dtype=np.int32)
    return await service.samplers.sample(sampler, seq_id, Sample("", sampler.sampler_id, prompt, params))


def tokens_of(result: SampleOutput) -> list[list[int]]:
    assert isinstance(result, SampleOutput), result
    return [sequence.tokens.tolist() for sequence in result.sequences]


@pytest.fixture
def deadly(monkeypatch):
    """A function: from now on, each engine is killed that is asked for an operation with these bytes in it."""
    asked, deadly = EngineHandle._send, []

    def send(self, message):
        asked(self, message)
        operations = getattr(message, "operations", (getattr(message, "operation", b""),))
        if any(part in operation for part in deadly for operation in operations):
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(EngineHandle, "_send", send)
    monkeypatch.setattr(engines, "RESTART_SECONDS", (0.0,))
    return deadly.append


def test_only_what_ends_the_engine_alone_is_failed(serving, run, deadly):
    """A sample that does, then an operation: what runs beside them gives what it gives on every other day."""

    async def story():
        async with serving() as service:
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            losses = await (await Client.create(service)).steps(2)
            entries = [await sample(service, sampler, seq_id, number=seq_id) for seq_id in range(5)]
            expected = [tokens_of(await Client._finished(service, entry)) for entry in entries]
            client = await Client.create(service)

            deadly(f"{sampler.sampler_id}:13".encode())
            entries = [await sample(service, sampler, 100 + number, number) for number in range(5)]
            bad = await sample(service, sampler, 13)
            assert await client.steps(2) == losses
            failure = await Client._finished(service, bad)
            assert isinstance(failure, Failure) and failure.category == "server"
            assert "ran alone" in failure.error
            assert [tokens_of(await Client._finished(service, entry)) for entry in entries] == expected

            deadly(b"importance_sampling")
            entry = await sample(service, sampler, 200)
            operation = ForwardBackward(client.model.model_id, BATCH, "importance_sampling")
            assert "given up" in (await client.result(await client.send("forward_backward", operation))).error
            assert tokens_of(await Client._finished(service, entry)) == expected[0]

    run(story)


def test_a_sampler_is_not_closed_under_its_samples(serving, run):
    """But when the last of them has ended: its session may be parked while they run."""

    async def story():
        async with serving() as service:
            desk = service.models.get(NANO).desk
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            entry = await sample(service, sampler, 0, max_tokens=20)
            while sampler.sampler_id not in desk._opened:
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # the engine has been asked to open it
            await desk.close(sampler.sampler_id)
            assert tokens_of(await Client._finished(service, entry))
            while desk._opened:
                await asyncio.sleep(0)
            assert not desk.runs(sampler.sampler_id) and desk.pending == 0

    run(story)


def test_suspects_run_apart_from_everybody_else(run):
    """And no more of them together than each allows."""

    async def story():
        lane, running, seen = Lane(), [], []

        async def go(name: str, place) -> None:
            async with place:
                running.append(name)
                seen.append(frozenset(running))
                for _ in range(3):
                    await asyncio.sleep(0)
                running.remove(name)

        await asyncio.gather(
            *(go(f"early{i}", lane.together()) for i in range(4)),
            *(go(f"pair{i}", lane.apart(2)) for i in range(4)),
            *(go(f"alone{i}", lane.apart()) for i in range(2)),
            *(go(f"late{i}", lane.together()) for i in range(4)),
        )
        kinds = [{name.rstrip("0123456789") for name in together} for together in seen]
        assert len(seen) == 14 and all(len(kind) == 1 for kind in kinds)
        assert [sorted(kind)[0] for kind in kinds] == ["early"] * 4 + ["pair"] * 4 + ["alone"] * 2 + ["late"] * 4
        assert max(len(together) for together in seen if "pair0" in together or "pair3" in together) == 2
        assert max(len(together) for together in seen if "early3" in together) == 4

    run(story)


def test_a_cancelled_suspect_leaves_the_lane_open(run):
    async def story():
        lane = Lane()
        async with lane.together():
            waiting = asyncio.create_task(lane.apart().__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(5), lane.together(), lane.together():
            pass

    run(story)
