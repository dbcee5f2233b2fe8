"""How fast a batch of samples is drawn."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.readings import Goal, Readings
from bench.stage import Stage, seconds

ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
NAME, WORK = "generate", {"rows": ROWS, "tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}


def take(stage: Stage, repeat: int) -> Readings:
    """Seconds until the last of the samples of a trained adapter has come back; `generate` runs on merged weights."""
    import tinker

    params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])

    def sample() -> None:
        questions = stage.new_prompts(ROWS, PROMPT_TOKENS)
        for future in [stage.sampler.sample(question, 1, params) for question in questions]:
            assert len(future.result().sequences[0].tokens) == NEW_TOKENS

    return stage.by_hand.compared(
        lambda: seconds(sample), NAME, WORK, repeat, settings={"cache": ["dynamic", "static"]}
    )


SAMPLING = Measurement(
    "sampling",
    f"{ROWS} samples of {NEW_TOKENS} tokens after prompts of {PROMPT_TOKENS}",
    "HF generate",
    Goal("speed", 1.0),
    take,
    task=(NAME, WORK),
)
