"""What the control process and an engine process say to each other over their socket.

A frame is a 4-byte big-endian length and the message in `tinkercloud.codec`'s form. Operations travel as the bytes that
the ledger stored: the control process never decodes a batch that it only passes on.
"""

from __future__ import annotations

import socket
import struct

from msgspec import Struct

from tinkercloud.codec import decode, encode
from tinkercloud.engine.base_model import AdapterMemory, BaseModelInfo, EngineOptions
from tinkercloud.engine.results import Result

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 2**32 - 1
"""What a length of 4 bytes can say."""


class FrameTooLarge(Exception):
    """A message takes more than `MAX_FRAME_BYTES`."""


class Start(Struct, frozen=True, tag="start"):
    """The first message to a fresh engine process: load this base model."""

    options: EngineOptions
    scratch: str
    """A folder for whatever the process has no memory for. It is its own, and of no use to the next one."""
    fingerprints: str
    """The folder in which all engines keep what is known of base models' files."""


class RunCycle(Struct, frozen=True, tag="run_cycle"):
    """Run operations of different models in one go; answered by one `CycleDone`."""

    cycle_id: int
    operations: tuple[bytes, ...]


class Ask(Struct, frozen=True, tag="ask"):
    """One operation of a sampler; answered by one `Answer`, samples in any order."""

    ask_id: int
    operation: bytes


class Stop(Struct, frozen=True, tag="stop"):
    """End the process after the running cycle."""


ToEngine = Start | RunCycle | Ask | Stop


class Progress(Struct, frozen=True, tag="progress"):
    """How far loading has come."""

    fraction: float
    text: str


class Ready(Struct, frozen=True, tag="ready"):
    info: BaseModelInfo


class LoadFailed(Struct, frozen=True, tag="load_failed"):
    """The base model cannot be served; trying again would not help."""

    error: str


class CycleDone(Struct, frozen=True, tag="cycle_done"):
    cycle_id: int
    results: tuple[Result, ...]
    adapters: AdapterMemory
    """What they take after it."""
    steps: tuple[tuple[float, float], ...] = ()
    """(start, end) of each of its micro-batches and of what came after them, in seconds since the epoch."""


class Answer(Struct, frozen=True, tag="answer"):
    ask_id: int
    result: Result


class Working(Struct, frozen=True, tag="working"):
    """The thread that computes has come further, and has not said so for a while."""


FromEngine = Progress | Ready | LoadFailed | CycleDone | Answer | Working


def frame(message: ToEngine | FromEngine) -> bytes:
    """The message as it goes over the socket. Raises `FrameTooLarge`."""
    body = encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"{len(body):,} bytes, and at most {MAX_FRAME_BYTES:,} can be sent")
    return _LENGTH.pack(len(body)) + body


def receive(sock: socket.socket) -> ToEngine | None:
    """Read the next message to the engine; None when the control process is gone."""
    header = _receive_exactly(sock, _LENGTH.size)
    if header is None:
        return None
    body = _receive_exactly(sock, _LENGTH.unpack(header)[0])
    return None if body is None else decode(body, ToEngine)


def _receive_exactly(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return data


LENGTH_BYTES = _LENGTH.size


def frame_length(header: bytes) -> int:
    """Bytes that follow a frame's header."""
    return _LENGTH.unpack(header)[0]
