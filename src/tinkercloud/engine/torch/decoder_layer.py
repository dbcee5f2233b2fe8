"""One layer of the standard pre-norm decoder, forward and backward by hand.

x + attention(norm(x)), then that + MLP(norm(that)): rotary embedding, grouped queries, optional norms of queries and
keys, optional biases, optional sliding window, SiLU-gated MLP. The backward pass recomputes what is cheap (norms,
activations), so a layer keeps 2 H + 2 (queries, keys and values) + 2 I numbers of a token, and attention's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tinkercloud.engine.torch.attention import Attention
from tinkercloud.engine.torch.fused_linear import FusedLinear, Inner
from tinkercloud.engine.torch.kernels.backward import gated_backward
from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.decoder_step import StepLayer
from tinkercloud.engine.torch.kernels.rows import gated
from tinkercloud.engine.torch.lora import LoraBatch
from tinkercloud.engine.torch.rms_norm import RMSNorm
from tinkercloud.engine.torch.rotary import Rotation


class Kept(NamedTuple):
    """What the backward pass of a layer needs of its forward pass."""

    x: Tensor
    projected: Tensor
    """Queries, keys and values [T, (Hq + 2 Hkv) D] before norms and rotation."""
    attention: tuple[Tensor, Tensor, Tensor, Tensor]
    """Its inputs, leaves of autograd, and its output, in attention's own form."""
    middle: Tensor
    """x after attention was added"""
    gate_up: Tensor
    inner: tuple[Inner, Inner, Inner, Inner]
    """Of `qkv`, `output`, `gate_up` and `down`."""


class DecoderLayer:
    """See the module's docstring. Made from a layer of transformers' Llama, Qwen2, Qwen3 or Mistral."""

    def __init__(self, layer: nn.Module, index: int, head_dim: int, sliding_window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index, self.head_dim, self._sliding_window = index, head_dim, sliding_window
        self._scaling = attention.scaling
        self._qkv = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = FusedLinear([attention.o_proj])
        self._gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj])
        self._down = FusedLinear([mlp.down_proj])
        self._heads, self._kv_heads = (size // head_dim for size in self._qkv.sizes[:2])
        self._attention_norm = _norm(layer.input_layernorm)
        self._mlp_norm = _norm(layer.post_attention_layernorm)
        self._head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._kv_heads
            self._head_norm = RMSNorm(torch.stack(weights), attention.q_norm.variance_epsilon)

    @property
    def heads(self) -> tuple[int, int]:
        """How many of queries, and of keys."""
        return self._heads, self._kv_heads

    @property
    def groups(self) -> tuple[int, int, int, int]:
        """Of its products, as adapters number them."""
        return self._qkv.group, self._output.group, self._gate_up.group, self._down.group

    def step_layer(self) -> StepLayer:
        """Its weights, as the kernel of whole sampling steps wants them."""
        products = (self._qkv, self._output, self._gate_up, self._down)
        head_norm = self._head_norm
        return StepLayer(
            self._attention_norm.weight, None if head_norm is None else head_norm.weight, self._mlp_norm.weight,
            tuple(product.weight for product in products), tuple(product.bias for product in products),
            self._attention_norm.eps, 0.0 if head_norm is None else head_norm.eps, self._mlp_norm.eps,
            self._scaling, self._sliding_window,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, rotation: Rotation, attention: Attention, lora: LoraBatch, training: bool
    ) -> tuple[Tensor, Kept | None]:
        """x [T, H] after the layer, and what `backward` wants, if `training`."""
        projected, inner_qkv = self._qkv(self._attention_norm(x), lora)
        with torch.set_grad_enabled(training):
            inputs = self._attention_inputs(projected, rotation)
            if training:
                inputs = tuple(part.detach().requires_grad_() for part in inputs)
            attended = attention(self._index, *inputs, scaling=self._scaling, sliding_window=self._sliding_window)
        rows = attended.detach().reshape(len(x), -1)
        middle, inner_output = self._output.added_to(x, rows, lora)
        gate_up, inner_gate_up = self._gate_up(self._mlp_norm(middle), lora)
        output, inner_down = self._down.added_to(middle, self._activated(gate_up), lora)
        if not training:
            return output, None
        inner = (inner_qkv, inner_output, inner_gate_up, inner_down)
        return output, Kept(x, projected, (*inputs, attended), middle, gate_up, inner)

    def backward(
        self, kept: Kept, rotation: Rotation, lora: LoraBatch, d_output: Tensor, input_wanted: bool
    ) -> Tensor | None:
        """The gradient of x [T, H], if it is wanted, from that of the layer's output; adds the adapters' own."""
        inner_qkv, inner_output, inner_gate_up, inner_down = kept.inner
        d_gate_up = self._mlp_backward(kept.gate_up, inner_down, lora, d_output)
        d_normed = self._gate_up.backward(self._mlp_norm(kept.middle), inner_gate_up, lora, d_gate_up)
        d_middle = self._mlp_norm.backward(kept.middle, d_normed, d_output)

        *inputs, attended = kept.attention
        rows = attended.detach().reshape(len(d_middle), -1)
        d_attended = self._output.backward(rows, inner_output, lora, d_middle)
        d_inputs = torch.autograd.grad(attended, inputs, d_attended.view_as(attended))
        d_heads = tuple(part[0].transpose(0, 1) for part in d_inputs)
        d_projected = rotation.backward_of_heads(kept.projected, self._head_norm, d_heads)
        normed = self._attention_norm(kept.x)
        d_normed = self._qkv.backward(normed, inner_qkv, lora, d_projected, input_wanted)
        if d_normed is None:
            return None
        return self._attention_norm.backward(kept.x, d_normed, d_middle)

    def _attention_inputs(self, projected: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, Hq, T, D], keys and values [1, Hkv, T, D]."""
        heads = projected.view(len(projected), -1, self.head_dim)
        by_head = (
            rotation.of_heads(projected, self._heads + self._kv_heads, self._head_norm).transpose(0, 1).unsqueeze(0)
        )
        value = heads.narrow(1, self._heads + self._kv_heads, self._kv_heads).transpose(0, 1).unsqueeze(0)
        return by_head.narrow(1, 0, self._heads), by_head.narrow(1, self._heads, self._kv_heads), value

    def _activated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up [T, I] of [T, 2 I]."""
        if have_kernels(gate_up):
            return gated(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)

    def _mlp_backward(self, gate_up: Tensor, inner_down: Inner, lora: LoraBatch, d_output: Tensor) -> Tensor:
        """The gradient of `gate_up`, in its place, from that of the MLP's output."""
        if have_kernels(gate_up):
            gated_backward(gate_up, self._down.backward(gated(gate_up), inner_down, lora, d_output))
            return gate_up
        gate, up = gate_up.chunk(2, dim=1)
        opened = silu(gate)
        activated = opened * up
        d_activated = self._down.backward(activated, inner_down, lora, d_output)
        d_gated = torch.mul(d_activated, up, out=activated)
        torch.mul(d_activated, opened, out=up)
        torch.ops.aten.silu_backward(d_gated, gate, grad_input=gate)
        return gate_up


def _norm(module: nn.Module) -> RMSNorm:
    return RMSNorm(module.weight, module.variance_epsilon)
