"""Several tenants' training scripts, as one client process: `python -m tests.chaos.client URL SEED ROUNDS`.

Everything that it asks for follows from the seed and from what it was answered. Each answer is a line of JSON on stdout
as soon as it is there, so that two runs can be compared and somebody may act in between. Any exception ends it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tinker
from tinker import types

from tests.e2e.test_first_steps import datum

VOCABULARY = 500
SAVE_ROUNDS, LOAD_ROUNDS = 4, 6
"""A tenant saves after every so many rounds, and loads what it saved last after every so many."""

_printing = threading.Lock()


class Tenant:
    """One session with one training run."""

    def __init__(self, url: str, name: str, seed: int, **options: Any):
        self.name = name
        self.random = np.random.default_rng([seed, *name.encode()])
        self.service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        self.training = self.service.create_lora_training_client(
            base_model="tinkercloud/nano", seed=seed, **options
        ).result()
        self.optimizer = options.get("optimizer")
        self.saved: str | None = None

    def say(self, what: str, value: Any) -> None:
        with _printing:
            print(json.dumps({"tenant": self.name, "what": what, "value": value}), flush=True)

    def batch(self) -> list[types.Datum]:
        lengths = self.random.integers(3, 24, size=self.random.integers(1, 5))
        return [datum(self.random.integers(0, VOCABULARY, size=length).tolist()) for length in lengths]

    def step(self) -> Any:
        rate = float(self.random.choice([1e-3, 3e-3, 1e-2]))
        if self.optimizer is None:
            return self.training.optim_step(types.AdamParams(learning_rate=rate))
        return self.training.optim_step(types.DimuonParams(learning_rate=rate))

    def say_loss(self, what: str, output: types.ForwardBackwardOutput) -> None:
        logprobs = [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]
        self.say(what, {"metrics": output.metrics, "logprobs": digest(*logprobs)})

    def keep(self, round_number: int) -> None:
        """Save from time to time, and go back to what was saved."""
        if round_number % SAVE_ROUNDS == 0:
            self.saved = self.training.save_state(f"round-{round_number}").result().path
            self.say("saved", self.saved.rpartition("/")[2])
        if round_number % LOAD_ROUNDS == 0 and self.saved:
            self.training.load_state_with_optimizer(self.saved).result()
            self.say("loaded", self.saved.rpartition("/")[2])

    def end(self) -> None:
        """The name of the final weights, whose session differs from run to run."""
        self.say("final", self.training.save_state("final").result().path)
        self.service.close("success").result()


def supervised(tenant: Tenant, rounds: int) -> None:
    """Pipelined steps with accumulated gradients, in which saves and loads come between."""
    for round_number in range(1, rounds + 1):
        passes = [tenant.training.forward_backward(tenant.batch(), "cross_entropy") for _ in range(2)]
        step = tenant.step()
        for number, output in enumerate(passes):
            tenant.say_loss(f"round {round_number}, pass {number}", output.result())
        tenant.say(f"round {round_number}, step", step.result().metrics)
        tenant.keep(round_number)
    tenant.end()


def reinforced(tenant: Tenant, rounds: int) -> None:
    """On-policy steps: sample with the newest weights, judge what came, train on it."""
    for round_number in range(1, rounds + 1):
        sampler = tenant.training.save_weights_and_get_sampling_client().result()
        prompts = [tenant.random.integers(0, VOCABULARY, size=6).tolist() for _ in range(2)]
        asked = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                2,
                types.SamplingParams(max_tokens=12, seed=1000 * round_number + number, stop=[]),
            )
            for number, prompt in enumerate(prompts)
        ]
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(prompts[0]))
        data = []
        for prompt, future in zip(prompts, asked, strict=True):
            sequences = future.result().sequences
            tenant.say(f"round {round_number}, samples", [[s.tokens, digest(s.logprobs)] for s in sequences])
            data += [on_policy(prompt, sequence) for sequence in sequences]
        tenant.say(f"round {round_number}, scored", scored.result())
        output, step = tenant.training.forward_backward(data, "importance_sampling"), tenant.step()
        tenant.say_loss(f"round {round_number}, pass", output.result())
        tenant.say(f"round {round_number}, step", step.result().metrics)
        tenant.keep(round_number)
    tenant.end()


def on_policy(prompt: list[int], sequence: types.SampledSequence) -> types.Datum:
    """What was sampled, rewarded for even tokens."""
    tokens, logprobs = list(sequence.tokens), list(sequence.logprobs)
    reward = sum(1 if token % 2 == 0 else -1 for token in tokens) / len(tokens)
    before = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(prompt[1:] + tokens, np.int64),
            "logprobs": np.array([0.0] * before + logprobs, np.float32),
            "advantages": np.array([0.0] * before + [reward] * len(tokens), np.float32),
        },
    )


def digest(*arrays: Any) -> str:
    """Of the bits."""
    return hashlib.sha256(b"".join(np.asarray(array, np.float64).tobytes() for array in arrays)).hexdigest()[:16]


TENANTS: dict[str, tuple[Callable[[Tenant, int], None], dict[str, Any]]] = {
    "supervised": (supervised, {"rank": 4}),
    "dimuon": (supervised, {"rank": 8, "optimizer": types.DimuonOptimizerConfig()}),
    "reinforced": (reinforced, {"rank": 4}),
    "reinforced attention": (reinforced, {"rank": 2, "train_mlp": False, "train_unembed": False}),
}


def main(url: str, seed: int, rounds: int) -> None:
    def run(name: str) -> None:
        story, options = TENANTS[name]
        story(Tenant(url, name, seed, **options), rounds)

    with ThreadPoolExecutor(len(TENANTS)) as threads:
        for future in [threads.submit(run, name) for name in TENANTS]:
            future.result()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
