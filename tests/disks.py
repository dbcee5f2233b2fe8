"""Disks for a server's data: one that a test can fill up, whoever runs it, and what is known to be on one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from tests.serving import Server

SIZE = 48 * 2**20
"""Bytes: SQLite's write-ahead log alone takes up to 16 MiB."""


class Disk(Protocol):
    """Fill it and free it while servers use it."""

    def fill(self, leaving: int = 0) -> None:
        """Take all space but for `leaving` bytes (of which the engine's next save needs more)."""

    def free(self) -> None: ...


@contextlib.contextmanager
def small_disk(server: Server) -> Iterator[Disk]:
    """A file system of its own for a server that was not started: a tmpfs in a user namespace, where the system lets
    its users have one. Elsewhere, files of the server's processes that may not grow."""
    folder = server.data_dir.parent
    script = f'mount -t tmpfs -o size={SIZE} tmpfs "$1" && echo mounted && exec sleep infinity'
    with contextlib.suppress(FileNotFoundError):
        holder = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script, "sh", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() == "mounted\n":
                yield _Tmpfs(server, holder.pid, folder)
                return
        finally:
            holder.kill()
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()
    yield _LimitedFiles(server)


def durable(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By the path of a file or folder of this process: what was in it (its length, its names) when it was synced last,
    as a power cut would leave it. What is moved goes on under its new path."""
    kept: dict[str, list[str]] = {}
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kept[path] = sorted(os.listdir(path)) if os.path.isdir(path) else [str(os.path.getsize(path))]

    def renamed(old: os.PathLike[str], new: os.PathLike[str]) -> None:
        rename(old, new)
        for path in [path for path in kept if path == str(old) or path.startswith(f"{old}/")]:
            kept[f"{new}{path.removeprefix(str(old))}"] = kept.pop(path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    return kept


def lost(kept: dict[str, list[str]], folder: Path, top: Path) -> list[Path]:
    """What of a folder below `top`, of the folders between them and of its files a power cut could take away."""
    files = [file for file in folder.iterdir() if kept.get(str(file)) != [str(file.stat().st_size)]]
    above = [each for each in (folder, *folder.parents) if top in each.parents]
    names = [each for each in (*folder.iterdir(), *above) if each.name not in kept.get(str(each.parent), [])]
    return files + names


class _Tmpfs:
    def __init__(self, server: Server, holder: int, folder: Path):
        self._folder = folder
        server.prefix = ("nsenter", "-t", str(holder), "-U", "-m", "--preserve-credentials")
        self._prefix = server.prefix

    def fill(self, leaving: int = 0) -> None:
        self._run(
            "import os, sys; at = os.statvfs(sys.argv[1]); size = at.f_bavail * at.f_bsize - int(sys.argv[2])\n"
            "fd = os.open(sys.argv[1] + '/ballast', os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n"
            "while size > 0: size -= os.write(fd, bytes(min(size, 1 << 20)))",
            str(leaving),
        )

    def free(self) -> None:
        self._run("import os, sys; os.unlink(sys.argv[1] + '/ballast')")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([*self._prefix, sys.executable, "-c", program, str(self._folder), *arguments], check=True)


class _LimitedFiles:
    def __init__(self, server: Server):
        self._server = server

    def fill(self, leaving: int = 0) -> None:
        engines = self._server.engine_pids()
        for process in self._processes():
            if not leaving or process.pid in engines:
                process.rlimit(psutil.RLIMIT_FSIZE, (leaving, psutil.RLIM_INFINITY))

    def free(self) -> None:
        for process in self._processes():
            process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))

    def _processes(self) -> list[psutil.Process]:
        """None of a server that was killed: the next one's files may grow."""
        if self._server.process.poll() is not None:
            return []
        server = psutil.Process(self._server.process.pid)
        return [server, *server.children(recursive=True)]
