"""The sampler's memory: keys and values in fixed-size pages, shared between sequences by reference counts.

Pages as in PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180): a sequence owns a list of pages, page
i holds its tokens [16 i, 16 i + 16), and no sequence ever needs contiguous memory. Full pages of a common prompt belong
to all the sequences that continue it. A page that is kept (`prefix_cache`) holds its numbers when its last sequence has
given it back, until it is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.kernels import paged
from tinkercloud.engine.torch.kernels.compiled import kernels_for
from tinkercloud.engine.torch.kernels.decoder_step import StepRows

PAGE_TOKENS = 16
"""Tokens in one page."""

PAD_PAGE = 0
"""A page of zeros that no sequence owns; pads page tables to a common length."""


class OutOfPages(Exception):
    """More pages were asked for than are free."""


class LayerShape(NamedTuple):
    """What one token takes in one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    """0 where a token's keys are its values too."""

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


def pages_for(tokens: int) -> int:
    """How many pages hold that many tokens."""
    return -(-tokens // PAGE_TOKENS)


class KVCache:
    """A pool of `num_pages` pages, each of which spans all layers.

    Memory is not touched before a page is first used, and the lowest free page is reused first, so on a CPU the process
    grows with what runs and what is kept, not with what is allowed.
    """

    def __init__(
        self, layers: Mapping[int, LayerShape], num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.layers = layers
        self.dtype = dtype
        self._device = device
        self._memory = {
            layer: torch.empty(
                num_pages + 1, PAGE_TOKENS, shape.kv_heads, shape.key_dim + shape.value_dim, dtype=dtype, device=device
            )
            for layer, shape in layers.items()
        }
        for memory in self._memory.values():
            memory[PAD_PAGE].zero_()
        self.has_kernels = kernels_for(dtype, device) and all(shape.value_dim for shape in layers.values())
        """Whether it can `attend`."""
        self.addresses = torch.tensor([self._memory[layer].data_ptr() for layer in sorted(layers)])
        """int64 [layers]: of each one's memory."""
        self._references = [0] * (num_pages + 1)
        self._empty = list(range(num_pages, 0, -1))
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Kept pages that nothing owns, in the order in which they were given back."""
        self.on_reclaim: Callable[[int], None] = lambda page: None
        """Told of each kept page that is taken for something else."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(memory[0, 0].nbytes for memory in self._memory.values())

    @property
    def free(self) -> int:
        """Pages that nothing owns, kept ones among them."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that at least one sequence owns; 0 when the sampler is idle."""
        return self.num_pages - self.free

    @property
    def idle(self) -> int:
        """Kept pages that nothing owns."""
        return len(self._idle)

    def idle_among(self, pages: Sequence[int]) -> int:
        """How many of these pages nothing owns, so that sharing them leaves so many fewer free."""
        return sum(page in self._idle for page in pages)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, kept ones when there are no others, those first that were given back first. Raises
        `OutOfPages` and takes none if fewer are free.

        They are of zeros where attention reads whole pages and masks what lies past the sequence's end: masking does
        not remove a NaN that a diverged adapter left there. The kernels read no further than a sequence has tokens.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages were asked for and {self.free} of {self.num_pages} are free")
        while len(self._empty) < count:
            self._reclaim()
        pages = [self._empty.pop() for _ in range(count)]
        if pages and not self.has_kernels:
            index = torch.tensor(pages, device=self._device)
            for memory in self._memory.values():
                memory.index_fill_(0, index, 0)
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """One more owner for each of these pages."""
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """One owner fewer; a page without owners is free."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._empty.append(page)

    def keep(self, page: int) -> None:
        """Let an owned page hold its numbers when it has no owner any more."""
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """The numbers of a kept page are of no use to anybody but its owners."""
        self._kept.remove(page)
        if page in self._idle:
            del self._idle[page]
            self._empty.append(page)

    def _reclaim(self) -> None:
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        self._empty.append(page)
        self.on_reclaim(page)

    def copy(self, source: int, page: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a page to another one."""
        for memory in self._memory.values():
            memory[page, :tokens] = memory[source, :tokens]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [T, heads, dim] of T tokens; slot = page * PAGE_TOKENS + offset, int64 [T]."""
        memory = self._memory[layer]
        if self.has_kernels:
            paged.write(memory, slots, key, value)
            return
        both = torch.cat((key, value), dim=-1) if self.layers[layer].value_dim else key
        memory.view(-1, *memory.shape[2:]).index_copy_(0, slots, both)

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P * PAGE_TOKENS, dim] of B sequences' page tables, int64 [B, P]."""
        shape = self.layers[layer]
        gathered = self._memory[layer].index_select(0, tables.flatten())
        gathered = gathered.view(len(tables), -1, shape.kv_heads, shape.key_dim + shape.value_dim).transpose(1, 2)
        return gathered[..., : shape.key_dim], gathered[..., shape.key_dim if shape.value_dim else 0 :]

    def attend(
        self,
        layer: int,
        query: Tensor,
        rows: StepRows,
        output: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """Queries over the tokens up to theirs, where those are; see `paged.attended`."""
        paged.attended(
            query, self._memory[layer], rows.owners, rows.tables, rows.positions, output,
            scaling=scaling, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
