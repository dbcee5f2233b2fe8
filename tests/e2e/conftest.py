from __future__ import annotations

import os
import shutil

import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.e2e.by_hand import CONTEXT, NANO, OTHER, OTHER_VOCABULARY
from tests.serving import Server
from tinkercloud.nano import FOLDER

os.environ.setdefault("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The embedded model, served for the whole test run."""
    with Server(tmp_path_factory.mktemp("server") / "data") as running:
        yield running
        running.kill()  # a stop would save the hundreds of runs that the tests have made


@pytest.fixture(scope="session")
def limited_server(tmp_path_factory):
    """The embedded model, and another with a larger vocabulary, behind small limits."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, vocab_size=OTHER_VOCABULARY, max_position_embeddings=CONTEXT, eos_token_id=1)
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder)
    limits = {"max_body_bytes": 100_000, "max_decompressed_bytes": 1_000_000, "poll_seconds": 2}
    options = [part for name, value in limits.items() for part in ("--set", f"{name}={value}")]
    models = ("--model", NANO, "--model", f"{OTHER}={folder}")
    data_dir = tmp_path_factory.mktemp("bad-input") / "data"
    with Server(data_dir, *models, "--max-rank", "16", "--max-context", str(CONTEXT), *options) as running:
        yield running
        assert "crashed" not in running.log.read_text(), "no request may end in the last net"


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
