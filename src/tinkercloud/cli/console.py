"""Where the commands write, and how they fail."""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False, emoji=False)
"""What a command was asked for."""
err = Console(stderr=True, highlight=False, emoji=False)
"""Everything else: progress, log lines, errors."""


class CommandError(Exception):
    """A command cannot do what it was asked; the text says why and what would help. Shown as one line."""
