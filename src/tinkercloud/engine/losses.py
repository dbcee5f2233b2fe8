"""The losses that the server knows: what each needs and takes, as the wire names it.

Their formulas are in `engine/torch/losses.py`, one function of the same name each; this table needs neither torch nor
numpy, so the API validates with it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from tinkercloud.engine.types import OperationError


class LossInput(Struct, frozen=True):
    """One of `loss_fn_inputs`, of the shape of target_tokens."""

    name: str
    dtype: Literal["int64", "float32"] = "float32"


class Loss(Struct, frozen=True):
    name: str
    inputs: tuple[LossInput, ...]
    """All required; `target_tokens` is the first."""
    config: dict[str, float] = {}
    """The keys of `loss_fn_config`, with their defaults."""
    several_targets: bool = False
    """Whether target_tokens may be [N, K], K weighted targets a position, besides [N]."""
    output_type: str = "ArrayRecord"
    """The wire's name for the records that it returns."""


_TARGETS = LossInput("target_tokens", "int64")
_POLICY = (_TARGETS, LossInput("logprobs"), LossInput("advantages"))

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "cross_entropy",
            (_TARGETS, LossInput("weights")),
            several_targets=True,
            output_type="CrossEntropyLossReturn",
        ),
        Loss("importance_sampling", _POLICY, output_type="ImportanceSamplingLossReturn"),
        Loss(
            "ppo",
            _POLICY,
            # Bounds of the probability ratio itself, not distances from 1.
            config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            output_type="PPOLossReturn",
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
    """`given` over the loss's defaults. OperationError on an unknown key, on text, and on bounds that exclude all."""
    config = dict(loss.config)
    for key, value in given.items():
        if key not in config:
            known = ", ".join(loss.config) or "no keys"
            raise OperationError(f"loss_fn_config of {loss.name} has no {key!r}; it takes {known}")
        if isinstance(value, str) or value != value or abs(value) == float("inf"):
            raise OperationError(f"loss_fn_config {key!r} must be a finite number, not {value!r}")
        config[key] = float(value)
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    if low is not None and high is not None and not 0 <= low <= high:
        raise OperationError(
            f"clip_low_threshold {low} and clip_high_threshold {high} are bounds of the probability ratio: "
            "0 <= low <= high"
        )
    return config
