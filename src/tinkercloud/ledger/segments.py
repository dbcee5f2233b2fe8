"""Append-only files that hold payloads and outcomes.

A segment file is a row of blobs, each behind a header of its length and CRC-32. Nothing in a file says where its blobs
are: SQL points at them, and only after they were synced. So whatever a crash leaves behind the last referenced blob is
unreachable and needs no repair.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from tinkercloud.ledger.files import sync

SEGMENT_BYTES = 64 * 2**20
"""A segment file that has reached this size is followed by a new one."""

_HEADER = struct.Struct("<QI")
_SUFFIX = ".seg"
_sync_data = getattr(os, "fdatasync", os.fsync)


class Corrupt(Exception):
    """A stored blob is not what was written: the disk, or someone, has changed it."""


class Blob(NamedTuple):
    """Where a blob lies: its file, the place of its header (bytes), and its own length (bytes)."""

    segment: int
    offset: int
    length: int


def segment_file(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"{segment:08d}{_SUFFIX}"


def read(folder: Path, blob: Blob) -> bytes:
    """The blob's bytes, checked. Raises `Corrupt`, also if the file is gone."""
    file = segment_file(folder, blob.segment)
    try:
        stream = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Corrupt(f"{file} is missing: restore the data directory from a backup") from None
    try:
        header = os.pread(stream, _HEADER.size, blob.offset)
        data = os.pread(stream, blob.length, blob.offset + _HEADER.size)
    finally:
        os.close(stream)
    if header != _HEADER.pack(blob.length, zlib.crc32(data)):
        raise Corrupt(
            f"{file}: the {blob.length} bytes at offset {blob.offset} are damaged (length or checksum differs): "
            "restore the data directory from a backup"
        )
    return data


class SegmentWriter:
    """Appends blobs to the newest segment; one thread at a time. `folder` holds the files."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, sync_to_disk: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)  # always: who made it may have been killed
        self.folder = folder
        self._segment_bytes = segment_bytes
        self._sync_to_disk = sync_to_disk
        self._dirty = False
        self._file: int | None = None
        self._open(max((int(file.stem) for file in folder.glob(f"*{_SUFFIX}")), default=1))

    def _open(self, segment: int) -> None:
        """Go on at the end of this segment's file, which may be a new one."""
        file = segment_file(self.folder, segment)
        is_new = not file.exists()
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._file is not None:
            os.close(self._file)
        self._file = opened
        self.segment = segment
        self.end = os.fstat(opened).st_size
        if is_new:
            sync(self.folder)

    def append(self, data: bytes) -> Blob:
        """Write a blob; it is on disk after the next `sync`. Raises OSError, such as when the disk is full."""
        if self.end >= self._segment_bytes:
            self.sync()
            self._open(self.segment + 1)
        blob = Blob(self.segment, self.end, len(data))
        self._dirty = True
        for part in (_HEADER.pack(len(data), zlib.crc32(data)), data):
            rest = memoryview(part)
            while rest:
                written = os.pwrite(self._file, rest, self.end)
                rest = rest[written:]
                self.end += written
        return blob

    def sync(self) -> None:
        """Return when every appended blob is on disk."""
        if self._dirty and self._sync_to_disk:
            _sync_data(self._file)
        self._dirty = False

    def position(self) -> tuple[int, int]:
        """(segment, end), to `rewind` to."""
        return self.segment, self.end

    def rewind(self, position: tuple[int, int]) -> None:
        """Give back the space of blobs appended since `position`; nothing may refer to them."""
        segment, end = position
        newest = self.segment
        if newest != segment:
            self._open(segment)
            for newer in range(segment + 1, newest + 1):
                self.delete(newer)
        os.ftruncate(self._file, end)
        self.end = end

    def delete(self, segment: int) -> None:
        """Delete the file of a segment that is not in use and to which nothing refers."""
        segment_file(self.folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)
