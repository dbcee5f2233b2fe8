"""The sampler, judged by transformers' own forward and generate, and by peft for adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.counting import fits
from tests.engine.sampler_requests import prompt_of, run, sample
from tests.engine.test_sampling import reference_probabilities
from tinkercloud.engine.operations import OpenSampler, Sample
from tinkercloud.engine.results import Done, SampleOutput


def full_logits(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]


def assert_logprobs(model, request: Sample, output: SampleOutput) -> None:
    """Each sampled logprob is the full forward's at the request's temperature."""
    temperature = request.params.temperature or 1.0
    n = len(request.prompt)
    for sequence in output.sequences:
        tokens = np.concatenate([request.prompt, sequence.tokens])
        expected = torch.log_softmax(full_logits(model, tokens)[n - 1 : -1] / temperature, -1)
        chosen = expected.gather(-1, torch.from_numpy(sequence.tokens.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(sequence.logprobs, chosen, atol=1e-5)


def test_greedy_is_generate_for_ragged_requests_of_base_and_adapters(family, sampler_of, reference, adapter_folder):
    sampler = sampler_of(family)
    adapters = {"base": "", "one": adapter_folder(family, 0), "two": adapter_folder(family, 1)}
    for name in ("one", "two"):
        assert sampler.open(OpenSampler(name, adapters[name])) == Done()
    requests = [
        sample(f"{name}-{length}", prompt_of(length, length), name, temperature=0, max_tokens=20)
        for length in (1, 3, 16, 17, 40)
        for name in adapters
    ]
    results = run(sampler, *requests)
    told_apart = set()
    for request in requests:
        model = reference(family, adapters[request.sampler_id])
        expected = model.generate(
            input_ids=torch.from_numpy(request.prompt.astype(np.int64))[None],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(request.prompt) :]
        (sequence,) = results[request.request_id].sequences
        assert sequence.tokens.tolist() == expected.tolist()
        assert sequence.stop_reason == "length"
        assert_logprobs(model, request, results[request.request_id])
        told_apart.add(tuple(sequence.tokens.tolist()))
    assert len(told_apart) == len(requests)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_sampled_logprobs(family, temperature, sampler_of, reference, adapter_folder):
    sampler = sampler_of(family)
    sampler.open(OpenSampler("adapter", adapter_folder(family)))
    requests = [
        sample(f"{name}{n}", prompt_of(n, n), name, temperature=temperature, top_k=5, top_p=0.9, seed=n, max_tokens=30)
        for n in (2, 21)
        for name in ("base", "adapter")
    ]
    results = run(sampler, *requests)
    for request in requests:
        adapter = adapter_folder(family) if request.sampler_id == "adapter" else ""
        assert_logprobs(reference(family, adapter), request, results[request.request_id])


def test_top_logprobs_of_samples(sampler_of, reference):
    request = sample("r", prompt_of(1, 9), temperature=0.7, topk_sample_logprobs=4)
    other = sample("other", prompt_of(2, 5), topk_sample_logprobs=7)
    results = run(sampler_of("qwen3"), request, other)
    (sequence,) = results["r"].sequences
    logits = full_logits(reference("qwen3"), np.concatenate([request.prompt, sequence.tokens]))[8:-1]
    values, ids = torch.log_softmax(logits / 0.7, -1).topk(4)
    np.testing.assert_array_equal(sequence.top_logprobs.token_ids, ids)
    np.testing.assert_allclose(sequence.top_logprobs.logprobs, values, atol=1e-5)
    assert results["other"].sequences[0].top_logprobs.logprobs.shape == (12, 7)


@pytest.mark.parametrize("logits_bytes", [1, 64 * 2**20])
def test_prompt_logprobs_are_the_raw_models(logits_bytes, small_chunks, sampler_of, reference, adapter_folder):
    """Also of a prompt that is prefilled in several steps, and in chunks of a single row of logits."""
    sampler = sampler_of("qwen3", logits_bytes=logits_bytes)
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    wanted = dict(prompt_logprobs=True, topk_prompt_logprobs=3, temperature=0.3, max_tokens=1)
    requests = [
        sample("base", prompt_of(3, 255), **wanted),
        sample("adapter", prompt_of(4, 20), "adapter", num_samples=3, **wanted),
        sample("short", prompt_of(5, 1), **wanted),
        sample("without", prompt_of(6, 7)),
    ]
    results = run(sampler, *requests)
    for request in requests[:3]:
        adapter = adapter_folder("qwen3") if request.sampler_id == "adapter" else ""
        expected = torch.log_softmax(full_logits(reference("qwen3", adapter), request.prompt), -1)[:-1]
        result = results[request.request_id]
        assert np.isnan(result.prompt_logprobs[0]) and result.prompt_logprobs.shape == request.prompt.shape
        chosen = expected.gather(-1, torch.from_numpy(request.prompt[1:].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(result.prompt_logprobs[1:], chosen, atol=1e-5)
        values, ids = expected.topk(3)
        np.testing.assert_array_equal(result.prompt_top_logprobs.token_ids[1:], ids)
        np.testing.assert_allclose(result.prompt_top_logprobs.logprobs[1:], values, atol=1e-5)
        assert (result.prompt_top_logprobs.logprobs[0] == -99999).all()
    assert results["without"].prompt_logprobs is None and results["without"].prompt_top_logprobs is None


def test_samples_are_spread_as_the_model_says(sampler_of, reference):
    """Chi-square of the first tokens of 400 samples of each request, most of them wide apart in the queue."""
    ways = ({"temperature": 0.8, "top_k": 6}, {"temperature": 1.4, "top_p": 0.7}, {"temperature": 0.5})
    requests = [sample(f"r{i}", prompt_of(3, 20), num_samples=400, max_tokens=1, **way) for i, way in enumerate(ways)]
    results = run(sampler_of("qwen3"), *requests)
    logits = full_logits(reference("qwen3"), requests[0].prompt)[-1]
    for request in requests:
        tokens = [int(sequence.tokens[0]) for sequence in results[request.request_id].sequences]
        expected = 400 * reference_probabilities(logits, request.params).numpy()
        observed = np.bincount(tokens, minlength=len(expected))
        assert observed[expected == 0].sum() == 0
        assert fits(observed[expected > 0], expected[expected > 0]), request.params


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.3, 1.8])
def test_a_temperature_scales_the_differences_of_logprobs(temperature, sampler_of):
    """log p_T(i) - log p_T(j) = (log p_1(i) - log p_1(j)) / T of sampled tokens, p_1 being the prompt's scores."""
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(7, 15), num_samples=60, max_tokens=1, temperature=temperature, seed=3)
    drawn = {int(one.tokens[0]): one.logprobs[0] for one in run(sampler, request)["r"].sequences}
    assert len(drawn) > 5
    prompts = {token: np.append(request.prompt, token).astype(np.int32) for token in drawn}
    scored = run(
        sampler, *(sample(f"{t}", prompt, max_tokens=1, prompt_logprobs=True) for t, prompt in prompts.items())
    )
    plain = {token: scored[f"{token}"].prompt_logprobs[-1] for token in drawn}
    for i in drawn:
        for j in drawn:
            assert abs((drawn[i] - drawn[j]) - (plain[i] - plain[j]) / temperature) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("record", [False, True])
def test_raw_logprobs_are_the_raw_models_at_any_temperature(temperature, record, sampler_of, reference):
    """Beside a request with tempered ones, which draws the same tokens; a record keeps both."""
    options = dict(temperature=temperature, top_k=20, seed=4, topk_sample_logprobs=3, num_samples=2)
    raw = sample("raw", prompt_of(8, 9), raw_logprobs=True, record_stability_info=record, **options)
    results = run(sampler_of("qwen3"), raw, sample("tempered", prompt_of(8, 9), **options))
    for one, other in zip(results["raw"].sequences, results["tempered"].sequences, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        rows = full_logits(reference("qwen3"), np.concatenate([raw.prompt, one.tokens]))[8:-1].log_softmax(-1)
        chosen = rows.gather(-1, torch.from_numpy(one.tokens.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(one.logprobs, chosen, atol=1e-5)
        np.testing.assert_allclose(one.top_logprobs.logprobs, rows.topk(3).values, atol=1e-5)
        if record:
            np.testing.assert_array_equal(one.policy_logprobs, one.logprobs)
            np.testing.assert_array_equal(one.drawing_logprobs, other.logprobs)
        else:
            assert one.policy_logprobs is None and one.drawing_logprobs is None
