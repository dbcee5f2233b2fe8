"""Products whose rows have the same bits however many rows and threads there are."""

from __future__ import annotations

import pytest
import torch

from tinkercloud.engine.torch.products import add_product, product

ROWS = [*range(1, 18), 24, 31, 40, 72, 129]


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("inner", [4, 24, 200])
@pytest.mark.parametrize("columns", [1, 2, 4, 8, 12, 16, 20, 24, 32, 64, 200])
def test_a_row_has_its_bits_among_any_others_and_on_any_threads(threads, inner, columns):
    generator = torch.Generator().manual_seed(inner * columns)
    left, right, total = (
        torch.randn(*shape, generator=generator) for shape in [(256, inner), (columns, inner), (256, columns)]
    )
    threads(1)
    expected, added = product(left, right.t()), total.clone()
    add_product(added, left, right.t(), 0.3)
    assert torch.allclose(expected, left @ right.t(), atol=1e-5)
    assert torch.allclose(added, total + 0.3 * expected, atol=1e-5)
    for count in (1, 2, 4, 16):
        threads(count)
        for rows in ROWS:
            assert torch.equal(product(left[:rows], right.t()), expected[:rows]), (count, rows)
            if columns > 1:
                sum_of = total[:rows].clone()
                add_product(sum_of, left[:rows], right.t(), 0.3)
                assert torch.equal(sum_of, added[:rows]), (count, rows)
        assert torch.get_num_threads() == count
