"""Who shares a batch with whom changes no token, and nobody waits for longer than they must."""

from __future__ import annotations

import shutil

import numpy as np

from tests.engine.sampler_requests import mixture, prompt_of, run, sample, tokens_of
from tinkercloud.engine.operations import OpenSampler


def test_co_tenants_change_no_token(family, small_chunks, sampler_of, adapter_folder):
    sampler = sampler_of(family)
    sampler.open(OpenSampler("adapter", adapter_folder(family)))
    together = tokens_of(run(sampler, *mixture()))
    for request in mixture():
        assert tokens_of(run(sampler, request)) == {request.request_id: together[request.request_id]}


def test_a_step_is_one_pass_of_all_samplers(family, base_model, sampler_of, adapter_folder, monkeypatch):
    """Of the base's rows and of both adapters', and of the prompt that joins them; so is the drawing."""
    model, sampler = base_model(family), sampler_of(family)
    for number, name in enumerate(("one", "two")):
        sampler.open(OpenSampler(name, adapter_folder(family, number)))
    passes, drawn = [], []
    hidden_states, logits = model.hidden_states, model.logits

    def noted_pass(tokens, positions, attention, lora):
        passes.append((positions.tolist(), [segment.end - segment.start for segment in lora]))
        return hidden_states(tokens, positions, attention, lora)

    def noted_logits(hidden, lora):
        drawn.append((len(hidden), [segment.end - segment.start for segment in lora]))
        return logits(hidden, lora)

    monkeypatch.setattr(model, "hidden_states", noted_pass)
    monkeypatch.setattr(model, "logits", noted_logits)
    lengths = {"two": 5, "base": 9, "one": 14}
    requests = [sample(f"r{n}", prompt_of(n, n), name, seed=n, stop_tokens=()) for name, n in lengths.items()]
    joining = sample("r3", prompt_of(3, 3), "one", seed=3, stop_tokens=())
    for request in requests:
        sampler.submit(request)
    for _ in range(2):
        assert sampler.step() == []
    sampler.submit(joining)
    assert sampler.step() == []
    decoding, joined = [9, 14, 5], [10, 15, 0, 1, 2, 6]
    assert passes[1:] == [
        (decoding + [0] * model.filling(3), [1, 1]),
        (joined + [0] * model.filling(6), [4, 1]),
    ]
    assert drawn[1:] == [(3, [1, 1]), (4, [2, 1])]
    together = tokens_of(run(sampler))
    for request in (*requests, joining):
        assert tokens_of(run(sampler, request)) == {request.request_id: together[request.request_id]}


def test_samples_of_a_request_differ_and_come_again(sampler_of):
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(1, 30), num_samples=8, seed=5)
    first = tokens_of(run(sampler, request))["r"]
    assert len({tuple(tokens) for tokens in first}) == 8
    assert tokens_of(run(sampler, request))["r"] == first
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 30), num_samples=3, seed=5)))["r"] == first[:3]
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 30), num_samples=8, seed=6)))["r"] != first


def test_preemption_changes_no_token(sampler_of, adapter_folder):
    """With memory for a single context, running sequences are interrupted again and again."""
    roomy = sampler_of("llama")
    roomy.open(OpenSampler("adapter", adapter_folder("llama")))
    tight = sampler_of("llama", kv_cache_bytes=1)
    tight.open(OpenSampler("adapter", adapter_folder("llama")))
    requests = [
        sample(f"r{i}", prompt_of(i, 20 + i), ("base", "adapter")[i % 2], seed=i, max_tokens=60, num_samples=2)
        for i in range(8)
    ]
    results = run(tight, *requests)
    assert tokens_of(results) == tokens_of(run(roomy, *requests))
    assert tight.preemptions > 0 == roomy.preemptions


def test_prompt_logprobs_survive_preemption(sampler_of):
    wanted = [sample(f"r{i}", prompt_of(i, 100), max_tokens=100, prompt_logprobs=True, num_samples=2) for i in range(4)]
    tight_sampler = sampler_of("qwen3", kv_cache_bytes=1)
    roomy, tight = run(sampler_of("qwen3"), *wanted), run(tight_sampler, *wanted)
    assert tight_sampler.preemptions > 0
    for request in wanted:
        name = request.request_id
        np.testing.assert_allclose(tight[name].prompt_logprobs, roomy[name].prompt_logprobs, atol=1e-5)


def test_an_open_sampler_is_unmoved_by_its_folder(sampler_of, adapter_folder, tmp_path):
    """Weights are read when it is opened; what happens to the files later does not matter."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder("qwen3"), folder)
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", str(folder)))
    before = tokens_of(run(sampler, sample("r", prompt_of(1, 5), "adapter")))
    shutil.rmtree(folder)
    shutil.copytree(adapter_folder("qwen3", 1), folder)
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 5), "adapter"))) == before
    sampler.open(OpenSampler("new", str(folder)))
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 5), "new"))) != before


def test_short_requests_do_not_wait_for_a_long_one(sampler_of):
    sampler = sampler_of("qwen3")
    sampler.submit(sample("long", prompt_of(0, 8), max_tokens=100))
    for _ in range(10):
        assert sampler.step() == []
    for i in range(15):
        sampler.submit(sample(f"short{i}", prompt_of(i, 8), max_tokens=4 + i % 2))
    ended_at = {}
    for step in range(1, 200):
        for name, _ in sampler.step():
            ended_at[name] = step
        if not sampler.busy:
            break
    assert ended_at == {**{f"short{i}": 4 + i % 2 for i in range(15)}, "long": 90}


def test_a_long_prompt_does_not_stall_the_others(small_chunks, sampler_of):
    """200 tokens take 9 steps of 24, in each of which the running sequence gets its token."""
    sampler = sampler_of("qwen3")
    sampler.submit(sample("running", prompt_of(0, 8), max_tokens=20))
    sampler.step()
    sampler.submit(sample("long", prompt_of(1, 200), max_tokens=1))
    ended_at = {}
    for step in range(2, 40):
        for name, _ in sampler.step():
            ended_at[name] = step
    assert ended_at == {"running": 20, "long": 10}


def test_no_more_sequences_run_than_allowed(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=3)
    requests = [sample(f"r{i}", prompt_of(i, 20), num_samples=1 + i, max_tokens=4) for i in range(5)]
    for request in requests:
        sampler.submit(request)
    results, most = {}, 0
    while sampler.busy:
        results.update(sampler.step())
        most = max(most, sampler.num_running)
    assert most == 3
    assert tokens_of(results) == tokens_of(run(sampler_of("qwen3"), *requests))


def test_a_shared_prompt_takes_its_pages_once(sampler_of):
    sampler = sampler_of("qwen3")
    sampler.submit(sample("r", prompt_of(0, 100), num_samples=8, max_tokens=4))
    sampler.step()
    assert sampler.pages_used == 7
    sampler.step()
    assert sampler.pages_used == 6 + 8
    run(sampler)
