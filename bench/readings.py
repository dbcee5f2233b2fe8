"""Repeated readings of a quantity, alone or in pairs with a competitor's, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

FAR_BEHIND = 1.5
"""A variant whose best reading is so many times the best of all will not be the fastest one."""


@dataclass(frozen=True)
class Readings:
    """`ours[i]` and `theirs[i]` were taken one right after the other; `theirs` is empty where nothing is compared."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    variant: int = 0
    """Which of the competitor's variants `theirs` are from."""
    note: str = ""
    """What else was seen."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """theirs / ours of each pair: how many times as fast we are, if the readings are seconds."""
        return tuple(their / our for our, their in zip(self.ours, self.theirs, strict=True)) if self.theirs else ()


def spread(values: tuple[float, ...]) -> float:
    """Distance between the quartiles as a fraction of the median: how much one reading says."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / abs(median(values)) if median(values) else 0.0


def interleaved(
    ours: Callable[[], float], theirs: Sequence[Callable[[], float]], repeat: int, warm_up: int = 1
) -> Readings:
    """Take a reading of ours and of each of the competitor's variants in every round, `warm_up` rounds uncounted.

    Who goes first alternates, so that neither a drift of the machine nor the order favours one side. The competitor is
    the variant with the smallest median of all rounds: chosen beforehand, it could have been lucky in a quiet moment.
    Only a variant that is far behind after two rounds is not tried further.
    """
    our_readings: list[float] = []
    their_readings: list[list[float]] = [[] for _ in theirs]
    running = list(range(len(theirs)))

    def take_theirs() -> None:
        for variant in running:
            their_readings[variant].append(theirs[variant]())

    for turn in range(warm_up + repeat):
        if turn % 2:
            take_theirs()
        our_readings.append(ours())
        if turn % 2 == 0:
            take_theirs()
        if turn >= 1:
            best = {variant: min(their_readings[variant]) for variant in running}
            running = [variant for variant in running if best[variant] <= FAR_BEHIND * min(best.values())]
    kept = {variant: tuple(their_readings[variant][warm_up:]) for variant in running}
    fastest = min(running, key=lambda variant: median(kept[variant]))
    return Readings(tuple(our_readings[warm_up:]), kept[fastest], fastest)


Quantity = Literal["speed", "slowdown", "fewer_bytes", "seconds", "added_seconds", "bytes"]


@dataclass(frozen=True)
class Goal:
    """What a measurement should come to.

    speed: theirs / ours, at least; slowdown (of seconds) and fewer_bytes: ours / theirs, at most; added_seconds: ours -
    theirs, at most; seconds and bytes: ours, at most.
    """

    quantity: Quantity
    limit: float

    @property
    def is_ratio(self) -> bool:
        return self.quantity in ("speed", "slowdown", "fewer_bytes")

    def judged(self, readings: Readings) -> tuple[float, ...]:
        """The values that the goal is about, one a repetition."""
        match self.quantity:
            case "speed":
                return readings.ratios
            case "slowdown" | "fewer_bytes":
                return tuple(1 / ratio for ratio in readings.ratios)
            case "added_seconds":
                return tuple(our - their for our, their in zip(readings.ours, readings.theirs, strict=True))
            case _:
                return readings.ours

    def met(self, readings: Readings) -> bool:
        """Whether the median is within the limit."""
        value = median(self.judged(readings))
        return value >= self.limit if self.quantity == "speed" else value <= self.limit
