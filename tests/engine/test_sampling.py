"""Drawing tokens: judged by transformers' own logits warpers and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.engine.counting import fits
from tinkercloud.engine.operations import OperationError, SamplingParams
from tinkercloud.engine.torch.sampling import check_params, draw, draw_alternatives, random_stream, top_logprobs

LOGITS = torch.tensor([1.2, -0.3, 0.7, 2.0, 0.1, -1.5, 1.9, 0.4])

MIXTURE = [
    SamplingParams(max_tokens=1, seed=0),
    SamplingParams(max_tokens=1, seed=0, temperature=0.5),
    SamplingParams(max_tokens=1, seed=0, temperature=2.5, top_k=3),
    SamplingParams(max_tokens=1, seed=0, top_p=0.7),
    SamplingParams(max_tokens=1, seed=0, temperature=1.5, top_k=5, top_p=0.6),
    SamplingParams(max_tokens=1, seed=0, top_k=1),
    SamplingParams(max_tokens=1, seed=0, top_p=1e-9),
    SamplingParams(max_tokens=1, seed=0, temperature=0.0),
]


def reference_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' generate draws from."""
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    scores = (
        TemperatureLogitsWarper(params.temperature)(None, logits[None]) if params.temperature != 1 else logits[None]
    )
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)[0]


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws of each row of a batch in which every row has other parameters."""
    draws = 20_000
    stream = random_stream(1, 0)
    counts = torch.zeros(len(MIXTURE), len(LOGITS))
    for _ in range(draws // 100):
        rows = [params for params in MIXTURE for _ in range(100)]
        tokens = draw(LOGITS.repeat(len(rows), 1), rows, stream.random(len(rows)).tolist()).tokens
        counts += torch.nn.functional.one_hot(tokens, len(LOGITS)).view(len(MIXTURE), 100, -1).sum(1)
    for params, observed in zip(MIXTURE, counts, strict=True):
        expected = reference_probabilities(LOGITS, params) * draws
        possible = expected > 0
        assert observed[~possible].sum() == 0, params
        assert fits(observed[possible].numpy(), expected[possible].numpy()), params


def test_logprobs_are_of_the_tempered_distribution_before_filters():
    drawn = draw(LOGITS.repeat(len(MIXTURE), 1), MIXTURE, [0.3] * len(MIXTURE))
    for params, token, logprob in zip(MIXTURE, drawn.tokens, drawn.logprobs, strict=True):
        expected = torch.log_softmax(LOGITS / (params.temperature if params.temperature != 0 else 1), -1)[token]
        assert abs(logprob - expected) < 1e-6


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0)
    assert draw(logits, [greedy, greedy], [0.9, 0.9]).tokens.tolist() == [1, 0]
    assert draw(logits, [greedy, SamplingParams(max_tokens=1, seed=0)], [0.9, 0.99]).tokens.tolist() == [1, 3]


def test_a_tiny_temperature_is_greedy_and_finite():
    params = [SamplingParams(max_tokens=1, seed=0, temperature=t) for t in (1e-3, 1e-30, 1e-320)]
    drawn = draw(LOGITS.repeat(3, 1), params, [0.0, 0.5, 1 - 2**-53])
    assert drawn.tokens.tolist() == [3, 3, 3]
    assert drawn.logprobs.tolist() == [0, 0, 0]


def test_a_huge_temperature_is_uniform_over_what_is_possible():
    logits = torch.cat([LOGITS, torch.full((3,), -math.inf)])
    drawn = draw(logits.repeat(2, 1), [SamplingParams(1, 0, temperature=t) for t in (1e30, 1e300)], [0.0, 1 - 2**-53])
    assert drawn.tokens.tolist() == [0, len(LOGITS) - 1]
    np.testing.assert_allclose(drawn.logprobs, -math.log(len(LOGITS)), atol=1e-6)
    uniforms = torch.linspace(0, 1, 200, dtype=torch.float64)[None, :-1]
    ids = draw_alternatives(logits.log_softmax(-1)[None], 1e300, uniforms)
    assert set(ids[0].tolist()) == set(range(len(LOGITS)))


@pytest.mark.parametrize("temperature", [1.0, 1e7, 1e30, 1e300])
def test_at_any_temperature_filters_leave_the_likeliest(temperature):
    """Whose probabilities round to one number, but whose logits are not equal."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(7))
    order = logits.sort(descending=True).indices
    for count, row in ((7, {"top_k": 7}), (6, {"top_k": 12, "top_p": 0.49}), (120, {"top_p": 0.3999})):
        if temperature == 1 and "top_p" in row:
            continue
        params = [SamplingParams(1, 0, temperature=temperature, **row)] * 2000
        drawn = draw(logits.repeat(2000, 1), params, np.linspace(0, 1, 2000, endpoint=False).tolist())
        assert set(drawn.tokens.tolist()) == set(order[:count].tolist())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", MIXTURE)
def test_the_ends_of_the_interval_give_possible_tokens(uniform, params):
    logits = torch.cat([torch.full((3,), -math.inf), LOGITS, torch.full((3,), -math.inf)])
    token = draw(logits[None].clone(), [params], [uniform]).tokens.item()
    assert reference_probabilities(logits, params)[token] > 0


@given(
    st.lists(st.tuples(st.sampled_from(range(len(MIXTURE))), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=9)
)
def test_a_row_does_not_depend_on_its_neighbours(rows):
    params = [MIXTURE[index] for index, _ in rows]
    uniforms = [uniform for _, uniform in rows]
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(rows), 50, generator=generator) * 3
    together = draw(logits.clone(), params, uniforms)
    for index in range(len(rows)):
        alone = draw(logits[index : index + 1].clone(), params[index : index + 1], uniforms[index : index + 1])
        assert alone.tokens.item() == together.tokens[index].item()
        assert torch.equal(alone.distribution[0], together.distribution[index])


def test_equally_likely_ids_do_not_depend_on_the_neighbours():
    """At a boundary the lowest of them stay, however many are asked for in other rows."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randint(0, 4, (6, 2000), generator=generator).float()
    filters = [{"top_k": 3}, {"top_k": 700}, {"top_p": 0.4}, {"top_k": 50, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-9}]
    params = [SamplingParams(max_tokens=1, seed=0, temperature=1000, **row) for row in filters]
    for uniform in (0.0, 0.3, 0.8, 1 - 2**-53):
        together = draw(logits.clone(), params, [uniform] * 6).tokens.tolist()
        assert together == [
            draw(logits[row : row + 1].clone(), params[row : row + 1], [uniform]).tokens.item() for row in range(6)
        ]
        in_order = logits[0].sort(descending=True, stable=True).indices
        assert together[0] == in_order[int(uniform * 3)]
        assert together[4:] == [row.argmax().item() for row in logits[4:]]


@pytest.mark.parametrize("k", [1, 5, 700, 2000])
def test_top_logprobs_of_equally_likely_ids(k):
    """The lowest, in order."""
    rows = torch.randint(0, 4, (5, 2000), generator=torch.Generator().manual_seed(7)).float()
    rows[1] = torch.arange(2000.0)
    ids, values = top_logprobs(rows, k)
    expected = rows.sort(dim=-1, descending=True, stable=True)
    np.testing.assert_array_equal(ids, expected.indices[:, :k])
    np.testing.assert_array_equal(values, expected.values[:, :k])


def test_logits_that_are_not_finite_show():
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan)])
    sampled = SamplingParams(max_tokens=1, seed=0)
    drawn = draw(logits, [sampled, sampled], [0.5, 0.5])
    assert drawn.logprobs[0].isfinite() and drawn.logprobs[1].isnan()


def test_streams_are_reproducible_and_differ():
    one_by_one = random_stream(7, 1)
    assert [one_by_one.random() for _ in range(5)] == random_stream(7, 1).random(5).tolist()
    streams = {tuple(random_stream(seed, index).random(3)) for seed in (0, 1, 2**63 - 2) for index in range(3)}
    assert len(streams) == 9


def test_top_logprobs():
    ids, logprobs = top_logprobs(LOGITS.log_softmax(-1)[None], 3)
    assert ids.tolist() == [[3, 6, 0]] and ids.dtype == np.int32
    np.testing.assert_allclose(logprobs[0], LOGITS.log_softmax(-1)[[3, 6, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_parameters_without_a_distribution_are_refused(change, message):
    with pytest.raises(OperationError, match=message):
        check_params(SamplingParams(**{"max_tokens": 1, "seed": 0, **change}))
