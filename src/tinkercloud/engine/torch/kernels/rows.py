"""What a decoder layer does to each row beside products, each in one pass over memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import kernel
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    div,
    exp,
    floats,
    fma,
    mul,
    neg,
    part,
    splat,
    store_part,
    total,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] / rms(x) * weight [D]."""
    assert weight.is_contiguous()
    x = x.contiguous()
    output = torch.empty_like(x)
    _rms_norm(x.data_ptr(), weight.data_ptr(), output.data_ptr(), x.shape[0], x.shape[1], eps)
    return output


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [T, I] of rows of gate and up [T, 2 I], contiguous."""
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape
    output = gate_up.new_empty(rows, width // 2)
    _gated(gate_up.data_ptr(), output.data_ptr(), rows, width // 2)
    return output


def rotated(projected: Tensor, weight: Tensor | None, eps: float, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The first `heads` heads [T, heads, D] of the rows of `projected` [T, ...], each divided by its rms and multiplied
    by its `weight` [heads, D] if there is one, then rotated: cos and sin are [T, D / 2], D being even."""
    assert projected.stride(-1) == cos.stride(1) == sin.stride(1) == 1
    assert weight is None or weight.is_contiguous()
    rows, half = sin.shape
    output = projected.new_empty(rows, heads, 2 * half)
    _rotated(
        projected.data_ptr(), projected.stride(0), 0 if weight is None else weight.data_ptr(), eps, output.data_ptr(),
        rows, heads, half, cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0),
    )  # fmt: skip
    return output


@kernel("void(int64,int64,int64,int64,int64,float32)")
def _rms_norm(x_at, weight_at, output_at, rows, width, eps):
    x, weight, output = floats(x_at), floats(weight_at), floats(output_at)
    for row in range(rows):
        first = row * width
        squares = splat(np.float32(0))
        for column in range(0, width, LANES):
            own = part(x, first + column, width - column)
            squares = fma(own, own, squares)
        inverse = splat(np.float32(1) / np.float32(math.sqrt(total(squares) / np.float32(width) + eps)))
        for column in range(0, width, LANES):
            left = width - column
            own = mul(part(x, first + column, left), inverse)
            store_part(output, first + column, mul(own, part(weight, column, left)), left)


@kernel("void(int64,int64,int64,int64)")
def _gated(gate_up_at, output_at, rows, width):
    gate_up, output = floats(gate_up_at), floats(output_at)
    one = splat(np.float32(1))
    for row in range(rows):
        first = 2 * row * width
        for column in range(0, width, LANES):
            left = width - column
            gate = part(gate_up, first + column, left)
            up = part(gate_up, first + width + column, left)
            store_part(output, row * width + column, mul(div(gate, add(one, exp(neg(gate)))), up), left)


@kernel("void(int64,int64,int64,float32,int64,int64,int64,int64,int64,int64,int64,int64)")
def _rotated(x_at, x_row, weight_at, eps, output_at, rows, heads, half, cos_at, cos_row, sin_at, sin_row):
    x, weight, output, cos, sin = floats(x_at), floats(weight_at), floats(output_at), floats(cos_at), floats(sin_at)
    for row in range(rows):
        for head in range(heads):
            own, first, to = 2 * half * head, row * x_row + 2 * half * head, (row * heads + head) * 2 * half
            inverse = splat(np.float32(1))
            if weight_at != 0:
                squares = splat(np.float32(0))
                for column in range(0, 2 * half, LANES):
                    number = part(x, first + column, 2 * half - column)
                    squares = fma(number, number, squares)
                mean = total(squares) / np.float32(2 * half)
                inverse = splat(np.float32(1) / np.float32(math.sqrt(mean + eps)))
            for column in range(0, half, LANES):
                left = half - column
                one, other = part(x, first + column, left), part(x, first + half + column, left)
                if weight_at != 0:
                    one = mul(mul(one, inverse), part(weight, own + column, left))
                    other = mul(mul(other, inverse), part(weight, own + half + column, left))
                c, s = part(cos, row * cos_row + column, left), part(sin, row * sin_row + column, left)
                store_part(output, to + column, fma(neg(other), s, mul(one, c)), left)
                store_part(output, to + half + column, fma(one, s, mul(other, c)), left)
