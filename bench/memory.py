"""Memory of processes, what they share counted once."""

from __future__ import annotations

from pathlib import Path

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


def engine_of(pid: int) -> int:
    """The engine of a server that has one base model, among the processes that its control process has started."""
    (engine,) = [each for each in tree(pid) if "tinkercloud engine" in "".join(psutil.Process(each).cmdline())]
    return engine


def tree_bytes(pid: int) -> int:
    """Of a process and all that descend from it."""
    return sum(process_bytes(each) for each in tree(pid))


class PeakMemory:
    """The most memory that a process holds from now on, above what it holds now. Linux only."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        self.resident = self._bytes("VmRSS")

    @property
    def above(self) -> int:
        """Bytes."""
        return self._bytes("VmHWM") - self.resident

    def _bytes(self, field: str) -> int:
        (line,) = [line for line in self._status.read_text().splitlines() if line.startswith(field + ":")]
        return int(line.split()[1]) * 1024
