"""Prompts of models with linear attention that begin alike: states are copied on the way and gone on from, and nobody
sees in a sample whether its prompt was in the cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.engine import reference
from tests.engine.families.conftest import every_day
from tests.engine.precision import assert_logprobs
from tests.engine.sampler_requests import assert_same_bits, prompt_of, run, sample
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CancelSample, CloseSampler, OpenSampler
from tinkercloud.engine.torch.attention import State
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.state_cache import StateCache

HYBRIDS = [one for one in every_day("qwen3_5") if one.values[0] in ("qwen3_5", "qwen3_5_moe", "qwen3_next")]
STATE_TOKENS = 48
"""States are copied where a turn of 24 tokens ends that is the end of a page too."""


@pytest.fixture(params=HYBRIDS)
def family(request):
    return request.param


@pytest.fixture
def sampler_of(family, base_model, small_chunks):
    """**options -> a sampler of the base model, which prefills in small chunks; afterwards it holds no page, no state,
    and when it is closed no copy."""
    samplers = []

    def make(**options) -> TorchSampler:
        model = base_model(family)
        sampler = TorchSampler(model, EngineOptions(name=family, source=model.info.folder, **options))
        sampler.open(OpenSampler("base", ""))
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        assert (sampler.pages_used, sampler.states_used) == (0, 0)
        sampler.close(CloseSampler("base"))
        assert sampler.pages_kept == 0
        assert len(sampler._states._free) == sampler._states.slots


@pytest.fixture
def rows_run(family, base_model, monkeypatch):
    """Tokens that run in each step."""
    model, rows = base_model(family), []
    filling = model.filling

    def counted(tokens: int) -> int:
        rows.append(tokens)
        return filling(tokens)

    monkeypatch.setattr(model, "filling", counted)
    return rows


@pytest.mark.parametrize("requests", [8, 1])
def test_samples_of_one_prompt_compute_it_once(requests, family, sampler_of, rows_run):
    """As many requests as one with as many samples, all at once; each computes the rest of the last page."""
    asked = [sample(f"r{i}", prompt_of(0, 100), seed=i, num_samples=8 // requests) for i in range(requests)]
    sampler = sampler_of()
    del rows_run[:]
    results = run(sampler, *asked)
    assert rows_run[:4] == [24, 24, 24, 24]
    assert sum(rows_run) == 96 + 8 * (4 + 11), "the last drawn token never runs"
    hits = sorted(result.prompt_cache_hit_tokens for result in results.values())
    assert hits == [0] + [96] * (requests - 1)
    for request in asked:
        (alone,) = run(sampler_of(), request).values()
        assert_same_bits(results[request.request_id], alone)


@pytest.mark.parametrize("places", [4, 16])
def test_also_with_fewer_places_than_samples(places, sampler_of, rows_run):
    """The copy is there for those that start when the first have ended, at different times."""
    sampler = sampler_of(max_decode_batch=places)
    asked = [sample(f"r{i}", prompt_of(0, 200), seed=i, max_tokens=3 + 5 * (i % 4)) for i in range(32)]
    del rows_run[:]
    results = run(sampler, *asked)
    drawn = sum(len(result.sequences[0].tokens) - 1 for result in results.values())
    assert sum(rows_run) == 192 + 32 * 8 + drawn


@pytest.mark.parametrize("length", [140, 96])
@pytest.mark.parametrize(("common", "hit"), [(0, 0), (47, 0), (48, 48), (90, 48), (96, 96), (130, 96), (140, 96)])
def test_a_prompt_that_begins_like_an_earlier_one_goes_on_from_a_state(length, common, hit, sampler_of):
    """Not from the end of the earlier one: there its turns end elsewhere than those of this one."""
    prompt = np.concatenate([prompt_of(0, 140)[:common], prompt_of(1, 150 - common)])
    request = sample("r", prompt, num_samples=2)
    (cold,) = run(sampler_of(), request).values()
    warm_sampler = sampler_of()
    run(warm_sampler, sample("before", prompt_of(0, 140)[:length]))
    (warm,) = run(warm_sampler, request).values()
    assert (cold.prompt_cache_hit_tokens, warm.prompt_cache_hit_tokens) == (0, hit if length == 140 else min(hit, 48))
    assert_same_bits(warm, cold)


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (64, 0), (65, 64), (80, 64), (81, 80), (97, 96), (144, 128)])
def test_the_same_prompt_again(length, hit, sampler_of):
    """Short ones are computed again."""
    request, sampler = sample("r", prompt_of(length, length), num_samples=2, max_tokens=3), sampler_of()
    (cold,) = run(sampler, request).values()
    (warm,) = run(sampler, request).values()
    assert warm.prompt_cache_hit_tokens == hit
    assert_same_bits(warm, cold)


def test_turns_of_a_conversation(sampler_of):
    sampler, prompt, before = sampler_of(), prompt_of(0, 70), 0
    for turn in range(4):
        (result,) = run(sampler, sample(f"{turn}", prompt, max_tokens=20)).values()
        (alone,) = run(sampler_of(), sample("r", prompt, max_tokens=20)).values()
        assert result.prompt_cache_hit_tokens == before // STATE_TOKENS * STATE_TOKENS
        assert_same_bits(result, alone)
        before = len(prompt) - 1
        prompt = np.concatenate([prompt, result.sequences[0].tokens, prompt_of(10 + turn, 17)])


def test_what_is_scored_is_computed(sampler_of):
    sampler = sampler_of()
    scored = sample("scored", prompt_of(0, 100), prompt_logprobs=True, num_samples=3)
    some = structs.replace(scored, request_id="some", prompt_logprobs_last_n=30)
    (cold,) = run(sampler, scored).values()
    results = run(sampler, scored, some)
    assert_same_bits(results["scored"], cold)
    assert [results[name].prompt_cache_hit_tokens for name in ("scored", "some")] == [0, 48]
    for name, first in (("scored", 1), ("some", 70)):
        np.testing.assert_array_equal(results[name].prompt_logprobs[first:], cold.prompt_logprobs[first:])


def test_a_reused_state_says_what_the_model_does(family, model_folder, sampler_of):
    sampler, prompt = sampler_of(), prompt_of(0, 200)
    run(sampler, sample("before", prompt[:150]))
    (warm,) = run(sampler, sample("r", prompt, num_samples=2, max_tokens=20)).values()
    assert warm.prompt_cache_hit_tokens == 144
    model = reference.load_plain(model_folder(family))
    for sequence in warm.sequences:
        tokens = np.concatenate([prompt, sequence.tokens])
        with torch.no_grad():
            rows = reference.logits(model, tokens)[len(prompt) - 1 : -1].log_softmax(-1)
        theirs = rows.gather(1, torch.from_numpy(sequence.tokens.astype(np.int64))[:, None])[:, 0]
        assert_logprobs(sequence.logprobs, theirs.numpy())


@pytest.mark.parametrize("places", [1, 2, 5])
def test_copies_give_way_to_what_runs(places, sampler_of):
    """With as few slots as sequences may run, and pages for a part of these; some are cancelled on the way."""
    starts = [prompt_of(seed, 120) for seed in range(3)]
    asked = [
        sample(
            f"r{i}", np.concatenate([starts[i % 3][: 60 + 7 * i], prompt_of(9 + i // 6, 3 * i)]), seed=i, max_tokens=9
        )
        for i in range(12)
    ]
    expected = {request.request_id: run(sampler_of(), request)[request.request_id] for request in asked}
    sampler, results = sampler_of(max_decode_batch=places, kv_cache_bytes=1 << 18), {}
    waiting = iter(asked)
    for step in itertools.count():
        if step % 3 == 0 and (request := next(waiting, None)) is not None:
            sampler.submit(request)
            sampler.submit(structs.replace(request, request_id="cancelled"))
        if step % 3 == 2:
            sampler.cancel(CancelSample("cancelled"))
        results.update(sampler.step())
        assert sampler.states_used == sampler.num_running <= places
        if not sampler.busy and step > 3 * len(asked):
            break
    results.pop("cancelled", None)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert_same_bits(result, expected[name])


def cache_of(slots: int) -> StateCache:
    state: State = (torch.zeros(1, 2),)
    return StateCache({0: state}, slots)


def value(cache: StateCache, slot: int) -> float:
    return cache.read(0, torch.tensor([slot]))[0][0, 0].item()


def filled(cache: StateCache, number: float, copy: int | None = None) -> int:
    slot = cache.allocate(copy)
    cache.write(0, torch.tensor([slot]), (torch.full((1, 2), number),))
    return slot


def test_a_copy_is_what_the_state_was_and_the_oldest_gives_way():
    cache, lost = cache_of(3), []
    cache.on_reclaim = lost.append
    slot = filled(cache, 1.0)
    first = cache.keep(slot)
    cache.write(0, torch.tensor([slot]), (torch.full((1, 2), 2.0),))
    second = cache.keep(slot)
    assert (value(cache, first), value(cache, second), cache.used) == (1.0, 2.0, 1)
    again = cache.allocate(first)  # the newest of use now
    assert (lost, value(cache, again), cache.used) == ([second], 1.0, 2)
    last = cache.allocate(first)  # there is no other slot: the copy becomes the sequence's own
    assert (last, lost, value(cache, last), cache.used) == (first, [second, first], 1.0, 3)
    assert cache.keep(slot) is None, "sequences have all slots"
    for one in (slot, again, last):
        cache.release(one)
    assert cache.used == 0 and value(cache, cache.allocate()) == 0
