"""How many CPU threads a short pass runs on: one, or all, whichever has lately been faster for passes of its size.

A second thread halves a product, but must be woken for each, and waits for the first wherever something else has its
core. Which is worth more depends on the size of the pass, on the machine, and on what else the machine is doing, so it
is measured as it goes. In float32 no bit of a pass depends on it; sums over whole tensors do, and are made where the
number of threads is always the same, or exactly.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

MEMORY = 5
"""Readings of each choice that are remembered; their median counts, so that one interruption does not."""

GAIN = 1.1
"""How many times as fast all threads must be: they take the cores from whatever else would run there."""

LONG = 0.02
"""Seconds with all threads from which on a pass always has them, unless they are starved: a try of one thread costs."""

STARVED = 1.0
"""Cores' worth of time that all threads got together, below which they keep each other waiting for cores that something
else has. One thread would take no longer than that time, if it gets one core."""

FIRST_INTERVAL, LAST_INTERVAL = 16, 256
"""Passes between two tries of the choice that was slower; doubled each time that it still is. A try that was the faster
one is repeated at once, so that a wrong choice lasts for one interval and not for as many as there are readings."""


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for what is done inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadChoice:
    """See the module's docstring. Passes of one `kind` are alike."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kinds: dict[Hashable, _Race] = {}

    @contextmanager
    def timed(self, kind: Hashable, is_alone: bool = False) -> Iterator[None]:
        """Set the number of threads for what is done inside, and remember how long it took. `is_alone`: always one."""
        if self.most == 1 or is_alone:
            torch.set_num_threads(1)
            yield
            return
        race = self._kinds.setdefault(kind, _Race(self.most))
        threads = race.next()
        torch.set_num_threads(threads)
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - started
        race.took(threads, seconds, (time.process_time() - cpu_started) / seconds)


class _Race:
    """The last seconds that a pass took with all threads, and with one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seconds: dict[int, deque[float]] = {most: deque(maxlen=MEMORY), 1: deque(maxlen=MEMORY)}
        self._cores: deque[float] = deque(maxlen=MEMORY)
        self._interval = self._left = FIRST_INTERVAL

    def next(self) -> int:
        """How many threads the next pass should have."""
        is_long = self._seconds[self._most] and median(self._seconds[self._most]) > LONG
        if is_long and median(self._cores) >= STARVED:
            return self._most
        unsure = min(self._seconds, key=lambda choice: len(self._seconds[choice]))
        if len(self._seconds[unsure]) < MEMORY:
            return unsure
        best, other = (self._most, 1) if self._all_are_faster() else (1, self._most)
        self._left -= 1
        if self._left > 0:
            return best
        self._interval = self._left = FIRST_INTERVAL if is_long else min(2 * self._interval, LAST_INTERVAL)
        return other

    def took(self, threads: int, seconds: float, cores: float) -> None:
        """Note a reading, `cores` being the processor's seconds in a second of it. One that changes which choice is
        ahead makes the next try come soon."""
        known = all(len(readings) == MEMORY for readings in self._seconds.values())
        before = known and self._all_are_faster()
        self._seconds[threads].append(seconds)
        if threads == self._most:
            self._cores.append(cores)
        if not known:
            return
        if self._all_are_faster() != before:
            self._interval = self._left = FIRST_INTERVAL
        elif threads != (self._most if before else 1) and self._speaks_against(threads, seconds):
            self._left = 1

    def _speaks_against(self, threads: int, seconds: float) -> bool:
        """Whether this reading of the choice that is behind would put it ahead if all its readings were like it."""
        if threads == 1:
            return seconds * GAIN <= median(self._seconds[self._most])
        return seconds * GAIN < median(self._seconds[1])

    def _all_are_faster(self) -> bool:
        return median(self._seconds[self._most]) * GAIN < median(self._seconds[1])
