"""Where the server of a data directory listens, for the commands of whoever can read that directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

FILE = "server.json"


class Running(NamedTuple):
    """A server that runs on this machine."""

    url: str
    """By which commands on this machine reach it."""
    certificate: str | None
    """PEM file of what it listens with, if it speaks HTTPS."""
    pid: int


def announce(data_dir: Path, running: Running) -> None:
    """Say where this process listens. OSError."""
    draft = data_dir / f"{FILE}.draft"
    draft.write_text(json.dumps(running._asdict()), encoding="utf-8")
    os.replace(draft, data_dir / FILE)


def withdraw(data_dir: Path) -> None:
    """It listens no more. OSError."""
    (data_dir / FILE).unlink(missing_ok=True)


def find(data_dir: Path) -> Running | None:
    """The server of a data directory; None if none runs, or the directory cannot be read."""
    try:
        running = Running(**json.loads((data_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    try:
        os.kill(running.pid, 0)
    except PermissionError:
        pass  # it lives, and is another user's
    except OSError:
        return None  # it was killed
    return running
