from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving import Server
from tinkercloud import nano

PYTHON = Path(__file__).parents[2] / ".venv-quickstart" / "bin" / "python"
"""An environment with `./clients/tinker_gmi` installed by pip."""

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""The quickstart's base model; here it is the embedded one under that name."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Runs a program with the quickstart's Python; its output. Keyword arguments are environment variables."""
    assert PYTHON.exists(), f"there is no {PYTHON}; run `make environments`"
    home = tmp_path_factory.mktemp("home")

    def run_program(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER", "HF_", "PYTHON"))}
        return subprocess.run(
            [str(PYTHON), "-c", program],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=home,
            env=kept | {"HOME": str(home), "HF_HOME": str(home / "hf"), "TINKER_TELEMETRY": "0"} | environ,
        )

    return run_program


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server whose model has the quickstart's name."""
    with Server(tmp_path_factory.mktemp("gmi") / "data", "--model", f"{MODEL}={nano.FOLDER}") as running:
        yield running
