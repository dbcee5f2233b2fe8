"""The losses and their gradients by the log-probabilities, judged by `loss_reference`."""

from __future__ import annotations

import inspect
from math import exp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loss_reference import COLUMNS, Row, loss_and_slope
from tinkercloud.engine.losses import LOSSES, loss_config, loss_named
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.losses import LOSS_FUNCTIONS, Targets


def targets_of(sequences: list[list[Row]], dtype=torch.float64) -> Targets:
    rows = [row for sequence in sequences for row in sequence]
    inputs = {name: torch.tensor([row.get(key, 0.0) for row in rows], dtype=dtype) for name, key in COLUMNS.items()}
    logprobs = torch.tensor([row["lp"] for row in rows], dtype=dtype, requires_grad=True)
    return Targets(logprobs, inputs, torch.tensor([len(sequence) for sequence in sequences]))


def loss_and_gradient(name: str, targets: Targets, config) -> tuple[np.ndarray, np.ndarray]:
    loss, _ = LOSS_FUNCTIONS[name](targets, config)
    (gradient,) = torch.autograd.grad(loss.sum(), targets.logprobs)
    return loss.detach().numpy(), gradient.numpy()


logprobs = st.floats(-30, 0) | st.floats(-0.5, 0)
amounts = st.sampled_from([0.0, 0.0, 1.0, -1.0]) | st.floats(-5, 5)
row = st.fixed_dictionaries(
    {
        "lp": logprobs,
        "q": logprobs | st.floats(-1e4, 0),
        "A": amounts,
        "w": amounts,
        "mask": st.sampled_from([0.0, 1.0]),
        "p": logprobs | st.floats(-1e4, 0),
        "S": st.sampled_from([0.0, 1.0, 1.0]),
    }
)
batches = st.lists(st.lists(row, min_size=1, max_size=6), min_size=1, max_size=4)


@st.composite
def configs(draw, name: str) -> dict[str, float]:
    config = loss_config(LOSSES[name], {})
    if "beta" in config:
        config["beta"] = draw(st.floats(0, 2))
    if "kl_coeff" in config:
        config["kl_coeff"] = draw(st.just(0.0) | st.floats(0, 2))
        config["clip_low_threshold"], config["clip_high_threshold"] = draw(st.tuples(st.floats(0, 1), st.floats(1, 5)))
    elif "clip_low_threshold" in config and draw(st.booleans()):
        config["clip_low_threshold"], config["clip_high_threshold"] = sorted(draw(st.tuples(*[st.floats(0, 3)] * 2)))
    return config


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), sequences=batches)
def test_a_loss_and_its_gradient_equal_the_formula(name, data, sequences):
    config = data.draw(configs(name))
    loss, gradient = loss_and_gradient(name, targets_of(sequences), config)
    pairs = [loss_and_slope(name, row, sequence, config) for sequence in sequences for row in sequence]
    np.testing.assert_allclose(loss, [pair[0] for pair in pairs], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(gradient, [pair[1] for pair in pairs], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("q", [-1e6, -1e3, -41.0, 0.0])
@pytest.mark.parametrize("lp", [-1e6, -2.0])
@pytest.mark.parametrize("advantage", [-3.0, 0.0, 3.0])
def test_extreme_ratios_stay_finite_in_float32(name, q, lp, advantage):
    extreme = {"lp": lp, "q": q, "p": q, "A": advantage, "w": advantage, "mask": 1.0, "S": 1.0}
    usual = {"lp": -1.0, "q": -1.0, "p": -1.0, "A": 1.0, "w": 1.0, "mask": 1.0, "S": 1.0}
    targets = targets_of([[extreme], [usual]], torch.float32)
    loss, gradient = loss_and_gradient(name, targets, loss_config(LOSSES[name], {}))
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()
    assert abs(gradient).max() < 1e18, "its square is a number too"
    if advantage == 0 and name not in ("dro", "stable_reinforce"):
        assert (loss[0], gradient[0]) == (0, 0)


def test_a_sequence_ratio_is_its_own_sequences():
    """Neither the neighbours in the batch nor unmarked targets take part in it."""
    marked = [{"lp": -1.0, "q": -1.1, "A": 1.0, "w": 0.0, "mask": 1.0}] * 3
    unmarked = [{"lp": -9.0, "q": -1.0, "A": 1.0, "w": 0.0, "mask": 0.0}]
    alone = targets_of([marked])
    beside = targets_of([unmarked, marked + unmarked])
    config = loss_config(LOSSES["gspo"], {})
    loss, gradient = loss_and_gradient("gspo", beside, config)
    np.testing.assert_array_equal(loss[1:4], loss_and_gradient("gspo", alone, config)[0])
    np.testing.assert_allclose(loss, [-1.0] + [-exp(0.1)] * 4)
    np.testing.assert_allclose(gradient, [-1.0] + [-exp(0.1)] * 4)


def on_policy(advantage: float) -> Row:
    return {"lp": -2.0, "q": -2.0, "p": -2.0, "A": advantage, "S": 1.0}


def slopes_of(rows: list[Row], **config: float) -> np.ndarray:
    loss = LOSSES["stable_reinforce"]
    return loss_and_gradient("stable_reinforce", targets_of([rows]), loss_config(loss, config))[1]


def test_stable_reinforce_is_reinforce_where_the_policies_agree():
    advantages = [1.5, -0.5, 0.0]
    rows = [on_policy(advantage) for advantage in advantages]
    np.testing.assert_array_equal(slopes_of(rows, kl_coeff=3.0), [-1.5, 0.5, 0.0])
    prompt = on_policy(1.0) | {"S": 0.0, "lp": -1.0}
    assert slopes_of([prompt]) == [0.0]


def test_a_target_outside_the_trust_region_is_only_brought_back():
    """No push further out; the push back stays, bounded."""
    above, below = {"lp": -1.0}, {"lp": -3.0}
    rows = [on_policy(1.0) | above, on_policy(-1.0) | above, on_policy(1.0) | below, on_policy(-1.0) | below]
    np.testing.assert_allclose(slopes_of(rows, kl_coeff=0.0), [0.0, 2.0, -exp(-1), 0.0])


def test_a_temperature_moves_the_weight_and_not_the_trust_region():
    """Drawn at a temperature that made the token three times as likely, from a policy that has not moved."""
    cold = on_policy(-1.0) | {"q": -2.0 + np.log(3)}
    np.testing.assert_allclose(slopes_of([cold]), [1 / 3])


@settings(max_examples=300, deadline=None)
@given(row, st.floats(0, 1), st.floats(1, 10), st.floats(0, 2))
def test_no_ratio_makes_a_gradient_of_stable_reinforce_large(row, low, high, kl_coeff):
    config = {"clip_low_threshold": low, "clip_high_threshold": high, "kl_coeff": kl_coeff}
    (slope,) = slopes_of([row], **config)
    assert abs(slope) <= high * abs(row["A"]) + kl_coeff * high * max(1.0, high - 1) + 1e-9


def test_the_divergence_and_its_gradient_are_those_of_the_whole_distribution():
    """In expectation over tokens drawn at another temperature, within the bounds."""
    logits = torch.tensor([1.0, 0.2, -0.5, -1.5], dtype=torch.float64)
    current = (logits + torch.tensor([0.2, -0.1, 0.1, -0.3])).requires_grad_()
    lp, policy, drawn = current.log_softmax(-1), logits.log_softmax(-1), (logits / 0.8).log_softmax(-1)
    inputs = {"logprobs": drawn, "policy_logprobs": policy, "sampled": torch.ones(4), "advantages": torch.zeros(4)}
    config = loss_config(LOSSES["stable_reinforce"], {"kl_coeff": 1.0})
    loss, _ = LOSS_FUNCTIONS["stable_reinforce"](Targets(lp, inputs, torch.tensor([4])), config)
    expected = (drawn.exp() * loss).sum()
    divergence = (policy.exp() * (policy - lp)).sum()
    assert expected.item() == pytest.approx(divergence.item(), rel=1e-12)
    gradients = [torch.autograd.grad(each, current, retain_graph=True)[0] for each in (expected, divergence)]
    np.testing.assert_allclose(*gradients, atol=1e-12)


def test_every_declared_loss_has_a_formula():
    assert LOSSES.keys() == LOSS_FUNCTIONS.keys()
    for loss in LOSSES.values():
        names = [wanted.name for wanted in loss.inputs]
        assert names[0] == "target_tokens" and loss.counts in names
        assert "Source:" in inspect.getdoc(LOSS_FUNCTIONS[loss.name])


def test_config_overrides_defaults_and_knows_its_keys():
    assert loss_config(LOSSES["ppo"], {"clip_high_threshold": 3}) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 3.0,
        "entropy": 0.0,
    }
    with pytest.raises(OperationError, match="this server has cross_entropy"):
        loss_named("dpo")


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("ppo", {"clip": 1.0}, "no 'clip'; it takes clip_low_threshold, clip_high_threshold, entropy"),
        ("ppo", {"clip_low_threshold": "0.8"}, "must be a finite number, not '0.8'"),
        ("ppo", {"clip_high_threshold": float("nan")}, "must be a finite number, not nan"),
        ("ppo", {"clip_low_threshold": -0.1}, "must be at least 0, not -0.1"),
        ("cispo", {"clip_low_threshold": 5.0}, "bounds of the probability ratio: 0 <= low <= high"),
        ("gspo", {"clip_high_threshold": 0.5}, "bounds of the probability ratio"),
        ("dro", {"beta": -1.0}, "'beta' of dro must be at least 0, not -1"),
        ("dro", {"clip_low_threshold": 0.8}, "loss_fn_config of dro has no 'clip_low_threshold'"),
        ("cross_entropy", {"entropy": 2.0}, "'entropy' of cross_entropy must be 0 or 1, not 2"),
        ("stable_reinforce", {"kl_coeff": -0.1}, "'kl_coeff' of stable_reinforce must be at least 0, not -0.1"),
        ("stable_reinforce", {"kl_coeff": "auto"}, "'kl_coeff' must be a finite number, not 'auto'"),
        ("stable_reinforce", {"clip_low_threshold": 1.5}, "'clip_low_threshold' of .* must be 0 to 1, not 1.5"),
        ("stable_reinforce", {"clip_high_threshold": 0.9}, "'clip_high_threshold' of .* must be at least 1, not 0.9"),
    ],
)
def test_a_wrong_config_is_named(name, given, says):
    with pytest.raises(OperationError, match=says):
        loss_config(loss_named(name), given)
