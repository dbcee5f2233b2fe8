"""An adapter's part of a product, scale (x A^T) B^T, for few rows at a time, in one call instead of one for each B."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import kernel
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    floats,
    fma,
    ints,
    load,
    part,
    splat,
    store,
    store_part,
    total,
)


def add_low_rank(x: Tensor, a: Tensor, places: Tensor, scale: float, output: Tensor) -> None:
    """Add scale * (x A^T) B^T to `output`.

    x [T, in] and output [T, out] are contiguous rows; a [m r, in]; places int64 [m, 3], for each B the first of its
    columns of the output, how many, and how many numbers behind the first of `a` its B^T [r, columns] begins.
    """
    assert x.is_contiguous() and a.is_contiguous() and places.is_contiguous() and output.is_contiguous()
    rows, width = x.shape
    ranks = a.shape[0]
    low = torch.empty(rows, ranks)
    _add_low_rank(
        x.data_ptr(), a.data_ptr(), places.data_ptr(), low.data_ptr(), output.data_ptr(), rows, width, ranks,
        places.shape[0], output.shape[1], scale,
    )  # fmt: skip


@njit
def add_back(low, a, places, scale, output, first_row, end_row, ranks, count, output_row):
    """Add scale * low B^T to rows of the output, low [rows, ranks] being x A^T of the same rows."""
    scale, zero = splat(scale), splat(np.float32(0))
    own_ranks = ranks // count
    four = end_row - (end_row - first_row) % 4
    for number in range(count):
        column, columns, b = places[3 * number], places[3 * number + 1], places[3 * number + 2]
        whole = columns - columns % LANES
        for row in range(first_row, four, 4):
            to_0, low_0 = row * output_row + column, row * ranks + number * own_ranks
            to_1, to_2, to_3 = to_0 + output_row, to_0 + 2 * output_row, to_0 + 3 * output_row
            low_1, low_2, low_3 = low_0 + ranks, low_0 + 2 * ranks, low_0 + 3 * ranks
            for i in range(0, whole, LANES):
                sum_0 = sum_1 = sum_2 = sum_3 = zero
                for rank in range(own_ranks):
                    own = load(a, b + rank * columns + i)
                    sum_0 = fma(splat(low[low_0 + rank]), own, sum_0)
                    sum_1 = fma(splat(low[low_1 + rank]), own, sum_1)
                    sum_2 = fma(splat(low[low_2 + rank]), own, sum_2)
                    sum_3 = fma(splat(low[low_3 + rank]), own, sum_3)
                store(output, to_0 + i, fma(sum_0, scale, load(output, to_0 + i)))
                store(output, to_1 + i, fma(sum_1, scale, load(output, to_1 + i)))
                store(output, to_2 + i, fma(sum_2, scale, load(output, to_2 + i)))
                store(output, to_3 + i, fma(sum_3, scale, load(output, to_3 + i)))
        for row in range(first_row, end_row):
            to, first = row * output_row + column, row * ranks + number * own_ranks
            for i in range(whole if row < four else 0, columns, LANES):
                sums, left = zero, columns - i
                for rank in range(own_ranks):
                    sums = fma(splat(low[first + rank]), part(a, b + rank * columns + i, left), sums)
                store_part(output, to + i, fma(sums, scale, part(output, to + i, left)), left)


@kernel("void(int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,float32)")
def _add_low_rank(x_at, a_at, places_at, low_at, output_at, rows, width, ranks, count, output_row, scale):
    x, a, low, output, places = floats(x_at), floats(a_at), floats(low_at), floats(output_at), ints(places_at)
    zero = splat(np.float32(0))
    whole = width - width % LANES
    # Four rows of x at a time, then those that are left: each number is the same sum in the same order either way.
    four = rows - rows % 4
    for row in range(0, four, 4):
        x_0 = row * width
        x_1, x_2, x_3 = x_0 + width, x_0 + 2 * width, x_0 + 3 * width
        for rank in range(ranks):
            first = rank * width
            sum_0 = sum_1 = sum_2 = sum_3 = zero
            for i in range(0, whole, LANES):
                own = load(a, first + i)
                sum_0 = fma(load(x, x_0 + i), own, sum_0)
                sum_1 = fma(load(x, x_1 + i), own, sum_1)
                sum_2 = fma(load(x, x_2 + i), own, sum_2)
                sum_3 = fma(load(x, x_3 + i), own, sum_3)
            if whole < width:
                left = width - whole
                own = part(a, first + whole, left)
                sum_0 = fma(part(x, x_0 + whole, left), own, sum_0)
                sum_1 = fma(part(x, x_1 + whole, left), own, sum_1)
                sum_2 = fma(part(x, x_2 + whole, left), own, sum_2)
                sum_3 = fma(part(x, x_3 + whole, left), own, sum_3)
            low[row * ranks + rank] = total(sum_0)
            low[(row + 1) * ranks + rank] = total(sum_1)
            low[(row + 2) * ranks + rank] = total(sum_2)
            low[(row + 3) * ranks + rank] = total(sum_3)
    for row in range(four, rows):
        for rank in range(ranks):
            sums = zero
            for i in range(0, whole, LANES):
                sums = fma(load(x, row * width + i), load(a, rank * width + i), sums)
            if whole < width:
                left = width - whole
                sums = fma(part(x, row * width + whole, left), part(a, rank * width + whole, left), sums)
            low[row * ranks + rank] = total(sums)
    add_back(low, a, places, scale, output, 0, rows, ranks, count, output_row)
