"""Tiles and micro-batches."""

from __future__ import annotations

from collections import deque
from itertools import groupby, pairwise
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.examples import make_datum
from tinkercloud.engine.torch.packing import Pack, Tile, micro_batch, tiles_of

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(lengths, st.integers(1, 64))
def test_tiles_hold_every_datum_once_within_the_budget(lengths, budget):
    tiles = tiles_of([make_datum(0, length) for length in lengths], budget, ["weights"])
    assert sorted(index for tile in tiles for index in tile.indices) == list(range(len(lengths)))
    order = [index for tile in tiles for index in tile.indices]
    assert [(lengths[index], index) for index in order] == sorted(zip(lengths, range(len(lengths)), strict=True))
    for tile, following in pairwise(tiles):
        assert tile.num_tokens + lengths[following.indices[0]] > budget
    assert all(tile.num_tokens <= budget or len(tile.indices) == 1 for tile in tiles)


def _waiting(tiles: list[tuple[int, int]]) -> dict[int, deque]:
    """Tiles given as (operation, tokens)."""
    waiting: dict[int, deque] = {}
    for operation, tokens in tiles:
        waiting.setdefault(operation, deque()).append(SimpleNamespace(num_tokens=tokens))
    return waiting


def _sizes(batch: list[tuple[int, SimpleNamespace]]) -> list[tuple[int, int]]:
    return [(operation, tile.num_tokens) for operation, tile in batch]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=30), st.integers(1, 64))
def test_micro_batches_keep_the_order_of_an_operation(tiles, budget):
    waiting, batches = _waiting(tiles), []
    while batch := micro_batch(waiting, budget):
        batches.append(_sizes(batch))
    for operation in range(4):
        own = [tile for batch in batches for tile in batch if tile[0] == operation]
        assert own == [tile for tile in tiles if tile[0] == operation]
    for batch in batches:
        assert sum(size for _, size in batch) <= budget or len(batch) == 1
        operations = [operation for operation, _ in batch]
        assert len(list(groupby(operations))) == len(set(operations)), "they lie side by side"


def test_small_tiles_share_a_micro_batch():
    waiting = _waiting([(0, 30), (0, 20), (0, 5), (1, 10), (2, 20)])
    batches = [_sizes(micro_batch(waiting, 40)) for _ in range(4)]
    assert batches[0] == [(0, 30), (1, 10)], "0's third does not overtake its second"
    assert batches[1:] == [[(0, 20), (0, 5)], [(2, 20)], []]
    assert _sizes(micro_batch(_waiting([(0, 50), (1, 10)]), 40)) == [(0, 50)], "a datum that is too long runs alone"


def test_targets_belong_to_the_last_positions():
    data = [make_datum(1, 5, targets=2), make_datum(2, 3, several=2)]
    tile = Tile(data, [0, 1], ["weights"])
    assert tile.indices == [1, 0]
    assert tile.rows.tolist() == [0, 0, 1, 1, 2, 2, 6, 7]
    assert tile.tokens.tolist() == [*data[1].tokens, *data[0].tokens]
    assert tile.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    parts = dict(tile.per_datum(tile.targets.numpy()))
    for index, datum in enumerate(data):
        assert np.array_equal(parts[index], datum.inputs["target_tokens"])


def test_a_pack_is_filled_up_to_whole_rows():
    tiles = [Tile([make_datum(1, 5)], [0], ["weights"]), Tile([make_datum(2, 6)], [0], ["weights"])]
    pack = Pack(tiles, torch.device("cpu"))
    assert pack.starts == [0, 5, 11]
    assert pack.lengths == [5, 6, 5]
    assert len(pack.tokens) == len(pack.positions) == 16
    assert pack.rows.tolist() == list(range(11))
    assert pack.target_counts == [5, 6]
