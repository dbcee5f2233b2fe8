"""Linear attention in a pack: the gated delta rule layers of Qwen3-Next and Qwen3.5, sequence by sequence.

Such a layer remembers what a sequence said in a state of fixed size instead of in keys and values. Its projections run
over all rows of a pass, as any linear layer; only its short convolution and its recurrence, which carry the state, run
over each sequence by itself, through the pass's `Attention.scan`. So packing stays exact.

Source: Yang et al., "Gated Delta Networks" (2024); the recurrence is transformers' own, in chunks of 64 tokens where
several are new and step by step where one is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tinkercloud.engine.torch.attention import CurrentAttention, State


def is_gated_delta_net(module: nn.Module) -> bool:
    """Whether a module is one of transformers' gated delta rule layers."""
    return type(module).__name__.endswith("GatedDeltaNet") and hasattr(
        _source_of(module), "torch_chunk_gated_delta_rule"
    )


def _source_of(module: nn.Module) -> Any:
    """The Python module that a layer's class is from."""
    return sys.modules[type(module).__module__]


class GatedDeltaNet(nn.Module):
    """A gated delta rule layer, in place of transformers' own. Its layers and parameters keep their paths."""

    def __init__(self, base: nn.Module, current: CurrentAttention) -> None:
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        for name, parameter in base.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.layer_idx, self.current = base.layer_idx, current
        self._sizes = (base.key_dim, base.key_dim, base.value_dim)
        self._key_dim, self._value_dim = base.head_k_dim, base.head_v_dim
        self._fused = hasattr(base, "in_proj_qkvz")
        self._split = base.fix_query_key_value_ordering if self._fused else None
        source = _source_of(base)
        self._chunked, self._stepwise = source.torch_chunk_gated_delta_rule, source.torch_recurrent_gated_delta_rule

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[1, T, H] of the pass's rows [1, T, H]."""
        rows, z, b, a = self._projected(hidden_states)
        decay = -self.A_log.float().exp() * nn.functional.softplus(a.float() + self.dt_bias)
        output = self.current.attention.scan(self.layer_idx, (rows, decay, b.sigmoid()), self._scan)
        return self.out_proj(self.norm(output.reshape(z.shape), z).view(1, hidden_states.shape[1], -1))

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side [T, C]; output gates [T * heads, D]; write strengths and decays
        [T, heads]."""
        if self._split is None:
            parts = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
            rows, z, b, a = (part(hidden) for part in parts)
        else:
            *parts, z, b, a = self._split(self.in_proj_qkvz(hidden), self.in_proj_ba(hidden))
            rows = torch.cat([part.flatten(2) for part in parts], dim=-1)
        return rows[0], z.reshape(-1, self._value_dim), b[0], a[0]

    def _scan(self, inputs: tuple[Tensor, ...], state: State | None) -> tuple[Tensor, State]:
        """n sequences' new rows, `inputs` [n, L, ...], after `state`: (output [n, L, heads, D], state).

        The state is the last rows before the convolution [n, kernel - 1, C] and what the recurrence holds
        [n, heads, K, D].
        """
        rows, decay, strength = inputs
        length, kernel = rows.shape[1], self.conv1d.weight[:, 0]
        before = rows.new_zeros(len(rows), kernel.shape[1] - 1, rows.shape[2]) if state is None else state[0]
        seen = torch.cat([before, rows], dim=1)
        # In float32, as convolutions sum: rounded after each tap, bfloat16 is a fifth further from float32.
        kernel = kernel.float()
        mixed = sum(seen[:, tap : tap + length] * kernel[:, tap] for tap in range(kernel.shape[1])).to(rows.dtype)
        query, key, value = nn.functional.silu(mixed).split(self._sizes, dim=-1)
        rule = self._stepwise if length == 1 else self._chunked
        output, held = rule(
            query.unflatten(-1, (-1, self._key_dim)),
            key.unflatten(-1, (-1, self._key_dim)),
            value.unflatten(-1, (-1, self._value_dim)),
            g=decay,
            beta=strength,
            initial_state=None if state is None else state[1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return output, (seen[:, length:], held)
