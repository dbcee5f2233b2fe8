"""Keys and values of sequences that decode together, lying side by side so that attention reads them where they are.

Gathering pages anew in every step and layer costs more than the attention itself. A window is filled from the pages
once, when a set of sequences first decodes together; from then on every step adds one token of each, here and in the
pages. Token i of a sequence is at index i whoever else is in the window, and what lies behind its last token is zero
and masked, so that its numbers are the same in any window, and as if gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.kv_cache import PAD_PAGE, PAGE_TOKENS, KVCache, pages_for

SPARE_TOKENS = 64
"""Room in a new window behind its longest sequence: after so many steps it is made anew."""


class CacheRows(NamedTuple):
    """The rows of one sequence in a step, in the batch's order of rows."""

    pages: Sequence[int]
    """At least enough for start + count tokens. The same object in every step of a sequence, until its pages are given
    back."""
    start: int
    """Tokens that are in the cache already."""
    count: int
    """Tokens that this step adds, >= 1."""
    slot: int = 0
    """Of the state cache, for models that have one."""
    prefill: bool = False
    """Whether they are tokens of the prompt, which attend in tiles; drawn ones attend alone."""


class DecodeWindow:
    """One set of sequences, each of which adds one token a step."""

    def __init__(self, cache: KVCache, members: Sequence[CacheRows], device: torch.device) -> None:
        self._members = [member.pages for member in members]
        self._starts = [member.start for member in members]
        self._width = window_tokens(members)
        self._device = device
        tables = page_tables(members, device)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for layer, shape in cache.layers.items():
            keys, values = cache.read(layer, tables)
            self._keys[layer] = self._filled(keys, shape.kv_heads, shape.key_dim)
            self._values[layer] = (
                self._filled(values, shape.kv_heads, shape.value_dim) if shape.value_dim else self._keys[layer]
            )
        self.positions = torch.tensor(self._starts, device=device)
        self._slots = self.positions + torch.arange(len(members), device=device) * self._width
        places = torch.arange(self._width, device=device)
        seen = places <= self.positions[:, None, None, None]
        self._mask = torch.zeros(seen.shape, dtype=cache.dtype, device=device).masked_fill_(~seen, float("-inf"))

    def _filled(self, gathered: Tensor, heads: int, dim: int) -> Tensor:
        """[B, width, heads, dim] that begins with what was gathered [B, heads, tokens, dim]."""
        whole = gathered.new_zeros(len(gathered), self._width, heads, dim)
        whole[:, : gathered.shape[2]] = gathered.transpose(1, 2)
        return whole

    def advance(self, members: Sequence[CacheRows]) -> bool:
        """Whether this step's members are the last one's with one more token each, and there is room for it."""
        if len(members) != len(self._members) or max(member.start for member in members) >= self._width:
            return False
        for member, pages, start in zip(members, self._members, self._starts, strict=True):
            if member.pages is not pages or member.start != start + 1:
                return False
        self._starts = [member.start for member in members]
        self.positions += 1
        self._slots += 1
        self._mask.view(-1).index_fill_(0, self._slots, 0)
        return True

    def add(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store this step's keys and values [B, heads, dim]."""
        keys, values = self._keys[layer], self._values[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self._slots, key)
        if values is not keys:
            values.view(-1, *values.shape[2:]).index_copy_(0, self._slots, value)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, S, dim], S being the longest member's tokens in whole pages."""
        length = self.length
        return (
            self._keys[layer].narrow(1, 0, length).transpose(1, 2),
            self._values[layer].narrow(1, 0, length).transpose(1, 2),
        )

    @property
    def tokens(self) -> int:
        """Tokens for which there is room, of all members together."""
        return len(self._members) * self._width

    @property
    def length(self) -> int:
        """Tokens that are read of each member."""
        return pages_for(max(self._starts) + 1) * PAGE_TOKENS

    @property
    def mask(self) -> Tensor:
        """[B, 1, 1, S] to be added to scores: 0 where the member has a token, else -inf."""
        return self._mask.narrow(3, 0, self.length)


class DecodeWindows:
    """The windows of a sampler's last step."""

    def __init__(self, cache: KVCache, max_bytes: int, device: torch.device) -> None:
        """`max_bytes` bounds what all windows take together."""
        self._cache, self._device = cache, device
        self._max_tokens = max_bytes // cache.token_bytes
        self._windows: list[DecodeWindow] = []

    def step(self, blocks: Sequence[Sequence[CacheRows]]) -> list[DecodeWindow | None]:
        """A window for each block of decoding sequences, None for those that there is no memory for."""
        last, self._windows = self._windows, []
        chosen = [next((window for window in last if window.advance(block)), None) for block in blocks]
        del last
        self._windows = [window for window in chosen if window is not None]
        room = self._max_tokens - sum(window.tokens for window in self._windows)
        for place, block in enumerate(blocks):
            size = len(block) * window_tokens(block)
            if chosen[place] is None and size <= room:
                room -= size
                chosen[place] = DecodeWindow(self._cache, block, self._device)
                self._windows.append(chosen[place])
        return chosen


def window_tokens(members: Sequence[CacheRows]) -> int:
    """Tokens for which a new window has room, of each member."""
    return pages_for(max(member.start for member in members) + 1 + SPARE_TOKENS) * PAGE_TOKENS


def page_tables(members: Sequence[CacheRows], device: torch.device) -> Tensor:
    """The pages that hold each member's tokens after the step, int64 [B, P]."""
    used = [pages_for(member.start + member.count) for member in members]
    width = max(used)
    return torch.tensor(
        [[*member.pages[:pages], *[PAD_PAGE] * (width - pages)] for member, pages in zip(members, used, strict=True)],
        dtype=torch.int64,
        device=device,
    )
