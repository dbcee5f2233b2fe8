"""Tokens and tensors in JSON requests as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.arrays import Batch, DenseBudget, check_csr, dense_from_csr, shaped
from tinkercloud.api.wire.json import ForwardBackwardInput, ModelInput, TensorData
from tinkercloud.control.stability import Provenance, Span
from tinkercloud.engine.operations import Datum, Matrix
from tinkercloud.errors import InvalidRequest


def integers(values: list[Any], dtype: type[np.integer], where: str) -> np.ndarray:
    """A JSON list of integers as an array."""
    try:
        array = np.asarray(values if values else [], dtype=None if values else dtype)
        if array.ndim == 1 and array.dtype.kind == "i":
            limits = np.iinfo(dtype)
            if array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max):
                return array.astype(dtype, copy=False)
    except (ValueError, OverflowError):
        pass  # ragged lists and numbers beyond 64 bits get the same sentence
    raise InvalidRequest(f"{where}: a flat list of integers that fit {np.dtype(dtype).name} is expected")


def _floats(values: list[Any], where: str) -> np.ndarray:
    try:
        array = np.asarray(values if values else [], dtype=None if values else np.float32)
        if array.ndim == 1 and array.dtype.kind in "if":
            return array.astype(np.float32, copy=False)
    except (ValueError, OverflowError):
        pass  # as above
    raise InvalidRequest(f"{where}: a flat list of numbers is expected")


def tokens_from(model_input: ModelInput, where: str) -> np.ndarray:
    """A prompt's or a datum's token ids, int32 [N]."""
    for chunk in model_input.chunks:
        if chunk.type != "encoded_text":
            raise InvalidRequest(f"{where} has a chunk of {chunk.type}; this server takes text only")
    parts = [integers(chunk.tokens, np.int32, where) for chunk in model_input.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int32)


def batch_from(given: ForwardBackwardInput, dense_bytes: int) -> Batch:
    """The loss and datums. Sparse tensors become dense, `dense_bytes` at most."""
    budget = DenseBudget(dense_bytes)
    data = []
    for index, datum in enumerate(given.data):
        where = f"datum {index}"
        tokens = tokens_from(datum.model_input, f"{where}, model_input")
        inputs = {name: _array(tensor, budget, f"{where}, {name}") for name, tensor in datum.loss_fn_inputs.items()}
        data.append(Datum(tokens=tokens, inputs=inputs))
    provenance = [_provenance(datum) for datum in given.data]
    return Batch(loss_fn=given.loss_fn, loss_fn_config=given.loss_fn_config or {}, data=data, provenance=provenance)


def _provenance(datum: wire.Datum) -> Provenance | None:
    if not datum.model_input_spans and not datum.loss_fn_input_spans:
        return None
    return Provenance(_spans(datum.model_input_spans), _spans(datum.loss_fn_input_spans))


def _spans(spans: list[wire.Span] | None) -> tuple[Span, ...]:
    places = [(span.sampled_tokens or span.prompt_tokens, span.sampled_tokens is not None) for span in spans or ()]
    return tuple(
        Span(place.sequence_id, place.offset, place.length, sampled) for place, sampled in places if place is not None
    )


def integer_matrix(tensor: TensorData, where: str) -> Matrix:
    """An int64 matrix in the layout that it has."""
    if tensor.dtype != "int64":
        raise InvalidRequest(f"{where} must be int64, not {tensor.dtype}")
    values = integers(tensor.data, np.int64, where)
    if tensor.sparse_crow_indices is not None:
        crow = integers(tensor.sparse_crow_indices, np.int64, where)
        col = integers(tensor.sparse_col_indices or [], np.int64, where)
        return Matrix(values, check_csr(values, crow, col, tensor.shape, where), crow, col)
    dense = shaped(values, tensor.shape, where)
    if dense.ndim != 2:
        raise InvalidRequest(f"{where} must have two dimensions, not the shape {list(dense.shape)!s:.200}")
    return Matrix(values, dense.shape)


def _array(tensor: TensorData, budget: DenseBudget, where: str) -> np.ndarray:
    if tensor.dtype == "int64":
        values = integers(tensor.data, np.int64, where)
    else:
        values = _floats(tensor.data, where)
    if tensor.sparse_crow_indices is None:
        return shaped(values, tensor.shape, where)
    crow = integers(tensor.sparse_crow_indices, np.int64, where)
    col = integers(tensor.sparse_col_indices or [], np.int64, where)
    return dense_from_csr(values, crow, col, tensor.shape, budget, where)
