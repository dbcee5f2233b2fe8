"""x W^T of a frozen weight, in training as in sampling: the same sums, so what was sampled is what is trained on.

On a processor with 32 wide registers about as fast as MKL's product of many rows; of few, where reading W once and in
its order is what counts, this takes two thirds of the time, half for four. Each number is one sum in one order, in
sixteen lanes that are added up at the end of a piece of the width, whatever the rows beside it: nothing is filled up
and no thread matters.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import NUMBERS, have_kernels, next_part, shared
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add_totals,
    fetch,
    floats,
    fma,
    ints,
    load,
    part,
    splat,
    store_totals,
    total,
)

ROW_BLOCK = 32
"""Rows of x that stay in the nearest cache while W passes by."""

WIDTH_BLOCK = 1024
"""Numbers of a row that are summed together: four of x and four of W stay in the nearest cache meanwhile."""

COLUMN_BLOCK = 64
"""Columns of the output that a thread computes at a time, at least."""

_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def have_products(x: Tensor) -> bool:
    """Whether `weight_product` is the faster one for x."""
    return _WIDE and have_kernels(x)


def weight_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] @ weight [out, in]^T, both contiguous."""
    assert x.is_contiguous() and weight.is_contiguous()
    rows, width = x.shape
    columns = weight.shape[0]
    output = x.new_empty(rows, columns)
    _product(x.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, width, columns)
    return output


@njit(inline="always")
def _put_totals(is_first, output, to, a, b, c, d):
    """Write the sums of four vectors, or add them to those of the pieces of a width before."""
    if is_first:
        store_totals(output, to, a, b, c, d)
    else:
        add_totals(output, to, a, b, c, d)


@njit
def columns_of_product(x_at, weight_at, output_at, rows, width, columns, begin, stop, piece):
    """Columns [begin, stop) of x [rows, width] @ weight [columns, width]^T; begin is a multiple of 4. Sums are of so
    many numbers of a width at a time, `piece`, a multiple of `LANES`, and of those one after another."""
    x, weight, output = floats(x_at), floats(weight_at), floats(output_at)
    zero = splat(np.float32(0))
    four = stop - stop % 4
    for block in range(0, rows, ROW_BLOCK):
        end = min(block + ROW_BLOCK, rows)
        end_of_fours = end - (end - block) % 4
        for start in range(0, width, piece):
            size = min(piece, width - start)
            whole = size - size % LANES
            for column in range(begin, four, 4):
                w_0 = column * width + start
                w_1, w_2, w_3 = w_0 + width, w_0 + 2 * width, w_0 + 3 * width
                for row in range(block, end_of_fours, 4):
                    x_0 = row * width + start
                    x_1, x_2, x_3 = x_0 + width, x_0 + 2 * width, x_0 + 3 * width
                    sum_00 = sum_01 = sum_02 = sum_03 = sum_10 = sum_11 = sum_12 = sum_13 = zero
                    sum_20 = sum_21 = sum_22 = sum_23 = sum_30 = sum_31 = sum_32 = sum_33 = zero
                    next_w = w_0 + (4 + (row - block) // 4) * width  # sixteen rows fetch all of the next columns
                    for i in range(0, whole, LANES):
                        fetch(weight, next_w + i)
                        one, two = load(weight, w_0 + i), load(weight, w_1 + i)
                        three, last = load(weight, w_2 + i), load(weight, w_3 + i)
                        own = load(x, x_0 + i)
                        sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
                        sum_02, sum_03 = fma(own, three, sum_02), fma(own, last, sum_03)
                        own = load(x, x_1 + i)
                        sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
                        sum_12, sum_13 = fma(own, three, sum_12), fma(own, last, sum_13)
                        own = load(x, x_2 + i)
                        sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
                        sum_22, sum_23 = fma(own, three, sum_22), fma(own, last, sum_23)
                        own = load(x, x_3 + i)
                        sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
                        sum_32, sum_33 = fma(own, three, sum_32), fma(own, last, sum_33)
                    if whole < size:
                        left = size - whole
                        one, two = part(weight, w_0 + whole, left), part(weight, w_1 + whole, left)
                        three, last = part(weight, w_2 + whole, left), part(weight, w_3 + whole, left)
                        own = part(x, x_0 + whole, left)
                        sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
                        sum_02, sum_03 = fma(own, three, sum_02), fma(own, last, sum_03)
                        own = part(x, x_1 + whole, left)
                        sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
                        sum_12, sum_13 = fma(own, three, sum_12), fma(own, last, sum_13)
                        own = part(x, x_2 + whole, left)
                        sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
                        sum_22, sum_23 = fma(own, three, sum_22), fma(own, last, sum_23)
                        own = part(x, x_3 + whole, left)
                        sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
                        sum_32, sum_33 = fma(own, three, sum_32), fma(own, last, sum_33)
                    to = row * columns + column
                    _put_totals(start == 0, output, to, sum_00, sum_01, sum_02, sum_03)
                    _put_totals(start == 0, output, to + columns, sum_10, sum_11, sum_12, sum_13)
                    _put_totals(start == 0, output, to + 2 * columns, sum_20, sum_21, sum_22, sum_23)
                    _put_totals(start == 0, output, to + 3 * columns, sum_30, sum_31, sum_32, sum_33)
                for row in range(end_of_fours, end):
                    sum_0 = sum_1 = sum_2 = sum_3 = zero
                    for i in range(0, size, LANES):
                        left = size - i
                        own = part(x, row * width + start + i, left)
                        sum_0, sum_1 = (
                            fma(own, part(weight, w_0 + i, left), sum_0),
                            fma(own, part(weight, w_1 + i, left), sum_1),
                        )
                        sum_2, sum_3 = (
                            fma(own, part(weight, w_2 + i, left), sum_2),
                            fma(own, part(weight, w_3 + i, left), sum_3),
                        )
                    _put_totals(start == 0, output, row * columns + column, sum_0, sum_1, sum_2, sum_3)
            for column in range(four, stop):
                for row in range(block, end):
                    sums = zero
                    for i in range(0, size, LANES):
                        left = size - i
                        own = part(x, row * width + start + i, left)
                        sums = fma(own, part(weight, column * width + start + i, left), sums)
                    to = row * columns + column
                    output[to] = total(sums) if start == 0 else output[to] + total(sums)


@njit
def block_of_columns(columns):
    """How many columns a thread computes at a time."""
    return max(COLUMN_BLOCK, (columns // 8 + 3) // 4 * 4)


@shared
def _product(data_at):
    data = ints(data_at)
    x_at, weight_at, output_at = data[NUMBERS], data[NUMBERS + 1], data[NUMBERS + 2]
    rows, width, columns = data[NUMBERS + 3], data[NUMBERS + 4], data[NUMBERS + 5]
    size = block_of_columns(columns)
    first = next_part(data) * size
    while first < columns:
        stop = min(first + size, columns)
        columns_of_product(x_at, weight_at, output_at, rows, width, columns, first, stop, WIDTH_BLOCK)
        first = next_part(data) * size
