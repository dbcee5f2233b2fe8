"""The JSON forms: against the SDK's request types, field by field, and what is done with fields that nobody knows."""

import dataclasses
import json
import logging
from typing import get_args

import numpy as np
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from tinker import types
from tinker.types._pydantic_types import datum as sdk_datum
from tinker.types._pydantic_types import forward_backward_input as sdk_batch
from tinker.types._pydantic_types import tensor_data as sdk_tensor
from tinker.types.sampling_params import SamplingParams as SdkSamplingParams

from tests.api.test_wire_protobuf import PROVENANCE, SPANS, SPARSE, sampled, sent
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.answers import Json, iso, text_metadata
from tinkercloud.api.wire.json_arrays import batch_from
from tinkercloud.api.wire.reading import as_request
from tinkercloud.api.wire.results import as_json
from tinkercloud.engine.results import Failure, LossOutput, SampleOutput, StepOutput
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger import records

PAIRS = [
    (types.ClientConfigRequest, wire.ClientConfig),
    (types.CreateSessionRequest, wire.CreateSession),
    (types.SessionHeartbeatRequest, wire.SessionHeartbeat),
    (types.CreateModelRequest, wire.CreateModel),
    (types.CreateCustomLossRequest, wire.CreateCustomLoss),
    (types.LoraConfig, wire.Lora),
    (types.AdamOptimizerConfig, wire.OptimizerConfig),
    (types.GetInfoRequest, wire.ModelAddress),
    (types.UnloadModelRequest, wire.ModelAddress),
    (sdk_batch.ForwardBackwardInput, wire.ForwardBackwardInput),
    (sdk_datum.Datum, wire.Datum),
    (types.Datum, wire.Datum),
    (sdk_tensor.TensorData, wire.TensorData),
    (types.ModelInput, wire.ModelInput),
    (types.EncodedTextChunk, wire.Chunk),
    (types.ImageChunk, wire.Chunk),
    (types.ImageAssetPointerChunk, wire.Chunk),
    (types.DmelChunk, wire.Chunk),
    (types.ForwardBackwardRequest, wire.ForwardBackward),
    (types.ForwardRequest, wire.Forward),
    (types.OptimStepRequest, wire.OptimStep),
    (types.AdamParams, wire.Adam),
    (types.DimuonParams, wire.Dimuon),
    (types.SaveWeightsRequest, wire.SaveWeights),
    (types.SaveWeightsForSamplerRequest, wire.SaveWeightsForSampler),
    (types.SaveWeightsExternalRequest, wire.SaveWeightsExternal),
    (types.LoadWeightsRequest, wire.LoadWeights),
    (types.CopyWeightsRequest, wire.CopyWeights),
    (types.SessionSearchRequest, wire.SearchSessions),
    (types.CreateSamplingSessionRequest, wire.CreateSamplingSession),
    (types.JoinSamplingSessionRequest, wire.JoinSamplingSession),
    (types.SampleRequest, wire.Sample),
    (SdkSamplingParams, wire.SamplingParams),
    (types.FutureRetrieveRequest, wire.RetrieveFuture),
    (types.FuturesRetrieveRequest, wire.RetrieveFutures),
    (types.SamplingSessionFuturesTarget, wire.SamplingSessionTarget),
]

ELSEWHERE = {
    "GetBillingUsageRequest": "it is a query, see test_billing.py",
    "GetCurrentCheckpointStorageUsageRequest": "it is a query, see test_billing.py",
    "TelemetrySendRequest": "its fields are not read",
}
"""Request types of the SDK that have no counterpart here, and why."""


def fields_of(kind) -> dict[str, object]:
    """(name, default) of a pydantic model's or a dataclass's fields; `...` for none."""
    if dataclasses.is_dataclass(kind):
        return {field.name: None for field in dataclasses.fields(kind)}
    return {
        name: ... if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in kind.model_fields.items()
    }


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda kind: kind.__name__)
def test_every_field_of_the_sdks_requests_is_known(theirs, ours):
    missing = fields_of(theirs).keys() - ours.model_fields.keys() - {"type"}
    assert not missing, f"{ours.__name__} lacks {sorted(missing)}"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [pair for pair in PAIRS if not dataclasses.is_dataclass(pair[0])],
    ids=lambda kind: kind.__name__,
)
def test_defaults_are_the_sdks(theirs, ours):
    for name, default in fields_of(theirs).items():
        mine = ours.model_fields.get(name)
        if mine is not None and default is not ... and not mine.is_required() and name != "type":
            own = mine.get_default(call_default_factory=True)
            own = own.model_dump(exclude_none=True) if hasattr(own, "model_dump") else own
            theirs_plain = default.model_dump() if hasattr(default, "model_dump") else default
            assert own == theirs_plain, f"{ours.__name__}.{name}"


def test_no_request_type_of_the_sdk_is_overlooked():
    known = {theirs.__name__ for theirs, _ in PAIRS} | ELSEWHERE.keys()
    requests = {name for name in dir(types) if name.endswith("Request")}
    assert requests - known == set()


def test_the_sdks_own_dumps_are_read():
    request = types.SampleRequest(
        prompt=types.ModelInput.from_ints([1, 2]),
        sampling_params=types.SamplingParams(max_tokens=3, stop=["a"]),
        sampling_session_id="s",
        seq_id=4,
        prompt_logprobs=False,
        record_stability_info=False,
    )
    read = as_request(wire.Sample, request.model_dump(mode="json", exclude_none=True))
    assert (read.seq_id, read.sampling_params.stop, read.prompt.chunks[0].tokens) == (4, ["a"], [1, 2])


def test_an_unknown_field_is_logged_once_and_ignored(caplog):
    caplog.set_level(logging.INFO, logger=wire.__name__)
    for _ in range(3):
        as_request(wire.SessionHeartbeat, {"session_id": "s", "mood_of_the_client": "good"})
    lines = [record.getMessage() for record in caplog.records if "mood_of_the_client" in record.getMessage()]
    assert len(lines) == 1 and "SessionHeartbeat" in lines[0]


@pytest.mark.parametrize("kind", [wire.SamplingParams, wire.Adam, wire.Lora, wire.Sample, wire.OptimizerConfig])
def test_an_unknown_option_with_a_value_is_named(kind):
    whole = {"rank": 8, "prompt": {"chunks": []}}
    given = {name: value for name, value in whole.items() if name in kind.model_fields}
    with pytest.raises(InvalidRequest, match=r"no option 'min_p' \(it is 0.1\); there are"):
        as_request(kind, {**given, "min_p": 0.1})
    for nothing in (None, False, 0, 0.0, "", [], {}):
        as_request(kind, {**given, "min_p": nothing})


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (wire.CreateModel, {"session_id": "s"}, "model_seq_id: Field required; base_model: Field required"),
        (wire.SaveWeights, {"model_id": 5}, "model_id: Input should be a valid string .it is 5."),
        (wire.OptimStep, {"model_id": "m", "adam_params": {"learning_rate": "nan"}}, "finite number"),
        (
            wire.OptimStep,
            {"model_id": "m", "adam_params": {"beta1": None}},
            r"^adam_params.beta1: must be a finite number \(",
        ),
        (wire.OptimStep, {"model_id": "m", "adam_params": {"beta2": 1}}, "adam_params.beta2: .* less than 1"),
        (wire.OptimStep, {"model_id": "m", "seq_id": 2**63}, "seq_id: "),
        (wire.FinishSession, {"reason": {"type": "bored"}}, "reason.type: "),
    ],
)
def test_a_wrong_field_is_named(kind, value, says):
    with pytest.raises(InvalidRequest, match=says):
        as_request(kind, value)


# ---------------------------------------------------------------- datums in JSON


def batch_of(data: list[types.Datum]):
    """What arrives of datums that an SDK before 0.23 writes as JSON."""
    dumped = sdk_batch.ForwardBackwardInput.model_construct(
        data=[
            sdk_datum.Datum.model_construct(
                model_input=datum.model_input,
                loss_fn_inputs={
                    name: sdk_tensor.TensorData(
                        data=tensor.data,
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        sparse_crow_indices=tensor.sparse_crow_indices,
                        sparse_col_indices=tensor.sparse_col_indices,
                    )
                    for name, tensor in datum.loss_fn_inputs.items()
                },
            )
            for datum in data
        ],
        loss_fn="cross_entropy",
        loss_fn_config=None,
    ).model_dump(mode="json", exclude_none=True)
    return batch_from(as_request(wire.ForwardBackwardInput, json.loads(json.dumps(dumped))), 2**20)


def test_dense_and_sparse_inputs_arrive_as_they_were():
    sparse = torch.zeros(4, 9, dtype=torch.int64)
    sparse[1, 2], sparse[3, 8] = 7, 5
    weights = np.array([0.1, 1, -2, 3e-8], np.float32)
    inputs = {"target_tokens": sparse, "weights": weights}
    assert types.Datum(types.ModelInput.from_ints([1]), inputs).loss_fn_inputs["target_tokens"].sparse_crow_indices
    (datum,) = batch_of([types.Datum(types.ModelInput.from_ints([5, 6, 7, 8]), inputs)]).data
    assert datum.tokens.tolist() == [5, 6, 7, 8] and datum.tokens.dtype == np.int32
    np.testing.assert_array_equal(datum.inputs["target_tokens"], sparse.numpy())
    assert datum.inputs["weights"].dtype == np.float32
    np.testing.assert_array_equal(datum.inputs["weights"], weights)


def test_spans_in_json_are_those_of_protobuf():
    message = sent(
        [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]}).with_provenance(**SPANS)]
    )
    written = MessageToDict(
        message.data[0], preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    spans = {name: json.loads(json.dumps(written[name])) for name in ("model_input_spans", "loss_fn_input_spans")}
    for span in (span for listed in spans.values() for span in listed):
        for place in span.values():
            place["length"] = int(place["length"])  # 64 bits are text in protobuf's JSON
    empty = {"model_input": {"chunks": []}, "loss_fn_inputs": {}}
    given = {"data": [empty, empty | spans, empty | {name: [] for name in spans}], "loss_fn": "stable_reinforce"}
    batch = batch_from(as_request(wire.ForwardBackwardInput, given), 2**20)
    assert batch.provenance == [None, PROVENANCE, None]
    both = {"prompt_tokens": {"sequence_id": "a", "length": 1}, "sampled_tokens": {"sequence_id": "a", "length": 1}}
    for wrong in ({}, both):
        given["data"] = [empty | {"model_input_spans": [wrong], "loss_fn_input_spans": []}]
        with pytest.raises(InvalidRequest, match="a span has either prompt_tokens or sampled_tokens"):
            as_request(wire.ForwardBackwardInput, given)


@pytest.mark.parametrize("tokens", [[1.5], [True], ["a"], [None], [[1]], [2**31], [-(2**31) - 1], [2**70], [1, [2]]])
def test_tokens_are_integers_of_32_bits(tokens):
    given = {"data": [{"model_input": {"chunks": [{"tokens": tokens}]}, "loss_fn_inputs": {}}], "loss_fn": "x"}
    with pytest.raises(InvalidRequest, match="datum 0, model_input: a flat list of integers that fit int32"):
        batch_from(as_request(wire.ForwardBackwardInput, given), 2**20)


@pytest.mark.parametrize("data", [["a"], [None], [[1.0], [2.0]], [1.0, [2.0]]])
def test_floats_are_numbers(data):
    tensors = {"weights": {"data": data, "dtype": "float32"}}
    given = {"data": [{"model_input": {"chunks": []}, "loss_fn_inputs": tensors}], "loss_fn": "x"}
    with pytest.raises(InvalidRequest, match="datum 0, weights: a flat list of numbers"):
        batch_from(as_request(wire.ForwardBackwardInput, given), 2**20)


# ---------------------------------------------------------------- results


def test_results_in_json():
    assert as_json(Failure("no", "user")) == {"error": "no", "category": "user"}
    assert types.OptimStepResponse.model_validate(as_json(StepOutput({"a:mean": 1.0}))).metrics == {"a:mean": 1.0}
    assert types.CreateModelResponse.model_validate(as_json(records.ModelCreated("m"))).model_id == "m"
    assert types.UnloadModelResponse.model_validate(as_json(records.ModelUnloaded("m"))).model_id == "m"
    assert types.SaveWeightsResponse.model_validate(as_json(records.WeightsSaved("p"))).path == "p"
    loaded = types.LoadWeightsResponse.model_validate(as_json(records.WeightsLoaded("p", "m")))
    assert (loaded.path, loaded.model_id) == ("p", "m")
    read = types.SaveWeightsForSamplerResponseInternal.model_validate
    assert read(as_json(records.SamplerSaved(path="p"))).path == "p"
    assert read(as_json(records.SamplerSaved(sampling_session_id="s"))).sampling_session_id == "s"


def test_every_outcome_has_a_json_form():
    covered = {"Failure", "LossOutput", "SampleOutput", "StepOutput", "ModelCreated", "ModelUnloaded"}
    covered |= {"WeightsSaved", "WeightsLoaded", "SamplerSaved", "ExternalSaved"}
    assert {kind.__name__ for kind in get_args(records.Outcome)} == covered


def test_losses_and_samples_in_json_for_older_sdks():
    outputs = ({"logprobs": np.array([[-1.5], [-2.5]], np.float32)},)
    loss = as_json(LossOutput(output_type="X", outputs=outputs, metrics={"loss:sum": 4.0}))
    tensor = sdk_tensor.TensorData.model_validate(loss["loss_fn_outputs"][0]["logprobs"])
    assert tensor.to_numpy().tolist() == [[-1.5], [-2.5]]
    sample = as_json(sampled())
    assert [sequence["stop_reason"] for sequence in sample["sequences"]] == ["stop", "length"]
    assert sample["sequences"][0]["tokens"] == [3, 4]
    assert sample["prompt_logprobs"] == [None, -3.5]
    assert sample["topk_prompt_logprobs"] == [None, [(5, -0.5), (6, -1.5)]]
    assert sample["target_prompt_logprobs"] == {"data": [-1.5, 0], "dtype": "float32", "shape": [1, 2]}
    assert sample["prompt_alt_tokens"] == {
        "tokens": {"data": [7, 8], "dtype": "int64", "shape": [1, 2]},
        "logprobs": {"data": [-2.5, -3.5], "dtype": "float32", "shape": [1, 2]},
    }
    sparse = as_json(SampleOutput(sequences=(), target_prompt_logprobs=SPARSE))["target_prompt_logprobs"]
    read = sdk_tensor.TensorData.model_validate(sparse)
    assert (read.data, read.shape, read.sparse_crow_indices) == ([-1, -2, -3], [3, 9], [0, 0, 1, 3])
    assert read.sparse_col_indices == [4, 0, 8]


def test_any_answer_can_be_written():
    hostile = {"nan": float("nan"), "lone": "\ud800", "bytes": b"\xff", "set": {1}, "type": object}
    written = Json(hostile).body
    assert json.loads(written)["lone"] == "\ud800"


def test_times_are_iso_in_utc_and_metadata_is_text():
    assert iso(0) == "1970-01-01T00:00:00+00:00"
    assert text_metadata({"a": 1, "b": "x", "c": [1]}) == {"a": "1", "b": "x", "c": "[1]"}


@pytest.mark.parametrize(
    ("kind", "field", "longest", "unit"),
    [
        (wire.CreateSession, "tags", ["t" * 256] * 100, "t"),
        (wire.CreateSession, "display_name", "n" * 1024, "n"),
        (wire.CreateSession, "sdk_version", "n" * 1024, "n"),
        (wire.CreateSession, "project_id", "n" * 1024, "n"),
        (wire.AssignProject, "project_id", "n" * 1024, "n"),
        (wire.CopyWeights, "destination_project_id", "n" * 1024, "n"),
        (wire.FinishSession, "detail", "n" * 2**16, "n"),
        *(
            (kind, "user_metadata", {"it": "n" * (2**16 - len('{"it":""}'))}, "n")
            for kind in (
                wire.CreateSession,
                wire.CreateModel,
                wire.SaveWeights,
                wire.SaveWeightsForSampler,
                wire.LoadWeights,
            )
        ),
    ],
)
def test_what_users_may_write_as_they_like_has_an_end(kind, field, longest, unit):
    """And the refusal says where."""
    needed = {
        "reason": {"type": "success"},
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "b",
        "model_id": "m",
        "path": "p",
        "source_path": "p",
    }
    assert getattr(as_request(kind, needed | {field: longest}), field) == longest
    match longest:
        case str():
            longer = [longest + unit]
        case list():
            longer = [[*longest, unit], [longest[0] + unit]]
        case _:
            longer = [{"it": longest["it"] + unit}]
    for given in longer:
        with pytest.raises(InvalidRequest, match=rf"{field}.*at most (100|256|1024|65536)"):
            as_request(kind, needed | {field: given})
