"""`tinkercloud version`"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer

from tinkercloud.cli.console import out

SHOWN = ("tinkercloud", "torch", "transformers", "tinker")


def version() -> None:
    """Print the versions that a bug report needs."""
    for name in SHOWN:
        out.print(f"{name} {metadata.version(name)}")
    out.print(f"python {platform.python_version()} on {platform.platform()}")


def _version_asked(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


def common(
    asked: Annotated[
        bool,
        typer.Option("--version", callback=_version_asked, is_eager=True, help="As `version`.", show_default=False),
    ] = False,
) -> None:
    """A server that speaks the Tinker API, on hardware you own."""
