"""AdamW over an adapter's flat buffers.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), in the form of `torch.optim.AdamW`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinkercloud.engine.operations import AdamParams
from tinkercloud.engine.torch.adapter import Adapter


class AdamW:
    """See `optimizer.Optimizer`."""

    moments = ("first_moment", "second_moment")

    def propose(self, adapter: Adapter, gradient: Tensor, params: AdamParams) -> tuple[Tensor, dict[str, Tensor]]:
        parameters, steps = adapter.parameters, adapter.steps + 1
        first, second = (adapter.moments.get(name, torch.zeros_like(parameters)) for name in self.moments)
        first = torch.lerp(first, gradient, 1 - params.beta1)
        second = (second * params.beta2).addcmul_(gradient, gradient, value=1 - params.beta2)
        denominator = second.sqrt().div_(math.sqrt(1 - params.beta2**steps)).add_(params.eps)
        step_size = min(params.learning_rate / (1 - params.beta1**steps), torch.finfo(torch.float32).max)
        decayed = parameters * (1 - params.learning_rate * params.weight_decay)
        updated = decayed.addcdiv_(first, denominator, value=-step_size)
        return updated, {"first_moment": first, "second_moment": second}
