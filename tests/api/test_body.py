"""Bodies: their limits, zstd that is damaged or a bomb, and whose a damaged body was."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from tinker.proto import tinker_public_pb2 as pb

from tinkercloud.api.errors import TooLarge
from tinkercloud.api.wire.body import Unreadable, find_address, read_body
from tinkercloud.api.wire.reading import read_json

LIMITS = SimpleNamespace(max_body_bytes=100_000, max_decompressed_bytes=1_000_000)
MESSAGE = pb.ForwardBackwardRequest(model_id="run:train:3", seq_id=300, loss_fn="x" * 50_000).SerializeToString()
ADDRESS = ("run:train:3", 300)


def request(body: bytes, piece: int = 10_000, **headers: str) -> Request:
    """A request that arrives in pieces."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)] or [b""]

    async def receive():
        part = pieces.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(pieces)}

    scope = {
        "type": "http",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "app": SimpleNamespace(state=SimpleNamespace(settings=LIMITS)),
    }
    return Request(scope, receive)


def read(body: bytes, piece: int = 10_000, **headers: str) -> bytes:
    return asyncio.run(read_body(request(body, piece, **headers)))


def refusal(body: bytes, piece: int = 10_000, **headers: str) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        read(body, piece, **headers)
    return caught.value


PROTO = {"content_type": "application/x-protobuf"}
ZSTD = {"content_encoding": "zstd", **PROTO}


@pytest.mark.parametrize("declared", [True, False])
def test_zstd_with_and_without_its_size_declared(declared):
    body = zstandard.ZstdCompressor(write_content_size=declared).compress(MESSAGE)
    assert read(body, **ZSTD) == MESSAGE
    assert read(MESSAGE, **PROTO) == MESSAGE


@pytest.mark.parametrize("piece", [1000, 10_000, 10**6])
def test_a_body_that_is_too_large_is_refused_with_its_address(piece):
    error = refusal(MESSAGE * 3, piece, **PROTO)
    assert isinstance(error, TooLarge) and error.address == ADDRESS
    assert "larger than the 100000 bytes" in str(error)


def test_a_json_body_that_is_too_large_is_refused_with_its_address():
    for order in (("seq_id", "model_id", "data"), ("data", "model_id", "seq_id")):
        value = {"data": [0] * 100_000, "model_id": "run:train:3", "seq_id": 300}
        error = refusal(json.dumps({name: value[name] for name in order}).encode())
        assert isinstance(error, TooLarge) and error.address == ADDRESS


@pytest.mark.parametrize("declared", [True, False])
def test_a_bomb_is_stopped_while_it_is_decompressed(declared):
    bomb = zstandard.ZstdCompressor(write_content_size=declared).compress(MESSAGE + bytes(10**8))
    assert len(bomb) < LIMITS.max_body_bytes
    error = refusal(bomb, **ZSTD)
    assert isinstance(error, TooLarge) and error.address == ADDRESS
    assert "1000000 bytes decompressed" in str(error)


def test_zstd_that_is_cut_short_is_refused_with_its_address():
    noise = zstandard.ZstdCompressor().compress(MESSAGE + bytes(range(256)) * 2000)
    for end in range(len(noise) - 1, len(noise) - 5, -1):
        error = refusal(noise[:end], **ZSTD)
        assert not isinstance(error, TooLarge) and "cut short" in str(error)
    assert error.address == ADDRESS


def test_something_that_is_not_zstd_is_refused():
    for body in (b"", b"hello", MESSAGE, b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + b"\xff" * 99):
        assert "zstd" in str(refusal(body, **ZSTD))
    assert "'br' is not understood" in str(refusal(b"x", content_encoding="br"))


@pytest.mark.parametrize("body", [b"\xff\xfe", b"{", b"{} {}", b'{"a": NaN}', b"[" * 10**4, b"3", b"[]", b'"\\ud800"'])
def test_something_that_is_not_a_json_object_is_refused(body):
    with pytest.raises(Unreadable):
        asyncio.run(read_json(request(body)))


def test_an_empty_body_is_an_empty_object():
    assert asyncio.run(read_json(request(b""))) == {}


@given(st.binary(max_size=300), st.binary(max_size=100), st.booleans())
def test_an_address_is_looked_for_in_anything(head, tail, protobuf):
    address = find_address(head, tail, protobuf)
    assert address is None or (isinstance(address[0], str) and 0 <= address[1] < 2**70)


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30), st.integers(1, 2**31 - 1)
)
def test_a_protobuf_address_is_found_in_every_prefix_that_holds_it(model_id, seq_id):
    message = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id)
    whole = message.SerializeToString()
    assert find_address(whole + b"\x1a\xff", b"", protobuf=True) == (model_id, seq_id)
    for end in range(len(whole)):
        assert find_address(whole[:end], b"", protobuf=True) is None


def test_an_id_with_nul_is_no_address():
    """No database could look for it."""
    message = pb.ForwardBackwardRequest(model_id="a\0", seq_id=1).SerializeToString()
    assert find_address(message, b"", protobuf=True) is None
    assert find_address(b'{"model_id": "a\0", "seq_id": 1', b"", protobuf=False) is None
