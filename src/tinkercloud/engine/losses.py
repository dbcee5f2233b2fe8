"""The losses that the server knows: what each needs and takes, as the wire names it.

Their formulas and sources are in `engine/torch/losses.py`, one function of the same name each; this table needs neither
torch nor numpy, so the API validates with it too. `docs/losses.md` is made from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from tinkercloud.engine.operations import OperationError


class LossInput(Struct, frozen=True):
    """One of `loss_fn_inputs`, of the shape of target_tokens."""

    name: str
    meaning: str
    dtype: Literal["int64", "float32"] = "float32"
    origin: Literal["client", "record", "either"] = "client"
    """"record": not sent, but joined when the batch is accepted, from what was recorded when the tokens that the
    datum's spans name were sampled. "either": joined too; a client may send it, and the record takes its place."""


class ConfigKey(Struct, frozen=True):
    """One of the numbers in `loss_fn_config`."""

    name: str
    default: float
    meaning: str
    switch: bool = False
    """Whether it is 0 or 1; else it is any number from `least` to `most`."""
    least: float = 0.0
    most: float = math.inf


class Loss(Struct, frozen=True):
    """What a request for one loss must and may say."""

    name: str
    inputs: tuple[LossInput, ...]
    """What the formula reads; `target_tokens` is the first."""
    counts: str
    """The input that says by an entry other than 0 which positions the metrics count."""
    config: tuple[ConfigKey, ...] = ()
    several_targets: bool = False
    """Whether target_tokens may be [N, K], K weighted targets a position, besides [N]."""
    output_type: str = "ArrayRecord"
    """The wire's name for the records that it returns."""

    @property
    def defaults(self) -> dict[str, float]:
        return {key.name: key.default for key in self.config}

    @property
    def required(self) -> list[str]:
        """The inputs that a client must send."""
        return [wanted.name for wanted in self.inputs if wanted.origin == "client"]

    @property
    def allowed(self) -> list[str]:
        """The inputs that a client may send."""
        return [wanted.name for wanted in self.inputs if wanted.origin != "record"]

    @property
    def needs_records(self) -> bool:
        """Whether its datums must name the sampled sequences behind their tokens."""
        return any(wanted.origin != "client" for wanted in self.inputs)


_TARGETS = LossInput("target_tokens", "the token that each position is to predict", "int64")
_POLICY = (
    _TARGETS,
    LossInput("logprobs", "log-probability that the sampler gave each target"),
    LossInput("advantages", "how much better than expected; 0 where the token was not sampled"),
)
_RECORDED_POLICY = (
    _TARGETS,
    LossInput("advantages", "how much better than expected; 0 where the token was not sampled"),
    LossInput("logprobs", "log-probability with which each sampled target was drawn", origin="either"),
    LossInput("policy_logprobs", "that of the sampler's weights at temperature 1", origin="record"),
    LossInput("sampled", "1 at the sampled targets", origin="record"),
)
_ENTROPY = ConfigKey("entropy", 0.0, "1 adds the metric `entropy:mean`", switch=True)


def _bounds(low: float, high: float) -> tuple[ConfigKey, ConfigKey]:
    """Bounds of the probability ratio itself, not distances from 1."""
    return (
        ConfigKey("clip_low_threshold", low, "lower bound of the probability ratio"),
        ConfigKey("clip_high_threshold", high, "upper bound of the probability ratio"),
    )


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "cross_entropy",
            (_TARGETS, LossInput("weights", "weight of each target")),
            counts="weights",
            config=(_ENTROPY,),
            several_targets=True,
            output_type="CrossEntropyLossReturn",
        ),
        Loss(
            "importance_sampling",
            _POLICY,
            counts="advantages",
            config=(_ENTROPY,),
            output_type="ImportanceSamplingLossReturn",
        ),
        Loss(
            "ppo",
            _POLICY,
            counts="advantages",
            config=(*_bounds(0.8, 1.2), _ENTROPY),
            output_type="PPOLossReturn",
        ),
        Loss(
            "cispo",
            _POLICY,
            counts="advantages",
            config=(*_bounds(0.0, 4.0), _ENTROPY),
            output_type="CISPOLossReturn",
        ),
        Loss(
            "dro",
            _POLICY,
            counts="advantages",
            config=(ConfigKey("beta", 0.05, "strength of the quadratic penalty"), _ENTROPY),
            output_type="DROLossReturn",
        ),
        Loss(
            "gspo",
            (*_POLICY, LossInput("sequence_ratio_mask", "not 0 at the tokens whose mean log-ratio is the sequence's")),
            counts="sequence_ratio_mask",
            config=(*_bounds(0.8, 1.2), _ENTROPY),
            output_type="GSPOLossReturn",
        ),
        Loss(
            "stable_reinforce",
            _RECORDED_POLICY,
            counts="sampled",
            config=(
                ConfigKey("kl_coeff", 0.01, "weight of the divergence from the sampler's policy"),
                ConfigKey("clip_low_threshold", 0.5, "lower bound of the probability ratio, at most 1", most=1.0),
                ConfigKey("clip_high_threshold", 2.0, "upper bound of the probability ratio, at least 1", least=1.0),
                _ENTROPY,
            ),
            output_type="StableReinforceLossReturn",
        ),
    )
}


def loss_named(name: str) -> Loss:
    """OperationError names the losses that there are."""
    loss = LOSSES.get(name)
    if loss is None:
        raise OperationError(f"unknown loss_fn {name!r}; this server has {', '.join(LOSSES)}")
    return loss


def loss_config(loss: Loss, given: Mapping[str, float | str]) -> dict[str, float]:
    """`given` over the loss's defaults.

    OperationError on an unknown key, on text, on a number out of range, and on bounds that exclude all.
    """
    keys = {key.name: key for key in loss.config}
    config = loss.defaults
    for name, value in given.items():
        key = keys.get(name)
        if key is None:
            raise OperationError(f"loss_fn_config of {loss.name} has no {name!r}; it takes {', '.join(keys)}")
        if isinstance(value, str) or not math.isfinite(value):
            raise OperationError(f"loss_fn_config {name!r} must be a finite number, not {value!r}")
        if value not in (0, 1) if key.switch else not key.least <= value <= key.most:
            bounds = f"at least {key.least:g}" if key.most == math.inf else f"{key.least:g} to {key.most:g}"
            right = "0 or 1" if key.switch else bounds
            raise OperationError(f"loss_fn_config {name!r} of {loss.name} must be {right}, not {value:g}")
        config[name] = float(value)
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", math.inf)
    if low > high:
        raise OperationError(
            f"clip_low_threshold {low} and clip_high_threshold {high} are bounds of the probability ratio: "
            "0 <= low <= high"
        )
    return config
