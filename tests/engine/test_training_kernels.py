"""Kernels of training passes against float64 and autograd, and their promise: bits depend neither on other rows nor on
threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.engine.test_kernels import WIDTHS, assert_near, numbers
from tinkercloud.engine.torch.kernels.backward import (
    gated_backward,
    rms_norm_backward,
    rotated_backward,
)
from tinkercloud.engine.torch.kernels.causal import causal_attention, causal_attention_backward
from tinkercloud.engine.torch.kernels.low_rank import AdapterRows, LowRank
from tinkercloud.engine.torch.kernels.rows import MANY_ROWS, gated, rms_norm, rotated
from tinkercloud.engine.torch.kernels.softmax import log_softmax, softmax_times

MANY = MANY_ROWS + 39
PARTS = [slice(0, 1), slice(3, 40), slice(MANY - 30, MANY)]


@pytest.fixture(params=[1, 2, 4])
def same(request):
    """With so many threads: the results that it is given are those, to the bit, of the same test with fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    test = request.node.name.replace(f"[{request.param}", "[", 1)

    def check(*results: Tensor) -> None:
        first = FIRST.setdefault(test, [result.clone() for result in results])
        assert all(torch.equal(one, other) for one, other in zip(first, results, strict=True))

    yield check
    torch.set_num_threads(before)


FIRST: dict[str, list[Tensor]] = {}
"""What each test gave first."""


def gradient_of(function, x: Tensor, d_output: Tensor) -> Tensor:
    """float64"""
    x = x.double().requires_grad_()
    return torch.autograd.grad(function(x), x, d_output.double())[0]


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_norms(width, same):
    """Of rows of one number, whose norms have no gradient but rounding, there are none."""
    x, weight, d_normed, added = (numbers(MANY, width), numbers(width), numbers(width, MANY).t(), numbers(MANY, width))
    d_normed = d_normed.contiguous()
    normed = rms_norm(x, weight, 1e-6)
    got = rms_norm_backward(x, weight, 1e-6, d_normed, added)
    expected = gradient_of(lambda x: torch.nn.functional.rms_norm(x, (width,), weight.double(), 1e-6), x, d_normed)
    assert_near(got, expected + added.double(), 3e-6)
    assert_near(rms_norm_backward(x, weight, 1e-6, d_normed, None), expected, 3e-6)
    same(normed, got)
    for rows in PARTS:
        assert torch.equal(rms_norm(x[rows], weight, 1e-6), normed[rows])
        assert torch.equal(rms_norm_backward(x[rows], weight, 1e-6, d_normed[rows], added[rows]), got[rows])


@pytest.mark.parametrize("width", WIDTHS)
def test_gates(width, same):
    gate_up, d_activated = numbers(MANY, 2 * width, scale=10.0), numbers(MANY, width)
    activated, got = gated(gate_up), gate_up.clone()
    gated_backward(got, d_activated)
    same(activated, got)
    assert_near(got, gradient_of(lambda x: silu(x[:, :width]) * x[:, width:], gate_up, d_activated), 3e-6)
    for rows in PARTS:
        own = gate_up[rows].clone()
        gated_backward(own, d_activated[rows])
        assert torch.equal(own, got[rows])
        assert torch.equal(gated(gate_up[rows]), activated[rows])


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("half", [4, 16, 20])
def test_rotations(half, normed, same):
    """Of four heads of queries and two of keys, and two of values that stay; their gradients lie head by head."""
    weight, size = numbers(6, 2 * half) if normed else None, 2 * half
    projected, angles = numbers(MANY, 8 * size), numbers(MANY, half)
    cos, sin = angles.cos(), angles.sin()

    def whole(projected: Tensor) -> Tensor:
        heads = projected.view(-1, 8, size)
        x = heads[:, :6]
        if normed:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        first, second = x.chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
        return torch.cat([turned, heads[:, 6:]], dim=1)

    d_heads = numbers(8, MANY, size).transpose(0, 1)
    parts = d_heads.split([4, 2, 2], dim=1)
    got = rotated_backward(projected, weight, 1e-6, cos, sin, parts)
    assert_near(got, gradient_of(whole, projected, d_heads), 3e-6)
    forward = rotated(projected, weight, 1e-6, 6, cos, sin)
    same(forward, got)
    for rows in PARTS:
        own = tuple(part[rows] for part in parts)
        assert torch.equal(rotated_backward(projected[rows], weight, 1e-6, cos[rows], sin[rows], own), got[rows])
        assert torch.equal(rotated(projected[rows], weight, 1e-6, 6, cos[rows], sin[rows]), forward[rows])


@pytest.mark.parametrize("vocab", [3, 16, 100, 4096, 5001])
def test_softmax(vocab, same):
    logits, factors = numbers(7, vocab, scale=30.0), numbers(7)
    got = logits.clone()
    log_softmax(got)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=2e-7)
    times = got.clone()
    softmax_times(times, factors)
    assert_near(times, expected.exp() * factors.double()[:, None], 1e-5)
    same(got, times)
    alone = logits[2:3].clone()
    log_softmax(alone)
    assert torch.equal(alone[0], got[2])


def test_softmax_of_what_is_not_finite(same):
    logits = numbers(4, 40)
    logits[0, 3], logits[1, 4], logits[2, 39] = -torch.inf, torch.nan, torch.inf
    expected = logits.log_softmax(-1)
    log_softmax(logits)
    torch.testing.assert_close(logits, expected, equal_nan=True)
    same(logits.nan_to_num())


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 16), (2, 1, 80)])
def test_causal_attention(heads, kv_heads, size, same):
    """Whatever sequences are beside it, and a query whatever comes after it."""
    lengths, scaling = [1, 2, 65, 30, 130], 0.3
    rows = sum(lengths)
    query, d_output = numbers(rows, heads + 1, size)[:, :heads], numbers(rows, heads, size)
    key, value = numbers(rows, kv_heads, size, scale=1.5), numbers(kv_heads, rows, size).transpose(0, 1)
    output, sums = causal_attention(query, key, value, lengths, scaling)
    gradients = causal_attention_backward(query, key, value, output, sums, d_output, lengths, scaling)
    same(output, sums, *gradients)

    inputs = [each.double().requires_grad_() for each in (query, key, value)]
    expected = torch.cat(
        [
            scaled_dot_product_attention(
                *(each.transpose(0, 1) for each in parts), is_causal=True, scale=scaling, enable_gqa=True
            ).transpose(0, 1)
            for parts in zip(*(each.split(lengths) for each in inputs), strict=True)
        ]
    )
    assert_near(output, expected.detach(), 3e-6)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs, d_output.double()), strict=True):
        assert_near(got, wanted, 5e-6)

    last = slice(rows - 130, rows)
    own = [each[last] for each in (query, key, value)]
    alone, sums_alone = causal_attention(*own, [130], scaling)
    assert torch.equal(alone, output[last]) and torch.equal(sums_alone, sums[last])
    again = causal_attention_backward(*own, alone, sums_alone, d_output[last], [130], scaling)
    assert all(torch.equal(one, other[last]) for one, other in zip(again, gradients, strict=True))
    cut, _ = causal_attention(*(each[:71] for each in own), [71], scaling)
    assert torch.equal(cut, alone[:71])


def test_gradients_of_great_scores():
    """The backward pass has the forward pass's scores to the bit: else a query's weights would not add up to one."""
    query, key, value, d_output = (3 * numbers(300, 8, 64)).split(2, dim=1)
    output, sums = causal_attention(query, key, value, [300], 0.125)
    gradients = causal_attention_backward(query, key, value, output, sums, d_output, [300], 0.125)
    inputs = [each.double().requires_grad_() for each in (query, key, value)]
    expected = scaled_dot_product_attention(*(each.transpose(0, 1) for each in inputs), is_causal=True, scale=0.125)
    wanted = torch.autograd.grad(expected.transpose(0, 1), inputs, d_output.double())
    for got, exact in zip(gradients, wanted, strict=True):
        assert_near(got, exact, 2e-6)


def _adapters(width: int, sizes: list[int]) -> tuple[list[AdapterRows], list[list[tuple[int, int]]]]:
    """Three adapters of different ranks, whose rows do not lie back to back; the third wants no gradient. And the
    (first row, rows) of each one's datums."""
    segments, datums = [], []
    start = 2
    for rank, runs in {16: [(5, 2), (40, 1)], 5: [(33, 3)], 1: [(6, 1)]}.items():
        count = len(sizes)
        flat = numbers(rank * (count * width + sum(sizes)))
        gradient = None if rank == 1 else torch.zeros_like(flat) + 0.25
        places, column, offset = [], 0, count * rank * width
        for size in sizes:
            places.append([column, size, offset])
            column, offset = column + size, offset + rank * size
        rows = sum(length * many for length, many in runs)
        a, to = (None if whole is None else whole[: count * rank * width].view(-1, width) for whole in (flat, gradient))
        table = torch.tensor(runs)
        segments.append(AdapterRows(start, rows, a, torch.tensor(places), 0.5, to, table))
        firsts, first = [], start
        for length, many in runs:
            for _ in range(many):
                firsts.append((first, length))
                first += length
        datums.append(firsts)
        start += rows + 3
    return segments, datums


def _matrices(segment: AdapterRows, of: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """A [r, in] and B [out, r] of each layer, from where they or their gradients lie."""
    rank = len(of) // len(sizes)
    flat = torch.as_strided(of, (of.untyped_storage().nbytes() // 4,), (1,))
    bs = [flat[at : at + rank * size].view(rank, size).t() for _, size, at in segment.places.tolist()]
    return list(of.split(rank)), bs


@pytest.mark.parametrize("sizes", [[32, 19, 70], [130]], ids=str)
@pytest.mark.parametrize("width", [8, 40, 256])
def test_low_rank(width, sizes, same):
    segments, datums = _adapters(width, sizes)
    rows = segments[-1].start + segments[-1].rows + 1
    x, d_output = numbers(rows, width), numbers(rows, sum(sizes))
    output, d_input = numbers(rows, sum(sizes)), numbers(rows, width, scale=2.0)
    expected, d_expected = output.double(), d_input.double()
    work = LowRank(segments)
    got, d_got = output.clone(), d_input.clone()
    low = work.forward(x, got)
    work.backward(x, low, d_output, d_got)
    same(low, got, d_got, *(segment.gradient for segment in segments if segment.gradient is not None))

    for segment in segments:
        own = slice(segment.start, segment.start + segment.rows)
        as_, bs = _matrices(segment, segment.a, sizes)
        gradients = None if segment.gradient is None else _matrices(segment, segment.gradient, sizes)
        column = 0
        for layer, size in enumerate(sizes):
            a, b, d_out = as_[layer].double(), bs[layer].double(), d_output[own, column : column + size].double()
            expected[own, column : column + size] += 0.5 * x[own].double() @ a.t() @ b.t()
            d_expected[own] += 0.5 * d_out @ b @ a
            if gradients is not None:
                assert_near(gradients[0][layer], 0.25 + 0.5 * (d_out @ b).t() @ x[own].double(), 3e-6)
                assert_near(gradients[1][layer], 0.25 + 0.5 * d_out.t() @ (x[own].double() @ a.t()), 3e-6)
            column += size
    assert_near(got, expected, 3e-6)
    assert_near(d_got, d_expected, 3e-6)

    # One adapter's rows alone, somewhere else, and of its datums the last one in an operation's next micro-batch.
    segment, firsts = segments[0], datums[0]
    whole = torch.as_strided(segment.gradient, (segment.gradient.untyped_storage().nbytes() // 4,), (1,))
    before = whole.clone()
    whole.fill_(0.25)
    first, last = firsts[0][0], firsts[-1][0]
    for begin, end, runs in (
        (first, last, segment.datums[:1]),
        (last, segment.start + segment.rows, segment.datums[1:]),
    ):
        alone = LowRank([segment._replace(start=0, rows=end - begin, datums=runs.contiguous())])
        out, d_in = output[begin:end].clone(), d_input[begin:end].clone()
        alone.backward(x[begin:end], alone.forward(x[begin:end], out), d_output[begin:end], d_in)
        assert torch.equal(out, got[begin:end]) and torch.equal(d_in, d_got[begin:end])
    assert torch.equal(whole, before)
