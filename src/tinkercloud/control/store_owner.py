"""Whose a store of checkpoints is: a data directory's, which remembers the stores that it has claimed."""

from __future__ import annotations

import os
import re
import threading
import uuid
from pathlib import Path

from tinkercloud.ledger.files import sync


class StoreOwner:
    """A data directory, as stores know it. Its file `store_id` has its id and, a line each, the URLs of the stores that
    it has claimed.

    Backups do not have that file: what was restored beside a server that lives must not take its stores. Every method
    may raise OSError.
    """

    def __init__(self, data_dir: Path):
        self._file = data_dir / "store_id"
        self._lock = threading.Lock()

    @property
    def id(self) -> str:
        """What `owner.json` of its stores holds; made at the first call."""
        with self._lock:
            lines = self._lines()
            if not lines:
                self._write(lines := [uuid.uuid4().hex])
            return lines[0]

    def has_claimed(self, url: str) -> bool:
        """Whether the store there is known to have been this data directory's."""
        return url in self._lines()[1:]

    def remember(self, url: str) -> None:
        """The store there is this data directory's now; on disk when this returns."""
        first = self.id
        with self._lock:
            others = self._lines()[1:]
            if url not in others:
                self._write([first, *others, url])

    def _lines(self) -> list[str]:
        return self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []

    def _write(self, lines: list[str]) -> None:
        draft = self._file.with_suffix(".draft")
        draft.write_text("\n".join(lines), encoding="utf-8")
        sync(draft)
        os.replace(draft, self._file)
        sync(self._file.parent)


def without_userinfo(text: str) -> str:
    """URLs in a text as others may see them: without the USER:PASSWORD@ before a host."""
    return re.sub(r"(?<=//)[^/\s]*@", "", text)
