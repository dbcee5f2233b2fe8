"""Linear layers that read the same input (q, k and v; gate and up) as one product, with their LoRA.

One large product instead of several small ones, forward and backward, and one product with the stacked A's of an
adapter. The layers' own weights become views of the common one, so nothing is held twice. As in `lora`, the backward
pass adds dA and dB to the gradients of the segments' operations, datum by datum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.products import have_products
from tinkercloud.engine.torch.lora import Inner, LoraBatch, LoraLinear, add_products, add_sampled, frozen_product
from tinkercloud.engine.torch.products import add_product, product


class FusedLinear:
    """See the module's docstring. x [T, in] to [T, out], the layers' outputs side by side."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        """Takes the layers' weights over; they must all have a bias, or none of them."""
        self.group = layers[0].group
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        self.sizes = [layer.out_features for layer in layers]
        if len(layers) == 1:
            self.weight, self.bias = weights[0], biases[0]
        else:
            self.weight = torch.cat(weights)
            self.bias = None if biases[0] is None else torch.cat(biases)
            first = 0
            for layer, part in zip(layers, self.weight.split(self.sizes), strict=True):
                layer.weight = nn.Parameter(part, requires_grad=False)
                layer.group, layer.first_column, layer.is_fused = self.group, first, True
                first += layer.out_features
        self._weight_t = self.weight.t()

    def __call__(self, x: Tensor, lora: LoraBatch) -> tuple[Tensor, Inner]:
        """The output, and what `backward` wants to know."""
        output = frozen_product(x, self.weight, self.bias)
        return output, self._add_lora(x, lora, output)

    def added_to(self, residual: Tensor, x: Tensor, lora: LoraBatch) -> tuple[Tensor, Inner]:
        """residual [T, out] + the output of x."""
        if have_products(x):
            output, inner = self(x, lora)
            return output.add_(residual), inner
        output = torch.addmm(residual, x, self._weight_t)
        if self.bias is not None:
            output += self.bias
        return output, self._add_lora(x, lora, output)

    def backward(
        self, x: Tensor, inner: Inner, lora: LoraBatch, d_output: Tensor, input_wanted: bool = True
    ) -> Tensor | None:
        """The input's gradient [T, in], if it is wanted, of the output's [T, out]; adds the adapters' own."""
        d_input = d_output @ self.weight if input_wanted else None
        if have_products(x):
            lora.low_rank(self.group).backward(x.contiguous(), *inner, d_output.contiguous(), d_input)
            return d_input
        for segment, low in zip(lora, inner, strict=True):
            if low is None:
                continue
            stack, scale = segment.weights.pairs.stacks[self.group], segment.weights.scale
            gradient = None if segment.gradient is None else segment.gradient.stacks[self.group]
            start, rows = segment.start, segment.end - segment.start
            d_out, d_low = d_output.narrow(0, start, rows), torch.empty_like(low)
            for place, (column, columns, row, b, b_t) in enumerate(stack.bs):
                d_own = d_out.narrow(1, column, columns)
                d_low.narrow(1, row, len(b_t)).copy_(product(d_own, b))
                if gradient is not None:
                    add_products(gradient.bs[place].b, d_own, low.narrow(1, row, len(b_t)), segment.datums, scale)
            if gradient is not None:
                add_products(gradient.a, d_low, x.narrow(0, start, rows), segment.datums, scale)
            if d_input is not None:
                add_product(d_input.narrow(0, start, rows), d_low, stack.a, scale)
        return d_input

    def _add_lora(self, x: Tensor, lora: LoraBatch, output: Tensor) -> Inner:
        """Add the adapters' part to `output` in place."""
        if lora.is_sampled and have_kernels(x):
            add_sampled(self.group, lora, x, output)
            return []
        if have_products(x):
            return [lora.low_rank(self.group).forward(x.contiguous(), output)]
        inner: list[Tensor | None] = []
        total = len(x)
        for weights, start, end, _, _ in lora:
            stack = weights.pairs.stacks.get(self.group)
            if stack is None:
                inner.append(None)
                continue
            rows = end - start
            own, out = (x, output) if rows == total else (x.narrow(0, start, rows), output.narrow(0, start, rows))
            low = product(own, stack.a_t)
            for column, columns, row, _, b_t in stack.bs:
                if len(stack.bs) == 1 and columns == output.shape[1]:
                    add_product(out, low, b_t, weights.scale)
                else:
                    add_product(out.narrow(1, column, columns), low.narrow(1, row, len(b_t)), b_t, weights.scale)
            inner.append(low)
        return inner
