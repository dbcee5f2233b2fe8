"""What a decoder layer does to each row beside products, each in one pass over memory.

Of many rows torch's threads take blocks; a row is computed by the same code, whoever takes it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import bits_of, kernel, next_part, shared
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
    total,
)

MANY_ROWS = 64
"""From so many on they are shared out."""

BLOCK = 32
"""Rows that a thread takes at a time."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] / rms(x) * weight [D]."""
    assert weight.is_contiguous()
    x = x.contiguous()
    output = torch.empty_like(x)
    rows, width = x.shape
    if rows < MANY_ROWS:
        _rms_norm(x.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, width, eps)
    else:
        _rms_norms(x.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, width, bits_of(eps))
    return output


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [T, I] of rows of gate and up [T, 2 I], contiguous."""
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape
    output = gate_up.new_empty(rows, width // 2)
    run = _gated if rows < MANY_ROWS else _gateds
    run(gate_up.data_ptr(), output.data_ptr(), rows, width // 2)
    return output


def rotated(projected: Tensor, weight: Tensor | None, eps: float, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The first `heads` heads [T, heads, D] of the rows of `projected` [T, ...], each divided by its rms and multiplied
    by its `weight` [heads, D] if there is one, then rotated: cos and sin are [T, D / 2], D being even."""
    assert projected.stride(-1) == cos.stride(1) == sin.stride(1) == 1
    assert weight is None or weight.is_contiguous()
    rows, half = sin.shape
    output = projected.new_empty(rows, heads, 2 * half)
    run, eps = (_rotated, eps) if rows < MANY_ROWS else (_rotateds, bits_of(eps))
    run(
        projected.data_ptr(), projected.stride(0), 0 if weight is None else weight.data_ptr(), eps, output.data_ptr(),
        rows, heads, half, cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0),
    )  # fmt: skip
    return output


@njit
def norm_row(x, first, weight, output, to, width, eps):
    """Write a row divided by its rms and multiplied by `weight` to output[to:]."""
    squares = splat(np.float32(0))
    for column in range(0, width, LANES):
        own = part(x, first + column, width - column)
        squares = fma(own, own, squares)
    inverse = splat(np.float32(1) / np.float32(math.sqrt(total(squares) / np.float32(width) + eps)))
    for column in range(0, width, LANES):
        left = width - column
        own = mul(part(x, first + column, left), inverse)
        store_part(output, to + column, mul(own, part(weight, column, left)), left)


@njit
def gate_row(gate_up, first, output, to, width):
    """Write silu(gate) * up of a row [2 width] to output[to:]."""
    one = splat(np.float32(1))
    for column in range(0, width, LANES):
        left = width - column
        gate = part(gate_up, first + column, left)
        up = part(gate_up, first + width + column, left)
        store_part(output, to + column, mul(div(gate, add(one, exp(neg(gate)))), up), left)


@njit
def rotate_head(x, first, is_normed, weight, own, eps, output, to, half, cos, c_at, sin, s_at):
    """Write a head [2 half], rotated, to output[to:], which may be its own place; if `is_normed`, divided by its rms
    and multiplied by weight[own:] before that."""
    inverse = splat(np.float32(1))
    if is_normed:
        squares = splat(np.float32(0))
        for column in range(0, 2 * half, LANES):
            number = part(x, first + column, 2 * half - column)
            squares = fma(number, number, squares)
        inverse = splat(np.float32(1) / np.float32(math.sqrt(total(squares) / np.float32(2 * half) + eps)))
    for column in range(0, half, LANES):
        left = half - column
        one, other = part(x, first + column, left), part(x, first + half + column, left)
        if is_normed:
            one = mul(mul(one, inverse), part(weight, own + column, left))
            other = mul(mul(other, inverse), part(weight, own + half + column, left))
        c, s = part(cos, c_at + column, left), part(sin, s_at + column, left)
        store_part(output, to + column, fma(neg(other), s, mul(one, c)), left)
        store_part(output, to + half + column, fma(one, s, mul(other, c)), left)


@njit(inline="always")
def _norm_of(x_at, weight_at, output_at, begin, stop, width, eps):
    x, weight, output = floats(x_at), floats(weight_at), floats(output_at)
    for row in range(begin, stop):
        norm_row(x, row * width, weight, output, row * width, width, eps)


@kernel("void(int64,int64,int64,int64,int64,float32)")
def _rms_norm(x_at, weight_at, output_at, rows, width, eps):
    _norm_of(x_at, weight_at, output_at, 0, rows, width, eps)


@shared
def _rms_norms(data_at):
    data = ints(data_at)
    first = next_part(data) * BLOCK
    while first < data[4]:
        stop = min(first + BLOCK, data[4])
        _norm_of(data[1], data[2], data[3], first, stop, data[5], np.float32(doubles(data_at)[6]))
        first = next_part(data) * BLOCK


@njit(inline="always")
def _gated_of(gate_up_at, output_at, begin, stop, width):
    gate_up, output = floats(gate_up_at), floats(output_at)
    for row in range(begin, stop):
        gate_row(gate_up, 2 * row * width, output, row * width, width)


@kernel("void(int64,int64,int64,int64)")
def _gated(gate_up_at, output_at, rows, width):
    _gated_of(gate_up_at, output_at, 0, rows, width)


@shared
def _gateds(data_at):
    data = ints(data_at)
    first = next_part(data) * BLOCK
    while first < data[3]:
        _gated_of(data[1], data[2], first, min(first + BLOCK, data[3]), data[4])
        first = next_part(data) * BLOCK


@njit(inline="always")
def _rotated_of(x_at, x_row, weight_at, eps, output_at, begin, stop, heads, half, cos_at, cos_row, sin_at, sin_row):
    x, weight, output, cos, sin = floats(x_at), floats(weight_at), floats(output_at), floats(cos_at), floats(sin_at)
    size = 2 * half
    for row in range(begin, stop):
        for head in range(heads):
            rotate_head(
                x, row * x_row + head * size, weight_at != 0, weight, head * size, eps,
                output, (row * heads + head) * size, half, cos, row * cos_row, sin, row * sin_row,
            )  # fmt: skip


@kernel("void(int64,int64,int64,float32,int64,int64,int64,int64,int64,int64,int64,int64)")
def _rotated(x_at, x_row, weight_at, eps, output_at, rows, heads, half, cos_at, cos_row, sin_at, sin_row):
    _rotated_of(x_at, x_row, weight_at, eps, output_at, 0, rows, heads, half, cos_at, cos_row, sin_at, sin_row)


@shared
def _rotateds(data_at):
    data = ints(data_at)
    first = next_part(data) * BLOCK
    while first < data[6]:
        _rotated_of(
            data[1], data[2], data[3], np.float32(doubles(data_at)[4]), data[5], first, min(first + BLOCK, data[6]),
            data[7], data[8], data[9], data[10], data[11], data[12],
        )  # fmt: skip
        first = next_part(data) * BLOCK
