"""The formulas of the losses that `engine/losses.py` declares, one function of the same name each.

Each is a pure function of (log-probabilities, inputs, config) over all targets of some datums at once, flat [n], and
returns (elementwise loss [n], metrics). The loss is the sum, never a mean; gradients flow through the log-probabilities
only. Metrics are named "name:reduction".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
LossFunction = Callable[[Tensor, Inputs, Config], tuple[Tensor, dict[str, Tensor]]]


def cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum w * logp. Weights may be negative: a client's own loss C comes as w = -dC/dlogp.

    With [N, K] targets each position has K weighted targets.
    """
    return -inputs["weights"] * logprobs, {}


def importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum r * A with the ratio r = exp(logp - q) of the current to the sampling policy's probability.

    Source: Tinker's documentation of its losses; the off-policy policy gradient. Not clipped.
    """
    ratio, active = _ratio(logprobs, inputs)
    return -ratio * inputs["advantages"], {"ratio:mean": _mean(ratio, active, empty=1.0)}


def ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum min(r * A, clamp(r, low, high) * A), `low` and `high` being bounds of the ratio itself.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7.
    """
    ratio, active = _ratio(logprobs, inputs)
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    advantages = inputs["advantages"]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = torch.where(advantages > 0, ratio > high, ratio < low).to(ratio.dtype)
    return loss, {
        "ratio:mean": _mean(ratio, active, empty=1.0),
        "clip_fraction:mean": _mean(clipped, active, empty=0.0),
    }


LOSS_FUNCTIONS: dict[str, LossFunction] = {
    function.__name__: function for function in (cross_entropy, importance_sampling, ppo)
}


def _ratio(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(ratio, which targets have an advantage). Without one it is 1: prompts carry no sampling log-probability."""
    active = inputs["advantages"] != 0
    return torch.where(active, logprobs - inputs["logprobs"], 0.0).exp(), active


def _mean(values: Tensor, active: Tensor, empty: float) -> Tensor:
    """Mean of the active values, `empty` if there are none."""
    values, count = values.detach(), active.sum()
    total = torch.where(active, values, 0.0).sum(dtype=torch.float64)
    return torch.where(count > 0, total / count.clamp_min(1), empty)
