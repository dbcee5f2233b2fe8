"""Clients that send many samples at once, in a process of their own: `python -m bench.flood URL MODEL CLIENTS SAMPLES`.

Prints a line when its clients are there, sends after a line on its standard input, and prints as JSON how many seconds
passed until each client's last sample was there.
"""

from __future__ import annotations

import json
import sys
import time

from bench.stage import prompts

PROMPT_TOKENS, NEW_TOKENS = 16, 16


def main(url: str, model: str, clients: int, samples: int) -> None:
    """See the module's docstring."""
    import tinker

    services = [tinker.ServiceClient(base_url=url, api_key="tml-bench") for _ in range(clients)]
    samplers = [service.create_sampling_client(base_model=model).result() for service in services]
    given = prompts(samples, PROMPT_TOKENS)
    params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
    print("ready", flush=True)
    sys.stdin.readline()
    sent = time.perf_counter()
    futures = [[sampler.sample(prompt, 1, params) for prompt in given] for sampler in samplers]
    ended = []
    for of_client in futures:
        for future in of_client:
            assert len(future.result().sequences[0].tokens) == NEW_TOKENS
        ended.append(time.perf_counter() - sent)
    print(json.dumps(ended), flush=True)
    for service in services:
        service.holder.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
