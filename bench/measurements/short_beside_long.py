"""Whether short requests wait for a long one that shares their batch."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, median
from time import perf_counter

from bench.measurement import Measurement
from bench.model import MIDDLE, SMALL
from bench.readings import Goal, Readings, interleaved
from bench.stage import Stage, waits

SHORT, PROMPT_TOKENS, SHORT_TOKENS, LONG_TOKENS = 15, 16, 16, 1024


def take(stage: Stage, repeat: int) -> Readings:
    """Seconds of the slowest short request: with a long one that began before and ends after them, and without. The
    note is about their mean."""
    import tinker

    short = tinker.SamplingParams(max_tokens=SHORT_TOKENS, temperature=1.0, stop=[])
    long = tinker.SamplingParams(max_tokens=LONG_TOKENS, temperature=1.0, stop=[])

    means_alone: list[float] = []
    means_beside: list[float] = []

    def short_requests(means: list[float]) -> float:
        prompts = stage.new_prompts(SHORT, PROMPT_TOKENS)
        sent = perf_counter()
        each = waits([stage.sampler.sample(prompt, 1, short).future() for prompt in prompts], sent)
        means.append(mean(each))
        return max(each)

    def beside_a_long_one() -> float:
        (prompt,) = stage.new_prompts(1, PROMPT_TOKENS)
        running = stage.sampler.sample(prompt, 1, long)
        wait = short_requests(means_beside)
        assert not running.future().done(), "the long request ended before the short ones: it must be longer"
        running.result()
        return wait

    readings = interleaved(beside_a_long_one, [lambda: short_requests(means_alone)], repeat)
    pairs = list(zip(means_beside, means_alone, strict=True))[-repeat:]
    ratio = median(beside / alone for beside, alone in pairs)
    milliseconds = " ms, alone ".join(f"{median(side) * 1e3:.0f}" for side in zip(*pairs, strict=True))
    return replace(readings, note=f"on average {milliseconds} ms: {ratio:.2f} x")


SHORT_BESIDE_LONG = tuple(
    Measurement(
        f"short_beside_long{suffix}",
        f"the slowest of {SHORT} samples of {SHORT_TOKENS} tokens beside one of {LONG_TOKENS}{of}",
        "without it",
        Goal("slowdown", 1.2),
        take,
        shape=shape,
    )
    for shape, suffix, of in ((SMALL, "", ""), (MIDDLE, "_30m", ", 30m"))
)
