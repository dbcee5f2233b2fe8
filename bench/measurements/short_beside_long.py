"""Whether short requests wait for a long one that shares their batch."""

from __future__ import annotations

from statistics import mean
from time import perf_counter

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL
from bench.readings import Goal, Readings, interleaved
from bench.stage import Stage

SHORT, PROMPT_TOKENS, SHORT_TOKENS, LONG_TOKENS = 15, 16, 16, 1024


def take(stage: Stage, repeat: int) -> Readings:
    """Mean seconds of a short request: with a long one that began before and ends after them, and without."""
    import tinker

    short = tinker.SamplingParams(max_tokens=SHORT_TOKENS, temperature=1.0, stop=[])
    long = tinker.SamplingParams(max_tokens=LONG_TOKENS, temperature=1.0, stop=[])

    def short_requests() -> float:
        prompts = stage.new_prompts(SHORT, PROMPT_TOKENS)
        sent = perf_counter()
        ended: list[float] = []
        futures = [stage.sampler.sample(prompt, 1, short).future() for prompt in prompts]
        for future in futures:
            future.add_done_callback(lambda _: ended.append(perf_counter() - sent))
        for future in futures:
            future.result()
        return mean(ended)

    def beside_a_long_one() -> float:
        (prompt,) = stage.new_prompts(1, PROMPT_TOKENS)
        running = stage.sampler.sample(prompt, 1, long)
        wait = short_requests()
        assert not running.future().done(), "the long request ended before the short ones: it must be longer"
        running.result()
        return wait

    return interleaved(beside_a_long_one, [short_requests], repeat)


SHORT_BESIDE_LONG = tuple(
    Measurement(
        f"short_beside_long{suffix}",
        f"{SHORT} samples of {SHORT_TOKENS} tokens beside one of {LONG_TOKENS}{of}",
        "without it",
        Goal("slowdown", 1.2),
        take,
        shape=shape,
    )
    for shape, suffix, of in ((SMALL, "", ""), (MIDDLE, "_30m", ", 30m"))
)
