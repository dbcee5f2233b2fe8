"""One server for each data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FILE = "ledger.lock"


class DataDirInUse(Exception):
    """Another process, the `holder`, works in the data directory."""

    def __init__(self, data_dir: Path, holder: str) -> None:
        super().__init__(
            f"{data_dir} is in use by another server (process {holder}): stop that one, or give this one a data "
            "directory of its own (--data-dir)"
        )
        self.data_dir, self.holder = data_dir, holder


def holder(data_dir: Path) -> str | None:
    """The process that works in a data directory, `unknown` if it does not say; None if none does, or nobody may look.
    Changes nothing."""
    try:
        file = os.open(data_dir / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 32, 0).decode() or "unknown"
    finally:
        os.close(file)
    return None


class DataDirLock:
    """An operating-system lock on `<data_dir>/ledger.lock`: it ends with its process, however that ends."""

    def __init__(self, data_dir: Path) -> None:
        """Raises `DataDirInUse` with the holder's process id."""
        file = data_dir / FILE
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode() or "unknown"
            os.close(self._file)
            raise DataDirInUse(data_dir, holder) from None
        self.last_alive = os.fstat(self._file).st_mtime
        """When the server that had it before said last that it was alive (epoch seconds); now, if none had."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def alive(self) -> None:
        """Say that this process is alive now."""
        os.utime(self._file)

    def release(self) -> None:
        os.close(self._file)
