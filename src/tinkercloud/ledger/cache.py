"""What was used last, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class LRU(Generic[T]):
    """A map that forgets its least recently used values when their sizes add up to more than `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self.size = 0

    def get(self, key: str) -> T | None:
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: str, value: T, size: int = 1) -> None:
        self.drop(key)
        self._values[key] = (value, size)
        self.size += size
        while self.size > self._capacity:
            self.size -= self._values.popitem(last=False)[1][1]

    def drop(self, key: str) -> None:
        """No error if it is not there."""
        found = self._values.pop(key, None)
        if found is not None:
            self.size -= found[1]
