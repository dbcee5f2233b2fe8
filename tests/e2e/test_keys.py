"""Two users with keys of their own on one server, through the official SDK and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.api.tenants import make_key
from tests.e2e.by_hand import GOOD, NANO, PATIENCE
from tests.programs import run_python
from tests.serving import Server
from tinkercloud.ledger import keys as stored_keys

PROGRAM = Path(__file__).with_name("tinker_cli.py")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server with keys, and the keys by user."""
    data_dir = tmp_path_factory.mktemp("keys") / "data"
    keys = {user: make_key(data_dir, user)[0] for user in ("alice", "bob")}
    with Server(data_dir) as running:
        running.keys = keys
        yield running


def train(server: Server, user: str, seed: int) -> dict:
    """What a user makes: losses, a sample, and the names of everything."""
    client = tinker.ServiceClient(base_url=server.url, api_key=server.keys[user])
    training = client.create_lora_training_client(base_model=NANO, rank=2, seed=seed).result(PATIENCE)
    losses = []
    for _ in range(3):
        loss = training.forward_backward(GOOD, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result(PATIENCE)
        losses.append(loss.result(PATIENCE).metrics["loss:sum"])
    path = training.save_state("mine").result(PATIENCE).path
    sampler = training.save_weights_and_get_sampling_client().result(PATIENCE)
    prompt = types.ModelInput.from_ints([5, 6, 7])
    drawn = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=3, seed=1)).result(PATIENCE)
    sessions = rest_client(server, user).list_sessions().result(PATIENCE).sessions
    client.holder.close()
    (run,) = (run for run in training_runs(server, user))
    return {"losses": losses, "path": path, "tokens": drawn.sequences[0].tokens, "sessions": sessions, "run": run}


def rest_client(server: Server, user: str) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=server.keys[user])


def training_runs(server: Server, user: str) -> list[str]:
    listed = cli(server, user, "-f", "json", "run", "list")
    return [run["training_run_id"] for run in listed["runs"]]


def cli(server: Server, user: str, *arguments: str) -> dict:
    """What `tinker` prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    environ = kept | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.keys[user], "TINKER_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, PROGRAM],
        input=json.dumps([arguments]),
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
    )
    # Its exit status says nothing: the SDK's transport at times aborts the process when it has printed all.
    (line,) = done.stdout.splitlines()
    said = json.loads(line)
    assert said["error"] is None, said["error"] + done.stderr
    return json.loads(said["output"])


def test_two_users_train_at_once_and_neither_sees_the_other(shared):
    with ThreadPoolExecutor(2) as pool:
        alice, bob = pool.map(lambda user: train(shared, user, 3), ("alice", "bob"))
    assert alice["losses"] == bob["losses"] and list(alice["tokens"]) == list(bob["tokens"])
    assert alice["run"] != bob["run"] and not set(alice["sessions"]) & set(bob["sessions"])

    client = tinker.ServiceClient(base_url=shared.url, api_key=shared.keys["bob"])
    try:
        rest = rest_client(shared, "bob")
        assert [run.training_run_id for run in rest.list_training_runs().result(PATIENCE).training_runs] == [bob["run"]]
        listed = rest.list_user_checkpoints().result(PATIENCE).checkpoints
        assert {checkpoint.tinker_path for checkpoint in listed} == {bob["path"]}
        for asked in (
            lambda: rest.get_training_run(alice["run"]),
            lambda: rest.list_checkpoints(alice["run"]),
            lambda: rest.get_session(alice["sessions"][0]),
            lambda: rest.get_sampler(f"{alice['sessions'][0]}:sample:0"),
            lambda: rest.get_weights_info_by_tinker_path(alice["path"]),
        ):
            with pytest.raises(tinker.NotFoundError):
                asked().result(PATIENCE)
        with pytest.raises(tinker.NotFoundError):
            client.create_training_client_from_state(alice["path"]).result(PATIENCE)
        with pytest.raises(tinker.NotFoundError):
            client.create_sampling_client(model_path=alice["path"]).result(PATIENCE)
    finally:
        client.holder.close()


def test_the_command_line_keeps_a_key_and_says_who_i_am(shared, tmp_path):
    commands = [["auth", "login"], ["-f", "json", "auth", "whoami"], ["auth", "logout"], ["auth", "login"]]
    typed = f"{shared.keys['alice']}\n"
    done = run_python(
        ".venv-clients", str(PROGRAM), cwd=tmp_path, input=json.dumps(commands), TYPED=typed, TINKER_BASE_URL=shared.url
    )
    login, whoami, logout, again = map(json.loads, done.stdout.splitlines())
    assert "Logged in as alice@localhost (tinkercloud)" in login["output"], done.stdout + done.stderr
    assert json.loads(whoami["output"]) == {
        "user_urn": "alice",
        "org_urn": "tml:organization:tinkercloud",
        "email": "alice@localhost",
    }
    assert "still active" in logout["output"] and "Logged in" in again["output"]


def test_a_key_that_is_revoked_while_its_user_trains_ends_that_within_a_second(shared):
    secret, key = make_key(shared.data_dir, "carol")
    time.sleep(1)
    headers = {"X-API-Key": secret}
    assert httpx.get(f"{shared.url}/api/v1/sessions", headers=headers).status_code == 200
    with stored_keys.changing(shared.data_dir, None) as connection:
        stored_keys.revoke(connection, key.key_id, time.time())
    time.sleep(1)
    assert httpx.get(f"{shared.url}/api/v1/sessions", headers=headers).status_code == 401
    with pytest.raises(tinker.AuthenticationError, match="revoked"):
        tinker.RestClient(base_url=shared.url, api_key=secret).list_sessions().result(PATIENCE)


def test_a_command_on_the_servers_machine_needs_no_key(shared):
    command = [sys.executable, "-m", "tinkercloud", "models", "list", "--url", shared.url]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TINKER")}
    for data_dir, status in ((shared.data_dir, 0), (shared.data_dir.parent / "other", 2)):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environ | {"TINKERCLOUD_DATA_DIR": str(data_dir)}
        )
        assert done.returncode == status, done.stderr
        assert NANO in done.stdout if status == 0 else "not valid here" in done.stderr
    listed = subprocess.run(
        [*command[:3], "checkpoints", "list", "--url", shared.url],
        capture_output=True,
        text=True,
        timeout=60,
        env=environ | {"TINKERCLOUD_DATA_DIR": str(shared.data_dir)},
    )
    said = "None of the operator's; a user's are listed by `tinker checkpoint list` with that user's key.\n"
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", said)
