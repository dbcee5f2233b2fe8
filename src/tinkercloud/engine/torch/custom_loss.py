"""Custom losses, run: each node of a judged graph is one call of a function in the tables below, and of nothing else.

Before a node computes anything, it is computed on the shapes alone; what would be too large is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinkercloud.engine import custom_operations as names
from tinkercloud.engine.custom_loss import CustomLoss, Node
from tinkercloud.engine.operations import OperationError

MAX_ELEMENTS = 2**24
"""Elements of one result."""

MAX_RESULTS = 2**26
"""Elements of all results of one datum together: 256 MiB of float32."""

MAX_WORK = 2**28
"""Elements that an operation may read and write, all its datums together: some seconds."""

PRODUCTS_PER_ELEMENT = 64
"""Multiplications of a matrix product that take as long as one element elsewhere."""

Value = Any
"""Of a node: a tensor, a number, a shape, a dtype, or a tuple of such."""

FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{f"torch.{name}": getattr(torch, name) for name in names.TORCH},
    **{f"torch.nn.functional.{name}": getattr(torch.nn.functional, name) for name in names.FUNCTIONAL},
    **{f"operator.{name}": getattr(operator, name) for name in names.OPERATORS},
    **{f"math.{name}": getattr(math, name) for name in names.MATH},
}
METHODS: dict[str, Callable[..., Value]] = {name: getattr(Tensor, name) for name in names.METHODS}
ATTRIBUTES: dict[str, Callable[[Value], Value]] = {name: operator.attrgetter(name) for name in names.ATTRIBUTES}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.DTYPES}
_CREATION = {f"torch.{name}" for name in names.CREATION}
_PRODUCTS = {"dot", "matmul", "mm", "mv", "bmm", "torch.dot", "torch.matmul", "torch.mm", "torch.mv", "torch.bmm"} | {
    "operator.matmul"
}
_PIECES = {"unbind", "split", "chunk", "torch.unbind", "torch.split", "torch.chunk"}
_MAX_PIECES = 4096
_UNSIZED = {"masked_select", "torch.masked_select", "operator.getitem"}
"""What may select by a mask: the result's size depends on the values, but is at most the argument's."""


class Budget:
    """What an operation may still compute."""

    def __init__(self) -> None:
        self.sizes: dict[Any, int] = {}
        """Elements of a node's result by what they depend on."""
        self.start()

    def start(self) -> None:
        """Of a whole pass over the datums."""
        self.work, self.results = MAX_WORK, MAX_RESULTS

    def take(self, work: int, results: int) -> None:
        """ValueError if it is too much."""
        self.work, self.results = self.work - work, self.results - results
        if results > MAX_ELEMENTS or self.results < 0 or self.work < 0:
            raise ValueError(
                f"with its result of {results} elements the loss would compute too much; it may have {MAX_ELEMENTS} at "
                f"a time, {MAX_RESULTS} for a datum, and read and write {MAX_WORK} for a request: send fewer datums"
            )


def evaluate(
    loss: CustomLoss, logprobs: Tensor, inputs: Mapping[str, Tensor], budget: Budget
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics), scalars each, of one datum. OperationError names the node that went wrong."""
    values: dict[str, Value] = {}
    budget.results = MAX_RESULTS
    for node in loss.nodes:
        try:
            match node.op:
                case "placeholder":
                    values[node.name] = logprobs if node.target == "logprobs" else inputs[node.target]
                case "output":
                    return _returned(_decoded(node.args[0], values, logprobs.device))
                case _:
                    values[node.name] = _call(node, values, logprobs.device, budget)
        except Exception as error:  # whatever torch has against these arguments
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            raise OperationError(f"custom loss {loss.name!r}, node {node.name!r} ({node.target}): {reason}") from None
    raise AssertionError("a judged graph ends with its output")


def _call(node: Node, values: dict[str, Value], device: torch.device, budget: Budget) -> Value:
    """A node's value."""
    args = [_decoded(value, values, device) for value in node.args]
    kwargs = {name: _decoded(value, values, device) for name, value in node.kwargs.items()}
    if node.op == "call_method":
        name, function = node.target, METHODS[node.target]
        if not args or not isinstance(args[0], Tensor):
            raise TypeError("a method is called on a tensor")
    else:
        name = names.public_name(node.target)
        if name == "getattr":
            if not isinstance(args[0], (Tensor, tuple)):
                raise TypeError("attributes are read of a tensor")
            return ATTRIBUTES[args[1]](args[0])
        function = FUNCTIONS[name]
    if name in _CREATION:
        kwargs["device"] = device
    if name.startswith("math.") or (name.startswith("operator.") and not _has_tensor(args)):
        return _number(name, function, args, kwargs)
    given = sum(part.numel() for part in _parts([args, list(kwargs.values())]) if isinstance(part, Tensor))
    if name in _PIECES and args[0].numel() > _MAX_PIECES:
        raise ValueError(f"a tensor of more than {_MAX_PIECES} elements is not cut into pieces; index it instead")
    if name in _UNSIZED and _has_mask(args[1:]):
        results = args[0].numel()
    else:
        key = node.name, _shapes(args), _shapes(list(kwargs.values()))
        if key not in budget.sizes:
            with torch.no_grad():
                like = [_on_meta(value) for value in args], {name: _on_meta(value) for name, value in kwargs.items()}
                budget.sizes[key] = _elements(function(*like[0], **like[1]))
        results = budget.sizes[key]
    products = results * args[0].shape[-1] // PRODUCTS_PER_ELEMENT if name in _PRODUCTS else 0
    budget.take(given + results + products, results)
    return function(*args, **kwargs)


def _number(name: str, function: Callable[..., Value], args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Arithmetic of Python numbers and shapes, which must stay numbers of a bounded size."""
    if name == "operator.getitem":
        if not isinstance(args[0], (tuple, list)):
            raise TypeError("it is no tensor, tuple or shape")
        return function(*args, **kwargs)
    if not all(isinstance(value, (bool, int, float)) for value in args):
        raise TypeError("its arguments must be tensors or numbers")
    if name == "operator.pow":
        args = [float(value) for value in args]
    result = function(*args, **kwargs)
    if isinstance(result, complex) or (isinstance(result, int) and abs(result) >= 2**53):
        raise ValueError("its result is no number below 2**53")
    return result


def _decoded(value: Any, values: dict[str, Value], device: torch.device) -> Value:
    """An argument of the SDK's wire form."""
    if isinstance(value, list):
        return [_decoded(part, values, device) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "ref":
            return values[inner]
        case "tuple":
            return tuple(_decoded(part, values, device) for part in inner)
        case "slice":
            return slice(*(_decoded(part, values, device) for part in inner))
        case "dict":
            return {key: _decoded(part, values, device) for key, part in inner.items()}
        case "ellipsis":
            return ...
        case "float":
            return float(inner)
        case "dtype":
            return DTYPES[inner]
        case "device":
            return device
        case "layout":
            return torch.strided
        case "memory_format":
            return torch.contiguous_format
    raise KeyError(kind)


def _returned(value: Value) -> tuple[Tensor, dict[str, Tensor]]:
    loss, metrics = value
    for name, scalar in {"the loss": loss, **metrics}.items():
        if not isinstance(scalar, Tensor) or scalar.ndim != 0:
            shape = list(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise ValueError(f"{name} must be a scalar tensor, not {shape}")
    return loss, metrics


def _parts(value: Value) -> list[Value]:
    """A value without its lists, tuples and slices."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _parts(part)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value]


def _has_tensor(values: list[Value]) -> bool:
    return any(isinstance(part, Tensor) for part in _parts(values))


def _has_mask(values: list[Value]) -> bool:
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in _parts(values))


def _shapes(values: list[Value]) -> tuple[Value, ...]:
    """All that the size of a result can depend on, its function given."""
    return tuple((part.shape, part.dtype) if isinstance(part, Tensor) else part for part in _parts(values))


def _on_meta(value: Value) -> Value:
    """A value with the shapes of its tensors, without their numbers."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if type(value) in (tuple, list):
        return type(value)(_on_meta(part) for part in value)
    return value


def _elements(value: Value) -> int:
    return sum(part.numel() if isinstance(part, Tensor) else 1 for part in _parts(value))
