"""How clients wait: polls are held, signs of life are answered meanwhile, results are there as often as asked."""

import re
import time

import httpx
import numpy as np
import pytest
from tinker import types
from tinker.proto.response_conv import deserialize_proto_response

from tests.e2e.by_hand import NANO, PATIENCE, Run, datum
from tests.serving import Server

POLL_SECONDS = 0.5
AS_PROTOBUF = {"accept": "application/x-protobuf"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded model with short polls, and every request in the log."""
    data_dir = tmp_path_factory.mktemp("waiting") / "data"
    options = ("--set", f"poll_seconds={POLL_SECONDS}", "--set", "log_level=debug")
    running = Server(data_dir, *options).start(wait=False)
    yield running
    running.stop()


@pytest.fixture
def run(server):
    server.wait_until_ready()
    made = Run(server.url)
    yield made
    made.close()


def test_health_is_503_until_the_model_is_loaded(server):
    """And then it is loaded: a training run is made at the first 200."""
    answers = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not answers or answers[-1].status_code != 200):
        try:
            answers.append(httpx.get(f"{server.url}/api/v1/healthz", timeout=PATIENCE))
        except httpx.TransportError:
            assert server.process.poll() is None, server.log.read_text()
    *before, ready = answers
    assert before and {answer.status_code for answer in before} == {503}
    assert "loading" in before[0].json()["detail"] and before[0].json()["engines"] == {NANO: "loading"}
    assert ready.json() == {"status": "ok", "engines": {NANO: "ready"}}
    made = Run(server.url)
    made.trains_on()
    made.close()


def polls(server) -> int:
    return len(re.findall(r"POST /api/v1/retrieve_future 408", server.log.read_text()))


def test_polls_are_held(server, run):
    missing = run.seq()
    before, started = polls(server), time.monotonic()
    waiting = run.sdk.optim_step(types.AdamParams())
    while polls(server) < before + 4:
        assert time.monotonic() < started + PATIENCE
    assert time.monotonic() - started >= 4 * POLL_SECONDS, "each is held for as long as the server is told to"
    run.send(run.message(seq_id=missing))
    assert waiting.result(PATIENCE).metrics


LONG = [datum(*(number % 2000 for number in range(1024))) for _ in range(12)]


def test_signs_of_life_while_a_large_batch_runs(run):
    batch = run.sdk.forward_backward(LONG, "cross_entropy")
    answered = 0
    while not batch.future().done():
        assert run.post("session_heartbeat", session_id=run.session).status_code == 200
        assert run.http.get("healthz").status_code == 200
        answered += 1
    assert answered > 10, "they are not answered one for each operation"
    batch.result(PATIENCE)


def test_signs_of_life_while_many_samples_run(run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    params = types.SamplingParams(max_tokens=24, stop=[])
    prompt = types.ModelInput.from_ints([1, 2, 3])
    samples = [sampler.sample(prompt, 1, params) for _ in range(200)]
    answered = 0
    while not all(sample.future().done() for sample in samples):
        assert run.post("session_heartbeat", session_id=run.session).status_code == 200
        answered += 1
    assert answered > 10
    assert {len(sample.result(PATIENCE).sequences[0].tokens) for sample in samples} == {24}


def test_a_result_of_five_megabytes_is_announced_and_then_given_as_often_as_asked(run):
    targets, weights = np.ones((1024, 128), np.int64), np.ones((1024, 128), np.float32)
    tokens = [number % 2000 for number in range(1024)]
    wide = [datum(*tokens, target_tokens=targets, weights=weights) for _ in range(11)]
    message = run.message(wide)
    message.forward_only = True
    request_id = run.send(message).json()["request_id"]
    metrics = run.result(request_id)["metrics"]
    announced = run.post("retrieve_future", request_id=request_id, allow_metadata_only=True).json()
    assert announced["status"] == "complete_metadata" and announced["response_payload_size"] > 5_000_000
    for _ in range(3):
        answer = run.http.post("retrieve_future", json={"request_id": request_id}, headers=AS_PROTOBUF)
        again = deserialize_proto_response(answer.content, types.ForwardBackwardOutput)
        assert again.metrics == metrics and len(again.loss_fn_outputs) == 11
    result = run.sdk.forward(wide, "cross_entropy").result(PATIENCE)
    assert [output["logprobs"].to_numpy().shape for output in result.loss_fn_outputs] == [(1024, 128)] * 11
