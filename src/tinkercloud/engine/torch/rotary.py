"""Rotary position embedding of heads whose halves are rotated against each other (Su et al., 2021, as Llama has it)."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkercloud.engine.torch.kernels.backward import rotated_backward
from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.rows import rotated
from tinkercloud.engine.torch.rms_norm import RMSNorm


class Rotation:
    """The rotation of one pass's rows, the same in all layers. Heads are [T, H, D]."""

    def __init__(self, positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> None:
        """positions int64 [T]; frequencies float32 [D / 2], radians per position."""
        angles = positions.unsqueeze(1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if scaling != 1:
            cos, sin = cos * scaling, sin * scaling
        self._cos = torch.cat((cos, cos), dim=1).unsqueeze(1).to(dtype)
        self._sin = sin.unsqueeze(1).to(dtype)

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D / 2]."""
        sin = self._sin[:, 0]
        return self._cos[:, 0, : sin.shape[1]], sin

    def of_heads(self, projected: Tensor, count: int, norm: RMSNorm | None) -> Tensor:
        """The first `count` heads [T, count, D] of rows [T, ...], normalised if there is a norm, and rotated."""
        if have_kernels(projected):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return rotated(projected, weight, eps, count, self._cos[:, 0], self._sin[:, 0])
        heads = projected.view(len(projected), -1, self._cos.shape[-1]).narrow(1, 0, count)
        return self(heads if norm is None else norm(heads))

    def backward_of_heads(self, projected: Tensor, norm: RMSNorm | None, d_heads: tuple[Tensor, ...]) -> Tensor:
        """The gradient of rows [T, ...], queries, keys and values side by side, from those of the queries and the keys
        that `of_heads` gives and of the values, [T, H, D] each."""
        if have_kernels(projected):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return rotated_backward(projected, weight, eps, self._cos[:, 0], self._sin[:, 0], d_heads)
        heads = projected.view(len(projected), -1, self._cos.shape[-1])
        d_query, d_key, d_value = d_heads
        d_projected = torch.empty_like(heads)
        rotated = d_query.shape[1] + d_key.shape[1]
        self.backward(d_query, d_projected.narrow(1, 0, d_query.shape[1]))
        self.backward(d_key, d_projected.narrow(1, d_query.shape[1], d_key.shape[1]))
        d_projected.narrow(1, rotated, d_value.shape[1]).copy_(d_value)
        if norm is not None:
            d_rotated = d_projected.narrow(1, 0, rotated)
            d_rotated.copy_(norm.backward(heads.narrow(1, 0, rotated), d_rotated))
        return d_projected.flatten(1)

    def __call__(self, heads: Tensor) -> Tensor:
        """The heads, rotated."""
        rotated = heads * self._cos
        self._add_turned(heads, rotated, 1)
        return rotated

    def backward(self, d_rotated: Tensor, d_heads: Tensor) -> None:
        """Write the gradient of the heads to `d_heads`: that of the rotated ones, rotated back."""
        torch.mul(d_rotated, self._cos, out=d_heads)
        self._add_turned(d_rotated, d_heads, -1)

    def _add_turned(self, heads: Tensor, output: Tensor, sign: int) -> None:
        """Add sin times the heads turned by 90 degrees, (-second half, first half), to `output`."""
        (first, second), (to_first, to_second) = heads.chunk(2, dim=-1), output.chunk(2, dim=-1)
        to_first.addcmul_(second, self._sin, value=-sign)
        to_second.addcmul_(first, self._sin, value=sign)
