"""Clients that send many samples at once, in a process of their own: `python -m bench.flood URL MODEL CLIENTS SAMPLES`.

Prints a line when its clients are there, sends after a line on its standard input, and prints as JSON, for each client,
how many seconds passed until each of its samples was there.
"""

from __future__ import annotations

import json
import sys
import time

from bench.stage import prompts, waits

PROMPT_TOKENS, NEW_TOKENS = 16, 16
LONGER, EVERY = 4, 8
"""One sample of so many has so many times the tokens."""


def is_long(number: int) -> bool:
    """Whether a client's sample of this number is one of the longer ones."""
    return number % EVERY == EVERY - 1


def main(url: str, model: str, clients: int, samples: int) -> None:
    """See the module's docstring."""
    import tinker

    services = [tinker.ServiceClient(base_url=url, api_key="tml-bench") for _ in range(clients)]
    samplers = [service.create_sampling_client(base_model=model).result() for service in services]
    given = prompts(samples, PROMPT_TOKENS)
    tokens = [NEW_TOKENS * (LONGER if is_long(number) else 1) for number in range(samples)]
    params = [tinker.SamplingParams(max_tokens=each, temperature=1.0, stop=[]) for each in tokens]
    print("ready", flush=True)
    sys.stdin.readline()
    sent = time.perf_counter()
    futures = [
        sampler.sample(prompt, 1, each).future()
        for sampler in samplers
        for prompt, each in zip(given, params, strict=True)
    ]
    seconds = waits(futures, sent)
    for future, length in zip(futures, tokens * clients, strict=True):
        assert len(future.result().sequences[0].tokens) == length
    print(json.dumps([seconds[first : first + samples] for first in range(0, len(seconds), samples)]), flush=True)
    for service in services:
        service.holder.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
