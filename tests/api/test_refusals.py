"""Whatever is refused: a 4xx that the SDK does not retry, with a sentence, and the same run trains on."""

import contextlib
import json
import re
import sqlite3
import time

import numpy as np
import pytest
import zstandard
from tinker import types

from tests.api.conftest import MODEL, batch


def refused(answer, status=400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"detail"} and isinstance(answer.json()["detail"], str)
    return answer.json()["detail"]


def trains_on(run, poisoned: bool = False) -> None:
    """What comes behind the refusal runs. After a refused forward_backward the next step fails, and says why."""
    if poisoned:
        step = run.post("optim_step", model_id=run.id, seq_id=run.next_seq(), adam_params={})
        failure = run.result(step["request_id"])
        assert failure["category"] == "user" and "refused" in failure["error"]
    assert run.train_on() > 0


WRONG_BATCHES = {
    "an unknown loss": types.ForwardBackwardInput(batch(1, 2).data, "nonsense"),
    "an unknown config key": types.ForwardBackwardInput(batch(1, 2).data, "cross_entropy", {"beta": 1.0}),
    "no data": types.ForwardBackwardInput([], "cross_entropy"),
    "a missing input": types.ForwardBackwardInput(batch(1, 2).data, "importance_sampling"),
    "a token outside": batch(1, 10**6),
    "a target outside": batch(1, 2, target_tokens=np.array([1, -100])),
    "unequal lengths": batch(1, 2, 3, target_tokens=np.array([1]), weights=np.ones(1, np.float32)),
    "a wrong shape": batch(1, 2, weights=np.ones(1, np.float32)),
    "a wrong dtype": batch(1, 2, weights=np.ones(2, np.int64)),
    "NaN": batch(1, 2, weights=np.array([1, np.nan], np.float32)),
    "more tokens than activations fit": batch(*range(1, 500)),
    "context overflow": batch(*range(1, 520)),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_a_wrong_batch(shared_run, name):
    refused(shared_run.send_proto(shared_run.proto(WRONG_BATCHES[name])))
    trains_on(shared_run, poisoned=True)


def test_a_wrong_forward_leaves_the_next_step_alone(shared_run):
    refused(shared_run.send_proto(shared_run.proto(WRONG_BATCHES["NaN"], forward_only=True)))
    trains_on(shared_run)


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers(shared_run):
    long = WRONG_BATCHES["more tokens than activations fit"]
    said = refused(shared_run.send_proto(shared_run.proto(long)))
    most = int(
        re.search(r"499 tokens needs [\d,]+ bytes .* 7,400,000 \(activation_bytes\); at most (\d+) tokens", said)[1]
    )
    trains_on(shared_run, poisoned=True)
    run_through = shared_run.send_proto(shared_run.proto(long, forward_only=True)).json()
    assert shared_run.result(run_through["request_id"])["loss_fn_outputs"]
    fits = shared_run.send_proto(shared_run.proto(batch(*range(1, most + 1)))).json()
    assert shared_run.result(fits["request_id"])["loss_fn_outputs"]
    trains_on(shared_run)


def test_a_wrong_step(shared_run):
    for params in ({"learning_rate": -1}, {"beta1": 1.5}, {"eps": "x"}, {"momentum": 0.9}, None):
        body = {"model_id": shared_run.id, "seq_id": shared_run.next_seq()}
        refused(shared_run.send("optim_step", **body, adam_params=params))
    refused(
        shared_run.send(
            "optim_step", model_id=shared_run.id, seq_id=shared_run.next_seq(), optimizer_params={"type": "dimuon"}
        )
    )
    trains_on(shared_run)


def test_wrong_names_and_times(shared_run):
    for path in ("save_weights", "save_weights_for_sampler"):
        for wrong in ({"path": "../x"}, {"path": "a/b"}, {"path": ""}, {"path": "x", "ttl_seconds": 5}, {"path": 7}):
            refused(shared_run.send(path, model_id=shared_run.id, seq_id=shared_run.next_seq(), **wrong))
    kind = {"sampling_session_seq_id": 0, "kind": "eventual"}
    refused(shared_run.send("save_weights_for_sampler", model_id=shared_run.id, seq_id=shared_run.next_seq(), **kind))
    trains_on(shared_run)


def test_a_checkpoint_that_is_not_there(shared_run):
    body = {"model_id": shared_run.id, "optimizer": True}
    path = f"tinker://{shared_run.id}/weights/nothing"
    assert path in refused(shared_run.send("load_weights", seq_id=shared_run.next_seq(), path=path, **body), 404)
    refused(shared_run.send("load_weights", seq_id=shared_run.next_seq(), path="/etc/passwd", **body))
    trains_on(shared_run)


def damaged(run, name: str) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a forward_backward that cannot be decoded."""
    noise = np.random.default_rng(1).standard_normal(30_000).astype(np.float32)
    big = batch(*range(1, 400))
    message = run.proto(big)
    match name:
        case "not protobuf":
            return message[:50] + b"\xff" * 50, {}
        case "too large":
            return message + run.proto(batch(1, weights=noise), seq_id=run.seq), {}
        case "zstd that is cut short":
            whole = zstandard.ZstdCompressor().compress(message + bytes(range(256)) * 2000)
            return whole[:-3], {"content-encoding": "zstd"}
        case "a zstd bomb":
            return zstandard.ZstdCompressor().compress(message + bytes(10**8)), {"content-encoding": "zstd"}
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "status"),
    [("not protobuf", 400), ("too large", 413), ("zstd that is cut short", 400), ("a zstd bomb", 413)],
)
def test_a_damaged_body_uses_up_its_seq_id(shared_run, name, status):
    body, headers = damaged(shared_run, name)
    refused(shared_run.send_proto(body, **headers), status)
    trains_on(shared_run, poisoned=True)


def test_a_damaged_body_that_was_forward_only_costs_no_step(shared_run):
    """Its batch was to leave no gradients, so the next step lacks nothing; the damage is inside of a whole frame."""
    body = shared_run.proto(batch(1, 2, 3), forward_only=True)
    datum = body.index(b"\x1a")  # the field `data`
    refused(shared_run.send_proto(body[: datum + 2] + b"\xff" * 4 + body[datum + 6 :]))
    trains_on(shared_run)
    body = json.dumps({"forward_only": True, "model_id": shared_run.id, "seq_id": shared_run.next_seq()})
    refused(shared_run.http.post("forward_backward", content=body[:-1]))
    trains_on(shared_run)


def test_a_damaged_json_body_uses_up_its_seq_id(shared_run):
    tail = f'"model_id": "{shared_run.id}", "seq_id": {shared_run.next_seq()}'
    refused(shared_run.http.post("optim_step", content=f"{{{tail}"))
    tail = f'"model_id": "{shared_run.id}", "seq_id": {shared_run.next_seq()}'
    refused(shared_run.http.post("forward", content=f'{{"forward_input": "{"x" * 200_000}", {tail}}}'), 413)
    trains_on(shared_run)


def test_a_body_that_is_not_zstd(shared_run):
    refused(shared_run.send_proto(b"hello", **{"content-encoding": "zstd"}))
    refused(shared_run.send_proto(b"hello", **{"content-encoding": "gzip"}))
    trains_on(shared_run)


def test_a_refusal_is_repeated_word_for_word(shared_run):
    seq_id = shared_run.next_seq()
    first = refused(shared_run.send_proto(shared_run.proto(WRONG_BATCHES["NaN"], seq_id=seq_id)))
    assert refused(shared_run.send_proto(shared_run.proto(WRONG_BATCHES["NaN"], seq_id=seq_id))) == first
    assert refused(shared_run.send_proto(shared_run.proto(batch(1, 2), seq_id=seq_id))) == first
    trains_on(shared_run, poisoned=True)


def test_a_load_that_was_accepted_is_repeated_also_when_its_checkpoint_has_gone(server, run):
    saved = run.post("save_weights", model_id=run.id, seq_id=run.next_seq(), path="soon-gone")
    path = run.result(saved["request_id"])["path"]
    load = {"path": path, "optimizer": True}
    loads = [
        {"model_id": run.id, "seq_id": run.next_seq(), **load},
        {"session_id": run.session, "model_seq_id": 1, **load},
    ]
    first = [run.post("load_weights", **body) for body in loads]
    with contextlib.closing(sqlite3.connect(server.data_dir / "ledger.db", timeout=30)) as database, database:
        database.execute("UPDATE checkpoints SET expires_at = 1 WHERE path = ?", (path,))
    deadline = time.monotonic() + 60
    while run.send("weights_info", tinker_path=path).status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [run.post("load_weights", **body) for body in loads] == first
    for body in ({"model_id": run.id, "seq_id": run.next_seq()}, {"session_id": run.session, "model_seq_id": 2}):
        assert path in refused(run.send("load_weights", **body, **load), 404)
    trains_on(run)


def test_a_seq_id_that_was_another_operations(shared_run):
    shared_run.train_on()
    body = {"model_id": shared_run.id, "seq_id": shared_run.seq}
    assert "was a optim_step before" in refused(shared_run.send("save_weights", path="x", **body)).replace("an ", "a ")
    trains_on(shared_run)


@pytest.mark.parametrize(
    ("wrong", "status", "says"),
    [
        ({"base_model": "no/such"}, 404, MODEL),
        ({"lora_config": {"rank": 0}}, 400, "must be positive"),
        ({"lora_config": {"rank": 17}}, 400, "exceeds max LoRA rank 16"),
        ({"lora_config": {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}}, 400, "nothing"),
        ({"lora_config": None}, 400, "lora_config is required"),
        ({"lora_config": {"rank": 4, "dropout": 0.1}}, 400, "no option 'dropout'"),
        ({"optimizer_config": {"type": "lion"}}, 400, "use one of adamw, dimuon"),
        ({"optimizer_config": {"type": "dimuon", "version": 2}}, 400, "version 2 of dimuon"),
        ({"session_id": "none"}, 404, "Session not found"),
        ({"model_seq_id": -1}, 400, "model_seq_id"),
        ({"model_seq_id": 2**64}, 400, "model_seq_id"),
    ],
)
def test_a_training_run_that_cannot_be(shared_run, wrong, status, says):
    body = {"session_id": shared_run.session, "model_seq_id": 9, "base_model": MODEL, "lora_config": {"rank": 4}}
    assert says in refused(shared_run.send("create_model", **{**body, **wrong}), status)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("get_info", {"model_id": "x"}, 404),
        ("get_info", {}, 400),
        ("optim_step", {"model_id": "x", "seq_id": 1, "adam_params": {}}, 404),
        ("optim_step", {"seq_id": 1}, 400),
        ("unload_model", {"model_id": "x"}, 404),
        ("session_heartbeat", {"session_id": "x"}, 404),
        ("retrieve_future", {"request_id": "x"}, 404),
        ("retrieve_future", {}, 400),
        ("retrieve_futures", {"target": {"sampling_session_id": "x"}}, 404),
        ("join_sampling_session", {"sampling_session_id": "x"}, 404),
        ("create_sampling_session", {"session_id": "x", "sampling_session_seq_id": 0}, 404),
        ("weights_info", {"tinker_path": "x"}, 400),
        ("weights_info", {"tinker_path": "tinker://a/weights/b"}, 404),
        ("load_weights", {"path": "tinker://a/weights/b", "optimizer": False}, 400),
        ("asample", {"prompt": {"chunks": [{"tokens": [1]}]}}, 400),
        ("asample", {"prompt": {"chunks": [{"tokens": [1]}]}, "base_model": "no/such"}, 404),
        ("sessions/x/finish", {"reason": {"type": "success"}}, 404),
        ("nothing_here", {}, 404),
        ("healthz", {}, 405),
    ],
)
def test_what_is_not_there(shared_run, path, body, status):
    refused(shared_run.send(path, **body), status)


def test_wrong_parameters_of_a_list(shared_run):
    assert "limit" in refused(shared_run.http.get("sessions?limit=0"), 422)
    assert "offset" in refused(shared_run.http.get("training_runs?offset=a"), 422)
    refused(shared_run.http.get("training_runs/none"), 404)
    refused(shared_run.http.get("training_runs/none/checkpoints"), 404)
    refused(shared_run.http.get("samplers/none"), 404)
    refused(shared_run.http.get("sessions/none"), 404)
