"""What an operation counts as, in the ledger's usage."""

import time

import numpy as np

from tests.control.conftest import NANO, OWNER, Client, datum
from tinkercloud.control.metering import tokens_of
from tinkercloud.engine.operations import ForwardBackward, Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampledSequence, SampleOutput
from tinkercloud.ledger.records import Entry


def test_batches_prompts_and_samples_count_for_their_owner(shared):
    async def story(service):
        client = await Client.create(service)
        batch = (datum(*range(5, 16)),)
        await client.forward_backward(batch)
        await client.optim_step()
        forward = ForwardBackward(client.model.model_id, batch, "cross_entropy", forward_only=True)
        await client.result(await client.send("forward", forward))
        sampler = await service.samplers.create(client.session, 0, NANO, None)
        prompt = np.arange(5, 55, dtype=np.int32)
        for _ in range(2):
            sample = Sample("", sampler.sampler_id, prompt, SamplingParams(max_tokens=4, seed=1), num_samples=3)
            drawn = await Client._finished(service, await service.samplers.sample(sampler, None, sample))

        now = time.time()
        used = [
            usage
            for usage in await service._ledger.accounts.usage(now - 7200, now, OWNER)
            if usage.session_id == client.session.session_id
        ]
        sums = {}
        for usage in used:
            assert usage.base_model == NANO
            sums[usage.model_id, usage.kind] = sums.get((usage.model_id, usage.kind), 0) + usage.tokens
        assert sums == {
            (client.model.model_id, "train"): 20,
            (sampler.sampler_id, "prefill"): 2 * 50 - drawn.prompt_cache_hit_tokens,
            (sampler.sampler_id, "cached"): drawn.prompt_cache_hit_tokens,
            (sampler.sampler_id, "sample"): 2 * 3 * 4,
        }

    shared(story)


def test_of_a_prompt_what_was_remembered_is_not_prefilled():
    entry = Entry("r", "s", 0, "sample", "accepted", 50, 0.0)
    output = SampleOutput((SampledSequence(np.arange(3), np.zeros(3), "stop"),), prompt_cache_hit_tokens=16)
    assert tokens_of(entry, output) == {"prefill": 34, "cached": 16, "sample": 3}
    assert tokens_of(entry, Failure("no", "user")) == {}
