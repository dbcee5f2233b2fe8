"""Causal attention of whole sequences, forward and backward: each sequence by itself, in the order of its tokens.

Torch's threads take a sequence's head at a time (backwards, the heads that share a key head). Four queries at a time
meet sixteen keys, or sixty-four numbers of a head: the sums of those are all in registers. A query's numbers depend on
its sequence up to it alone, and the forward pass adds them up in the order of `paged`, which samples: a score in
sixteen lanes, the values of the keys up to it one after another.

Source of the backward pass: Dao et al., "FlashAttention" (2022), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import bits_of, next_part, shared
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    doubles,
    exp,
    floats,
    fma,
    ints,
    largest,
    load,
    maximum,
    mul,
    part,
    part_or,
    splat,
    store,
    store_part,
    sub,
    total,
)

LONGEST = 4096
"""Tokens of a sequence up to which this is about as fast as torch's flash attention, which cuts longer ones up."""

WIDE = 4 * LANES


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """Of query [T, Hq, D], key and value [T, Hkv, D], sequences of these lengths back to back: the output [T, Hq, D],
    and the logarithms of each query's sums of exponentials [T, Hq]."""
    query, key, value = (_by_rows(each) for each in (query, key, value))
    rows, heads, size = query.shape
    assert sum(lengths) == rows
    output, sums = query.new_empty(rows, heads, size), query.new_empty(rows, heads)
    table, scratch, stride = _work_of(lengths, size, 1)
    _forward(
        0, query.data_ptr(), query.stride(0), query.stride(1), key.data_ptr(), key.stride(0), key.stride(1),
        value.data_ptr(), value.stride(0), value.stride(1), output.data_ptr(), sums.data_ptr(), heads,
        key.shape[1], size, bits_of(scaling), table.data_ptr(), len(lengths), scratch.data_ptr(), stride,
    )  # fmt: skip
    return output, sums


def causal_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, d_output: Tensor,
    lengths: Sequence[int], scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `causal_attention`'s inputs, in their shapes, from its results and the output's."""
    query, key, value, d_output = (_by_rows(each) for each in (query, key, value, d_output))
    rows, heads, size = query.shape
    assert sum(lengths) == rows
    d_query = query.new_empty(rows, heads, size)
    d_key, d_value = (query.new_zeros(rows, key.shape[1], size) for _ in range(2))
    table, scratch, stride = _work_of(lengths, size, 2)
    _backward(
        0, query.data_ptr(), query.stride(0), query.stride(1), key.data_ptr(), key.stride(0), key.stride(1),
        value.data_ptr(), value.stride(0), value.stride(1), output.data_ptr(), sums.data_ptr(), heads,
        key.shape[1], size, bits_of(scaling), table.data_ptr(), len(lengths), scratch.data_ptr(), stride,
        d_output.data_ptr(), d_output.stride(0), d_output.stride(1), d_query.data_ptr(), d_key.data_ptr(),
        d_value.data_ptr(),
    )  # fmt: skip
    return d_query, d_key, d_value


def _by_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _work_of(lengths: Sequence[int], size: int, matrices: int) -> tuple[Tensor, Tensor, int]:
    """(first row, tokens) of each sequence, the longest first; room for each thread, and how many numbers that is."""
    order = sorted(zip(accumulate(lengths, initial=0), lengths, strict=False), key=lambda own: -own[1])
    width = -(-max(lengths) // WIDE) * WIDE
    stride = matrices * (size * width + 4 * width) + 12 * (-(-size // WIDE) * WIDE)
    return torch.tensor(order), torch.empty(stride * torch.get_num_threads()), stride


@njit(inline="always")
def _turned(x_at, first, row, length, size, to_at, width):
    """to [size, width] = x [length, size]^T, zeros behind it."""
    x, to = floats(x_at), floats(to_at)
    for i in range(0, length, 16):
        for d in range(size):
            for j in range(i, min(i + 16, length)):
                to[d * width + j] = x[first + j * row + d]
    for d in range(size):
        for j in range(length, width):
            to[d * width + j] = np.float32(0)


@njit(inline="always")
def _turned_in_blocks(x_at, first, row, length, size, to_at, width):
    """Of each sixteen rows of x [length, size] a block [size, LANES] of `to`, zeros behind the last ones."""
    x, to = floats(x_at), floats(to_at)
    for i in range(0, width, LANES):
        at = i * size
        for j in range(min(LANES, length - i)):
            for d in range(size):
                to[at + d * LANES + j] = x[first + (i + j) * row + d]
        for j in range(max(0, length - i), LANES):
            for d in range(size):
                to[at + d * LANES + j] = np.float32(0)


@njit(inline="always")
def _panel(a, a_0, a_1, a_2, a_3, count, b, b_at, b_row, left, c, c_at, c_row):
    """c [4, left] = a [4, count] b [count, left], left up to 64."""
    left_1, left_2, left_3 = left - LANES, left - 2 * LANES, left - 3 * LANES
    zero = splat(np.float32(0))
    sum_00 = sum_01 = sum_02 = sum_03 = sum_10 = sum_11 = sum_12 = sum_13 = zero
    sum_20 = sum_21 = sum_22 = sum_23 = sum_30 = sum_31 = sum_32 = sum_33 = zero
    for k in range(count):
        at = b_at + k * b_row
        one, two = part(b, at, left), part(b, at + LANES, left_1)
        three, last = part(b, at + 2 * LANES, left_2), part(b, at + 3 * LANES, left_3)
        own = splat(a[a_0 + k])
        sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
        sum_02, sum_03 = fma(own, three, sum_02), fma(own, last, sum_03)
        own = splat(a[a_1 + k])
        sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
        sum_12, sum_13 = fma(own, three, sum_12), fma(own, last, sum_13)
        own = splat(a[a_2 + k])
        sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
        sum_22, sum_23 = fma(own, three, sum_22), fma(own, last, sum_23)
        own = splat(a[a_3 + k])
        sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
        sum_32, sum_33 = fma(own, three, sum_32), fma(own, last, sum_33)
    _store_four(c, c_at, sum_00, sum_01, sum_02, sum_03)
    _store_four(c, c_at + c_row, sum_10, sum_11, sum_12, sum_13)
    _store_four(c, c_at + 2 * c_row, sum_20, sum_21, sum_22, sum_23)
    _store_four(c, c_at + 3 * c_row, sum_30, sum_31, sum_32, sum_33)


@njit(inline="always")
def _lane(q, q_0, q_1, q_2, q_3, size, keys, at, lane):
    """What one of `LANES` lanes adds up of four queries' products with sixteen keys [size, LANES]."""
    sum_0 = sum_1 = sum_2 = sum_3 = splat(np.float32(0))
    for d in range(lane, size, LANES):
        own = load(keys, at + d * LANES)
        sum_0, sum_1 = fma(splat(q[q_0 + d]), own, sum_0), fma(splat(q[q_1 + d]), own, sum_1)
        sum_2, sum_3 = fma(splat(q[q_2 + d]), own, sum_2), fma(splat(q[q_3 + d]), own, sum_3)
    return sum_0, sum_1, sum_2, sum_3


def _with_those(apart, lanes):
    """The same of these lanes and of those that lie `apart` from them, added up as `vectors.total` does."""

    @njit(inline="always")
    def both(q, q_0, q_1, q_2, q_3, size, keys, at, lane):
        a_0, a_1, a_2, a_3 = lanes(q, q_0, q_1, q_2, q_3, size, keys, at, lane)
        b_0, b_1, b_2, b_3 = lanes(q, q_0, q_1, q_2, q_3, size, keys, at, lane + apart)
        return add(a_0, b_0), add(a_1, b_1), add(a_2, b_2), add(a_3, b_3)

    return both


_all_lanes = _with_those(1, _with_those(2, _with_those(4, _with_those(8, _lane))))


@njit(inline="always")
def _scores(q, q_0, q_1, q_2, q_3, size, keys, j, width, scores):
    """scores [4, 16] of four queries and the sixteen keys from j on."""
    sum_0, sum_1, sum_2, sum_3 = _all_lanes(q, q_0, q_1, q_2, q_3, size, keys, j * size, 0)
    store(scores, j, sum_0)
    store(scores, width + j, sum_1)
    store(scores, 2 * width + j, sum_2)
    store(scores, 3 * width + j, sum_3)


@njit(inline="always")
def _store_four(c, at, one, two, three, last):
    store(c, at, one)
    store(c, at + LANES, two)
    store(c, at + 2 * LANES, three)
    store(c, at + 3 * LANES, last)


@njit(inline="always")
def _add_outer(a, a_at, a_row, count, b, b_0, b_1, b_2, b_3, left, c, c_at, c_row):
    """c [count, left] += a [4, count]^T b [4, left], left up to 64."""
    left_1, left_2, left_3 = left - LANES, left - 2 * LANES, left - 3 * LANES
    b_00, b_01 = part(b, b_0, left), part(b, b_0 + LANES, left_1)
    b_02, b_03 = part(b, b_0 + 2 * LANES, left_2), part(b, b_0 + 3 * LANES, left_3)
    b_10, b_11 = part(b, b_1, left), part(b, b_1 + LANES, left_1)
    b_12, b_13 = part(b, b_1 + 2 * LANES, left_2), part(b, b_1 + 3 * LANES, left_3)
    b_20, b_21 = part(b, b_2, left), part(b, b_2 + LANES, left_1)
    b_22, b_23 = part(b, b_2 + 2 * LANES, left_2), part(b, b_2 + 3 * LANES, left_3)
    b_30, b_31 = part(b, b_3, left), part(b, b_3 + LANES, left_1)
    b_32, b_33 = part(b, b_3 + 2 * LANES, left_2), part(b, b_3 + 3 * LANES, left_3)
    for k in range(count):
        at = c_at + k * c_row
        own = splat(a[a_at + k])
        one, two = fma(own, b_00, part(c, at, left)), fma(own, b_01, part(c, at + LANES, left_1))
        three = fma(own, b_02, part(c, at + 2 * LANES, left_2))
        last = fma(own, b_03, part(c, at + 3 * LANES, left_3))
        own = splat(a[a_at + a_row + k])
        one, two, three, last = fma(own, b_10, one), fma(own, b_11, two), fma(own, b_12, three), fma(own, b_13, last)
        own = splat(a[a_at + 2 * a_row + k])
        one, two, three, last = fma(own, b_20, one), fma(own, b_21, two), fma(own, b_22, three), fma(own, b_23, last)
        own = splat(a[a_at + 3 * a_row + k])
        one, two, three, last = fma(own, b_30, one), fma(own, b_31, two), fma(own, b_32, three), fma(own, b_33, last)
        store_part(c, at, one, left)
        store_part(c, at + LANES, two, left_1)
        store_part(c, at + 2 * LANES, three, left_2)
        store_part(c, at + 3 * LANES, last, left_3)


@shared
def _forward(data_at):
    data = ints(data_at)
    query, q_row, q_head = floats(data[2]), data[3], data[4]
    k_row, k_head, value, v_row, v_head = data[6], data[7], floats(data[8]), data[9], data[10]
    output, sums, heads, kv_heads, size = floats(data[11]), floats(data[12]), data[13], data[14], data[15]
    scale, table, sequences = splat(np.float32(doubles(data_at)[16])), ints(data[17]), data[18]
    scratch_at = data[19] + 4 * data[20] * next_part(ints(data_at + 8))
    least, whole = splat(np.float32(-np.inf)), (size + WIDE - 1) // WIDE * WIDE
    number = next_part(data)
    while number < sequences * heads:
        first, length = table[2 * (number // heads)], table[2 * (number // heads) + 1]
        head = number % heads
        kv_head, width = head // (heads // kv_heads), (length + WIDE - 1) // WIDE * WIDE
        _turned_in_blocks(data[5], first * k_row + kv_head * k_head, k_row, length, size, scratch_at, width)
        keys, scores, results = (
            floats(scratch_at), floats(scratch_at + 4 * size * width), floats(scratch_at + 4 * (size + 4) * width)
        )  # fmt: skip
        v_first = first * v_row + kv_head * v_head
        for i in range(0, length, 4):
            q_0 = (first + i) * q_row + head * q_head
            q_1 = (first + min(i + 1, length - 1)) * q_row + head * q_head
            q_2 = (first + min(i + 2, length - 1)) * q_row + head * q_head
            q_3 = (first + min(i + 3, length - 1)) * q_row + head * q_head
            seen = min(i + 4, length)
            for j in range(0, seen, LANES):
                _scores(query, q_0, q_1, q_2, q_3, size, keys, j, width, scores)
            for r in range(seen - i):
                at, count = r * width, i + r + 1
                tops = least
                for j in range(0, count, LANES):
                    tops = maximum(mul(part_or(scores, at + j, count - j, least), scale), tops)
                top = largest(tops)
                tops, summed = splat(top), splat(np.float32(0))
                for j in range(0, seen, LANES):
                    own = exp(sub(mul(part_or(scores, at + j, count - j, least), scale), tops))
                    summed = add(summed, own)
                    store(scores, at + j, own)
                sums[(first + i + r) * heads + head] = top
                results[3 * whole + whole + r] = total(summed)
            for j in range(0, size, WIDE):
                _panel(
                    scores, 0, width, 2 * width, 3 * width, seen, value, v_first + j, v_row, size - j,
                    results, j, whole,
                )  # fmt: skip
            for r in range(seen - i):
                row = (first + i + r) * heads + head
                share = results[4 * whole + r]
                for j in range(0, size, LANES):
                    own = mul(load(results, r * whole + j), splat(np.float32(1) / share))
                    store_part(output, row * size + j, own, size - j)
                sums[row] += np.float32(math.log(share))
        number = next_part(data)


@shared
def _backward(data_at):
    data = ints(data_at)
    query, q_row, q_head = floats(data[2]), data[3], data[4]
    key, k_row, k_head, v_row, v_head = floats(data[5]), data[6], data[7], data[9], data[10]
    output, sums, heads, kv_heads, size = floats(data[11]), floats(data[12]), data[13], data[14], data[15]
    scale, table, sequences = splat(np.float32(doubles(data_at)[16])), ints(data[17]), data[18]
    scratch_at = data[19] + 4 * data[20] * next_part(ints(data_at + 8))
    d_output, d_row, d_head, d_query = floats(data[21]), data[22], data[23], floats(data[24])
    d_key, d_value = floats(data[25]), floats(data[26])
    least, zero, whole = splat(np.float32(-np.inf)), splat(np.float32(0)), (size + WIDE - 1) // WIDE * WIDE
    group = heads // kv_heads
    number = next_part(data)
    while number < sequences * kv_heads:
        first, length = table[2 * (number // kv_heads)], table[2 * (number // kv_heads) + 1]
        kv_head, width = number % kv_heads, (length + WIDE - 1) // WIDE * WIDE
        values_at = scratch_at + 4 * size * width
        scores_at = values_at + 4 * size * width
        k_first = first * k_row + kv_head * k_head
        _turned_in_blocks(data[5], k_first, k_row, length, size, scratch_at, width)
        _turned(data[8], first * v_row + kv_head * v_head, v_row, length, size, values_at, width)
        keys, values, scores, slopes = (
            floats(scratch_at), floats(values_at), floats(scores_at), floats(scores_at + 16 * width)
        )  # fmt: skip
        results = floats(scores_at + 32 * width)
        to = (first * kv_heads + kv_head) * size
        for head in range(kv_head * group, (kv_head + 1) * group):
            for i in range(0, length, 4):
                q_0 = (first + i) * q_row + head * q_head
                q_1 = (first + min(i + 1, length - 1)) * q_row + head * q_head
                q_2 = (first + min(i + 2, length - 1)) * q_row + head * q_head
                q_3 = (first + min(i + 3, length - 1)) * q_row + head * q_head
                d_0 = (first + i) * d_row + head * d_head
                d_1 = (first + min(i + 1, length - 1)) * d_row + head * d_head
                d_2 = (first + min(i + 2, length - 1)) * d_row + head * d_head
                d_3 = (first + min(i + 3, length - 1)) * d_row + head * d_head
                seen = min(i + 4, length)
                for j in range(0, seen, LANES):
                    _scores(query, q_0, q_1, q_2, q_3, size, keys, j, width, scores)
                for j in range(0, seen, WIDE):
                    _panel(d_output, d_0, d_1, d_2, d_3, size, values, j, width, WIDE, slopes, j, width)
                for r in range(4):
                    at, count = r * width, i + r + 1
                    if i + r >= length:
                        for j in range(0, seen, LANES):
                            store(scores, at + j, zero)
                            store(slopes, at + j, zero)
                        continue
                    row, d_first = (first + i + r) * heads + head, (first + i + r) * d_row + head * d_head
                    along = zero
                    for j in range(0, size, LANES):
                        left = size - j
                        along = fma(part(output, row * size + j, left), part(d_output, d_first + j, left), along)
                    along, lost = splat(total(along)), splat(sums[row])
                    for j in range(0, seen, LANES):
                        own = exp(sub(mul(part_or(scores, at + j, count - j, least), scale), lost))
                        store(scores, at + j, own)
                        slope = mul(mul(own, sub(load(slopes, at + j), along)), scale)
                        store(slopes, at + j, slope)
                for j in range(0, size, WIDE):
                    left = size - j
                    _panel(
                        slopes, 0, width, 2 * width, 3 * width, seen, key, k_first + j, k_row, left, results, j, whole
                    )
                    _add_outer(
                        scores, 0, width, seen, d_output, d_0 + j, d_1 + j, d_2 + j, d_3 + j, left,
                        d_value, to + j, kv_heads * size,
                    )  # fmt: skip
                    _add_outer(
                        slopes, 0, width, seen, query, q_0 + j, q_1 + j, q_2 + j, q_3 + j, left,
                        d_key, to + j, kv_heads * size,
                    )  # fmt: skip
                for r in range(seen - i):
                    for j in range(0, size, LANES):
                        own = load(results, r * whole + j)
                        store_part(d_query, ((first + i + r) * heads + head) * size + j, own, size - j)
        number = next_part(data)
