"""The seam of the optimizers: what one is, which there are, and how a step is taken with any of them.

An optimizer is a pure proposal: from parameters, gradient and moments to new parameters and new moments. The adapter
keeps the state, and `take_step` sees to it that a step happens whole or not at all. No other adapter is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tinkercloud.engine.operations import OperationError, OptimizerFamily, OptimizerParams, family_of
from tinkercloud.engine.torch.adapter import Adapter
from tinkercloud.engine.torch.optimizer_adamw import AdamW
from tinkercloud.engine.torch.optimizer_dimuon import Dimuon

LARGEST_NORM = 1e18
"""A gradient of a larger L2 norm (no unit) would overflow the float32 second moment, so it counts as infinite."""

LARGEST_NUMBER = torch.finfo(torch.float32).max
"""What the buffers can hold (no unit)."""


class Optimizer(Protocol):
    """One family of optimizers. It holds no state: an adapter's moments are its own."""

    moments: tuple[str, ...]
    """The names of its state's buffers; an adapter has none of them before its first step."""

    def propose(self, adapter: Adapter, gradient: Tensor, params: OptimizerParams) -> tuple[Tensor, dict[str, Tensor]]:
        """(parameters, moments) after a step along `gradient`, clipped already; the adapter is left as it is."""
        ...


OPTIMIZERS: Mapping[OptimizerFamily, Optimizer] = {"adamw": AdamW(), "dimuon": Dimuon()}


def take_step(adapter: Adapter, params: OptimizerParams) -> dict[str, float]:
    """Apply and clear the adapter's accumulated gradient (none is zero); the step's metrics.

    All or nothing: OperationError leaves weights and moments as they were. The gradient is cleared then too, whatever
    the reason, so that a recovery need not know it to arrive at the same state.
    """
    gradient, adapter.gradient = adapter.gradient, None
    _check(adapter.optimizer, params)
    if gradient is None:
        gradient = torch.zeros_like(adapter.parameters)
    norm = torch.linalg.vector_norm(gradient).item()
    if not norm <= LARGEST_NORM:
        raise OperationError(
            "the accumulated gradient is not finite, so the step was not taken; weights and optimizer state are as "
            "before and the gradient was cleared. Look for extreme weights, advantages or logprobs in the data"
        )
    if 0 < params.grad_clip_norm < norm + 1e-6:
        gradient = gradient * (params.grad_clip_norm / (norm + 1e-6))
    parameters, moments = OPTIMIZERS[adapter.optimizer].propose(adapter, gradient, params)
    if not parameters.sum().isfinite():  # one pass: an infinite or NaN term leaves no finite sum
        settings = ", ".join(f"{name} {getattr(params, name)}" for name in params.__struct_fields__)
        raise OperationError(
            f"this step would make weights infinite or NaN ({settings}); it was not taken and the gradient was cleared"
        )
    adapter.parameters.copy_(parameters)
    adapter.moments = moments
    adapter.steps += 1
    adapter.parameters_changed()
    return {"learning_rate:mean": params.learning_rate, "unclipped_grad_l2:mean": norm}


def _check(family: OptimizerFamily, params: OptimizerParams) -> None:
    if family_of(params) != family:
        raise OperationError(
            f"this model's optimizer is {family}, chosen when it was created; the step's parameters are "
            f"{family_of(params)}'s"
        )
    for name in ("learning_rate", "eps", "weight_decay"):
        value = getattr(params, name, 0.0)
        if not 0 <= value <= LARGEST_NUMBER:
            raise OperationError(f"{name} must be a float32 number of at least 0, not {value}")
    for name in ("beta1", "beta2"):
        value = getattr(params, name, 0.0)
        if not 0 <= value < 1:
            raise OperationError(f"{name} must be at least 0 and below 1, not {value}")
    if not abs(params.grad_clip_norm) <= LARGEST_NUMBER:
        raise OperationError(f"grad_clip_norm must be a float32 number (0 is off), not {params.grad_clip_norm}")
