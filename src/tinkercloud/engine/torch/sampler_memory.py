"""What a sampler must remember of a sequence, layer by layer, learnt from one token's way through the model: no
configuration says it for every architecture."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkercloud.engine.torch.attention import Scan, State
from tinkercloud.engine.torch.kv_cache import LayerShape
from tinkercloud.engine.torch.lora import BASE_ONLY
from tinkercloud.engine.torch.model import BaseModel


class SamplerMemory:
    """The `Attention` of a pass that attends to nothing and notes what there would be to remember."""

    remembers = True

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        """The keys and values of one token, in each layer that attends."""
        self.states: dict[int, State] = {}
        """A state [1, ...] of each layer with linear attention."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        self.layers[layer] = LayerShape(key.shape[1], key.shape[-1], 0 if value is key else value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        output, self.states[layer] = scan(tuple(part.unsqueeze(0) for part in rows), None)
        return output[0]


def memory_of(model: BaseModel) -> SamplerMemory:
    """What a sampler of `model` remembers."""
    memory = SamplerMemory()
    with torch.inference_mode():
        token = torch.zeros(1, dtype=torch.int64, device=model.device)
        model.hidden_states(token, token, memory, BASE_ONLY)
    return memory
