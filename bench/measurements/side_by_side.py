"""What training and sampling take from each other while both have work."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from bench.data import uniform
from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings, interleaved
from bench.stage import Stage, batch, seconds

if TYPE_CHECKING:
    import tinker

ROWS, TOKENS = 8, 256
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
FLOOD_TOKENS = {SMALL: 1024, MIDDLE: 512}
"""Tokens of each sample beside a forward_backward: it must end before them."""
BATCHES = 4
"""forward_backwards beside samples: they must end after them."""
FIRST_TOKENS = 5
"""Requests of one token in each reading, one after another, for how long a first token takes: single tokens of a sample
cannot be seen from outside."""
LIMIT = 2.2
"""Each has half of the time while both have work."""


def _sample(stage: Stage, new_tokens: int, samples: int = SAMPLES) -> list[Future[tinker.SampleResponse]]:
    import tinker

    params = tinker.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[])
    return [stage.sampler.sample(prompt, 1, params).future() for prompt in stage.new_prompts(samples, PROMPT_TOKENS)]


def _train(stage: Stage) -> Future[tinker.ForwardBackwardOutput]:
    return stage.training.forward_backward(batch(uniform(ROWS, TOKENS)), "cross_entropy").future()


def _rounds(stage: Stage, repeat: int) -> int:
    """Half as many on the larger model: each is long."""
    return repeat if stage.shape is SMALL else (repeat + 1) // 2


def _rates(readings: Readings, tokens: int) -> str:
    """Throughput beside the other and alone."""
    beside, alone = (tokens / median(side) for side in (readings.ours, readings.theirs))
    return f"{beside:,.0f} tokens/s, alone {alone:,.0f}"


def take_training(stage: Stage, repeat: int) -> Readings:
    """Seconds of a forward_backward: while many samples are drawn, and alone."""

    def alone() -> float:
        return seconds(lambda: _train(stage).result())

    def beside_samples() -> float:
        running = _sample(stage, FLOOD_TOKENS[stage.shape])
        taken = alone()
        assert not any(future.done() for future in running), "samples ended before: they must be longer"
        for future in running:
            future.result()
        return taken

    readings = interleaved(beside_samples, [alone], _rounds(stage, repeat))
    return replace(readings, note=_rates(readings, ROWS * TOKENS))


def take_sampling(stage: Stage, repeat: int) -> Readings:
    """Seconds of a batch of samples: while one forward_backward follows another, and alone."""
    first_alone: list[float] = []
    first_beside: list[float] = []

    def samples() -> float:
        return seconds(lambda: [future.result() for future in _sample(stage, NEW_TOKENS)])

    def first_tokens() -> list[float]:
        return [seconds(lambda: [future.result() for future in _sample(stage, 1, 1)]) for _ in range(FIRST_TOKENS)]

    def alone() -> float:
        taken = samples()
        first_alone.extend(first_tokens())
        return taken

    def beside_training() -> float:
        running = [_train(stage) for _ in range(BATCHES)]
        taken = samples()
        first_beside.extend(first_tokens())
        assert not running[-1].done(), "training ended before: it must be more"
        for future in running:
            future.result()
        return taken

    samples()  # saving the first sampler's weights would wait for the training that was sent before
    readings = interleaved(beside_training, [alone], _rounds(stage, repeat))
    counted = FIRST_TOKENS * len(readings.ours)
    beside, by_itself = (side[-counted:] for side in (first_beside, first_alone))
    first = (
        f"a request's first token {median(beside) * 1e3:.0f} ms, slowest of {len(beside)} {max(beside) * 1e3:.0f}, "
        f"alone {median(by_itself) * 1e3:.0f} and {max(by_itself) * 1e3:.0f}"
    )
    return replace(readings, note=f"{_rates(readings, SAMPLES * NEW_TOKENS)}; {first}")


def _side_by_side(shape: Shape) -> tuple[Measurement, Measurement]:
    return (
        Measurement(
            f"training_beside_sampling_{shape.label}",
            f"forward_backward of {ROWS} x {TOKENS} tokens while {SAMPLES} samples are drawn, {shape.label}",
            "alone",
            Goal("slowdown", LIMIT),
            take_training,
            shape=shape,
        ),
        Measurement(
            f"sampling_beside_training_{shape.label}",
            f"{SAMPLES} samples of {NEW_TOKENS} tokens while forward_backwards run, {shape.label}",
            "alone",
            Goal("slowdown", LIMIT),
            take_sampling,
            shape=shape,
        ),
    )


SIDE_BY_SIDE = tuple(measurement for shape in (SMALL, MIDDLE) for measurement in _side_by_side(shape))
