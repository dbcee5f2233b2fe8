"""Hundreds of adapters within a budget of bytes: the idle ones are elsewhere, and no number shows it."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.examples import forward_backward, make_datum, run, together
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import (
    AdamParams,
    ClearGradients,
    CreateModel,
    DimuonParams,
    DropModel,
    LoadWeights,
    LoraConfig,
    OptimStep,
    SaveWeights,
)
from tinkercloud.engine.results import Done, Failure
from tinkercloud.engine.torch.shelf import StateLost
from tinkercloud.engine.torch.trainer import TorchTrainer

RANK = 2
ATTN = dict(rank=RANK, train_mlp=False, train_unembed=False)


def whole_bytes(trainer: TorchTrainer) -> int:
    """An adapter of `ATTN` with a gradient and AdamW's moments, counted by hand."""
    attn = [linear for linear in trainer._model.linears if linear.part == "attn"]
    return 4 * 4 * RANK * sum(linear.in_features + linear.out_features for linear in attn)


@pytest.fixture
def trainers(base_model, tmp_path):
    """(without a budget, with one for so many adapters)"""

    def make(adapters: int) -> tuple[TorchTrainer, TorchTrainer]:
        model, options = base_model("qwen3"), EngineOptions(name="qwen3", source="")
        free = TorchTrainer(model, options)
        budget = adapters * whole_bytes(free)
        options = EngineOptions(name="qwen3", source="", adapter_memory=budget)
        return free, TorchTrainer(model, options, tmp_path / "scratch")

    return make


def assert_same_state(free: TorchTrainer, tight: TorchTrainer, model_ids) -> None:
    for model_id in model_ids:
        left, right = free._adapters[model_id], tight._adapters[model_id]
        assert torch.equal(left.parameters, right.parameters)
        assert (left.gradient is None) == (right.gradient is None)
        assert left.gradient is None or torch.equal(left.gradient, right.gradient)
        assert left.moments.keys() == right.moments.keys() and left.steps == right.steps
        assert all(torch.equal(moment, right.moments[name]) for name, moment in left.moments.items())


def test_two_hundred_adapters_train_in_the_memory_of_five(trainers):
    free, tight = trainers(5)
    budget = tight._options.adapter_memory
    names = [f"m{number}" for number in range(200)]
    families = {name: "dimuon" if number % 3 == 0 else "adamw" for number, name in enumerate(names)}
    creations = [CreateModel(name, LoraConfig(seed=n, **ATTN), families[name]) for n, name in enumerate(names)]
    assert together(tight, *creations) == together(free, *creations) == [Done()] * 200

    order = random.Random(0)
    for turn in range(3):
        for members in (order.sample(names, 60), order.sample(names, 3)):
            batches = [forward_backward(name, [make_datum(turn * 1000 + int(name[1:]), 7)]) for name in members]
            for left, right in zip(together(free, *batches), together(tight, *batches), strict=True):
                assert left.metrics == right.metrics
            params = {"adamw": AdamParams(1e-2), "dimuon": DimuonParams(1e-2)}
            steps = [OptimStep(name, params[families[name]]) for name in members[::2]]  # the others keep gradients
            assert together(free, *steps) == together(tight, *steps)
            assert tight.adapter_memory.resident_bytes <= budget

    memory = tight.adapter_memory
    assert memory.resident + memory.idle == 200 and memory.idle >= 190 and memory.moved_out > 200
    assert budget / 2 < memory.peak_bytes <= budget
    assert free.adapter_memory.idle == 0 and free.adapter_memory.resident_bytes > 15 * budget
    assert_same_state(free, tight, names)
    assert tight.adapter_memory.peak_bytes <= budget


class Operators(TorchDispatchMode):
    """How many were called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_idle_adapters_cost_memory_and_no_work(trainers):
    """With room for all of them."""
    trainer, _ = trainers(1)
    run(trainer, CreateModel("m", LoraConfig(**ATTN)))

    def operators() -> int:
        with Operators() as called:
            results = run(trainer, forward_backward("m", [make_datum(1, 9)]), OptimStep("m", AdamParams(1e-2)))
        assert not any(isinstance(result, Failure) for result in results)
        return called.count

    operators()  # makes its moments
    alone = operators()
    run(trainer, *(CreateModel(f"idle-{number}", LoraConfig(seed=number, **ATTN)) for number in range(100)))
    assert trainer.adapter_memory.resident == 101
    assert operators() == alone > 0


def test_every_operation_finds_an_idle_adapter(trainers, tmp_path):
    free, tight = trainers(2)
    names = ["a", "b", "c", "d", "e"]
    for trainer in (free, tight):
        for number, name in enumerate(names):
            created = CreateModel(name, LoraConfig(seed=number, **ATTN))
            run(trainer, created, forward_backward(name, [make_datum(number, 9)]), OptimStep(name, AdamParams(1e-2)))
            run(trainer, forward_backward(name, [make_datum(50 + number, 9)]))
    assert tight.adapter_memory.idle == 3
    assert "already" in run(tight, CreateModel("a", LoraConfig(**ATTN)))[0].error

    for trainer, place in ((free, "free"), (tight, "tight")):
        folder = str(tmp_path / place)
        results = run(
            trainer,
            SaveWeights("a", folder, with_optimizer=True, with_gradients=True),
            ClearGradients("b"),
            LoadWeights("c", folder, with_optimizer=True, with_gradients=True),
            LoadWeights("new", folder),
            DropModel("d"),
            OptimStep("e", AdamParams(1e-2)),
        )
        assert not any(isinstance(result, Failure) for result in results), results
        assert "no model d" in run(trainer, OptimStep("d", AdamParams()))[0].error
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "gradients.safetensors"):
        left, right = (load_file(tmp_path / place / file) for place in ("free", "tight"))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert_same_state(free, tight, ["a", "b", "c", "new", "e"])
    run(tight, *(DropModel(name) for name in (*names, "new")))
    assert tight.adapter_memory.resident_bytes == 0 and not list((tmp_path / "scratch").iterdir())


def test_an_adapter_larger_than_the_budget_has_the_memory_for_itself(trainers, caplog):
    """It may have been made when the budget was larger."""
    free, tight = trainers(1)
    budget = tight._options.adapter_memory
    creations = [
        CreateModel("small", LoraConfig(**ATTN)),
        CreateModel("large", LoraConfig(**{**ATTN, "rank": RANK + 1})),
    ]
    for trainer in (free, tight):
        for creation in creations:
            assert run(trainer, creation) == [Done()]
    needed = budget * (RANK + 1) // RANK
    assert f"adapter_memory = {budget} bytes, less than the {needed} that one operation needs" in caplog.text
    steps = [forward_backward(name, [make_datum(1, 5)]) for name in ("large", "small", "large")]
    assert [run(tight, step)[0].metrics for step in steps] == [run(free, step)[0].metrics for step in steps]
    assert tight.adapter_memory.resident == 1
    assert_same_state(free, tight, ["large", "small"])


def test_a_shelf_without_room_costs_memory_and_no_state(base_model, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.write_text("no folder")
    options = EngineOptions(name="qwen3", source="", adapter_memory=1 << 16)
    trainer = TorchTrainer(base_model("qwen3"), options, scratch)
    names = [f"m{number}" for number in range(12)]
    for name in names:
        created, trained = run(
            trainer, CreateModel(name, LoraConfig(**ATTN)), forward_backward(name, [make_datum(1, 5)])
        )
        assert created == Done() and not isinstance(trained, Failure)
    assert trainer.adapter_memory.idle == 0 and trainer.adapter_memory.resident_bytes > options.adapter_memory


def test_an_adapter_whose_file_is_gone_ends_the_engine(trainers, tmp_path):
    """It is never an operation's failure: the ledger can build the state again."""
    _, tight = trainers(1)
    run(tight, CreateModel("a", LoraConfig(**ATTN)), CreateModel("b", LoraConfig(**ATTN)))
    (file,) = (tmp_path / "scratch").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StateLost, match="cut short"):
        run(tight, OptimStep("a", AdamParams()))
