"""How much the fuzzers try: in the suite a little, the same each time; by `make fuzz` more, and others each time.

A fuzzer is a file whose name is test_*fuzz.py.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
"""Times the examples of the suite."""


def fuzzing(examples: int) -> settings:
    """The settings of a fuzzer that tries so many examples in the suite."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
