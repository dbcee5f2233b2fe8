"""What the routes answer, as the SDK's response types read it."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tinker import types
from tinker.proto.response_conv import deserialize_proto_response
from tinker.types import _pydantic_types

from tests.api.conftest import MODEL, batch
from tinkercloud.nano import FOLDER

PROTOBUF = {"accept": "application/x-protobuf"}


def test_what_an_sdk_asks_first(shared_run):
    config = types.ClientConfigResponse.model_validate(shared_run.post("client/config", sdk_version="0.38.0"))
    assert config.parallel_fwdbwd_chunks and config.proto_compress_fwdbwd and not config.pjwt_auth_enabled
    older = shared_run.post("client/config", sdk_version="0.22.3")
    assert older["proto_write_fwdbwd"] and older["fwd_via_fwdbwd"]
    types.ClientDynamicConfigResponse.model_validate(shared_run.post("client/dynamic_config", sdk_version="0.38.0"))
    assert types.AuthTokenResponse.model_validate(shared_run.post("auth/token")).jwt.startswith("eyJ")
    health = shared_run.http.get("healthz").json()
    assert types.HealthResponse.model_validate(health).status == "ok" and health["engines"] == {MODEL: "ready"}
    served = types.GetServerCapabilitiesResponse.model_validate(shared_run.http.get("get_server_capabilities").json())
    assert [(m.model_name, m.max_context_length, m.trainable) for m in served.supported_models] == [(MODEL, 512, True)]
    assert shared_run.post("telemetry", events=[{"any": "thing"}]) == {"status": "accepted"}


def test_a_session_and_its_members(run):
    types.SessionHeartbeatResponse.model_validate(run.post("session_heartbeat", session_id=run.session))
    found = types.GetSessionResponse.model_validate(run.http.get(f"sessions/{run.session}").json())
    assert found.training_run_ids == [run.id] and found.user_metadata == {"n": "1"}
    listed = types.ListSessionsResponse.model_validate(run.http.get("sessions?limit=1").json())
    assert listed.sessions == [run.session]
    for reason in ("errored", "success"):
        run.post(f"sessions/{run.session}/finish", reason={"type": reason}, detail=None)
    assert run.send("session_heartbeat", session_id=run.session).status_code == 410
    gone = run.send("create_model", session_id=run.session, model_seq_id=1, base_model=MODEL, lora_config={"rank": 1})
    assert gone.status_code == 410 and "errored" in gone.json()["detail"]


def test_info_names_a_tokenizer_that_loads_here(shared_run):
    info = types.GetInfoResponse.model_validate(shared_run.post("get_info", model_id=shared_run.id))
    assert (info.model_name, info.lora_rank, info.is_lora) == (MODEL, 4, True)
    assert info.model_data.tokenizer_id == str(FOLDER), "no hub has this model, and the client is on this machine"


def test_the_three_forms_of_a_batch_give_the_same_numbers(run):
    given = batch(1, 2, 3)
    numbers = {"data": [1, 2, 3], "dtype": "int64"}
    targets = {"data": [2, 3, 5], "dtype": "int64"}
    weights = {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]}
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": numbers["data"]}]},
            "loss_fn_inputs": {"target_tokens": targets, "weights": weights},
        }
    ]
    inside = {"data": data, "loss_fn": "cross_entropy"}
    sent = [
        run.send_proto(run.proto(given, forward_only=True)).json(),
        run.post("forward", model_id=run.id, seq_id=run.next_seq(), forward_input=inside),
        run.post("forward_backward", model_id=run.id, seq_id=run.next_seq(), forward_backward_input=inside),
    ]
    results = [run.result(future["request_id"]) for future in sent]
    assert results[0] == results[1] == results[2]
    read = _pydantic_types.tensor_data.TensorData.model_validate(results[0]["loss_fn_outputs"][0]["logprobs"])
    assert read.to_numpy().shape == (3,)
    answer = run.http.post("retrieve_future", json={"request_id": sent[0]["request_id"]}, headers=PROTOBUF)
    assert answer.headers["content-type"] == "application/x-protobuf"
    output = deserialize_proto_response(answer.content, types.ForwardBackwardOutput)
    assert output.loss_fn_outputs[0]["logprobs"].tolist() == read.to_numpy().tolist()
    assert output.metrics == results[0]["metrics"]


def test_sparse_targets_in_json_are_the_dense_ones(run):
    """Three positions of two targets each; the second has none, and what is not listed is target 0 of weight 0."""
    tokens = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    dense = {
        "target_tokens": {"data": [7, 8, 0, 0, 0, 9], "dtype": "int64", "shape": [3, 2]},
        "weights": {"data": [0.5, 0.25, 0.0, 0.0, 0.0, -1.0], "dtype": "float32", "shape": [3, 2]},
    }
    rows = {"shape": [3, 2], "sparse_crow_indices": [0, 2, 2, 3], "sparse_col_indices": [0, 1, 1]}
    sparse = {
        "target_tokens": {"data": [7, 8, 9], "dtype": "int64", **rows},
        "weights": {"data": [0.5, 0.25, -1.0], "dtype": "float32", **rows},
    }
    results = []
    for inputs in (dense, sparse):
        given = {"data": [{"model_input": tokens, "loss_fn_inputs": inputs}], "loss_fn": "cross_entropy"}
        future = run.post("forward_backward", model_id=run.id, seq_id=run.next_seq(), forward_backward_input=given)
        results.append(run.result(future["request_id"]))
    assert results[0] == results[1]
    (output,) = results[0]["loss_fn_outputs"]
    assert output["logprobs"]["shape"] == output["elementwise_loss"]["shape"] == [3, 2]
    assert results[0]["metrics"]["active_tokens:sum"] == 2


def test_a_custom_loss_is_its_sessions_and_its_id_is_enough(run, shared_run):
    nodes = [
        {"op": "placeholder", "name": "lp", "target": "logprobs"},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "lp"}]},
        {"op": "output", "name": "o", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}]},
    ]
    loss = {
        "session_id": run.session,
        "name": "total",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": nodes},
    }
    made = run.post("create_custom_loss", custom_loss_seq_id=0, **loss)
    assert run.post("create_custom_loss", custom_loss_seq_id=0, **loss) == made
    answer = types.CreateCustomLossResponse.model_validate(run.result(made["request_id"]))
    given = dataclasses.replace(batch(1, 2, 3), loss_fn="custom", loss_fn_config={"loss_id": answer.loss_id})
    result = run.result(run.send_proto(run.proto(given)).json()["request_id"])
    logprobs = result["loss_fn_outputs"][0]["logprobs"]["data"]
    assert result["metrics"] == {"loss:sum": pytest.approx(sum(logprobs)), "tokens:sum": 3}

    foreign = shared_run.send_proto(shared_run.proto(given, forward_only=True))
    assert foreign.status_code == 400 and "another session's" in foreign.json()["detail"]
    shared_run.train_on()
    damaged = dataclasses.replace(given, loss_fn_config={"loss_id": answer.loss_id[:-9]})
    damaged = run.send_proto(run.proto(damaged, forward_only=True))
    assert damaged.status_code == 400 and "damaged" in damaged.json()["detail"]
    run.train_on()
    loss["graph"]["nodes"][1] |= {"op": "call_function", "target": "os.system", "args": ["true"]}
    hostile = run.send("create_custom_loss", custom_loss_seq_id=1, **loss)
    assert hostile.status_code == 400 and "cannot call os.system" in hostile.json()["detail"]
    unknown = run.send("create_custom_loss", custom_loss_seq_id=1, **(loss | {"session_id": "nobody"}))
    assert unknown.status_code == 404


def test_only_the_quickstarts_client_may_send_targets_of_another_length(run):
    shorter = batch(1, 2, 3, target_tokens=np.array([7, 8]), weights=np.ones(2, np.float32))
    assert run.send_proto(run.proto(shorter)).status_code == 400
    marked = run.send_proto(run.proto(shorter), **{"X-Tinker-GMI": "1"}).json()
    continued = run.send_proto(run.proto(batch(1, 2, 3, 7, target_tokens=np.array([5, 5, 7, 8]))))
    theirs = run.result(marked["request_id"])["loss_fn_outputs"][0]["logprobs"]["data"]
    official = run.result(continued.json()["request_id"])["loss_fn_outputs"][0]["logprobs"]["data"]
    assert len(theirs) == 2
    np.testing.assert_allclose(theirs, official[2:], atol=1e-5)


def test_a_poll_is_held_and_then_answered_408(run):
    ahead = run.post("optim_step", model_id=run.id, seq_id=2, adam_params={})  # 1 is still to come
    answer = run.send("retrieve_future", request_id=ahead["request_id"])
    assert answer.status_code == 408
    assert answer.json() == {"type": "try_again", "request_id": ahead["request_id"], "queue_state": "active"}
    assert answer.elapsed.total_seconds() > 0.9

    polled = []
    waiting = threading.Thread(target=lambda: polled.append(run.result(ahead["request_id"])))
    waiting.start()
    run.send_proto(run.proto(batch(1, 2), seq_id=1))
    waiting.join()
    assert "metrics" in polled[0]


def test_a_repeat_has_the_first_ones_request_id(run):
    body = run.proto(batch(1, 2))
    first, second = run.send_proto(body).json(), run.send_proto(body).json()
    assert first == second
    made = {"session_id": run.session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4}}
    assert run.post("create_model", **made)["model_id"] == run.id


def test_a_large_result_is_announced_by_its_size_once(run):
    future = run.send_proto(run.proto(batch(*range(1, 400)))).json()
    run.result(future["request_id"])
    announced = run.post("retrieve_future", request_id=future["request_id"], allow_metadata_only=True)
    assert announced["status"] == "complete_metadata" and announced["response_payload_size"] > 2000
    assert "metrics" in run.post("retrieve_future", request_id=future["request_id"], allow_metadata_only=False)


@pytest.fixture
def sampler(run):
    made = run.post("create_sampling_session", session_id=run.session, sampling_session_seq_id=3, base_model=MODEL)
    return types.CreateSamplingSessionResponse.model_validate(made).sampling_session_id


def asample(run, **body):
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    params = {"max_tokens": 4, "seed": 7, "stop": []}
    return run.post("asample", **{"prompt": prompt, "sampling_params": params, "type": "sample", **body})


def test_a_sample_in_both_forms(run, sampler):
    assert types.GetSamplerResponse.model_validate(run.http.get(f"samplers/{sampler}").json()).base_model == MODEL
    future = asample(run, sampling_session_id=sampler, seq_id=0, num_samples=2, prompt_logprobs=True)
    assert len(set(future["sample_sequence_ids"])) == 2
    as_json = run.result(future["request_id"])
    answer = run.http.post("retrieve_future", json={"request_id": future["request_id"]}, headers=PROTOBUF)
    read = deserialize_proto_response(answer.content, types.SampleResponse)
    assert [s.tokens for s in read.sequences] == [s["tokens"] for s in as_json["sequences"]]
    assert [len(s.tokens) for s in read.sequences] == [4, 4]
    assert read.prompt_logprobs == as_json["prompt_logprobs"] and read.prompt_logprobs[0] is None
    assert asample(run, sampling_session_id=sampler, seq_id=0)["request_id"] == future["request_id"]


def test_raw_logprobs_of_samples_where_the_server_is_set_so(run, sampler):
    """At any temperature those of a prompt that ends with the sample."""
    cold = {"max_tokens": 4, "seed": 7, "stop": [], "temperature": 0.4}
    future = asample(run, sampling_session_id=sampler, seq_id=0, sampling_params=cold, topk_sample_logprobs=2)
    (drawn,) = run.result(future["request_id"])["sequences"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, *drawn["tokens"]]}]}
    wanted = dict(prompt=prompt, prompt_logprobs=True, topk_prompt_logprobs=2)
    future = asample(run, sampling_session_id=sampler, seq_id=1, **wanted)
    scored = run.result(future["request_id"])
    np.testing.assert_allclose(drawn["logprobs"], scored["prompt_logprobs"][3:], atol=1e-5)
    np.testing.assert_allclose(drawn["topk_logprobs"], scored["topk_prompt_logprobs"][3:], atol=1e-5)


def test_a_sample_without_a_sampling_session(run, sampler):
    named = run.result(asample(run, base_model=MODEL)["request_id"])
    bound = run.result(asample(run, sampling_session_id=sampler, seq_id=1)["request_id"])
    assert named["sequences"] == bound["sequences"]


def test_a_sample_of_a_path_is_of_the_weights_that_it_names_now(run, sampler):
    def saved() -> str:
        run.train_on()
        request = run.post("save_weights", model_id=run.id, seq_id=run.next_seq(), path="x", overwrite=True)
        return run.result(request["request_id"])["path"]

    def logprobs(**weights) -> list[float]:
        return run.result(asample(run, prompt_logprobs=True, **weights)["request_id"])["prompt_logprobs"]

    base = logprobs(sampling_session_id=sampler, seq_id=0)
    path = saved()
    first = logprobs(model_path=path)
    assert first == logprobs(model_path=path) != base
    assert saved() == path
    assert logprobs(model_path=path) not in (first, base)


@pytest.mark.parametrize(
    ("python", "may"),
    [
        ("3.11.7", False),
        ("3.13.0rc1", False),
        ("3.14.0", True),
        ("3.15", True),
        ("4.0.1", True),
        ("unknown", False),
        ("9" * 5000 + ".0", False),
    ],
)
def test_pyqwest_is_for_pythons_that_end_without_a_crash_after_it(shared_run, python, may):
    headers = {"x-stainless-runtime-version": python}
    assert shared_run.http.post("client/config", json={}, headers=headers).json()["use_pyqwest_transport"] is may


def test_completions_come_in_order_after_a_cursor(run, sampler):
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    empty = run.post("retrieve_futures", target=target, prev_cursor=0, timeout=0)
    assert types.FuturesRetrieveResponse.model_validate(empty).completions == []
    futures = [asample(run, sampling_session_id=sampler, seq_id=seq)["request_id"] for seq in range(3)]
    asample(run, sampling_session_id=sampler, seq_id=10**9)  # another client's
    seen, cursor = [], 0
    while len(seen) < 3:
        page = run.post("retrieve_futures", target=target, prev_cursor=cursor)
        page = types.FuturesRetrieveResponse.model_validate(page)
        seen += [completion.request_id for completion in page.completions]
        assert page.cursor > cursor
        assert all(completion.response_payload_uncompressed_size for completion in page.completions)
        cursor = page.cursor
    assert sorted(seen) == sorted(futures)
    assert run.post("retrieve_futures", target=target, prev_cursor=cursor, timeout=0)["completions"] == []


def test_a_poll_that_waits_for_nothing_is_kept_while_the_newest_result_is_fetched(run, sampler):
    """Until the next sample has ended."""
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    first = asample(run, sampling_session_id=sampler, seq_id=0)["request_id"]
    cursor = run.post("retrieve_futures", target=target)["cursor"]
    with ThreadPoolExecutor() as pool:
        kept = pool.submit(run.post, "retrieve_futures", target=target, prev_cursor=cursor, timeout=0)
        second = asample(run, sampling_session_id=sampler, seq_id=1)["request_id"]
        assert [ended["request_id"] for ended in kept.result()["completions"]] == [second]
    cursor = run.post("retrieve_futures", target=target, prev_cursor=cursor)["cursor"]
    nothing_yet = run.post(
        "retrieve_futures", target=target, prev_cursor=cursor, timeout=0, retrieved_request_ids=[first, second]
    )
    assert nothing_yet == {"completions": [], "cursor": cursor}


def test_clients_that_join_get_numbers_of_their_own(run, sampler):
    joined = [run.post("join_sampling_session", sampling_session_id=sampler) for _ in range(2)]
    assert [types.JoinSamplingSessionResponse.model_validate(one).client_counter for one in joined] == [1, 2]


def test_a_cancelled_sample_fails(run, sampler):
    long = {"max_tokens": 500, "stop": [], "seed": 1}
    future = asample(run, sampling_session_id=sampler, seq_id=0, num_samples=64, sampling_params=long)
    run.post("cancel_future", request_id=future["request_id"])
    result = run.result(future["request_id"])
    assert "error" in result and "cancel" in result["error"]
    run.post("cancel_future", request_id="nothing of that name")
    step = run.post("optim_step", model_id=run.id, seq_id=run.next_seq(), adam_params={})
    assert run.send("cancel_future", request_id=step["request_id"]).status_code == 400


def test_checkpoints_and_training_runs(run):
    run.train_on()
    saves = [
        run.post("save_weights", model_id=run.id, seq_id=run.next_seq(), path="one", user_metadata={"k": "v"}),
        run.post("save_weights_for_sampler", model_id=run.id, seq_id=run.next_seq(), path="one", ttl_seconds=3600),
    ]
    training, sampling = (run.result(save["request_id"])["path"] for save in saves)
    assert training == f"tinker://{run.id}/weights/one" and sampling == f"tinker://{run.id}/sampler_weights/one"
    ephemeral = run.post("save_weights_for_sampler", model_id=run.id, seq_id=run.next_seq(), sampling_session_seq_id=8)
    made = run.result(ephemeral["request_id"])
    assert made == {"type": "save_weights_for_sampler", "sampling_session_id": f"{run.session}:sample:8"}

    info = types.WeightsInfoResponse.model_validate(run.post("weights_info", tinker_path=training))
    assert (info.base_model, info.lora_rank, info.train_mlp) == (MODEL, 4, True)
    found = types.TrainingRun.model_validate(run.http.get(f"training_runs/{run.id}").json())
    assert found.base_model == MODEL and found.lora_rank == 4
    assert found.last_checkpoint.tinker_path == training and found.last_checkpoint.user_metadata == {"k": "v"}
    assert found.last_sampler_checkpoint.checkpoint_id == "sampler_weights/one"
    assert (found.last_sampler_checkpoint.expires_at - found.last_sampler_checkpoint.time).total_seconds() == 3600
    page = types.TrainingRunsResponse.model_validate(run.http.get("training_runs?limit=1&offset=0").json())
    assert page.training_runs == [found] and page.cursor.total_count >= 1 and page.cursor.limit == 1
    own = types.CheckpointsListResponse.model_validate(run.http.get(f"training_runs/{run.id}/checkpoints").json())
    assert {c.tinker_path for c in own.checkpoints} == {training, sampling} and own.cursor is None
    every = types.CheckpointsListResponse.model_validate(run.http.get("checkpoints?limit=1&offset=1").json())
    assert len(every.checkpoints) == 1 and every.cursor.offset == 1 and every.cursor.total_count >= 2


def test_loading_in_both_forms(run):
    before = run.train_on()
    saved = run.post("save_weights", model_id=run.id, seq_id=run.next_seq(), path="here")
    path = run.result(saved["request_id"])["path"]
    resumed = run.train_on()
    loaded = run.post("load_weights", model_id=run.id, seq_id=run.next_seq(), path=path, optimizer=True)
    assert run.result(loaded["request_id"]) == {"type": "load_weights", "path": path, "model_id": run.id}
    assert run.train_on() == resumed != before
    made = run.post("load_weights", session_id=run.session, model_seq_id=5, path=path, optimizer=True)
    assert made["model_id"] == f"{run.session}:train:5"
    assert run.result(made["request_id"])["model_id"] == made["model_id"]
    run.id, run.seq = made["model_id"], 0
    assert run.train_on() == resumed
    wider = {"rank": 8, "train_unembed": False}
    other = run.post("create_model", session_id=run.session, model_seq_id=6, base_model=MODEL, lora_config=wider)
    refused = run.send("load_weights", model_id=other["model_id"], seq_id=1, path=path, optimizer=True)
    assert refused.status_code == 400
    assert ": rank 4 and not 8, train_unembed True and not False; create" in refused.json()["detail"]


def test_an_unloaded_run_is_still_listed(run):
    gone = run.post("unload_model", model_id=run.id)
    assert run.result(gone["request_id"]) == {"type": "unload_model", "model_id": run.id}
    assert run.send("get_info", model_id=run.id).status_code == 404
    assert run.http.get(f"training_runs/{run.id}").status_code == 200


def test_the_description_names_every_body(shared_run):
    described = json.loads(shared_run.http.get("../../openapi.json").text)
    references = {part.split('"')[0] for part in json.dumps(described).split("#/components/schemas/")[1:]}
    assert references <= described["components"]["schemas"].keys()


@pytest.mark.parametrize(
    ("starting_on", "ending_before", "status", "says"),
    [
        ("2026-07-13T00:30:00Z", "2026-07-14T00:00:00Z", 400, "not the beginning of an hour"),
        ("2026-07-13T00:00:00Z", "2026-07-13T00:00:00Z", 400, "at most 14 days later"),
        ("2026-07-01T00:00:00Z", "2026-07-15T01:00:00Z", 400, "at most 14 days later"),
        ("2226-07-01T00:00:00Z", "2226-07-02T00:00:00Z", 400, "in the future"),
        ("2026-07-01T00:00:00", "2026-07-02T00:00:00", 422, "timezone"),
        ("0001-01-01T00:00:00+23:00", "2026-07-02T00:00:00Z", 400, "at most 14 days"),
    ],
)
def test_usage_is_of_whole_hours_of_two_weeks(shared_run, starting_on, ending_before, status, says):
    window = {"starting_on": starting_on, "ending_before": ending_before}
    answer = shared_run.http.get("billing/usage/events", params=window)
    assert answer.status_code == status and says in answer.json()["detail"], answer.text


def test_the_audit_log_has_what_was_done_to_checkpoints(run):
    saved = run.post("save_weights", model_id=run.id, seq_id=run.next_seq(), path="audited")
    path = run.result(saved["request_id"])["path"]
    address = f"training_runs/{run.id}/checkpoints/weights/audited"
    assert run.http.put(f"{address}/ttl", json={"ttl_seconds": 3600}).status_code == 204
    for method in ("POST", "POST", "DELETE"):
        assert run.http.request(method, f"{address}/publish").status_code == 204
    assert run.http.delete(address).status_code == 204
    assert run.http.delete(address).status_code == 404
    found = types.AuditLogResponse.model_validate(run.http.get("audit?event_type=checkpoints").json()).entries
    mine = [entry.event for entry in found if entry.tinker_path == path]
    published = ["checkpoint_publish", "checkpoint_publish", "checkpoint_unpublish"]
    assert mine == ["checkpoint_ttl_set", *published, "checkpoint_delete"]
    assert not run.http.get("audit?event_type=teams").json()["entries"]
    assert not run.http.get("audit?day=2020-01-01").json()["entries"]
