"""Base models that come and go while the server runs."""

import subprocess
import sys
import time

import httpx
import pytest
import tinker

from tests.e2e.by_hand import GOOD, NANO, PATIENCE, Run, refused
from tests.serving import Server
from tinkercloud.nano import FOLDER

LAZY = "me/lazy"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A base model that is there, one that is loaded when it is wanted, and one that cannot be."""
    empty = tmp_path_factory.mktemp("empty")
    (empty / "config.json").write_text('{"model_type": "no such architecture"}')
    lazy = ("--model", f"{LAZY}={FOLDER},lazy=true,idle_seconds=0.5", "--model", f"me/broken={empty},lazy=true")
    quick = ("--set", "poll_seconds=1")
    with Server(tmp_path_factory.mktemp("lazy") / "data", "--model", NANO, *lazy, *quick) as running:
        yield running


def states(server) -> dict[str, str]:
    return httpx.get(f"{server.url}/api/v1/healthz").json()["engines"]


def until_gone(server):
    deadline = time.monotonic() + PATIENCE
    while states(server)[LAZY] in ("ready", "stopping"):
        assert time.monotonic() < deadline, "an idle lazy model stays"
        time.sleep(0.1)


def command(server, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "tinkercloud", *arguments, "--url", server.url]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)


def test_a_lazy_model_comes_with_its_first_client_and_leaves_when_idle(server):
    assert states(server)[LAZY] == "idle" and len(server.engine_pids()) == 1
    listed = httpx.get(f"{server.url}/api/v1/get_server_capabilities").json()["supported_models"]
    assert {NANO, LAZY} <= {model["model_name"] for model in listed}
    alone, disturbed = Run(server.url), Run(server.url, LAZY)
    assert states(server)[LAZY] == "ready" and len(server.engine_pids()) == 2
    expected = [alone.step(learning_rate=1e-2) for _ in range(4)]
    losses = [disturbed.step(learning_rate=1e-2) for _ in range(2)]
    sampler = disturbed.sdk.save_weights_and_get_sampling_client().result(PATIENCE)
    prompt = tinker.ModelInput.from_ints([1, 2, 3])
    logprobs = sampler.compute_logprobs(prompt).result(PATIENCE)
    until_gone(server)
    assert len(server.engine_pids()) == 1
    losses += [disturbed.step(learning_rate=1e-2) for _ in range(2)]
    assert losses == expected, "its clients notice nothing, to the bit"
    assert sampler.compute_logprobs(prompt).result(PATIENCE) == logprobs
    for run in (alone, disturbed):
        run.close()


def test_a_lazy_model_that_cannot_be_loaded_is_refused_for_good(server):
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    for _ in range(2):
        refusal = refused(service.create_lora_training_client, "me/broken", 4)
        assert refusal.status == 400 and "me/broken cannot be served" in refusal.detail
        assert refused(service.create_sampling_client, base_model="me/broken").status == 400
    assert httpx.get(f"{server.url}/api/v1/healthz").status_code == 200
    service.holder.close()


def test_models_are_listed_added_and_removed_while_the_server_runs(server):
    bystander = Run(server.url)
    added = command(server, "models", "add", f"me/third={FOLDER}")
    assert added.returncode == 0 and "me/third" in added.stdout, added.stderr
    assert states(server)["me/third"] == "ready"
    listed = command(server, "models", "list").stdout
    assert all(name in listed for name in (NANO, LAZY, "me/third"))
    run = Run(server.url, "me/third")
    run.step()
    missing, ahead = run.seq(), run.seq()
    waiting = run.send(run.message(seq_id=ahead)).json()
    queue = run.http.post("retrieve_future", json=waiting)
    assert (queue.status_code, queue.json()["queue_state"]) == (408, "active")
    twice = command(server, "models", "add", f"me/third={FOLDER}")
    assert twice.returncode != 0 and "served already" in twice.stderr

    removed = command(server, "models", "remove", "me/third")
    assert removed.returncode == 0 and "1 training run that has not ended waits for it" in removed.stdout
    assert "me/third" not in states(server)
    refusal = refused(run.service.create_lora_training_client, "me/third", 4)
    assert refusal.status == 404 and "served are" in refusal.detail and "models add me/third=FOLDER" in refusal.detail
    batch, saved = run.sdk.forward_backward(GOOD, "cross_entropy"), run.sdk.save_state("x")
    assert command(server, "models", "remove", "me/third").returncode != 0
    bystander.trains_on()

    queue = run.http.post("retrieve_future", json=waiting)
    assert (queue.status_code, queue.json()["queue_state"]) == (408, "paused_capacity")
    assert "models add me/third" in queue.json()["queue_state_reason"]

    assert command(server, "models", "add", f"me/third={FOLDER}", "--lazy").returncode == 0
    assert states(server)["me/third"] == "idle"
    run.send(run.message(seq_id=missing))
    assert "metrics" in run.result(waiting["request_id"])
    assert batch.result(PATIENCE).metrics and saved.result(PATIENCE).path, "what was sent meanwhile goes on"
    run.trains_on()
    for made in (run, bystander):
        made.close()


def test_a_model_that_cannot_be_added_changes_nothing(server, tmp_path):
    for wrong in (f"me/wrong={tmp_path}", f"me/wrong={tmp_path / 'nothing'}", "me/wrong=/etc/passwd"):
        refusal = command(server, "models", "add", wrong)
        assert refusal.returncode != 0 and refusal.stderr and "Traceback" not in refusal.stderr, refusal.stderr
    assert "me/wrong" not in states(server)


def test_a_model_without_a_tokenizer_is_served_with_a_warning(server, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    warning = f"me/mute: {tmp_path} has no tokenizer; without it, clients can send token ids"
    added = command(server, "models", "add", f"me/mute={tmp_path}", "--lazy")
    assert added.returncode == 0 and f"warning: {warning}" in added.stderr
    assert command(server, "models", "remove", "me/mute").returncode == 0
    with Server(tmp_path / "data", "--model", f"me/mute={tmp_path}") as mute:
        run = Run(mute.url, "me/mute")
        run.trains_on()
        assert run.sdk.get_info().model_data.tokenizer_id == "me/mute", "no folder: its tokenizer would be an empty one"
        run.close()
        listed = command(mute, "checkpoints", "list")
        assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "No checkpoints yet.\n")
    logged = mute.log.read_text()
    assert warning in logged and f"Ready at {mute.url}." in logged


def test_doctor_knows_a_server_of_ours_at_the_port(server):
    line = [sys.executable, "-m", "tinkercloud", "doctor", "--port", str(server.port)]
    line += ["--data-dir", str(server.data_dir)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert f"✓ port 127.0.0.1:{server.port}: a tinkercloud server is there (ok)" in done.stdout
    (held,) = [text for text in done.stdout.splitlines() if text.startswith("! data folder")]
    assert held.endswith(f"; a server (process {server.process.pid}) is at work on it") and done.returncode == 0
    assert "All is well." not in done.stdout and "\nNothing is broken; " in done.stdout


def test_a_data_directory_in_use_is_one_line(server):
    line = [sys.executable, "-m", "tinkercloud", "serve", "--port", "0", "--data-dir", str(server.data_dir)]
    second = subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert second.returncode != 0 and "in use by a server" in second.stderr
    assert "Traceback" not in second.stderr
