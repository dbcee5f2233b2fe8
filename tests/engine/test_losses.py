"""The losses against their formulas in float64 numpy, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkercloud.engine.losses import LOSSES, loss_config, loss_named
from tinkercloud.engine.torch.losses import LOSS_FUNCTIONS
from tinkercloud.engine.types import OperationError


def formula(name: str, logprobs: np.ndarray, inputs: dict[str, np.ndarray], config: dict[str, float]) -> np.ndarray:
    if name == "cross_entropy":
        return -inputs["weights"] * logprobs
    advantages = inputs["advantages"]
    ratio = np.exp(logprobs - inputs["logprobs"])
    if name == "importance_sampling":
        return -ratio * advantages
    clipped = np.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    return -np.minimum(ratio * advantages, clipped * advantages)


CASES = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.05}),
]


@pytest.mark.parametrize("name, given", CASES)
def test_a_loss_and_its_gradient_equal_the_formula(name, given):
    random = np.random.default_rng(3)
    logprobs = random.normal(-2, 1, 400)
    inputs = {
        "weights": random.choice([-2.0, 0.0, 0.5, 1.0], 400),
        "logprobs": logprobs + random.normal(0, 0.3, 400),
        "advantages": random.choice([-1.5, 0.0, 0.7, 2.0], 400),
    }
    config = loss_config(loss_named(name), given)
    current = torch.from_numpy(logprobs).requires_grad_()
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    loss, metrics = LOSS_FUNCTIONS[name](current, tensors, config)
    (gradient,) = torch.autograd.grad(loss.sum(), current)
    np.testing.assert_allclose(loss.detach(), formula(name, logprobs, inputs, config), rtol=1e-12, atol=1e-12)
    step = 1e-6
    up, down = (formula(name, logprobs + sign * step, inputs, config) for sign in (1, -1))
    np.testing.assert_allclose(gradient, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)
    assert all(key.count(":") == 1 for key in metrics)


def test_policy_metrics_see_only_tokens_with_an_advantage():
    inputs = {
        "logprobs": torch.tensor([0.0, -1.0, -1.0, -1.0]),
        "advantages": torch.tensor([0.0, 1.0, -1.0, 1.0]),
    }
    logprobs = torch.tensor([-90.0, -1 + np.log(2), -1 + np.log(2), -1.0])
    _, metrics = LOSS_FUNCTIONS["ppo"](logprobs, inputs, LOSSES["ppo"].config)
    assert metrics["ratio:mean"].item() == pytest.approx(5 / 3)
    # A ratio of 2 is clipped where that limits the gain, not where the advantage is negative.
    assert metrics["clip_fraction:mean"].item() == pytest.approx(1 / 3)
    _, empty = LOSS_FUNCTIONS["ppo"](logprobs, inputs | {"advantages": torch.zeros(4)}, LOSSES["ppo"].config)
    assert (empty["ratio:mean"].item(), empty["clip_fraction:mean"].item()) == (1, 0)


def test_a_token_without_advantage_cannot_spoil_the_loss():
    inputs = {"logprobs": torch.tensor([-1e5, -1.0]), "advantages": torch.tensor([0.0, 1.0])}
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    for name in ("importance_sampling", "ppo"):
        loss, _ = LOSS_FUNCTIONS[name](logprobs, inputs, LOSSES["ppo"].config)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert loss.tolist() == [0, -1]
        assert gradient.tolist() == [0, -1]


def test_every_declared_loss_has_a_formula():
    assert LOSSES.keys() == LOSS_FUNCTIONS.keys()
    assert all(loss.inputs[0].name == "target_tokens" for loss in LOSSES.values())


def test_config_overrides_defaults_and_knows_its_keys():
    assert loss_config(LOSSES["ppo"], {"clip_high_threshold": 3}) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 3.0,
    }
    for given in ({"clip": 1.0}, {"clip_low_threshold": "0.8"}, {"clip_high_threshold": float("nan")}):
        with pytest.raises(OperationError):
            loss_config(LOSSES["ppo"], given)
    with pytest.raises(OperationError, match="this server has cross_entropy"):
        loss_named("dpo")
