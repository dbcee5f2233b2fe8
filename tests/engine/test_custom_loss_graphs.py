"""Custom losses: what a graph may not have is refused before anything of it runs."""

from __future__ import annotations

import pytest

from tests.engine.loss_graphs import LP, call, graph, method, node
from tinkercloud.engine.custom_loss import MAX_NODES, custom_loss_from
from tinkercloud.engine.operations import OperationError


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
