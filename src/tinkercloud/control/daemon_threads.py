"""Threads for calls that may hang for long, which nobody waits for when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThreads(Executor):
    """As ThreadPoolExecutor, whose threads Python joins at the end of the process however long that takes."""

    def __init__(self, count: int, name: str):
        self._count = count
        self._name = name
        self._started = 0
        self._is_shut = False
        self._lock = threading.Lock()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"{self._name}: it was shut down")
            if self._started < self._count:
                self._started += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            future: Future[T] = Future()
            self._calls.put((future, partial(fn, *args, **kwargs)))
            return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """The threads end with the calls that they are in; what has not begun is cancelled. Waits for nothing."""
        with self._lock:
            self._is_shut = True
            while not self._calls.empty():
                if (call := self._calls.get()) is not None:
                    call[0].cancel()
            for _ in range(self._started):
                self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, run = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(run())
                except BaseException as error:
                    future.set_exception(error)
            del call, future, run
