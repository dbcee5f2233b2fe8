"""Whoever shares a batch, and wherever micro-batches are cut: on the CPU an operation's numbers keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.engine.examples import VOCAB, forward_backward, gradient_of, make_datum, run, shaken, together
from tests.engine.precision import assert_flat, assert_same, assert_same_metrics
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.results import LossOutput
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.trainer import TorchTrainer

LENGTHS = [3, 40, 9, 1, 47, 9, 9, 17]
"""Ten of them would fill the 64 tokens of a chunk of linear attention; none is a multiple of the rows of a product."""


def _assert_same(left: LossOutput, right: LossOutput) -> None:
    assert_same_metrics(left.metrics, right.metrics)
    assert_same(*(np.concatenate([output["logprobs"] for output in side.outputs]) for side in (left, right)))


@pytest.mark.device
def test_co_tenants_and_micro_batches_show_in_no_bit(family, trainer_of):
    mine = [make_datum(300 + i, length) for i, length in enumerate(LENGTHS)]
    others = {"b": [make_datum(400 + i, length) for i, length in enumerate((9, 33, 2, 9))], "c": [make_datum(500, 21)]}
    results = []
    for budget, tenants in ((4096, ()), (4096, ("b", "c")), (90, ("b",)), (16, ("c", "b"))):
        trainer = trainer_of(family, token_budget=budget)
        run(trainer, *shaken("mine"), *shaken("b", rank=4), *shaken("c", rank=3, train_attn=False))
        outputs = together(
            trainer,
            *(forward_backward(name, others[name]) for name in tenants),
            forward_backward("mine", mine),
        )
        results.append((outputs[-1], gradient_of(trainer, "mine")))
    for output, gradient in results[1:]:
        _assert_same(output, results[0][0])
        assert_flat(gradient, results[0][1])


def test_few_rows_of_a_wide_model_show_in_no_bit(tmp_path):
    """Alone, a datum of 5 tokens gives each expert 1 or 2 rows; beside others, many."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = BaseModel.load(EngineOptions(name="wide", source=str(tmp_path), device="cpu"))
    results = []
    for crowd in (0, 3, 90):
        trainer = TorchTrainer(model, EngineOptions(name="wide", source=""))
        run(trainer, *shaken("mine"), *shaken("b", rank=4))
        others = [forward_backward("b", [make_datum(500, crowd)])] if crowd else []
        *_, output = together(trainer, *others, forward_backward("mine", [make_datum(1, 5)]))
        results.append((output, gradient_of(trainer, "mine")))
    for output, gradient in results[1:]:
        _assert_same(output, results[0][0])
        assert_flat(gradient, results[0][1])


@pytest.mark.device
def test_two_operations_have_the_gradient_of_one(family, trainer_of):
    data = [make_datum(300 + i, length) for i, length in enumerate(LENGTHS)]
    gradients = []
    for cut in (8, 4, 1):
        trainer = trainer_of(family)
        run(trainer, *shaken("m"))
        run(trainer, *(forward_backward("m", part) for part in (data[:cut], data[cut:]) if part))
        gradients.append(gradient_of(trainer, "m"))
    for gradient in gradients[1:]:
        assert_flat(gradient, gradients[0], relative=1e-7)
