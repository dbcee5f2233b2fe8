"""One server for each data directory, and for how long it had none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import NamedTuple

FILE = "ledger.lock"

SERVER = "serve"
"""The command of tinkercloud that serves."""

LOOK_SECONDS = 1.0
"""How long to wait for those who only look who has a data directory: they have its lock too, for microseconds."""


class Holder(NamedTuple):
    """A process that works in a data directory."""

    process: str
    """Its id, `unknown` if it has not said it yet"""
    command: str
    """Of tinkercloud"""

    def __str__(self) -> str:
        what = "a server" if self.command == SERVER else f"`tinkercloud {self.command}`"
        return f"{what} (process {self.process})"


class DataDirInUse(Exception):
    """Another process, the `holder`, works in the data directory."""

    def __init__(self, data_dir: Path, holder: Holder) -> None:
        mend = "stop that one" if holder.command == SERVER else "wait until that has ended"
        super().__init__(
            f"{data_dir} is in use by {holder}: {mend}, or give this one a data directory of its own (--data-dir)"
        )
        self.data_dir, self.holder = data_dir, holder


def holder(data_dir: Path) -> Holder | None:
    """Who works in a data directory; None if nobody does, or nobody may look. Changes nothing."""
    try:
        file = os.open(data_dir / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try(file, fcntl.LOCK_SH) else _read(file)[0]
    finally:
        os.close(file)


class DataDirLock:
    """An operating-system lock on `<data_dir>/ledger.lock`: it ends with its process, however that ends.

    The file's time is when a server was alive last. Taking the lock changes that, so the file says the time itself
    until `alive`: whoever ends before has not lived.
    """

    def __init__(self, data_dir: Path, command: str = SERVER) -> None:
        """`command`: of tinkercloud, that takes it. Raises `DataDirInUse`."""
        self._command = command
        self._file = os.open(data_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(data_dir)
            self.last_alive = _read(self._file)[1]
            """When the server that had it before said last that it was alive (epoch seconds); now, if none had."""
            self._write(f"{self.last_alive:.6f}")
        except BaseException:
            os.close(self._file)
            raise
        self._lives = False

    def _take(self, data_dir: Path) -> None:
        deadline = time.monotonic() + LOOK_SECONDS
        while not _try(self._file, fcntl.LOCK_EX):
            only_looked_at = _try(self._file, fcntl.LOCK_SH)
            if not only_looked_at or time.monotonic() > deadline:
                raise DataDirInUse(data_dir, _read(self._file)[0])
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(0.01)

    def alive(self) -> None:
        """Say that this process serves, and is alive now."""
        if not self._lives:
            self._write("")
            self._lives = True
        os.utime(self._file)

    def release(self) -> None:
        os.close(self._file)

    def _write(self, last_alive: str) -> None:
        text = f"{os.getpid()} {self._command} {last_alive}".rstrip() + "\n"
        os.pwrite(self._file, text.encode(), 0)  # a line that was longer: its rest is behind this one
        os.ftruncate(self._file, len(text))


def _try(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: int) -> tuple[Holder, float]:
    """(who wrote it last, when a server was alive last) of a lock's file."""
    # An earlier tinkercloud writes the process alone.
    line, _, _ = os.pread(file, 256, 0).decode(errors="replace").partition("\n")
    process, command, last_alive, *_ = [*line.split(), *[""] * 3]
    time_of_file = os.fstat(file).st_mtime
    with contextlib.suppress(ValueError):
        time_of_file = float(last_alive)
    return Holder(process or "unknown", command or SERVER), time_of_file
