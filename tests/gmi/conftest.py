from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.programs import run_python
from tests.serving import Server
from tinkercloud import nano

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""The quickstart's base model; here it is the embedded one under that name."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Runs a program with the quickstart's Python; its output. Keyword arguments are environment variables."""
    home = tmp_path_factory.mktemp("home")

    def run_program(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
        hub = {"HF_HOME": str(home / "hf")}
        return run_python(".venv-quickstart", "-c", program, cwd=home, **hub | environ)

    return run_program


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of the embedded model, also under the name that the quickstart has."""
    models = ("--model", f"{MODEL}={nano.FOLDER}", "--model", "tinkercloud/nano")
    with Server(tmp_path_factory.mktemp("gmi") / "data", *models) as running:
        yield running
