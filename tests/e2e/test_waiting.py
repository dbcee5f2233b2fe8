"""How clients wait: polls are held, signs of life are answered meanwhile, results are there as often as asked."""

import re
import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import _base_client, types
from tinker.proto.response_conv import deserialize_proto_response

from tests.e2e.by_hand import NANO, PATIENCE, Run, datum
from tests.serving import Server

POLL_SECONDS, MAX_PENDING = 0.5, 250
AS_PROTOBUF = {"accept": "application/x-protobuf"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded model with short polls, and every request in the log."""
    data_dir = tmp_path_factory.mktemp("waiting") / "data"
    options = (f"poll_seconds={POLL_SECONDS}", f"max_pending_samples={MAX_PENDING}", "log_level=debug")
    running = Server(data_dir, *(part for option in options for part in ("--set", option))).start(wait=False)
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


LONG = [datum(*(number % 2000 for number in range(1024))) for _ in range(6)]


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


def counted(server, request: str) -> int:
    """How many requests of a kind the server has answered; "retrieve_futures 200" for instance."""
    return len(re.findall(rf"POST /api/v1/{request}\b", server.log.read_text()))


PARAMS = types.SamplingParams(max_tokens=8, stop=[])
PROMPT = types.ModelInput.from_ints([1, 2, 3])


@pytest.mark.parametrize(("python", "may"), [("3.13.2", False), ("3.14.0", True)])
def test_the_sdk_tells_its_python_and_takes_the_library_that_this_one_can_end_with(server, monkeypatch, python, may):
    monkeypatch.setattr(_base_client, "get_python_version", lambda: python)
    _base_client.platform_headers.cache_clear()
    made = Run(server.url)
    _base_client.platform_headers.cache_clear()
    assert made.service.holder.get_client_config().use_pyqwest_transport is may
    made.trains_on()
    made.close()


def test_one_held_poll_waits_for_all_samples_of_a_client(server, run):
    """Then the client is silent: it has acknowledged everything."""
    polls_before, fetched, together = polls(server), counted(server, "retrieve_future 200"), "retrieve_futures 200"
    before = counted(server, together)
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    samples = [sampler.sample(PROMPT, 1, PARAMS) for _ in range(60)]
    failing = sampler.sample(types.ModelInput.from_ints([1, 2, 10**6]), 1, PARAMS)
    assert {len(sample.result(PATIENCE).sequences[0].tokens) for sample in samples} == {8}
    with pytest.raises(tinker.BadRequestError, match="1000000"):
        failing.result(PATIENCE)
    poller = sampler._futures_poller
    deadline = time.monotonic() + PATIENCE
    while poller._retrieved or poller._cursor > poller._acked_cursor:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert polls(server) == polls_before, "no sample is asked for before it has ended"
    assert counted(server, "retrieve_future 200") == fetched + 60
    asked = counted(server, together) - before
    assert 1 <= asked <= 60
    time.sleep(3 * POLL_SECONDS)
    assert counted(server, together) - before == asked


def test_samples_one_after_the_other_take_a_poll_each(server, run):
    """The SDK asks again as soon as it has heard of one, before it fetches it. That poll tells it of the next."""
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    before = counted(server, "retrieve_futures 200")
    for _ in range(10):
        sampler.sample(PROMPT, 1, PARAMS).result(PATIENCE)
    assert counted(server, "retrieve_futures 200") - before < 15


def test_clients_that_join_a_sampler_get_their_own_results(server, run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    joined = [
        tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key="tml-x") for _ in range(2)
    ]
    clients = [sampler, *joined]
    lengths = [types.SamplingParams(max_tokens=5 + i, stop=[]) for i in range(3)]
    samples = [(i, clients[i].sample(PROMPT, 1, lengths[i])) for _ in range(8) for i in range(3)]
    for i, sample in samples:
        assert len(sample.result(PATIENCE).sequences[0].tokens) == 5 + i
    assert sorted(client._cloned_sampler_id for client in clients) == [0, 1, 2]


def until_accepted(server, before: int) -> None:
    """One more sample than before."""
    deadline = time.monotonic() + PATIENCE
    while counted(server, "asample 200") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_more_samples_than_may_wait_are_told_to_come_again_and_the_sdk_does(server, run):
    """Once: it waits as long as it is told to, and then everything is there."""
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    before, accepted = counted(server, "asample 429"), counted(server, "asample 200")
    full = sampler.sample(PROMPT, MAX_PENDING, types.SamplingParams(max_tokens=40, stop=[]))
    until_accepted(server, accepted)
    more = sampler.sample(PROMPT, 2, PARAMS)
    chunks = [{"type": "encoded_text", "tokens": [1, 2]}]
    body = {"sampling_session_id": sampler._sampling_session_id, "seq_id": 77, "prompt": {"chunks": chunks}}
    body["sampling_params"] = {"max_tokens": 1}
    refused = run.http.post("asample", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert f"{MAX_PENDING} may" in refused.json()["detail"]
    assert len(more.result(PATIENCE).sequences) == 2 and len(full.result(PATIENCE).sequences) == MAX_PENDING
    assert counted(server, "asample 429") - before >= 2
    assert run.http.post("asample", json=body).status_code == 200


def test_a_client_that_polls_each_sample_is_told_why_it_waits(server, run, caplog):
    """As SDKs before 0.34 do, and newer ones where a server does not ask for one poll."""
    holder = run.service.holder
    holder._client_config = holder._client_config.model_copy(update={"sample_use_retrieve_futures": False})
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    accepted = counted(server, "asample 200")
    many = sampler.sample(PROMPT, 80, types.SamplingParams(max_tokens=1500, stop=[]))
    until_accepted(server, accepted)
    behind = sampler.sample(PROMPT, 1, PARAMS)
    deadline = time.monotonic() + PATIENCE
    while not (told := [one.getMessage() for one in caplog.records if "Sampling is paused" in one.getMessage()]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert re.search(r"\d+ sequences wait for tinkercloud/nano, which draws 64 at a time", told[0])
    assert many.future().cancel()
    assert len(behind.result(PATIENCE).sequences[0].tokens) == 8


def test_a_sample_that_nobody_waits_for_is_cancelled(server, run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    before, accepted = counted(server, "cancel_future 200"), counted(server, "asample 200")
    sample = sampler.sample(PROMPT, 64, types.SamplingParams(max_tokens=1500, stop=[]))
    deadline = time.monotonic() + PATIENCE
    until_accepted(server, accepted)
    time.sleep(0.5)  # the client has read the answer: without its request's id there is nothing that it could cancel
    assert sample.future().cancel()
    while counted(server, "cancel_future 200") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request_id = f"{sampler._sampling_session_id}:0"
    assert "cancelled" in run.result(request_id)["error"]
    assert len(sampler.sample(PROMPT, 1, PARAMS).result(PATIENCE).sequences[0].tokens) == 8


def test_a_sample_of_more_than_a_megabyte_is_fetched_once_by_its_size(server, run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)
    long = types.ModelInput.from_ints([number % 2000 for number in range(1000)])
    before = counted(server, "retrieve_future 200")
    result = sampler.sample(long, 1, PARAMS, topk_prompt_logprobs=200, include_prompt_logprobs=True).result(PATIENCE)
    assert len(result.topk_prompt_logprobs) == 1000 and len(result.topk_prompt_logprobs[1]) == 200
    assert counted(server, "retrieve_future 200") == before + 1
