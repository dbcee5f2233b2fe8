"""What two things at once must not do to each other."""

import asyncio
import re

import numpy as np
import pytest

from tests.control.conftest import BATCH, NANO, OWNER, Client
from tinkercloud.engine.operations import ForwardBackward, Sample, SamplingParams
from tinkercloud.engine.results import Failure
from tinkercloud.errors import Overloaded
from tinkercloud.ledger.records import SamplerSaved, WeightsSaved


def save(client, name):
    return client.service.runs.save_weights(client.model, None, name, kind="training", ttl_seconds=None)


def test_requests_without_a_seq_id_never_share_one(shared):
    async def story(service):
        sampler = await service.samplers.unbound(OWNER, NANO, None)
        prompts = [np.arange(5, 7 + length, dtype=np.int32) for length in range(6)]
        params = SamplingParams(max_tokens=2, seed=1)
        entries = await asyncio.gather(
            *(
                service.samplers.sample(
                    sampler, None, Sample("", sampler.sampler_id, prompt, params, prompt_logprobs=True)
                )
                for prompt in prompts
            )
        )
        assert len({entry.request_id for entry in entries}) == 6
        for prompt, entry in zip(prompts, entries, strict=True):
            assert len((await Client._finished(service, entry)).prompt_logprobs) == len(prompt)
        client = await Client.create(service)
        entries = await asyncio.gather(save(client, "one"), save(client, "two"))
        saved = [await Client._finished(service, entry) for entry in entries]
        assert [path.path.rpartition("/")[2] for path in saved] == ["one", "two"]
        assert all(isinstance(path, WeightsSaved) for path in saved)
        for number in range(5):
            operation = ForwardBackward(client.model.model_id, BATCH, "cross_entropy")
            batch = service.runs.submit(client.model, None, "forward_backward", operation)
            entries = await asyncio.gather(save(client, f"beside{number}"), batch, save(client, None))
            assert [entry.kind for entry in entries] == ["save_weights", "forward_backward", "save_weights"]
            unnamed = await Client._finished(service, entries[2])
            assert unnamed.path.endswith(f"/{entries[2].seq_id:06d}")

    shared(story)


def test_an_operation_that_meets_an_unloading_engine_runs_on_the_next_one(shared):
    async def story(service):
        client = await Client.create(service)
        served = service.models.get(NANO)
        await served.conductor.park_all()
        _, loss = await asyncio.gather(served.engine.stop(), client.forward_backward())
        assert not isinstance(loss, Failure)

    shared(story)


def test_a_model_is_withdrawn_while_operations_arrive(serving, run):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            await client.forward_backward()
            operation = ForwardBackward(client.model.model_id, BATCH, "cross_entropy")
            await client.send("forward_backward", operation)
            await asyncio.wait_for(service.models.withdraw(NANO), 60)
            assert NANO not in service.models

    run(story)


def test_what_is_wrong_with_one_run_is_its_own(shared, monkeypatch):
    """A stored operation that cannot be read fails; the runs beside it and the operations behind it go on."""

    async def story(service):
        damaged, sound = await Client.create(service), await Client.create(service)
        payload = service._ledger.payload

        async def with_a_damaged_one(request_id):
            if request_id == f"{damaged.model.model_id}:1":
                raise KeyError("a damaged segment")
            return await payload(request_id)

        monkeypatch.setattr(service._ledger, "payload", with_a_damaged_one)
        first, _ = await asyncio.gather(damaged.forward_backward(), sound.steps(2))
        assert isinstance(first, Failure) and first.category == "server"
        await damaged.optim_step()  # fails: the gradient lacks the first batch
        assert await damaged.steps(1)

    shared(story)


def test_what_waits_behind_an_unload_fails(shared):
    async def story(service):
        client = await Client.create(service)
        unloading = await service.runs.unload(client.model)
        client.seq_id += 1
        behind = await client.send("forward_backward", ForwardBackward(client.model.model_id, BATCH, "cross_entropy"))
        await client.result(unloading)
        assert isinstance(await client.result(behind), Failure)

    shared(story)


def test_a_samplers_id_is_never_given_other_weights(shared):
    async def story(service):
        client = await Client.create(service)
        for expected in (SamplerSaved, Failure):
            client.seq_id += 1
            entry = await service.runs.save_ephemeral_sampler(client.model, client.seq_id, 0)
            assert isinstance(await client.result(entry), expected)

    shared(story)


def test_a_sample_that_waits_for_a_place_says_so(shared):
    async def story(service):
        sampler = await service.samplers.unbound(OWNER, NANO, None)
        prompt = np.arange(5, 9, dtype=np.int32)

        def send(num_samples):
            params = SamplingParams(max_tokens=1500, seed=1)
            return service.samplers.sample(sampler, None, Sample("", sampler.sampler_id, prompt, params, num_samples))

        places = service.models.get(NANO).engine.options.max_decode_batch
        running, waiting = await send(places + 1), await send(2)
        while await service.futures.paused(running) is not None:  # its prompt is being read
            await asyncio.sleep(0.01)
        while (why := await service.futures.paused(waiting)) is None:
            await asyncio.sleep(0.01)
        assert re.match(rf"\d+ sequences wait for {NANO}, which draws {places} at a time", why)
        assert await service.futures.paused(running) is None
        for sample in (running, waiting):
            await service.samplers.cancel(sample.request_id, OWNER)
            ended = await service._ledger.entry(sample.request_id)
            assert ended.state == "failed", "whatever happens to the engine and the server from now on"
            assert isinstance(await Client._finished(service, sample), Failure)

    shared(story)


def test_prompts_of_one_owner_are_not_found_by_another(shared):
    """Of the base model, which all sample from."""

    async def story(service):
        prompt, params = np.arange(100, 200, dtype=np.int32), SamplingParams(max_tokens=1, seed=1)
        hits = []
        for owner in (OWNER, "another", OWNER):
            sampler = await service.samplers.unbound(owner, NANO, None)
            sent = await service.samplers.sample(sampler, None, Sample("", sampler.sampler_id, prompt, params))
            _, outcome = await service.futures.outcome(sent.request_id, owner, timeout=60)
            hits.append(outcome.prompt_cache_hit_tokens)
        assert hits == [0, 0, 99]

    shared(story)


def test_sequences_are_counted_when_too_many_wait(serving, run):
    """`num_samples` of all requests, also of those that are on their way to the disk; another session has its share."""

    async def story():
        async with serving(max_pending_samples=10) as service:
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            desk = service.models.get(NANO).desk
            prompt, params = np.arange(5, 9, dtype=np.int32), SamplingParams(max_tokens=8, seed=1)

            def send(num_samples, of=sampler):
                return service.samplers.sample(of, None, Sample("", of.sampler_id, prompt, params, num_samples))

            session = (await Client.create(service)).session
            other = await service.samplers.create(session, 0, NANO, None)

            sent = await asyncio.gather(*(send(4) for _ in range(3)), return_exceptions=True)
            accepted = [entry for entry in sent if not isinstance(entry, Overloaded)]
            assert len(accepted) == 2 and desk.pending == 8
            accepted.append(await send(4, other))
            for refused in (send(2, other), send(1)):
                with pytest.raises(Overloaded, match="12 sequences wait"):
                    await refused
            for entry in accepted:
                assert len((await Client._finished(service, entry)).sequences) == 4
            while desk.pending:
                await asyncio.sleep(0)
            alone = await send(30)  # one that is more than may wait is taken when nothing waits
            with pytest.raises(Overloaded):
                await send(1)
            assert len((await Client._finished(service, alone)).sequences) == 30

    run(story)
