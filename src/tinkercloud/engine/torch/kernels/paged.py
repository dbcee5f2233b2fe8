"""The paged cache in place: tokens are written to their pages, and each query attends to all tokens up to its own.

Nothing is gathered and nothing is masked, so a query costs what comes before it. Four queries that see nearly the same
tokens (neighbours of one sequence, or heads that share their keys) go through them together; each one's numbers are the
same sums in the same order as when it goes alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import NUMBERS, THREADS, kernel, later, next_part, shared, take
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    div,
    exp,
    fetch,
    floats,
    fma,
    ints,
    largest,
    load,
    maximum,
    mul,
    part,
    splat,
    store,
    store_part,
    store_totals,
    sub,
    total,
)

TOGETHER = 4
"""Queries that attend together, and keys that they are multiplied by at a time. Divides the tokens of a page."""


def scores_width(longest: int) -> int:
    """Numbers of scratch memory for the scores of one query that sees so many tokens."""
    return longest + TOGETHER + LANES


def write(memory: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store keys and values [T, heads, dim] of T tokens in memory [pages, page tokens, heads, key dim + value dim]; a
    slot counts tokens from the first page's first, int64 [T]."""
    assert memory.is_contiguous() and slots.is_contiguous()
    heads, key_dim, value_dim = *key.shape[1:], value.shape[2]
    key, value = _rows_of_heads(key), _rows_of_heads(value)
    _write(
        memory.data_ptr(), slots.data_ptr(), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0),
        key.shape[0], heads, key_dim, value_dim,
    )  # fmt: skip


def attended(
    query: Tensor,
    memory: Tensor,
    owners: Tensor,
    tables: Tensor,
    positions: Tensor,
    output: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attend queries [T, Hq, D], each over the tokens of its sequence up to its own; to output [.., Hq, value dim],
    whose first T rows are theirs.

    memory as in `write`; tables int64 [n, P]: the pages of n sequences; owners and positions int64 [T]: whose each
    query is, and where in it; the rest as in `attention.Attention`.
    """
    assert memory.is_contiguous() and owners.is_contiguous() and tables.is_contiguous() and positions.is_contiguous()
    assert output.is_contiguous() and (sinks is None or sinks.is_contiguous())
    query = _rows_of_heads(query)
    rows, heads, key_dim = query.shape
    page_tokens, kv_heads, value_dim = memory.shape[1], memory.shape[2], memory.shape[3] - key_dim
    width = scores_width(tables.shape[1] * page_tokens)
    scores = torch.empty(torch.get_num_threads(), TOGETHER * width)
    options = torch.tensor([scaling, softcap or 0.0], dtype=torch.float32)
    _attend(
        query.data_ptr(), query.stride(0), memory.data_ptr(), owners.data_ptr(), positions.data_ptr(),
        tables.data_ptr(), tables.shape[1], output.data_ptr(), scores.data_ptr(), width,
        options.data_ptr(), sliding_window or 0, 0 if sinks is None else sinks.data_ptr(),
        rows, heads, kv_heads, key_dim, value_dim, page_tokens,
    )  # fmt: skip


def _rows_of_heads(heads: Tensor) -> Tensor:
    """[T, H, D], each row's heads side by side."""
    return heads if heads.stride(2) == 1 and heads.stride(1) == heads.shape[2] else heads.contiguous()


QUAD = 4 * LANES
"""Numbers of a value that are in registers at a time."""


@njit(inline="always")
def _quad(numbers, at, left):
    """Four vectors in a row, 0 behind the first `left` numbers."""
    return (
        part(numbers, at, left),
        part(numbers, at + LANES, left - LANES),
        part(numbers, at + 2 * LANES, left - 2 * LANES),
        part(numbers, at + 3 * LANES, left - 3 * LANES),
    )


@njit(inline="always")
def _store_quad(output, to, left, share, mean_0, mean_1, mean_2, mean_3):
    share = splat(share)
    store_part(output, to, mul(mean_0, share), left)
    store_part(output, to + LANES, mul(mean_1, share), left - LANES)
    store_part(output, to + 2 * LANES, mul(mean_2, share), left - 2 * LANES)
    store_part(output, to + 3 * LANES, mul(mean_3, share), left - 3 * LANES)


@njit(inline="always")
def _score_one(query, q, memory, key, key_row, dim, scores, to):
    """A query's products with four keys that lie `key_row` numbers apart."""
    sum_0 = sum_1 = sum_2 = sum_3 = splat(np.float32(0))
    key_1, key_2, key_3 = key + key_row, key + 2 * key_row, key + 3 * key_row
    for i in range(0, dim, LANES):
        left = dim - i
        own = part(query, q + i, left)
        sum_0, sum_1 = fma(own, part(memory, key + i, left), sum_0), fma(own, part(memory, key_1 + i, left), sum_1)
        sum_2, sum_3 = fma(own, part(memory, key_2 + i, left), sum_2), fma(own, part(memory, key_3 + i, left), sum_3)
    store_totals(scores, to, sum_0, sum_1, sum_2, sum_3)


@njit(inline="always")
def _score_four(query, q, q_step, memory, key, key_row, dim, scores, to, scores_row):
    """Likewise of four queries that lie `q_step` numbers apart, to scores that lie `scores_row` apart."""
    sum_00 = sum_01 = sum_02 = sum_03 = sum_10 = sum_11 = sum_12 = sum_13 = splat(np.float32(0))
    sum_20 = sum_21 = sum_22 = sum_23 = sum_30 = sum_31 = sum_32 = sum_33 = splat(np.float32(0))
    for i in range(0, dim, LANES):
        left = dim - i
        one, two = part(memory, key + i, left), part(memory, key + key_row + i, left)
        three, four = part(memory, key + 2 * key_row + i, left), part(memory, key + 3 * key_row + i, left)
        own = part(query, q + i, left)
        sum_00, sum_01 = fma(own, one, sum_00), fma(own, two, sum_01)
        sum_02, sum_03 = fma(own, three, sum_02), fma(own, four, sum_03)
        own = part(query, q + q_step + i, left)
        sum_10, sum_11 = fma(own, one, sum_10), fma(own, two, sum_11)
        sum_12, sum_13 = fma(own, three, sum_12), fma(own, four, sum_13)
        own = part(query, q + 2 * q_step + i, left)
        sum_20, sum_21 = fma(own, one, sum_20), fma(own, two, sum_21)
        sum_22, sum_23 = fma(own, three, sum_22), fma(own, four, sum_23)
        own = part(query, q + 3 * q_step + i, left)
        sum_30, sum_31 = fma(own, one, sum_30), fma(own, two, sum_31)
        sum_32, sum_33 = fma(own, three, sum_32), fma(own, four, sum_33)
    store_totals(scores, to, sum_00, sum_01, sum_02, sum_03)
    store_totals(scores, to + scores_row, sum_10, sum_11, sum_12, sum_13)
    store_totals(scores, to + 2 * scores_row, sum_20, sum_21, sum_22, sum_23)
    store_totals(scores, to + 3 * scores_row, sum_30, sum_31, sum_32, sum_33)


@njit
def _weigh(scores, first, count, scaling, softcap, sinks_at, sink):
    """Leave e ** (score - the largest) in the place of `count` scores, and return 1 / their sum."""
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    whole = count - count % LANES
    most = splat(np.float32(-np.inf))
    for place in range(0, count, LANES):
        own = mul(part(scores, first + place, count - place), splat(scaling))
        if softcap > 0:
            # c tanh(s / c), and tanh(y) = 1 - 2 / (e ** 2y + 1)
            raised = exp(mul(own, splat(np.float32(2) / softcap)))
            own = mul(sub(one, div(splat(np.float32(2)), add(raised, one))), splat(softcap))
        store_part(scores, first + place, own, count - place)
        if place < whole:
            most = maximum(own, most)
    top = largest(most)
    for place in range(whole, count):
        top = max(top, scores[first + place])
    if sinks_at != 0:
        top = max(top, floats(sinks_at)[sink])
    sums = zero
    for place in range(0, whole, LANES):
        weights = exp(sub(load(scores, first + place), splat(top)))
        store(scores, first + place, weights)
        sums = add(sums, weights)
    if whole < count:
        left = count - whole
        store_part(scores, first + whole, exp(sub(part(scores, first + whole, left), splat(top))), left)
        sums = add(sums, part(scores, first + whole, left))
    everything = total(sums)
    if sinks_at != 0:
        everything += np.float32(math.exp(floats(sinks_at)[sink] - top))
    return np.float32(1) / everything


@njit(inline="always")
def _place(tables, table, token, page_tokens, kv_heads, kv_head, width):
    """Where a token's key begins."""
    page = tables[table + token // page_tokens]
    return ((page * page_tokens + token % page_tokens) * kv_heads + kv_head) * width


@njit(inline="always")
def _fetch(memory, at, row, tokens, width):
    """Ask for the keys and the values of so many tokens of a page before they are needed. Of a step's attention most
    was waiting for them: a core's nearest caches hold fewer than a layer has."""
    for _ in range(tokens):
        for i in range(0, width, LANES):
            fetch(memory, at + i)
        at += row


@njit
def _attend_one(
    query, q, memory, tables, table, page_tokens, kv_heads, kv_head, key_dim, value_dim, position, window,
    scaling, softcap, sinks_at, sink, scores, output, to, is_first,
):  # fmt: skip
    """A query at a position over the tokens up to it, those in the window."""
    width = key_dim + value_dim
    row, end = kv_heads * width, position + 1
    start = max(0, end - window) if window else 0
    base = start - start % TOGETHER
    token = base
    while token < end:
        key = _place(tables, table, token, page_tokens, kv_heads, kv_head, width)
        if is_first and token + page_tokens < end:
            ahead = _place(tables, table, token + page_tokens, page_tokens, kv_heads, kv_head, width)
            _fetch(memory, ahead, row, page_tokens, width)
        for _ in range(0, min(end - token, page_tokens - token % page_tokens), TOGETHER):
            _score_one(query, q, memory, key, row, key_dim, scores, token - base)
            token += TOGETHER
            key += TOGETHER * row
    share = _weigh(scores, start - base, end - start, scaling, softcap, sinks_at, sink)
    for i in range(0, value_dim, QUAD):
        left = value_dim - i
        mean_0 = mean_1 = mean_2 = mean_3 = splat(np.float32(0))
        token = start
        while token < end:
            value = _place(tables, table, token, page_tokens, kv_heads, kv_head, width) + key_dim + i
            for _ in range(min(end - token, page_tokens - token % page_tokens)):
                weight = splat(scores[token - base])
                value_0, value_1, value_2, value_3 = _quad(memory, value, left)
                mean_0, mean_1 = fma(weight, value_0, mean_0), fma(weight, value_1, mean_1)
                mean_2, mean_3 = fma(weight, value_2, mean_2), fma(weight, value_3, mean_3)
                token += 1
                value += row
        _store_quad(output, to + i, left, share, mean_0, mean_1, mean_2, mean_3)


@njit
def _attend_four(
    query, q, q_step, memory, tables, table, page_tokens, kv_heads, kv_head, key_dim, value_dim, position, step, window,
    scaling, softcap, sinks_at, sink, sink_step, scores, scores_row, output, to, to_step,
):  # fmt: skip
    """Four queries that lie `q_step` numbers apart, at positions that are `step` apart, to outputs `to_step` apart."""
    width = key_dim + value_dim
    row = kv_heads * width
    end_0 = position + 1
    end_1, end_2, end = end_0 + step, end_0 + 2 * step, end_0 + 3 * step
    start, start_1 = (max(0, end_0 - window), max(0, end_1 - window)) if window else (0, 0)
    start_2, start_3 = (max(0, end_2 - window), max(0, end - window)) if window else (0, 0)
    base = start - start % TOGETHER
    token = base
    while token < end:
        key = _place(tables, table, token, page_tokens, kv_heads, kv_head, width)
        for _ in range(0, min(end - token, page_tokens - token % page_tokens), TOGETHER):
            _score_four(query, q, q_step, memory, key, row, key_dim, scores, token - base, scores_row)
            token += TOGETHER
            key += TOGETHER * row
    s_1, s_2, s_3 = scores_row, 2 * scores_row, 3 * scores_row
    share_0 = _weigh(scores, start - base, end_0 - start, scaling, softcap, sinks_at, sink)
    share_1 = _weigh(scores, s_1 + start_1 - base, end_1 - start_1, scaling, softcap, sinks_at, sink + sink_step)
    share_2 = _weigh(scores, s_2 + start_2 - base, end_2 - start_2, scaling, softcap, sinks_at, sink + 2 * sink_step)
    share_3 = _weigh(scores, s_3 + start_3 - base, end - start_3, scaling, softcap, sinks_at, sink + 3 * sink_step)
    for i in range(0, value_dim, QUAD):
        left = value_dim - i
        mean_00 = mean_01 = mean_02 = mean_03 = mean_10 = mean_11 = mean_12 = mean_13 = splat(np.float32(0))
        mean_20 = mean_21 = mean_22 = mean_23 = mean_30 = mean_31 = mean_32 = mean_33 = splat(np.float32(0))
        token = start
        while token < end:
            value = _place(tables, table, token, page_tokens, kv_heads, kv_head, width) + key_dim + i
            for _ in range(min(end - token, page_tokens - token % page_tokens)):
                value_0, value_1, value_2, value_3 = _quad(memory, value, left)
                at = token - base
                if token < end_0:
                    weight = splat(scores[at])
                    mean_00, mean_01 = fma(weight, value_0, mean_00), fma(weight, value_1, mean_01)
                    mean_02, mean_03 = fma(weight, value_2, mean_02), fma(weight, value_3, mean_03)
                if start_1 <= token < end_1:
                    weight = splat(scores[s_1 + at])
                    mean_10, mean_11 = fma(weight, value_0, mean_10), fma(weight, value_1, mean_11)
                    mean_12, mean_13 = fma(weight, value_2, mean_12), fma(weight, value_3, mean_13)
                if start_2 <= token < end_2:
                    weight = splat(scores[s_2 + at])
                    mean_20, mean_21 = fma(weight, value_0, mean_20), fma(weight, value_1, mean_21)
                    mean_22, mean_23 = fma(weight, value_2, mean_22), fma(weight, value_3, mean_23)
                if start_3 <= token:
                    weight = splat(scores[s_3 + at])
                    mean_30, mean_31 = fma(weight, value_0, mean_30), fma(weight, value_1, mean_31)
                    mean_32, mean_33 = fma(weight, value_2, mean_32), fma(weight, value_3, mean_33)
                token += 1
                value += row
        _store_quad(output, to + i, left, share_0, mean_00, mean_01, mean_02, mean_03)
        _store_quad(output, to + to_step + i, left, share_1, mean_10, mean_11, mean_12, mean_13)
        _store_quad(output, to + 2 * to_step + i, left, share_2, mean_20, mean_21, mean_22, mean_23)
        _store_quad(output, to + 3 * to_step + i, left, share_3, mean_30, mean_31, mean_32, mean_33)


@njit
def attend_block(
    query, query_row, memory, owners, positions, tables, table_row, output, scores, scores_row,
    scaling, softcap, window, sinks_at, first, end, heads, kv_heads, kv_head, key_dim, value_dim, page_tokens,
):  # fmt: skip
    """The queries of rows [first, end), at most four, that have one key head."""
    group, own = heads // kv_heads, owners[first]
    head, to_row = kv_head * group, heads * value_dim
    are_neighbours = (
        end - first == TOGETHER and owners[first + 3] == own and positions[first + 3] == positions[first] + 3
    )
    fours = group if are_neighbours else group - group % TOGETHER
    step = 1 if are_neighbours else 0
    for row in range(first, first + 1 if are_neighbours else end):
        table = owners[row] * table_row
        for member in range(head, head + fours, 1 if are_neighbours else TOGETHER):
            _attend_four(
                query, row * query_row + member * key_dim, query_row if are_neighbours else key_dim, memory,
                tables, table, page_tokens, kv_heads, kv_head, key_dim, value_dim, positions[row], step, window,
                scaling, softcap, sinks_at, member, 1 - step, scores, scores_row,
                output, row * to_row + member * value_dim, to_row if are_neighbours else value_dim,
            )  # fmt: skip
        if row + 1 < end and not are_neighbours:
            ahead = _place(tables, owners[row + 1] * table_row, 0, page_tokens, kv_heads, kv_head, key_dim + value_dim)
            _fetch(memory, ahead, kv_heads * (key_dim + value_dim), page_tokens, key_dim + value_dim)
        for member in range(head + fours, head + group):
            _attend_one(
                query, row * query_row + member * key_dim, memory, tables, table, page_tokens, kv_heads, kv_head,
                key_dim, value_dim, positions[row], window, scaling, softcap, sinks_at, member, scores,
                output, row * to_row + member * value_dim, member == head + fours,
            )  # fmt: skip


@later(kernel("void(int64,int64,int64,int64,int64,int64,int64,int64,int64,int64)"))
def _write(memory_at, slots_at, key_at, key_row, value_at, value_row, tokens, heads, key_dim, value_dim):
    memory, slots, key, value = floats(memory_at), ints(slots_at), floats(key_at), floats(value_at)
    for token in range(tokens):
        for head in range(heads):
            to = (slots[token] * heads + head) * (key_dim + value_dim)
            for i in range(key_dim):
                memory[to + i] = key[token * key_row + head * key_dim + i]
            for i in range(value_dim):
                memory[to + key_dim + i] = value[token * value_row + head * value_dim + i]


@later(shared)
def _attend(data_at):
    data = ints(data_at)
    numbers = ints(data_at + 8 * NUMBERS)
    query, query_row, memory, owners = floats(numbers[0]), numbers[1], floats(numbers[2]), ints(numbers[3])
    positions, tables, table_row, output = ints(numbers[4]), ints(numbers[5]), numbers[6], floats(numbers[7])
    scores_row, options, window, sinks_at = numbers[9], floats(numbers[10]), numbers[11], numbers[12]
    rows, heads, kv_heads, key_dim, value_dim, page_tokens = (
        numbers[13], numbers[14], numbers[15], numbers[16], numbers[17], numbers[18],
    )  # fmt: skip
    scores = floats(numbers[8] + 4 * take(data, THREADS) * TOGETHER * scores_row)
    blocks = (rows + TOGETHER - 1) // TOGETHER
    place = next_part(data)
    while place < blocks * kv_heads:
        # The last rows first: they see most, and whoever has one of them should not begin with it when all else is done
        first = (blocks - 1 - place // kv_heads) * TOGETHER
        attend_block(
            query, query_row, memory, owners, positions, tables, table_row, output, scores, scores_row,
            options[0], options[1], window, sinks_at, first, min(first + TOGETHER, rows),
            heads, kv_heads, place % kv_heads, key_dim, value_dim, page_tokens,
        )  # fmt: skip
        place = next_part(data)
