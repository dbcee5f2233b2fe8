"""The sampler's memory of linear attention: one slot for each running sequence, beside the pages of the others' keys.

A state has taken in all of its sequence's tokens, so it cannot be shared with a sequence that goes on from fewer, as
pages can. Slots that no sequence has hold copies of states on their way through a prompt (`prefix_cache`), from which
others that begin alike go on; they give way to what runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.attention import Scan, State
from tinkercloud.engine.torch.decode_window import CacheRows


class StateCache:
    """`slots` states, each of which spans all linear attention layers."""

    def __init__(self, layers: Mapping[int, State], slots: int) -> None:
        """`layers`: of each layer a state [1, ...], for its shapes, its dtypes and its device."""
        self._memory = {
            layer: tuple(part.new_empty(slots, *part.shape[1:]) for part in state) for layer, state in layers.items()
        }
        self._free = list(range(slots - 1, -1, -1))
        self._copies: OrderedDict[int, None] = OrderedDict()
        """Slots with copies, in the order in which they were last of use."""
        self.slots = slots
        self.on_reclaim: Callable[[int], None] = lambda slot: None
        """Told of each copy that is taken for something else."""

    @property
    def used(self) -> int:
        """Slots that a sequence owns; 0 when the sampler is idle."""
        return self.slots - len(self._free) - len(self._copies)

    def allocate(self, copy: int | None = None) -> int:
        """A slot with the state of a sequence's beginning, zero, or that of a copy. There is one for each sequence that
        may run."""
        if copy is not None:
            self._copies.move_to_end(copy)
        if not self._free:
            self._reclaim()
        slot = self._free.pop()
        for state in self._memory.values():
            for part in state:
                if copy is None:
                    part[slot] = 0
                elif copy != slot:  # else it was the last copy of all, and the sequence has it now
                    part[slot] = part[copy]
        return slot

    def release(self, slot: int) -> None:
        """Give a sequence's slot back."""
        self._free.append(slot)

    def keep(self, slot: int) -> int | None:
        """Copy a sequence's state as it is now; the slot of the copy, None where sequences have them all."""
        if not self._free:
            if not self._copies:
                return None
            self._reclaim()
        copy = self._free.pop()
        for state in self._memory.values():
            for part in state:
                part[copy] = part[slot]
        self._copies[copy] = None
        return copy

    def forget(self, copy: int) -> None:
        """A copy is of no use any more."""
        del self._copies[copy]
        self._free.append(copy)

    def _reclaim(self) -> None:
        copy, _ = self._copies.popitem(last=False)
        self._free.append(copy)
        self.on_reclaim(copy)

    def read(self, layer: int, slots: Tensor) -> State:
        """The states of B sequences, int64 [B]."""
        return tuple(part.index_select(0, slots) for part in self._memory[layer])

    def write(self, layer: int, slots: Tensor, state: State) -> None:
        """Replace the states of B sequences, int64 [B]."""
        for part, new in zip(self._memory[layer], state, strict=True):
            part.index_copy_(0, slots, new.to(part.dtype))


def state_bytes(layers: Mapping[int, State]) -> int:
    """Bytes of one slot."""
    return sum(part.numel() * part.itemsize for state in layers.values() for part in state)


class _Scanned(NamedTuple):
    """Sequences that linear attention scans together."""

    shape: tuple[int, int]
    """(sequences, new tokens of each)"""
    rows: Tensor
    """int64 [n], into the step's rows."""
    slots: Tensor
    """int64 [sequences]: of the state cache."""


class StepStates:
    """The states of one step's sequences: those with one new token go on together, others by themselves."""

    def __init__(self, cache: StateCache, step: Sequence[CacheRows], device: torch.device) -> None:
        self._cache = cache
        self._groups: list[_Scanned] = []
        single: list[tuple[int, int]] = []
        first = 0
        for sequence in step:
            if sequence.count == 1 and not sequence.prefill:
                single.append((first, sequence.slot))
            else:
                rows = torch.arange(first, first + sequence.count, device=device)
                self._groups.append(_Scanned((1, sequence.count), rows, torch.tensor([sequence.slot], device=device)))
            first += sequence.count
        if single:
            rows, slots = (torch.tensor(numbers, device=device) for numbers in zip(*single, strict=True))
            self._groups.append(_Scanned((len(single), 1), rows, slots))

    def scan(self, layer: int, rows: tuple[Tensor, ...], scan: Scan) -> Tensor:
        """See `attention.Attention`; each sequence goes on from its state, and leaves the new one there."""
        outputs = []
        for group in self._groups:
            own = tuple(part.index_select(0, group.rows).unflatten(0, group.shape) for part in rows)
            output, state = scan(own, self._cache.read(layer, group.slots))
            self._cache.write(layer, group.slots, state)
            outputs.append(output.flatten(0, 1))
        order = torch.cat([group.rows for group in self._groups])
        joined = torch.cat(outputs)
        return joined.new_zeros(len(rows[0]), *joined.shape[1:]).index_copy_(0, order, joined)
