"""A lean pass through the standard decoder (Llama, Qwen2, Qwen3, Mistral), for training and for sampling.

transformers' modules compute the same; here it takes a fraction of the calls, which are most of a small pass's time,
and the backward pass is written by hand. Architectures that are not `STANDARD` run through their own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from tinkercloud.engine.torch.attention import Attention
from tinkercloud.engine.torch.decoder_layer import DecoderLayer
from tinkercloud.engine.torch.decoder_step import DecoderStep
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kernels.products import have_products
from tinkercloud.engine.torch.lora import LoraBatch
from tinkercloud.engine.torch.quantized import is_quantized
from tinkercloud.engine.torch.rms_norm import RMSNorm
from tinkercloud.engine.torch.rotary import Rotation

STANDARD = frozenset({"llama", "qwen2", "qwen3", "mistral"})
"""`model_type`s whose decoders are nothing but embedding, layers of `DecoderLayer`'s kind and a norm."""


class Decoder:
    """See the module's docstring. Shares the weights of transformers' modules."""

    def __init__(self, decoder: nn.Module) -> None:
        """`decoder` is transformers', with `LoraLinear`s in the place of its linear layers."""
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._embeddings = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._layers = [
            DecoderLayer(layer, index, head_dim, _sliding_window(config, layer.self_attn))
            for index, layer in enumerate(decoder.layers)
        ]
        self._norm = RMSNorm(decoder.norm.weight, decoder.norm.variance_epsilon)
        self.step = DecoderStep(self._layers, self._norm, self._rotary) if have_products(self._embeddings) else None
        """For sampling through a cache, where the kernel of whole steps is the faster one."""

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        lora: LoraBatch,
        anchor: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        """See `BaseModel.hidden_states`; under autograd the result's backward adds the adapters' gradients.

        `anchor` is any tensor that needs a gradient, to be visited by autograd though nothing here needs one.
        """
        if self.step is not None and isinstance(attention, InPlaceAttention):
            return self.step(embedding(tokens, self._embeddings), attention, lora)
        rotation = Rotation(positions, self._rotary.inv_freq, self._rotary.attention_scaling, self._embeddings.dtype)
        if torch.is_grad_enabled():
            return _Pass.apply(anchor, self, tokens, rotation, attention, lora, recompute)
        x = embedding(tokens, self._embeddings)
        for layer in self._layers:
            x, _ = layer(x, rotation, attention, lora, training=False)
        return self._norm(x)


class _Pass(torch.autograd.Function):
    """A whole pass under autograd: one node, whose backward goes through the layers in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        decoder: Decoder,
        tokens: Tensor,
        rotation: Rotation,
        attention: Attention,
        lora: LoraBatch,
        recompute: bool,
    ) -> Tensor:
        ctx.kept = []
        """What each layer's backward pass needs; with `recompute` the layer's input, to compute it again."""
        x = embedding(tokens, decoder._embeddings)
        for layer in decoder._layers:
            output, kept = layer(x, rotation, attention, lora, training=not recompute)
            ctx.kept.append(x if recompute else kept)
            x = output
        ctx.decoder, ctx.rotation, ctx.attention, ctx.lora, ctx.last = decoder, rotation, attention, lora, x
        return decoder._norm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[None, ...]:
        decoder = ctx.decoder
        gradient = decoder._norm.backward(ctx.last, d_hidden)
        for number in reversed(range(len(decoder._layers))):
            layer = decoder._layers[number]
            kept = ctx.kept.pop()  # what a layer kept is let go of when it is done
            if isinstance(kept, Tensor):
                _, kept = layer(kept, ctx.rotation, ctx.attention, ctx.lora, training=True)
            gradient = layer.backward(kept, ctx.rotation, ctx.lora, gradient, input_wanted=number > 0)
        return (None,) * 7


def standard_decoder(model: PreTrainedModel) -> Decoder | None:
    """A lean decoder for this model, None if its architecture is not known to be standard, or its layers are quantised:
    they cannot lie side by side in one matrix."""
    config = model.config
    own_code = not type(model).__module__.startswith("transformers.")
    if own_code or config.model_type not in STANDARD or config.hidden_act != "silu":
        return None
    if any(map(is_quantized, model.modules())):
        return None
    return Decoder(model.get_decoder())


def _sliding_window(config: Any, attention: nn.Module) -> int | None:
    """Of one layer, as its module would have it: Qwen has it layer by layer, Mistral for all, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
