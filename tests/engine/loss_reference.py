"""The losses and their derivatives written out by hand, one target at a time, in Python's own floats."""

from __future__ import annotations

from math import exp, log

import numpy as np

from tinkercloud.engine.operations import Datum

Row = dict[str, float]
"""One target: lp, q, A, w, mask, p (the sampler's at temperature 1) and S (sampled)."""

COLUMNS = {
    "weights": "w",
    "logprobs": "q",
    "advantages": "A",
    "sequence_ratio_mask": "mask",
    "policy_logprobs": "p",
    "sampled": "S",
}
"""The loss inputs, by what a row calls them."""


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
        case "stable_reinforce":
            return stable_reinforce(row, config) if row["S"] else (0.0, 0.0)
    raise KeyError(name)


def capped(difference: float, bound: float) -> float:
    """A ratio cut off at a bound."""
    return bound if difference > log(bound) else exp(difference)


def stable_reinforce(row: Row, config) -> tuple[float, float]:
    lp, drawn, policy, advantage = row["lp"], row["q"], row["p"], row["A"]
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    ratio = ratio_of(lp - policy)[0]
    has_left = ratio > high if advantage > 0 else ratio < low if advantage < 0 else False
    weight = 0.0 if has_left else capped(lp - drawn, high)
    if lp - policy > log(high):
        divergence = high - 1 - log(high) + (high - 1) * (lp - policy - log(high))
        slope = high - 1
    else:
        divergence, slope = ratio - 1 - (lp - policy), ratio - 1
    strength = config["kl_coeff"] * capped(policy - drawn, high)
    return -weight * lp * advantage + strength * divergence, -weight * advantage + strength * slope


def rows_of(datum: Datum, logprobs: np.ndarray) -> list[Row]:
    """A datum's targets, flat."""
    values = {key: datum.inputs[name].ravel() for name, key in COLUMNS.items() if name in datum.inputs}
    rows = [{key: float(column[i]) for key, column in values.items()} for i in range(logprobs.size)]
    return [{"q": 0.0, "A": 0.0} | row | {"lp": float(lp)} for row, lp in zip(rows, logprobs.ravel(), strict=True)]
