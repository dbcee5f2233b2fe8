"""How long one request takes when nothing else runs: to its first token, and from token to token."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings
from bench.stage import Stage, seconds

NAME = "generate"


def _one_request(name: str, what: str, prompt_tokens: int, new_tokens: int, shape: Shape = SMALL) -> Measurement:
    work = {"rows": 1, "tokens": prompt_tokens, "new_tokens": new_tokens}

    def take(stage: Stage, repeat: int) -> Readings:
        """Seconds for each token, after a prompt that is new each time; `generate` runs on merged weights."""
        import tinker

        params = tinker.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[])

        def sample() -> None:
            (prompt,) = stage.new_prompts(1, prompt_tokens)
            assert len(stage.sampler.sample(prompt, 1, params).result().sequences[0].tokens) == new_tokens

        readings = stage.by_hand.compared(
            lambda: seconds(sample), NAME, work, repeat, settings={"cache": ["dynamic", "static"]}
        )
        return Readings(
            tuple(one / new_tokens for one in readings.ours),
            tuple(one / new_tokens for one in readings.theirs),
            readings.variant,
        )

    return Measurement(name, what, "HF generate", Goal("speed", 1.0), take, (NAME, work), shape)


LATENCY = (
    _one_request("first_token", "one request's first token after a prompt of 512", 512, 1),
    _one_request("first_token_30m", "one request's first token after a prompt of 512, 30m", 512, 1, MIDDLE),
    _one_request("next_token", "one request's time for each of 128 tokens", 16, 128),
    _one_request("next_token_30m", "one request's time for each of 128 tokens, 30m", 16, 128, MIDDLE),
)
