"""The protobuf forms: ForwardBackwardRequest in, SampleResponse and ForwardBackwardOutput out.

Messages are the SDK's own. Arrays are copied as bytes and never become Python numbers.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from tinker.proto import tinker_public_pb2 as pb

from tinkercloud.api.wire.arrays import Batch, DenseBudget, dense_from_csr, from_bytes, shaped
from tinkercloud.api.wire.body import Unreadable, find_address
from tinkercloud.control.stability import Provenance, Span
from tinkercloud.engine.operations import Datum, Matrix
from tinkercloud.engine.results import LossOutput, SampleOutput, TopLogprobs
from tinkercloud.errors import InvalidRequest

_INT32, _INT64, _FLOAT32, _UINT16 = (np.dtype(name) for name in ("<i4", "<i8", "<f4", "<u2"))
_DTYPES = {
    pb.DTYPE_FLOAT32: _FLOAT32,
    pb.DTYPE_INT64: _INT64,
    pb.DTYPE_INT32: _INT32,
    pb.DTYPE_BFLOAT16: _UINT16,
}
_DTYPE_NUMBERS = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}
_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


# ---------------------------------------------------------------- requests


def parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """The message in a body. Raises `Unreadable`."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        text = "the body is not a protobuf ForwardBackwardRequest, though its content-type says so"
        address = find_address(body[:1024], b"", protobuf=True)
        raise Unreadable(text, address, forward_only=_says_forward_only(body)) from None
    return message


def _says_forward_only(body: bytes) -> bool:
    """Whether a damaged message says so: only if its own fields are whole, and the damage is inside one of them."""
    try:
        outermost = UnknownFieldSet(Empty.FromString(body))
    except DecodeError:
        return False
    number = pb.ForwardBackwardRequest.FORWARD_ONLY_FIELD_NUMBER
    said = [field.data for field in outermost if field.field_number == number]
    return bool(said) and said[-1] == 1


def batch_from(message: pb.ForwardBackwardRequest, dense_bytes: int) -> Batch:
    """The message's loss and datums. Sparse tensors become dense, `dense_bytes` at most."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    budget = DenseBudget(dense_bytes)
    data = [_datum(datum, index, budget) for index, datum in enumerate(message.data)]
    provenance = [_provenance(datum, f"datum {index}") for index, datum in enumerate(message.data)]
    return Batch(loss_fn=message.loss_fn, loss_fn_config=config, data=data, provenance=provenance)


def _datum(message: pb.Datum, index: int, budget: DenseBudget) -> Datum:
    parts = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise InvalidRequest(f"datum {index}: model_input has a chunk of {kind}; this server takes text only")
        parts.append(from_bytes(chunk.encoded_text.tokens, _INT32, f"datum {index}, model_input"))
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, _INT32)
    inputs = {name: _array(tensor, budget, f"datum {index}, {name}") for name, tensor in message.loss_fn_inputs.items()}
    return Datum(tokens=tokens, inputs=inputs)


def _provenance(message: pb.Datum, where: str) -> Provenance | None:
    if not message.model_input_spans and not message.loss_fn_input_spans:
        return None
    return Provenance(
        model_input=tuple(_span(span, f"{where}, model_input_spans") for span in message.model_input_spans),
        targets=tuple(_span(span, f"{where}, loss_fn_input_spans") for span in message.loss_fn_input_spans),
    )


def _span(message: pb.ProvenanceSpan, where: str) -> Span:
    kind = message.WhichOneof("span")
    if kind is None:
        raise InvalidRequest(f"{where}: a span has neither prompt_tokens nor sampled_tokens")
    place = getattr(message, kind)
    return Span(place.sequence_id, place.offset, place.length, sampled=kind == "sampled_tokens")


def _array(tensor: pb.Tensor, budget: DenseBudget, where: str) -> np.ndarray:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where}: dtype {tensor.dtype} is unknown; send FLOAT32, BFLOAT16, INT64 or INT32")
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return shaped(_widened(from_bytes(tensor.dense, dtype, where)), tensor.shape, where)
    csr = tensor.sparse_csr
    values = _widened(from_bytes(csr.values, dtype, where))
    crow, col = from_bytes(csr.crow_indices, _INT64, where), from_bytes(csr.col_indices, _INT64, where)
    return dense_from_csr(values, crow, col, tensor.shape, budget, where)


def _widened(values: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy has not, is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == _UINT16 else values


# ---------------------------------------------------------------- results


def encode_loss(output: LossOutput) -> bytes:
    """A ForwardBackwardOutput. One record for each run of datums whose arrays have the same trailing shapes."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.output_type, metrics=output.metrics)
    for layout, run in groupby(output.outputs, _layout):
        datums = list(run)
        record = message.loss_fn_outputs.add(type_tag=output.output_type, num_datums=len(datums))
        for name, dtype, trailing in layout:
            arrays = [np.ascontiguousarray(datum[name]) for datum in datums]
            field = record.fields[name]
            field.data = b"".join(array.data for array in arrays)
            field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
            field.dtype = _DTYPE_NUMBERS[dtype]
            field.trailing_shape.extend(trailing)
    return message.SerializeToString()


def _layout(datum: dict[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, array.dtype.name, array.shape[1:]) for name, array in datum.items()]


def encode_sample(output: SampleOutput) -> bytes:
    """A SampleResponse."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for sequence in output.sequences:
        added = message.sequences.add(
            stop_reason=_STOP_REASONS[sequence.stop_reason],
            tokens=sequence.tokens.astype(_INT32, copy=False).tobytes(),
            logprobs=sequence.logprobs.astype(_FLOAT32, copy=False).tobytes(),
        )
        if sequence.top_logprobs is not None:
            _write_top(added.topk_sampled_logprobs, sequence.top_logprobs)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs.astype(_FLOAT32, copy=False).tobytes()
    if output.prompt_top_logprobs is not None:
        _write_top(message.topk_prompt_logprobs, output.prompt_top_logprobs)
    if output.target_prompt_logprobs is not None:
        _write_matrix(message.target_prompt_logprobs, output.target_prompt_logprobs)
    if output.prompt_alt_tokens is not None:
        _write_dense(message.prompt_alt_tokens.tokens, output.prompt_alt_tokens.token_ids)
        _write_dense(message.prompt_alt_tokens.logprobs, output.prompt_alt_tokens.logprobs)
    return message.SerializeToString()


def _write_top(message: pb.TopkLogprobs, top: TopLogprobs) -> None:
    message.length, message.k = top.token_ids.shape
    message.token_ids = top.token_ids.astype(_INT32, copy=False).tobytes()
    message.logprobs = top.logprobs.astype(_FLOAT32, copy=False).tobytes()


def _write_dense(message: pb.Tensor, array: np.ndarray) -> None:
    message.dtype = _DTYPE_NUMBERS[array.dtype.name]
    message.shape.extend(array.shape)
    message.dense = array.tobytes()


def _write_matrix(message: pb.Tensor, matrix: Matrix) -> None:
    if matrix.row_ends is None or matrix.columns is None:
        _write_dense(message, matrix.values.reshape(matrix.shape))
        return
    message.dtype = _DTYPE_NUMBERS[matrix.values.dtype.name]
    message.shape.extend(matrix.shape)
    message.sparse_csr.values = matrix.values.tobytes()
    message.sparse_csr.crow_indices = matrix.row_ends.astype(_INT64, copy=False).tobytes()
    message.sparse_csr.col_indices = matrix.columns.astype(_INT64, copy=False).tobytes()
