"""AdamW over one adapter's flat buffers. No other adapter is touched.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), in the form of `torch.optim.AdamW`.
"""

from __future__ import annotations

import math

import torch

from tinkercloud.engine.torch.adapter import Adapter
from tinkercloud.engine.types import AdamParams, OperationError

LARGEST_NORM = 1e18
"""A gradient of a larger L2 norm (no unit) would overflow the float32 second moment, so it counts as infinite."""

LARGEST_NUMBER = torch.finfo(torch.float32).max
"""What the buffers can hold (no unit)."""


def adamw_step(adapter: Adapter, adam: AdamParams) -> dict[str, float]:
    """Apply and clear the adapter's accumulated gradient (none is zero); the step's metrics.

    All or nothing: OperationError leaves weights and moments as they were. The gradient is cleared then too, whatever
    the reason, so that a recovery need not know it to arrive at the same state.
    """
    parameters, gradient = adapter.parameters, adapter.gradient
    adapter.gradient = None
    _check(adam)
    if gradient is None:
        gradient = torch.zeros_like(parameters)
    norm = torch.linalg.vector_norm(gradient).item()
    if not norm <= LARGEST_NORM:
        raise OperationError(
            "the accumulated gradient is not finite, so the step was not taken; weights and optimizer state are as "
            "before and the gradient was cleared. Look for extreme weights, advantages or logprobs in the data"
        )
    metrics = {"learning_rate:mean": adam.learning_rate}
    if adam.grad_clip_norm > 0:
        metrics["unclipped_grad_l2:mean"] = norm
        clip = min(1.0, adam.grad_clip_norm / (norm + 1e-6))
    else:
        clip = 1.0

    scaled = gradient * clip if clip < 1 else gradient
    first, second = adapter.first_moment, adapter.second_moment
    first = torch.zeros_like(parameters) if first is None else first
    second = torch.zeros_like(parameters) if second is None else second
    steps = adapter.steps + 1
    first = torch.lerp(first, scaled, 1 - adam.beta1)
    second = (second * adam.beta2).addcmul_(scaled, scaled, value=1 - adam.beta2)
    denominator = second.sqrt().div_(math.sqrt(1 - adam.beta2**steps)).add_(adam.eps)
    step_size = min(adam.learning_rate / (1 - adam.beta1**steps), LARGEST_NUMBER)
    updated = (parameters * (1 - adam.learning_rate * adam.weight_decay)).addcdiv_(first, denominator, value=-step_size)
    if not updated.sum().isfinite():  # one pass: an infinite or NaN term leaves no finite sum
        raise OperationError(
            f"this step would make weights infinite or NaN (learning_rate {adam.learning_rate}, eps {adam.eps}, "
            f"weight_decay {adam.weight_decay}); it was not taken and the gradient was cleared"
        )

    parameters.copy_(updated)
    adapter.first_moment, adapter.second_moment, adapter.steps = first, second, steps
    adapter.parameters_changed()
    return metrics


def _check(adam: AdamParams) -> None:
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(adam, name)
        if not 0 <= value <= LARGEST_NUMBER:
            raise OperationError(f"{name} must be a float32 number of at least 0, not {value}")
    for name in ("beta1", "beta2"):
        value = getattr(adam, name)
        if not 0 <= value < 1:
            raise OperationError(f"{name} must be at least 0 and below 1, not {value}")
