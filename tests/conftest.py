from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.postgresql import PostgreSQL

if os.environ.get("TINKERCLOUD_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # The suite's numbers are those of the CPU in float32, also beside a GPU.


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Started by the first test that needs it."""
    with PostgreSQL() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """Of an empty database: None is SQLite in the data directory."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgresql").database()
