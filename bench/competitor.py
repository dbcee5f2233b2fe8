"""This end of a process that does the same work without the server: asking it, and finding its best settings."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.readings import Readings, interleaved

EXIT_SECONDS = 10


WAITS = ("active", "passive")
"""How OpenMP threads wait for work (OMP_WAIT_POLICY, "active" is the default). It is fixed when a process starts."""


class Competitor:
    """A program that is given tasks as JSON lines and answers each with the seconds that it took."""

    def __init__(
        self,
        module: str,
        folder: Path,
        waits: Sequence[str] = WAITS,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        """`folder` is the base model. The program runs once for each way of waiting, with `environment` besides;
        `python` is that of the environment that it needs."""
        self.chosen: dict[str, dict[str, Any]] = {}
        """The settings with which each task that was compared was fastest, by the task and its arguments."""
        self._processes = {wait: _start(python, module, folder, wait, environment or {}) for wait in waits}
        for process in self._processes.values():
            _answer(process)

    def seconds(self, task: str, *, wait: str, **arguments: Any) -> float:
        """Do a task once, in the process whose threads wait like this."""
        return self._done(task, wait, arguments)["seconds"]

    def returned(self, task: str, *, wait: str, **arguments: Any) -> Any:
        """Do a task once; what it says."""
        return self._done(task, wait, arguments)["returned"]

    def pid(self, wait: str) -> int:
        """Of the process whose threads wait like this."""
        return self._processes[wait].pid

    def _done(self, task: str, wait: str, arguments: dict[str, Any]) -> dict[str, Any]:
        process = self._processes[wait]
        process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        process.stdin.flush()
        return _answer(process)

    def compared(
        self,
        ours: Callable[[], float],
        task: str,
        work: dict[str, Any],
        repeat: int,
        settings: dict[str, Sequence[Any]] | None = None,
        times: int = 1,
    ) -> Readings:
        """Our readings beside the task's, with whatever combination of `settings`, threads and ways of waiting turns
        out to be the fastest. One reading is the mean of doing it so many `times`."""
        choices = {"wait": tuple(self._processes), "threads": thread_counts(), **(settings or {})}
        variants = [dict(zip(choices, choice, strict=True)) for choice in itertools.product(*choices.values())]

        def reading(variant: dict[str, Any]) -> float:
            return sum(self.seconds(task, **variant, **work) for _ in range(times)) / times

        readings = interleaved(ours, [partial(reading, variant) for variant in variants], repeat)
        self.chosen[" ".join(map(str, (task, *work.values())))] = variants[readings.variant]
        return readings

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(python: str, module: str, folder: Path, wait: str, own: Mapping[str, str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment["KINETO_LOG_LEVEL"] = "99"  # torch's profiler says on standard error when it begins and ends
    if wait != "active":
        environment["OMP_WAIT_POLICY"] = wait
    environment |= own
    return subprocess.Popen(
        [python, "-W", "ignore", "-m", module, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the competitor ended with status {process.wait()}; its error is above")
    return json.loads(line)


def thread_counts() -> list[int]:
    """1, 2, 4, ... up to the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [count for power in range(10) if (count := 2**power) <= cores]
