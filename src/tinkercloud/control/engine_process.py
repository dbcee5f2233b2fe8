"""Engine processes, as the operating system sees them: started, waited for, killed.

They are forked from a process that has imported what all of them need (multiprocessing's fork server, one for each
control process). So the first one is there after some seconds, any other one, such as that which follows a crash, at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinkercloud.engine.process import run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tinkercloud.engine.preload"])

_LOCK = threading.Lock()
"""A child's exit code can be read once, and whoever starts another child reads those of all."""


class EngineProcess:
    """One process. Make it with `start`."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        self._exit = asyncio.ensure_future(self._wait())

    @classmethod
    async def start(cls, name: str, folder: Path, sock: socket.socket) -> EngineProcess:
        """Start an engine that listens on `sock`, which is closed here, and runs in `folder`; `name` is for whoever
        lists the processes. OSError."""
        process = _CONTEXT.Process(target=run, args=(name, str(folder.resolve()), sock), daemon=True)
        await _in_thread(lambda: _begin(process, sock))
        return cls(process)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    async def wait(self) -> int | None:
        """Its exit code, when it has ended; that of a signal is negative. Also 255, at once, when the fork server has
        ended, which alone learns how engines end: the engine itself may live."""
        return await asyncio.shield(self._exit)

    def kill(self, *, connected: bool = False) -> None:
        """End it now. `connected`: its socket is open, so it lives, whatever `wait` says."""
        if connected or not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def _wait(self) -> int | None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        return await _in_thread(lambda: _exit_code(self._process))


def _begin(process: multiprocessing.process.BaseProcess, sock: socket.socket) -> None:
    with sock, _LOCK:
        with _environment():
            multiprocessing.forkserver.ensure_running()
        process.start()


def _exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    with _LOCK:
        return process.exitcode


async def _in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns. In a thread that nobody waits for: whoever stops does not stay for an engine that starts."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def done(result: object, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def target() -> None:
        result = error = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done, result, error)

    threading.Thread(target=target, name="engine process", daemon=True).start()
    return await future


SPIN_COUNT = "10000"
"""Turns of GNU OpenMP's waiting loop, some 0.1 ms: as long as there is between two products of a pass, and short enough
to do no harm where threads are more than free cores."""

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"
"""Large pages, and up to 256 MB that are kept for the next pass: fresh memory costs an engine a tenth of its time."""


def engine_environment() -> dict[str, str]:
    """Environment of an engine; what the user's own says goes before it.

    OpenMP threads spin for a moment, then sleep: a pool that only spins runs five to ten times slower on cores that
    others use, one that sleeps at once takes longer to wake than a small product does.
    """
    wanted = {"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": MALLOC}
    chosen = {name: os.environ.get(name, value) for name, value in wanted.items()}
    if chosen["OMP_WAIT_POLICY"].lower() == "passive":
        chosen["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT)
    return {**chosen, "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The fork server has the environment of the moment in which it is started, and takes no other. Other threads of
    this process read theirs meanwhile, so that no other variable is touched."""
    wanted = engine_environment()
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
