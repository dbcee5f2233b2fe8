"""What a request asks to know of its prompt, judged by transformers' own forward and by peft."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from tests.engine.counting import fits
from tests.engine.examples import VOCAB
from tests.engine.sampler_requests import prompt_of, run, sample
from tinkercloud.engine.operations import CancelSample, Matrix, OpenSampler
from tinkercloud.engine.results import AltTokens, Failure
from tinkercloud.engine.torch.prompt_scoring import PromptScores

K = 3


def dense(seed: int, rows: int, first: int = 0) -> Matrix:
    """Ids from row `first` on, a third of the cells -1."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB, (rows, K))
    ids[random.random((rows, K)) < 0.3] = -1
    ids[:first], ids[first, 0] = -1, 5
    return Matrix(ids.ravel(), (rows, K))


def sparse(matrix: Matrix, columns: int = 1000) -> Matrix:
    """The same ids, in the last columns of a wider matrix; a few -1 are listed too."""
    ids = matrix.values.reshape(matrix.shape)
    listed = (ids >= 0) | (np.arange(K) == 1)
    row_ends = np.concatenate([[0], listed.sum(1).cumsum()])
    return Matrix(ids[listed], (matrix.shape[0], columns), row_ends, np.nonzero(listed)[1] + columns - K)


@pytest.fixture
def distribution(reference, adapter_folder):
    """(prompt, sampler) -> log-probabilities [N - 1, V] over its tokens but the first."""

    def of(prompt: np.ndarray, sampler_id: str = "base") -> torch.Tensor:
        model = reference("qwen3", adapter_folder("qwen3") if sampler_id == "adapter" else "")
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)

    return of


def assert_targets(answered: Matrix, asked: Matrix, expected: torch.Tensor) -> None:
    assert answered.shape == asked.shape and answered.values.dtype == np.float32
    assert (answered.row_ends is None) == (asked.row_ends is None)
    if asked.row_ends is not None:
        np.testing.assert_array_equal(answered.row_ends, asked.row_ends)
        np.testing.assert_array_equal(answered.columns, asked.columns)
    values = expected[asked.rows, asked.values].numpy()
    np.testing.assert_allclose(answered.values, np.where(asked.values >= 0, values, 0), atol=1e-5)


def assert_alternatives(alternatives: AltTokens, expected: torch.Tensor, k: int) -> None:
    assert alternatives.token_ids.shape == alternatives.logprobs.shape == (len(expected), k)
    assert alternatives.token_ids.dtype == np.int32 and alternatives.logprobs.dtype == np.float32
    chosen = expected.gather(-1, torch.from_numpy(alternatives.token_ids.astype(np.int64)))
    np.testing.assert_allclose(alternatives.logprobs, chosen, atol=1e-5)


@pytest.mark.parametrize("logits_bytes", [1, 64 * 2**20])
def test_all_scores_are_the_raw_models(logits_bytes, small_chunks, sampler_of, adapter_folder, distribution):
    """Of prompts that are prefilled in several steps beside one another, with logits row by row and all at once."""
    sampler = sampler_of("qwen3", logits_bytes=logits_bytes)
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    requests = []
    for name, length, last in (("base", 150, 40), ("adapter", 61, 60), ("base", 2, 1), ("adapter", 50, None)):
        targets = dense(length, length - 1, first=length // 3)
        requests.append(
            sample(
                f"{name}-{length}",
                prompt_of(length, length),
                name,
                temperature=0.4,
                max_tokens=2,
                num_samples=2,
                prompt_logprobs=True,
                topk_prompt_logprobs=3,
                prompt_logprobs_last_n=last,
                target_prompt_logprobs=sparse(targets) if name == "adapter" else targets,
                prompt_alt_tokens_k=4,
            )
        )
    results = run(sampler, *requests)
    for request in requests:
        result, n = results[request.request_id], len(request.prompt)
        expected = distribution(request.prompt, request.sampler_id)
        assert_targets(result.target_prompt_logprobs, request.target_prompt_logprobs, expected)
        assert_alternatives(result.prompt_alt_tokens, expected, 4)
        last = request.prompt_logprobs_last_n or n - 1
        assert np.isnan(result.prompt_logprobs[:-last]).all()
        own = expected.gather(-1, torch.from_numpy(request.prompt[1:].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(result.prompt_logprobs[-last:], own[-last:], atol=1e-5)
        assert (result.prompt_top_logprobs.logprobs[:-last] == -99999).all()
        assert (result.prompt_top_logprobs.token_ids[:-last] == 0).all()
        values, ids = expected.topk(3)
        np.testing.assert_array_equal(result.prompt_top_logprobs.token_ids[-last:], ids[-last:])
        np.testing.assert_allclose(result.prompt_top_logprobs.logprobs[-last:], values[-last:], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 10])
def test_no_more_logits_than_allowed(rows, sampler_of, base_model, monkeypatch):
    model, asked = base_model("qwen3"), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, lora: asked.append(len(hidden)) or logits(hidden, lora))
    options = dict(prompt_logprobs=True, topk_prompt_logprobs=2, prompt_alt_tokens_k=2, max_tokens=1)
    targets = dense(1, 199)
    request = sample("r", prompt_of(1, 200), target_prompt_logprobs=targets, **options)
    run(sampler_of("qwen3", logits_bytes=4 * VOCAB * rows), request)
    assert max(asked) == rows and sum(asked) == 199 + 1


def test_each_option_alone(sampler_of, distribution):
    """What was not asked for is not there."""
    prompt, targets = prompt_of(1, 12), dense(1, 11)
    asked = {
        "prompt_logprobs": {"prompt_logprobs": True},
        "prompt_top_logprobs": {"topk_prompt_logprobs": 2},
        "target_prompt_logprobs": {"target_prompt_logprobs": targets},
        "prompt_alt_tokens": {"prompt_alt_tokens_k": 2},
    }
    results = run(sampler_of("qwen3"), *(sample(name, prompt, **option) for name, option in asked.items()))
    for name, result in results.items():
        assert [other for other in asked if getattr(result, other) is not None] == [name]
    assert_targets(results["target_prompt_logprobs"].target_prompt_logprobs, targets, distribution(prompt))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_alternatives_are_spread_as_the_model_says(temperature, sampler_of, distribution):
    """Chi-square of 2,000 draws at each position; top-k and top-p are the samples' alone."""
    options = dict(temperature=temperature, top_k=1, top_p=0.1, seed=6, prompt_alt_tokens_k=2000)
    request = sample("r", prompt_of(9, 30), **options)
    alternatives = run(sampler_of("qwen3"), request)["r"].prompt_alt_tokens
    expected = (distribution(request.prompt) / temperature).softmax(-1).numpy() * 2000
    observed = np.stack([np.bincount(row, minlength=VOCAB) for row in alternatives.token_ids])
    for row in range(len(expected)):
        assert fits(observed[row], expected[row]), row
    together = (expected.ravel(), observed.ravel())
    assert fits(together[1], together[0])
    assert len({tuple(row) for row in alternatives.token_ids}) == 29, "each position has numbers of its own"


def test_greedy_alternatives_are_the_likeliest_token(sampler_of, distribution):
    request = sample("r", prompt_of(2, 20), temperature=0, prompt_alt_tokens_k=2)
    alternatives = run(sampler_of("qwen3"), request)["r"].prompt_alt_tokens
    likeliest = distribution(request.prompt).argmax(-1).numpy()
    np.testing.assert_array_equal(alternatives.token_ids, np.stack([likeliest, likeliest], axis=1))


def test_alternatives_depend_on_prompt_and_seed_alone(sampler_of, monkeypatch):
    """Not on neighbours, nor on how the prompt is cut, nor on interruptions; more of them begin with the same ones."""
    asked = dict(temperature=0.9, prompt_alt_tokens_k=5, max_tokens=60, num_samples=2)
    requests = [sample(f"r{i}", prompt_of(i, 60 + i), seed=i, **asked) for i in range(6)]
    alone = {one.request_id: run(sampler_of("qwen3"), one)[one.request_id] for one in requests}
    tight = sampler_of("qwen3", kv_cache_bytes=1, logits_bytes=1)
    monkeypatch.setattr("tinkercloud.engine.torch.batching.PREFILL_CHUNK", 7)
    monkeypatch.setattr("tinkercloud.engine.torch.batching.PREFILL_BUDGET", 20)
    together = run(tight, *requests)
    assert tight.preemptions > 0
    for name, result in alone.items():
        np.testing.assert_array_equal(together[name].prompt_alt_tokens.token_ids, result.prompt_alt_tokens.token_ids)
    more = sample("r0", prompt_of(0, 60), seed=0, **asked | {"prompt_alt_tokens_k": 9})
    drawn = run(sampler_of("qwen3"), more)["r0"].prompt_alt_tokens.token_ids
    np.testing.assert_array_equal(drawn[:, :5], alone["r0"].prompt_alt_tokens.token_ids)
    other = run(sampler_of("qwen3"), sample("r0", prompt_of(0, 60), seed=1, **asked))["r0"].prompt_alt_tokens
    assert (other.token_ids != alone["r0"].prompt_alt_tokens.token_ids).mean() > 0.1


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 20),
        ({"prompt_logprobs": True}, 0),
        ({"topk_prompt_logprobs": 2}, 0),
        ({"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 4}, 15),
        ({"target_prompt_logprobs": dense(0, 19, first=12)}, 12),
        ({"target_prompt_logprobs": sparse(dense(0, 19, first=12))}, 12),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4, "target_prompt_logprobs": dense(0, 19, first=9)}, 9),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4, "prompt_alt_tokens_k": 1}, 0),
    ],
)
def test_what_comes_before_is_not_needed(options, first):
    scores = PromptScores(sample("r", prompt_of(0, 20), **options))
    assert scores.needed_from == first and scores.complete == (first == 20)


def test_what_waits_takes_no_memory_for_answers(sampler_of):
    """Beside the request itself, which came with its prompt and targets."""
    sampler = sampler_of("qwen3", max_decode_batch=1)
    requests = [
        sample(
            f"r{i}", prompt_of(i, 200), topk_prompt_logprobs=90, prompt_alt_tokens_k=90, prompt_logprobs=True,
            target_prompt_logprobs=dense(i, 199), max_tokens=1,
        )
        for i in range(20)
    ]  # fmt: skip
    tracemalloc.start()
    try:
        for request in requests:
            sampler.submit(request)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for request in requests:
        sampler.cancel(CancelSample(request.request_id))
    sampler.step()
    assert taken / len(requests) < 3500, "the answer's arrays take 300,000, the prompt as a list 1,600"


def test_a_prompt_of_one_token_has_no_alternatives(sampler_of):
    result = run(sampler_of("qwen3"), sample("r", prompt_of(0, 1), prompt_alt_tokens_k=3, prompt_logprobs=True))["r"]
    assert result.prompt_alt_tokens.token_ids.shape == (0, 3) and np.isnan(result.prompt_logprobs).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k is -1"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n is 0; it must be 1 to 4"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 5}, "prompt_logprobs_last_n is 5; it must be 1 to 4"),
        ({"target_prompt_logprobs": dense(0, 5)}, "has 5 rows; it must have 4"),
        ({"target_prompt_logprobs": Matrix(np.full(4, VOCAB), (4, 1))}, "must name a token id, 0 to 95"),
        ({"target_prompt_logprobs": Matrix(np.full(4, -1), (4, 1))}, "must name a token id"),
        ({"target_prompt_logprobs": Matrix(np.array([1, -2, 1, 1]), (4, 1))}, "have else only -1"),
        ({"target_prompt_logprobs": Matrix(np.array([1, 2]), (4, 1))}, "more or fewer token ids than its shape says"),
    ],
)
def test_what_cannot_be_scored_is_refused(options, says, sampler_of):
    result = run(sampler_of("qwen3"), sample("r", prompt_of(0, 5), **options))["r"]
    assert isinstance(result, Failure) and result.category == "user" and says in result.error
