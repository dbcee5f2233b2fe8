"""A commit reaches the disk and its answer does not reach the server: what was recorded runs, and runs once."""

import contextlib

import numpy as np
import pytest

from tests.control.conftest import BATCH, NANO, OWNER, Client
from tinkercloud.control import conductor, sampler_desk
from tinkercloud.engine.operations import ForwardBackward, LoraConfig, Sample, SamplingParams
from tinkercloud.engine.results import SampleOutput
from tinkercloud.errors import NotFound


@pytest.fixture
def losing(monkeypatch):
    """`with losing(service, name)`: the answer of the next write by that method of the ledger is lost."""

    @contextlib.contextmanager
    def lose(service, name):
        write = getattr(service._ledger, name)

        async def lost(*arguments, **options):
            monkeypatch.setattr(service._ledger, name, write)
            await write(*arguments, **options)
            service._ledger._doubt()
            raise OSError("the answer was lost")

        monkeypatch.setattr(service._ledger, name, lost)
        yield
        assert getattr(service._ledger, name) == write, "nothing was written"

    return lose


async def twice(losing, service, request):
    """What a client gets that repeats a request, since the answer of the first was lost."""
    with losing(service, "append"), pytest.raises(OSError, match="lost"):
        await request()
    entry = await request()
    assert entry.repeated
    return await Client._finished(service, entry)


def test_a_repeat_runs_what_was_recorded_and_handed_to_nobody(shared, losing, undisturbed):
    async def story(service):
        first = await Client.create(service)
        await twice(
            losing, service, lambda: service.runs.create(first.session, 1, NANO, LoraConfig(rank=4, seed=0), {})
        )
        client = Client(service, first.session, await service.runs.live(f"{first.session.session_id}:train:1", OWNER))
        batch = ForwardBackward(client.model.model_id, BATCH, "cross_entropy")
        await service.runs.refuse(client.model, 1, "optim_step", "no such thing")
        with losing(service, "append"), pytest.raises(OSError, match="lost"):
            await service.runs.refuse(client.model, 2, "optim_step", "no such thing")
        assert (await service.runs.refuse(client.model, 2, "optim_step", "no such thing")).state == "refused"
        output = await twice(losing, service, lambda: service.runs.submit(client.model, 3, "forward_backward", batch))
        assert output.metrics["loss:sum"] == undisturbed[0]
        client.seq_id = 3
        await client.optim_step()
        assert await client.steps(1) == undisturbed[1:2]

        sampler = await service.samplers.unbound(OWNER, NANO, None)
        operation = Sample(
            "", sampler.sampler_id, np.arange(5, 9, dtype=np.int32), SamplingParams(max_tokens=2, seed=1)
        )
        result = await twice(losing, service, lambda: service.samplers.sample(sampler, 3_000_000_000, operation))
        assert isinstance(result, SampleOutput)

    shared(story)


def test_what_nobody_repeats_is_taken_up_too(shared, losing):
    """An unload and a sample without a seq_id, whose repeats would be other operations."""

    async def story(service):
        client = await Client.create(service)
        sampler = await service.samplers.unbound(OWNER, NANO, None)
        operation = Sample(
            "", sampler.sampler_id, np.arange(5, 9, dtype=np.int32), SamplingParams(max_tokens=2, seed=1)
        )
        for request in (
            lambda: service.samplers.sample(sampler, None, operation),
            lambda: service.runs.unload(client.model),
        ):
            with losing(service, "append"), pytest.raises(OSError, match="lost"):
                await request()
        (sample,) = await service._ledger.pending(sampler.sampler_id)
        (unload,) = await service._ledger.pending(client.model.model_id)
        await service.models.take_up()
        for entry in (sample, unload):
            await Client._finished(service, entry)
        with pytest.raises(NotFound):
            await service.runs.live(client.model.model_id, OWNER)
        await service.models.take_up()

    shared(story)


def test_what_the_ledger_holds_as_ended_is_not_applied_again(shared, losing, undisturbed, monkeypatch):
    monkeypatch.setattr(conductor, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(sampler_desk, "RETRY_SECONDS", 0.01)

    async def story(service):
        client = await Client.create(service)
        for loss in undisturbed[:2]:
            assert (await client.forward_backward()).metrics["loss:sum"] == loss
            with losing(service, "complete"):
                await client.optim_step()
        assert (await client.forward_backward()).metrics["loss:sum"] == undisturbed[2]

        async def saved(number: int) -> str:
            client.seq_id += 1
            save = service.runs.save_ephemeral_sampler(client.model, client.seq_id, number, inflight=True)
            return (await client.result(await save)).sampling_session_id

        await saved(0)
        with losing(service, "complete"):
            newest = await saved(1)
        assert (await service.models.get(NANO).desk.inflight.newest(client.model.model_id)).sampler_id == newest
        with losing(service, "complete"):
            await client.result(await service.runs.unload(client.model))
        assert not service.models.get(NANO).conductor.has(client.model.model_id)

    shared(story)
