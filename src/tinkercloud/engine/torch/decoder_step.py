"""The standard decoder's way through a sampling step, where the kernel of whole steps is the faster one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.torch.decoder_layer import DecoderLayer
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kernels.decoder_step import PRODUCTS, StepAdapters, StepWeights, decoder_step
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS
from tinkercloud.engine.torch.lora import LoraBatch
from tinkercloud.engine.torch.rms_norm import RMSNorm
from tinkercloud.engine.torch.rotary import Rotation


class DecoderStep:
    """`kernels.decoder_step` over a decoder's weights, which must stay where they are."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: RMSNorm) -> None:
        self._weights = StepWeights(
            [layer.step_layer() for layer in layers], norm.weight, norm.eps, *layers[0].heads, layers[0].head_dim
        )
        self._groups = [group for layer in layers for group in layer.groups]
        assert len(self._groups) == len(layers) * len(PRODUCTS)

    def __call__(self, x: Tensor, rotation: Rotation, attention: InPlaceAttention, lora: LoraBatch) -> Tensor:
        """Hidden states [T, H] after the final norm of embeddings [T, H], which are overwritten."""
        return decoder_step(
            x, self._weights, attention.rows, self._adapters(lora, len(x)), attention.cache.addresses, PAGE_TOKENS,
            *rotation.halves,
        )  # fmt: skip

    def _adapters(self, lora: LoraBatch, rows: int) -> StepAdapters:
        tables = [segment.weights.pairs.table(self._groups) for segment in lora]
        of_rows = np.full(rows, -1)
        for number, segment in enumerate(lora):
            of_rows[segment.start : segment.end] = number
        return StepAdapters(
            torch.from_numpy(of_rows),
            torch.tensor([(segment.start, segment.end) for segment in lora], dtype=torch.int64),
            torch.tensor([table.data_ptr() for table in tables], dtype=torch.int64),
            torch.tensor([segment.weights.scale for segment in lora], dtype=torch.float32),
            max((segment.weights.pairs.most_ranks for segment in lora), default=0),
        )
