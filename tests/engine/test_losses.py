"""The losses and their gradients by the log-probabilities, judged by `loss_reference`."""

from __future__ import annotations

import inspect
from math import exp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loss_reference import Row, loss_and_slope
from tinkercloud.engine.losses import LOSSES, loss_config, loss_named
from tinkercloud.engine.torch.losses import LOSS_FUNCTIONS, Targets
from tinkercloud.engine.types import OperationError


def targets_of(sequences: list[list[Row]], dtype=torch.float64) -> Targets:
    rows = [row for sequence in sequences for row in sequence]
    columns = {"weights": "w", "logprobs": "q", "advantages": "A", "sequence_ratio_mask": "mask"}
    inputs = {name: torch.tensor([row[key] for row in rows], dtype=dtype) for name, key in columns.items()}
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
    }
)
batches = st.lists(st.lists(row, min_size=1, max_size=6), min_size=1, max_size=4)


@st.composite
def configs(draw, name: str) -> dict[str, float]:
    config = loss_config(LOSSES[name], {})
    if "beta" in config:
        config["beta"] = draw(st.floats(0, 2))
    if "clip_low_threshold" in config and draw(st.booleans()):
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
    extreme = {"lp": lp, "q": q, "A": advantage, "w": advantage, "mask": 1.0}
    usual = {"lp": -1.0, "q": -1.0, "A": 1.0, "w": 1.0, "mask": 1.0}
    targets = targets_of([[extreme], [usual]], torch.float32)
    loss, gradient = loss_and_gradient(name, targets, loss_config(LOSSES[name], {}))
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()
    assert abs(gradient).max() < 1e18, "its square is a number too"
    if advantage == 0 and name != "dro":
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
    ],
)
def test_a_wrong_config_is_named(name, given, says):
    with pytest.raises(OperationError, match=says):
        loss_config(loss_named(name), given)
