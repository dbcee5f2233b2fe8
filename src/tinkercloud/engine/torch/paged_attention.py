"""Attention of one sampling step: every sequence's new tokens over all its tokens, through the paged cache.

Where the cache has kernels there is `in_place_attention`; this is for all others.

What a row's numbers are depends on its own sequence and its place there alone, to the bit, so that nothing shows in
them of what was cached before, where a prompt was cut, who shares the step, or whether the sequence was interrupted:

- Rows of a prompt attend in tiles, [0, TILE), [TILE, 2 TILE), ... of their sequence, each over the keys up to its end.
  A tile has the same shape whichever of its rows a step has; in place of the others there are zeros.
- Rows of drawn tokens attend alone: one of each of several sequences, or, when a sequence was interrupted, many of
  its tokens, as if one by one. They do so in a few batches of similar length, so that a short one does not pay for a
  long one: `scaled_dot_product_attention` gives one query the same bits in any batch, with any masked padding of the
  keys.

Rows behind the sequences' only fill the step (`BaseModel.filling`): they attend to nothing and are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.attention import Scan, dense_attention, with_sink_column
from tinkercloud.engine.torch.decode_window import CacheRows, DecodeWindow, DecodeWindows, page_tables
from tinkercloud.engine.torch.kv_cache import PAD_PAGE, PAGE_TOKENS, KVCache, pages_for
from tinkercloud.engine.torch.state_cache import StateCache, StepStates

TILE = 32
"""Tokens in a tile, whole pages. Small ones waste little on prompts of which few rows are new, large ones take fewer
calls: docs/performance.md has the figures."""

GATHERED_TOKENS = 32768
"""Keys that tiles attended together have at most, of all their sequences: bounds the memory for copies of them."""


class _Block(NamedTuple):
    """Rows that are attended together, as B sequences of L queries each."""

    shape: tuple[int, int]
    """(B, L)"""
    rows: Tensor
    """int64 [n], into the step's rows."""
    places: Tensor | None
    """int64 [n]: where the rows are among the B * L queries, the others of which are zeros; None if they are all."""
    positions: Tensor
    """int64 [B, L], or [1, L] if they are the same for all: of the queries."""
    num_keys: int
    """Of each sequence, masked ones included."""
    tables: Tensor | None
    """int64 [B, P], or [1, P] if they are the same for all; None where there is a window."""
    window: DecodeWindow | None


class _TileRows(NamedTuple):
    """What a step has of one sequence's tile."""

    pages: Sequence[int]
    row: int
    """The first, of the step's rows."""
    place: int
    """The first, of the tile's rows."""
    count: int


class PagedAttention:
    """The attention of one step, called by the model once per layer. Writes the new keys and values first."""

    remembers = True

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
        self._cache, self._device = cache, device
        slots: list[int] = []
        tiles: dict[int, list[_TileRows]] = {}
        decoding: dict[int, list[tuple[int, CacheRows]]] = {}
        self._blocks: list[_Block] = []
        for sequence in step:
            first, start, end = len(slots), sequence.start, sequence.start + sequence.count
            slots += [
                sequence.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
                for position in range(start, end)
            ]
            if sequence.prefill:
                for tile in range(start // TILE, -(-end // TILE)):
                    begin, stop = max(start, tile * TILE), min(end, (tile + 1) * TILE)
                    rows = _TileRows(sequence.pages, first + begin - start, begin - tile * TILE, stop - begin)
                    tiles.setdefault(tile, []).append(rows)
            elif sequence.count == 1:
                bucket = (pages_for(end) - 1).bit_length()
                decoding.setdefault(bucket, []).append((first, sequence))
            else:
                self._blocks.append(self._one_by_one(first, sequence))
        for tile, members in tiles.items():
            together = max(1, GATHERED_TOKENS // ((tile + 1) * TILE))
            for begin in range(0, len(members), together):
                self._blocks.append(self._tiles(tile, members[begin : begin + together]))
        firsts = [[first for first, _ in block] for block in decoding.values()]
        members = [[sequence for _, sequence in block] for block in decoding.values()]
        found = [None] * len(members) if windows is None else windows.step(members)
        self._blocks += [self._decoding(*block) for block in zip(firsts, members, found, strict=True)]
        self._slots = self._tensor(slots)
        self._states = None if states is None else StepStates(states, step, device)
        self._masks: dict[tuple[int, int, int | None, bool, bool], Tensor] = {}

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _decoding(self, firsts: Sequence[int], members: Sequence[CacheRows], window: DecodeWindow | None) -> _Block:
        """One drawn token of each member. `firsts`: their rows."""
        shape, rows = (len(members), 1), self._tensor(firsts)
        if window is not None:
            return _Block(shape, rows, None, window.positions[:, None], window.length, None, window)
        tables = page_tables(members, self._device)
        positions = self._tensor([[member.start] for member in members])
        return _Block(shape, rows, None, positions, tables.shape[1] * PAGE_TOKENS, tables, None)

    def _one_by_one(self, first: int, member: CacheRows) -> _Block:
        """Several drawn tokens of one sequence, as when they were drawn."""
        tables = page_tables([member], self._device)
        rows = torch.arange(first, first + member.count, device=self._device)
        positions = (rows - first + member.start)[:, None]
        return _Block((member.count, 1), rows, None, positions, tables.shape[1] * PAGE_TOKENS, tables, None)

    def _tiles(self, tile: int, members: Sequence[_TileRows]) -> _Block:
        """The rows of several sequences' tiles of one number."""
        rows = [member.row + i for member in members for i in range(member.count)]
        places = [index * TILE + member.place + i for index, member in enumerate(members) for i in range(member.count)]
        whole = len(rows) == len(members) * TILE
        positions = torch.arange(tile * TILE, (tile + 1) * TILE, device=self._device)
        width = pages_for((tile + 1) * TILE)
        tables = [[*member.pages[:width], *[PAD_PAGE] * (width - len(member.pages))] for member in members]
        return _Block(
            (len(members), TILE),
            self._tensor(rows),
            None if whole else self._tensor(places),
            positions[None],
            width * PAGE_TOKENS,
            self._tensor(tables),
            None,
        )

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
        if len(self._blocks) == 1 and rows == len(query):
            return self._attend(layer, 0, query, key, value, scaling, sliding_window, softcap, sinks)[None]
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        output[rows:] = 0
        for index, block in enumerate(self._blocks):
            own = (part.index_select(0, block.rows) for part in (query, key, value))
            attended = self._attend(layer, index, *own, scaling, sliding_window, softcap, sinks)
            output.index_copy_(0, block.rows, attended)
        return output[None]

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """See `attention.Attention`; each sequence goes on from its state, and leaves the new one there."""
        assert self._states is not None
        return self._states.scan(layer, rows, scan)

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
        """Attend the queries [n, Hq, D] of one block; its keys and values are in their pages already.

        The query heads that share a key head become further queries of it, so that grouped-query attention repeats no
        keys.
        """
        block = self._blocks[index]
        if block.window is not None:
            block.window.add(layer, key, value)
            keys, values = block.window.read(layer)
        else:
            keys, values = self._cache.read(layer, block.tables)
        batch, count = block.shape
        if len(keys) < batch:
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        if block.places is not None:
            query = query.new_zeros(batch * count, *query.shape[1:]).index_copy_(0, block.places, query)
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
        attended = attended.reshape(batch * count, kv_heads * group, -1)
        return attended if block.places is None else attended.index_select(0, block.places)

    def _mask(self, index: int, group: int, window: int | None, added: bool, sinks: bool) -> Tensor:
        """Where a query sees a key, [B or 1, 1, group * L, keys], with a column for sinks first if there are any; made
        once for all layers of a kind. True there, or 0 in a mask that is `added` to scores."""
        key = (index, group, window, added, sinks)
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
        if added:  # converted here once, else in every layer
            mask = torch.zeros(mask.shape, dtype=self._cache.dtype, device=self._device).masked_fill_(~mask, -torch.inf)
        return mask.repeat(1, 1, group, 1)
