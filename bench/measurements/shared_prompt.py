"""What it brings that prompts which begin alike are computed once."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings, interleaved
from bench.stage import Stage, seconds

SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 512, 16


def _shared(requests: int, shape: Shape = SMALL) -> Measurement:
    """`SAMPLES` samples of a prompt that is new in each reading, as so many requests."""

    def take(stage: Stage, repeat: int) -> Readings:
        """Seconds until the last sample is there; against as many requests, each with a prompt of its own."""
        import tinker

        params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])

        def sample(prompts: list[tinker.ModelInput], each: int) -> None:
            for future in [stage.sampler.sample(prompt, each, params) for prompt in prompts]:
                assert len(future.result().sequences[-1].tokens) == NEW_TOKENS

        def of_one_prompt() -> float:
            prompts = stage.new_prompts(1, PROMPT_TOKENS) * requests
            return seconds(lambda: sample(prompts, SAMPLES // requests))

        def of_many() -> float:
            prompts = stage.new_prompts(SAMPLES, PROMPT_TOKENS)
            return seconds(lambda: sample(prompts, 1))

        return interleaved(of_one_prompt, [of_many], repeat)

    how = f"{requests} requests" if requests > 1 else "one request"
    suffix, of = ("", "") if shape is SMALL else (f"_{shape.label}", f", {shape.label}")
    return Measurement(
        f"shared_prompt_{requests}{suffix}",
        f"{SAMPLES} samples of {NEW_TOKENS} tokens after one prompt of {PROMPT_TOKENS}, {how}{of}",
        "different prompts",
        Goal("speed", 4.0),
        take,
        shape=shape,
    )


SHARED_PROMPT = (_shared(SAMPLES), _shared(1), _shared(SAMPLES, MIDDLE), _shared(1, MIDDLE))
