"""Custom losses: what is traced runs as the SDK's own graph does, and a datum that does not fit is refused in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import run_loss_handle, trace_loss
from tinker.types import Datum as SdkDatum
from tinker.types import ModelInput

from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken, together
from tests.engine.loss_graphs import SESSION, inputs_for, reinforce, uploaded
from tinkercloud.engine.custom_loss import custom_loss_named, is_loss_id, loss_id_of, session_of
from tinkercloud.engine.operations import Datum, OperationError
from tinkercloud.engine.results import Failure, LossOutput
from tinkercloud.engine.torch import custom_loss as running
from tinkercloud.engine.torch.custom_loss import Budget, evaluate


def clipped(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages).sum()
    return loss, {"custom/clip:mean": ((ratio < 0.8) | (ratio > 1.2)).float().mean()}


def everything(logprobs, advantages, temperature):
    count = logprobs.shape[0]
    soft = F.logsigmoid(logprobs / temperature) + F.softplus(advantages) - F.relu(advantages)
    masked = torch.where(advantages > 0, soft, 0.0)[advantages != 0.5]
    pairs = torch.sigmoid(logprobs.unsqueeze(0) - logprobs[:, None]).triu(diagonal=1).sum() / max(1, 2)
    best = torch.max(logprobs, dim=0).values + logprobs.sort().values[..., -1]
    ramp = torch.arange(count, device=logprobs.device).to(torch.float64) / float(math.sqrt(16))
    tail = (logprobs[1:].cumsum(0) ** 2).mean() + torch.logsumexp(logprobs, dim=-1) + (logprobs * ramp).float().sum()
    kl = F.kl_div(F.log_softmax(logprobs, dim=0), F.softmax(advantages, dim=0), reduction="sum")
    mixed = torch.stack([pairs, best, tail, kl]).clamp(min=-1e6).sum() + torch.cat([masked, soft]).norm()
    return mixed, {"custom/kl:sum": kl.detach(), "custom/count:sum": torch.ones_like(logprobs).sum()}


def soft_targets(logprobs, weights):
    loss = -(logprobs.logsumexp(-1) * weights.sum(dim=1)).sum() - (logprobs @ weights.T).diagonal().sum()
    return loss, {}


CASES = {
    "reinforce": (reinforce, {"logprobs": 1, "advantages": 1}),
    "clipped": (clipped, {"logprobs": 1, "old": 1, "advantages": 1}),
    "everything": (everything, {"logprobs": 1, "advantages": 1, "temperature": 0}),
    "soft targets": (soft_targets, {"logprobs": 2, "weights": 2}),
}


@pytest.mark.parametrize(("function", "ranks"), CASES.values(), ids=CASES)
def test_a_graph_and_its_gradient_are_those_that_the_sdk_runs(function, ranks):
    handle, loss = trace_loss(function, ranks, SESSION), uploaded(function, ranks)
    for seed in range(3):
        given = inputs_for(ranks, seed)
        start = torch.from_numpy(np.random.default_rng(seed).normal(-3, 1, given["target_tokens"].shape)).float()
        mine, theirs = (start.clone().requires_grad_() for _ in range(2))
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        value, metrics = evaluate(loss, mine, tensors, Budget())
        expected, expected_metrics = handle.graph(theirs, *(tensors[name] for name in handle.input_names))
        assert torch.equal(value, expected)
        assert {name: each.item() for name, each in metrics.items()} == {
            name: each.item() for name, each in expected_metrics.items()
        }
        assert torch.equal(torch.autograd.grad(value, mine)[0], torch.autograd.grad(expected, theirs)[0])


@pytest.mark.parametrize("options", [{}, {"token_budget": 24}], ids=["whole", "cut"])
@pytest.mark.parametrize(("function", "ranks"), CASES.values(), ids=CASES)
def test_one_pass_here_equals_the_clients_two(trainer_of, function, ranks, options):
    loss_id = loss_id_of(SESSION, uploaded(function, ranks))
    data = [
        Datum(make_datum(400 + seed, length).tokens, inputs_for(ranks, seed, length))
        for seed, length in enumerate((9, 4, 17, 9))
    ]
    trainer = trainer_of(**options)
    run(trainer, *shaken("here"), *shaken("sdkx"))
    trainer._adapters["sdkx"].parameters.copy_(trainer._adapters["here"].parameters)
    run(trainer, *shaken("other"))
    here, _ = together(
        trainer,
        forward_backward("here", data, loss="custom", loss_fn_config={"loss_id": loss_id}),
        forward_backward("other", [make_datum(450, 30)]),
    )
    assert isinstance(here, LossOutput)

    zero = [Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"], "weights": _zeros(d)}) for d in data]
    (forward,) = run(trainer, forward_backward("sdkx", zero, forward_only=True))
    logprobs = [torch.from_numpy(output["logprobs"]).requires_grad_() for output in forward.outputs]
    sdk_data = [
        SdkDatum(ModelInput.from_ints(d.tokens.tolist()), {k: v for k, v in d.inputs.items() if k != "target_tokens"})
        for d in data
    ]
    total, metrics = run_loss_handle(trace_loss(function, ranks, SESSION), sdk_data, logprobs)
    total.backward()
    weighted = [
        Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"], "weights": -lp.grad.numpy()})
        for d, lp in zip(data, logprobs, strict=True)
    ]
    run(trainer, forward_backward("sdkx", weighted))
    assert here.metrics.pop("loss:sum") == pytest.approx(total.item(), rel=1e-6)
    assert here.metrics.pop("tokens:sum") == 39
    assert here.metrics == pytest.approx(metrics, rel=1e-6)
    ours, theirs = gradient_of(trainer, "here"), gradient_of(trainer, "sdkx")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
    for output, other in zip(here.outputs, forward.outputs, strict=True):
        np.testing.assert_allclose(output["logprobs"], other["logprobs"], atol=1e-6)


def _zeros(datum: Datum) -> np.ndarray:
    return np.zeros(datum.inputs["target_tokens"].shape, np.float32)


def test_every_name_that_may_be_called_has_its_function():
    assert {name for name in running.names.FUNCTIONS if name != "getattr"} == running.FUNCTIONS.keys()
    assert set(running.names.METHODS) == running.METHODS.keys()
    assert not [
        name
        for name in (*running.FUNCTIONS, *running.METHODS)
        if name.endswith("_") and "and_" not in name and "or_" not in name
    ]


def test_an_id_is_the_loss():
    loss = uploaded(*CASES["everything"])
    loss_id = loss_id_of(SESSION, loss)
    assert is_loss_id(loss_id) and session_of(loss_id) == SESSION
    assert custom_loss_named({"loss_id": loss_id}) == loss
    assert loss_id_of(SESSION, uploaded(*CASES["everything"])) == loss_id
    for wrong in ("", "nothing", f"{SESSION}:custom-loss:", loss_id[:-8], loss_id + "AAAA"[:3], 3.0):
        with pytest.raises(OperationError, match="loss_id"):
            custom_loss_named({"loss_id": wrong})
    with pytest.raises(OperationError, match="and nothing else"):
        custom_loss_named({"loss_id": loss_id, "beta": 1.0})


def not_a_number(logprobs):
    return (logprobs - logprobs).log().sum() * 0.0, {}


def steep(logprobs):
    return (logprobs * 0.0).abs().sqrt().sum(), {}


def constant(logprobs):
    return torch.ones_like(logprobs).sum(), {}


def vector(logprobs):
    return logprobs * 2, {}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (not_a_number, "loss of datum 0 is not finite|gradient of custom loss 'not_a_number' of datum 0"),
        (steep, "gradient of custom loss 'steep' of datum 0 is not finite"),
        (vector, "must be a scalar tensor, not \\[9\\]"),
        (constant, None),
    ],
)
def test_odd_losses(trainer_of, function, says):
    loss_id = loss_id_of(SESSION, uploaded(function, {"logprobs": 1}))
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    datum = Datum(make_datum(1, 9).tokens, inputs_for({"logprobs": 1}, 3))
    (result,) = run(trainer, forward_backward("m", [datum], loss="custom", loss_fn_config={"loss_id": loss_id}))
    if says is None:
        assert result.metrics["loss:sum"] == 9 and not gradient_of(trainer, "m").any()
    else:
        assert isinstance(result, Failure) and result.category == "user"
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(result.error)


def test_datums_must_fit_the_declaration(trainer_of):
    loss_id = loss_id_of(SESSION, uploaded(*CASES["reinforce"]))
    good = inputs_for({"logprobs": 1, "advantages": 1}, 1)
    wrong = {
        "missing: advantages": {"target_tokens": good["target_tokens"]},
        "advantages has rank 2": good | {"advantages": np.ones((9, 2), np.float32)},
        "logprobs has rank 2": inputs_for({"logprobs": 2}, 1) | {"advantages": good["advantages"]},
        "advantages has NaN": good | {"advantages": np.full(9, np.nan, np.float32)},
    }
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    for says, inputs in wrong.items():
        data = [Datum(make_datum(1, 9).tokens, each) for each in (good, inputs)]
        (failure,) = run(trainer, forward_backward("m", data, loss="custom", loss_fn_config={"loss_id": loss_id}))
        assert isinstance(failure, Failure) and "datum 1: " in failure.error and says in failure.error
