"""A server whose disk is really full says so, loses nothing, and goes on when there is space."""

import subprocess
import sys
import threading

import httpx
import pytest
import tinker
from tinker import types

from tests.disks import small_disk
from tests.e2e.test_first_steps import datum
from tests.serving import Server

BATCH = [datum([10, 11, 12, 13, 14]), datum([30, 31, 32])]
KEY = {"x-api-key": "tml-test"}


def step(run) -> float:
    output = run.forward_backward(BATCH, "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return output.result().metrics["loss:sum"]


def test_a_full_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    server = Server(tmp_path / "disk" / "data")
    with small_disk(server) as disk, server:
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
        calm, run = (
            client.create_lora_training_client(base_model="tinkercloud/nano", rank=32, seed=3).result() for _ in "ab"
        )
        expected = [step(calm) for _ in range(5)]
        losses = [step(run)]
        kept = run.save_state("kept").result().path

        disk.fill(leaving=200_000)  # enough for the log, and too little for these weights
        with pytest.raises(tinker.RequestFailedError, match="could not be written") as failed:
            run.save_state("too-large").result()
        assert failed.value.category is types.RequestErrorCategory.Server

        disk.fill()
        refused = httpx.post(
            f"{server.url}/api/v1/optim_step", json={"model_id": calm.model_id, "adam_params": {}}, headers=KEY
        )
        assert refused.status_code == 503 and refused.headers["retry-after"], refused.text
        assert httpx.get(f"{server.url}/api/v1/healthz").status_code == 200
        runs = httpx.get(f"{server.url}/api/v1/training_runs", headers=KEY).json()["training_runs"]
        assert {one["training_run_id"] for one in runs} == {calm.model_id, run.model_id}
        freeing = threading.Timer(1, disk.free)
        freeing.start()
        losses.append(step(run))  # the SDK repeats what is refused until there is space
        freeing.join()

        disk.fill()
        server.kill()
        disk.free()
        server.start()
        losses.append(step(run))
        run.load_state_with_optimizer(kept).result()
        losses.append(step(run))
        assert losses == [*expected[:3], expected[1]]
        assert server.stop() == 0
        fsck = [*server.prefix, sys.executable, "-m", "tinkercloud", "fsck", str(server.data_dir)]
        checked = subprocess.run(fsck, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout
        client.holder.close()
