"""How tokens see each other: the one thing that training and sampling do differently in the same modules.

Every attention layer of a base model calls `attend`, which hands its queries, keys and values to the `Attention` of the
current pass. `PackedAttention` is training's; a sampler brings its own, over a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.kernels.causal import LONGEST, causal_attention, causal_attention_backward
from tinkercloud.engine.torch.kernels.products import have_products

IMPLEMENTATION = "tinkercloud"
"""The name under which transformers finds `attend`. No mask function is registered for it, so models build none."""


SCAN_CHUNK = 64
"""Tokens to a multiple of which a scan may pad each sequence. What it computes of a shorter one is out of proportion to
the sequence, so a backward pass computes that again instead of keeping it."""

WINDOW_QUERIES = 1024
"""Tokens of a sequence that look through a sliding window together, over the keys that any of them sees: what a pass
takes, and how long, then grows with the sequence and not with its square."""

SHORT_SCANS = 16
"""Sequences shorter than that which are scanned together: bounds what their padding takes at a time."""

State = tuple[Tensor, ...]
"""What a linear attention layer remembers of n sequences: tensors [n, ...]."""

Scan = Callable[[tuple[Tensor, ...], State | None], tuple[Tensor, State]]
"""From rows [n, L, ...] of n sequences and the state before them (None: these are their first) to the layer's output
[n, L, ...] and the state after them."""


class Attention(Protocol):
    """Attention over the rows of one pass, whose tokens all lie in one sequence dimension."""

    remembers: bool
    """Whether later passes see this one's keys and values, which then had better be few: see `latent_attention`."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] (rotated already) to the output [1, T, Hq, D].

        With a sliding window of w a token sees itself and the w - 1 tokens before it. `softcap` c replaces each score s
        by c * tanh(s / c). `sinks` [Hq]: a score of each head that takes part in the softmax and brings no value.
        """
        ...

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """Run a linear attention layer over the pass's rows [T, ...], each sequence by itself; its output [T, ...]."""
        ...


class CurrentAttention:
    """The attention of the pass that is running, seen by all layers of one base model."""

    __slots__ = ("attention",)

    def __init__(self) -> None:
        self.attention: Attention | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: delegate to the pass's `Attention`."""
    if position_bias is not None or (s_aux is not None and softcap is not None):
        raise OperationError("models with position biases, or with attention sinks and soft caps, are not supported")
    attention = module.current.attention
    latents = getattr(module, "latents", None)
    if latents is not None and attention.remembers:
        attention = partial(latents.attend, attention)
    output = attention(
        module.layer_idx,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output, None


AttentionInterface.register(IMPLEMENTATION, attend)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of [n, Hq, L, D] over [n, Hkv, S, D] as [n, Hq, L, D]; causal (L = S) if `mask` is None.

    `mask` broadcasts to [n, Hq, L, S]: boolean, True where a query sees a key, or, without `softcap`, to be added to
    scores. `sinks` [Hq, L]: see `Attention`; a mask begins with a column for them, in which every query sees.
    """
    ahead = 0
    if sinks is not None:
        if mask is None:
            # A query before the others, which sees the sink alone: causality then needs no mask of L x L.
            ahead = 1
            query, sinks = pad(query, (0, 0, ahead, 0)), pad(sinks, (ahead, 0))
        query, key, value = _with_sinks(query, key, value, sinks / scaling)
    if softcap is None:
        # Fused kernels want values of the queries' size.
        size = value.shape[-1]
        return scaled_dot_product_attention(
            query,
            key,
            pad(value, (0, query.shape[-1] - size)) if size < query.shape[-1] else value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )[:, :, ahead:, :size]
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap))
    scores = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return scores.to(value.dtype) @ value


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention with one more key, the first, whose product with each query is its entry of `sinks` [Hq, L]
    and whose value is zero: queries get one more number, which no other key looks at."""
    query = torch.cat([query, sinks.to(query.dtype).expand(len(query), -1, -1).unsqueeze(-1)], dim=-1)
    sink = key.new_zeros(*key.shape[:2], 1, key.shape[-1] + 1)
    sink[..., -1] = 1
    return query, torch.cat([sink, pad(key, (0, 1))], dim=2), pad(value, (0, 0, 1, 0))


def with_sink_column(mask: Tensor) -> Tensor:
    """A mask [..., S] as [..., 1 + S]: every query sees the sink."""
    return pad(mask, (1, 0), value=mask.dtype == torch.bool)


class _Causal(torch.autograd.Function):
    """Attention of sequences back to back by a kernel of our own: [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
        output, sums = causal_attention(query, key, value, lengths, scaling)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        return *causal_attention_backward(*ctx.saved_tensors, d_output, ctx.lengths, ctx.scaling), None, None


class PackedAttention:
    """Causal attention within each of several sequences that lie back to back, never across them.

    Sequences up to `LONGEST` tokens, that look through no window, have a kernel of their own where there are kernels.
    Else neighbours of the same length run as one batch, each sequence with the same result as alone.
    """

    remembers = False

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each sequence, in order; they add up to the pass's tokens."""
        self.runs = [(length, len(list(same))) for length, same in groupby(lengths)]
        self.rows = [length * count for length, count in self.runs]
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        plain = softcap is None and sinks is None and query.shape[-1] == value.shape[-1] and have_products(query)
        longest = min(sliding_window or LONGEST, LONGEST) if plain else 0
        spans = [
            (fits, [run for run, _ in span])
            for fits, span in groupby(zip(self.runs, self.rows, strict=True), key=lambda run: run[0][0] <= longest)
        ]
        sizes = [sum(length * count for length, count in runs) for _, runs in spans]
        # One split each, not slices: a slice's backward writes a whole zero tensor.
        parts = [part[0].transpose(0, 1).split(sizes) for part in (query, key, value)]
        outputs = []
        for (fits, runs), *span in zip(spans, *parts, strict=True):
            if fits:
                lengths = [length for length, count in runs for _ in range(count)]
                outputs.append(_Causal.apply(*span, lengths, scaling))
            else:
                how = dict(scaling=scaling, softcap=softcap)
                outputs += self._run_by_run(runs, span, sliding_window, sinks, **how)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _run_by_run(
        self,
        runs: Sequence[tuple[int, int]],
        parts: Sequence[Tensor],
        sliding_window: int | None,
        sinks: Tensor | None,
        **how: Any,
    ) -> list[Tensor]:
        """The outputs [rows, Hq, D] of runs of equally long sequences, of queries, keys and values [T, H, D]."""
        outputs = []
        rows = [length * count for length, count in runs]
        for (length, count), *run in zip(runs, *(part.split(rows) for part in parts), strict=True):
            q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in run)
            own = None if sinks is None else sinks.unsqueeze(1)
            if sliding_window and length > sliding_window:
                output = self._through_window(q, k, v, sliding_window, own, **how)
            else:
                own = None if own is None else own.expand(-1, length)
                output = dense_attention(q, k, v, mask=None, sinks=own, **how)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return outputs

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """See `Attention`; every sequence is whole. A backward pass scans short ones again, a few at a time."""

        def whole(*parts: Tensor) -> Tensor:
            return scan(parts, None)[0]

        outputs = []
        for run, *parts in zip(self.runs, *(part.split(self.rows) for part in rows), strict=True):
            length, count = run
            short = length < SCAN_CHUNK
            parts = [part.unflatten(0, (count, length)).split(SHORT_SCANS if short else count) for part in parts]
            for group in zip(*parts, strict=True):
                if short and torch.is_grad_enabled():
                    output = checkpoint(whole, *group, use_reentrant=False, preserve_rng_state=False)
                else:
                    output = whole(*group)
                outputs.append(output.flatten(0, 1))
        return torch.cat(outputs)

    def _through_window(
        self, query: Tensor, key: Tensor, value: Tensor, window: int, sinks: Tensor | None, **how: Any
    ) -> Tensor:
        """`dense_attention` in which a token sees itself and the `window` - 1 tokens before it; `sinks` [Hq, 1]."""
        outputs = []
        for queries in query.split(WINDOW_QUERIES, dim=2):
            first = len(outputs) * WINDOW_QUERIES
            count, start = queries.shape[2], max(0, first - window + 1)
            keys, values = (part.narrow(2, start, first + count - start) for part in (key, value))
            mask = self._band(count, first - start, window, how["softcap"] is None, sinks is not None, query)
            own = None if sinks is None else sinks.expand(-1, count)
            outputs.append(dense_attention(queries, keys, values, mask=mask, sinks=own, **how))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _band(self, count: int, before: int, window: int, added: bool, sinks: bool, query: Tensor) -> Tensor:
        """[count, before + count], for all layers of a kind: what each of `count` tokens sees of the `before` tokens
        before them and of themselves.

        Added to scores if that will do, since kernels would keep a copy in that form for each layer's backward pass.
        """
        key = (count, before, window, added, sinks, query.dtype)
        if key not in self._masks:
            mask = torch.ones(count, before + count, dtype=torch.bool, device=query.device)
            mask = mask.tril_(before).triu_(before + 1 - window)
            if added:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
            self._masks[key] = with_sink_column(mask) if sinks else mask
        return self._masks[key]
