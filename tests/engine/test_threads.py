"""Which number of threads a pass gets, from what passes have taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkercloud.engine.operations import Datum, ForwardBackward
from tinkercloud.engine.torch.objectives import objective_of
from tinkercloud.engine.torch.packing import tiles_of
from tinkercloud.engine.torch.threads import LAST_INTERVAL, MEMORY, ThreadChoice, _Race


def _passes(race: _Race, seconds: dict[int, float], count: int, cores: float = 2.0) -> list[int]:
    """The choices of so many passes, which take `seconds` by their number of threads, all of which get `cores`."""
    chosen = []
    for _ in range(count):
        chosen.append(race.next())
        race.took(chosen[-1], seconds[chosen[-1]], cores)
    return chosen


def test_the_faster_one_is_chosen_and_the_other_tried_now_and_then():
    race = _Race(4)
    assert set(_passes(race, {1: 2e-3, 4: 1e-3}, 10)) == {1, 4}
    later = _passes(race, {1: 2e-3, 4: 1e-3}, 4 * LAST_INTERVAL)
    assert 0 < later.count(1) < 12


def test_a_machine_that_becomes_busy_changes_the_choice_and_back():
    race = _Race(4)
    _passes(race, {1: 2e-3, 4: 1e-3}, 3 * LAST_INTERVAL)
    assert _passes(race, {1: 2e-3, 4: 9e-3}, 20)[-1] == 1
    assert _passes(race, {1: 2e-3, 4: 1e-3}, 4 * LAST_INTERVAL)[-1] == 4


def test_a_wrong_choice_is_found_out_by_the_first_try():
    race = _Race(4)
    _passes(race, {1: 2e-3, 4: 9e-3}, 4 * LAST_INTERVAL)
    chosen = _passes(race, {1: 2e-3, 4: 1e-3}, LAST_INTERVAL + MEMORY)
    assert chosen[-1] == 4
    assert chosen[chosen.index(4) :].count(1) == 0


def test_cores_are_left_alone_for_a_small_gain():
    assert _passes(_Race(4), {1: 1.05e-3, 4: 1e-3}, 30).count(4) < 10


def test_long_passes_have_all_threads():
    assert set(_passes(_Race(4), {1: 0.1, 4: 0.2}, 50)) == {4}


def test_long_passes_whose_threads_starve_have_the_faster_choice_until_there_are_cores_again():
    race = _Race(4)
    busy, idle = {1: 0.3, 4: 0.7}, {1: 0.3, 4: 0.1}
    assert _passes(race, busy, 40, cores=0.7)[-20:].count(1) >= 18
    assert set(_passes(race, idle, 100, cores=3.5)[-20:]) == {4}
    assert _passes(race, busy, 40, cores=0.7)[-20:].count(1) >= 18
    assert _passes(_Race(4), {1: 0.3, 4: 0.2}, 50, cores=0.9)[-20:].count(4) >= 18, "they may be worth it all the same"


def test_one_interruption_changes_nothing():
    race = _Race(4)
    _passes(race, {1: 2e-3, 4: 1e-3}, 20)
    race.took(4, 1.0, 2.0)
    assert race.next() == 4


def test_kinds_are_measured_by_themselves_and_threads_set():
    choice = ThreadChoice(2)
    before, seen = torch.get_num_threads(), set()
    for kind in ("small", "large"):
        for _ in range(12):
            with choice.timed(kind):
                seen.add((kind, torch.get_num_threads()))
    torch.set_num_threads(before)
    assert seen == {("small", 1), ("small", 2), ("large", 1), ("large", 2)}


@pytest.mark.parametrize("seed", range(8))
def test_what_a_batch_sums_to_depends_on_no_number_of_threads(seed):
    """More than 32768 numbers in one tensor are summed by all threads, each its share."""
    random = np.random.default_rng(seed)

    def values(scale: float) -> np.ndarray:
        return random.normal(0, scale, 100).astype(np.float32)

    data = tuple(
        Datum(
            np.zeros(100, np.int32),
            {
                "target_tokens": np.zeros(100, np.int64),
                "logprobs": -abs(values(1)),
                "advantages": values(np.exp(random.uniform(-14, 0))),
            },
        )
        for _ in range(400)
    )
    objective = objective_of(ForwardBackward("m", data, "importance_sampling"))
    tiles = tiles_of(data, 100_000, objective.input_names)
    logprobs = torch.from_numpy(-abs(random.normal(0, 1, 40_000))).float()
    summaries = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            summaries.append(objective.summary(tiles, logprobs, None))
    finally:
        torch.set_num_threads(before)
    assert summaries[1][0] == summaries[2][0] == summaries[0][0]
    assert summaries[1].metrics == summaries[2].metrics == summaries[0].metrics
