"""Tensors off the wire as numpy arrays, checked: a wrong length, shape or index is the sender's error, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tinkercloud.control.stability import Provenance
from tinkercloud.engine.operations import Datum
from tinkercloud.errors import InvalidRequest


class Batch(Struct):
    """A forward or forward_backward request as it came, decoded from either wire form; nothing is judged yet."""

    loss_fn: str
    loss_fn_config: dict[str, float | str]
    data: list[Datum]
    """Arrays have the dtypes that they had on the wire: float32, int64 or int32."""
    provenance: list[Provenance | None]
    """Of each datum; None where it has no spans."""


class DenseBudget:
    """How many bytes sparse tensors may still become, over a whole request: a few bytes can declare any shape."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def take(self, size: int, where: str) -> None:
        self.left -= size
        if self.left < 0:
            raise InvalidRequest(
                f"{where}: the request's sparse tensors are more than {self.limit} bytes when dense; send fewer datums"
            )


def from_bytes(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    """A flat read-only view of little-endian bytes."""
    if len(data) % dtype.itemsize:
        raise InvalidRequest(f"{where}: {len(data)} bytes are not a whole number of {dtype.itemsize}-byte {dtype.name}")
    return np.frombuffer(data, dtype)


def shaped(values: np.ndarray, shape: Sequence[int] | None, where: str) -> np.ndarray:
    """Flat values in their declared shape; without one they are a vector."""
    if not shape:
        return values
    try:
        if min(shape) >= 0 and math.prod(shape) == len(values):
            return values.reshape(shape)
    except ValueError:
        pass  # more dimensions, or longer ones in an empty tensor, than an array can have
    raise InvalidRequest(f"{where}: shape {list(shape)!s:.200} does not fit its {len(values)} values")


def check_csr(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int] | None, where: str
) -> tuple[int, int]:
    """The (rows, columns) of a sparse CSR matrix that is whole: each row's columns ascend and are within it."""
    if not shape or len(shape) != 2 or min(shape) < 0:
        raise InvalidRequest(f"{where}: a sparse tensor needs a shape [rows, columns], not {list(shape or [])!s:.200}")
    rows, columns = shape
    counts = np.diff(crow)
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(values) or (counts < 0).any():
        raise InvalidRequest(
            f"{where}: sparse_crow_indices must be {rows + 1} ascending numbers from 0 to its {len(values)} values"
        )
    if len(col) != len(values) or (len(col) and (col.min() < 0 or col.max() >= columns)):
        raise InvalidRequest(
            f"{where}: sparse_col_indices must be {len(values)} columns, one for each value, from 0 to {columns - 1}"
        )
    row = np.repeat(np.arange(rows), counts)
    if ((np.diff(col) <= 0) & (np.diff(row) == 0)).any():
        raise InvalidRequest(f"{where}: the columns of a row in sparse_col_indices must ascend, each once")
    return rows, columns


def dense_from_csr(
    values: np.ndarray,
    crow: np.ndarray,
    col: np.ndarray,
    shape: Sequence[int] | None,
    budget: DenseBudget,
    where: str,
) -> np.ndarray:
    """A sparse CSR matrix with zeros where nothing is listed."""
    rows, columns = check_csr(values, crow, col, shape, where)
    budget.take(max(rows, 1) * max(columns, 1) * values.itemsize, where)  # an empty one can have a long side, too
    row = np.repeat(np.arange(rows), np.diff(crow))
    dense = np.zeros((rows, columns), values.dtype)
    dense[row, col] = values
    return dense
