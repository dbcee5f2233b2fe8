"""Multi-head latent attention over a cache of its latents, instead of the keys and values that they stand for.

A token's keys and values, of all heads, are one product with its latent: k_h = W_h^K c, v_h = W_h^V c, beside a part
that is rotated and that all heads share. A sampler caches c and that part alone, 576 numbers instead of 40,960 in
DeepSeek-V3, and attends in the space of the latents: q_h k_h = (q_h W_h^K) c, and the sum of p v_h is W_h^V times the
sum of p c. Adapters of the product are those of the query's rows, for they are its sequence's. Training, which caches
nothing, expands.

Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1, which calls it absorbing the matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinkercloud.engine.torch.attention import Attention, CurrentAttention
from tinkercloud.engine.torch.lora import CurrentLora, LoraLinear
from tinkercloud.engine.torch.products import batched_product

_NEEDED = ("expand_kv", "kv_b_proj", "num_heads", "qk_nope_head_dim", "v_head_dim")


def is_latent_attention(module: nn.Module) -> bool:
    """Whether a module is one of transformers' latent attentions that expand by a method of their own."""
    return all(hasattr(module, name) for name in _NEEDED) and isinstance(module.kv_b_proj, LoraLinear)


class LatentAttention:
    """What one layer does differently in passes that are remembered."""

    def __init__(self, module: nn.Module, attention: CurrentAttention, lora: CurrentLora) -> None:
        """Takes over `module`'s expansion; `attend` finds this object as its `latents`."""
        self._projection: LoraLinear = module.kv_b_proj
        self._heads, self._key_dim, self._value_dim = module.num_heads, module.qk_nope_head_dim, module.v_head_dim
        self._expand = module.expand_kv
        self._attention, self._lora = attention, lora
        module.expand_kv, module.latents = self.expand, self

    def expand(self, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, T, dim] of latents [1, 1, T, c] and the rotated part [1, 1, T, r]. In a pass that
        is remembered both are the same tensor [1, 1, T, c + r]."""
        if not self._attention.attention.remembers:
            return self._expand(latents, rotated)
        both = torch.cat((latents, rotated), dim=-1)
        return both, both

    def attend(self, attention: Attention, layer: int, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """See `Attention`: query [1, heads, T, key_dim + r], key and value as `expand` gives them."""
        size = self._projection.in_features
        direct, rotated = query[0].split((self._key_dim, query.shape[-1] - self._key_dim), dim=-1)
        query = torch.cat((self._product(direct, keys=True), rotated), dim=-1).unsqueeze(0)
        attended = attention(layer, query, key, value, **how)[0, :, :, :size].transpose(0, 1)
        return self._product(attended, keys=False).transpose(0, 1).unsqueeze(0)

    def _product(self, x: Tensor, *, keys: bool) -> Tensor:
        """Queries [heads, T, key_dim] times W^K, or latents [heads, T, c] times W^V transposed, adapters included."""
        rows = slice(0, self._key_dim) if keys else slice(self._key_dim, None)
        weight = self._of_heads(self._projection.frozen_weight(x.dtype))[:, rows]
        output = batched_product(x, weight if keys else weight.transpose(1, 2))
        for segment in self._lora.batch:
            pair = segment.weights.pairs[self._projection.index]
            if pair is None:
                continue
            a, b = pair[0], self._of_heads(pair[1])[:, rows]
            own = output[:, segment.start : segment.end]
            rows_of = x[:, segment.start : segment.end]
            if keys:
                product = batched_product(batched_product(rows_of, b), a.expand(len(x), -1, -1))
            else:
                product = batched_product(batched_product(rows_of, a.t().expand(len(x), -1, -1)), b.transpose(1, 2))
            own.add_(product, alpha=segment.weights.scale)
        return output

    def _of_heads(self, matrix: Tensor) -> Tensor:
        """[heads * (key_dim + value_dim), n] as [heads, key_dim + value_dim, n]."""
        return matrix.unflatten(0, (self._heads, self._key_dim + self._value_dim))
