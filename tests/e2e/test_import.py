"""An adapter that was trained elsewhere is imported by the command line, sampled from and trained on."""

import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from tests.e2e.test_first_steps import datum
from tinkercloud.nano import FOLDER

TOKENS = [10, 11, 12, 13, 14, 15, 16, 17]


def command(*arguments, **environ):
    line = [sys.executable, "-m", "tinkercloud", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=os.environ | environ)


def import_folder(server, folder, *options):
    return command("checkpoints", "import", str(folder), "--url", server.url, *options)


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(base, config)


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    target = tmp_path_factory.mktemp("peft") / "mine:0"
    adapter.save_pretrained(target)
    return target


def test_an_imported_adapter_gives_pefts_logprobs_and_trains_on(server, client, adapter, folder):
    done = import_folder(server, folder, "--base-model", "tinkercloud/nano")
    assert done.returncode == 0, done.stderr
    path = done.stdout.strip()
    assert path.startswith("tinker://") and path.endswith("/weights/mine_0")
    listed = command("checkpoints", "list", "--url", server.url, COLUMNS="40").stdout.splitlines()
    assert path in [line.split()[0] for line in listed]
    run_id = path.split("/")[2]
    rest = client.create_rest_client()
    assert rest.get_training_run(run_id).result().last_checkpoint.tinker_path == path
    assert [one.tinker_path for one in rest.list_checkpoints(run_id).result().checkpoints] == [path]

    with torch.no_grad():
        logits = adapter(input_ids=torch.tensor([TOKENS])).logits[0]
    expected = logits.log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]].numpy()
    run = client.create_training_client_from_state(path).result()
    assert run.get_info().lora_rank == 4
    ours = run.forward([datum(TOKENS)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    sampler = client.create_sampling_client(model_path=path)
    sampled = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    np.testing.assert_allclose(np.array(sampled[1:], float), expected, rtol=1e-5, atol=1e-5)

    losses = []
    for _ in range(5):
        losses.append(run.forward_backward([datum(TOKENS)], "cross_entropy").result().metrics["loss:sum"])
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert losses[-1] < losses[0]
    again = client.create_training_client_from_state(run.save_state("again").result().path).result()
    assert again.get_info().lora_rank == 4


def test_what_cannot_be_imported_is_refused_with_a_reason(server, client, folder, tmp_path):
    done = import_folder(server, folder, "--base-model", "nobody/nothing")
    assert done.returncode == 2 and "tinkercloud/nano" in done.stderr
    done = import_folder(server, folder)
    assert done.returncode == 2 and "`--base-model NAME` (served are: tinkercloud/nano)" in done.stderr
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    done = import_folder(server, tmp_path, "--base-model", "tinkercloud/nano", "--name", "halves")
    assert done.returncode == 2 and "adapter_model.safetensors" in done.stderr
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[:-100])
    done = import_folder(server, tmp_path, "--base-model", "tinkercloud/nano", "--name", "halves")
    assert done.returncode == 2 and "is damaged or cut short" in done.stderr
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path="tinker://import-x/weights/halves").result()
