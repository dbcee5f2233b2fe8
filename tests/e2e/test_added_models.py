"""Base models that were added while a server ran are served by the next one, and their clients notice no crash."""

import os
import shutil
import subprocess
import sys

import httpx
import pytest
import tinker

from tests.e2e.by_hand import GOOD, NANO, PATIENCE, Run, refused
from tests.serving import Server
from tinkercloud.nano import FOLDER

MINE, OTHER = "me/mine", "me/other"
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "mine")


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path / "data", "--model", f"{NANO},lazy=true", "--set", "poll_seconds=1") as running:
        yield running


def models(server, *arguments: str) -> str:
    line = [sys.executable, "-m", "tinkercloud", "models", *arguments, "--url", server.url]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused_model(server, *arguments: str) -> str:
    line = [sys.executable, "-m", "tinkercloud", "models", *arguments, "--url", server.url]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def served(server) -> dict[str, str]:
    return httpx.get(f"{server.url}/api/v1/healthz").json()["engines"]


def test_an_added_model_is_served_until_it_is_removed(server, tmp_path, folder):
    assert "until `tinkercloud models remove me/mine`" in models(server, "add", f"{MINE}={folder},max_rank=16")
    models(server, "add", f"{OTHER}={folder}", "--lazy")
    run = Run(server.url, MINE)
    sampler = run.sdk.save_weights_and_get_sampling_client().result(PATIENCE)
    before = run.sdk.forward(GOOD, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
    logprobs = sampler.compute_logprobs(PROMPT).result(PATIENCE)

    server.kill()
    server.start()
    assert served(server)[MINE] == "ready" and served(server)[OTHER] == "idle"
    assert run.sdk.forward(GOOD, "cross_entropy").result(PATIENCE).metrics["loss:sum"] == before
    too_large = refused(run.service.create_lora_training_client, MINE, 32)
    assert "max LoRA rank 16" in too_large.detail, "its settings are kept with it"

    server.kill()
    os.rename(folder, tmp_path / "elsewhere")
    server.start()
    log = server.log.read_text()
    assert "me/mine, which `models add` has added, is not served" in log and str(folder) in log
    assert "1 training run that has not ended waits for base model me/mine" in log
    assert list(served(server)) == [NANO]
    waiting = run.sdk.forward(GOOD, "cross_entropy")
    drawn = sampler.compute_logprobs(PROMPT)
    by_hand = run.post("optim_step", seq_id=run.seq(), adam_params={}).json()
    queue = run.http.post("retrieve_future", json=by_hand)
    assert (queue.status_code, queue.json()["queue_state"]) == (408, "paused_capacity")
    assert "models add me/mine=FOLDER" in queue.json()["queue_state_reason"]

    models(server, "add", f"{MINE}={tmp_path / 'elsewhere'}")
    assert waiting.result(PATIENCE).metrics["loss:sum"] == before, "it waited, and nothing was lost"
    assert drawn.result(PATIENCE) == logprobs
    assert "metrics" in run.result(by_hand["request_id"])

    assert "1 training run that has not ended waits for it" in models(server, "remove", MINE)
    assert "Nothing waits for it" in models(server, "remove", OTHER), "also one that the start could not serve"
    assert server.stop() == 0
    assert server.log.read_text().endswith("Stopped; everything is on disk.\n")
    server.start()
    assert list(served(server)) == [NANO]
    run.close()


def test_a_model_of_the_command_line_wins(server, folder):
    models(server, "add", f"{MINE}={folder},max_rank=16,kv_cache_bytes=1MiB,dtype=float32", "--lazy")
    unknown = refused_model(server, "remove", "me/zzz")
    assert f"there is no base model 'me/zzz'; there are: {MINE}, {NANO}\n" in unknown
    too_long = httpx.post(f"{server.url}/api/v1/admin/models", json={"name": "a" * 10000})
    assert too_long.status_code == 400 and "at most 200 letters" in too_long.json()["detail"]
    assert [line.split() for line in models(server, "list").splitlines()] == [
        [NANO, "idle", "(lazy)", "builtin"],
        [MINE, "idle", "(lazy)", str(folder), "dtype=float32,max_rank=16,kv_cache_bytes=1048576"],
    ]
    server.stop()
    server.options = ("--model", f"{MINE}={FOLDER},lazy=true,trust_remote_code=true")
    server.start()
    listed = models(server, "list")
    assert f"{FOLDER}  trust_remote_code=true\n" in listed and str(folder) not in listed
