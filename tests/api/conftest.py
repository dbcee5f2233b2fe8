"""A real server with small limits, and a client that can send it anything."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto

from tests.api.tenants import Tenants
from tests.serving import Server
from tinkercloud.event_loop import new_event_loop
from tinkercloud.nano import FOLDER

MODEL = "me/small"
SETTINGS = {
    "poll_seconds": 1,
    "max_body_bytes": 100_000,
    "max_decompressed_bytes": 1_000_000,
    "max_bodies_bytes": 180_000,
    "inline_result_bytes": 2000,
    "raw_sample_logprobs": "true",
    "activation_bytes": 7_400_000,  # for some 420 tokens, of 512 in the context
}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The embedded model's folder under another name, which no hub has."""
    options = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    data_dir = tmp_path_factory.mktemp("api") / "data"
    with Server(data_dir, "--model", f"{MODEL}={FOLDER}", "--max-context", "512", "--max-rank", "16", *options) as up:
        yield up


def batch(*tokens: int, **inputs: np.ndarray) -> types.ForwardBackwardInput:
    """One cross_entropy datum."""
    targets = np.array([*tokens[1:], 5], np.int64)
    given = {"target_tokens": targets, "weights": np.ones(len(tokens), np.float32), **inputs}
    return types.ForwardBackwardInput([types.Datum(types.ModelInput.from_ints(list(tokens)), given)], "cross_entropy")


class Run:
    """A session with one training run; requests are written by hand, and seq_ids counted."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)
        self.session = self.post("create_session", tags=[], user_metadata={"n": 1}, sdk_version="x")["session_id"]
        made = self.post(
            "create_model",
            session_id=self.session,
            model_seq_id=0,
            base_model=MODEL,
            lora_config={"rank": 4, "seed": 1},
        )
        self.id, self.seq = made["model_id"], 0
        assert self.result(made["request_id"]) == {"type": "create_model", "model_id": self.id}

    def send(self, route: str, /, **body) -> httpx.Response:
        return self.http.post(route, json=body)

    def post(self, route: str, /, **body) -> dict:
        answer = self.send(route, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def proto(self, given: types.ForwardBackwardInput, forward_only: bool = False, seq_id: int | None = None) -> bytes:
        seq_id = self.next_seq() if seq_id is None else seq_id
        message = forward_backward_request_to_proto(types.ForwardBackwardRequest(given, self.id, seq_id))
        message.forward_only = forward_only
        return message.SerializeToString()

    def send_proto(self, body: bytes, **headers: str) -> httpx.Response:
        headers = {"content-type": "application/x-protobuf", **headers}
        return self.http.post("forward_backward", content=body, headers=headers)

    def result(self, request_id: str) -> dict:
        """The JSON of a result, however long it takes."""
        for _ in range(60):
            answer = self.send("retrieve_future", request_id=request_id)
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise AssertionError(f"no result of {request_id}")

    def train_on(self) -> float:
        """A forward_backward and a step, as a client does that was never refused; the loss."""
        sent = self.send_proto(self.proto(batch(1, 2, 3)))
        assert sent.status_code == 200, sent.text
        stepped = self.post("optim_step", model_id=self.id, seq_id=self.next_seq(), adam_params={})
        loss = self.result(sent.json()["request_id"])["metrics"]["loss:sum"]
        assert self.result(stepped["request_id"])["metrics"]["learning_rate:mean"] == 1e-4
        return loss


@pytest.fixture(scope="package")
def tenants(tmp_path_factory):
    """A server in this process, which tests share; `run` runs a coroutine with it."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        started = runner.run(Tenants.start(tmp_path_factory.mktemp("tenants") / "data"))
        started.run = lambda coroutine: runner.run(asyncio.wait_for(coroutine, 120))
        started.things = started.run(started.begin())
        yield started
        runner.run(started.stop())


@pytest.fixture
def run(server):
    """A fresh training run."""
    made = Run(server.url)
    yield made
    made.http.close()


@pytest.fixture(scope="module")
def shared_run(server):
    """One training run for tests that only refuse."""
    made = Run(server.url)
    yield made
    made.http.close()
