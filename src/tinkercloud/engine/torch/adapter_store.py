"""The adapters of an engine: those in use beside the base model, within a budget of bytes, the others on a shelf.

An adapter's bytes are its parameters (float32, and in the base model's dtype too where that is another), its
accumulated gradient and its moments. Where they would exceed the budget, the least recently used adapters move to the
shelf, bit for bit, and come back when an operation names them. What an operation needs besides while it runs is not
counted.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from tinkercloud.engine.base_model import AdapterMemory
from tinkercloud.engine.operations import LoraConfig, OptimizerFamily
from tinkercloud.engine.torch.adapter import Adapter, AdapterLayout
from tinkercloud.engine.torch.optimizer import OPTIMIZERS
from tinkercloud.engine.torch.shelf import Shelf

log = logging.getLogger(__name__)

PARAMETERS, GRADIENT = "parameters", "gradient"
"""Names of buffers; the others are the moments'."""


class _Idle(NamedTuple):
    """An adapter whose buffers are on the shelf."""

    config: LoraConfig
    layout: AdapterLayout
    optimizer: OptimizerFamily
    steps: int
    buffers: tuple[str, ...]


class AdapterStore:
    """Adapters by their model's id."""

    def __init__(self, budget: int, shelf: Shelf, dtype: torch.dtype) -> None:
        """`budget`: bytes, 0 is without a limit; `dtype` is the base model's."""
        self._budget, self._shelf, self._dtype = budget, shelf, dtype
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        """The least recently used one first."""
        self._idle: dict[str, _Idle] = {}
        self._peak = self._moved_out = 0

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._resident or model_id in self._idle

    def __getitem__(self, model_id: str) -> Adapter:
        """The adapter, back from the shelf if it was there. KeyError."""
        self.bring([model_id])
        return self._resident[model_id]

    def get(self, model_id: str) -> Adapter | None:
        """As `[]`, but None if there is no such adapter."""
        if model_id not in self:
            return None
        return self[model_id]

    def __setitem__(self, model_id: str, adapter: Adapter) -> None:
        """Add or replace an adapter."""
        self.make_room(self.whole_bytes(adapter.layout, adapter.optimizer), {model_id})
        self.pop(model_id)
        self._resident[model_id] = adapter

    def pop(self, model_id: str) -> None:
        """Forget an adapter; no error if it is not there."""
        self._resident.pop(model_id, None)
        if self._idle.pop(model_id, None) is not None:
            self._shelf.drop(model_id)

    def parts(self, model_ids: Sequence[str]) -> list[list[str]]:
        """Models in their order, cut so that the adapters of each part can be resident together. One that the budget is
        too small for, or that is not there, is a part of its own."""
        parts: list[list[str]] = []
        budget = self._budget or math.inf
        room = 0.0
        for model_id in model_ids:
            size = self._whole_bytes_of(model_id) if model_id in self else None
            alone = size is None or size > budget
            if alone or size > room:
                parts.append([])
                room = budget
            parts[-1].append(model_id)
            room = 0.0 if alone else room - size
        return parts

    def bring(self, model_ids: Collection[str]) -> None:
        """Make adapters resident together, with room for their gradients and moments. KeyError."""
        self.make_room(sum(map(self._whole_bytes_of, model_ids)), model_ids)
        for model_id in model_ids:
            if model_id in self._idle:
                self._resident[model_id] = self._from_shelf(model_id)
            self._resident.move_to_end(model_id)

    def make_room(self, needed: int, keep: Collection[str] = ()) -> None:
        """Move adapters out, the least recently used first, until `needed` bytes are free beside those that stay; the
        `keep` ones are part of what is needed.

        If the budget is smaller than that, it is exceeded: a run that was made under a larger one must go on.
        """
        self._peak = self.memory.peak_bytes
        if not self._budget:
            return
        if needed > self._budget:
            log.warning(
                "adapter_memory = %d bytes, less than the %d that one operation needs for parameters, gradients and "
                "moments: all other adapters move out, and it runs beyond the budget", self._budget, needed,
            )  # fmt: skip
        others = {
            model_id: self._bytes(adapter) for model_id, adapter in self._resident.items() if model_id not in keep
        }
        excess = sum(others.values()) + needed - self._budget
        for model_id, size in others.items():
            if excess <= 0 or not self._to_shelf(model_id):
                return
            excess -= size

    def whole_bytes(self, layout: AdapterLayout, optimizer: OptimizerFamily) -> int:
        """Most bytes that an adapter of this layout comes to: with a gradient and moments."""
        return self._size(layout, 2 + len(OPTIMIZERS[optimizer].moments))

    @property
    def memory(self) -> AdapterMemory:
        """What the adapters take now."""
        resident = sum(map(self._bytes, self._resident.values()))
        return AdapterMemory(
            resident_bytes=resident,
            peak_bytes=max(self._peak, resident),
            resident=len(self._resident),
            idle=len(self._idle),
            moved_out=self._moved_out,
        )

    def _bytes(self, adapter: Adapter) -> int:
        return self._size(adapter.layout, 1 + (adapter.gradient is not None) + len(adapter.moments))

    def _size(self, layout: AdapterLayout, buffers: int) -> int:
        copy = 0 if self._dtype == torch.float32 else self._dtype.itemsize
        return layout.size * (buffers * torch.float32.itemsize + copy)

    def _whole_bytes_of(self, model_id: str) -> int:
        adapter = self._idle[model_id] if model_id in self._idle else self._resident[model_id]
        return self.whole_bytes(adapter.layout, adapter.optimizer)

    def _to_shelf(self, model_id: str) -> bool:
        """Whether it could be moved: if the shelf is full, the adapter stays, and the budget is exceeded for now."""
        adapter = self._resident[model_id]
        gradient = {} if adapter.gradient is None else {GRADIENT: adapter.gradient}
        buffers = {PARAMETERS: adapter.parameters, **gradient, **adapter.moments}
        try:
            self._shelf.put(model_id, list(buffers.values()))
        except OSError:
            log.exception("the idle adapter %s stays in memory: it could not be moved out", model_id)
            return False
        self._idle[model_id] = _Idle(adapter.config, adapter.layout, adapter.optimizer, adapter.steps, tuple(buffers))
        del self._resident[model_id]
        self._moved_out += 1
        return True

    def _from_shelf(self, model_id: str) -> Adapter:
        idle = self._idle[model_id]
        buffers = dict(zip(idle.buffers, self._shelf.take(model_id), strict=True))
        del self._idle[model_id]
        adapter = Adapter(idle.config, idle.layout, buffers.pop(PARAMETERS), self._dtype, idle.optimizer)
        adapter.gradient = buffers.pop(GRADIENT, None)
        adapter.moments, adapter.steps = buffers, idle.steps
        return adapter
