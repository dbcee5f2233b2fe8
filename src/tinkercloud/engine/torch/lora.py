"""LoRA on frozen linear layers, many adapters in one batch: y = x W^T + b + (alpha / r) (x A^T) B^T.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). The base product runs once over all
rows; each adapter's part runs over the rows of its own segments. Adapter parameters are not autograd's: the backward
pass adds dA and dB straight into the gradient of the segment's operation, datum by datum in row order, so that an
operation's gradient has the same bits whoever shares its batch and wherever micro-batches were cut, and a batch that
comes in two operations has the gradient of one, up to the rounding of a sum of its datums' gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.lora import add_low_rank
from tinkercloud.engine.torch.kernels.low_rank import AdapterRows, LowRank
from tinkercloud.engine.torch.kernels.products import have_products, weight_product
from tinkercloud.engine.torch.products import add_product, add_products_of, product

Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r] of one linear layer; A [experts, r, in] and B [experts, out, r] of a layer's experts."""


class StackedB(NamedTuple):
    """One layer of a `Stack`."""

    column: int
    """The first of its `columns` in the group's output."""
    columns: int
    row: int
    """Its first in the stack's `a`."""
    b: Tensor
    """[columns, r]"""
    b_t: Tensor


class Stack(NamedTuple):
    """The matrices of m linear layers that read the same input and whose outputs lie side by side."""

    a: Tensor
    """[m r, in], their A's one below the other"""
    a_t: Tensor
    bs: Sequence[StackedB]
    places: Tensor
    """int64 [m, 3] on the CPU: of each B its column, columns, and how many numbers behind the first of `a` it is."""


class Factors(list[Pair | None]):
    """An adapter's (A, B) for each of the base model's `linears`, in their order; None where it leaves one alone."""

    def __init__(self, pairs: Iterable[Pair | None], stacks: dict[int, Stack]) -> None:
        """`stacks`: the same matrices by `LoraLinear.group`, for groups of which at least one layer is adapted."""
        super().__init__(pairs)
        self.stacks = stacks
        self._table: Tensor | None = None

    @cached_property
    def most_ranks(self) -> int:
        """Rows of the largest stack's A."""
        return max((len(stack.a) for stack in self.stacks.values()), default=0)

    def table(self, groups: Sequence[int]) -> Tensor:
        """int64 [groups, 4]: of each group's stack the addresses of its A and its places, and how many rows A has and
        how many B's there are; zeros where there is none. Always of the same groups: it is made once."""
        if self._table is None:
            stacks = map(self.stacks.get, groups)
            self._table = torch.tensor(
                [
                    [stack.a.data_ptr(), stack.places.data_ptr(), len(stack.a), len(stack.bs)] if stack else [0] * 4
                    for stack in stacks
                ]
            )
        return self._table


class AdapterWeights(NamedTuple):
    """What a forward pass needs of an adapter. Nothing writes to a sampler's; a trainer's optimizer updates its own."""

    pairs: Factors
    """In the base model's dtype."""
    scale: float
    """alpha / r"""

    def equal(self, other: AdapterWeights) -> bool:
        """Whether another adapter has the same numbers for the same layers."""
        if self.scale != other.scale:
            return False
        return all(
            mine is theirs if mine is None or theirs is None else all(map(torch.equal, mine, theirs))
            for mine, theirs in zip(self.pairs, other.pairs, strict=True)
        )


class DatumRun(NamedTuple):
    """Neighbouring datums of one length."""

    rows: int
    """Of each of them."""
    count: int


def runs_of(lengths: Iterable[int]) -> list[DatumRun]:
    """Datums that lie back to back, given the rows of each."""
    return [DatumRun(rows, len(list(same))) for rows, same in groupby(lengths)]


class Segment(NamedTuple):
    """Rows of a batch that belong to one adapter."""

    weights: AdapterWeights
    start: int
    end: int
    gradient: Factors | None = None
    """Where dA and dB are added (float32, laid out as `weights.pairs`); None where no gradient is wanted."""
    datums: Sequence[DatumRun] = ()
    """Whose the rows are, in order: products are summed within a datum's rows, and the datums' added one by one."""

    def over(self, start: int, lengths: Iterable[int]) -> Segment:
        """The same adapter over other rows, from `start`: some of each datum's, `lengths` in their order."""
        datums = runs_of(lengths)
        return self._replace(start=start, end=start + sum(rows * count for rows, count in datums), datums=datums)


class LoraBatch(tuple[Segment, ...]):
    """The segments of a batch, in row order and without overlap. Rows that none covers see the base model only."""

    is_sampled = False
    """Whether it is of a `SampledLora`."""

    def low_rank(self, group: int) -> LowRank:
        """For kernels: a group's layers in all segments."""
        if group not in self._low_ranks:
            self._low_ranks[group] = LowRank(self._rows_of(group))
        return self._low_ranks[group]

    @cached_property
    def _low_ranks(self) -> dict[int, LowRank]:
        return {}

    @cached_property
    def _datums(self) -> list[Tensor]:
        """Of each segment, int64 [n, 2]."""
        return [torch.tensor(segment.datums, dtype=torch.int64).view(-1, 2) for segment in self]

    def _rows_of(self, group: int) -> Iterable[AdapterRows]:
        for (weights, start, end, gradient, _), datums in zip(self, self._datums, strict=True):
            stack = weights.pairs.stacks.get(group)
            if stack is not None:
                to = None if gradient is None else gradient.stacks[group].a
                yield AdapterRows(start, end - start, stack.a, stack.places, weights.scale, to, datums)


class SampledLora(LoraBatch):
    """Those of a sampling step: of many adapters with few rows each, for which a call of a kernel (`add_sampled`) is
    less work than the tables of a training pass. With AVX-512 the numbers are the same."""

    is_sampled = True


BASE_ONLY = LoraBatch()


class CurrentLora:
    """The adapters of the pass that is running, seen by all linear layers of one base model."""

    __slots__ = ("anchor", "batch")

    def __init__(self, device: torch.device) -> None:
        self.batch = BASE_ONLY
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        """An input that needs a gradient: the first layer's own input (the frozen embedding) needs none, and autograd
        would not visit it."""


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` that adds the current batch's adapters to its output."""

    num_experts = None
    """There is one of it, not one for each expert."""

    def __init__(self, base: nn.Linear, index: int, name: str, part: str, current: CurrentLora) -> None:
        """`index`: its place among the base model's `linears`; `name`: module path; `part`: attn, mlp or unembed."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.index, self.name, self.part, self.current = index, name, part, current
        self.group = index
        """Layers with the same number read the same input, and their outputs lie side by side; see `FusedLinear`."""
        self.first_column = 0
        """Of its group's output."""
        self.is_fused = False
        """Whether there are others in its group."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.current.batch
        if not batch:
            return self.frozen_output(x)
        if torch.is_grad_enabled():
            return _LoraProduct.apply(x, self.current.anchor, self, batch)
        output = self.frozen_output(x)
        if batch.is_sampled and have_kernels(x) and not self.is_fused:
            rows = x.reshape(-1, self.in_features).contiguous()
            add_sampled(self.group, batch, rows, output.view(-1, self.out_features))
            return output
        add_lora(self, batch, x.reshape(-1, self.in_features), output.view(-1, self.out_features))
        return output

    def frozen_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]; `dtype` is that of the rows that it is for."""
        return self.weight

    def frozen_output(self, x: Tensor) -> Tensor:
        """The base model's own part, [..., out] of x [..., in]. Whoever overrides it overrides its gradient too."""
        return frozen_product(x, self.weight, self.bias)

    def frozen_input_gradient(self, d_output: Tensor) -> Tensor:
        """Its input's gradient [rows, in], of the output's [rows, out]."""
        return d_output @ self.weight


Inner = Sequence[Tensor | None]
"""x A^T [rows, r] of each segment, None where an adapter leaves the layer alone; with kernels, all in one flat tensor.
"""


def add_lora(layer: LoraLinear, batch: LoraBatch, x: Tensor, output: Tensor) -> Inner:
    """Add scale * (x A^T) B^T of a layer to `output` in place, of x [rows, in]."""
    if have_products(x) and not layer.is_fused:
        return [batch.low_rank(layer.group).forward(x.contiguous(), output)]
    inner = []
    for segment in batch:
        pair = segment.weights.pairs[layer.index]
        if pair is None:
            inner.append(None)
            continue
        a, b = pair
        rows = slice(segment.start, segment.end)
        low = product(x[rows], a.t())
        add_product(output[rows], low, b.t(), segment.weights.scale)
        inner.append(low)
    return inner


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [..., out] of x [..., in]."""
    if not have_products(x):
        return linear(x, weight, bias)
    rows = x if x.ndim == 2 else x.flatten(0, -2)
    output = weight_product(rows.contiguous(), weight)
    if bias is not None:
        output += bias
    return output if x.ndim == 2 else output.view(*x.shape[:-1], -1)


def add_sampled(group: int, batch: LoraBatch, x: Tensor, output: Tensor) -> None:
    """Add each segment's part of a group's product to `output` [rows, out] in place, of x [rows, in], both contiguous,
    where there are kernels: of many adapters with few rows each, calls cost more than what they compute."""
    rows = x.shape[0]
    for weights, start, end, _, _ in batch:
        stack = weights.pairs.stacks.get(group)
        if stack is None:
            continue
        whole = end - start == rows
        own, out = (x, output) if whole else (x[start:end], output[start:end])
        add_low_rank(own, stack.a, stack.places, weights.scale, out)


def inner_products(layer: LoraLinear, batch: LoraBatch, x: Tensor) -> Inner:
    """x A^T of a layer alone."""
    if have_products(x) and not layer.is_fused:
        return [batch.low_rank(layer.group).forward(x.contiguous(), None)]
    pairs = [(segment.weights.pairs[layer.index], segment.start, segment.end) for segment in batch]
    return [None if pair is None else product(x[start:end], pair[0].t()) for pair, start, end in pairs]


def add_lora_gradients(
    layer: LoraLinear, batch: LoraBatch, x: Tensor, inner: Inner, d_output: Tensor, d_input: Tensor | None
) -> None:
    """Add a layer's dA and dB to each segment's gradient, and its part of the input's gradient to `d_input`.

    x [rows, in], inner as `add_lora` returned it, d_output [rows, out], d_input [rows, in] or None if it is not wanted.
    """
    if have_products(x) and not layer.is_fused:
        batch.low_rank(layer.group).backward(x.contiguous(), *inner, d_output.contiguous(), d_input)
        return
    for segment, low in zip(batch, inner, strict=True):
        if low is None:
            continue
        a, b = segment.weights.pairs[layer.index]
        rows, scale = slice(segment.start, segment.end), segment.weights.scale
        d_out = d_output[rows]
        d_low = product(d_out, b)
        if segment.gradient is not None:
            d_a, d_b = segment.gradient[layer.index]
            add_products(d_b, d_out, low, segment.datums, scale)
            add_products(d_a, d_low, x[rows], segment.datums, scale)
        if d_input is not None:
            add_product(d_input[rows], d_low, a, scale)


def add_products(total: Tensor, left: Tensor, right: Tensor, datums: Sequence[DatumRun], scale: float) -> None:
    """total [m, n] += scale * left^T @ right, left [rows, m] and right [rows, n], in float32 whatever those are.

    On a GPU, where bits are not promised, all rows are summed at once; on the CPU datum by datum, in order.
    """
    if left.is_cuda:
        if left.dtype == total.dtype:
            total.addmm_(left.t(), right, alpha=scale)
        else:
            total.add_(torch.mm(left.t(), right, out_dtype=total.dtype), alpha=scale)
        return
    left, right = left.to(total.dtype), right.to(total.dtype)
    first = 0
    for rows, count in datums:
        last = first + rows * count
        lefts, rights = (rows_of[first:last].unflatten(0, (count, rows)) for rows_of in (left, right))
        add_products_of(total, lefts.transpose(1, 2), rights, scale)
        first = last


class _LoraProduct(torch.autograd.Function):
    """`LoraLinear` under autograd: gives the input's gradient and adds the adapters' to where their segments say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: LoraLinear, batch: LoraBatch) -> Tensor:
        output = layer.frozen_output(x)
        rows = x.reshape(-1, layer.in_features)
        inner = add_lora(layer, batch, rows, output.view(-1, layer.out_features))
        ctx.save_for_backward(rows, *inner)
        ctx.layer, ctx.batch, ctx.shape = layer, batch, x.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        rows, *inner = ctx.saved_tensors
        layer = ctx.layer
        d_output = d_output.reshape(-1, layer.out_features)
        d_input = layer.frozen_input_gradient(d_output) if ctx.needs_input_grad[0] else None
        add_lora_gradients(layer, ctx.batch, rows, inner, d_output, d_input)
        return (None if d_input is None else d_input.view(ctx.shape)), None, None, None
