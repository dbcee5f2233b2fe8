"""Kernels against the same in float64, and their promise: a row's bits do not depend on the other rows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinkercloud.engine.torch.kernels import rows as kernels_of_rows
from tinkercloud.engine.torch.kernels.compiled import SOURCES
from tinkercloud.engine.torch.kernels.draws import drawn
from tinkercloud.engine.torch.kernels.lora import add_low_rank
from tinkercloud.engine.torch.kernels.paged import attended, write
from tinkercloud.engine.torch.kernels.products import WIDTH_BLOCK, weight_product
from tinkercloud.engine.torch.kernels.rows import gated, rms_norm, rotated
from tinkercloud.engine.torch.sampling import _drawn
from tinkercloud.engine.torch.sources import digest_of

ROWS = 7
WIDTHS = [1, 15, 16, 40, 256]


def numbers(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.fixture
def threads():
    """Sets how many torch has, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width):
    x, weight = numbers(ROWS, width), numbers(width)
    normed = rms_norm(x, weight, 1e-6)
    assert_near(normed, torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6))
    assert torch.equal(rms_norm(x[2:4], weight, 1e-6), normed[2:4])


@pytest.mark.parametrize("width", WIDTHS)
def test_gated(width):
    gate_up = numbers(ROWS, 2 * width, scale=30.0)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_near(gated(gate_up), torch.nn.functional.silu(gate) * up)
    assert torch.equal(gated(gate_up[3:4]), gated(gate_up)[3:4])


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("half", [4, 16, 20])
def test_rotated(half, normed):
    heads, weight = 3, numbers(3, 2 * half) if normed else None
    projected, angles = numbers(ROWS, (heads + 2) * 2 * half), numbers(ROWS, half)
    cos, sin = angles.cos(), angles.sin()
    x = projected.double().view(ROWS, heads + 2, 2 * half)[:, :heads]
    if normed:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    first, second = x.chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    got = rotated(projected, weight, 1e-6, heads, cos, sin)
    assert_near(got, torch.cat([first * c - second * s, second * c + first * s], dim=-1))
    assert torch.equal(rotated(projected[5:], weight, 1e-6, heads, cos[5:], sin[5:]), got[5:])


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_add_low_rank(width, rank):
    """Two layers side by side, of which the second one's columns are not whole vectors."""
    sizes, x = [32, 19], numbers(ROWS, width)
    flat = numbers(2 * rank * width + rank * sum(sizes))
    a, *bs = flat.split([2 * rank * width, *(rank * size for size in sizes)])
    a, bs = a.view(-1, width), [b.view(rank, -1) for b in bs]
    places = torch.tensor([[0, 32, a.numel()], [32, 19, a.numel() + bs[0].numel()]])
    before = numbers(ROWS, sum(sizes))
    parts = [x.double() @ own.double().t() @ b.double() for own, b in zip(a.split(rank), bs, strict=True)]
    got = before.clone()
    add_low_rank(x, a, places, 0.5, got)
    assert_near(got, before.double() + 0.5 * torch.cat(parts, dim=1))
    for rows in (slice(0, 1), slice(2, 7), slice(4, 6)):
        own = before[rows].clone()
        add_low_rank(x[rows], a, places, 0.5, own)
        assert torch.equal(own, got[rows])


def _attended(owners: list[int], positions: list[int], heads: int = 6, **options) -> Tensor:
    """Of a cache that six sequences share, in scattered pages: heads of other sizes for keys and values."""
    kv_heads, key_dim, value_dim, pages = 2, 24, 40, 9
    memory = torch.full((6 * pages, 16, kv_heads, key_dim + value_dim), math.nan)
    tables = torch.randperm(6 * pages, generator=torch.Generator().manual_seed(0)).view(6, pages)
    for sequence in range(6):
        slots = (tables[sequence, :, None] * 16 + torch.arange(16)).flatten()
        write(memory, slots, numbers(9 * 16, kv_heads, key_dim) + sequence, numbers(9 * 16, kv_heads, value_dim))
    queries = numbers(6, 9 * 16, heads + kv_heads, key_dim)[owners, positions, :heads]
    output = torch.zeros(len(owners), heads, value_dim)
    defaults = {"scaling": 0.2, "sliding_window": None, "softcap": None, "sinks": None}
    attended(queries, memory, torch.tensor(owners), tables, torch.tensor(positions), output, **{**defaults, **options})
    return output


@pytest.mark.parametrize("heads", [2, 6, 10])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}, {"sliding_window": 19}], ids=str)
def test_attended_rows_do_not_depend_on_each_other(heads, options, threads):
    """Neither single ones of several sequences, nor neighbours, which go through their keys together."""
    threads(2)
    owners, positions = [0, 1, 2, 3, 4, 5] + [2] * 12, [143, 0, 17, 15, 16, 99, *range(12)]
    together = _attended(owners, positions, heads, **options)
    assert together.isfinite().all()
    for rows in ([2, 5], [1], list(range(7, 15)), [8, 9], [17]):
        alone = _attended([owners[row] for row in rows], [positions[row] for row in rows], heads, **options)
        assert torch.equal(alone, together[rows])
    assert torch.equal(together[1], numbers(9 * 16, 2, 40)[0].repeat_interleave(heads // 2, dim=0))


@pytest.mark.parametrize("form", [drawn, _drawn], ids=["kernel", "torch"])
@pytest.mark.parametrize("vocab", [3, 16, 64, 100, 4096])
def test_drawn(vocab, form):
    temperatures, uniforms = torch.tensor([1.0, 0.5, 0.0, 2.0]), torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53]).double()
    logits = numbers(4, vocab, scale=3.0)
    own = logits.clone()
    tokens, normalizers = form(own, temperatures, uniforms)
    tempered = logits.double() / torch.tensor([1.0, 0.5, 1.0, 2.0])[:, None]
    assert_near((own - normalizers), tempered.log_softmax(-1), 1e-7)
    cumulative = tempered.softmax(-1).cumsum(-1)
    for row in (0, 1, 3):
        low = cumulative[row, tokens[row] - 1] if tokens[row] else 0.0
        assert low - 1e-7 <= uniforms[row] <= cumulative[row, tokens[row]] + 1e-7
    assert tokens[2] == logits[2].argmax()
    alone = logits[1:2].clone()
    token, _ = form(alone, temperatures[1:2], uniforms[1:2])
    assert token == tokens[1] and torch.equal(alone[0], own[1])


@pytest.mark.parametrize("width", [*WIDTHS, WIDTH_BLOCK, 2 * WIDTH_BLOCK + 40])
@pytest.mark.parametrize("columns", [1, 4, 30, 65, 130, 1030])
def test_product(width, columns, threads):
    """Also in parts, and whichever thread takes them."""
    x, weight = numbers(39, width), numbers(columns, width)
    threads(1)
    got = weight_product(x, weight)
    for count in (2, 4):
        threads(count)
        assert torch.equal(weight_product(x, weight), got)
    assert_near(got, x.double() @ weight.double().t())
    for rows in (slice(0, 1), slice(2, 39), slice(32, 37)):
        assert torch.equal(weight_product(x[rows], weight), got[rows])


def test_what_is_laid_out_otherwise_is_refused():
    x, weight = numbers(16, ROWS).t(), numbers(4, 16)
    with pytest.raises(AssertionError):
        weight_product(x, weight)
    with pytest.raises(AssertionError):
        gated(x)


def test_a_change_in_any_kernel_is_compiled(tmp_path):
    """What one kernel inlines is in the file of another, and numba looks at its own file alone."""
    folder = shutil.copytree(Path(kernels_of_rows.__file__).parent, tmp_path / "kernels")
    assert digest_of(folder) == SOURCES
    with (folder / "vectors.py").open("a") as file:
        file.write("# changed")
    assert digest_of(folder) != SOURCES
    assert SOURCES in kernels_of_rows._rms_norm._cache._impl.filename_base
