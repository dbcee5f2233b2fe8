"""Repeated readings of a quantity, alone or in pairs with a competitor's, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal


@dataclass(frozen=True)
class Readings:
    """`ours[i]` and `theirs[i]` were taken one right after the other; `theirs` is empty where nothing is compared."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """theirs / ours of each pair: how many times as fast we are, if the readings are seconds."""
        return tuple(their / our for our, their in zip(self.ours, self.theirs, strict=True)) if self.theirs else ()


def spread(values: tuple[float, ...]) -> float:
    """Distance between the quartiles as a fraction of the median: how much one reading says."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / median(values)


def interleaved(ours: Callable[[], float], theirs: Callable[[], float], repeat: int, warm_up: int = 1) -> Readings:
    """Take `repeat` pairs of readings after `warm_up` pairs that do not count.

    Who goes first alternates, so that neither a drift of the machine nor the order favours one side.
    """
    pairs: list[tuple[float, float]] = []
    for turn in range(warm_up + repeat):
        if turn % 2:
            their = theirs()
            pairs.append((ours(), their))
        else:
            our = ours()
            pairs.append((our, theirs()))
    kept = pairs[warm_up:]
    return Readings(tuple(our for our, _ in kept), tuple(their for _, their in kept))


Quantity = Literal["speed", "slowdown", "seconds", "bytes"]


@dataclass(frozen=True)
class Goal:
    """What a measurement should come to.

    speed: theirs / ours, at least; slowdown: ours / theirs, at most; seconds and bytes: ours, at most.
    """

    quantity: Quantity
    limit: float

    @property
    def is_ratio(self) -> bool:
        return self.quantity in ("speed", "slowdown")

    def judged(self, readings: Readings) -> tuple[float, ...]:
        """The values that the goal is about, one a repetition."""
        match self.quantity:
            case "speed":
                return readings.ratios
            case "slowdown":
                return tuple(1 / ratio for ratio in readings.ratios)
            case _:
                return readings.ours

    def met(self, readings: Readings) -> bool:
        """Whether the median is within the limit."""
        value = median(self.judged(readings))
        return value >= self.limit if self.quantity == "speed" else value <= self.limit
