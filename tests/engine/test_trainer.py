"""What the trainer computes, judged by transformers + PEFT; and that nobody's numbers depend on anybody else's."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine import reference
from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken, together
from tests.engine.precision import assert_logprobs, assert_sum, assert_tensors
from tinkercloud.engine.operations import (
    AdamParams,
    ClearGradients,
    CreateModel,
    Datum,
    DropModel,
    ForwardBackward,
    LoraConfig,
    OptimStep,
    SaveWeights,
)
from tinkercloud.engine.results import Done, Failure, LossOutput
from tinkercloud.engine.torch import packing
from tinkercloud.engine.torch import trainer as trainer_module
from tinkercloud.engine.torch.trainer import TorchTrainer

PARTS = {
    "all": dict(rank=8),
    "attn": dict(rank=4, train_mlp=False, train_unembed=False),
    "mlp": dict(rank=2, alpha=12.0, train_attn=False, train_unembed=False),
    "unembed": dict(rank=16, train_attn=False, train_mlp=False),
}

RAGGED = {
    "all": [make_datum(1, 5), make_datum(2, 23), make_datum(3, 23), make_datum(4, 1)],
    "attn": [make_datum(5, 17, several=3), make_datum(6, 9)],
    "mlp": [make_datum(7, 30, targets=11), make_datum(8, 2)],
    "unembed": [make_datum(9, 12), make_datum(10, 12)],
}


def _start(trainer: TorchTrainer) -> None:
    for name, lora in PARTS.items():
        run(trainer, *shaken(name, **lora))


def _save_gradients(trainer: TorchTrainer, model_id: str, folder) -> dict[str, torch.Tensor]:
    assert not isinstance(run(trainer, SaveWeights(model_id, str(folder), with_gradients=True))[0], Failure)
    return load_file(folder / "gradients.safetensors")


@pytest.mark.device
@pytest.mark.parametrize(
    "options", [{}, {"token_budget": 40}, {"logits_bytes": 8 * 96 * 4}], ids=["", "cut", "chunked"]
)
def test_a_ragged_batch_of_several_adapters_equals_peft(trainer_of, model_folder, family, options, tmp_path):
    trainer = trainer_of(family, **options)
    _start(trainer)
    results = together(trainer, *(forward_backward(name, RAGGED[name]) for name in PARTS))
    for name, result in zip(PARTS, results, strict=True):
        assert isinstance(result, LossOutput)
        assert result.output_type == "CrossEntropyLossReturn"
        gradients = _save_gradients(trainer, name, tmp_path / name)
        plain = reference.load_peft(model_folder(family), tmp_path / name, trainable=True)
        loss, logprobs = reference.cross_entropy(plain, RAGGED[name])
        assert_sum(result.metrics["loss:sum"], loss, sum(part.numel() for part in logprobs), atol=1e-4)
        for datum, output, expected in zip(RAGGED[name], result.outputs, logprobs, strict=True):
            assert output["logprobs"].dtype == np.float32
            assert_logprobs(output["logprobs"], expected)
            assert_logprobs(output["elementwise_loss"], -datum.inputs["weights"] * expected.numpy(), atol=2e-5)
        assert_tensors(gradients, reference.lora_gradients(plain))


@pytest.mark.device
@pytest.mark.parametrize("name", ["qwen3-untied", "llama-tied"])
def test_untied_and_tied_unembeddings_equal_peft(trainer_of, model_folder, name, tmp_path):
    trainer = trainer_of(name)
    run(trainer, *shaken("m"), forward_backward("m", RAGGED["all"]))
    gradients = _save_gradients(trainer, "m", tmp_path / "m")
    plain = reference.load_peft(model_folder(name), tmp_path / "m", trainable=True)
    reference.cross_entropy(plain, RAGGED["all"])
    assert_tensors(gradients, reference.lora_gradients(plain))


@pytest.mark.parametrize("budget", [4096, 24])
def test_co_tenants_change_no_bit(trainer_of, budget):
    """Whoever shares the micro-batches, and wherever those are cut, an operation's numbers keep their bits."""
    chunked = {"token_budget": budget, "logits_bytes": 16 * 96 * 4}
    shared, alone = trainer_of(**chunked), trainer_of(**chunked)
    for trainer in (shared, alone):
        _start(trainer)
    crowd = together(shared, *(forward_backward(name, RAGGED[name]) for name in reversed(PARTS)))
    solo = run(alone, *(forward_backward(name, RAGGED[name]) for name in reversed(PARTS)))
    for name, left, right in zip(reversed(PARTS), crowd, solo, strict=True):
        assert left.metrics == right.metrics
        for one, other in zip(left.outputs, right.outputs, strict=True):
            assert np.array_equal(one["logprobs"], other["logprobs"])
        assert torch.equal(gradient_of(shared, name), gradient_of(alone, name))


def test_the_same_run_twice_has_the_same_bits(trainer_of):
    def train() -> tuple[list[float], torch.Tensor]:
        trainer = trainer_of(token_budget=32)
        losses = []
        run(trainer, CreateModel("m", LoraConfig(rank=4, seed=5)))
        for step in range(3):
            data = [make_datum(40 + 10 * step + i, 3 + 5 * i) for i in range(4)]
            output, _ = run(trainer, forward_backward("m", data), OptimStep("m", AdamParams(learning_rate=1e-2)))
            losses.append(output.metrics["loss:sum"])
        return losses, parameters_of(trainer, "m")

    (losses, parameters), (again, parameters_again) = train(), train()
    assert losses == again
    assert torch.equal(parameters, parameters_again)


def test_forward_only_gives_the_same_numbers_and_no_gradient(trainer_of):
    trainer = trainer_of()
    run(trainer, *shaken("a"), *shaken("b"))
    forward, backward = together(
        trainer, forward_backward("a", RAGGED["all"], forward_only=True), forward_backward("b", RAGGED["all"])
    )
    assert gradient_of(trainer, "a") is None
    assert gradient_of(trainer, "b") is not None
    (repeat,) = run(trainer, forward_backward("a", RAGGED["all"]))
    assert repeat.metrics == forward.metrics
    assert isinstance(backward, LossOutput)


def test_a_zero_weight_still_returns_its_logprob(trainer_of):
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    datum = make_datum(70, 10)
    weighted, zero = run(
        trainer,
        forward_backward("m", [datum]),
        forward_backward("m", [Datum(datum.tokens, datum.inputs | {"weights": np.zeros(10, np.float32)})]),
    )
    assert np.array_equal(weighted.outputs[0]["logprobs"], zero.outputs[0]["logprobs"])
    assert zero.metrics["loss:sum"] == 0


@pytest.mark.device
def test_another_tenants_step_changes_nothing_of_mine(trainer_of):
    trainer = trainer_of()
    run(trainer, *shaken("mine"), *shaken("theirs"), forward_backward("mine", RAGGED["all"]))
    parameters, gradient = parameters_of(trainer, "mine").clone(), gradient_of(trainer, "mine").clone()
    run(trainer, forward_backward("theirs", RAGGED["attn"]), OptimStep("theirs", AdamParams(0.1, weight_decay=0.5)))
    assert torch.equal(parameters_of(trainer, "mine"), parameters)
    assert torch.equal(gradient_of(trainer, "mine"), gradient)


@pytest.mark.device
def test_the_seed_alone_makes_an_adapter(trainer_of):
    trainer = trainer_of()
    lora = LoraConfig(rank=4, seed=3)
    run(trainer, CreateModel("a", lora), CreateModel("x", LoraConfig(rank=8)), CreateModel("b", lora))
    run(trainer, CreateModel("c", LoraConfig(rank=4, seed=4)), CreateModel("d", LoraConfig(rank=4, seed=-3)))
    assert torch.equal(parameters_of(trainer, "a"), parameters_of(trainer, "b"))
    different = [parameters_of(trainer, name) for name in "acd"]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(different, 2))
    for a, b in filter(None, trainer._adapters["a"].weights.pairs):
        assert not b.any()
        assert 0 < a.abs().max() <= a.shape[1] ** -0.5


class Counted:
    """Turns that somebody wants, or nobody; `count` have been given."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.count = wanted, 0

    def next(self) -> None:
        self.count += 1


def test_others_have_a_turn_after_every_micro_batch(trainer_of):
    trainer, turns = trainer_of(token_budget=16), Counted(wanted=False)
    run(trainer, *shaken("m"))
    trainer.run([forward_backward("m", [make_datum(i, 16) for i in range(3)])], turns)
    assert turns.count == 3


def test_others_have_a_turn_after_each_of_many_optimizer_steps(trainer_of):
    """So that it is also known all the time that the engine comes further."""
    trainer, turns = trainer_of(), Counted(wanted=True)
    names = ["a", "b", "c"]
    for name in names:
        run(trainer, *shaken(name), forward_backward(name, [make_datum(1, 8)]))
    trainer.run([OptimStep(name, AdamParams(1e-3)) for name in names], turns)
    assert turns.count == len(names)


def test_micro_batches_are_short_while_somebody_waits_and_no_number_shows_it(trainer_of, monkeypatch):
    monkeypatch.setattr(packing, "TILE_TOKENS", 16)
    monkeypatch.setattr(trainer_module, "TILE_TOKENS", 16)
    data = [make_datum(i, 3 + 2 * i) for i in range(7)]
    results = {}
    for wanted, seconds, batches in ((False, 0.1, 1), (True, 0.0, 5), (True, 1e6, 1)):
        monkeypatch.setattr(trainer_module, "SHORT_SECONDS", seconds)
        trainer, turns = trainer_of(), Counted(wanted)
        run(trainer, *shaken("m"), forward_backward("m", data))
        (result,) = trainer.run([forward_backward("m", data)], turns)
        assert turns.count == batches
        results[wanted, seconds] = result, gradient_of(trainer, "m")
    (first, gradient), *others = results.values()
    for result, other in others:
        assert result.metrics == first.metrics and torch.equal(gradient, other)
        for one, its in zip(result.outputs, first.outputs, strict=True):
            assert np.array_equal(one["logprobs"], its["logprobs"])


# ---------------------------------------------------------------- failures


def _bad(datum: Datum, **inputs) -> Datum:
    return Datum(datum.tokens, datum.inputs | inputs)


GOOD = make_datum(80, 6)
POLICY = make_datum(81, 6, loss="ppo")

REFUSED = {
    "unknown loss": (ForwardBackward("m", (GOOD,), "huber"), "unknown loss_fn 'huber'"),
    "unknown config": (ForwardBackward("m", (GOOD,), "cross_entropy", {"beta": 1.0}), "no 'beta'"),
    "text config": (ForwardBackward("m", (POLICY,), "ppo", {"clip_low_threshold": "x"}), "finite number"),
    "bounds": (ForwardBackward("m", (POLICY,), "ppo", {"clip_low_threshold": 2.0}), "bounds of the probability ratio"),
    "no data": (ForwardBackward("m", (), "cross_entropy"), "data is empty"),
    "no weights": (
        forward_backward("m", [GOOD, Datum(GOOD.tokens, {"target_tokens": GOOD.inputs["target_tokens"]})]),
        "datum 1: cross_entropy needs target_tokens, weights; missing: weights",
    ),
    "no logprobs": (forward_backward("m", [GOOD], loss="ppo"), "missing: logprobs, advantages"),
    "input token": (forward_backward("m", [Datum(np.array([96], np.int32), make_datum(0, 1).inputs)]), "token id 96"),
    "target token": (forward_backward("m", [_bad(GOOD, target_tokens=np.full(6, -1))]), "token id -1"),
    "shape": (forward_backward("m", [_bad(GOOD, weights=np.ones(5, np.float32))]), "of the shape of target_tokens"),
    "too many": (forward_backward("m", [Datum(GOOD.tokens[:3], GOOD.inputs)]), "for 3 input tokens"),
    "too long": (forward_backward("m", [make_datum(0, 257)]), "has 257 tokens"),
    "NaN": (forward_backward("m", [_bad(GOOD, weights=np.full(6, np.nan, np.float32))]), "NaN"),
    "float targets": (forward_backward("m", [_bad(GOOD, target_tokens=np.zeros(6, np.float32))]), "must be integers"),
    "several": (
        forward_backward("m", [make_datum(0, 4, several=2, loss="ppo")], loss="ppo"),
        r"must be integers \[N\]",
    ),
    "no such model": (forward_backward("nobody", [GOOD]), "no model nobody"),
    "repeated": (CreateModel("m", LoraConfig(rank=4)), "already a model m"),
    "rank 0": (CreateModel("new", LoraConfig(rank=0)), "at least 1"),
    "no part": (
        CreateModel("new", LoraConfig(4, train_attn=False, train_mlp=False, train_unembed=False)),
        "nothing to train",
    ),
    "learning rate": (OptimStep("m", AdamParams(float("nan"))), "learning_rate must be"),
    "beta": (OptimStep("m", AdamParams(beta1=1.0)), "beta1 must be"),
}


@pytest.mark.parametrize("operation, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_says_why_and_leaves_co_tenants_alone(trainer_of, operation, words):
    trainer, undisturbed = trainer_of(), trainer_of()
    for each in (trainer, undisturbed):
        run(each, *shaken("m"), *shaken("other"), forward_backward("m", [GOOD]))
    before = gradient_of(trainer, "m").clone()
    failure, other = together(trainer, operation, forward_backward("other", RAGGED["all"]))
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert re.search(words, failure.error), failure.error
    (expected,) = run(undisturbed, forward_backward("other", RAGGED["all"]))
    assert other.metrics == expected.metrics
    assert torch.equal(gradient_of(trainer, "other"), gradient_of(undisturbed, "other"))
    if isinstance(operation, OptimStep):
        assert gradient_of(trainer, "m") is None, "a step that fails clears what it was to apply"
    else:
        assert torch.equal(gradient_of(trainer, "m"), before)


def test_a_loss_that_is_not_finite_fails_alone(trainer_of):
    """It fails after its micro-batches have run, together with a co-tenant's, and yet adds nothing."""
    trainer, undisturbed = trainer_of(token_budget=24), trainer_of(token_budget=24)
    for each in (trainer, undisturbed):
        run(each, *shaken("m"), *shaken("other"), forward_backward("m", [GOOD]))
    before = gradient_of(trainer, "m").clone()
    bad = _bad(GOOD, weights=np.full(6, 3e38, np.float32))
    failure, other = together(
        trainer, forward_backward("m", [make_datum(82, 20), bad]), forward_backward("other", RAGGED["all"])
    )
    assert failure == Failure(failure.error, "user")
    assert "datum 1 is not finite" in failure.error
    assert torch.equal(gradient_of(trainer, "m"), before)
    (expected,) = run(undisturbed, forward_backward("other", RAGGED["all"]))
    assert other.metrics == expected.metrics
    assert torch.equal(gradient_of(trainer, "other"), gradient_of(undisturbed, "other"))


def test_an_adapter_that_breaks_its_micro_batch_fails_alone(trainer_of):
    """A fault inside a shared micro-batch is tried again one by one, so that it stays its owner's."""
    trainer, undisturbed = trainer_of(), trainer_of()
    for each in (trainer, undisturbed):
        run(each, *shaken("broken"), *shaken("other"))
    broken = trainer._adapters["broken"]
    broken.weights = broken.weights._replace(scale=None)
    failure, other = together(trainer, forward_backward("broken", [GOOD]), forward_backward("other", RAGGED["all"]))
    assert isinstance(failure, Failure)
    assert failure.category == "server"
    run(undisturbed, forward_backward("other", RAGGED["all"]))
    assert isinstance(other, LossOutput)
    assert torch.equal(gradient_of(trainer, "other"), gradient_of(undisturbed, "other"))


def test_clear_and_drop(trainer_of):
    trainer = trainer_of()
    run(trainer, *shaken("m"), forward_backward("m", [GOOD]))
    assert run(trainer, ClearGradients("m"), DropModel("m"), DropModel("m")) == [Done()] * 3
    (failure,) = run(trainer, ClearGradients("m"))
    assert isinstance(failure, Failure)


def test_a_cycle_has_one_operation_of_a_model(trainer_of):
    with pytest.raises(ValueError, match="at most one"):
        together(trainer_of(), ClearGradients("m"), DropModel("m"))
