"""Weights that samplers share change while they sample: what is cached stays, what comes after is of the new ones."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tests.engine.sampler_requests import prompt_of, run, sample, tokens_of
from tinkercloud.engine.operations import CloseSampler, OpenSampler
from tinkercloud.engine.results import Done

SWITCH = 6
"""Tokens that a sequence has when its weights change."""


def inflight(sampler, adapter_folder, number: int, sampler_id: str = "a") -> None:
    assert sampler.open(OpenSampler(sampler_id, adapter_folder("qwen3", number), "run")) == Done()


def switched(sampler, adapter_folder, request):
    """The request's output when the second adapter comes after `SWITCH` tokens."""
    sampler.submit(request)
    for _ in range(SWITCH):
        assert sampler.step() == []
    inflight(sampler, adapter_folder, 1, "b")
    while sampler.busy:
        ended = dict(sampler.step())
    return ended[request.request_id]


@torch.no_grad()
def test_a_running_sequence_goes_on_with_new_weights_and_the_cache_that_it_has(sampler_of, adapter_folder, reference):
    sampler = sampler_of("qwen3")
    inflight(sampler, adapter_folder, 0)
    prompt = prompt_of(3, 20)
    output = switched(sampler, adapter_folder, sample("r", prompt, "a", seed=4, stop_tokens=()))
    tokens, given = output.sequences[0].tokens, output.sequences[0].logprobs
    old, new = (reference("qwen3", adapter_folder("qwen3", number)) for number in (0, 1))
    first = old(torch.tensor([[*prompt, *tokens[: SWITCH - 1]]]), use_cache=True)
    rest = new(torch.tensor([tokens[SWITCH - 1 : -1]]), past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat((first.logits[0, len(prompt) - 1 :], rest.logits[0]))
    expected = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_what_is_recorded_is_of_the_weights_that_drew_each_token(sampler_of, adapter_folder):
    """The log-probabilities at temperature 1 are those of a request that draws the same tokens at temperature 1."""
    sampler = sampler_of("qwen3")
    inflight(sampler, adapter_folder, 0)
    cold = sample("r", prompt_of(3, 20), "a", temperature=0.0, stop_tokens=(), record_stability_info=True)
    hot = sample("s", prompt_of(3, 20), "a", temperature=1e-6, stop_tokens=(), record_stability_info=True)
    outputs = []
    for request in (cold, hot):
        inflight(sampler, adapter_folder, 0)
        outputs.append(switched(sampler, adapter_folder, request).sequences[0])
    assert outputs[0].tokens.tolist() == outputs[1].tokens.tolist()
    np.testing.assert_allclose(outputs[0].policy_logprobs, outputs[1].policy_logprobs, atol=1e-5)
    assert np.abs(outputs[1].policy_logprobs - outputs[1].logprobs).max() > 0.01


def test_nothing_is_found_that_older_weights_have_computed(sampler_of, adapter_folder):
    """Neither of prompts nor of what was drawn, also by a sequence that went on with the new ones."""
    sampler = sampler_of("qwen3")
    inflight(sampler, adapter_folder, 0)
    prompt = prompt_of(3, 40)
    request = sample("r", prompt, "a", max_tokens=40, stop_tokens=())
    run(sampler, request)
    assert run(sampler, request)["r"].prompt_cache_hit_tokens == 39
    drawn = switched(sampler, adapter_folder, request).sequences[0].tokens
    turn = sample("r", np.concatenate([prompt, drawn, prompt_of(4, 5)]).astype(np.int32), "a")
    alone = sampler_of("qwen3")
    inflight(alone, adapter_folder, 1)
    found, expected = (run(one, turn)["r"] for one in (sampler, alone))
    assert found.prompt_cache_hit_tokens == 0
    np.testing.assert_array_equal(found.sequences[0].logprobs, expected.sequences[0].logprobs)


def test_equal_weights_that_are_saved_again_begin_anew(sampler_of, adapter_folder, tmp_path):
    """Another save is another folder; to open the same one again, as after a restart, is no save."""
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(3, 40), "a", stop_tokens=())
    copies = [str(shutil.copytree(adapter_folder("qwen3"), tmp_path / name)) for name in ("first", "second")]
    found, drawn = [], []
    for folder in (copies[0], copies[0], copies[1]):
        assert sampler.open(OpenSampler("a", folder, "run")) == Done()
        output = run(sampler, request)["r"]
        found.append(output.prompt_cache_hit_tokens)
        drawn.append(output.sequences[0].tokens.tolist())
    assert found == [0, 39, 0] and drawn == drawn[:1] * 3
    kept = sampler.pages_kept
    sampler.close(CloseSampler("a"))
    assert kept > 0 == sampler.pages_kept


@pytest.mark.parametrize("opened_again", ["a", "b"])
def test_samplers_share_weights_until_the_last_has_closed(sampler_of, adapter_folder, opened_again):
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("snapshot", adapter_folder("qwen3", 0)))
    sampler.open(OpenSampler("newer snapshot", adapter_folder("qwen3", 1)))
    inflight(sampler, adapter_folder, 0, "a")
    inflight(sampler, adapter_folder, 0, "b")

    def drawn(name: str) -> list[list[int]]:
        return tokens_of(run(sampler, sample("r", prompt_of(1, 9), name)))["r"]

    old, new = drawn("snapshot"), drawn("newer snapshot")
    assert drawn("a") == drawn("b") == old != new
    inflight(sampler, adapter_folder, 1, opened_again)
    assert drawn("a") == drawn("b") == new and drawn("snapshot") == old
    sampler.close(CloseSampler("a"))
    assert drawn("b") == new
    sampler.close(CloseSampler("b"))
    inflight(sampler, adapter_folder, 0, "a")
    assert drawn("a") == old
