"""Custom losses: what would compute too much, fails or writes is its user's failure and harms nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken, together
from tests.engine.loss_graphs import LP, SESSION, call, graph, inputs_for, method, node, reinforce, uploaded
from tinkercloud.engine.custom_loss import custom_loss_from, loss_id_of
from tinkercloud.engine.operations import Datum
from tinkercloud.engine.results import Failure, LossOutput
from tinkercloud.engine.torch import custom_loss as running


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
