"""Adapters, names and how to sample."""

import re

import numpy as np
import pytest
import torch
from msgspec.structs import asdict, replace
from tinker import types
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model

from tests.api.test_datums import INFO
from tinkercloud.api.validate import (
    MAX_ANSWER_BYTES,
    SEEDS,
    check_name,
    lora_from,
    optimizer_from,
    optimizer_json,
    params_from,
    sample_from,
)
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.reading import as_request
from tinkercloud.codec import encode
from tinkercloud.engine.operations import AdamParams, DimuonParams, Matrix
from tinkercloud.errors import InvalidRequest


def test_an_adapter_is_made_as_asked():
    lora = lora_from(wire.Lora(rank=6, seed=-1, train_mlp=False), INFO)
    assert (lora.rank, lora.alpha, lora.seed, lora.train_mlp, lora.train_attn) == (6, 24.0, SEEDS - 1, False, True)
    drawn = {lora_from(wire.Lora(rank=6), INFO).seed for _ in range(3)}
    assert len(drawn) == 3, "a seed that was not given is drawn"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "lora_config is required"),
        (wire.Lora(rank=0), "lora_config.rank must be positive, not 0"),
        (wire.Lora(rank=-3), "lora_config.rank must be positive, not -3"),
        (wire.Lora(rank=17), "lora_config.rank 17 exceeds max LoRA rank 16 for model me/model"),
        (wire.Lora(rank=4, train_attn=False, train_mlp=False, train_unembed=False), "nothing to train"),
    ],
)
def test_a_wrong_adapter_is_refused(given, says):
    with pytest.raises(InvalidRequest, match=says):
        lora_from(given, INFO)


@pytest.mark.parametrize(
    ("given", "family"),
    [
        ({}, "adamw"),
        ({"type": "adamw"}, "adamw"),
        ({"type": "dimuon", "version": 1}, "dimuon"),
        ({"type": "dimuon"}, "dimuon"),
    ],
)
def test_an_optimizer_is_chosen_and_named_back(given, family):
    assert optimizer_from(as_request(wire.OptimizerConfig, given)) == family
    named = optimizer_json(family)
    kind = types.AdamOptimizerConfig if family == "adamw" else types.DimuonOptimizerConfig
    assert kind(**named).model_dump() == named


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "lion"}, "'lion' is not served; use one of adamw, dimuon"),
        ({"type": "dimuon", "version": 2}, "version 2 of dimuon is not served; use 1"),
        ({"type": "adamw", "version": 1}, "version 1 of adamw is not served; leave it out"),
        ({"type": "dimuon", "version": 1, "damping": 0.1}, "no option 'damping'"),
    ],
)
def test_an_optimizer_that_is_not_served(given, says):
    with pytest.raises(InvalidRequest, match=says):
        optimizer_from(as_request(wire.OptimizerConfig, given))


def step(**given) -> wire.OptimStep:
    return as_request(wire.OptimStep, {"model_id": "m", **given})


def test_a_steps_parameters_are_the_sdks():
    assert params_from(step(adam_params={}), "adamw") == AdamParams()
    assert params_from(step(optimizer_params={"type": "adamw", "beta1": 0.5}), "adamw") == AdamParams(beta1=0.5)
    sent = types.OptimStepRequest(model_id="m", optim_params=types.DimuonParams(learning_rate=0.5, grad_clip_norm=-1))
    params = params_from(step(**sent.model_dump(mode="json")), "dimuon")
    assert params == DimuonParams(0.5, beta1=0.9, grad_clip_norm=-1.0)


@pytest.mark.parametrize(
    ("given", "optimizer", "says"),
    [
        ({"adam_params": {}}, "dimuon", "these are adamw's parameters.*optimizer is dimuon.*send optimizer_params"),
        (
            {"optimizer_params": {"type": "dimuon", "learning_rate": 1}},
            "adamw",
            "these are dimuon's parameters.*optimizer is adamw.*send adam_params",
        ),
        ({}, "adamw", "adam_params is required"),
        ({}, "dimuon", "optimizer_params is required"),
        ({"optimizer_params": {"type": "dimuon"}}, "dimuon", "learning_rate: Field required"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": -1}}, "dimuon", "greater than or equal to 0"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": float("inf")}}, "dimuon", "finite|less than"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": float("nan")}}, "dimuon", "finite|greater"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1, "beta1": 1}}, "dimuon", "less than 1"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1, "damping": 0}}, "dimuon", "damping: Extra inputs"),
        ({"optimizer_params": {"type": "lion", "learning_rate": 1}}, "dimuon", "'adamw', 'dimuon'"),
        ({"optimizer_params": {"learning_rate": 1}}, "dimuon", "type"),
    ],
)
def test_a_steps_parameters_that_are_wrong(given, optimizer, says):
    with pytest.raises(InvalidRequest, match=says):
        params_from(step(**given), optimizer)


@pytest.mark.parametrize("name", ["a", "000010", "step-1.5_final", "a=b+c@d,e", "x" * 128, None])
def test_good_names(name):
    check_name(name, None)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", "../a", "a/b", "/a", "a\\b", "a b", "a\n", "ä", "x" * 129, "-a", "a\0"]
)
def test_bad_names(name):
    with pytest.raises(InvalidRequest, match="cannot be a checkpoint's name"):
        check_name(name, None)


def test_time_to_live():
    for seconds in (None, 3600, 10 * 365 * 86400):
        check_name("a", seconds)
    for seconds in (0, -1, 3599, 10**10):
        with pytest.raises(InvalidRequest, match=f"ttl_seconds {seconds} is out of range"):
            check_name("a", seconds)


def sample(prompt=(1, 2), info=INFO, **given):
    params = wire.SamplingParams(
        **{name: given.pop(name) for name in [*given] if name in wire.SamplingParams.model_fields}
    )
    chunks = [wire.Chunk(tokens=list(prompt))]
    return sample_from(wire.Sample(prompt=wire.ModelInput(chunks=chunks), sampling_params=params, **given), "s", info)


def targets(**given) -> wire.TensorData:
    """For a prompt of two tokens."""
    return wire.TensorData(**{"data": [3, 4], "dtype": "int64", "shape": [1, 2], **given})


def csr(shape, crow, col) -> wire.TensorData:
    return targets(shape=shape, sparse_crow_indices=crow, sparse_col_indices=col)


def test_targets_keep_their_layout():
    """As the SDK sends them."""
    ids = torch.full((3, 9), -1)
    ids[1, 4], ids[2, 0], ids[2, 8] = 7, 0, 99
    prompt = (1, 2, 3, 4)
    for tensor in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        read = as_request(wire.TensorData, _tensor_data_to_model(tensor).model_dump(mode="json"))
        asked = sample(prompt, target_prompt_logprobs=read).target_prompt_logprobs
        assert asked.shape == (3, 9) and asked.values.dtype == np.int64
        assert asked.values.tolist() == (ids.ravel().tolist() if asked.row_ends is None else [7, 0, 99])
        if asked.row_ends is not None:
            assert (asked.row_ends.tolist(), asked.columns.tolist()) == ([0, 0, 1, 3], [4, 0, 8])
    assert asked.row_ends is not None, "the second one is sparse"


def test_the_options_of_a_prompt():
    operation = sample((1, 2, 3), prompt_alt_tokens_k=4, prompt_logprobs=True, prompt_logprobs_last_n=2)
    assert (operation.prompt_alt_tokens_k, operation.prompt_logprobs_last_n) == (4, 2)
    plain = sample((1, 2, 3))
    assert (plain.prompt_alt_tokens_k, plain.prompt_logprobs_last_n, plain.target_prompt_logprobs) == (0, None, None)


def test_defaults_of_sampling():
    operation = sample()
    assert operation.prompt.tolist() == [1, 2] and operation.prompt.dtype == np.int32
    assert operation.params.max_tokens == 6, "what the context leaves"
    assert operation.params.stop_tokens == (2, 3), "the model's end of sequence"
    assert (operation.params.temperature, operation.params.top_k, operation.params.top_p) == (1.0, -1, 1.0)
    assert sample().params.seed != sample().params.seed


FIELDS = {
    "num_samples": (3, {"num_samples": 3}),
    "prompt": (
        types.ModelInput.from_ints([4, 5, 6]),
        {"prompt": np.array([4, 5, 6], np.int32), "params.max_tokens": 5},
    ),
    "sampling_params": (types.SamplingParams(seed=1, max_tokens=2), {"params.max_tokens": 2}),
    "prompt_logprobs": (True, {"prompt_logprobs": True}),
    "topk_prompt_logprobs": (3, {"topk_prompt_logprobs": 3}),
    "topk_sample_logprobs": (3, {"topk_sample_logprobs": 3}),
    "target_prompt_logprobs": (
        _tensor_data_to_model(types.TensorData(data=[7], dtype="int64", shape=[1, 1])),
        {"target_prompt_logprobs": Matrix(np.array([7]), (1, 1))},
    ),
    "prompt_alt_tokens_k": (3, {"prompt_alt_tokens_k": 3}),
    "record_stability_info": (True, {"record_stability_info": True}),
}
"""A value of each field of the SDK's SampleRequest, and what of the operation it changes."""

PARAMS = {
    "max_tokens": (3, {"params.max_tokens": 3}),
    "seed": (9, {"params.seed": 9}),
    "stop": ([5], {"params.stop_tokens": (5,)}),
    "temperature": (0.5, {"params.temperature": 0.5}),
    "top_k": (4, {"params.top_k": 4}),
    "top_p": (0.5, {"params.top_p": 0.5}),
}
"""Likewise of its SamplingParams."""

ADDRESSES = {"base_model", "model_path", "sampling_session_id", "seq_id", "type"}
"""What says where a sample is from; see test_routes.py."""


def parts_of(operation) -> dict[str, object]:
    params = {f"params.{name}": value for name, value in asdict(operation.params).items()}
    return {**asdict(operation), **params, "params": None}


def test_each_field_of_the_sdks_request_reaches_the_engine_and_changes_what_it_says():
    assert types.SampleRequest.model_fields.keys() - FIELDS.keys() - ADDRESSES == {"prompt_logprobs_last_n"}
    assert types.SamplingParams.model_fields.keys() == PARAMS.keys()
    plain = {"prompt": types.ModelInput.from_ints([1, 2]), "sampling_params": types.SamplingParams(seed=1)}
    both = {"prompt_logprobs": True, "prompt_logprobs_last_n": 1}
    cases = [(both, both)]
    cases += [({name: value}, changes) for name, (value, changes) in FIELDS.items()]
    cases += [
        ({"sampling_params": types.SamplingParams(**{"seed": 1, name: value})}, changes)
        for name, (value, changes) in PARAMS.items()
    ]

    def read(**fields) -> dict[str, object]:
        body = types.SampleRequest(**plain | fields).model_dump(mode="json", exclude_none=True)
        return parts_of(sample_from(as_request(wire.Sample, body), "s", INFO))

    usual = read()
    for given, changes in cases:
        changed = {name: value for name, value in read(**given).items() if encode(value) != encode(usual[name])}
        assert encode(changed) == encode({name: changes[name] for name in changed}), given
        assert changed.keys() == changes.keys(), given


def test_stops():
    assert sample(stop=[]).params.stop_tokens == () == sample(stop=[]).params.stop_strings
    assert sample(stop="x").params.stop_strings == ("x",)
    assert sample(stop="é" * 512).params.stop_strings == ("é" * 512,)
    assert sample(stop=["x", "y"]).params.stop_strings == ("x", "y")
    assert sample(stop=["x", "y"]).params.stop_tokens == ()
    assert sample(stop=[5, 6]).params.stop_tokens == (5, 6)


def test_values_at_their_edges():
    assert sample(temperature=0.0).params.temperature == 0.0, "greedy is not 'no temperature'"
    assert sample(top_k=1).params.top_k == 1
    assert sample(top_k=10**12).params.top_k == -1
    assert [sample(seed=seed).params.seed for seed in (0, SEEDS, SEEDS + 1, -1)] == [0, 0, 1, SEEDS - 1]
    assert sample(max_tokens=6).params.max_tokens == 6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (1, 100)}, "prompt: token id 100 is outside me/model's vocabulary, 0 to 99"),
        ({"prompt": (-1,)}, "prompt: token id -1"),
        ({"prompt": (1,) * 8}, "prompt has 8 tokens"),
        ({"max_tokens": 7}, r"Prompt length plus max_tokens exceeds the model's context window: 2 \+ 7 > 8"),
        ({"max_tokens": 0}, "max_tokens must be positive, not 0"),
        ({"max_tokens": -1}, "max_tokens must be positive"),
        ({"num_samples": 0}, "num_samples must be 1 to 1024, not 0"),
        ({"num_samples": 1025}, "num_samples must be 1 to 1024"),
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be positive, or -1"),
        ({"top_k": -2}, "top_k must be positive, or -1"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs must be 0 to 100"),
        ({"topk_sample_logprobs": 101}, "topk_sample_logprobs must be 0 to 100"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"stop": ["a", 1]}, "stop mixes texts and token ids"),
        ({"stop": [100]}, "stop: token id 100 is outside"),
        ({"stop": [2**70]}, "stop: "),
        ({"stop": "é" * 513}, "stop has a text of 1026 bytes in UTF-8; at most 1024"),
        ({"stop": ["x"] * 65}, "stop has 65 entries"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k must be 0 to 256, not -1"),
        ({"prompt_alt_tokens_k": 257}, "prompt_alt_tokens_k must be 0 to 256"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n .* set prompt_logprobs too"),
        (
            {"prompt_logprobs_last_n": 0, "prompt_logprobs": True},
            "prompt_logprobs_last_n is 0; of a prompt of 2 tokens the last 1 to 1",
        ),
        ({"prompt_logprobs_last_n": 2, "prompt_logprobs": True}, "prompt_logprobs_last_n is 2; of a prompt of 2"),
        ({"target_prompt_logprobs": targets(dtype="float32")}, "target_prompt_logprobs must be int64, not float32"),
        ({"target_prompt_logprobs": targets(shape=None)}, "must have two dimensions, not the shape .2."),
        ({"target_prompt_logprobs": targets(shape=[2])}, "must have two dimensions"),
        ({"target_prompt_logprobs": targets(shape=[1, 3])}, r"shape \[1, 3\] does not fit its 2 values"),
        ({"target_prompt_logprobs": targets(shape=[2, 1])}, r"must have the shape \[1, K\], .* not \[2, 1\]"),
        ({"target_prompt_logprobs": targets(data=[], shape=[1, 0])}, r"must have the shape \[1, K\]"),
        ({"target_prompt_logprobs": targets(data=[-1, -1])}, "names no token id, only -1"),
        ({"target_prompt_logprobs": targets(data=[1, -2])}, "0 to 99 .or -1, where none is named"),
        ({"target_prompt_logprobs": targets(data=[1, 100])}, "target_prompt_logprobs: token id 100 is outside"),
        ({"target_prompt_logprobs": targets(data=[1, 0.5])}, "a flat list of integers"),
        ({"target_prompt_logprobs": targets(data=[1, 2**70])}, "a flat list of integers"),
        ({"target_prompt_logprobs": csr([1, 10**30], [0, 2], [0, 1])}, r"must have the shape \[1, K\]"),
        ({"target_prompt_logprobs": csr([1, 9], [0, 1], [0, 1])}, "sparse_crow_indices must be 2 ascending numbers"),
        ({"target_prompt_logprobs": csr([1, 9], [0, 2], [1, 1])}, "must ascend, each once"),
        ({"target_prompt_logprobs": csr([1, 9], [0, 2], None)}, "sparse_col_indices must be 2 columns"),
        ({"target_prompt_logprobs": targets(data=[1] * (2**22 + 1))}, "has 4194305 cells; at most 4194304"),
    ],
)
def test_wrong_sampling_is_refused(given, says):
    with pytest.raises(InvalidRequest, match=says):
        sample(**given)


CHAT = replace(INFO, max_context=131072, vocab_size=100_000)


def answered(context: int, **given) -> int:
    """Most bytes of the answer to a request that is accepted, of a model with so much context."""
    return sample(info=replace(CHAT, max_context=context), **given).most_answer_bytes


def test_what_people_ask_for_is_not_too_large():
    assert answered(32768, num_samples=1024, max_tokens=8192) < MAX_ANSWER_BYTES // 3
    assert answered(32768, num_samples=16, max_tokens=4096, topk_sample_logprobs=20) < MAX_ANSWER_BYTES // 8
    assert answered(32768, num_samples=16, topk_sample_logprobs=20) < MAX_ANSWER_BYTES // 2
    assert answered(131072, num_samples=256) < MAX_ANSWER_BYTES
    assert answered(131072, prompt=(1,) * 131071, prompt_logprobs=True, topk_prompt_logprobs=128) < MAX_ANSWER_BYTES


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ({"num_samples": 1024}, ["num_samples", "max_tokens"]),
        (
            {"num_samples": 512, "max_tokens": 3000, "topk_sample_logprobs": 256},
            ["num_samples", "max_tokens", "topk_sample_logprobs"],
        ),
        (
            {"prompt": (1,) * 99_999, "topk_prompt_logprobs": 200, "prompt_alt_tokens_k": 200, "max_tokens": 1},
            ["topk_prompt_logprobs", "prompt_alt_tokens_k"],
        ),
        ({"prompt": (1,) * 70_000, "topk_prompt_logprobs": 256, "prompt_alt_tokens_k": 256, "num_samples": 900}, []),
    ],
)
def test_an_answer_that_may_be_too_large_is_refused_with_what_to_lower(given, ways):
    with pytest.raises(InvalidRequest, match=r"the answer may take .* several requests that ask for less") as refused:
        sample(info=CHAT, **given)
    said = dict(re.findall(r"(\w+) to (\d+)", str(refused.value)))
    assert list(said) == ways
    for name, most in said.items():
        assert sample(info=CHAT, **given | {name: int(most)}).most_answer_bytes <= MAX_ANSWER_BYTES
        with pytest.raises(InvalidRequest, match="the answer may take"):
            sample(info=CHAT, **given | {name: int(most) + 1})


def test_other_than_text_is_refused_by_name():
    image = wire.Sample(prompt=wire.ModelInput(chunks=[wire.Chunk(type="image", data="")]))
    with pytest.raises(InvalidRequest, match="prompt has a chunk of image; this server takes text only"):
        sample_from(image, "s", INFO)
