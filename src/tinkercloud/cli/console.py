"""Where the commands write, and how they fail."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

out = Console(highlight=False, emoji=False)
"""What a command was asked for."""
err = Console(stderr=True, highlight=False, emoji=False)
"""Everything else: progress, log lines, errors."""


class CommandError(Exception):
    """A command cannot do what it was asked; the text says why and what would help. Shown as one line."""


def print_columns(rows: list[tuple[str, ...]]) -> None:
    """Lines that are as long as they must be: a path that is cut or wrapped cannot be copied. The first row, the names
    of the columns, is for people: without a terminal the lines are only what was asked for."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if number or out.is_terminal:
            out.print(Text(line, "" if number else "dim"), soft_wrap=True)
