"""What training and sampling take from each other while both have work."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from bench.data import uniform
from bench.measurement import Measurement
from bench.readings import Goal, Readings, interleaved
from bench.stage import Stage, batch, seconds

if TYPE_CHECKING:
    import tinker

ROWS, TOKENS = 8, 256
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
FLOOD_TOKENS = 1024
"""Tokens of each sample beside a forward_backward: it must end before them."""
LIMIT = 2.2
"""Each has half of the time while both have work."""


def _sample(stage: Stage, new_tokens: int) -> list[Future[tinker.SampleResponse]]:
    import tinker

    params = tinker.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[])
    return [stage.sampler.sample(prompt, 1, params).future() for prompt in stage.new_prompts(SAMPLES, PROMPT_TOKENS)]


def _train(stage: Stage) -> Future[tinker.ForwardBackwardOutput]:
    return stage.training.forward_backward(batch(uniform(ROWS, TOKENS)), "cross_entropy").future()


def take_training(stage: Stage, repeat: int) -> Readings:
    """Seconds of a forward_backward: while many samples are drawn, and alone."""

    def alone() -> float:
        return seconds(lambda: _train(stage).result())

    def beside_samples() -> float:
        running = _sample(stage, FLOOD_TOKENS)
        taken = alone()
        assert not any(future.done() for future in running), "samples ended before: they must be longer"
        for future in running:
            future.result()
        return taken

    return interleaved(beside_samples, [alone], repeat)


def take_sampling(stage: Stage, repeat: int) -> Readings:
    """Seconds of a batch of samples: while one forward_backward follows another, and alone."""

    def alone() -> float:
        return seconds(lambda: [future.result() for future in _sample(stage, NEW_TOKENS)])

    def beside_training() -> float:
        running = [_train(stage) for _ in range(4)]
        taken = alone()
        assert not running[-1].done(), "training ended before: it must be more"
        for future in running:
            future.result()
        return taken

    return interleaved(beside_training, [alone], repeat)


SIDE_BY_SIDE = (
    Measurement(
        "training_beside_sampling",
        f"forward_backward of {ROWS} x {TOKENS} tokens while {SAMPLES} samples are drawn",
        "alone",
        Goal("slowdown", LIMIT),
        take_training,
    ),
    Measurement(
        "sampling_beside_training",
        f"{SAMPLES} samples of {NEW_TOKENS} tokens while forward_backwards run",
        "alone",
        Goal("slowdown", LIMIT),
        take_sampling,
    ),
)
