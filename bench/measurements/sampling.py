"""How fast a batch of samples is drawn, from one adapter and from several."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings
from bench.stage import Stage, seconds

ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
NAME = "generate"
ADAPTERS = 4


def _seconds_of(stage: Stage, adapters: int) -> float:
    """Until the last of the samples has come back. Requests go to `adapters` trained adapters in turn."""
    import tinker

    params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
    samplers = stage.samplers(adapters)

    def sample() -> None:
        questions = stage.new_prompts(ROWS, PROMPT_TOKENS)
        futures = [samplers[number % adapters].sample(question, 1, params) for number, question in enumerate(questions)]
        for future in futures:
            assert len(future.result().sequences[0].tokens) == NEW_TOKENS

    return seconds(sample)


def _sampling(shape: Shape, adapters: int, goal: float) -> Measurement:
    """`generate` runs on merged weights, of one adapter after the other where there are several: its batches have one
    model."""
    work = {"rows": ROWS, "tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "adapters": adapters}

    def take(stage: Stage, repeat: int) -> Readings:
        return stage.by_hand.compared(
            lambda: _seconds_of(stage, adapters), NAME, work, repeat, settings={"cache": ["dynamic", "static"]}
        )

    several = "" if adapters == 1 else f" from {adapters} adapters"
    return Measurement(
        f"sampling_{shape.label}" if adapters == 1 else f"sampling_adapters_{shape.label}",
        f"{ROWS} samples of {NEW_TOKENS} tokens after prompts of {PROMPT_TOKENS}{several}, {shape.label}",
        "HF generate",
        Goal("speed", goal),
        take,
        (NAME, work),
        shape,
    )


def _against_vllm(shape: Shape) -> Measurement:
    """The same from one adapter. vLLM runs with one too, and without, as it would on merged weights."""
    work = {"rows": ROWS, "tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}

    def take(stage: Stage, repeat: int) -> Readings:
        return stage.by_vllm.compared(
            lambda: _seconds_of(stage, 1), NAME, work, repeat, settings={"adapted": [False, True]}
        )

    return Measurement(
        f"sampling_vllm_{shape.label}",
        f"{ROWS} samples of {NEW_TOKENS} tokens after prompts of {PROMPT_TOKENS}, {shape.label}",
        "vLLM",
        Goal("speed", 4.0),
        take,
        (NAME, work),
        shape,
    )


SAMPLING = tuple(
    _sampling(shape, adapters, goal) for shape in (SMALL, MIDDLE) for adapters, goal in ((1, 2.5), (ADAPTERS, 2.0))
)
AGAINST_VLLM = tuple(_against_vllm(shape) for shape in (SMALL, MIDDLE))
