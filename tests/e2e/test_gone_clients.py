"""Clients that go away while they wait: nobody else notices, and nothing of theirs stays taken."""

import json
import socket
import struct
import subprocess
import sys
import time

import httpx
import pytest
from tinker import types

from tests.e2e.by_hand import NANO, PATIENCE, Run

PROMPT = types.ModelInput.from_ints([10, 11, 12])
PARAMS = types.SamplingParams(max_tokens=40, seed=5, stop=[])

KILLED = """
import sys, time, tinker
from tinker import types
client = tinker.ServiceClient(base_url=sys.argv[1], api_key="tml-test")
sampler = client.create_sampling_client(base_model=sys.argv[2]).result()
params = types.SamplingParams(max_tokens=200, seed=1, stop=[])
prompt = types.ModelInput.from_ints([10, 11, 12])
waiting = [sampler.sample(prompt, 4, params) for _ in range(24)]
while sampler._futures_poller is None or len(sampler._futures_poller._events) < len(waiting):
    time.sleep(0.01)
print(sampler._sampling_session_id, flush=True)
time.sleep(600)
"""
"""A client with a stream of samples that it waits for; it says so."""


@pytest.fixture
def run(server):
    made = Run(server.url)
    yield made
    made.close()


def sampling(server) -> dict[str, int]:
    """How full the sampler is. The server says nothing of one that is busy for a second: it is asked again."""
    deadline = time.monotonic() + PATIENCE
    while True:
        (model,) = httpx.get(f"{server.url}/api/v1/admin/models", timeout=PATIENCE).json()["models"]
        if model["sampling"]:
            return model["sampling"]
        assert time.monotonic() < deadline, model


def until_empty(server, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while (load := sampling(server))["running"] or load["waiting"]:
        assert time.monotonic() < deadline, load
        time.sleep(0.02)
    assert load["pages_used"] == 0


def test_a_client_that_is_killed_disturbs_nobody_and_leaves_nothing(server, run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    expected = sampler.sample(PROMPT, 2, PARAMS).result(PATIENCE).sequences
    with subprocess.Popen([sys.executable, "-c", KILLED, server.url, NANO], stdout=subprocess.PIPE, text=True) as gone:
        sampler_id = gone.stdout.readline().strip()
        gone.kill()
    load = sampling(server)
    assert load["running"] and load["waiting"] and load["pages_used"], "they go on: their client may come back"
    drawn = sampler.sample(PROMPT, 2, PARAMS).result(PATIENCE).sequences
    assert [one.tokens for one in drawn] == [one.tokens for one in expected]
    assert sampling(server)["waiting"], "it did not wait for them"
    until_empty(server)
    for number in (0, 23):
        assert len(run.result(f"{sampler_id}:{number}")["sequences"]) == 4


def send_and_close(server, route: str, body: dict) -> None:
    """A request whose client resets the connection while the answer is held."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        head = f"POST /api/v1/{route} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.01)


def test_polls_whose_connections_are_closed_take_no_answers_away(server, run):
    """Also while the request is being accepted: the sample is there, and drawn once."""
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    held = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=900, seed=1, stop=[]))
    name = sampler._sampling_session_id
    deadline = time.monotonic() + PATIENCE
    while run.http.post("retrieve_future", json={"request_id": f"{name}:0"}).status_code == 404:
        assert time.monotonic() < deadline
    body = {
        "sampling_session_id": name,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [10, 11, 12]}]},
        "sampling_params": {"max_tokens": 40, "seed": 5, "stop": []},
    }
    for number in range(12):
        send_and_close(server, "retrieve_future", {"request_id": f"{name}:0"})
        send_and_close(server, "retrieve_futures", {"target": {"sampling_session_id": name}})
        send_and_close(server, "asample", body | {"seq_id": 100 + number})
    assert len(held.result(PATIENCE).sequences[0].tokens) == 900
    expected = sampler.sample(PROMPT, 1, PARAMS).result(PATIENCE).sequences[0].tokens
    for number in range(12):
        again = run.http.post("asample", json=body | {"seq_id": 100 + number}).json()
        assert again["request_id"] == f"{name}:{100 + number}"
        assert run.result(again["request_id"])["sequences"][0]["tokens"] == expected
    until_empty(server)
    assert "Traceback" not in server.log.read_text()


def test_a_cancelled_future_frees_its_pages_at_once(server, run):
    """A hundred thousand tokens were asked for."""
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    sample = sampler.sample(PROMPT, 64, types.SamplingParams(max_tokens=1600, stop=[]))
    deadline = time.monotonic() + PATIENCE
    while not (sampling(server)["running"] and sampler._futures_poller and sampler._futures_poller._events):
        assert time.monotonic() < deadline
    assert sample.future().cancel()
    until_empty(server, seconds=3)
    assert len(sampler.sample(PROMPT, 1, PARAMS).result(PATIENCE).sequences[0].tokens) == 40
