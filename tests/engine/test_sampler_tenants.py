"""Tenants share a sampler evenly, however much each asks for: counted in steps, never in seconds."""

from __future__ import annotations

import pytest

from tests.engine.sampler_requests import prompt_of, run, sample, tokens_of

PLACES = 4


def flood(count: int = 40, max_tokens: int = 20, tenant: str = "flood"):
    return [
        sample(f"{tenant}{i}", prompt_of(i, 8), seed=i, max_tokens=max_tokens, stop_tokens=(), tenant=tenant)
        for i in range(count)
    ]


def ended_at(sampler, requests) -> dict[str, int]:
    """The step at which each request ended, the first being 1."""
    for request in requests:
        sampler.submit(request)
    at: dict[str, int] = {}
    step = 0
    while sampler.busy:
        step += 1
        at |= {name: step for name, _ in sampler.step()}
    return at


def test_one_sample_does_not_wait_for_the_many_of_another_tenant(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=PLACES)
    for request in flood():
        sampler.submit(request)
    for _ in range(3):
        assert sampler.step() == []
    at = ended_at(sampler, flood(1, tenant="single"))
    assert at["single0"] == 20, "as if it were alone: a place was made for it"
    assert len(at) == 41
    assert max(at.values()) <= 41 * 20 / PLACES + 20, "and the rest took no longer than their work does"


def test_two_tenants_get_half_of_the_places_each(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=PLACES)
    at = ended_at(sampler, flood(40) + flood(20, tenant="second"))
    theirs = sorted(step for name, step in at.items() if name.startswith("second"))
    # Twenty of them in two places: ten rounds of 20 tokens.
    assert theirs[-1] <= 10 * 20 + PLACES
    half = sum(step <= theirs[-1] for name, step in at.items() if name.startswith("flood"))
    assert abs(half - 20) <= PLACES, "meanwhile the first tenant has been served as much"


def test_samples_that_wait_for_a_common_prompt_take_no_places_meanwhile(small_chunks, sampler_of):
    """Only the one that computes the prompt takes one from another tenant, once; the rest when it is there."""
    sampler = sampler_of("qwen3", max_decode_batch=PLACES)
    for request in flood(PLACES, 60):
        sampler.submit(request)
    for _ in range(50):
        assert sampler.step() == []
    many = sample("many", prompt_of(9, 200), num_samples=2, max_tokens=4, tenant="second")
    at = ended_at(sampler, [many])
    assert at["many"] == 9 + 4, "24 tokens of the prompt a step"
    theirs = sorted(step for name, step in at.items() if name.startswith("flood"))
    assert theirs[:2] == [10, 10]
    assert theirs[2] <= 14, "it went on for nine steps, then computed once more what it had"


def test_what_gives_up_its_place_draws_the_same_tokens(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=PLACES)
    alone = tokens_of(run(sampler, *flood(6)))
    for request in flood(6):
        sampler.submit(request)
    results = {}
    for step in range(4):
        results.update(sampler.step())
        for request in flood(2, 2 + step, tenant=f"t{step}-"):
            sampler.submit(request)
    while sampler.busy:
        results.update(sampler.step())
    assert {name: tokens for name, tokens in tokens_of(results).items() if name.startswith("flood")} == alone


@pytest.mark.parametrize("tenants", [1, 3])
def test_places_are_not_taken_for_nothing(sampler_of, tenants):
    """Whoever has their share keeps it, so no tenant computes again and again what it had."""
    sampler = sampler_of("qwen3", max_decode_batch=6)
    requests = [request for tenant in range(tenants) for request in flood(12, 10, f"t{tenant}-")]
    at = ended_at(sampler, requests)
    assert max(at.values()) == len(requests) * 10 / 6
