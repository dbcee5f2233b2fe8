"""A request's body: bounded in size, decompressed, and when it cannot be read, still asked who it was for."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import zstandard
from fastapi import Request

from tinkercloud.api.errors import TooLarge
from tinkercloud.errors import InvalidRequest

T = TypeVar("T")

OFF_LOOP_BYTES = 256 * 1024
"""Bodies above this many bytes are decoded in a thread, so that polls are not kept waiting."""
DRAIN_BYTES = 2**30
"""How much of a body that is too large is still read, so that its sender gets to read the answer."""
HEAD_BYTES, TAIL_BYTES = 64 * 1024, 4 * 1024
"""How much of the start and of the end of a body that is too large is kept, to find the model and seq_id in it."""
ZSTD_STEP_BYTES = 1024
"""Compressed bytes that are decompressed at a time: at most some 32 MiB come of them before the size is looked at."""

HOLD = "tinkercloud.hold"
"""Where a request's scope has the function that is told how many more bytes of it are in hand; raises Overloaded."""

PROTOBUF = "application/x-protobuf"
_TOO_LARGE = "the body is larger than the {} that this server takes; send fewer datums in a request"


class Unreadable(InvalidRequest):
    """A body that could not be decoded. `address` is what was found in it: model_id and seq_id, or None.

    `forward_only` is set if the body surely said so. Where it cannot be known a batch counts as one that was to leave
    gradients: to take it for a forward would let the next optim_step apply a batch that lacks a part.
    """

    def __init__(self, error: str, address: tuple[str, int] | None, forward_only: bool = False) -> None:
        super().__init__(error)
        self.address = address
        self.forward_only = forward_only


class UnreadablyLarge(Unreadable, TooLarge):
    """A body that is larger than the server takes."""


def is_protobuf(request: Request) -> bool:
    """Whether the body says that it is protobuf."""
    return request.headers.get("content-type", "").startswith(PROTOBUF)


async def read_body(request: Request) -> bytes:
    """The whole body, decompressed. Raises `Unreadable`, bounded by the settings' byte limits in both forms, and
    Overloaded."""
    settings = request.app.state.settings
    limit = int(settings.max_body_bytes)
    encoding = request.headers.get("content-encoding", "identity").lower()
    protobuf = is_protobuf(request)
    body = bytearray()
    stream = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > limit:
            head, tail = await _drain(stream, body)
            if encoding == "zstd":
                head, tail = _decompressed_prefix(head), b""
            raise UnreadablyLarge(_TOO_LARGE.format(f"{limit} bytes"), find_address(head, tail, protobuf))
    if encoding in ("identity", ""):
        return bytes(body)
    if encoding != "zstd":
        raise Unreadable(f"content-encoding {encoding!r} is not understood; send zstd or none", None)
    whole = await off_loop(len(body), _decompress, bytes(body), int(settings.max_decompressed_bytes), protobuf)
    if (hold := request.scope.get(HOLD)) is not None:
        hold(len(whole))
    return whole


async def off_loop(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a decoder: here for a small body, in a thread for one above `OFF_LOOP_BYTES`."""
    if size > OFF_LOOP_BYTES:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)


async def _drain(stream: AsyncIterator[bytes], read: bytearray) -> tuple[bytes, bytes]:
    head, tail, total = bytes(read[:HEAD_BYTES]), bytes(read[-TAIL_BYTES:]), len(read)
    read.clear()
    async for chunk in stream:
        tail = (tail + chunk)[-TAIL_BYTES:]
        total += len(chunk)
        if total > DRAIN_BYTES:
            break
    return head, tail


def _decompress(body: bytes, limit: int, protobuf: bool) -> bytes:
    parts: list[bytes] = []
    size = 0
    stream = zstandard.ZstdDecompressor().decompressobj()
    try:
        for start in range(0, len(body), ZSTD_STEP_BYTES):
            parts.append(stream.decompress(body[start : start + ZSTD_STEP_BYTES]))
            size += len(parts[-1])
            if size > limit:
                address = find_address(_head(parts), b"", protobuf)
                raise UnreadablyLarge(_TOO_LARGE.format(f"{limit} bytes decompressed"), address)
            if stream.eof:
                return b"".join(parts)
    except zstandard.ZstdError:
        pass  # damaged and cut short are the same to the sender: answered below
    address = find_address(_head(parts), b"", protobuf)
    raise Unreadable("the body says that it is zstd, but it is damaged, cut short or something else", address)


def _head(parts: list[bytes]) -> bytes:
    head = b""
    for part in parts:
        head += part
        if len(head) >= HEAD_BYTES:
            break
    return head[:HEAD_BYTES]


def _decompressed_prefix(body: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)) as reader:
            return reader.read(HEAD_BYTES)
    except zstandard.ZstdError:
        return b""


_JSON_MODEL = re.compile(rb'"model_id"\s*:\s*"([^"\\\x00]{1,256})"')
_JSON_SEQ = re.compile(rb'"seq_id"\s*:\s*(\d{1,18})')
_PROTO_ADDRESS = re.compile(rb"\A\x0a([\x01-\x7f])(.*)", re.DOTALL)


def find_address(head: bytes, tail: bytes, protobuf: bool) -> tuple[str, int] | None:
    """(model_id, seq_id) from the start and the end of a damaged body: protobuf's fields 1 and 2 come first, JSON's are
    small and stand at either end."""
    if protobuf:
        return _protobuf_address(head)
    for part in (tail, head):
        models, seqs = _JSON_MODEL.findall(part), _JSON_SEQ.findall(part)
        if models and seqs:
            return models[-1].decode(errors="replace"), int(seqs[-1])
    return None


def _protobuf_address(head: bytes) -> tuple[str, int] | None:
    match = _PROTO_ADDRESS.match(head)
    if not match:
        return None
    length = match[1][0]
    model_id, rest = match[2][:length], match[2][length:]
    if len(model_id) < length or b"\0" in model_id:
        return None
    seq_id, shift = 0, 0
    if rest[:1] == b"\x10":
        for byte in rest[1:11]:
            seq_id |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return model_id.decode(errors="replace"), seq_id
    return None
