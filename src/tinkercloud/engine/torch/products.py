"""Matrix products on the CPU each row of which has the same bits however many rows and threads there are.

MKL's strict mode (see `tinkercloud.engine.torch`) promises that for Intel's processors. Elsewhere it falls back to a
mode of its own, which keeps the promise but for two kinds of products (measured in float32 on an AMD EPYC with MKL
2024.2, up to 16 threads): those of fewer than 4 rows (with a single column: those whose rows are no multiple of 4),
and those whose rows and columns are both so few that a thread's share is narrower than a kernel. So the first are
filled up with rows of zeros, and the second have one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST_ROWS = 4
"""Products of fewer rows are filled up."""

BATCHED_ROWS = 16
"""A multiple to which the rows of batched products are filled up: those of fewer use other kernels."""

NARROW = 12
"""Columns (or rows) of a thread's share, up to which the bits of a product may depend on the number of threads."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [n, k] @ [k, m], of few columns, such as x A^T."""
    rows, columns = len(left), right.shape[1]
    if not left.is_cpu:
        return left @ right
    if rows < LEAST_ROWS or columns == 1:
        left = filled(left, -rows % LEAST_ROWS)
    output = _run(rows, columns, lambda: left @ right)
    return output if len(output) == rows else output[:rows]


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total [n, m] += scale * left @ right, [n, k] @ [k, m] with m > 1, such as (x A^T) B^T."""
    rows, columns = total.shape
    if not left.is_cpu:
        total.addmm_(left, right, alpha=scale)
        return
    missing = LEAST_ROWS - rows
    whole = total if missing <= 0 else filled(total, missing)
    _run(rows, columns, lambda: whole.addmm_(filled(left, missing), right, alpha=scale))
    if whole is not total:
        total.copy_(whole[:rows])


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [b, n, k] @ [b, k, m]: with one thread, and rows filled up to `BATCHED_ROWS`."""
    if not left.is_cpu:
        return left @ right
    rows = left.shape[1]
    left = pad(left, (0, 0, 0, -rows % BATCHED_ROWS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (left @ right)[:, :rows]
    finally:
        torch.set_num_threads(threads)


def add_products_of(total: Tensor, lefts: Tensor, rights: Tensor, scale: float) -> None:
    """total [m, n] += scale * the sum of lefts @ rights, [b, m, k] @ [b, k, n], one after the other."""
    _run(*total.shape, lambda: total.addbmm_(lefts, rights, alpha=scale))


def filled(rows: Tensor, missing: int) -> Tensor:
    """Rows [n, k] with `missing` rows of zeros behind them."""
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing > 0 else rows


def is_narrow(rows: int, columns: int, threads: int) -> bool:
    """Whether a product of this size should have one thread and not `threads`."""
    return max(rows, columns) <= NARROW * threads


def _run(rows: int, columns: int, work: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    if threads == 1 or not is_narrow(rows, columns, threads):
        return work()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)
