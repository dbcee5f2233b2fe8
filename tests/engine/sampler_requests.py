"""Requests that the sampler's tests make, and running them."""

from __future__ import annotations

import numpy as np

from tests.engine.examples import VOCAB
from tinkercloud.engine.operations import Sample, SamplingParams
from tinkercloud.engine.results import SampleOutput
from tinkercloud.engine.torch.sampler import TorchSampler


def prompt_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def sample(request_id: str, prompt: np.ndarray, sampler_id: str = "base", **options) -> Sample:
    ours = {name: options.pop(name) for name in list(options) if name not in SamplingParams.__struct_fields__}
    params = SamplingParams(**{"max_tokens": 12, "seed": 0, **options})
    return Sample(request_id, sampler_id, prompt, params, **ours)


def run(sampler: TorchSampler, *requests: Sample) -> dict[str, SampleOutput]:
    for request in requests:
        sampler.submit(request)
    results = {}
    while sampler.busy:
        results.update(sampler.step())
    return results


def tokens_of(results: dict[str, SampleOutput]) -> dict[str, list[list[int]]]:
    return {name: [sequence.tokens.tolist() for sequence in result.sequences] for name, result in results.items()}


def assert_same_bits(result: SampleOutput, other: SampleOutput) -> None:
    """Tokens and log-probabilities, and those of the prompt where they were asked for."""
    for one, two in zip(result.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.logprobs, two.logprobs)
    if result.prompt_logprobs is not None:
        np.testing.assert_array_equal(result.prompt_logprobs, other.prompt_logprobs)


def mixture(adapter: str = "adapter") -> list[Sample]:
    return [
        sample(
            f"r{i}",
            prompt_of(i, 1 + 7 * i),
            ("base", adapter)[i % 2],
            seed=i,
            temperature=(1.0, 0.0, 0.7)[i % 3],
            top_k=(-1, 4)[i % 2],
            top_p=(1.0, 0.8)[i // 2 % 2],
            max_tokens=5 + 4 * i,
            num_samples=1 + i % 3,
        )
        for i in range(9)
    ]
