"""One binary form for everything that is stored or sent between tinkercloud's processes.

Operations and results are `msgspec` structs. They are written to the ledger's segment files and sent to the engine
processes in the same bytes, so a payload is encoded once, when a request is accepted, and decoded once, where it is
used. Arrays travel as (dtype, shape, raw bytes): no copies through Python numbers, and never pickle.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")

_DTYPES = {"float32", "int32", "int64"}
"""Array types that may travel. Anything else in a stored payload means that the file is not ours."""


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no stored form")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"{kind.__name__} has no stored form")
    dtype, shape, data = value
    if dtype not in _DTYPES:
        raise ValueError(f"array of dtype {dtype!r}; expected one of {sorted(_DTYPES)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: Any) -> bytes:
    """The stored form of a struct, or of any tree of structs, numbers, strings and arrays."""
    return _encoder.encode(value)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """Read back what `encode` wrote, as `kind` (a struct, or a union of tagged structs).

    Arrays are read-only views into `data`. Raises `msgspec.ValidationError` if the bytes are something else.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_decode_array)
    return decoder.decode(data)
