"""What is wrong with one request stays with it."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.engine.examples import VOCAB
from tests.engine.sampler_requests import prompt_of, run, sample, tokens_of
from tinkercloud.engine.operations import CancelSample, CloseSampler, OpenSampler
from tinkercloud.engine.results import Done, Failure, SampleOutput


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (sample("bad", prompt_of(0, 3), "nobody"), "no open sampler nobody"),
        (sample("bad", np.array([], dtype=np.int32)), "the prompt is empty"),
        (sample("bad", np.array([1, VOCAB], dtype=np.int32)), f"token id {VOCAB} in the prompt"),
        (sample("bad", np.array([-1, 2], dtype=np.int32)), "token id -1 in the prompt"),
        (sample("bad", prompt_of(0, 200), max_tokens=57), r"200 \+ 57 > 256"),
        (sample("bad", prompt_of(0, 3), max_tokens=0), "max_tokens is 0"),
        (sample("bad", prompt_of(0, 3), num_samples=0), "num_samples is 0"),
        (sample("bad", prompt_of(0, 3), topk_sample_logprobs=VOCAB + 1), "topk_sample_logprobs is 97"),
        (sample("bad", prompt_of(0, 3), temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_a_bad_request_fails_alone(request_, message, sampler_of):
    sampler = sampler_of("qwen3")
    good = sample("good", prompt_of(0, 6))
    alone = tokens_of(run(sampler, good))
    results = run(sampler, request_, good)
    failure = results.pop("bad")
    assert isinstance(failure, Failure) and failure.category == "user"
    assert re.search(message, failure.error)
    assert tokens_of(results) == alone


def test_weights_that_diverged_fail_their_own_requests(sampler_of, adapter_folder, tmp_path):
    """Also those that later get the memory that held their NaN."""
    shutil.copytree(adapter_folder("qwen3"), tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor.mul(1e30) if "v_proj" in name else tensor for name, tensor in weights.items()}, file)
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("nan", str(tmp_path / "nan")))
    good = sample("good", prompt_of(0, 6), num_samples=2)
    alone = tokens_of(run(sampler, good))
    for temperature in (0.0, 1.0):
        bad = sample("bad", prompt_of(1, 40), "nan", num_samples=3, temperature=temperature)
        results = run(sampler, bad, good)
        assert "not finite" in results.pop("bad").error
        assert tokens_of(results) == alone
        assert tokens_of(run(sampler, good)) == alone


def test_an_adapter_that_does_not_load_says_so(sampler_of, tmp_path):
    failure = sampler_of("qwen3").open(OpenSampler("adapter", str(tmp_path / "nothing")))
    assert isinstance(failure, Failure) and "nothing" in failure.error


def test_an_id_keeps_its_weights(sampler_of, adapter_folder):
    sampler = sampler_of("qwen3")
    assert sampler.open(OpenSampler("a", adapter_folder("qwen3"))) == Done()
    assert sampler.open(OpenSampler("a", adapter_folder("qwen3"))) == Done()
    assert "already" in sampler.open(OpenSampler("a")).error
    assert sampler.close(CloseSampler("a")) == sampler.close(CloseSampler("a")) == Done()


request_strategy = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, 300).map(lambda length: prompt_of(length, length)),
        "sampler_id": st.sampled_from(["base", "adapter", "nobody"]),
        "max_tokens": st.integers(0, 40),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 1, 7, 1000]),
        "top_p": st.sampled_from([0.01, 0.9, 1.0]),
        "stop_tokens": st.sampled_from([(), (1,), tuple(range(30))]),
        "num_samples": st.integers(1, 5),
        "prompt_logprobs": st.booleans(),
        "topk_sample_logprobs": st.integers(0, 3),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=8),
    arrivals=st.lists(st.integers(0, 10), min_size=8, max_size=8),
    cancelled=st.dictionaries(st.integers(0, 7), st.integers(0, 30), max_size=2),
    batch=st.integers(1, 9),
)
def test_any_mixture_is_answered(small_chunks, sampler_of, adapter_folder, requests, arrivals, cancelled, batch):
    """Requests arrive and are cancelled while others run in memory for one context: each gets one answer."""
    sampler = sampler_of("qwen3", kv_cache_bytes=1, max_decode_batch=batch)
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    answers: list[str] = []
    step = 0
    while sampler.busy or step <= 10:
        for index, request in enumerate(requests):
            if arrivals[index] == step:
                sampler.submit(sample(str(index), **request))
        for index, at in cancelled.items():
            if at == step:
                sampler.cancel(CancelSample(str(index)))
        for name, result in sampler.step():
            answers.append(name)
            if isinstance(result, SampleOutput):
                assert len(result.sequences) == requests[int(name)]["num_samples"]
                for sequence in result.sequences:
                    assert len(sequence.tokens) == len(sequence.logprobs) <= requests[int(name)]["max_tokens"]
                    assert np.isfinite(sequence.logprobs).all()
        step += 1
    assert sorted(answers) == [str(index) for index in range(len(requests))]
    assert sampler.pages_used == 0
