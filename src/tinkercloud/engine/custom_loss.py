"""Custom losses: a function that a client has traced, as plain data, judged before anything is run.

The SDK's `ServiceClient.create_custom_loss` uploads the graph, `forward_backward` then names it by `loss_fn` "custom"
and `loss_id` in `loss_fn_config`. The id *is* the graph, compressed, with its session: whatever has the id has the
loss, so that a replayed or repeated request needs nothing that could be lost. Who makes an id by hand gains nothing,
since it is judged as an upload is.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from tinkercloud.engine.custom_operations import ATTRIBUTES, DTYPES, FUNCTIONS, METHODS, TEXTS, public_name
from tinkercloud.engine.operations import OperationError

CUSTOM = "custom"
"""The `loss_fn` of every custom loss."""

MAX_INPUTS = 16
MAX_NODES = 500
MAX_DEPTH = 6
"""Levels of nested arguments."""
MAX_BYTES = 128 * 1024
"""Bytes of a loss as JSON."""

_MARK = ":custom-loss:"
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


class CustomLossInput(Struct, frozen=True):
    name: str
    rank: int
    """0 is a scalar, 1 [T], 2 [T, K]."""


class Node(Struct, frozen=True):
    """One step of a traced function (SDK `types.CustomLossNode`)."""

    op: str
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class CustomLoss(Struct, frozen=True):
    """A function of one datum: (logprobs, *inputs) -> (scalar loss, scalar metrics)."""

    name: str
    inputs: tuple[CustomLossInput, ...]
    """logprobs first, then the `loss_fn_inputs` that it reads."""
    nodes: tuple[Node, ...]

    @property
    def reads(self) -> list[str]:
        """The `loss_fn_inputs` that a datum must have, target_tokens first."""
        return list(dict.fromkeys(["target_tokens", *(wanted.name for wanted in self.inputs[1:])]))


def custom_loss_from(name: str, inputs: Any, nodes: Any) -> CustomLoss:
    """The loss of an upload. OperationError says what it may not have."""
    try:
        loss = msgspec.convert({"name": name, "inputs": inputs, "nodes": nodes}, CustomLoss)
        size = len(msgspec.json.encode(loss))
    except (msgspec.MsgspecError, RecursionError, TypeError, UnicodeError) as error:
        raise OperationError(f"custom loss: {error}") from None
    if size > MAX_BYTES:
        raise OperationError(f"custom loss: its graph is {size} bytes of JSON; at most {MAX_BYTES} are taken")
    problem = _problem_of_inputs(loss.inputs) or _problem_of_nodes(loss)
    if problem:
        raise OperationError(f"custom loss {loss.name[:80]!r}: {problem}")
    return loss


def loss_id_of(session_id: str, loss: CustomLoss) -> str:
    """The id that a client is given."""
    packed = base64.urlsafe_b64encode(zlib.compress(msgspec.json.encode(loss), 9)).decode()
    return f"{session_id}{_MARK}{packed}"


def is_loss_id(text: str) -> bool:
    return _MARK in text


def session_of(loss_id: str) -> str:
    return loss_id.partition(_MARK)[0]


def custom_loss_named(config: Mapping[str, float | str]) -> CustomLoss:
    """The loss of a request's `loss_fn_config`. OperationError if there is none, or anything else."""
    loss_id = config.get("loss_id")
    if not isinstance(loss_id, str) or len(config) != 1 or not is_loss_id(loss_id):
        raise OperationError(
            "loss_fn_config of custom must be {'loss_id': ...} with an id from create_custom_loss, and nothing else"
        )
    unpack = zlib.decompressobj()
    try:
        packed = base64.b64decode(loss_id.partition(_MARK)[2], altchars=b"-_", validate=True)
        given = msgspec.json.decode(unpack.decompress(packed, MAX_BYTES))
        if unpack.eof and not unpack.unused_data:
            return custom_loss_from(given["name"], given["inputs"], given["nodes"])
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error, msgspec.MsgspecError):
        pass  # the same sentence for every kind of damage
    raise OperationError("this loss_id is damaged; send the one that create_custom_loss gave")


def _problem_of_inputs(inputs: tuple[CustomLossInput, ...]) -> str | None:
    if not 1 <= len(inputs) <= MAX_INPUTS or inputs[0].name != "logprobs":
        return f"it must take logprobs first, and at most {MAX_INPUTS} inputs"
    if len({wanted.name for wanted in inputs}) < len(inputs):
        return "an input is named twice"
    for wanted in inputs:
        if not _INPUT_NAME.fullmatch(wanted.name):
            return f"{wanted.name[:80]!r} is no name of an input; use lower case, digits and underscores"
        if not (1 if wanted.name == "logprobs" else 0) <= wanted.rank <= 2:
            return f"rank {wanted.rank} of {wanted.name}: 1 or 2 for logprobs, 0 to 2 for others"
    return None


def _problem_of_nodes(loss: CustomLoss) -> str | None:
    if not 2 <= len(loss.nodes) <= MAX_NODES:
        return f"its graph has {len(loss.nodes)} nodes; 2 to {MAX_NODES} are taken"
    known: set[str] = set()
    parameters = []
    for place, node in enumerate(loss.nodes):
        where = f"node {node.name[:80]!r}"
        last = place == len(loss.nodes) - 1
        if (node.op == "output") != last:
            return f"{where}: the last node, and no other, must be the output"
        if problem := _problem_of_target(node) or _problem_of_arguments(node, known):
            return f"{where}: {problem}"
        if node.op == "placeholder":
            parameters.append(node.target)
        if node.name in known:
            return f"{where}: its name is another node's"
        known.add(node.name)
    if parameters != [wanted.name for wanted in loss.inputs]:
        return f"its graph takes {', '.join(parameters)[:200]}; inputs must name the same, in this order"
    return _problem_of_output(loss.nodes[-1], known)


def _problem_of_target(node: Node) -> str | None:
    match node.op:
        case "placeholder" | "output":
            return None
        case "call_function":
            name = public_name(node.target)
            if name == "getattr":
                if len(node.args) != 2 or node.args[1] not in ATTRIBUTES or node.kwargs:
                    return f"it may read the attributes {', '.join(ATTRIBUTES)} only"
                return None
            return None if name in FUNCTIONS else f"this server's custom losses cannot call {node.target[:80]}"
        case "call_method":
            if node.target in METHODS:
                return None
            return f"this server's custom losses cannot call the method {node.target[:80]!r} of a tensor"
    return f"{node.op[:80]!r} is not among placeholder, call_function, call_method and output"


def _problem_of_arguments(node: Node, known: set[str]) -> str | None:
    if node.op == "placeholder" and (node.args or node.kwargs):
        return "an input has no default"
    for name, value in node.kwargs.items():
        if name == "out" or (name == "inplace" and value is not False):
            return f"{name} would write into a tensor; leave it out"
    if node.op == "call_function" and public_name(node.target) == "getattr":
        return _problem_of_value(node.args[0], known, MAX_DEPTH)
    if node.op == "output":
        return None if len(node.args) == 1 else "it returns one value"
    for value in [*node.args, *node.kwargs.values()]:
        if problem := _problem_of_value(value, known, MAX_DEPTH):
            return problem
    return None


def _problem_of_value(value: Any, known: set[str], depth: int) -> str | None:
    if depth == 0:
        return f"its arguments are nested more than {MAX_DEPTH} deep"
    parts: list[Any] = []
    match value:
        case None | bool() | float():
            pass
        case int():
            return None if abs(value) < 2**53 else "an integer is 2**53 or more"
        case str():
            return None if value in TEXTS else f"the text {value[:80]!r} is not among {', '.join(TEXTS)}"
        case list():
            parts = value
        case dict() if len(value) == 1:
            ((kind, inner),) = value.items()
            match kind, inner:
                case "ref", str():
                    return None if inner in known else f"{inner[:80]!r} is no node before it"
                case ("tuple", list()) | ("slice", [_, _, _]):
                    parts = inner
                case "dict", dict():
                    parts = list(inner.values())
                case "ellipsis", True:
                    pass
                case "float", ("inf" | "-inf" | "nan"):
                    pass
                case "dtype", str():
                    return None if inner in DTYPES else f"dtype {inner[:80]!r} is not among {', '.join(DTYPES)}"
                case (("device" | "layout" | "memory_format"), str()):
                    pass
                case _:
                    return f"an argument {kind[:80]!r} is of no form that this server knows"
        case _:
            return "an argument is of no form that this server knows"
    return next((problem for part in parts if (problem := _problem_of_value(part, known, depth - 1))), None)


def _problem_of_output(node: Node, known: set[str]) -> str | None:
    """The output must be (a node, {metric name: a node})."""
    match node.args:
        case [{"tuple": [loss, {"dict": dict(metrics)}]} | [loss, {"dict": dict(metrics)}]]:
            pass
        case _:
            return "it must return (loss, metrics)"
    if wrong := next((name for name in metrics if not _METRIC_NAME.fullmatch(name)), None):
        return f"metric {wrong[:80]!r} must be named custom/<name>:sum or custom/<name>:mean in lower case"
    for name, value in {"the loss": loss, **metrics}.items():
        if not (isinstance(value, dict) and list(value) == ["ref"]):
            return f"{name} must be a tensor"
        if problem := _problem_of_value(value, known - {node.name}, MAX_DEPTH):
            return problem
    return None
