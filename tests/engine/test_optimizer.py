"""AdamW against torch.optim.AdamW; any optimizer's step happens whole or not at all."""

from __future__ import annotations

import re

import msgspec
import pytest
import torch

from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken
from tinkercloud.codec import decode
from tinkercloud.engine.operations import AdamParams, CreateModel, DimuonParams, LoraConfig, OptimStep, TrainOperation
from tinkercloud.engine.results import Failure, StepOutput

SETTINGS = [
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=1e-2, beta1=0.5, beta2=0.999, eps=1e-6, weight_decay=0.1),
    AdamParams(learning_rate=1e-2, grad_clip_norm=0.05),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1e6),
]


@pytest.mark.parametrize("adam", SETTINGS)
def test_steps_equal_torch(trainer_of, adam):
    trainer = trainer_of()
    run(trainer, *shaken("m")[:1])
    parameter = torch.nn.Parameter(parameters_of(trainer, "m").clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    for step in range(4):
        if step != 2:  # one step without gradients: torch would see zeros
            run(trainer, forward_backward("m", [make_datum(step, 20)]))
            parameter.grad = gradient_of(trainer, "m").clone()
        else:
            parameter.grad = torch.zeros_like(parameter)
        norm = parameter.grad.norm().item()
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], adam.grad_clip_norm)
        optimizer.step()
        (output,) = run(trainer, OptimStep("m", adam))
        assert isinstance(output, StepOutput)
        assert output.metrics == {"learning_rate:mean": 1e-2, "unclipped_grad_l2:mean": pytest.approx(norm, rel=1e-5)}
        torch.testing.assert_close(parameters_of(trainer, "m"), parameter.data, atol=1e-6, rtol=1e-6)
        assert gradient_of(trainer, "m") is None


@pytest.mark.parametrize("params", [AdamParams(), DimuonParams(1e-2)], ids=["adamw", "dimuon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_refused_and_cleared(trainer_of, value, params):
    trainer, is_adam, data = trainer_of(), isinstance(params, AdamParams), [make_datum(1, 20)]
    run(trainer, CreateModel("m", LoraConfig(rank=8), "adamw" if is_adam else "dimuon"))
    run(trainer, forward_backward("m", data), OptimStep("m", params), forward_backward("m", data))
    adapter = trainer._adapters["m"]
    state = [tensor.clone() for tensor in (adapter.parameters, *adapter.moments.values())]
    assert len(state) == (3 if is_adam else 2)
    adapter.gradient[5] = value
    (failure,) = run(trainer, OptimStep("m", params))
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert "not finite" in failure.error
    for before, after in zip(state, (adapter.parameters, *adapter.moments.values()), strict=True):
        assert torch.equal(before, after)
    assert (adapter.steps, adapter.gradient) == (1, None)
    results = run(trainer, forward_backward("m", data), OptimStep("m", params))
    assert isinstance(results[1], StepOutput)


def test_a_step_to_nowhere_is_refused(trainer_of):
    """A fresh adapter's A has gradients of exactly zero, and 0 / (0 + eps) with eps 0 is no number."""
    trainer = trainer_of()
    run(trainer, *shaken("m")[:1], forward_backward("m", [make_datum(1, 20)]))
    before = parameters_of(trainer, "m").clone()
    (failure,) = run(trainer, OptimStep("m", AdamParams(eps=0)))
    assert isinstance(failure, Failure)
    assert "eps 0" in failure.error
    assert torch.equal(parameters_of(trainer, "m"), before)
    assert gradient_of(trainer, "m") is None, "as a recovery leaves it, which replays no failed step"


@pytest.mark.parametrize(
    "family, params, words",
    [
        ("dimuon", AdamParams(), "optimizer is dimuon, .* adamw's"),
        ("adamw", DimuonParams(1e-3), "optimizer is adamw, .* dimuon's"),
        ("dimuon", DimuonParams(-1.0), "learning_rate must be"),
        ("dimuon", DimuonParams(float("nan")), "learning_rate must be"),
        ("dimuon", DimuonParams(1e-3, beta1=1.0), "beta1 must be"),
        ("dimuon", DimuonParams(1e-3, grad_clip_norm=float("inf")), "grad_clip_norm must be"),
        ("dimuon", DimuonParams(3e38), "would make weights infinite"),
    ],
)
def test_a_step_of_another_family_or_out_of_range_is_refused(trainer_of, family, params, words):
    trainer = trainer_of()
    run(trainer, CreateModel("m", LoraConfig(rank=32), family), forward_backward("m", [make_datum(1, 20)]))
    before = parameters_of(trainer, "m").clone()
    (failure,) = run(trainer, OptimStep("m", params))
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert re.search(words, failure.error), failure.error
    assert torch.equal(parameters_of(trainer, "m"), before)
    assert trainer._adapters["m"].moments == {}
    assert gradient_of(trainer, "m") is None


def test_a_step_from_a_log_of_the_first_version_is_taken(trainer_of):
    old = {"type": "optim_step", "model_id": "m", "adam": {"learning_rate": 0.05, "beta2": 0.9}}
    states = []
    for step in (decode(msgspec.msgpack.encode(old), TrainOperation), OptimStep("m", AdamParams(0.05, beta2=0.9))):
        trainer = trainer_of()
        run(trainer, CreateModel("m", LoraConfig(rank=4)), forward_backward("m", [make_datum(1, 20)]))
        assert isinstance(run(trainer, step)[0], StepOutput)
        states.append(parameters_of(trainer, "m"))
    assert torch.equal(*states)
