from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.programs import run_python
from tests.recipes.hub import MODELS, fill_cache, write_data
from tests.serving import Server

Recipe = Callable[..., list[dict]]


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The working directory of the recipes: the hub's cache below `hf`, and the data sets."""
    folder = tmp_path_factory.mktemp("recipes")
    fill_cache(folder / "hf")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def offline(home) -> dict[str, str]:
    """Environment variables of programs that find everything in the hub's cache."""
    return {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def server(home, offline):
    """A server of the hub's models."""
    models = [option for name in MODELS for option in ("--model", name)]
    with Server(home / "data", *models, **offline) as running:
        yield running


@pytest.fixture(scope="session")
def recipe(home, offline, server) -> Recipe:
    """Runs a recipe of the cookbook with the official SDK; the rows of its metrics."""

    def run(module: str, log_path: Path, *options: str) -> list[dict]:
        command = ["-m", f"tinker_cookbook.recipes.{module}", f"log_path={log_path}", "model_name=Qwen/Qwen3-8B"]
        environ = offline | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test"}
        done = run_python(".venv-clients", *command, *options, cwd=home, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]

    return run
