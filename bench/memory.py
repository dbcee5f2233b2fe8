"""Memory of processes, what they share counted once."""

from __future__ import annotations

import psutil


def process_bytes(pid: int) -> int:
    """Proportional set size: each page divided by how many processes map it (`smaps_rollup`); where the system does not
    know it, the pages that are this process's alone."""
    info = psutil.Process(pid).memory_full_info()
    return getattr(info, "pss", info.uss)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    root = psutil.Process(pid)
    return [pid, *(child.pid for child in root.children(recursive=True))]


def tree_bytes(pid: int) -> int:
    """Of a process and all that descend from it."""
    return sum(process_bytes(each) for each in tree(pid))
