"""`tinkercloud version`"""

from __future__ import annotations

import platform
from importlib import metadata

from tinkercloud.cli.console import out

SHOWN = ("tinkercloud", "torch", "transformers", "tinker")


def version() -> None:
    """Print the versions that a bug report needs."""
    for name in SHOWN:
        out.print(f"{name} {metadata.version(name)}")
    out.print(f"python {platform.python_version()} on {platform.platform()}")
