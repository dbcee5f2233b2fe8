"""The server's own engine without the server: what a request costs besides HTTP, ledger and waiting.

`python -m bench.engine_alone FOLDER`: the same tasks as `bench.by_hand`, answered in the same way.
"""

from __future__ import annotations

import sys

import numpy as np
from transformers.utils import logging

from bench.model import token_rows
from bench.stage import ALPHA, LEARNING_RATE, MODEL, RANK
from bench.worker import answer_tasks
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer
from tinkercloud.engine.types import (
    AdamParams,
    CreateModel,
    Datum,
    EngineOptions,
    Failure,
    ForwardBackward,
    LoraConfig,
    OpenSampler,
    OptimStep,
    Sample,
    SamplingParams,
    SaveWeights,
    TrainOperation,
)


class EngineAlone:
    """One adapter in a trainer, and its first weights in a sampler."""

    def __init__(self, folder: str) -> None:
        options = EngineOptions(name=MODEL, source=folder)
        model = BaseModel.load(options)
        self._trainer, self._sampler = TorchTrainer(model, options), TorchSampler(model, options)
        self._train(CreateModel("run", LoraConfig(rank=RANK, alpha=ALPHA)))
        self._train(SaveWeights("run", f"{folder}-adapter", replace=True))
        self._sampler.open(OpenSampler("sampler", f"{folder}-adapter"))

    def forward_backward(self, rows: int, tokens: int) -> None:
        """Gradients of a batch, added to those before."""
        self._train(ForwardBackward("run", _batch(rows, tokens), "cross_entropy"))

    def step(self, rows: int, tokens: int) -> None:
        """Gradients and one AdamW step."""
        self.forward_backward(rows, tokens)
        self._train(OptimStep("run", AdamParams(learning_rate=LEARNING_RATE)))

    def generate(self, rows: int, tokens: int, new_tokens: int) -> None:
        """`new_tokens` more for each of `rows` prompts, all submitted at once."""
        params = SamplingParams(max_tokens=new_tokens, seed=0)
        for number, prompt in enumerate(token_rows(rows, tokens)):
            self._sampler.submit(Sample(f"{number}", "sampler", prompt.astype(np.int32), params))
        while self._sampler.busy:
            for _, result in self._sampler.step():
                _check(result)

    def _train(self, operation: TrainOperation) -> None:
        for result in self._trainer.run([operation], between=lambda: None):
            _check(result)


def _check(result: object) -> None:
    if isinstance(result, Failure):
        raise RuntimeError(result.error)


def _batch(rows: int, tokens: int) -> tuple[Datum, ...]:
    weights = np.ones(tokens, np.float32)
    return tuple(
        Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], "weights": weights})
        for row in token_rows(rows, tokens + 1)
    )


if __name__ == "__main__":
    logging.disable_progress_bar()
    answer_tasks(EngineAlone(sys.argv[1]))
