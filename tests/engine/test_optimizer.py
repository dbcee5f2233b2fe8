"""AdamW against torch.optim.AdamW, and all or nothing."""

from __future__ import annotations

import pytest
import torch

from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken
from tinkercloud.engine.types import AdamParams, Failure, OptimStep, StepOutput

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
        expected = {"learning_rate:mean": 1e-2}
        if adam.grad_clip_norm:
            expected["unclipped_grad_l2:mean"] = pytest.approx(norm, rel=1e-5)
        assert output.metrics == expected
        torch.testing.assert_close(parameters_of(trainer, "m"), parameter.data, atol=1e-6, rtol=1e-6)
        assert gradient_of(trainer, "m") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_refused_and_cleared(trainer_of, value):
    trainer = trainer_of()
    run(trainer, *shaken("m"), forward_backward("m", [make_datum(1, 20)]))
    adapter = trainer._adapters["m"]
    state = [tensor.clone() for tensor in (adapter.parameters, adapter.first_moment, adapter.second_moment)]
    adapter.gradient[5] = value
    (failure,) = run(trainer, OptimStep("m", AdamParams()))
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert "not finite" in failure.error
    for before, after in zip(state, (adapter.parameters, adapter.first_moment, adapter.second_moment), strict=True):
        assert torch.equal(before, after)
    assert (adapter.steps, adapter.gradient) == (1, None)
    results = run(trainer, forward_backward("m", [make_datum(1, 20)]), OptimStep("m", AdamParams()))
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
