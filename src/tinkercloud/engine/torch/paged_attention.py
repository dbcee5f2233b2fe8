"""Attention of one sampling step: every sequence's new tokens over all its tokens, through the paged cache.

Sequences that add one token (decoding) are attended where their pages are (`kernels.paged`) or, where there are no
kernels, in a few batches of similar length, so that a short one does not pay for a long one; sequences that add more
(prefill) one by one. Each row's numbers depend on its own sequence alone:
`scaled_dot_product_attention` gives the same bits for any batch and any masked padding. Rows behind the sequences' only
fill the step (`BaseModel.filling`): they attend to nothing and are not remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.attention import Scan, dense_attention, with_sink_column
from tinkercloud.engine.torch.decode_window import CacheRows, DecodeWindow, DecodeWindows, page_tables
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, pages_for
from tinkercloud.engine.torch.state_cache import StateCache


class _Block(NamedTuple):
    """Sequences that are attended together: all of the same `count`."""

    rows: Tensor
    """int64 [B * count], into the step's rows."""
    positions: Tensor
    """int64 [B, count]: of the queries."""
    num_keys: int
    """Of each sequence, masked ones included."""
    tables: Tensor | None
    """int64 [B, P], None where there is a window."""
    window: DecodeWindow | None
    slots: Tensor
    """int64 [B]: of the state cache."""

    def in_place(self, cache: KVCache) -> bool:
        """Whether the cache attends by itself: single queries, where there are kernels."""
        return cache.has_kernels and self.positions.shape[1] == 1


class PagedAttention:
    """The attention of one step, called by the model once per layer. Writes the new keys and values first."""

    def __init__(
        self,
        cache: KVCache,
        step: Sequence[CacheRows],
        device: torch.device,
        windows: DecodeWindows | None = None,
        states: StateCache | None = None,
    ) -> None:
        """`windows` are of the same cache, and are brought forward by this step; `states` are those of models with
        linear attention."""
        self._cache, self._states = cache, states
        self._device = device
        slots: list[int] = []
        decoding: dict[int, list[tuple[int, CacheRows]]] = {}
        self._blocks: list[_Block] = []
        for sequence in step:
            pages, start, count, _ = sequence
            first = len(slots)
            if count == 1:
                slots.append(pages[start // PAGE_TOKENS] * PAGE_TOKENS + start % PAGE_TOKENS)
                bucket = 0 if cache.has_kernels else (pages_for(start + 1) - 1).bit_length()
                decoding.setdefault(bucket, []).append((first, sequence))
            else:
                slots += [
                    pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
                    for position in range(start, start + count)
                ]
                self._blocks.append(self._block([first], [sequence], None))
        firsts, members = [], []
        for block in decoding.values():
            firsts.append([first for first, _ in block])
            members.append([sequence for _, sequence in block])
        found = [None] * len(members) if windows is None or cache.has_kernels else windows.step(members)
        self._blocks += [self._block(*block) for block in zip(firsts, members, found, strict=True)]
        self._slots = self._tensor(slots)
        self._masks: dict[tuple[int, int, int | None, bool], Tensor] = {}

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _block(self, firsts: Sequence[int], members: Sequence[CacheRows], window: DecodeWindow | None) -> _Block:
        """`firsts`: the first row of each member."""
        count = members[0].count
        rows = self._tensor([first + i for first in firsts for i in range(count)])
        slots = self._tensor([member.slot for member in members])
        if window is not None:
            return _Block(rows, window.positions[:, None], window.length, None, window, slots)
        tables = page_tables(members, self._device)
        positions = self._tensor([list(range(member.start, member.start + count)) for member in members])
        return _Block(rows, positions, tables.shape[1] * PAGE_TOKENS, tables, None, slots)

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
        """See `attention.Attention`; the rows are the step's sequences, in the order given, and filling."""
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        rows = len(self._slots)
        self._cache.write(layer, self._slots, key[:rows], value[:rows])
        if len(self._blocks) == 1 and rows == len(query) and not self._blocks[0].in_place(self._cache):
            return self._attend(layer, 0, query, key, value, scaling, sliding_window, softcap, sinks)[None]
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        output[rows:] = 0
        for index, block in enumerate(self._blocks):
            if block.in_place(self._cache):
                self._cache.attend(
                    layer, query, block.rows, block.tables, block.positions, output,
                    scaling, sliding_window, softcap, sinks,
                )  # fmt: skip
                continue
            own = (part.index_select(0, block.rows) for part in (query, key, value))
            attended = self._attend(layer, index, *own, scaling, sliding_window, softcap, sinks)
            output.index_copy_(0, block.rows, attended)
        return output[None]

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """See `attention.Attention`; each sequence goes on from its state, and leaves the new one there."""
        outputs = []
        for block in self._blocks:
            own = tuple(part.index_select(0, block.rows).unflatten(0, block.positions.shape) for part in rows)
            output, state = scan(own, self._states.read(layer, block.slots))
            self._states.write(layer, block.slots, state)
            outputs.append(output.flatten(0, 1))
        order = torch.cat([block.rows for block in self._blocks])
        joined = torch.cat(outputs)
        return joined.new_zeros(len(rows[0]), *joined.shape[1:]).index_copy_(0, order, joined)

    def _attend(
        self,
        layer: int,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attend the queries [B * count, Hq, D] of one block; its keys and values are in their pages already.

        The query heads that share a key head become further queries of it, so that grouped-query attention repeats no
        keys.
        """
        block = self._blocks[index]
        if block.window is not None:
            block.window.add(layer, key, value)
            keys, values = block.window.read(layer)
        else:
            keys, values = self._cache.read(layer, block.tables)
        batch, count = block.positions.shape
        kv_heads = keys.shape[1]
        group = query.shape[1] // kv_heads
        if count == 1:
            grouped = query.view(batch, kv_heads, group, -1)
        else:
            grouped = query.view(batch, count, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
            grouped = grouped.reshape(batch, kv_heads, group * count, -1)
        attended = dense_attention(
            grouped,
            keys,
            values,
            scaling=scaling,
            mask=self._mask(index, group, sliding_window, softcap is None, sinks is not None),
            softcap=softcap,
            sinks=None if sinks is None else sinks.view(kv_heads, group).repeat_interleave(count, dim=1),
        )
        if count == 1:
            return attended.reshape(batch, kv_heads * group, -1)
        attended = attended.view(batch, kv_heads, group, count, -1).permute(0, 3, 1, 2, 4)
        return attended.reshape(batch * count, kv_heads * group, -1)

    def _mask(self, index: int, group: int, window: int | None, added: bool, sinks: bool) -> Tensor:
        """True where a query sees a key, [B, 1, group * count, keys], with a column for sinks first if there are any;
        made once for all layers of a kind. The decode window's own, which is to be added to scores, where that is the
        same and will do."""
        key = (index, group, window, sinks)
        if key not in self._masks:
            mask = self._seen(self._blocks[index], group, window, added)
            self._masks[key] = with_sink_column(mask) if sinks else mask
        return self._masks[key]

    def _seen(self, block: _Block, group: int, window: int | None, added: bool) -> Tensor:
        if added and window is None and block.window is not None:
            return block.window.mask.expand(-1, -1, group, -1)
        positions = block.positions[:, None, :, None]
        keys = torch.arange(block.num_keys, device=self._device)
        mask = keys <= positions
        if window is not None:
            mask &= keys > positions - window
        return mask.repeat(1, 1, group, 1)
