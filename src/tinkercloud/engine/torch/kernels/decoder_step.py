"""All layers of the standard decoder over the rows of a sampling step, in one call: nothing but the embedding comes
before it, nothing but the unembedding after it.

Threads go through the phases of each layer together. A phase is either products, whose parts are blocks of columns, or
something that is done to each row, whose parts are four rows; when all of its parts are done, the next one begins. Each
number is one sum in one order, so a row's bits depend neither on the other rows nor on who computed them.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import NUMBERS, THREADS, next_part, shared, take, wait_for_all
from tinkercloud.engine.torch.kernels.lora import add_back
from tinkercloud.engine.torch.kernels.paged import TOGETHER, attend_block, scores_width
from tinkercloud.engine.torch.kernels.products import WIDTH_BLOCK, block_of_columns, columns_of_product
from tinkercloud.engine.torch.kernels.rows import gate_row, norm_row, rotate_head
from tinkercloud.engine.torch.kernels.vectors import LANES, add, floats, ints, part, store_part

PHASES = 9
"""Of a layer; each has a counter of its parts."""

PRODUCTS = QKV, OUTPUT, GATE_UP, DOWN = range(4)
"""Of a layer. An adapter has a part of each."""


class StepLayer(NamedTuple):
    """One layer's weights; None where it has none. All are contiguous float32."""

    attention_norm: Tensor
    """[H]"""
    head_norm: Tensor | None
    """[Hq + Hkv, D], of queries and keys"""
    mlp_norm: Tensor
    """[H]"""
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    """[(Hq + 2 Hkv) D, H], [H, Hq D], [2 I, H] and [H, I]"""
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    attention_eps: float
    head_eps: float
    mlp_eps: float
    scaling: float
    """Of attention's scores."""
    sliding_window: int | None


class StepWeights:
    """The decoder's layers as tables of addresses, made once: the weights must stay where they are."""

    def __init__(
        self, layers: list[StepLayer], norm: Tensor, eps: float, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        """`norm` [H] and `eps` are the norm's behind the last layer."""
        self.held = layers, norm
        self.hidden, self.intermediate = norm.shape[0], layers[0].weights[DOWN].shape[1]
        self.layers, self.heads, self.kv_heads, self.head_dim = len(layers), heads, kv_heads, head_dim
        for layer in layers:
            for tensor in (*layer[:3], *layer.weights, *layer.biases):
                assert tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32)
        self.addresses = torch.tensor(
            [
                *(
                    [
                        *map(_address, (*layer[:3], *layer.weights, *layer.biases)),
                        layer.sliding_window or 0,
                        0,
                    ]
                    for layer in layers
                ),
                [norm.data_ptr()] + [0] * (_LAYER_NUMBERS - 1),
            ]
        )
        self.options = torch.tensor(
            [
                *([layer.attention_eps, layer.head_eps, layer.mlp_eps, layer.scaling, 0] for layer in layers),
                [eps] + [0] * (_LAYER_OPTIONS - 1),
            ],
            dtype=torch.float32,
        )


_ATTENTION_NORM, _HEAD_NORM, _MLP_NORM, _WEIGHTS, _BIASES, _WINDOW, _SINKS, _LAYER_NUMBERS = 0, 1, 2, 3, 7, 11, 12, 13
_ATTENTION_EPS, _HEAD_EPS, _MLP_EPS, _SCALING, _SOFTCAP, _LAYER_OPTIONS = range(6)
"""Where a layer's numbers are in the tables; the standard decoder has neither sinks nor a softcap."""


class StepRows(NamedTuple):
    """Where a step's T rows are in the cache of n sequences."""

    owners: Tensor
    """int64 [T]: which sequence's"""
    positions: Tensor
    """int64 [T]: places in it"""
    slots: Tensor
    """int64 [T]: of the cache; see `paged.write`"""
    tables: Tensor
    """int64 [n, P]: pages"""


class StepAdapters(NamedTuple):
    """The adapters of a step's T rows, each of which has neighbouring rows."""

    of_rows: Tensor
    """int64 [T]: which adapter is the row's, -1 if none"""
    ranges: Tensor
    """int64 [m, 2]: the first row of each adapter, and the one behind its last"""
    tables: Tensor
    """int64 [m]: addresses of tables of matrices, int64 [layers, 4, 4]: for each product of a layer the addresses of A
    [m r, in] and of `places` (see `lora.add_low_rank`), m r and m; zeros where the adapter has none"""
    scales: Tensor
    """float32 [m]"""
    most_ranks: int
    """The largest m r"""


def decoder_step(
    x: Tensor, weights: StepWeights, rows: StepRows, adapters: StepAdapters, caches: Tensor, page_tokens: int,
    cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """Hidden states [T, H] behind the last norm, of embeddings x [T, H], which are overwritten.

    caches int64 [layers]: the address of each one's memory (see `paged.write`), to which the rows' keys and values are
    written; cos and sin [positions, D / 2].
    """
    assert all(tensor.is_contiguous() for tensor in (x, *rows, *adapters[:4], caches, cos, sin))
    count, w = len(x), weights
    query_row, inner, ranks = (w.heads + 2 * w.kv_heads) * w.head_dim, w.intermediate, max(1, adapters.most_ranks)
    longest = scores_width(rows.tables.shape[1] * page_tokens)
    normed = torch.empty_like(x)
    # One piece of memory for all that is between
    sizes = (
        count * query_row, count * w.heads * w.head_dim, count * w.hidden, count * 2 * inner, count * inner,
        count * ranks, torch.get_num_threads() * TOGETHER * longest,
    )  # fmt: skip
    scratch = x.new_empty(sum(sizes))
    places = accumulate((4 * size for size in sizes[:-1]), initial=scratch.data_ptr())
    projected, attended, output, gate_up, activated, low, scores = places
    normed_at = normed.data_ptr()
    products = torch.tensor(
        (
            normed_at, w.hidden, query_row, projected,
            attended, w.heads * w.head_dim, w.hidden, output,
            normed_at, w.hidden, 2 * inner, gate_up,
            activated, inner, w.hidden, output,
        )
    )  # fmt: skip
    counters = torch.zeros(w.layers * PHASES, dtype=torch.int64)
    _step(
        count, w.layers, w.hidden, w.heads, w.kv_heads, w.head_dim, inner, page_tokens,
        w.addresses.data_ptr(), w.options.data_ptr(), caches.data_ptr(), counters.data_ptr(), products.data_ptr(),
        x.data_ptr(), normed_at, projected, attended, output, gate_up, activated, low, ranks, scores, longest,
        cos.data_ptr(), sin.data_ptr(), rows.owners.data_ptr(), rows.positions.data_ptr(), rows.slots.data_ptr(),
        rows.tables.data_ptr(), rows.tables.shape[1], adapters.of_rows.data_ptr(), adapters.ranges.data_ptr(),
        adapters.tables.data_ptr(), adapters.scales.data_ptr(), len(adapters.scales),
    )  # fmt: skip
    return normed


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@njit
def _products(
    counters, phase, x_at, width, weight_at, columns, output_at, product, rows,
    low_at, low_row, ranges, tables, adapters, layer,
):  # fmt: skip
    """Parts of a product of all rows, and of each adapter's x A^T of its own."""
    size = block_of_columns(columns)
    blocks = (columns + size - 1) // size
    place = take(counters, phase)
    while place < blocks + adapters:
        if place < blocks:
            begin = place * size
            stop = min(begin + size, columns)
            columns_of_product(x_at, weight_at, output_at, rows, width, columns, begin, stop, WIDTH_BLOCK)
        else:
            adapter = place - blocks
            matrices = ints(tables[adapter] + 8 * 4 * (4 * layer + product))
            if matrices[0] != 0:
                first, count, ranks = ranges[2 * adapter], ranges[2 * adapter + 1] - ranges[2 * adapter], matrices[2]
                to = low_at + 4 * first * low_row
                columns_of_product(x_at + 4 * first * width, matrices[0], to, count, width, ranks, 0, ranks, width)
        place = take(counters, phase)


@njit
def _finish_rows(
    output_at, columns, bias_at, product, first, end, low_at, low_row, of_rows, ranges, tables, scales, layer
):  # fmt: skip
    """What rows [first, end) of a product lack: the bias, and B of their adapters."""
    output, bias = floats(output_at), floats(bias_at)
    if bias_at != 0:
        for row in range(first, end):
            for i in range(0, columns, LANES):
                own = add(part(output, row * columns + i, columns - i), part(bias, i, columns - i))
                store_part(output, row * columns + i, own, columns - i)
    row = first
    while row < end:
        adapter, stop = of_rows[row], row + 1
        while stop < end and of_rows[stop] == adapter:
            stop += 1
        if adapter >= 0:
            matrices = ints(tables[adapter] + 8 * 4 * (4 * layer + product))
            if matrices[0] != 0:
                start = ranges[2 * adapter]
                add_back(
                    floats(low_at + 4 * start * low_row), floats(matrices[0]), ints(matrices[1]), scales[adapter],
                    floats(output_at + 4 * start * columns), row - start, stop - start, matrices[2], matrices[3],
                    columns,
                )  # fmt: skip
        row = stop


@njit
def _place_heads(
    projected, query_row, row, norm_at, eps, heads, kv_heads, head_dim, cos, c_at, sin, s_at, memory, slot
):  # fmt: skip
    """Norm and rotate a row's queries and keys; the keys and the values go to the cache."""
    half, first = head_dim // 2, row * query_row
    weights, is_normed = floats(norm_at), norm_at != 0
    for head in range(heads):
        at = first + head * head_dim
        rotate_head(projected, at, is_normed, weights, head * head_dim, eps, projected, at, half, cos, c_at, sin, s_at)
    for kv_head in range(kv_heads):
        head, to = heads + kv_head, (slot * kv_heads + kv_head) * 2 * head_dim
        at = first + head * head_dim
        rotate_head(projected, at, is_normed, weights, head * head_dim, eps, memory, to, half, cos, c_at, sin, s_at)
        value = at + kv_heads * head_dim
        for i in range(0, head_dim, LANES):
            store_part(memory, to + head_dim + i, part(projected, value + i, head_dim - i), head_dim - i)


@njit
def _add_row(x, first, output, width):
    """Add a row to x, in place."""
    for i in range(0, width, LANES):
        left = width - i
        store_part(x, first + i, add(part(x, first + i, left), part(output, first + i, left)), left)


@shared
def _step(data_at):
    data, n = ints(data_at), ints(data_at + 8 * NUMBERS)
    rows, layers, hidden, heads, kv_heads, head_dim, inner, page_tokens = n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]
    addresses_at, options, caches, counters, products = n[8], floats(n[9]), ints(n[10]), ints(n[11]), ints(n[12])
    x, normed, projected, attended, output, gate_up, activated = (
        floats(n[13]), floats(n[14]), floats(n[15]), floats(n[16]), floats(n[17]), floats(n[18]), floats(n[19]),
    )  # fmt: skip
    low_at, low_row, width = n[20], n[21], n[23]
    scores = floats(n[22] + 4 * take(data, THREADS) * TOGETHER * width)
    cos, sin, half, owners, positions, slots = (
        floats(n[24]),
        floats(n[25]),
        head_dim // 2,
        ints(n[26]),
        ints(n[27]),
        ints(n[28]),
    )
    pages, pages_row = ints(n[29]), n[30]
    of_rows, ranges, tables, scales, adapters = ints(n[31]), ints(n[32]), ints(n[33]), floats(n[34]), n[35]
    query_row, blocks = (heads + 2 * kv_heads) * head_dim, (rows + TOGETHER - 1) // TOGETHER

    own = ints(addresses_at)
    place = next_part(data)
    while place < blocks:
        for row in range(place * TOGETHER, min(place * TOGETHER + TOGETHER, rows)):
            at = row * hidden
            norm_row(x, at, floats(own[_ATTENTION_NORM]), normed, at, hidden, options[_ATTENTION_EPS])
        place = next_part(data)
    wait_for_all(data)

    for layer in range(layers):
        own, option = ints(addresses_at + 8 * _LAYER_NUMBERS * layer), _LAYER_OPTIONS * layer
        memory, phase = floats(caches[layer]), PHASES * layer
        for product in range(4):
            columns, to_at = products[4 * product + 2], products[4 * product + 3]
            _products(
                counters, phase, products[4 * product], products[4 * product + 1], own[_WEIGHTS + product], columns,
                to_at, product, rows, low_at, low_row, ranges, tables, adapters, layer,
            )  # fmt: skip
            wait_for_all(data)

            place = take(counters, phase + 1)
            while place < blocks:
                first, end = place * TOGETHER, min(place * TOGETHER + TOGETHER, rows)
                _finish_rows(
                    to_at, columns, own[_BIASES + product], product, first, end,
                    low_at, low_row, of_rows, ranges, tables, scales, layer,
                )  # fmt: skip
                for row in range(first, end):
                    at = row * hidden
                    if product == QKV:
                        _place_heads(
                            projected, query_row, row, own[_HEAD_NORM], options[option + _HEAD_EPS], heads, kv_heads,
                            head_dim, cos, positions[row] * half, sin, positions[row] * half, memory, slots[row],
                        )  # fmt: skip
                    elif product == GATE_UP:
                        gate_row(gate_up, 2 * row * inner, activated, row * inner, inner)
                    else:
                        # The norm that comes next: the MLP's, or that of the next layer, or the one behind the last
                        is_down = product == DOWN
                        weight = own[_LAYER_NUMBERS + _ATTENTION_NORM] if is_down else own[_MLP_NORM]
                        eps = options[option + (_LAYER_OPTIONS + _ATTENTION_EPS if is_down else _MLP_EPS)]
                        _add_row(x, at, output, hidden)
                        norm_row(x, at, floats(weight), normed, at, hidden, eps)
                place = take(counters, phase + 1)
            wait_for_all(data)
            phase += 2

            if product == QKV:
                place = take(counters, phase)
                while place < blocks * kv_heads:
                    # The last rows first: they see most, and nobody should begin with them when all else is done.
                    first = (blocks - 1 - place // kv_heads) * TOGETHER
                    attend_block(
                        projected, query_row, memory, owners, positions, pages, pages_row, attended, scores, width,
                        options[option + _SCALING], options[option + _SOFTCAP], own[_WINDOW], own[_SINKS],
                        first, min(first + TOGETHER, rows), heads, kv_heads, place % kv_heads, head_dim, head_dim,
                        page_tokens,
                    )  # fmt: skip
                    place = take(counters, phase)
                wait_for_all(data)
                phase += 1
