"""What the sampler records for training, judged by transformers' own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.examples import VOCAB
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OpenSampler, Sample, SamplingParams
from tinkercloud.engine.results import Done, SampleOutput
from tinkercloud.engine.torch.sampler import TorchSampler

TEMPERATURES = (1.0, 0.0, 0.5, 1.7)


def request(number: int, temperature: float, **options) -> Sample:
    prompt = np.random.default_rng(number).integers(0, VOCAB, 5 + 3 * number).astype(np.int32)
    params = SamplingParams(max_tokens=9, seed=number, temperature=temperature, **options)
    return Sample(f"{number}", "base", prompt, params, num_samples=2, record_stability_info=True)


@pytest.fixture
def outputs_of(base_model):
    """The outputs of requests that run together."""

    def run(*requests: Sample, **options) -> list[SampleOutput]:
        model = base_model("qwen3")
        sampler = TorchSampler(model, EngineOptions(name="qwen3", source=model.info.folder, **options))
        assert sampler.open(OpenSampler("base")) == Done()
        for each in requests:
            sampler.submit(each)
        ended: dict[str, SampleOutput] = {}
        while sampler.busy:
            ended.update(sampler.step())
        return [ended[each.request_id] for each in requests]

    return run


@pytest.mark.parametrize("options", [{}, {"logits_bytes": 3 * VOCAB * 4}], ids=["whole", "in parts"])
def test_a_record_is_the_weights_own_distribution_at_any_temperature(outputs_of, model_folder, options):
    """One batch of all temperatures, with and without a record, and with tokens ruled out by top-k."""
    asked = [request(i, temperature, top_k=20 if i % 2 else -1) for i, temperature in enumerate(TEMPERATURES)]
    silent = Sample("silent", "base", asked[2].prompt, asked[2].params, num_samples=2)
    *recorded, unrecorded = outputs_of(*asked, silent, **options)
    plain = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"), dtype=torch.float32).eval()
    for sample, output in zip(asked, recorded, strict=True):
        for sequence in output.sequences:
            tokens = torch.tensor([[*sample.prompt, *sequence.tokens]])
            with torch.no_grad():
                rows = plain(tokens).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
            expected = rows.gather(-1, tokens[0, len(sample.prompt) :, None])[:, 0].numpy()
            assert sequence.policy_logprobs.dtype == np.float32
            np.testing.assert_allclose(sequence.policy_logprobs, expected, atol=1e-5)
            if sample.params.temperature in (0, 1):
                np.testing.assert_array_equal(sequence.policy_logprobs, sequence.logprobs)
            else:
                assert abs(sequence.policy_logprobs - sequence.logprobs).max() > 0.1
    for sequence, twin in zip(unrecorded.sequences, recorded[2].sequences, strict=True):
        assert sequence.policy_logprobs is None, "nobody asked for it"
        np.testing.assert_array_equal(sequence.tokens, twin.tokens)
        np.testing.assert_allclose(sequence.logprobs, twin.logprobs, atol=1e-5)
