"""The losses and their derivatives written out by hand, one target at a time, in Python's own floats."""

from __future__ import annotations

from math import exp

import numpy as np

from tinkercloud.engine.types import Datum

Row = dict[str, float]
"""One target: lp, q, A, w and mask."""


def ratio_of(difference: float) -> tuple[float, bool]:
    """(ratio, whether it has a gradient)"""
    return exp(min(difference, 40.0)), difference <= 40.0


def clipped(ratio: float, moves: bool, advantage: float, config) -> tuple[float, float]:
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    bounded = min(max(ratio, low), high)
    loss = -min(ratio * advantage, bounded * advantage)
    free = ratio <= high if advantage > 0 else ratio >= low
    return loss, -ratio * advantage if free and moves else 0.0


def loss_and_slope(name: str, row: Row, sequence: list[Row], config) -> tuple[float, float]:
    """(loss, its derivative by the log-probability) of one target of a sequence."""
    lp, q, advantage = row["lp"], row["q"], row["A"]
    ratio, moves = ratio_of(lp - q)
    match name:
        case "cross_entropy":
            return -row["w"] * lp, -row["w"]
        case "importance_sampling":
            return -ratio * advantage, -ratio * advantage if moves else 0.0
        case "ppo":
            return clipped(ratio, moves, advantage, config)
        case "cispo":
            weight = min(max(ratio, config["clip_low_threshold"]), config["clip_high_threshold"]) * advantage
            return -weight * lp, -weight
        case "dro":
            beta = config["beta"]
            return -(lp * advantage - beta / 2 * (lp - q) ** 2), -(advantage - beta * (lp - q))
        case "gspo":
            marked = [other["lp"] - other["q"] for other in sequence if other["mask"]]
            return clipped(ratio_of(sum(marked) / len(marked))[0] if marked else 1.0, True, advantage, config)
    raise KeyError(name)


def rows_of(datum: Datum, logprobs: np.ndarray) -> list[Row]:
    """A datum's targets, flat."""
    columns = {"weights": "w", "logprobs": "q", "advantages": "A", "sequence_ratio_mask": "mask"}
    values = {key: datum.inputs[name].ravel() for name, key in columns.items() if name in datum.inputs}
    rows = [{key: float(column[i]) for key, column in values.items()} for i in range(logprobs.size)]
    return [{"q": 0.0, "A": 0.0} | row | {"lp": float(lp)} for row, lp in zip(rows, logprobs.ravel(), strict=True)]
