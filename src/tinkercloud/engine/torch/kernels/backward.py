"""The backward pass of what `rows` has: each in one pass over memory, its rows shared out to torch's threads."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import bits_of, next_part, shared
from tinkercloud.engine.torch.kernels.rows import BLOCK
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    div,
    doubles,
    exp,
    floats,
    fma,
    ints,
    mul,
    neg,
    part,
    splat,
    store_part,
    sub,
    total,
)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, d_normed: Tensor, added: Tensor | None) -> Tensor:
    """The gradient of x [T, D] from that of x / rms(x) * weight [D], plus `added` [T, D]; all contiguous."""
    assert x.is_contiguous() and weight.is_contiguous() and d_normed.is_contiguous()
    assert added is None or added.is_contiguous()
    rows, width = x.shape
    output = torch.empty_like(x)
    _rms_norm_backward(
        x.data_ptr(), weight.data_ptr(), d_normed.data_ptr(), 0 if added is None else added.data_ptr(),
        output.data_ptr(), rows, width, bits_of(eps),
    )  # fmt: skip
    return output


def gated_backward(gate_up: Tensor, d_activated: Tensor) -> None:
    """Write the gradient of gate_up [T, 2 I] in its place, from that of silu(gate) * up [T, I]; both contiguous."""
    assert gate_up.is_contiguous() and d_activated.is_contiguous()
    rows, width = d_activated.shape
    _gated_backward(gate_up.data_ptr(), d_activated.data_ptr(), rows, width)


def rotated_backward(
    projected: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, d_heads: tuple[Tensor, ...]
) -> Tensor:
    """The gradient of the rows of `projected` [T, ...], queries, keys and values side by side, from those of the
    rotated queries [T, Hq, D], the rotated keys [T, Hkv, D] and the values [T, Hkv, D]; see `rotated`, whose heads are
    those of queries and keys. D is even."""
    assert projected.is_contiguous() and cos.stride(1) == sin.stride(1) == 1
    assert weight is None or weight.is_contiguous()
    d_heads = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in d_heads)
    rows, half = sin.shape
    output = torch.empty_like(projected)
    where = (number for part in d_heads for number in (part.data_ptr(), part.stride(0), part.stride(1), part.shape[1]))
    _rotated_backward(
        projected.data_ptr(), 0 if weight is None else weight.data_ptr(), bits_of(eps), output.data_ptr(), rows, half,
        projected.shape[1], cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), *where,
    )  # fmt: skip
    return output


@njit(inline="always")
def _slopes(squares, along, width, eps):
    """1 / rms, and the factor of x in its gradient: with u = x / rms that is (d_u - u mean(d_u u)) / rms."""
    inverse = np.float32(1) / np.float32(math.sqrt(squares / np.float32(width) + eps))
    slope = -(along / np.float32(width)) * inverse * inverse * inverse
    return splat(inverse), splat(slope)


@njit(inline="always")
def _unnormed(x, weight, output, to, own, width, eps):
    """The gradient of a head, in the place of that of the head divided by its rms and multiplied by its weight."""
    squares = along = splat(np.float32(0))
    for column in range(0, width, LANES):
        left = width - column
        number = part(x, to + column, left)
        squares = fma(number, number, squares)
        along = fma(mul(part(output, to + column, left), part(weight, own + column, left)), number, along)
    inverse, slope = _slopes(total(squares), total(along), width, eps)
    for column in range(0, width, LANES):
        left = width - column
        d_unit = mul(part(output, to + column, left), part(weight, own + column, left))
        store_part(output, to + column, fma(part(x, to + column, left), slope, mul(d_unit, inverse)), left)


@shared
def _rms_norm_backward(data_at):
    data = ints(data_at)
    x, weight, d_normed, added, output = (
        floats(data[1]),
        floats(data[2]),
        floats(data[3]),
        floats(data[4]),
        floats(data[5]),
    )
    rows, width, eps = data[6], data[7], np.float32(doubles(data_at)[8])
    begin = next_part(data) * BLOCK
    while begin < rows:
        for row in range(begin, min(begin + BLOCK, rows)):
            first = row * width
            squares = along = splat(np.float32(0))
            for column in range(0, width, LANES):
                left = width - column
                own = part(x, first + column, left)
                squares = fma(own, own, squares)
                along = fma(mul(part(d_normed, first + column, left), part(weight, column, left)), own, along)
            inverse, slope = _slopes(total(squares), total(along), width, eps)
            for column in range(0, width, LANES):
                left = width - column
                d_unit = mul(part(d_normed, first + column, left), part(weight, column, left))
                d_own = fma(part(x, first + column, left), slope, mul(d_unit, inverse))
                if data[4] != 0:
                    d_own = add(part(added, first + column, left), d_own)
                store_part(output, first + column, d_own, left)
        begin = next_part(data) * BLOCK


@shared
def _gated_backward(data_at):
    data = ints(data_at)
    gate_up, d_activated, rows, width = floats(data[1]), floats(data[2]), data[3], data[4]
    one = splat(np.float32(1))
    begin = next_part(data) * BLOCK
    while begin < rows:
        for row in range(begin, min(begin + BLOCK, rows)):
            first = 2 * row * width
            for column in range(0, width, LANES):
                left = width - column
                gate, up = part(gate_up, first + column, left), part(gate_up, first + width + column, left)
                d_out = part(d_activated, row * width + column, left)
                share = div(one, add(one, exp(neg(gate))))
                # silu'(g) = s + g s (1 - s), with s = sigmoid(g)
                slope = fma(mul(gate, share), sub(one, share), share)
                store_part(gate_up, first + column, mul(mul(d_out, up), slope), left)
                store_part(gate_up, first + width + column, mul(d_out, mul(gate, share)), left)
        begin = next_part(data) * BLOCK


@shared
def _rotated_backward(data_at):
    data = ints(data_at)
    x, weight, output = floats(data[1]), floats(data[2]), floats(data[4])
    eps, rows, half, width = np.float32(doubles(data_at)[3]), data[5], data[6], data[7]
    cos, cos_row, sin, sin_row = floats(data[8]), data[9], floats(data[10]), data[11]
    begin = next_part(data) * BLOCK
    while begin < rows:
        for row in range(begin, min(begin + BLOCK, rows)):
            head = 0
            for kind in range(3):
                d_out, d_row, d_head = floats(data[12 + 4 * kind]), data[13 + 4 * kind], data[14 + 4 * kind]
                for number in range(data[15 + 4 * kind]):
                    start, to = row * d_row + number * d_head, row * width + 2 * half * head
                    if kind == 2:
                        for column in range(0, 2 * half, LANES):
                            left = 2 * half - column
                            store_part(output, to + column, part(d_out, start + column, left), left)
                    else:
                        for column in range(0, half, LANES):
                            left = half - column
                            one, other = part(d_out, start + column, left), part(d_out, start + half + column, left)
                            c = part(cos, row * cos_row + column, left)
                            s = part(sin, row * sin_row + column, left)
                            store_part(output, to + column, fma(other, s, mul(one, c)), left)
                            store_part(output, to + half + column, fma(neg(one), s, mul(other, c)), left)
                        if data[2] != 0:
                            _unnormed(x, weight, output, to, 2 * half * head, 2 * half, eps)
                    head += 1
        begin = next_part(data) * BLOCK
