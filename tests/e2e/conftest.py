from __future__ import annotations

import os

import pytest
import tinker

from tests.serving import Server

os.environ.setdefault("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The embedded model, served for the whole test run."""
    with Server(tmp_path_factory.mktemp("server") / "data") as running:
        yield running


@pytest.fixture
def client(server):
    """A session of the official SDK."""
    service_client = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    yield service_client
    service_client.holder.close()


@pytest.fixture
def training(client):
    """A fresh training client on the embedded model."""
    return client.create_lora_training_client(base_model="tinkercloud/nano", rank=8, seed=1).result()
