"""Whether what was drawn is spread as it should be."""

from __future__ import annotations

import math

import numpy as np


def fits(observed: np.ndarray, expected: np.ndarray, least: float = 5) -> bool:
    """Pearson's chi-square test of counts, at five standard deviations. What is expected less than `least` times is
    counted together."""
    rare = expected < least
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(len(expected) - 1, 1)
    # Wilson-Hilferty: the cube root is nearly normal.
    return statistic < freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
