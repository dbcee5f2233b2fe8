"""From operations to packed micro-batches.

An operation's datums are put in order of their length and contents and cut into *tiles* of whole datums; a
micro-batch is any set of tiles that fits the token budget. All sums over tokens (LoRA's weight gradients) run within a
datum, and an operation's datums are added in that order. So its numbers depend neither on who shares its micro-batches,
nor on where those were cut, nor on the order in which the datums were sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from math import gcd

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.operations import Datum

ROW_MULTIPLE = 8
"""Rows of a micro-batch are filled up to a multiple of this, or of more where a model asks for it; products of other
row counts may use other kernels."""

TILE_TOKENS = 256
"""Most tokens of a tile, longer datums aside: a micro-batch can be as short as that. Passes of twice as many take a
tenth less for each token, still longer ones no less."""

LANES = 32
"""Numbers that an elementwise function takes at a time (two AVX-512 vectors). What is left over at the end it takes one
by one, with other bits."""


def row_multiple_of(widths: Iterable[int]) -> int:
    """How many rows leave nothing over in tensors of these widths (a gate is one number a row)."""
    return max([ROW_MULTIPLE, *(LANES // gcd(LANES, width) for width in widths)])


class Tile:
    """Some datums of one operation as flat arrays, shortest first (equal lengths share an attention call)."""

    def __init__(self, data: Sequence[Datum], indices: Sequence[int], input_names: Sequence[str]) -> None:
        """`indices`: the tile's places in `data`; `input_names`: the loss's inputs besides target_tokens."""
        self.indices = by_length(data, indices)
        datums = [data[index] for index in self.indices]
        targets = [datum.inputs["target_tokens"] for datum in datums]
        self.lengths = [datum.num_tokens for datum in datums]
        ends = list(accumulate(self.lengths))
        self.num_tokens = ends[-1]
        self.tokens = _tensor([datum.tokens for datum in datums], np.int64)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths])
        self.rows = torch.from_numpy(
            np.concatenate([_target_rows(end, target) for end, target in zip(ends, targets, strict=True)])
        )
        """The row of each target, from the tile's first row; the targets of a datum belong to its last positions."""
        self.targets = _tensor(targets, np.int64)
        self.inputs = {name: _tensor([datum.inputs[name] for datum in datums], np.float32) for name in input_names}
        self.shapes = [target.shape for target in targets]

    def per_datum(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(place in the operation, values in the shape of its targets) of each datum, from one value per target."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(values, list(accumulate(sizes))[:-1])
        return [
            (index, part.reshape(shape)) for index, part, shape in zip(self.indices, parts, self.shapes, strict=True)
        ]


def _tensor(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    """All entries of some arrays, flat."""
    return torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]).astype(dtype, copy=False))


def _target_rows(end: int, target: np.ndarray) -> np.ndarray:
    rows = np.arange(end - len(target), end)
    return rows if target.ndim == 1 else np.repeat(rows, target.shape[1])


def by_length(data: Sequence[Datum], indices: Sequence[int]) -> list[int]:
    """Places in `data`, shortest datum first. What two of one length hold decides which comes first, so that a sum over
    datums does not depend on the order in which they were sent."""
    ordered: list[int] = []
    for _, same in groupby(sorted(indices, key=lambda index: data[index].num_tokens), lambda i: data[i].num_tokens):
        equals = list(same)
        ordered += sorted(equals, key=lambda index: _contents(data[index])) if len(equals) > 1 else equals
    return ordered


def _contents(datum: Datum) -> tuple[bytes, ...]:
    """What a datum is, to be compared with others' of its length."""
    return datum.tokens.tobytes(), *(datum.inputs[name].tobytes() for name in sorted(datum.inputs))


def tiles_of(data: Sequence[Datum], token_budget: int, input_names: Sequence[str]) -> list[Tile]:
    """Cut an operation into tiles of at most TILE_TOKENS tokens, and of `token_budget`; a longer datum is a tile of its
    own."""
    most = min(token_budget, TILE_TOKENS)
    groups: list[list[int]] = []
    room = 0
    for index in by_length(data, range(len(data))):
        size = data[index].num_tokens
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(index)
        room -= size
    return [Tile(data, group, input_names) for group in groups]


def micro_batch(waiting: Mapping[int, deque[Tile]], token_budget: int) -> list[tuple[int, Tile]]:
    """Take the next micro-batch out of the tiles that wait, by operation: (operation, tile) of all that fit, the first
    one in any case. [] if none is left.

    No tile comes before its operation's previous one, so that gradients are added in the order of the operation; an
    operation's tiles lie side by side.
    """
    taken: list[tuple[int, Tile]] = []
    room = token_budget
    for operation, tiles in waiting.items():
        while tiles and (not taken or tiles[0].num_tokens <= room):
            taken.append((operation, tiles.popleft()))
            room -= taken[-1][1].num_tokens
    return taken


class Pack:
    """The rows of a micro-batch: tiles back to back, then filling tokens in a sequence of their own."""

    def __init__(self, tiles: Sequence[Tile], device: torch.device, row_multiple: int = ROW_MULTIPLE) -> None:
        num_tokens = sum(tile.num_tokens for tile in tiles)
        filling = torch.zeros(-num_tokens % row_multiple, dtype=torch.int64)
        self.starts = list(accumulate((tile.num_tokens for tile in tiles), initial=0))
        """Row at which each tile begins, and where the last one ends."""
        self.lengths = [length for tile in tiles for length in tile.lengths] + ([len(filling)] if len(filling) else [])
        self.tokens = torch.cat([*(tile.tokens for tile in tiles), filling]).to(device)
        self.positions = torch.cat([*(tile.positions for tile in tiles), torch.arange(len(filling))]).to(device)
        self.targets = torch.cat([tile.targets for tile in tiles]).to(device)
        self.rows = torch.cat([tile.rows + start for tile, start in zip(tiles, self.starts[:-1], strict=True)]).to(
            device
        )
        self.target_counts = [len(tile.targets) for tile in tiles]

    def per_tile(self, values: Tensor | None) -> Sequence[Tensor | None]:
        """One value per target, cut into the tiles'; None for each if there are none."""
        return [None] * len(self.target_counts) if values is None else values.split(self.target_counts)
