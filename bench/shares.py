"""Where the time of a piece of work goes: matrix products, attention, other operators, and what is none of torch's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::addbmm_"}

Shares = dict[str, float]
"""Part of the time (0 to 1) by where it goes: products, attention, operators, kernels and python."""


def shares_of(work: Callable[[], object]) -> Shares:
    """Of work on the CPU, by torch's own profiler; what no operator accounts for is Python's, autograd's and our own
    kernels', which multiply adapters too."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            kind = "products" if event.key in PRODUCTS else "attention" if "attention" in event.key else "operators"
            spent[kind] += event.self_cpu_time_total / 1e6
    spent["kernels and python"] = max(0.0, seconds - sum(spent.values()))
    return {kind: part / seconds for kind, part in spent.most_common()}
