"""Losses over tiles of ragged datums, without a model: what a run returns and the slopes that it sends back, judged by
`loss_reference`; with several targets a position, positions and datums without any weight, and extreme ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loss_reference import COLUMNS, loss_and_slope, rows_of
from tinkercloud.engine.losses import LOSSES, loss_config
from tinkercloud.engine.operations import Datum, ForwardBackward
from tinkercloud.engine.torch.objectives import objective_of
from tinkercloud.engine.torch.packing import tiles_of

SWITCHES = {"sequence_ratio_mask", "sampled"}
signed = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-5, 5, width=32)
logprobs = st.floats(-8, 0, width=32) | st.sampled_from([-1e4, -50.0, 0.0])


@st.composite
def datums(draw, loss: str) -> Datum:
    """One of a loss, with [N] or [N, K] targets; where its first input besides them says so, rows that are empty."""
    length = draw(st.integers(1, 6))
    columns = draw(st.integers(1, 3)) if LOSSES[loss].several_targets else 0
    shape = (length, columns) if columns else (length,)
    inputs: dict[str, np.ndarray] = {"target_tokens": np.zeros(shape, np.int64)}
    for wanted in LOSSES[loss].inputs[1:]:
        kind = st.sampled_from([0.0, 1.0]) if wanted.name in SWITCHES else signed
        kind = logprobs if wanted.name.endswith("logprobs") else kind
        size = int(np.prod(shape))
        values = draw(st.lists(kind, min_size=size, max_size=size))
        inputs[wanted.name] = np.array(values, np.float32).reshape(shape)
    empty = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    inputs[LOSSES[loss].counts][np.array(empty)] = 0
    return Datum(np.zeros(length, np.int32), inputs)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), budget=st.integers(1, 20))
def test_a_batch_has_the_terms_slopes_and_counts_of_its_datums(loss, data, budget):
    batch = tuple(data.draw(st.lists(datums(loss), min_size=1, max_size=5)))
    objective = objective_of(ForwardBackward("m", batch, loss))
    tiles = tiles_of(batch, budget, objective.input_names)
    current = [data.draw(st.lists(logprobs, min_size=len(t.targets), max_size=len(t.targets))) for t in tiles]
    parts = [torch.tensor(values, dtype=torch.float64) for values in current]
    summary = objective.summary(tiles, torch.cat(parts), None)
    slopes = [objective.slopes(tile, part) for tile, part in zip(tiles, parts, strict=True)]
    config, expected, active = loss_config(LOSSES[loss], {}), [], 0
    terms = summary.per_target["elementwise_loss"].split([len(tile.targets) for tile in tiles])
    for tile, part, slope, term in zip(tiles, parts, slopes, terms, strict=True):
        of_datum = [dict(tile.per_datum(values.numpy())) for values in (part, slope, term)]
        for index in tile.indices:
            lp, found_slope, found_term = (values[index] for values in of_datum)
            rows = rows_of(batch[index], lp)
            pairs = np.array([loss_and_slope(loss, row, rows, config) for row in rows])
            np.testing.assert_allclose(found_term.ravel(), pairs[:, 0], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found_slope.ravel(), pairs[:, 1], rtol=1e-9, atol=1e-9)
            expected += pairs[:, 0].tolist()
            counts = batch[index].inputs[LOSSES[loss].counts].reshape(len(lp), -1)
            active += (counts != 0).any(1).sum()
    largest = max(map(abs, expected))  # the rest may be lost beside it
    assert summary.loss == pytest.approx(math.fsum(expected), abs=1e-9 + 1e-12 * largest)
    assert summary.metrics["active_tokens:sum"] == active
    assert all(np.isfinite(value) for value in summary.metrics.values())


def test_every_input_of_every_loss_is_in_the_reference():
    assert {wanted.name for loss in LOSSES.values() for wanted in loss.inputs[1:]} == COLUMNS.keys()
