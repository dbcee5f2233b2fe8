"""What a sample says of its prompt, through the official SDK."""

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.e2e.by_hand import NANO, PATIENCE

TOKENS = [40, 41, 42, 50, 60, 70, 71]
PROMPT = types.ModelInput.from_ints(TOKENS)
ONE = types.SamplingParams(max_tokens=1, seed=1, temperature=0.7)


@pytest.fixture
def sampler(client):
    return client.create_sampling_client(base_model=NANO).result(PATIENCE)


def test_the_options_agree_with_one_another(sampler):
    """Each score is the one that the others give of the same token in the same place."""
    ids = torch.tensor(TOKENS[1:])[:, None].repeat(1, 8)
    ids[:, 1:] = -1
    ids[:3] = -1
    dense, sparse = types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)
    assert sparse.sparse_crow_indices is not None
    wanted = dict(include_prompt_logprobs=True, prompt_alt_tokens_k=5)
    futures = [
        sampler.sample(PROMPT, 1, ONE, target_prompt_logprobs=target, prompt_logprobs_last_n=last, **wanted)
        for target, last in ((dense, None), (sparse, 3))
    ]
    whole, end = (future.result(PATIENCE) for future in futures)
    own = np.array(whole.prompt_logprobs[1:])
    assert whole.prompt_logprobs[0] is None and end.prompt_logprobs[:4] == [None] * 4
    np.testing.assert_allclose(end.prompt_logprobs[4:], own[3:], atol=1e-5)
    np.testing.assert_allclose(whole.target_prompt_logprobs.to_numpy()[3:, 0], own[3:], atol=1e-5)
    assert not whole.target_prompt_logprobs.to_numpy()[:3].any()
    assert end.target_prompt_logprobs.sparse_col_indices == sparse.sparse_col_indices == [0] * 3
    np.testing.assert_allclose(end.target_prompt_logprobs.data, own[3:], atol=1e-5)
    drawn = whole.prompt_alt_tokens.tokens
    assert drawn.shape == [6, 5] and drawn.tolist() == end.prompt_alt_tokens.tokens.tolist()
    again = sampler.sample(PROMPT, 1, ONE, target_prompt_logprobs=drawn).result(PATIENCE)
    np.testing.assert_allclose(
        again.target_prompt_logprobs.to_numpy(), whole.prompt_alt_tokens.logprobs.to_numpy(), atol=1e-5
    )


def test_the_end_of_a_prompt_is_scored_as_the_whole(sampler):
    whole = sampler.compute_logprobs(PROMPT).result(PATIENCE)
    end = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result(PATIENCE)
    assert end[:5] == [None] * 5
    np.testing.assert_allclose(end[5:], whole[5:], atol=1e-5)


def test_a_prompt_that_comes_again_is_found(sampler):
    """All but its last token, which draws the next one."""
    prompt = types.ModelInput.from_ints(np.random.default_rng(17).integers(0, 200, 37).tolist())
    first, again = (sampler.sample(prompt, 2, ONE).result(PATIENCE) for _ in range(2))
    assert (first.prompt_cache_hit_tokens, again.prompt_cache_hit_tokens) == (0, 36)
    for one, other in zip(first.sequences, again.sequences, strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_sampled_logprobs_are_of_the_temperature(sampler):
    """And of its likeliest tokens, to a normalizer that the temperature's two ends share."""
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=0.5, stop=[])
    sequence = sampler.sample(PROMPT, 1, params, topk_sample_logprobs=4).result(PATIENCE).sequences[0]
    prompt = types.ModelInput.from_ints(TOKENS + sequence.tokens)
    scored = sampler.sample(prompt, 1, ONE, include_prompt_logprobs=True, topk_prompt_logprobs=4).result(PATIENCE)
    at, plain = len(TOKENS), [dict(row) for row in scored.topk_prompt_logprobs[len(TOKENS) :]]
    for i, row in enumerate(sequence.topk_logprobs):
        (first, best), *others = row
        for token, logprob in others:
            assert abs((best - logprob) - (plain[i][first] - plain[i][token]) / 0.5) < 1e-4
        sampled = scored.prompt_logprobs[at + i]
        assert abs((best - sequence.logprobs[i]) - (plain[i][first] - sampled) / 0.5) < 1e-4


def test_what_the_sdk_does_not_refuse_the_server_does(sampler):
    ids = types.TensorData.from_torch(torch.full((3, 1), 5))
    with pytest.raises(tinker.BadRequestError, match=r"must have the shape \[6, K\]"):
        sampler.sample(PROMPT, 1, ONE, target_prompt_logprobs=ids).result(PATIENCE)
    with pytest.raises(tinker.BadRequestError, match="the last 1 to 6 can be scored"):
        sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=7).result(PATIENCE)
