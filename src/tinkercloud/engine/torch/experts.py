"""Fused experts of a mixture of them, with LoRA on each: every expert has an A and a B of its own for each parameter.

transformers 5 keeps the experts of a layer as 3-D parameters, `gate_up_proj` and `down_proj`. A token goes through the
experts that its router chose and gets the weighted sum of what they return. Here all (token, chosen expert) pairs are
put in order of their expert, then of their token, so that each expert's rows are one product, and so that within them
an adapter's rows, and a datum's, still lie back to back. As in `lora`, gradients are added datum by datum, in order;
the router is frozen, though gradients pass through the weights that it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinkercloud.engine.peft_layout import EXPERT_PARAMETERS
from tinkercloud.engine.torch.lora import CurrentLora, DatumRun, LoraBatch, LoraLinear, Segment, add_products, runs_of
from tinkercloud.engine.torch.products import add_product, product


def are_fused_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds a layer's experts as 3-D parameters."""
    return path.endswith("experts") and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def can_adapt(experts: nn.Module) -> bool:
    """Whether fused experts are of the one kind that `Experts` computes: gated, and nothing after the down product."""
    has = experts.__dict__.get
    gated = has("has_gate") and not has("has_post_expert_norm") and hasattr(experts, "_apply_gate")
    return bool(gated) and all(hasattr(experts, name) for name in EXPERT_PARAMETERS)


class ExpertsLinear:
    """One 3-D parameter of a layer's experts: a linear layer [out, in] for each of them."""

    def __init__(self, experts: nn.Module, parameter: str, index: int, path: str) -> None:
        """`index`: its place among the base model's `linears`; `path`: of the module `experts`."""
        weight = getattr(experts, parameter)
        self.weight = weight.detach() if experts.is_transposed else weight.detach().transpose(1, 2)
        """[experts, in, out]"""
        self.bias = getattr(experts, f"{parameter}_bias").detach() if experts.has_bias else None
        """[experts, out]"""
        self.num_experts, self.in_features, self.out_features = self.weight.shape
        self.index, self.name, self.part = index, f"{path}.{parameter}", "mlp"
        self.group = index
        """No other layer is in it; see `LoraLinear.group`."""


AdaptedLayer = LoraLinear | ExpertsLinear
"""What a base model's `linears` are."""


class Rows(NamedTuple):
    """Rows of one segment that go to one expert."""

    segment: Segment
    expert: int
    start: int
    end: int
    datums: list[DatumRun]
    """Of the segment's datums, those that have any of the rows."""


class Routing:
    """Which rows of a pass go where, in one layer."""

    def __init__(self, chosen: Tensor, num_experts: int, batch: LoraBatch) -> None:
        """`chosen` int64 [T, k]: the experts of each token."""
        tokens, self.choices = chosen.shape
        flat = chosen.reshape(-1)
        pieces, piece_of = _pieces(tokens, batch, by_datum=not chosen.is_cuda)
        share_of = flat * len(pieces) + piece_of.to(flat.device).repeat_interleave(self.choices)
        table = torch.bincount(share_of, minlength=num_experts * len(pieces)).view(num_experts, -1)
        order = flat.argsort(stable=True)
        self.places = torch.empty_like(order)
        """int64 [T * k]: the row of each (token, choice)."""
        self.places[order] = torch.arange(len(order), device=flat.device)
        self.experts: list[tuple[int, int, int]] = []
        """(expert, its first row, the row after its last), of those that have any."""
        self.rows: list[Rows] = []
        """Of the batch's segments, by expert."""
        end = 0
        for expert, shares in enumerate(table.tolist()):
            start, end = end, end + sum(shares)
            if end > start:
                self.experts.append((expert, start, end))
                self.rows += _rows_of(expert, start, shares, pieces)

    def gather(self, hidden: Tensor) -> Tensor:
        """Rows [T * k, H] of tokens [T, H]."""
        pairs = hidden.unsqueeze(1).expand(-1, self.choices, -1).reshape(-1, hidden.shape[-1])
        return torch.empty_like(pairs).index_copy(0, self.places, pairs)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[T, H]: each token's rows, summed with its router's weights [T, k]."""
        pairs = rows.index_select(0, self.places).view(*weights.shape, -1)
        return (pairs * weights.unsqueeze(-1)).sum(1)


def _pieces(tokens: int, batch: LoraBatch, by_datum: bool) -> tuple[list[Segment | None], Tensor]:
    """Cut `tokens` rows at the edges of segments, and of datums if asked: (the segment of each piece, None if no
    segment covers it; int64 [tokens], each row's piece)."""
    owners: list[Segment | None] = []
    sizes: list[int] = []
    end = 0
    for segment in batch:
        datums = [rows for rows, count in segment.datums for _ in range(count)] if by_datum else []
        lengths = datums or [segment.end - segment.start]
        owners += [None, *[segment] * len(lengths)]
        sizes += [segment.start - end, *lengths]
        end = segment.end
    return [*owners, None], torch.arange(len(sizes) + 1).repeat_interleave(torch.tensor([*sizes, tokens - end]))


def _rows_of(expert: int, start: int, shares: Sequence[int], pieces: Sequence[Segment | None]) -> Iterator[Rows]:
    """The rows of each segment among an expert's, from `start`, of which each piece has its share."""
    for segment, own in groupby(zip(pieces, shares, strict=True), key=lambda piece: piece[0]):
        sizes = [share for _, share in own if share]
        end = start + sum(sizes)
        if segment is not None and sizes:
            yield Rows(segment, expert, start, end, runs_of(sizes))
        start = end


class Experts(nn.Module):
    """A layer's experts, in place of transformers' own, whose gate they keep. Their parameters keep their paths."""

    def __init__(self, base: nn.Module, linears: Sequence[ExpertsLinear], current: CurrentLora) -> None:
        super().__init__()
        for name, parameter in base.named_parameters():
            self.register_parameter(name, parameter)
        self._gate = base._apply_gate
        self._gate_up, self._down = linears
        self._current = current

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """[T, H] of tokens [T, H] that go to experts `chosen` int64 [T, k] with `weights` [T, k]."""
        routing = Routing(chosen, self._gate_up.num_experts, self._current.batch)
        anchor = self._current.anchor
        rows = _ExpertsProduct.apply(routing.gather(hidden), anchor, self._gate_up, routing)
        rows = _ExpertsProduct.apply(self._gate(rows), anchor, self._down, routing)
        return routing.combine(rows, weights).to(hidden.dtype)


class _ExpertsProduct(torch.autograd.Function):
    """Rows of all experts through their linear layers, adapters included; gives the input's gradient and adds the
    adapters' to where their segments say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: ExpertsLinear, routing: Routing) -> Tensor:
        output = x.new_empty(len(x), layer.out_features)
        for expert, start, end in routing.experts:
            output[start:end] = product(x[start:end], layer.weight[expert])
            if layer.bias is not None:
                output[start:end] += layer.bias[expert]
        inner = []
        for rows in routing.rows:
            pair = rows.segment.weights.pairs[layer.index]
            if pair is not None:
                a, b = (factor[rows.expert] for factor in pair)
                low = product(x[rows.start : rows.end], a.t())
                add_product(output[rows.start : rows.end], low, b.t(), rows.segment.weights.scale)
                inner.append(low)
        ctx.save_for_backward(x, *inner)
        ctx.layer, ctx.routing = layer, routing
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, *inner = ctx.saved_tensors
        layer, routing = ctx.layer, ctx.routing
        d_input = torch.empty_like(x)
        for expert, start, end in routing.experts:
            d_input[start:end] = product(d_output[start:end], layer.weight[expert].t())
        lows = iter(inner)
        for rows in routing.rows:
            segment, own = rows.segment, slice(rows.start, rows.end)
            pair = segment.weights.pairs[layer.index]
            if pair is None:
                continue
            a, b = (factor[rows.expert] for factor in pair)
            low, d_low = next(lows), product(d_output[own], b)
            if segment.gradient is not None:
                d_a, d_b = (factor[rows.expert] for factor in segment.gradient[layer.index])
                add_products(d_b, d_output[own], low, rows.datums, segment.weights.scale)
                add_products(d_a, d_low, x[own], rows.datums, segment.weights.scale)
            add_product(d_input[own], d_low, a, segment.weights.scale)
        return d_input, None, None, None
