"""The adapters' part of a training pass's products, scale (x A^T) B^T, and its gradients: all of them in one call.

Blocks of rows are shared out to torch's threads, and for gradients of the adapters blocks of columns. Each number is
one sum in one order, whatever is computed beside it: along a width in sixteen lanes that are added up at the end, along
the ranks one after another; a gradient's along the rows of a datum, and the datums' are added one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import bits_of, next_part, shared
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    doubles,
    floats,
    fma,
    ints,
    part,
    splat,
    store_part,
    store_totals,
    total,
)

ROW_BLOCK = 32
"""Rows that a thread takes at a time."""

COLUMN_BLOCK = 4 * LANES
"""Columns of a gradient that a thread takes at a time."""


class AdapterRows(NamedTuple):
    """Rows of one adapter, and its matrices of m linear layers that read the same input and whose outputs lie side by
    side; r is its rank."""

    start: int
    rows: int
    a: Tensor
    """[m r, in], the layers' A's one below the other; behind it in memory lies the B^T [r, columns] of each layer."""
    places: Tensor
    """int64 [m, 3]: of each B its first column of the output, its columns, and how many numbers behind the first of `a`
    its B^T begins."""
    scale: float
    gradient: Tensor | None
    """Where dA is added, with the B^T's in the same places behind it."""
    datums: Tensor
    """int64 [n, 2]: (rows of each, how many) of the datums that the rows are, in order."""


class LowRank:
    """One group's layers in all segments of a pass."""

    def __init__(self, segments: Iterable[AdapterRows]) -> None:
        self._segments = list(segments)
        self._table = array("q")
        self._size, self._end, self._trains = 0, 0, False
        for start, rows, a, places, scale, gradient, datums in self._segments:
            self._trains = self._trains or gradient is not None
            self._table.extend((
                start, rows, a.data_ptr(), a.shape[0], places.shape[0], places.data_ptr(), bits_of(scale), self._size,
                0 if gradient is None else gradient.data_ptr(), datums.data_ptr(), datums.shape[0],
            ))  # fmt: skip
            self._size += rows * a.shape[0]
            self._end = max(self._end, start + rows)

    def forward(self, x: Tensor, output: Tensor | None) -> Tensor:
        """All segments' x A^T, flat, of x [T, in]; adds scale (x A^T) B^T to `output` [T, out], if there is one. Both
        are contiguous."""
        assert x.is_contiguous() and (output is None or output.is_contiguous())
        assert self._end <= len(x) and (output is None or len(output) == len(x))
        low = torch.empty(self._size)
        if self._segments:
            _outputs(
                x.data_ptr(), 0 if output is None else output.data_ptr(), low.data_ptr(), x.shape[1],
                0 if output is None else output.shape[1], self._table.buffer_info()[0], len(self._segments),
            )  # fmt: skip
        return low

    def backward(self, x: Tensor, low: Tensor, d_output: Tensor, d_input: Tensor | None) -> None:
        """Add dA and dB to the segments' gradients, and their part of the input's gradient to `d_input` [T, in], if
        there is one, from that of the output [T, out] and `forward`'s result for x. All are contiguous."""
        assert x.is_contiguous() and d_output.is_contiguous() and (d_input is None or d_input.is_contiguous())
        assert self._end <= len(x) == len(d_output) and len(low) == self._size
        if not self._segments:
            return
        d_low = torch.empty_like(low)
        where = x.shape[1], d_output.shape[1], self._table.buffer_info()[0], len(self._segments)
        _input_gradients(d_output.data_ptr(), 0 if d_input is None else d_input.data_ptr(), d_low.data_ptr(), *where)
        if self._trains:
            _weight_gradients(x.data_ptr(), d_output.data_ptr(), low.data_ptr(), d_low.data_ptr(), *where)


FIELDS = 11
"""Of a segment in the table."""
START, ROWS, A, RANKS, COUNT, PLACES, SCALE, LOW, GRADIENT, DATUMS, RUNS = range(FIELDS)


@njit(inline="always")
def _dots(x, x_first, x_row, rows, w, w_first, width, columns, output, first, output_row):
    """output [rows, columns] = x [rows, width] w [columns, width]^T."""
    zero = splat(np.float32(0))
    fours, four = rows - rows % 4, columns - columns % 4
    for column in range(0, four, 4):
        w_0 = w_first + column * width
        w_1, w_2, w_3 = w_0 + width, w_0 + 2 * width, w_0 + 3 * width
        for row in range(0, fours, 4):
            x_0 = x_first + row * x_row
            x_1, x_2, x_3 = x_0 + x_row, x_0 + 2 * x_row, x_0 + 3 * x_row
            sum_00 = sum_01 = sum_02 = sum_03 = sum_10 = sum_11 = sum_12 = sum_13 = zero
            sum_20 = sum_21 = sum_22 = sum_23 = sum_30 = sum_31 = sum_32 = sum_33 = zero
            for i in range(0, width, LANES):
                left = width - i
                one, two = part(w, w_0 + i, left), part(w, w_1 + i, left)
                three, last = part(w, w_2 + i, left), part(w, w_3 + i, left)
                own = part(x, x_0 + i, left)
                sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
                sum_02, sum_03 = fma(own, three, sum_02), fma(own, last, sum_03)
                own = part(x, x_1 + i, left)
                sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
                sum_12, sum_13 = fma(own, three, sum_12), fma(own, last, sum_13)
                own = part(x, x_2 + i, left)
                sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
                sum_22, sum_23 = fma(own, three, sum_22), fma(own, last, sum_23)
                own = part(x, x_3 + i, left)
                sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
                sum_32, sum_33 = fma(own, three, sum_32), fma(own, last, sum_33)
            to = first + row * output_row + column
            store_totals(output, to, sum_00, sum_01, sum_02, sum_03)
            store_totals(output, to + output_row, sum_10, sum_11, sum_12, sum_13)
            store_totals(output, to + 2 * output_row, sum_20, sum_21, sum_22, sum_23)
            store_totals(output, to + 3 * output_row, sum_30, sum_31, sum_32, sum_33)
    for row in range(rows):
        for column in range(four if row < fours else 0, columns):
            sums = zero
            for i in range(0, width, LANES):
                left = width - i
                own = part(w, w_first + column * width + i, left)
                sums = fma(part(x, x_first + row * x_row + i, left), own, sums)
            output[first + row * output_row + column] = total(sums)


@njit(inline="always")
def _add_outer(low, low_first, low_row, rows, ranks, b, b_first, columns, scale, output, first, output_row):
    """output [rows, columns] += scale * low [rows, ranks] b [ranks, columns]."""
    zero = splat(np.float32(0))
    fours = rows - rows % 4
    for row in range(0, fours, 4):
        to_0, low_0 = first + row * output_row, low_first + row * low_row
        to_1, to_2, to_3 = to_0 + output_row, to_0 + 2 * output_row, to_0 + 3 * output_row
        low_1, low_2, low_3 = low_0 + low_row, low_0 + 2 * low_row, low_0 + 3 * low_row
        for i in range(0, columns, 2 * LANES):
            j = i + LANES
            left, right = columns - i, columns - j
            sum_00 = sum_01 = sum_10 = sum_11 = sum_20 = sum_21 = sum_30 = sum_31 = zero
            for rank in range(ranks):
                one = part(b, b_first + rank * columns + i, left)
                two = part(b, b_first + rank * columns + j, right)
                own = splat(low[low_0 + rank])
                sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
                own = splat(low[low_1 + rank])
                sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
                own = splat(low[low_2 + rank])
                sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
                own = splat(low[low_3 + rank])
                sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
            _add(output, to_0 + i, sum_00, scale, left)
            _add(output, to_1 + i, sum_10, scale, left)
            _add(output, to_2 + i, sum_20, scale, left)
            _add(output, to_3 + i, sum_30, scale, left)
            _add(output, to_0 + j, sum_01, scale, right)
            _add(output, to_1 + j, sum_11, scale, right)
            _add(output, to_2 + j, sum_21, scale, right)
            _add(output, to_3 + j, sum_31, scale, right)
    for row in range(fours, rows):
        for i in range(0, columns, LANES):
            left, sums = columns - i, zero
            for rank in range(ranks):
                own = splat(low[low_first + row * low_row + rank])
                sums = fma(own, part(b, b_first + rank * columns + i, left), sums)
            _add(output, first + row * output_row + i, sums, scale, left)


@njit(inline="always")
def _add(output, to, sums, scale, count):
    """Add scale * sums to the first `count` numbers from `to` on."""
    store_part(output, to, fma(sums, scale, part(output, to, count)), count)


@njit(inline="always")
def _add_gradient(low, low_first, low_row, ranks, x, x_first, x_row, i, columns, datums, runs, scale, gradient, first):
    """gradient [ranks, columns] += scale * the datums' low^T x, in the columns from i to i + COLUMN_BLOCK."""
    zero = splat(np.float32(0))
    left_0, left_1 = columns - i, columns - i - LANES
    left_2, left_3 = left_1 - LANES, left_1 - 2 * LANES
    low_at, x_at = low_first, x_first + i
    for run in range(runs):
        rows = datums[2 * run]
        for _ in range(datums[2 * run + 1]):
            for rank in range(0, ranks - ranks % 4, 4):
                sum_00 = sum_01 = sum_02 = sum_03 = sum_10 = sum_11 = sum_12 = sum_13 = zero
                sum_20 = sum_21 = sum_22 = sum_23 = sum_30 = sum_31 = sum_32 = sum_33 = zero
                for row in range(rows):
                    own, by = x_at + row * x_row, low_at + row * low_row + rank
                    one, two = part(x, own, left_0), part(x, own + LANES, left_1)
                    three, last = part(x, own + 2 * LANES, left_2), part(x, own + 3 * LANES, left_3)
                    factor = splat(low[by])
                    sum_00, sum_01 = fma(factor, one, sum_00), fma(factor, two, sum_01)
                    sum_02, sum_03 = fma(factor, three, sum_02), fma(factor, last, sum_03)
                    factor = splat(low[by + 1])
                    sum_10, sum_11 = fma(factor, one, sum_10), fma(factor, two, sum_11)
                    sum_12, sum_13 = fma(factor, three, sum_12), fma(factor, last, sum_13)
                    factor = splat(low[by + 2])
                    sum_20, sum_21 = fma(factor, one, sum_20), fma(factor, two, sum_21)
                    sum_22, sum_23 = fma(factor, three, sum_22), fma(factor, last, sum_23)
                    factor = splat(low[by + 3])
                    sum_30, sum_31 = fma(factor, one, sum_30), fma(factor, two, sum_31)
                    sum_32, sum_33 = fma(factor, three, sum_32), fma(factor, last, sum_33)
                to = first + rank * columns + i
                _add_four(gradient, to, sum_00, sum_01, sum_02, sum_03, scale, left_0)
                _add_four(gradient, to + columns, sum_10, sum_11, sum_12, sum_13, scale, left_0)
                _add_four(gradient, to + 2 * columns, sum_20, sum_21, sum_22, sum_23, scale, left_0)
                _add_four(gradient, to + 3 * columns, sum_30, sum_31, sum_32, sum_33, scale, left_0)
            for rank in range(ranks - ranks % 4, ranks):
                sum_00 = sum_01 = sum_02 = sum_03 = zero
                for row in range(rows):
                    own, factor = x_at + row * x_row, splat(low[low_at + row * low_row + rank])
                    sum_00, sum_01 = (
                        fma(factor, part(x, own, left_0), sum_00),
                        fma(factor, part(x, own + LANES, left_1), sum_01),
                    )
                    sum_02, sum_03 = (
                        fma(factor, part(x, own + 2 * LANES, left_2), sum_02),
                        fma(factor, part(x, own + 3 * LANES, left_3), sum_03),
                    )
                _add_four(gradient, first + rank * columns + i, sum_00, sum_01, sum_02, sum_03, scale, left_0)
            low_at += rows * low_row
            x_at += rows * x_row


@njit(inline="always")
def _add_four(output, to, sums_0, sums_1, sums_2, sums_3, scale, count):
    _add(output, to, sums_0, scale, count)
    _add(output, to + LANES, sums_1, scale, count - LANES)
    _add(output, to + 2 * LANES, sums_2, scale, count - 2 * LANES)
    _add(output, to + 3 * LANES, sums_3, scale, count - 3 * LANES)


@shared
def _outputs(data_at):
    data = ints(data_at)
    x, output, low, width, columns = floats(data[1]), floats(data[2]), floats(data[3]), data[4], data[5]
    table, scales, segments = ints(data[6]), doubles(data[6]), data[7]
    # Parts are counted through all segments; `own` is the first one of the segment at hand.
    number, own, segment = next_part(data), 0, 0
    while segment < segments:
        at = segment * FIELDS
        rows, ranks, count = table[at + ROWS], table[at + RANKS], table[at + COUNT]
        if (number - own) * ROW_BLOCK >= rows:
            own, segment = own + (rows + ROW_BLOCK - 1) // ROW_BLOCK, segment + 1
            continue
        begin = (number - own) * ROW_BLOCK
        size = min(ROW_BLOCK, rows - begin)
        row, low_first = table[at + START] + begin, table[at + LOW] + begin * ranks
        _dots(x, row * width, width, size, floats(table[at + A]), 0, width, ranks, low, low_first, ranks)
        if data[2] != 0:
            places, scale = ints(table[at + PLACES]), splat(np.float32(scales[at + SCALE]))
            for layer in range(count):
                _add_outer(
                    low, low_first + layer * (ranks // count), ranks, size, ranks // count,
                    floats(table[at + A]), places[3 * layer + 2], places[3 * layer + 1], scale,
                    output, row * columns + places[3 * layer], columns,
                )  # fmt: skip
        number = next_part(data)


@shared
def _input_gradients(data_at):
    data = ints(data_at)
    d_output, d_input, d_low, width, columns = floats(data[1]), floats(data[2]), floats(data[3]), data[4], data[5]
    table, scales, segments = ints(data[6]), doubles(data[6]), data[7]
    number, own, segment = next_part(data), 0, 0
    while segment < segments:
        at = segment * FIELDS
        rows, ranks, count = table[at + ROWS], table[at + RANKS], table[at + COUNT]
        if (number - own) * ROW_BLOCK >= rows:
            own, segment = own + (rows + ROW_BLOCK - 1) // ROW_BLOCK, segment + 1
            continue
        begin = (number - own) * ROW_BLOCK
        size = min(ROW_BLOCK, rows - begin)
        row, low_first, places = table[at + START] + begin, table[at + LOW] + begin * ranks, ints(table[at + PLACES])
        for layer in range(count):
            _dots(
                d_output, row * columns + places[3 * layer], columns, size, floats(table[at + A]),
                places[3 * layer + 2], places[3 * layer + 1], ranks // count,
                d_low, low_first + layer * (ranks // count), ranks,
            )  # fmt: skip
        if data[2] != 0:
            scale = splat(np.float32(scales[at + SCALE]))
            _add_outer(
                d_low,
                low_first,
                ranks,
                size,
                ranks,
                floats(table[at + A]),
                0,
                width,
                scale,
                d_input,
                row * width,
                width,
            )
        number = next_part(data)


@shared
def _weight_gradients(data_at):
    data = ints(data_at)
    x, d_output, low, d_low = floats(data[1]), floats(data[2]), floats(data[3]), floats(data[4])
    width, columns, table, scales, segments = data[5], data[6], ints(data[7]), doubles(data[7]), data[8]
    number, own, segment, layer = next_part(data), 0, 0, 0
    while segment < segments:
        at = segment * FIELDS
        ranks, count, places = table[at + RANKS], table[at + COUNT], ints(table[at + PLACES])
        # Of a segment's gradients, in this order: those of the B's, and of all A's.
        size = width if layer == count else places[3 * layer + 1]
        i = (number - own) * COLUMN_BLOCK
        if table[at + GRADIENT] == 0 or i >= size:
            if table[at + GRADIENT] != 0:
                own += (size + COLUMN_BLOCK - 1) // COLUMN_BLOCK
            layer += 1
            if layer > count:
                segment, layer = segment + 1, 0
            continue
        start, first, gradient = table[at + START], table[at + LOW], floats(table[at + GRADIENT])
        datums, runs, scale = ints(table[at + DATUMS]), table[at + RUNS], splat(np.float32(scales[at + SCALE]))
        if layer == count:
            _add_gradient(
                d_low, first, ranks, ranks, x, start * width, width, i, width, datums, runs, scale, gradient, 0
            )
        else:
            _add_gradient(
                low, first + layer * (ranks // count), ranks, ranks // count,
                d_output, start * columns + places[3 * layer], columns, i, size, datums, runs, scale,
                gradient, places[3 * layer + 2],
            )  # fmt: skip
        number = next_part(data)
