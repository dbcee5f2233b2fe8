"""Softmax over the vocabulary: the same sums, in the same order, in training, in scoring and in a draw."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from tinkercloud.engine.torch.kernels.compiled import next_part, shared
from tinkercloud.engine.torch.kernels.vectors import (
    LANES,
    add,
    div,
    exp,
    floats,
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

BLOCK = 4 * LANES
"""Ids whose weights are added up in float32; the sums of blocks are in float64."""


def log_softmax(logits: Tensor) -> None:
    """Make log-probabilities of logits [T, V], contiguous, in their place."""
    assert logits.is_contiguous()
    _log_softmax(logits.data_ptr(), *logits.shape)


def softmax_times(log_probabilities: Tensor, factors: Tensor) -> None:
    """Make exp(log_probabilities) * factors of [T, V] and [T] in the place of the first; both contiguous."""
    assert log_probabilities.is_contiguous() and factors.is_contiguous()
    _softmax_times(log_probabilities.data_ptr(), factors.data_ptr(), *log_probabilities.shape)


@njit
def largest_of(logits, vocab):
    """The largest of a row; of those that are not NaN, if there are any."""
    least = splat(np.float32(-np.inf))
    most = least
    for i in range(0, vocab, LANES):
        most = maximum(part_or(logits, i, vocab - i, least), most)
    return largest(most)


@njit(inline="always")
def _weights(logits, i, top, scale):
    """Leave (logit - top) / scale in the place of each logit of a vector, and return their exponentials."""
    own = div(sub(load(logits, i), top), scale)
    store(logits, i, own)
    return exp(own)


@njit(inline="always")
def _last_weights(logits, i, left, top, scale):
    """Likewise of `left` logits, and 0 behind them."""
    own = div(sub(part_or(logits, i, left, splat(np.float32(-np.inf))), top), scale)
    store_part(logits, i, own, left)
    return exp(own)


@njit(inline="always")
def block_sum(logits, vocab, i, top, scale):
    """The sum, float64, of the weights e ** ((logit - top) / scale) of a row's ids from i on, at most `BLOCK`, whose
    logits become what is in the brackets."""
    left, top, scale = vocab - i, splat(top), splat(scale)
    if left >= BLOCK:
        one, two = _weights(logits, i, top, scale), _weights(logits, i + LANES, top, scale)
        three, last = _weights(logits, i + 2 * LANES, top, scale), _weights(logits, i + 3 * LANES, top, scale)
    else:
        one = _last_weights(logits, i, left, top, scale)
        two = _last_weights(logits, i + LANES, left - LANES, top, scale)
        three = _last_weights(logits, i + 2 * LANES, left - 2 * LANES, top, scale)
        last = _last_weights(logits, i + 3 * LANES, left - 3 * LANES, top, scale)
    return np.float64(total(add(add(one, two), add(three, last))))


@shared
def _log_softmax(data_at):
    data = ints(data_at)
    rows, vocab = data[2], data[3]
    row = next_part(data)
    while row < rows:
        logits = floats(data[1] + 4 * row * vocab)
        top, whole = largest_of(logits, vocab), 0.0
        for i in range(0, vocab, BLOCK):
            whole += block_sum(logits, vocab, i, top, np.float32(1))
        lost = splat(np.float32(math.log(whole)))
        for i in range(0, vocab, LANES):
            store_part(logits, i, sub(part(logits, i, vocab - i), lost), vocab - i)
        row = next_part(data)


@shared
def _softmax_times(data_at):
    data = ints(data_at)
    log_probabilities, factors, rows, width = floats(data[1]), floats(data[2]), data[3], data[4]
    row = next_part(data)
    while row < rows:
        first, factor = row * width, splat(factors[row])
        for column in range(0, width, LANES):
            left = width - column
            own = exp(part(log_probabilities, first + column, left))
            store_part(log_probabilities, first + column, mul(own, factor), left)
        row = next_part(data)
