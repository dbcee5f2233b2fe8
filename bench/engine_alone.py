"""The server's own engine without the server: what a request costs besides HTTP, ledger and waiting.

`python -m bench.engine_alone FOLDER`: the same tasks as `bench.by_hand`, answered in the same way, and what bounds
them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from bench.data import BATCHES, Example, token_rows, uniform
from bench.shares import Shares, shares_of
from bench.stage import ALPHA, LEARNING_RATE, RANK
from bench.worker import answer_tasks
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import (
    AdamParams,
    CreateModel,
    Datum,
    ForwardBackward,
    LoraConfig,
    OpenSampler,
    OptimStep,
    Sample,
    SamplingParams,
    SaveWeights,
    TrainOperation,
)
from tinkercloud.engine.protocol import Alone
from tinkercloud.engine.results import Failure
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer

LORA = LoraConfig(rank=RANK, alpha=ALPHA)


class EngineAlone:
    """A trainer with one adapter (and more where tenants are asked for), and the first one's weights in a sampler."""

    def __init__(self, folder: str, **options: Any) -> None:
        """`options`: of the engine, its own if there are none."""
        options = EngineOptions(name="bench", source=folder, **options)
        model = BaseModel.load(options)
        self._trainer, self._sampler = TorchTrainer(model, options), TorchSampler(model, options)
        self._tenants: set[str] = set()
        self._seeds = itertools.count()
        self._train(CreateModel("run", LORA))
        self._adapter, self._samplers = f"{folder}-adapter", ["sampler"]
        self._train(SaveWeights("run", self._adapter, replace=True))
        self._sampler.open(OpenSampler("sampler", self._adapter))

    def forward_backward(self, kind: str, **shape: int) -> None:
        """Gradients of a batch of `bench.data`, added to those before."""
        self._train(_gradients("run", BATCHES[kind](**shape)))

    def step(self, rows: int, tokens: int) -> None:
        """Gradients and one AdamW step."""
        self._train(_gradients("run", uniform(rows, tokens)))
        self._train(OptimStep("run", AdamParams(learning_rate=LEARNING_RATE)))

    def tenants(self, count: int, rows: int, tokens: int) -> None:
        """Gradients of `count` adapters, all in one cycle, each of a batch of its own."""
        names = [f"tenant-{tenant}" for tenant in range(count)]
        for name in names:
            if name not in self._tenants:
                self._train(CreateModel(name, LORA))
                self._tenants.add(name)
        self._train(*(_gradients(name, uniform(rows, tokens, seed)) for seed, name in enumerate(names)))

    def generate(self, rows: int, tokens: int, new_tokens: int, adapters: int = 1) -> None:
        """`new_tokens` more for each of `rows` prompts that are new to the sampler, all submitted at once, to so many
        samplers in turn."""
        while len(self._samplers) < adapters:
            self._samplers.append(f"sampler-{len(self._samplers)}")
            self._sampler.open(OpenSampler(self._samplers[-1], self._adapter))
        params = SamplingParams(max_tokens=new_tokens, seed=0)
        for number, prompt in enumerate(token_rows(rows, tokens, next(self._seeds))):
            self._sampler.submit(
                Sample(f"{number}", self._samplers[number % adapters], prompt.astype(np.int32), params)
            )
        while self._sampler.busy:
            for _, result in self._sampler.step():
                _check(result)

    def product(self, size: int) -> None:
        """One product of two square matrices."""
        left, right = torch.ones(2, size, size)
        left @ right

    def shares(self, of: str, work: dict[str, Any]) -> Shares:
        """Where the time of one of the other tasks goes, once it is warm."""
        getattr(self, of)(**work)
        return shares_of(lambda: getattr(self, of)(**work))

    def _train(self, *operations: TrainOperation) -> None:
        for result in self._trainer.run(operations, Alone()):
            _check(result)


def _check(result: object) -> None:
    if isinstance(result, Failure):
        raise RuntimeError(result.error)


def _gradients(model_id: str, examples: Sequence[Example]) -> ForwardBackward:
    data = tuple(
        Datum(tokens.astype(np.int32), {"target_tokens": targets, "weights": weights})
        for tokens, targets, weights in examples
    )
    return ForwardBackward(model_id, data, "cross_entropy")


if __name__ == "__main__":
    logging.disable_progress_bar()
    answer_tasks(EngineAlone(sys.argv[1]))
