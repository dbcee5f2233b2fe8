"""The paged cache in place: tokens are written to their pages, and single queries attend to all tokens of theirs.

Nothing is gathered and nothing is masked, so a sequence costs what its own length is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import kernel
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    div,
    exp,
    floats,
    fma,
    ints,
    load,
    mul,
    part,
    splat,
    store,
    store_part,
    sub,
    total,
)


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
    rows: Tensor,
    tables: Tensor,
    positions: Tensor,
    output: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attend one query of each of n sequences, and write to `output`.

    query [T, Hq, D] and output [T, Hq, value dim]: of the step, of which `rows` int64 [n] are the queries'; memory as
    in `write`; tables int64 [n, P]: pages; positions int64 [n]: of the queries, whose own tokens are the last
    that they see; the rest as in `attention.Attention`.
    """
    assert memory.is_contiguous() and rows.is_contiguous() and tables.is_contiguous() and positions.is_contiguous()
    assert output.is_contiguous() and (sinks is None or sinks.is_contiguous())
    query = _rows_of_heads(query)
    heads, key_dim = query.shape[1:]
    page_tokens, kv_heads, value_dim = memory.shape[1], memory.shape[2], memory.shape[3] - key_dim
    scores = torch.empty(heads // kv_heads, tables.shape[1] * page_tokens + LANES)
    _attend(
        query.data_ptr(), query.stride(0), memory.data_ptr(), rows.data_ptr(), rows.shape[0], tables.data_ptr(),
        tables.shape[1], page_tokens, positions.data_ptr(), output.data_ptr(), heads, kv_heads, key_dim, value_dim,
        scores.data_ptr(), scores.shape[1], scaling, sliding_window or 0, softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
    )  # fmt: skip


def _rows_of_heads(heads: Tensor) -> Tensor:
    """[T, H, D], each row's heads side by side."""
    return heads if heads.stride(2) == 1 and heads.stride(1) == heads.shape[2] else heads.contiguous()


QUAD = 4 * LANES
"""Numbers of a key or a value that are in registers at a time."""


@njit(inline="always")
def _quad(numbers, at, left):
    """Four vectors in a row, 0 behind the first `left` numbers."""
    if left >= QUAD:
        return (
            load(numbers, at), load(numbers, at + LANES), load(numbers, at + 2 * LANES), load(numbers, at + 3 * LANES)
        )  # fmt: skip
    return (
        part(numbers, at, left),
        part(numbers, at + LANES, left - LANES),
        part(numbers, at + 2 * LANES, left - 2 * LANES),
        part(numbers, at + 3 * LANES, left - 3 * LANES),
    )


@kernel("void(int64,int64,int64,int64,int64,int64,int64,int64,int64,int64)")
def _write(memory_at, slots_at, key_at, key_row, value_at, value_row, tokens, heads, key_dim, value_dim):
    memory, slots, key, value = floats(memory_at), ints(slots_at), floats(key_at), floats(value_at)
    for token in range(tokens):
        for head in range(heads):
            to = (slots[token] * heads + head) * (key_dim + value_dim)
            for i in range(key_dim):
                memory[to + i] = key[token * key_row + head * key_dim + i]
            for i in range(value_dim):
                memory[to + key_dim + i] = value[token * value_row + head * value_dim + i]


@kernel(
    "void(int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,int64,float32,int64,"
    "float32,int64)"
)
def _attend(
    query_at, query_row, memory_at, rows_at, sequences, tables_at, table_row, page_tokens, positions_at, output_at,
    heads, kv_heads, key_dim, value_dim, scores_at, scores_row, scaling, window, softcap, sinks_at,
):  # fmt: skip
    query, memory, output, scores, sinks = (
        floats(query_at), floats(memory_at), floats(output_at), floats(scores_at), floats(sinks_at),
    )  # fmt: skip
    rows, tables, positions = ints(rows_at), ints(tables_at), ints(positions_at)
    group, width = heads // kv_heads, key_dim + value_dim
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for sequence in range(sequences):
        row, length, table = rows[sequence], positions[sequence] + 1, sequence * table_row
        start = max(0, length - window) if window else 0
        count = length - start
        for kv_head in range(kv_heads):
            first_query = row * query_row + kv_head * group * key_dim
            for member in range(group):
                own_query, own_scores = first_query + member * key_dim, member * scores_row
                for i in range(0, key_dim, QUAD):
                    left = key_dim - i
                    query_0, query_1, query_2, query_3 = _quad(query, own_query + i, left)
                    place = 0
                    while place < count:
                        token = start + place
                        page, offset = tables[table + token // page_tokens], token % page_tokens
                        key = ((page * page_tokens + offset) * kv_heads + kv_head) * width + i
                        # The tokens of one page
                        for _ in range(min(page_tokens - offset, count - place)):
                            key_0, key_1, key_2, key_3 = _quad(memory, key, left)
                            products = fma(query_1, key_1, mul(query_0, key_0))
                            score = total(fma(query_3, key_3, fma(query_2, key_2, products))) * scaling
                            scores[own_scores + place] = score if i == 0 else scores[own_scores + place] + score
                            place += 1
                            key += kv_heads * width
            for member in range(group):
                first = member * scores_row
                head = kv_head * group + member
                if softcap > 0:
                    for place in range(0, count, LANES):
                        # c tanh(s / c), and tanh(y) = 1 - 2 / (e ** 2y + 1)
                        raised = exp(mul(load(scores, first + place), splat(np.float32(2) / softcap)))
                        capped = sub(one, div(splat(np.float32(2)), add(raised, one)))
                        store(scores, first + place, mul(capped, splat(softcap)))
                most = scores[first]
                for place in range(1, count):
                    if not scores[first + place] <= most:
                        most = scores[first + place]
                if sinks_at != 0 and sinks[head] > most:
                    most = sinks[head]
                sums = zero
                for place in range(0, count, LANES):
                    left = count - place
                    weights = exp(sub(part(scores, first + place, left), splat(most)))
                    store_part(scores, first + place, weights, left)
                    sums = add(sums, part(scores, first + place, left))
                whole = total(sums)
                if sinks_at != 0:
                    whole += np.float32(math.exp(sinks[head] - most))
                share = splat(np.float32(1) / whole)
                to = (row * heads + head) * value_dim
                for i in range(0, value_dim, QUAD):
                    left = value_dim - i
                    mean_0 = mean_1 = mean_2 = mean_3 = zero
                    place = 0
                    while place < count:
                        token = start + place
                        page, offset = tables[table + token // page_tokens], token % page_tokens
                        value = ((page * page_tokens + offset) * kv_heads + kv_head) * width + key_dim + i
                        for _ in range(min(page_tokens - offset, count - place)):
                            weight = splat(scores[first + place])
                            value_0, value_1, value_2, value_3 = _quad(memory, value, left)
                            mean_0, mean_1 = fma(weight, value_0, mean_0), fma(weight, value_1, mean_1)
                            mean_2, mean_3 = fma(weight, value_2, mean_2), fma(weight, value_3, mean_3)
                            place += 1
                            value += kv_heads * width
                    store_part(output, to + i, mul(mean_0, share), left)
                    store_part(output, to + i + LANES, mul(mean_1, share), left - LANES)
                    store_part(output, to + i + 2 * LANES, mul(mean_2, share), left - 2 * LANES)
                    store_part(output, to + i + 3 * LANES, mul(mean_3, share), left - 3 * LANES)
