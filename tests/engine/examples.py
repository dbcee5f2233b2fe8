"""Operations that the tests run."""

from __future__ import annotations

import numpy as np
import torch

from tinkercloud.engine.operations import AdamParams, CreateModel, Datum, ForwardBackward, LoraConfig, OptimStep
from tinkercloud.engine.protocol import Alone
from tinkercloud.engine.results import Result
from tinkercloud.engine.torch.trainer import TorchTrainer

VOCAB = 96
"""Of all tiny models."""


def make_datum(
    seed: int, length: int, targets: int | None = None, several: int = 0, loss: str = "cross_entropy"
) -> Datum:
    """A random datum; `targets` fewer than `length`, or `several` weighted targets a position."""
    random = np.random.default_rng(seed)
    count = length if targets is None else targets
    shape = (count, several) if several else (count,)
    inputs = {"target_tokens": random.integers(0, VOCAB, shape)}
    if loss == "cross_entropy":
        inputs["weights"] = random.normal(0.1, 0.2, shape).astype(np.float32)
    else:
        inputs["logprobs"] = random.normal(-4.5, 0.3, shape).astype(np.float32)
        inputs["advantages"] = random.choice([-1.5, 0.0, 1.0, 2.0], shape).astype(np.float32)
        if loss == "stable_reinforce":
            inputs["policy_logprobs"] = (inputs["logprobs"] + random.normal(0, 0.1, shape)).astype(np.float32)
            inputs["sampled"] = random.choice([0.0, 1.0], shape, p=[0.3, 0.7]).astype(np.float32)
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = random.choice([0.0, 1.0], shape).astype(np.float32)
    return Datum(random.integers(0, VOCAB, length).astype(np.int32), inputs)


def run(trainer: TorchTrainer, *operations) -> list[Result]:
    """Run each operation as a cycle of its own."""
    return [trainer.run([operation], Alone())[0] for operation in operations]


def shaken(model_id: str, rank: int = 8, **parts) -> list:
    """Operations that make a model whose B is not zero: create it, and take a step along some gradient."""
    data = tuple(make_datum(900 + i, 9) for i in range(2))
    return [
        CreateModel(model_id, LoraConfig(rank=rank, seed=len(model_id) + rank, **parts)),
        ForwardBackward(model_id, data, "cross_entropy"),
        OptimStep(model_id, AdamParams(learning_rate=0.05)),
    ]


def forward_backward(model_id: str, data: list[Datum], **how) -> ForwardBackward:
    return ForwardBackward(model_id, tuple(data), how.pop("loss", "cross_entropy"), **how)


def together(trainer: TorchTrainer, *operations) -> list[Result]:
    """Run operations of different models as one cycle."""
    return trainer.run(operations, Alone())


def gradient_of(trainer: TorchTrainer, model_id: str) -> torch.Tensor:
    """The accumulated gradient, flat."""
    return trainer._adapters[model_id].gradient


def parameters_of(trainer: TorchTrainer, model_id: str) -> torch.Tensor:
    return trainer._adapters[model_id].parameters
