"""Where the engine's tests run, and how near their numbers must then be to others.

`TINKERCLOUD_TEST_DEVICE` (cpu) and `TINKERCLOUD_TEST_DTYPE` (float32 on the CPU, else bfloat16) are the base models' of
the tests that are marked `device`; `make test-engines DEVICE=cuda` sets them. On the CPU in float32 numbers that must
be the same are so bit for bit, and others are within the tolerance that a test gives. Elsewhere the tolerances are
those below, and the reference is in float32 over the same rounded weights; where `assert_as_near` judges, transformers
in the same type says how far that may be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

DEVICE = os.environ.get("TINKERCLOUD_TEST_DEVICE", "cpu")
DTYPE = os.environ.get("TINKERCLOUD_TEST_DTYPE", "float32" if DEVICE == "cpu" else "bfloat16")
EXACT = (DEVICE, DTYPE) == ("cpu", "float32")

LOGPROBS = {"float32": 1e-4, "bfloat16": 0.06}[DTYPE]
"""Distance of nine tenths of log-probabilities, nats. Not of all, because a router that is nearly undecided may choose
another expert for a token in bfloat16."""

GRADIENTS = {"float32": 1e-4, "bfloat16": 0.1}[DTYPE]
"""Distance of an adapter's whole gradient, or of its parameters, in L2, relative to the reference's."""

ROUTED = 3.0
"""So many times that where there are routers."""

NEAR = 1.5
"""Distance from float32, as a multiple of transformers' own in the same type. Over several random models of each family
it was 0.8 to 1.2 times that; nine tenths of some hundred tokens are within a distance that is itself not sharper."""

REGRET = 0.005
"""Nats by which the mean likelihood of greedy tokens may be further from the best than that of transformers' own: some
near ties, in which one of some hundred tokens may lose half a nat where a router is nearly undecided."""


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float32, its weights rounded as the engine's are."""
    if DTYPE != "float32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, DTYPE)).float()
    return model


def assert_logprobs(ours: np.ndarray | Tensor, expected: np.ndarray | Tensor, atol: float = 1e-5) -> None:
    """Or any numbers of their size; `atol` is of each, on the CPU in float32."""
    ours, expected = _array(ours), _array(expected)
    assert ours.shape == expected.shape
    if EXACT:
        np.testing.assert_allclose(ours, expected, atol=atol, rtol=0)
    else:
        assert np.isfinite(ours).all()
        assert np.quantile(np.abs(ours - expected), 0.9) <= LOGPROBS


def assert_as_near(ours: np.ndarray | Tensor, theirs: np.ndarray | Tensor, exact: np.ndarray | Tensor) -> None:
    """Log-probabilities, no further from those of float32 than transformers' of the same type are."""
    ours, theirs, exact = _array(ours), _array(theirs), _array(exact)
    assert ours.shape == theirs.shape == exact.shape and np.isfinite(ours).all()
    near, far = (np.quantile(np.abs(side - exact), 0.9) for side in (ours, theirs))
    assert near <= NEAR * far


def assert_sum(ours: float, expected: float, terms: int, atol: float = 1e-5) -> None:
    """A sum of so many log-probabilities, of weights below 1."""
    assert abs(ours - expected) <= (atol if EXACT else LOGPROBS * terms)


def assert_tensors(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 1e-5, routed: bool = False
) -> None:
    """All of an adapter's. On the CPU in float32 `atol` is relative to each tensor's largest number where that is above
    1: PEFT's own float32 is as far from float64."""
    assert ours.keys() == expected.keys()
    if EXACT:
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, atol=atol * max(1.0, tensor.abs().max().item()), rtol=0)
    else:
        flat = (torch.cat([_tensor(side[key]).flatten() for key in expected]) for side in (ours, expected))
        assert _distance(*flat) <= GRADIENTS * (ROUTED if routed else 1)


def assert_flat(ours: Tensor, expected: Tensor, relative: float = 0.0) -> None:
    """Flat buffers; on the CPU in float32 `relative` in L2, 0 for the same bits."""
    if EXACT and not relative:
        assert torch.equal(ours, expected)
        return
    assert _distance(ours, expected) <= (relative if EXACT else GRADIENTS)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """Bit for bit on the CPU in float32."""
    np.testing.assert_array_equal(one, other) if EXACT else assert_logprobs(one, other)


def assert_same_metrics(one: Mapping[str, float], other: Mapping[str, float]) -> None:
    """Likewise. Sums over some tokens may be as far apart as so many log-probabilities."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        far = 0.0 if EXACT else LOGPROBS * max(1.0, one["tokens:sum"], abs(value))
        assert abs(value - other[name]) <= far, name


def _distance(ours: Tensor, expected: Tensor) -> float:
    ours, expected = _tensor(ours), _tensor(expected)
    return ((ours - expected).norm() / expected.norm()).item()


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values


def _tensor(values: Tensor) -> Tensor:
    return values.detach().double().cpu()
