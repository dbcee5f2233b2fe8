"""The standard decoder's way through a sampling step, where the kernel of whole steps is the faster one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tinkercloud.engine.torch.decoder_layer import DecoderLayer
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kernels.decoder_step import PRODUCTS, StepAdapters, StepWeights, decoder_step
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS
from tinkercloud.engine.torch.lora import LoraBatch
from tinkercloud.engine.torch.rms_norm import RMSNorm
from tinkercloud.engine.torch.rotary import Rotation


class DecoderStep:
    """`kernels.decoder_step` over a decoder's weights, which must stay where they are."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: RMSNorm, rotary: nn.Module) -> None:
        self._weights = StepWeights(
            [layer.step_layer() for layer in layers], norm.weight, norm.eps, *layers[0].heads, layers[0].head_dim
        )
        self._groups = [group for layer in layers for group in layer.groups]
        assert len(self._groups) == len(layers) * len(PRODUCTS)
        self._rotary = rotary
        self._cos = self._sin = torch.empty(0, layers[0].head_dim // 2)
        """Of all positions so far."""

    def __call__(self, x: Tensor, attention: InPlaceAttention, lora: LoraBatch) -> Tensor:
        """Hidden states [T, H] after the final norm of embeddings [T, H], which are overwritten."""
        self._rotate_up_to(attention.length)
        adapters = self._adapters(lora, len(x))
        return decoder_step(
            x, self._weights, attention.rows, adapters, attention.cache.addresses, PAGE_TOKENS, self._cos, self._sin
        )

    def _rotate_up_to(self, length: int) -> None:
        """See to it that there are cosines and sines of so many positions."""
        known = len(self._cos)
        if length > known:
            positions = torch.arange(known, max(length, 2 * known))
            rotation = Rotation(positions, self._rotary.inv_freq, self._rotary.attention_scaling, torch.float32)
            cos, sin = rotation.halves
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))

    def _adapters(self, lora: LoraBatch, rows: int) -> StepAdapters:
        of_rows = np.full(rows, -1)
        for number, segment in enumerate(lora):
            of_rows[segment.start : segment.end] = number
        factors = [segment.weights.pairs for segment in lora]
        ranges = np.array([(segment.start, segment.end) for segment in lora], dtype=np.int64)
        tables = np.array([each.table(self._groups).data_ptr() for each in factors], dtype=np.int64)
        scales = np.array([segment.weights.scale for segment in lora], dtype=np.float32)
        most_ranks = max((each.most_ranks for each in factors), default=0)
        return StepAdapters(*map(torch.from_numpy, (of_rows, ranges, tables, scales)), most_ranks)
