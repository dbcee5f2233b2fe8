"""What a backward pass needs of its forward pass: how much memory that takes, and doing with less of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tinkercloud.engine.base_model import ActivationMemory, EngineOptions
from tinkercloud.engine.operations import LoraConfig
from tinkercloud.engine.torch.adapter import Adapter, layout_of
from tinkercloud.engine.torch.attention import SCAN_CHUNK, CurrentAttention, PackedAttention
from tinkercloud.engine.torch.lora import CurrentLora, LoraBatch, Segment, runs_of

if TYPE_CHECKING:
    from tinkercloud.engine.torch.model import BaseModel

HOST_SHARE = 1 / 4
"""Part of the machine's memory that activations may take unless it is set."""

GPU_SHARE = 1 / 2
"""Part of a GPU's memory beside the base model's."""

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

MEASURED_PASSES = ([SCAN_CHUNK + 1], [2] * 32)
"""Lengths of the sequences of each pass that says what a token takes, the more of both: where a scan pads most, and
short ones. What a pass takes is about proportional to its tokens."""


class Recomputation:
    """Layers of which a pass keeps only the inputs, if it wants to: its backward pass runs their forward pass again.

    The adapters' gradients are written by the backward pass alone, so that nothing is counted twice.
    """

    def __init__(self, layers: Iterable[nn.Module], attention: CurrentAttention, lora: CurrentLora) -> None:
        """`attention` and `lora` are those of the pass that is running: another may be when a layer runs again."""
        self.wanted = False
        """Of the pass that is running."""
        self._attention, self._lora = attention, lora
        for layer in layers:
            layer.forward = self._around(layer.forward)

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if not (self.wanted and torch.is_grad_enabled()):
                return forward(*arguments, **named)
            attention, batch = self._attention.attention, self._lora.batch

            def again(*arguments: Any, **named: Any) -> Any:
                self._attention.attention, self._lora.batch = attention, batch
                return forward(*arguments, **named)

            return checkpoint(again, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

        return run


def activation_memory(model: BaseModel, options: EngineOptions) -> ActivationMemory:
    """What a token's activations take on this model, measured, and what there is for them.

    While a layer's backward pass runs, it holds about as much again as the layer kept. A forward pass alone holds what
    one layer would keep, and in between what no layer keeps, at most as much again.
    """
    kept, inputs = (
        max(_bytes_per_token(model, lengths, recompute) for lengths in MEASURED_PASSES) for recompute in (False, True)
    )
    kept += options.max_rank * len(model.linears) * model.dtype.itemsize  # x A^T of each layer; measured at rank 1
    layer = -(-kept // model.num_layers)
    return ActivationMemory(
        budget=options.activation_bytes or _default_budget(model),
        per_token=kept + layer,
        per_token_recomputed=min(inputs + 2 * layer, kept + layer),
        per_token_forward=2 * layer,
    )


def _bytes_per_token(model: BaseModel, lengths: Sequence[int], recompute: bool) -> int:
    """Bytes that are there after a forward pass and were not before, of sequences of these lengths."""
    rows = sum(lengths)
    parts = {linear.part for linear in model.linears}
    config = LoraConfig(1, train_attn="attn" in parts, train_mlp="mlp" in parts, train_unembed="unembed" in parts)
    layout = layout_of(config, model.linears)
    adapter = Adapter.fresh(config, layout, model.device, model.dtype)
    gradient = layout.views(torch.zeros_like(adapter.parameters))
    lora = LoraBatch([Segment(adapter.weights, 0, rows, gradient, runs_of(lengths))])
    tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    with torch.enable_grad(), Storages() as storages:
        hidden = model.hidden_states(tokens, positions, PackedAttention(lengths), lora, recompute=recompute)
        kept = storages.live_bytes
        del hidden
    return -(-kept // rows)


class Storages(TorchDispatchMode):
    """The memory that operators allocated since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    @property
    def live_bytes(self) -> int:
        self._seen = {key: own for key, own in self._seen.items() if not own[0].expired()}
        return sum(size for _, size in self._seen.values())


def _default_budget(model: BaseModel) -> int:
    """Of the machine rather than of the moment: what was accepted once must be accepted when it is run again."""
    if model.device.type == "cuda":
        free = torch.cuda.get_device_properties(model.device).total_memory
        free -= model.weight_bytes
        return int(GPU_SHARE * free)
    total = psutil.virtual_memory().total
    if CONTAINER_LIMIT.is_file() and (limit := CONTAINER_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return int(HOST_SHARE * total)
