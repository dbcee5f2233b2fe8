"""Custom losses: what is traced runs as the SDK's own graph does; what is hostile is refused, quickly and in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, run_loss_handle, trace_loss
from tinker.types import Datum as SdkDatum
from tinker.types import ModelInput

from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken, together
from tinkercloud.engine.custom_loss import (
    MAX_NODES,
    CustomLoss,
    custom_loss_from,
    custom_loss_named,
    is_loss_id,
    loss_id_of,
    session_of,
)
from tinkercloud.engine.torch import custom_loss as running
from tinkercloud.engine.torch.custom_loss import Budget, evaluate
from tinkercloud.engine.types import Datum, Failure, LossOutput, OperationError

SESSION = "a-session"


def uploaded(function, ranks: dict[str, int]) -> CustomLoss:
    """A function as it arrives, traced and encoded by the SDK."""
    handle = trace_loss(function, ranks, SESSION)
    graph = encode_graph(handle).model_dump(mode="json")
    return custom_loss_from(handle.name, [vars(each) for each in handle.inputs], graph["nodes"])


def reinforce(logprobs, advantages):
    loss = -(logprobs * advantages).sum()
    return loss, {"custom/nll:mean": -logprobs.mean(), "custom/loss:sum": loss}


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


def inputs_for(ranks: dict[str, int], seed: int, length: int = 9) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {0: (), 1: (length,), 2: (length, 3)}
    given = {"target_tokens": random.integers(0, 96, shapes[ranks["logprobs"]])}
    for name, rank in ranks.items():
        if name != "logprobs":
            given[name] = np.asarray(random.normal(1.0, 0.5, shapes[rank]), np.float32)
    return given


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


# ---------------------------------------------------------------- hostile graphs


LP = {"ref": "logprobs"}


def node(op: str, name: str, target: str, *args, **kwargs) -> dict:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def call(target: str, *args, name: str = "x", **kwargs) -> dict:
    return node("call_function", name, target, *args, **kwargs)


def method(target: str, *args, name: str = "x", **kwargs) -> dict:
    return node("call_method", name, target, *args, **kwargs)


def graph(*nodes: dict, result="x") -> list[dict]:
    """A graph of one input whose loss is the sum of node `result`."""
    return [
        node("placeholder", "logprobs", "logprobs"),
        *nodes,
        method("sum", {"ref": result}, name="loss"),
        node("output", "output", "output", {"tuple": [{"ref": "loss"}, {"dict": {}}]}),
    ]


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = {
    "eval": (graph(call("builtins.eval", "1")), "cannot call builtins.eval"),
    "import": (graph(call("builtins.__import__", "os")), "cannot call builtins.__import__"),
    "os": (graph(call("os.system", "true")), "cannot call os.system"),
    "load": (graph(call("torch.load", "x")), "cannot call torch.load"),
    "walk": (graph(call("torch.serialization.os.system", "x")), "cannot call torch.serialization"),
    "operator": (graph(call("operator.attrgetter", "__class__")), "cannot call operator.attrgetter"),
    "methodcaller": (graph(call("operator.methodcaller", "tolist")), "cannot call operator.methodcaller"),
    "dunder": (graph(call("getattr", LP, "__class__")), "may read the attributes shape"),
    "data": (graph(call("builtins.getattr", LP, "data")), "may read the attributes shape"),
    "default": (graph(call("getattr", LP, "shape", 3)), "may read the attributes shape"),
    "computed attribute": (graph(call("getattr", LP, {"ref": "logprobs"})), "may read the attributes shape"),
    "item": (graph(method("item", LP)), "cannot call the method 'item'"),
    "backward": (graph(method("backward", LP)), "cannot call the method 'backward'"),
    "hook": (graph(method("register_hook", LP, 1)), "cannot call the method 'register_hook'"),
    "in place": (graph(method("add_", LP, 1)), "cannot call the method 'add_'"),
    "set": (graph(call("operator.setitem", LP, 0, 1.0)), "cannot call operator.setitem"),
    "out": (graph(call("torch.exp", LP, out=LP)), "out would write"),
    "inplace": (graph(call("torch.nn.functional.relu", LP, inplace=True)), "inplace would write"),
    "random": (graph(call("torch.rand", 3)), "cannot call torch.rand"),
    "dropout": (graph(call("torch.nn.functional.dropout", LP)), "cannot call torch.nn.functional.dropout"),
    "module": (graph(node("call_module", "x", "layer", LP)), "'call_module' is not among"),
    "attribute": (graph(node("get_attr", "x", "weight")), "'get_attr' is not among"),
    "no op": (graph(node("jump", "x", "y")), "'jump' is not among"),
    "ahead": (graph(call("torch.exp", {"ref": "loss"})), "'loss' is no node before it"),
    "itself": (graph(call("torch.exp", {"ref": "x"})), "'x' is no node before it"),
    "twice": (graph(call("torch.exp", LP), call("torch.exp", LP)), "its name is another node's"),
    "text": (graph(call("torch.norm", LP, "nuc")), "the text 'nuc' is not among"),
    "path": (graph(call("torch.exp", "/etc/passwd")), "the text '/etc/passwd' is not among"),
    "form": (graph(call("torch.exp", {"pickle": "x"})), "'pickle' is of no form"),
    "two keys": (graph(call("torch.exp", {"ref": "logprobs", "tuple": []})), "of no form"),
    "dtype": (graph(call("torch.zeros", 3, dtype={"dtype": "complex64"})), "dtype 'complex64' is not among"),
    "deep": (graph(call("torch.stack", nested(50))), "nested more than"),
    "very deep": (graph(call("torch.stack", nested(5000))), "custom loss"),
    "integer": (graph(call("operator.add", LP, 2**60)), "2\\*\\*53"),
    "many nodes": (
        graph(*(call("torch.exp", LP, name=f"n{i}") for i in range(MAX_NODES)), call("torch.exp", LP)),
        "nodes",
    ),
    "many bytes": (graph(call("torch.stack", [0.5] * 100_000)), "bytes of JSON"),
    "another input": (
        [node("placeholder", "y", "secrets"), *graph(call("torch.exp", LP))],
        "inputs must name the same",
    ),
    "no output": (graph(call("torch.exp", LP))[:-1], "must be the output"),
    "early output": (graph(node("output", "o", "output", LP), call("torch.exp", LP)), "must be the output"),
    "no loss": ([*graph(call("torch.exp", LP))[:-1], node("output", "o", "output", 3.0)], "must return"),
    "metric name": (
        [
            *graph(call("torch.exp", LP))[:-1],
            node("output", "o", "output", {"tuple": [LP, {"dict": {"loss:sum": LP}}]}),
        ],
        "must be named custom/",
    ),
    "metric value": (
        [
            *graph(call("torch.exp", LP))[:-1],
            node("output", "o", "output", {"tuple": [LP, {"dict": {"custom/a:sum": 1.0}}]}),
        ],
        "must be a tensor",
    ),
    "no nodes": ([], "nodes"),
    "no node": ([3], "custom loss"),
    "no list": ("graph", "custom loss"),
}


@pytest.mark.parametrize(("nodes", "says"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_graph_may_not_have_is_refused_before_it_runs(nodes, says):
    with pytest.raises(OperationError, match=says):
        custom_loss_from("hostile", [{"name": "logprobs", "rank": 1}], nodes)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "logprobs first"),
        ([{"name": "advantages", "rank": 1}], "logprobs first"),
        ([{"name": "logprobs", "rank": 0}], "rank 0 of logprobs"),
        ([{"name": "logprobs", "rank": 1}, {"name": "logprobs", "rank": 1}], "named twice"),
        ([{"name": "logprobs", "rank": 1}, {"name": "A b", "rank": 1}], "is no name of an input"),
        ([{"name": "logprobs", "rank": 1}, {"name": "a", "rank": 3}], "rank 3 of a"),
        ([{"name": "logprobs", "rank": 1}, *({"name": f"a{i}", "rank": 1} for i in range(16))], "at most 16 inputs"),
        ([{"name": "logprobs", "rank": "1"}], "custom loss"),
    ],
)
def test_wrong_inputs_are_named(inputs, says):
    with pytest.raises(OperationError, match=says):
        custom_loss_from("hostile", inputs, graph(call("torch.exp", LP)))


def doubling(times: int) -> list[dict]:
    """Each node's result has twice the elements of the one before."""
    first = call("torch.exp", LP, name="n0")
    more = [call("torch.cat", [{"ref": f"n{i}"}, {"ref": f"n{i}"}], name=f"n{i + 1}") for i in range(times)]
    return graph(first, *more, result=f"n{times}")


EXHAUSTING = {
    "zeros": (graph(call("torch.zeros", {"tuple": [2**40]})), "would compute too much"),
    "ones of many": (graph(call("torch.ones", 2**20, 2**20)), "would compute too much"),
    "arange": (graph(call("torch.arange", 2**50)), "compute too much"),
    "repeat": (graph(method("repeat", LP, 2**40)), "would compute too much"),
    "expand": (graph(method("expand", LP, 2**30, 8)), "would compute too much"),
    "pad": (graph(call("torch.nn.functional.pad", LP, {"tuple": [0, 2**34]})), "would compute too much"),
    "doubling": (doubling(40), "would compute too much"),
    "outer": (
        graph(
            call("torch.ones", 2**13, name="a"),
            call("torch.outer", {"ref": "a"}, {"ref": "a"}),
        ),
        "would compute too much",
    ),
    "products": (
        graph(
            call("torch.ones", 2**12, 2**12, name="a0"),
            *(call("torch.mm", {"ref": f"a{i}"}, {"ref": "a0"}, name=f"a{i + 1}") for i in range(3)),
            result="a3",
        ),
        "would compute too much",
    ),
    "pieces": (graph(call("torch.ones", 2**20, name="a"), method("unbind", {"ref": "a"})), "not cut into pieces"),
    "power of numbers": (
        graph(call("operator.pow", 10.5, 2**50, name="a"), call("operator.mul", LP, {"ref": "a"})),
        "out of range|too large",
    ),
    "growing integer": (
        graph(
            call("operator.mul", 2**50, 2**50, name="a"),
            call("operator.mul", LP, {"ref": "a"}),
        ),
        "no number below",
    ),
    "repeated list": (
        graph(call("operator.mul", {"tuple": [1, 2]}, 2**50, name="a"), call("torch.zeros", {"ref": "a"})),
        "must be tensors or numbers",
    ),
    "complex": (graph(call("operator.pow", -1.0, 0.5, name="a"), call("torch.exp", LP)), "no number"),
    "shape": (graph(call("torch.reshape", LP, {"tuple": [3, 3, 3]})), "shape"),
    "type": (graph(call("torch.exp", 3.0)), "exp"),
    "method of a number": (
        graph(call("operator.getitem", {"tuple": [1, 2]}, 0, name="a"), method("exp", {"ref": "a"})),
        "called on a tensor",
    ),
    "index": (graph(call("operator.getitem", LP, 99)), "index"),
    "device": (
        graph(method("to", LP, {"device": "cuda:7"}), call("torch.zeros", {"tuple": [2**40]}, name="y")),
        "much",
    ),
}


@pytest.mark.parametrize(("nodes", "says"), EXHAUSTING.values(), ids=EXHAUSTING)
def test_what_would_take_too_much_or_fails_is_the_users_and_harms_nobody(trainer_of, nodes, says):
    loss_id = loss_id_of(SESSION, custom_loss_from("hostile", [{"name": "logprobs", "rank": 1}], nodes))
    trainer = trainer_of()
    run(trainer, *shaken("m"), *shaken("other"), forward_backward("m", [make_datum(1, 5)]))
    before = gradient_of(trainer, "m").clone()
    data = [Datum(make_datum(2, 8).tokens, {"target_tokens": make_datum(2, 8).inputs["target_tokens"]})]
    failure, other = together(
        trainer,
        forward_backward("m", data, loss="custom", loss_fn_config={"loss_id": loss_id}),
        forward_backward("other", [make_datum(3, 7)]),
    )
    assert isinstance(failure, Failure) and failure.category == "user", failure
    assert "datum 0: custom loss 'hostile'" in failure.error
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(failure.error)
    assert torch.equal(gradient_of(trainer, "m"), before)
    assert isinstance(other, LossOutput)


def test_the_work_of_a_request_is_bounded_over_its_datums(trainer_of, monkeypatch):
    monkeypatch.setattr(running, "MAX_WORK", 100)
    loss_id = loss_id_of(SESSION, uploaded(reinforce, {"logprobs": 1, "advantages": 1}))
    data = [Datum(make_datum(1, 8).tokens, inputs_for({"logprobs": 1, "advantages": 1}, 1, 8)) for _ in range(4)]
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    request = {"loss": "custom", "loss_fn_config": {"loss_id": loss_id}}
    (fine,) = run(trainer, forward_backward("m", data[:1], **request))
    assert isinstance(fine, LossOutput)
    (failure,) = run(trainer, forward_backward("m", data, **request))
    assert isinstance(failure, Failure) and "send fewer datums" in failure.error


def test_a_loss_cannot_change_its_inputs(trainer_of):
    """relu's second argument makes it write into its first."""
    nodes = [
        node("placeholder", "logprobs", "logprobs"),
        node("placeholder", "a", "advantages"),
        call("torch.nn.functional.relu", {"ref": "a"}, True),
        call("operator.mul", {"ref": "logprobs"}, {"ref": "x"}, name="y"),
        method("sum", {"ref": "y"}, name="loss"),
        node("output", "output", "output", {"tuple": [{"ref": "loss"}, {"dict": {}}]}),
    ]
    inputs = [{"name": "logprobs", "rank": 1}, {"name": "advantages", "rank": 1}]
    loss_id = loss_id_of(SESSION, custom_loss_from("writer", inputs, nodes))
    given = inputs_for({"logprobs": 1, "advantages": 1}, 3) | {"advantages": np.full(9, -1.0, np.float32)}
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    (result,) = run(
        trainer,
        forward_backward(
            "m", [Datum(make_datum(1, 9).tokens, given)], loss="custom", loss_fn_config={"loss_id": loss_id}
        ),
    )
    assert result.metrics["loss:sum"] == 0
    assert (given["advantages"] == -1).all()


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
