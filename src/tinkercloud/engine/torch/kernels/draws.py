"""Softmax over the vocabulary and a draw from it, in two passes over a row's logits and none over what is between."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import NUMBERS, next_part, shared
from tinkercloud.engine.torch.kernels.softmax import BLOCK, block_sum, largest_of
from tinkercloud.engine.torch.kernels.vectors import LANES, doubles, exp, floats, ints, part, store


def drawn(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row of `logits` [n, V] at its temperature, float32 [n], 0 being greedy, by its number in
    [0, 1), float64 [n]: tokens int64 [n] and the logarithms of the sums of the rows' exponentials, float32 [n, 1].

    Leaves in `logits` what they are less the row's largest, divided by the temperature (greedy: 1).
    """
    assert logits.is_contiguous() and temperatures.is_contiguous() and uniforms.is_contiguous()
    rows, vocab = logits.shape
    tokens, normalizers = torch.empty(rows, dtype=torch.int64), torch.empty(rows, 1)
    sums, scratch = torch.empty(rows, -(-vocab // BLOCK), dtype=torch.float64), torch.empty(rows, BLOCK)
    _drawn(
        logits.data_ptr(), temperatures.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(), normalizers.data_ptr(),
        sums.data_ptr(), scratch.data_ptr(), rows, vocab, sums.shape[1],
    )  # fmt: skip
    return tokens, normalizers


@njit
def _draw(logits, vocab, temperature, uniform, sums, blocks, scratch):
    """A token of one row and the logarithm of the sum of its exponentials."""
    top, token = largest_of(logits, vocab), 0
    if temperature == 0:
        for i in range(vocab):
            if logits[i] == top:
                token = i
                break
    scale = np.float32(1) if temperature == 0 else temperature
    whole = 0.0
    for block in range(blocks):
        own = block_sum(logits, vocab, block * BLOCK, top, scale)
        sums[block] = own
        whole += own
    if temperature == 0:
        return token, math.log(whole)
    share, before, block = uniform * whole, 0.0, 0
    while block < blocks - 1 and before + sums[block] <= share:
        before += sums[block]
        block += 1
    i, count = block * BLOCK, min(BLOCK, vocab - block * BLOCK)
    for lane in range(0, count, LANES):
        store(scratch, lane, exp(part(logits, i + lane, count - lane)))
    # Rounding may lift the share to the sum of the block: past that there is no id, so the last possible one is it.
    for place in range(count):
        if scratch[place] > 0:
            token = place
            before += np.float64(scratch[place])
            if before > share:
                break
    return i + token, math.log(whole)


@shared
def _drawn(data_at):
    data, numbers = ints(data_at), ints(data_at + 8 * NUMBERS)
    logits_at, temperatures, uniforms = numbers[0], floats(numbers[1]), doubles(numbers[2])
    tokens, normalizers = ints(numbers[3]), floats(numbers[4])
    rows, vocab, blocks = numbers[7], numbers[8], numbers[9]
    row = next_part(data)
    while row < rows:
        tokens[row], normalizer = _draw(
            floats(logits_at + 4 * row * vocab), vocab, temperatures[row], uniforms[row],
            doubles(numbers[5] + 8 * row * blocks), blocks, floats(numbers[6] + 4 * row * BLOCK),
        )  # fmt: skip
        normalizers[row] = np.float32(normalizer)
        row = next_part(data)
