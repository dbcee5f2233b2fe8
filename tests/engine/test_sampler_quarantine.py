"""A step that fails: the request that fails alone is answered with it, and nobody else's tokens change."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.engine.sampler_requests import mixture, prompt_of, run, sample, tokens_of
from tinkercloud.engine.operations import CancelSample, OpenSampler
from tinkercloud.engine.results import Failure

POISON = 13
"""A token id at which the model fails."""


@contextmanager
def checking(base_model, check, at_the_end: bool = False):
    """Let `check(token ids)` raise in the middle of qwen3's forward, when keys have been written (the first
    layer's, or all where there are whole steps), or when the numbers that draw the next tokens have been taken."""
    model = base_model("qwen3")
    layers, hidden_states, second = model._lean._layers, model.hidden_states, model._lean._layers[1]
    step = model._lean.step
    tokens = []

    def note(token_ids, *others, **named):
        tokens.append(token_ids)
        return hidden_states(token_ids, *others, **named)

    def check_first(*inputs, **named):
        check(tokens[-1])
        return second(*inputs, **named)

    def check_step(*inputs):
        hidden = step(*inputs)
        check(tokens[-1])
        return hidden

    model.hidden_states = note
    if at_the_end:
        hook = model.unembedding.register_forward_pre_hook(lambda _, __: check(tokens[-1]))
    else:
        layers[1], model._lean.step = check_first, step and check_step
    try:
        yield
    finally:
        del model.hidden_states
        layers[1], model._lean.step = second, step
        if at_the_end:
            hook.remove()


def fail_at_poison(tokens: torch.Tensor) -> None:
    if (tokens == POISON).any():
        raise IndexError(f"no row {POISON}")


def poisoned(name: str, length: int, at: int, **options):
    prompt = prompt_of(100 + length, length)
    prompt[prompt == POISON] = POISON + 1
    prompt[at] = POISON
    return sample(name, prompt, **options)


def tame(requests):
    """None of them meets the poison, whatever they draw."""
    for request in requests:
        request.prompt[request.prompt == POISON] = POISON + 1
    return requests


def free_of_poison(results) -> dict:
    return {
        name: tokens
        for name, tokens in tokens_of(results).items()
        if all(POISON not in sequence[:-1] for sequence in tokens)
    }


@pytest.mark.parametrize("guilty", [["first"], ["last"], ["first", "middle", "last"]])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_only_the_guilty_fail(guilty, at_the_end, base_model, small_chunks, sampler_of, adapter_folder):
    """Also one that fails in its third chunk, and ones that draw the poison themselves."""
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    innocent = tame(mixture())
    expected = tokens_of(run(sampler, *innocent))
    well = free_of_poison(run(sampler, *innocent))
    assert len(well) >= 4
    bad = {
        "first": poisoned("first", 9, 3, num_samples=3),
        "middle": poisoned("middle", 100, 60, num_samples=2, prompt_logprobs=True),
        "last": poisoned("last", 20, 19),
    }
    requests = list(innocent)
    for name, place in (("last", 9), ("middle", 5), ("first", 0)):
        if name in guilty:
            requests.insert(place, bad[name])
    with checking(base_model, fail_at_poison, at_the_end):
        results = run(sampler, *requests)
    assert set(results) == {request.request_id for request in innocent} | set(guilty)
    for name, result in results.items():
        if name in well:
            assert tokens_of({name: result})[name] == expected[name]
        else:
            assert isinstance(result, Failure) and result.category == "server"
            assert "IndexError: no row 13" in result.error
    assert sampler.pages_used == 0 and not sampler.busy
    assert tokens_of(run(sampler, *innocent)) == expected


def test_memory_that_is_too_small_for_all_is_enough_for_fewer(base_model, sampler_of):
    """A real failure to allocate: nobody is guilty, everybody is answered."""
    sampler = sampler_of("qwen3")
    requests = [sample(f"r{i}", prompt_of(i, 8 + i), num_samples=3, seed=i, prompt_logprobs=True) for i in range(6)]
    expected = tokens_of(run(sampler, *requests))
    most = []

    def allocate(tokens: torch.Tensor) -> None:
        if len(tokens) > 40:
            torch.empty(2**60)
        most.append(len(tokens))

    with checking(base_model, allocate):
        results = run(sampler, *requests)
    assert tokens_of(results) == expected
    assert len(most) > 12, "it took more steps than one for each token"


def test_one_whose_memory_never_suffices_fails_alone(base_model, sampler_of):
    sampler = sampler_of("qwen3")
    small = [sample(f"r{i}", prompt_of(i, 8), num_samples=2) for i in range(5)]
    expected = tokens_of(run(sampler, *small))

    def allocate(tokens: torch.Tensor) -> None:
        if len(tokens) >= 150:
            torch.empty(2**60)

    with checking(base_model, allocate):
        results = run(sampler, *small[:2], sample("large", prompt_of(9, 150), num_samples=4), *small[2:])
    large = results.pop("large")
    assert large.category == "server" and "can't allocate memory" in large.error
    assert tokens_of(results) == expected


def test_suspects_may_be_cancelled_and_others_arrive(base_model, sampler_of):
    sampler = sampler_of("qwen3")
    others = tame([sample(f"r{i}", prompt_of(i, 8), max_tokens=3) for i in range(8)])
    expected = free_of_poison(run(sampler, *others))
    with checking(base_model, fail_at_poison):
        for request in [*others[:4], poisoned("bad", 9, 3)]:
            sampler.submit(request)
        results = dict(sampler.step())
        for name in ("r0", "r1", "bad"):
            sampler.cancel(CancelSample(name))
        results |= run(sampler, *others[4:])
    for name in ("r0", "r1", "bad"):
        assert results.pop(name) == Failure("the sample was cancelled", "user")
        expected.pop(name, None)
    assert free_of_poison({name: result for name, result in results.items() if name in expected}) == expected
    assert len(results) == 6


def test_a_lost_device_ends_the_engine(base_model, sampler_of):
    """Nothing would succeed on it any more, so nobody may be blamed; the control process finds who does it."""

    def lose(tokens: torch.Tensor) -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    sampler = sampler_of("qwen3")
    sampler.submit(sample("r", prompt_of(0, 4)))
    with checking(base_model, lose), pytest.raises(torch.AcceleratorError):
        sampler.step()
    run(sampler)
