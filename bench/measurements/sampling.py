"""How fast a batch of samples is drawn, from one adapter and from several."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings
from bench.stage import Stage, seconds

ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
NAME = "generate"
ADAPTERS = 4


def _sampling(shape: Shape, adapters: int, goal: float) -> Measurement:
    """Requests go to `adapters` trained adapters in turn. `generate` runs on merged weights, of one adapter after the
    other where there are several: its batches have one model."""
    work = {"rows": ROWS, "tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "adapters": adapters}

    def take(stage: Stage, repeat: int) -> Readings:
        """Seconds until the last of the samples has come back."""
        import tinker

        params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
        samplers = stage.samplers(adapters)

        def sample() -> None:
            questions = stage.new_prompts(ROWS, PROMPT_TOKENS)
            futures = [
                samplers[number % adapters].sample(question, 1, params) for number, question in enumerate(questions)
            ]
            for future in futures:
                assert len(future.result().sequences[0].tokens) == NEW_TOKENS

        return stage.by_hand.compared(
            lambda: seconds(sample), NAME, work, repeat, settings={"cache": ["dynamic", "static"]}
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


SAMPLING = tuple(
    _sampling(shape, adapters, goal) for shape in (SMALL, MIDDLE) for adapters, goal in ((1, 2.5), (ADAPTERS, 2.0))
)
