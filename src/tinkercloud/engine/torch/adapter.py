"""One LoRA adapter: where its matrices lie, how they begin, and the state that training adds to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinkercloud.engine.operations import LoraConfig, OperationError, OptimizerFamily
from tinkercloud.engine.torch.experts import AdaptedLayer
from tinkercloud.engine.torch.lora import AdapterWeights, Factors, Pair, Stack, StackedB


class AdapterLayout:
    """Where A and B of each adapted layer lie in a flat buffer of `size` numbers.

    Layers of one group lie together, first their A's, then their B's, which lie transposed: products with few columns
    cost twice as much as those with few rows.
    """

    def __init__(self, linears: Sequence[AdaptedLayer], adapted: Sequence[bool], rank: int) -> None:
        """`adapted`: for each of the base model's `linears`, whether the adapter has matrices for it."""
        self.rank = rank
        self.names = [linear.name if wanted else None for linear, wanted in zip(linears, adapted, strict=True)]
        self._shapes = [
            _factor_shapes(linear, rank) if wanted else None for linear, wanted in zip(linears, adapted, strict=True)
        ]
        self._groups: dict[int, list[AdaptedLayer]] = {}
        for linear, wanted in zip(linears, adapted, strict=True):
            if wanted:
                self._groups.setdefault(linear.group, []).append(linear)
        self.size = sum(math.prod(shape) for shapes in self._shapes if shapes for shape in shapes)

    def views(self, flat: Tensor) -> Factors:
        """The `Pair` of each linear as views of a flat buffer [size]."""
        pairs: list[Pair | None] = [None] * len(self._shapes)
        stacks: dict[int, Stack] = {}
        offset, r = 0, self.rank
        for group, members in self._groups.items():
            experts, fan_in = members[0].num_experts, members[0].in_features
            if experts is not None:
                linear = members[0]
                middle, end = offset + experts * r * fan_in, offset + experts * r * (fan_in + linear.out_features)
                a = flat[offset:middle].view(experts, r, fan_in)
                pairs[linear.index] = (a, flat[middle:end].view(experts, r, -1).transpose(1, 2))
                offset = end
                continue
            start = offset
            a = flat[offset : offset + r * len(members) * fan_in].view(-1, fan_in)
            offset += a.numel()
            bs, places = [], []
            for place, linear in enumerate(members):
                places.append([linear.first_column, linear.out_features, offset - start])
                b_t = flat[offset : offset + linear.out_features * r].view(r, -1)
                offset += b_t.numel()
                pairs[linear.index] = (a[place * r : (place + 1) * r], b_t.t())
                bs.append(StackedB(linear.first_column, linear.out_features, place * r, b_t.t(), b_t))
            stacks[group] = Stack(a, a.t(), tuple(bs), torch.tensor(places))
        return Factors(pairs, stacks)

    def matrices(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(A [r, in], B [out, r]) of every adapted layer, each expert's by itself."""
        return [
            matrices
            for pair in self.views(flat)
            if pair is not None
            for matrices in (zip(*pair, strict=True) if pair[0].ndim == 3 else [pair])
        ]

    def same_as(self, other: AdapterLayout) -> bool:
        return self.names == other.names and self._shapes == other._shapes


def _factor_shapes(linear: AdaptedLayer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a layer's A and B."""
    experts = () if linear.num_experts is None else (linear.num_experts,)
    return (*experts, rank, linear.in_features), (*experts, linear.out_features, rank)


def layout_of(config: LoraConfig, linears: Sequence[AdaptedLayer]) -> AdapterLayout:
    """The layout of a fresh adapter. OperationError if the rank or the parts cannot be had."""
    if config.rank < 1:
        raise OperationError(f"lora rank must be at least 1, not {config.rank}")
    wanted = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}
    if not any(wanted.values()):
        raise OperationError("nothing to train: set at least one of train_attn, train_mlp, train_unembed")
    there = {linear.part for linear in linears}
    if missing := [part for part in wanted if wanted[part] and part not in there]:
        raise OperationError(
            f"this base model has no {' and no '.join(missing)} layers that can be adapted; "
            f"set {' and '.join(f'train_{part}' for part in missing)} to false"
        )
    return AdapterLayout(linears, [wanted[linear.part] for linear in linears], config.rank)


class Adapter:
    """An adapter in training. Parameters, gradient and moments are flat float32 buffers of one layout.

    `gradient` is None while nothing has been accumulated; there are no moments before the first step.
    """

    def __init__(
        self,
        config: LoraConfig,
        layout: AdapterLayout,
        parameters: Tensor,
        dtype: torch.dtype,
        optimizer: OptimizerFamily = "adamw",
    ) -> None:
        """`parameters` float32 [layout.size]; `dtype` is the base model's, in which forward passes use them."""
        self.config, self.layout, self.parameters, self.optimizer = config, layout, parameters, optimizer
        self.gradient: Tensor | None = None
        self.moments: dict[str, Tensor] = {}
        """The optimizer's state, by its own names."""
        self.steps = 0
        """Steps taken so far."""
        self._compute = parameters if dtype == parameters.dtype else parameters.to(dtype)
        self.weights = AdapterWeights(layout.views(self._compute), config.alpha / config.rank)

    @classmethod
    def fresh(
        cls,
        config: LoraConfig,
        layout: AdapterLayout,
        device: torch.device,
        dtype: torch.dtype,
        optimizer: OptimizerFamily = "adamw",
    ) -> Adapter:
        """A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5), as PEFT), B zero, from the config's seed alone."""
        parameters = torch.zeros(layout.size)
        generator = torch.Generator().manual_seed(config.seed % 2**63)
        for pair in layout.views(parameters):
            if pair is not None:
                a = pair[0]
                bound = 1 / math.sqrt(a.shape[-1])
                a.uniform_(-bound, bound, generator=generator)
        return cls(config, layout, parameters.to(device), dtype, optimizer)

    def parameters_changed(self) -> None:
        """Bring `weights` up to date after `parameters` was written to."""
        if self._compute is not self.parameters:
            self._compute.copy_(self.parameters)

    def add_gradient(self, gradient: Tensor) -> None:
        """Accumulate a flat gradient, which is the adapter's from then on."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient.add_(gradient)


def frozen_weights(layout: AdapterLayout, parameters: Tensor, scale: float, dtype: torch.dtype) -> AdapterWeights:
    """A sampler's own copy of flat `parameters`: nothing that happens to them later shows in it."""
    return AdapterWeights(layout.views(parameters.detach().to(dtype, copy=True)), scale)
