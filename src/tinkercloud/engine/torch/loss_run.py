"""One forward or forward_backward on its way through micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.losses import loss_config, loss_named
from tinkercloud.engine.torch.adapter import Adapter
from tinkercloud.engine.torch.lora import Segment
from tinkercloud.engine.torch.loss_metrics import loss_metrics
from tinkercloud.engine.torch.losses import LOSS_FUNCTIONS, Targets
from tinkercloud.engine.torch.packing import Tile, tiles_of
from tinkercloud.engine.types import ForwardBackward, LossOutput, OperationError


class LossRun:
    """An operation's tiles, and what has been computed of them.

    Its gradient is its own until `finish` hands it to the adapter: an operation that fails has changed nothing.
    """

    def __init__(self, operation: ForwardBackward, adapter: Adapter, token_budget: int) -> None:
        self.operation, self.adapter = operation, adapter
        loss = loss_named(operation.loss_fn)
        self._loss, self._function = loss, LOSS_FUNCTIONS[loss.name]
        self._config = loss_config(loss, operation.loss_fn_config)
        input_names = [wanted.name for wanted in loss.inputs if wanted.name != "target_tokens"]
        self.tiles = tiles_of(operation.data, token_budget, input_names)
        self.training = not operation.forward_only
        self.wants_entropies = bool(self._config["entropy"])
        self.start_over()

    def start_over(self) -> None:
        """Forget everything computed so far."""
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._gradient = torch.zeros_like(self.adapter.parameters) if self.training else None
        self._views = self.adapter.layout.views(self._gradient) if self._gradient is not None else None

    def segment(self, start: int, tile: Tile) -> Segment:
        """The adapter on a tile whose first row is `start`."""
        return Segment(self.adapter.weights, start, start + tile.num_tokens, self._views, tile.datum_runs)

    def take(self, tile: Tile, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        """Note a tile's target log-probabilities [n], the operation's next ones; the loss's gradient by them [n].

        `entropies` [n]: of the distribution at each target's position, if the run wants them.
        """
        self._logprobs.append(logprobs)
        if self.wants_entropies and entropies is not None:
            self._entropies.append(entropies)
        if not self.training:
            return torch.zeros_like(logprobs)
        with torch.enable_grad():
            logprobs = logprobs.detach().requires_grad_()
            loss, _ = self._function(_targets(logprobs, [tile]), self._config)
            return torch.autograd.grad(loss.sum(), logprobs)[0]

    def finish(self) -> LossOutput:
        """The operation's result; its gradient is the adapter's now. OperationError if the loss is not finite."""
        logprobs = torch.cat(self._logprobs)
        targets = _targets(logprobs, self.tiles)
        elementwise, diagnostics = self._function(targets, self._config)
        total = elementwise.sum(dtype=torch.float64).item()
        outputs = self._outputs(logprobs.cpu().numpy(), elementwise.cpu().numpy())
        if not np.isfinite(total):
            worst = next(i for i, output in enumerate(outputs) if not np.isfinite(output["elementwise_loss"]).all())
            raise OperationError(
                f"the {self._loss.name} loss of datum {worst} is not finite; nothing was added to the gradient. Look "
                "for extreme weights, advantages or logprobs"
            )
        if self._gradient is not None:
            self.adapter.add_gradient(self._gradient)
        entropies = torch.cat(self._entropies) if self.wants_entropies else None
        metrics = loss_metrics(self._loss, targets, diagnostics, self._rows(logprobs.device), entropies)
        return LossOutput(
            output_type=self._loss.output_type,
            outputs=tuple(outputs),
            metrics={"loss:sum": total, "tokens:sum": float(self.operation.num_tokens), **metrics},
        )

    def _rows(self, device: torch.device) -> Tensor:
        """The position of each target, counted over the whole operation [n]."""
        starts = accumulate((tile.num_tokens for tile in self.tiles), initial=0)
        return torch.cat([tile.rows + start for tile, start in zip(self.tiles, starts, strict=False)]).to(device)

    def _outputs(self, logprobs: np.ndarray, elementwise: np.ndarray) -> list[dict[str, np.ndarray]]:
        outputs: list[dict[str, np.ndarray]] = [{} for _ in self.operation.data]
        first = 0
        for tile in self.tiles:
            last = first + len(tile.targets)
            for name, values in (("logprobs", logprobs), ("elementwise_loss", elementwise)):
                for index, part in tile.per_datum(values[first:last]):
                    outputs[index][name] = part
            first = last
        return outputs


def _targets(logprobs: Tensor, tiles: Sequence[Tile]) -> Targets:
    """All targets of some tiles, given their log-probabilities."""
    device = logprobs.device
    inputs = {name: torch.cat([tile.inputs[name] for tile in tiles]).to(device) for name in tiles[0].inputs}
    sizes = torch.tensor([math.prod(shape) for tile in tiles for shape in tile.shapes], device=device)
    return Targets(logprobs, inputs, sizes)
