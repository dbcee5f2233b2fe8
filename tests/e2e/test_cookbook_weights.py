"""What the cookbook downloads and merges is the model that was trained: its logprobs are the server's."""

from __future__ import annotations

import datetime
import io
import json
import tarfile
from pathlib import Path

import httpx
import numpy as np
import peft
import pyrage
import pytest
import tinker
import torch
from safetensors.torch import load_file, save_file
from tinker import types
from transformers import AutoModelForCausalLM

from tests.e2e.by_hand import NANO, OTHER
from tests.e2e.test_first_steps import datum
from tests.programs import run_python
from tinkercloud.nano import FOLDER

PROGRAM = Path(__file__).with_name("cookbook_weights.py")
TOKENS = [10, 11, 12, 13, 14, 15, 16, 17]


def plain(folder: Path | str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprobs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
    return logits.log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]].numpy()


def unmerged(base: str, adapter: Path) -> torch.nn.Module:
    """The base model with a downloaded adapter beside it, whose unembedding PEFT knows by its own name."""
    weights, config = load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_config.json"
    renamed = {key.replace("model.unembed_tokens", "lm_head"): tensor for key, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    config.write_text(config.read_text().replace("unembed_tokens", "lm_head"))
    return peft.PeftModel.from_pretrained(plain(base), adapter)


class Trained:
    """A run that has learned something by heart, and what the server says of it."""

    def __init__(self, client: tinker.ServiceClient, base_model: str, **options: bool):
        self.client = client.create_lora_training_client(base_model=base_model, rank=4, seed=1, **options).result()
        for _ in range(3):
            self.client.forward_backward([datum(TOKENS)], "cross_entropy").result()
            self.client.optim_step(types.AdamParams(learning_rate=3e-3)).result()
        output = self.client.forward([datum(TOKENS)], "cross_entropy").result()
        self.logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
        self.path = self.client.save_state("final").result().path


@pytest.fixture
def other_client(limited_server):
    service_client = tinker.ServiceClient(base_url=limited_server.url, api_key="tml-test")
    yield service_client
    service_client.holder.close()


def test_the_cookbook_makes_the_model_that_was_trained(limited_server, other_client, tmp_path):
    untied_folder = next(o for o in limited_server.options if o.startswith(f"{OTHER}=")).partition("=")[2]
    assert not plain(untied_folder).config.tie_word_embeddings and plain(FOLDER).config.tie_word_embeddings
    runs = {
        "untied": (Trained(other_client, OTHER), untied_folder, "untied/merged"),
        "tied": (Trained(other_client, NANO, train_unembed=False), str(FOLDER), "tied/merged"),
        # A merge would change the input embedding with the unembedding.
        "unmerged": (Trained(other_client, NANO), str(FOLDER), None),
    }
    jobs = [
        {"path": run.path, "base_model": base, "adapter": f"{name}/adapter", "output": merged}
        for name, (run, base, merged) in runs.items()
    ]
    environ = {"TINKER_BASE_URL": limited_server.url, "TINKER_API_KEY": "tml-test", "HF_HUB_OFFLINE": "1"}
    done = run_python(".venv-clients", str(PROGRAM), cwd=tmp_path, input=json.dumps(jobs), **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, (run, base, merged) in runs.items():
        model = plain(tmp_path / merged) if merged else unmerged(base, tmp_path / name / "adapter")
        np.testing.assert_allclose(logprobs(model), run.logprobs, atol=1e-4, rtol=0, err_msg=name)
        assert np.abs(logprobs(plain(base)) - run.logprobs).max() > 1e-2, "it must have learned, or this proves nothing"
    left = httpx.get(f"{limited_server.url}/api/v1/checkpoints").json()["checkpoints"]
    assert left and not [c for c in left if c["checkpoint_type"] == "external"], "the cookbook deletes its exports"


SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPiZQZEeiCy1jPA4D0GBKEB24KFYL013LpjRXMe5D3eY test"


@pytest.fixture
def rest(server):
    return tinker.RestClient(base_url=server.url, api_key="tml-test")


def test_external_weights_are_encrypted_to_every_recipient(training, rest):
    identity = pyrage.x25519.Identity.generate()
    saved = training.save_weights_external("sealed", age_encryption_recipients=[str(identity.to_public()), SSH_KEY])
    urls = rest.get_external_weights_urls(saved.result().path).result().urls
    assert sorted(urls) == ["adapter_config.json.age", "adapter_model.safetensors.age"]
    sealed = httpx.get(urls["adapter_config.json.age"]).content
    assert json.loads(pyrage.decrypt(sealed, [identity]))["r"] == 8
    assert b"-> ssh-ed25519" in sealed
    with pytest.raises(tinker.BadRequestError, match=r"age1xyz.*no public key"):
        training.save_weights_external("wrong", age_encryption_recipients=["age1xyz"]).result()
    training.save_state("after-the-refusal").result()


def test_links_are_to_one_file_for_as_long_as_it_is_there(training, rest, server):
    path = training.save_weights_external("plain", ttl_seconds=3600).result().path
    found = rest.get_external_weights_urls(path).result()
    assert 3500 < (found.expires - datetime.datetime.now(datetime.UTC)).total_seconds() <= 3600
    url = found.urls["adapter_config.json"]
    assert httpx.get(url).json()["base_model_name_or_path"] == NANO
    assert httpx.get(found.urls["adapter_model.safetensors"], headers={"range": "bytes=0-7"}).status_code == 206
    for other in ("adapter_model.safetensors", "checksums.json", "..%2f..%2fledger.db"):
        assert httpx.get(url.replace("adapter_config.json", other)).status_code == 404
    assert httpx.get(url.replace("downloads/ey", "downloads/eY")).status_code == 404
    with pytest.raises(tinker.BadRequestError, match="exported for other programs"):
        training.load_state(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert httpx.get(url).status_code == 404


def test_older_sdks_get_an_archive(training, server, tmp_path):
    path = training.save_state("final").result().path
    run, checkpoint = path.removeprefix("tinker://").split("/", 1)
    answer = httpx.get(f"{server.url}/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive")
    assert answer.status_code == 302 and answer.headers["expires"].endswith("GMT")
    fetched = httpx.get(answer.headers["location"])
    assert len(fetched.content) == int(fetched.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(fetched.content)) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"]
        archive.extractall(tmp_path, filter="data")
    assert peft.PeftModel.from_pretrained(plain(FOLDER), tmp_path).active_adapter == "default"


def test_a_damaged_file_is_not_downloaded(training, server, rest):
    path = training.save_weights_external("damaged").result().path
    run, checkpoint = path.removeprefix("tinker://").split("/", 1)
    links = rest.get_external_weights_urls(path).result().urls
    archive = httpx.get(f"{server.url}/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive").headers["location"]
    (file,) = (server.data_dir / "checkpoints").glob("*/*/damaged/*/adapter_model.safetensors")
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    for link in (links["adapter_model.safetensors"], archive):
        answer = httpx.get(link)
        assert answer.status_code == 400 and "adapter_model.safetensors of the checkpoint is damaged" in answer.text
    assert httpx.get(links["adapter_config.json"]).status_code == 200
