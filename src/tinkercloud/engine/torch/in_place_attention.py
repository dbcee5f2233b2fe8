"""Attention of one sampling step where the cache has kernels: every query goes to the pages of its own sequence.

What a row's numbers are depends on its own sequence and its place there alone, to the bit, so that nothing shows in
them of what was cached before, where a prompt was cut, who shares the step, or whether the sequence was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.torch.attention import Scan
from tinkercloud.engine.torch.decode_window import CacheRows
from tinkercloud.engine.torch.kernels.decoder_step import StepRows
from tinkercloud.engine.torch.kv_cache import PAD_PAGE, PAGE_TOKENS, KVCache, pages_for
from tinkercloud.engine.torch.state_cache import StateCache, StepStates


class InPlaceAttention:
    """The attention of one step, called by the model once per layer. Writes the new keys and values first.

    Rows behind the sequences' only fill the step (`BaseModel.filling`): they attend to nothing and are not kept.
    """

    remembers = True

    def __init__(self, cache: KVCache, step: Sequence[CacheRows], states: StateCache | None = None) -> None:
        """`states` are those of models with linear attention."""
        self.cache = cache
        starts, counts = [sequence.start for sequence in step], [sequence.count for sequence in step]
        owners, positions = np.arange(len(step)), np.array(starts)
        if sum(counts) > len(step):
            before = positions - np.cumsum(counts) + counts
            owners = np.repeat(owners, counts)
            positions = np.arange(len(owners)) + before[owners]
        self.length = max(map(add, starts, counts))
        """Of the longest sequence after the step."""
        width = pages_for(self.length)
        padding = [PAD_PAGE] * width
        tables = np.array([[*sequence.pages[:width], *padding[len(sequence.pages) :]] for sequence in step])
        slots = tables[owners, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
        self.rows = StepRows(*map(torch.from_numpy, (owners, positions, slots, tables)))
        self._states = None if states is None else StepStates(states, step, torch.device("cpu"))

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
        rows = len(self.rows.owners)
        self.cache.write(layer, self.rows.slots, key[:rows], value[:rows])
        output = query.new_zeros(*query.shape[:2], value.shape[-1])
        self.cache.attend(layer, query[:rows], self.rows, output, scaling, sliding_window, softcap, sinks)
        return output[None]

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """See `attention.Attention`; each sequence goes on from its state, and leaves the new one there."""
        assert self._states is not None
        return self._states.scan(layer, rows, scan)
