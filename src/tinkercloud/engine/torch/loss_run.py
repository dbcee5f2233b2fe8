"""One forward or forward_backward on its way through micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.operations import ForwardBackward
from tinkercloud.engine.results import LossOutput
from tinkercloud.engine.torch.adapter import Adapter
from tinkercloud.engine.torch.lora import Segment, runs_of
from tinkercloud.engine.torch.objectives import objective_of
from tinkercloud.engine.torch.packing import Tile, tiles_of


class LossRun:
    """An operation's tiles, and what has been computed of them.

    Its gradient is its own until `finish` hands it to the adapter: an operation that fails has changed nothing.
    """

    def __init__(self, operation: ForwardBackward, adapter: Adapter, token_budget: int) -> None:
        self.operation, self.adapter = operation, adapter
        self.training = not operation.forward_only
        self.start_over()
        self.tiles = tiles_of(operation.data, token_budget, self._objective.input_names)
        self.wants_entropies = self._objective.wants_entropies

    def start_over(self) -> None:
        """Forget everything computed so far."""
        self._objective = objective_of(self.operation)
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._gradient = torch.zeros_like(self.adapter.parameters) if self.training else None
        self._views = self.adapter.layout.views(self._gradient) if self._gradient is not None else None

    def segment(self, start: int, tiles: Sequence[Tile]) -> Segment:
        """The adapter on tiles of this run that lie side by side from row `start`. They are one segment: two would add
        to the same gradient at the same time."""
        lengths = [length for tile in tiles for length in tile.lengths]
        return Segment(self.adapter.weights, start, start + sum(lengths), self._views, runs_of(lengths))

    def take(self, tile: Tile, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        """Note a tile's target log-probabilities [n], the operation's next ones; the loss's gradient by them [n].

        `entropies` [n]: of the distribution at each target's position, if the run wants them.
        """
        self._logprobs.append(logprobs)
        if self.wants_entropies and entropies is not None:
            self._entropies.append(entropies)
        return self._objective.slopes(tile, logprobs) if self.training else torch.zeros_like(logprobs)

    def finish(self) -> LossOutput:
        """The operation's result; its gradient is the adapter's now. OperationError if the loss is not finite."""
        logprobs = torch.cat(self._logprobs)
        entropies = torch.cat(self._entropies) if self.wants_entropies else None
        summary = self._objective.summary(self.tiles, logprobs, entropies)
        if self._gradient is not None:
            self.adapter.add_gradient(self._gradient)
        arrays = {"logprobs": logprobs, **summary.per_target}
        return LossOutput(
            output_type=self._objective.output_type,
            outputs=tuple(self._outputs({name: values.cpu().numpy() for name, values in arrays.items()})),
            metrics={"loss:sum": summary.loss, "tokens:sum": float(self.operation.num_tokens), **summary.metrics},
        )

    def _outputs(self, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Each datum's part of arrays of one value per target."""
        outputs: list[dict[str, np.ndarray]] = [{} for _ in self.operation.data]
        first = 0
        for tile in self.tiles:
            last = first + len(tile.targets)
            for name, values in arrays.items():
                for index, part in tile.per_datum(values[first:last]):
                    outputs[index][name] = part
            first = last
        return outputs
