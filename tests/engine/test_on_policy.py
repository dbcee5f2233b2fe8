"""Reinforcement learning on sums, 15 steps of it in the engine: sampler and trainer never disagree."""

from __future__ import annotations

import re
import statistics
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.examples import run
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import (
    AdamParams,
    CloseSampler,
    CreateModel,
    Datum,
    ForwardBackward,
    LoraConfig,
    OpenSampler,
    OptimStep,
    Sample,
    SamplingParams,
    SaveWeights,
)
from tinkercloud.engine.results import Done
from tinkercloud.engine.torch.kernels.causal import LONGEST
from tinkercloud.engine.torch.kernels.products import have_products
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer
from tinkercloud.nano import FOLDER

STEPS, PROBLEMS, GROUP = 15, 16, 8
WIDEST = 0 if have_products(torch.empty(0)) else 3e-5
"""Nats between a drawn token's two log-probabilities: none where both have the same kernels. Elsewhere the widest of
some 7,000 are 1.3e-5, of logits of up to 18; in float32 transformers' own are off those in float64 by 1.4e-5."""


class Step(NamedTuple):
    """One of 16 sums with 8 answers each, all on-policy."""

    reward: float
    """Mean over the answers."""
    metrics: dict[str, float]
    """Of the forward_backward."""
    differences: np.ndarray
    """Of each drawn token: the sampler's log-probability less the trainer's."""
    advantages: np.ndarray
    """Of each drawn token."""


@pytest.fixture(scope="module")
def engines() -> tuple[TorchTrainer, TorchSampler]:
    """Of one run, "m"."""
    options = EngineOptions("nano", str(FOLDER), device="cpu", dtype="float32")
    model = BaseModel.load(options)
    trainer, sampler = TorchTrainer(model, options), TorchSampler(model, options)
    run(trainer, CreateModel("m", LoraConfig(rank=16, seed=1)))
    return trainer, sampler


@pytest.fixture(scope="module")
def steps(engines, tmp_path_factory) -> list[Step]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    trainer, sampler = engines
    random, folder, found = np.random.default_rng(0), tmp_path_factory.mktemp("on-policy"), []
    for step in range(STEPS):
        name = f"step-{step}"
        run(trainer, SaveWeights("m", str(folder / name)))
        assert sampler.open(OpenSampler(name, str(folder / name))) == Done()
        sums = {f"{place}": random.integers(0, 100, 2).tolist() for place in range(PROBLEMS)}
        prompts = {
            place: tokenizer.apply_chat_template(
                [{"role": "user", "content": f"What is {x} + {y}?"}], add_generation_prompt=True, return_dict=False
            )
            for place, (x, y) in sums.items()
        }
        params = SamplingParams(max_tokens=5, seed=step, stop_tokens=(tokenizer.convert_tokens_to_ids("<|im_end|>"),))
        for place, prompt in prompts.items():
            sampler.submit(Sample(place, name, np.array(prompt, np.int32), params, num_samples=GROUP))
        results = {}
        while sampler.busy:
            results.update(sampler.step())
        sampler.close(CloseSampler(name))
        data, rewards, counts = [], [], []
        for place, prompt in prompts.items():
            sequences = results[place].sequences
            own = [_reward(tokenizer.decode(each.tokens), each.stop_reason, sum(sums[place])) for each in sequences]
            rewards += own
            counts += [len(each.tokens) for each in sequences]
            data += [
                _datum(prompt, each, reward - statistics.mean(own)) for each, reward in zip(sequences, own, strict=True)
            ]
        output, _ = run(
            trainer,
            ForwardBackward("m", tuple(data), "importance_sampling"),
            OptimStep("m", AdamParams(learning_rate=1e-3)),
        )
        sampled, trained, advantages = (
            np.concatenate([row[-count:] for row, count in zip(rows, counts, strict=True)])
            for rows in (
                [datum.inputs["logprobs"] for datum in data],
                [datum["logprobs"] for datum in output.outputs],
                [datum.inputs["advantages"] for datum in data],
            )
        )
        found.append(Step(statistics.mean(rewards), output.metrics, sampled - trained, advantages))
    return found


def _reward(text: str, stop_reason: str, answer: int) -> float:
    """As the cookbook's: 1 for the right number, and a tenth off for an answer that does not end."""
    numbers = re.findall(r"-?\d+", text)
    return float(bool(numbers) and int(numbers[-1]) == answer) - 0.1 * (stop_reason != "stop")


def _datum(prompt: list[int], sequence, advantage: float) -> Datum:
    silent = len(prompt) - 1
    tokens = np.concatenate([prompt, sequence.tokens])
    drawn = len(sequence.tokens)
    return Datum(
        tokens[:-1].astype(np.int32),
        {
            "target_tokens": tokens[1:],
            "logprobs": np.concatenate([np.zeros(silent, np.float32), sequence.logprobs]),
            "advantages": np.concatenate([np.zeros(silent), np.full(drawn, advantage)]).astype(np.float32),
        },
    )


def test_what_was_sampled_and_what_is_trained_on_are_one_policy(steps):
    assert len(steps) == STEPS
    for _, metrics, differences, advantages in steps:
        assert len(differences) >= PROBLEMS * GROUP
        assert metrics["active_tokens:sum"] == np.count_nonzero(advantages) > len(differences) / 4
        assert np.abs(differences).max() <= WIDEST
        assert abs(metrics["kl_sample_train_v1:mean"]) < 1e-6
        assert metrics["kl_sample_train_v2:mean"] < 1e-10, "a root mean square of 1.4e-5"
        assert metrics["ratio:mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("length", [1000, LONGEST])
def test_long_sequences_too(length, steps, engines, tmp_path):
    """A prompt's log-probabilities after those steps, in chunks here and in one pass there."""
    trainer, sampler = engines
    tokens = np.random.default_rng(length).integers(0, 1000, length + 1).astype(np.int32)
    folder = str(tmp_path / "trained")
    run(trainer, SaveWeights("m", folder))
    assert sampler.open(OpenSampler("trained", folder)) == Done()
    sampler.submit(Sample("long", "trained", tokens, SamplingParams(max_tokens=1, seed=1), prompt_logprobs=True))
    results = {}
    while sampler.busy:
        results.update(sampler.step())
    sampler.close(CloseSampler("trained"))
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(length, np.float32)}
    (output,) = run(trainer, ForwardBackward("m", (Datum(tokens[:-1], inputs),), "cross_entropy", forward_only=True))
    assert np.abs(results["long"].prompt_logprobs[1:] - output.outputs[0]["logprobs"]).max() <= WIDEST


def test_it_learns(steps):
    """So that the policies compared are fifteen different ones."""
    rewards = [step.reward for step in steps]
    assert statistics.mean(rewards[-4:]) > statistics.mean(rewards[:4]) + 0.05, rewards
