"""What an operation minimises, from its target log-probabilities on: a loss of the registry, or a client's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinkercloud.engine.custom_loss import CUSTOM, custom_loss_named
from tinkercloud.engine.losses import loss_config, loss_named
from tinkercloud.engine.operations import ForwardBackward, OperationError
from tinkercloud.engine.torch.custom_loss import Budget, evaluate
from tinkercloud.engine.torch.loss_metrics import loss_metrics
from tinkercloud.engine.torch.losses import LOSS_FUNCTIONS, Targets, sums_of_datums
from tinkercloud.engine.torch.packing import Tile
from tinkercloud.engine.torch.threads import one_thread


class Summary(NamedTuple):
    """What an objective says of all its tiles."""

    loss: float
    per_target: dict[str, Tensor]
    """Arrays to return besides the log-probabilities, [n] each."""
    metrics: dict[str, float]


class Objective(Protocol):
    output_type: str
    input_names: Sequence[str]
    """What tiles must hold of each datum, in the shape of its targets."""
    wants_entropies: bool

    def slopes(self, tile: Tile, logprobs: Tensor) -> Tensor:
        """The loss's derivative by a tile's target log-probabilities, [n]."""
        ...

    def summary(self, tiles: Sequence[Tile], logprobs: Tensor, entropies: Tensor | None) -> Summary:
        """All tiles, given the log-probabilities [n] of all their targets. OperationError if the loss is not finite."""
        ...


def objective_of(operation: ForwardBackward) -> Objective:
    """OperationError if there is no such loss."""
    return CustomObjective(operation) if operation.loss_fn == CUSTOM else RegistryObjective(operation)


class RegistryObjective:
    """A loss of the registry."""

    def __init__(self, operation: ForwardBackward) -> None:
        self._loss = loss = loss_named(operation.loss_fn)
        self._function = LOSS_FUNCTIONS[loss.name]
        self._config = loss_config(loss, operation.loss_fn_config)
        self.output_type = loss.output_type
        self.input_names = [wanted.name for wanted in loss.inputs if wanted.name != "target_tokens"]
        self.wants_entropies = bool(self._config["entropy"])

    def slopes(self, tile: Tile, logprobs: Tensor) -> Tensor:
        with torch.enable_grad():
            logprobs = logprobs.detach().requires_grad_()
            loss, _ = self._function(_targets([tile], logprobs), self._config)
            return torch.autograd.grad(loss.sum(), logprobs)[0]

    def summary(self, tiles: Sequence[Tile], logprobs: Tensor, entropies: Tensor | None) -> Summary:
        targets = _targets(tiles, logprobs)
        elementwise, diagnostics = self._function(targets, self._config)
        sums = sums_of_datums(elementwise, targets.sizes)
        if not sums.isfinite().all():
            raise _not_finite(self._loss.name, _first_not_finite(tiles, elementwise))
        starts = accumulate((tile.num_tokens for tile in tiles), initial=0)
        rows = torch.cat([tile.rows + start for tile, start in zip(tiles, starts, strict=False)]).to(logprobs.device)
        metrics = loss_metrics(self._loss, targets, diagnostics, rows, entropies)
        return Summary(math.fsum(sums.tolist()), {"elementwise_loss": elementwise}, metrics)


class CustomObjective:
    """A client's own loss, datum by datum. It runs on the CPU, as in the client: a wrong index there is an error of its
    request, on a GPU it would end the process. And on one thread: what it sums must not depend on their number."""

    output_type = "CustomLossReturn"
    input_names: Sequence[str] = ()
    wants_entropies = False

    def __init__(self, operation: ForwardBackward) -> None:
        self._data = operation.data
        self._loss = custom_loss_named(operation.loss_fn_config)
        self._budget = Budget()

    @one_thread()
    def slopes(self, tile: Tile, logprobs: Tensor) -> Tensor:
        slopes = []
        for index, part in self._per_datum(tile, logprobs):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss, _ = self._evaluate(index, part)
                (slope,) = torch.autograd.grad(loss, part, allow_unused=True) if loss.requires_grad else (None,)
            if slope is not None and not slope.isfinite().all():
                raise OperationError(
                    f"the gradient of custom loss {self._loss.name!r} of datum {index} is not finite; nothing was added"
                )
            slopes.append(torch.zeros_like(part) if slope is None else slope)
        return torch.cat([slope.flatten() for slope in slopes]).to(logprobs)

    @one_thread()
    def summary(self, tiles: Sequence[Tile], logprobs: Tensor, entropies: Tensor | None) -> Summary:
        self._budget.start()
        sums: dict[str, float] = {"loss:sum": 0.0}
        for tile, part in zip(tiles, logprobs.split([len(tile.targets) for tile in tiles]), strict=True):
            for index, values in self._per_datum(tile, part):
                loss, metrics = self._evaluate(index, values)
                for name, value in {"loss:sum": loss, **metrics}.items():
                    if not value.isfinite():
                        raise _not_finite(f"{self._loss.name!r} custom" if name == "loss:sum" else name, index)
                    sums[name] = sums.get(name, 0.0) + value.item()
        count = len(self._data)
        total = sums.pop("loss:sum")
        return Summary(total, {}, {name: s / count if name.endswith(":mean") else s for name, s in sums.items()})

    def _evaluate(self, index: int, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = self._data[index].inputs
        inputs = {wanted.name: torch.tensor(given[wanted.name]) for wanted in self._loss.inputs[1:]}
        try:
            return evaluate(self._loss, logprobs, inputs, self._budget)
        except OperationError as error:
            raise OperationError(f"datum {index}: {error}") from None

    def _per_datum(self, tile: Tile, logprobs: Tensor) -> list[tuple[int, Tensor]]:
        parts = logprobs.cpu().split([math.prod(shape) for shape in tile.shapes])
        return [(i, part.view(shape)) for i, part, shape in zip(tile.indices, parts, tile.shapes, strict=True)]


def _targets(tiles: Sequence[Tile], logprobs: Tensor) -> Targets:
    """All targets of some tiles, given their log-probabilities."""
    device = logprobs.device
    inputs = {name: torch.cat([tile.inputs[name] for tile in tiles]).to(device) for name in tiles[0].inputs}
    sizes = torch.tensor([math.prod(shape) for tile in tiles for shape in tile.shapes], device=device)
    return Targets(logprobs, inputs, sizes)


def _first_not_finite(tiles: Sequence[Tile], elementwise: Tensor) -> int:
    sizes = [math.prod(shape) for tile in tiles for shape in tile.shapes]
    indices = [index for tile in tiles for index in tile.indices]
    bad = [not part.isfinite().all() for part in elementwise.split(sizes)]
    return min(index for index, is_bad in zip(indices, bad, strict=True) if is_bad)


def _not_finite(name: str, index: int) -> OperationError:
    return OperationError(
        f"the {name} loss of datum {index} is not finite; nothing was added to the gradient. Look for extreme weights, "
        "advantages or logprobs"
    )
