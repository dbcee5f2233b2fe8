"""A training run of the official SDK that can also send what the SDK never would, at seq_ids that the SDK counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import numpy as np
import tinker
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto

NANO = "tinkercloud/nano"
OTHER, OTHER_VOCABULARY = "other/tiny", 2176
"""The other base model of `limited_server`."""
CONTEXT = 256
"""Tokens that the models of `limited_server` take."""
PROTOBUF = {"content-type": "application/x-protobuf"}
PATIENCE = 60
"""Seconds after which something that should have ended is stuck."""


class Refusal(NamedTuple):
    status: int
    detail: str


def datum(*tokens: int, **inputs: Any) -> types.Datum:
    """A cross_entropy datum: every token predicts the next one, the last one predicts 5. `inputs` replace or add to
    what the loss reads; None leaves one out."""
    given = {
        "target_tokens": np.array([*tokens[1:], 5], np.int64),
        "weights": np.ones(len(tokens), np.float32),
        **inputs,
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={name: values for name, values in given.items() if values is not None},
    )


GOOD = [datum(10, 11, 12, 13), datum(40, 41)]

BATCH = {
    "data": [
        {
            "model_input": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                "weights": {"data": [1.0, 1.0], "dtype": "float32", "shape": [2]},
            },
        }
    ],
    "loss_fn": "cross_entropy",
    "loss_fn_config": None,
}
SOUND = {
    "create_session": {"tags": [], "sdk_version": "x", "user_metadata": {}, "display_name": "x", "project_id": "x"},
    "session_heartbeat": {"session_id": "x"},
    "create_model": {"session_id": "x", "model_seq_id": 3, "base_model": NANO, "lora_config": {"rank": 1}},
    "get_info": {"model_id": "x"},
    "optim_step": {"model_id": "x", "seq_id": 1, "adam_params": {}},
    "forward_backward": {"model_id": "x", "seq_id": 1, "forward_backward_input": BATCH},
    "forward": {"model_id": "x", "seq_id": 1, "forward_input": BATCH},
    "save_weights": {"model_id": "x", "seq_id": 1, "path": "x", "ttl_seconds": 3600, "overwrite": False},
    "save_weights_for_sampler": {"model_id": "x", "seq_id": 1, "path": "x", "ttl_seconds": 3600},
    "load_weights": {"model_id": "x", "seq_id": 1, "path": "tinker://x/weights/x", "optimizer": True},
    "weights_info": {"tinker_path": "tinker://x/weights/x"},
    "unload_model": {"model_id": "x"},
    "create_sampling_session": {"session_id": "x", "sampling_session_seq_id": 1, "base_model": NANO},
    "asample": {
        "sampling_session_id": "x",
        "seq_id": 1,
        "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]},
        "num_samples": 1,
        "sampling_params": {"temperature": 1.0, "stop": None, "seed": 1, "max_tokens": 1},
    },
    "join_sampling_session": {"sampling_session_id": "x"},
    "retrieve_future": {"request_id": "x", "allow_metadata_only": False},
    "retrieve_futures": {"target": {"sampling_session_id": "x"}, "prev_cursor": 0, "timeout": 0},
    "cancel_future": {"request_id": "x"},
}
"""A JSON body of each route that is right, except for whom it is of."""


class Run:
    """One training run in a session of its own."""

    def __init__(self, url: str, base_model: str = NANO, rank: int = 4, seed: int = 1):
        self.url = url
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=PATIENCE)
        self.service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        created = self.service.create_lora_training_client(base_model=base_model, rank=rank, seed=seed)
        self.sdk = created.result(PATIENCE)
        self.id = self.sdk.get_info().model_id
        self.session = self.id.split(":")[0]

    def close(self) -> None:
        self.service.holder.close()
        self.http.close()

    def seq(self) -> int:
        """The next seq_id; the SDK goes on behind it."""
        number = self.sdk._get_request_id()

        async def take_turn() -> None:
            async with self.sdk._take_turn(number):
                pass

        self.service.holder.run_coroutine_threadsafe(take_turn()).result(PATIENCE)
        return number + 1

    # ------------------------------------------------------------ by hand

    def message(self, data: list[types.Datum] = GOOD, loss: str = "cross_entropy", seq_id: int | None = None) -> Any:
        """The SDK's own protobuf of a forward_backward."""
        batch = types.ForwardBackwardInput(data=data, loss_fn=loss)  # type: ignore[arg-type]
        seq_id = self.seq() if seq_id is None else seq_id
        return forward_backward_request_to_proto(types.ForwardBackwardRequest(batch, self.id, seq_id))

    def send(self, message: pb.ForwardBackwardRequest | bytes, **headers: str) -> httpx.Response:
        body = message if isinstance(message, bytes) else message.SerializeToString()
        return self.http.post("forward_backward", content=body, headers={**PROTOBUF, **headers})

    def post(self, route: str, /, **body: Any) -> httpx.Response:
        """JSON to a route, of this training run unless `body` says otherwise."""
        return self.http.post(route, json={"model_id": self.id, **body})

    def result(self, request_id: str) -> dict[str, Any]:
        """The JSON of a future, polled as the SDK does."""
        for _ in range(PATIENCE):
            answer = self.http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise AssertionError(f"{request_id} does not end")

    # ------------------------------------------------------------ with the SDK

    def step(self, data: list[types.Datum] = GOOD, learning_rate: float = 1e-3) -> float:
        """A batch and an optimizer step, pipelined as the SDK's users do it; the loss."""
        batch = self.sdk.forward_backward(data, "cross_entropy")
        step = self.sdk.optim_step(types.AdamParams(learning_rate=learning_rate))
        loss = batch.result(PATIENCE).metrics["loss:sum"]
        step.result(PATIENCE)
        return loss

    def trains_on(self) -> None:
        assert math.isfinite(self.step())

    def step_fails(self, because: str = "") -> None:
        """The next step lacks a part of its batch: it fails, says so and what was wrong, and clears the gradient."""
        try:
            self.sdk.optim_step(types.AdamParams()).result(PATIENCE)
        except tinker.RequestFailedError as error:
            assert error.category == types.RequestErrorCategory.User
            assert "lack its part" in str(error) and "send the whole batch again" in str(error)
            assert not because or f"was refused because: {because}" in str(error)
        else:
            raise AssertionError("a step on half a batch was applied")


def refusal_of(answer: httpx.Response) -> Refusal:
    """A refusal as every client can read it."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = answer.json()
    assert list(body) == ["detail"] and isinstance(body["detail"], str) and body["detail"], answer.text
    return Refusal(answer.status_code, body["detail"])


def refused(attempt: Callable[..., Any], *arguments: Any, **options: Any) -> Refusal:
    """The refusal that a call meets, of the SDK or by hand."""
    try:
        answer = attempt(*arguments, **options)
        answer = answer.result(PATIENCE) if hasattr(answer, "result") else answer
    except tinker.APIStatusError as error:
        return refusal_of(error.response)
    assert isinstance(answer, httpx.Response), f"the server took it: {answer}"
    return refusal_of(answer)
