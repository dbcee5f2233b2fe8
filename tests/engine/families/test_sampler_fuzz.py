"""Random samples, from their JSON through the engine to what the SDK reads: whatever they ask for, however they are
mixed and cancelled, each is refused in words or answered, the engine goes on, and no page and no state stays taken, nor
is anything kept of samplers that are closed. What is drawn is what is drawn alone, to the bit, but where weights change
meanwhile."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import event, example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from tinker import types
from tinker.lib.public_interfaces import sampling_client as sdk
from tinker.proto.response_conv import deserialize_proto_response
from transformers import PreTrainedTokenizerFast

from tests.engine.examples import VOCAB, shaken
from tests.engine.examples import run as train
from tests.engine.sampler_requests import prompt_of, run, sample, tokens_of
from tests.fuzzing import SCALE, fuzzing
from tinkercloud.api.validate import sample_from
from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.protobuf import encode_sample
from tinkercloud.api.wire.reading import as_request, json_object
from tinkercloud.api.wire.results import as_json
from tinkercloud.codec import decode, encode
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CancelSample, CloseSampler, Matrix, OpenSampler, Sample, SaveWeights
from tinkercloud.engine.results import Done, Failure, Result, SampleOutput
from tinkercloud.engine.torch.batching import PREFILL_CHUNK
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer
from tinkercloud.errors import InvalidRequest

EXAMPLES = {"qwen3": 9, "qwen3_5": 3, "deepseek_v3": 3}
"""Scenarios of each family: pages of keys and values, states beside them, latent attention."""
CONTEXT = 576
"""Of all, so that prompts are prefilled in up to three steps."""
COMPARED = 2 if SCALE == 1 else None
"""Requests of a scenario that are drawn alone too; None is all."""
SAMPLERS = ("base", "adapter", "inflight")
SETTINGS = [
    {"kv_cache_bytes": 2**17},
    {"kv_cache_bytes": 2**20, "logits_bytes": 1},
    {"kv_cache_bytes": 2**17, "max_decode_batch": 3},
]
"""Pages for one context; logits row by row; few sequences at a time."""


@pytest.fixture(scope="module", params=EXAMPLES)
def model(request, model_folder, tmp_path_factory) -> BaseModel:
    """With a tokenizer of one printable character per id, but for the last two."""
    folder = tmp_path_factory.mktemp("fuzzed") / request.param
    shutil.copytree(model_folder(request.param), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    vocab = {chr(33 + index): index for index in range(VOCAB - 2)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    fast.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(folder)
    return BaseModel.load(EngineOptions(name=request.param, source=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[str]:
    """Folders of two."""
    trainer = TorchTrainer(model, EngineOptions(name=model.info.name, source=""))
    folders: list[Path] = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for folder, rank in zip(folders, (4, 8), strict=True):
        train(trainer, *shaken(folder.name, rank), SaveWeights(folder.name, str(folder)))
    return [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def sampler_with(model, adapters):
    """**options -> a sampler of the model with all of `SAMPLERS` open."""

    def make(**options: int) -> TorchSampler:
        sampler = TorchSampler(model, EngineOptions(name=model.info.name, source=model.info.folder, **options))
        for opened in (OpenSampler("base"), OpenSampler("adapter", adapters[0]), inflight(adapters[0])):
            assert sampler.open(opened) == Done()
        return sampler

    return make


def inflight(folder: str) -> OpenSampler:
    """The weights that the inflight sampler has from now on."""
    return OpenSampler("inflight", folder, "run")


def rarely() -> st.SearchStrategy[bool]:
    """One time in forty. Not for 0: Hypothesis is fond of that."""
    return st.integers(0, 39).map(lambda number: number == 23)


def usually(good: st.SearchStrategy, *strange: object) -> st.SearchStrategy:
    """A good value, and rarely another."""
    return rarely().flatmap(lambda is_strange: st.sampled_from(strange) if is_strange else good)


HUGE = (2**31, 2**63, -(2**70), 10**400)
NO_NUMBER = ("x", None, [], {}, 1.5)
STOPS = st.one_of(
    st.none(),
    st.just([]),
    st.text("!abc~é🎉", min_size=1, max_size=3),
    st.lists(st.text("!abc~", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
)


@st.composite
def params(draw) -> dict[str, object]:
    given = {
        "max_tokens": usually(st.integers(1, 60), None, 0, -1, CONTEXT, *HUGE),
        "temperature": usually(st.sampled_from([0, 1]) | st.floats(0, 3), -1, 1e-320, 1e30, 1e300, *HUGE, *NO_NUMBER),
        "top_k": usually(st.integers(1, VOCAB) | st.just(-1), 0, -2, *HUGE, *NO_NUMBER),
        "top_p": usually(st.floats(0.01, 1), 0, -1, 1.01, 1e-300, *HUGE, *NO_NUMBER),
        "seed": usually(st.integers(-(2**64), 2**64) | st.none(), *HUGE, "x", []),
        "stop": usually(STOPS, "", [""], ["a", 1], [VOCAB], [-1], ["a"] * 65, 7, {}, [None], "\ud800"),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(given))))
    return {name: draw(given[name]) for name in sorted(chosen)}


@st.composite
def tensors(draw, rows: int) -> dict[str, object]:
    """A `target_prompt_logprobs` for so many rows, dense or sparse, sometimes with a part that is wrong."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    columns = draw(st.integers(1, 5))
    ids = random.integers(-1, VOCAB, (rows, columns))
    tensor: dict[str, object] = {"data": ids.ravel().tolist(), "dtype": "int64", "shape": [rows, columns]}
    if draw(st.booleans()):
        listed = random.random(ids.shape) < draw(st.floats(0.1, 1))
        places = np.nonzero(listed)
        tensor["data"] = ids[places].tolist()
        tensor["shape"] = [rows, columns + draw(st.sampled_from([0, 7, 10**6]))]
        tensor["sparse_crow_indices"] = [0, *listed.sum(1).cumsum().tolist()]
        tensor["sparse_col_indices"] = places[1].tolist()
    if draw(rarely()):
        part = draw(st.sampled_from(sorted(tensor)))
        tensor[part] = draw(st.sampled_from([None, [], [1], [0, 1], [-1, 2], [VOCAB], [1.5], "float32", 3, [2**64]]))
    return tensor


@st.composite
def bodies(draw) -> dict[str, object]:
    """The JSON of an asample."""
    edges = (PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 1, CONTEXT - 1, CONTEXT)
    length = draw(usually(st.integers(1, 60) | st.integers(1, CONTEXT - 40), 0, *edges))
    prompt = prompt_of(draw(st.integers(0, 1) | st.integers(0, 2**16)), length).tolist()  # many begin alike
    if length and draw(rarely()):
        prompt[draw(st.integers(0, length - 1))] = draw(st.sampled_from([VOCAB, -1, 2**40, None, 1.5, "x"]))
    cut = draw(st.integers(0, length))
    body: dict[str, object] = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": part} for part in (prompt[:cut], prompt[cut:])]},
        "sampling_params": {"max_tokens": draw(st.integers(1, 40))} | draw(params()),
    }
    given = {
        "num_samples": usually(st.integers(1, 8), 0, -1, 1025, *HUGE, *NO_NUMBER),
        "prompt_logprobs": usually(st.booleans(), None, 2, "x"),
        "topk_prompt_logprobs": usually(st.integers(0, 5), VOCAB, VOCAB + 1, -1, *HUGE, *NO_NUMBER),
        "topk_sample_logprobs": usually(st.integers(0, 5), VOCAB, VOCAB + 1, -1, *HUGE, *NO_NUMBER),
        "prompt_alt_tokens_k": usually(st.integers(0, 5), 256, 257, -1, *HUGE, *NO_NUMBER),
        "prompt_logprobs_last_n": usually(st.integers(1, max(1, length - 1)), None, 0, -1, length, *HUGE, "x"),
        "target_prompt_logprobs": usually(tensors(max(0, length - 1)), None, tensors(length), [], "x", {}),
        "record_stability_info": usually(st.booleans(), None),
        "temperature": st.just(0.5),  # in the wrong place
    }
    for name in sorted(draw(st.sets(st.sampled_from(sorted(given))))):
        if name != "temperature" or draw(rarely()):
            value = draw(given[name])
            body[name] = draw(value) if isinstance(value, st.SearchStrategy) else value
    if "prompt_logprobs_last_n" in body and not draw(rarely()):
        body["prompt_logprobs"] = True
    return body


SAMPLES = st.tuples(
    st.just("sample"), bodies(), st.sampled_from(SAMPLERS), st.booleans(), st.sampled_from(["one", "other"])
)
OTHERS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("close"), st.sampled_from(SAMPLERS[1:])),
    st.tuples(st.just("save"), st.integers(0, 1)),
)
ACTIONS = st.lists(st.tuples(SAMPLES, st.lists(OTHERS, max_size=2)), min_size=2, max_size=6).map(
    lambda turns: [action for sampled, others in turns for action in (sampled, *others)]
)


CROWD = [
    (
        "sample",
        {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt_of(number, length).tolist()}]},
            "sampling_params": {"max_tokens": 40, "seed": number, "stop": []},
            "num_samples": 2,
        },
        SAMPLERS[number % 3],
        False,
        "one",
    )
    for number, length in enumerate([90, 300, 95, 100, 105])
]
"""More than pages for one context have room for, and a prompt that is prefilled in parts."""


def read_by_the_sdk(request: Sample, output: SampleOutput) -> None:
    """Both forms of an answer, and that it has what was asked for, in its shape."""
    as_json(output)
    read = deserialize_proto_response(encode_sample(decode(encode(output), SampleOutput)), types.SampleResponse)
    n, params = len(request.prompt), request.params
    assert len(read.sequences) == request.num_samples
    for sequence in read.sequences:
        assert 1 <= len(sequence.tokens) <= params.max_tokens and len(sequence.logprobs) == len(sequence.tokens)
        assert all(0 <= token < VOCAB for token in sequence.tokens)
        assert np.isfinite(sequence.logprobs_np).all() and (sequence.logprobs_np < 1e-5).all()
        assert sequence.stop_reason == "stop" or len(sequence.tokens) == params.max_tokens
        assert params.stop_strings or not set(sequence.tokens[:-1]) & set(params.stop_tokens)
        if request.topk_sample_logprobs:
            assert sequence.topk_logprobs_np.logprobs.shape == (len(sequence.tokens), request.topk_sample_logprobs)
    if request.prompt_logprobs:
        scored = request.prompt_logprobs_last_n or n - 1
        assert np.isfinite(read.prompt_logprobs_np).tolist() == [False] * (n - scored) + [True] * scored
    if request.topk_prompt_logprobs:
        assert read.topk_prompt_logprobs_np.token_ids.shape == (n, request.topk_prompt_logprobs)
    if request.target_prompt_logprobs is not None:
        assert read.target_prompt_logprobs.shape == list(request.target_prompt_logprobs.shape)
        assert (np.array(read.target_prompt_logprobs.data)[request.target_prompt_logprobs.values < 0] == 0).all()
    if request.prompt_alt_tokens_k:
        assert read.prompt_alt_tokens.tokens.shape == [n - 1, request.prompt_alt_tokens_k]
    sdk._check_prompt_alt_tokens_returned(read, request.prompt_alt_tokens_k)
    sdk._check_prompt_logprobs_last_n_honored(read, request.prompt_logprobs_last_n)


class Scenario:
    """An engine, what was asked of it, and what it has answered."""

    def __init__(self, sampler: TorchSampler, adapters: list[str]) -> None:
        self.sampler = sampler
        self._adapters = adapters
        self.asked: dict[str, Sample] = {}
        self.answered: dict[str, Result] = {}
        self.may_fail: set[str] = set()
        """Cancelled, or behind the end of their sampler."""
        self.closed: set[str] = set()

    def sample(self, body: dict[str, object], sampler_id: str, raw: bool, tenant: str) -> None:
        try:
            given = as_request(wire.Sample, json_object(json.dumps(body).encode()))
            operation = sample_from(given, sampler_id, self.sampler.info, raw)
        except InvalidRequest as error:
            assert str(error)
            event("refused")
            return
        self.submit(replace(operation, tenant=tenant))

    def submit(self, operation: Sample) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = decode(encode(replace(operation, request_id=name)), Sample)
        if operation.sampler_id in self.closed:
            self.may_fail.add(name)
        self.sampler.submit(self.asked[name])

    def step(self, count: int) -> None:
        for _ in range(count):
            for name, result in self.sampler.step():
                assert name not in self.answered
                self.answered[name] = result

    def cancel(self, number: int) -> None:
        name = f"r{number}"
        if name in self.asked:
            self.may_fail.add(name)
        assert self.sampler.cancel(CancelSample(name)) == Done()

    def close(self, name: str) -> None:
        self.closed.add(name)
        assert self.sampler.close(CloseSampler(name)) == Done()

    def save(self, number: int) -> None:
        """The inflight sampler's weights change, or come back."""
        self.closed.discard("inflight")
        assert self.sampler.open(inflight(self._adapters[number])) == Done()

    def ends(self) -> None:
        """Everybody is answered, nothing stays taken, and the engine samples on."""
        for _ in range(20_000):
            if not self.sampler.busy:
                break
            self.step(1)
        assert self.answered.keys() == self.asked.keys()
        assert (self.sampler.pages_used, self.sampler.states_used, self.sampler.num_running) == (0, 0, 0)
        plain = sample("plain", prompt_of(0, 9))
        assert tokens_of(run(self.sampler, plain)) == tokens_of(run(self.sampler, plain))
        for name in SAMPLERS:
            self.close(name)
        sampler = self.sampler
        assert (sampler.pages_used, sampler.states_used, sampler.pages_kept) == (0, 0, 0)


def test_random_requests(model, sampler_with, adapters):
    others, seen = sampler_with(), Counter()

    @fuzzing(EXAMPLES[model.info.name])
    @given(st.sampled_from(SETTINGS), ACTIONS)
    @example(SETTINGS[0], CROWD)
    def play(options, actions):
        scenario = Scenario(sampler_with(**options), adapters)
        for action, *arguments in actions:
            getattr(scenario, action)(*arguments)
        scenario.ends()
        seen["cut"] += sum(len(request.prompt) > PREFILL_CHUNK for request in scenario.asked.values())
        seen["interrupted"] += scenario.sampler.preemptions
        for name, result in scenario.answered.items():
            if isinstance(result, Failure):
                assert name in scenario.may_fail and result.category == "user", result.error
            else:
                read_by_the_sdk(scenario.asked[name], result)
        drawn = [name for name, result in scenario.answered.items() if isinstance(result, SampleOutput)]
        for name in [name for name in drawn if scenario.asked[name].sampler_id != "inflight"][:COMPARED]:
            (alone,) = run(others, scenario.asked[name]).values()
            for one, other in zip(scenario.answered[name].sequences, alone.sequences, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_array_equal(one.logprobs, other.logprobs)

    play()
    assert seen["cut"] > 0 < seen["interrupted"]


WRONG = [
    {"prompt": np.array([], np.int32)},
    {"prompt": np.array([[1, 2]], np.int32)},
    {"prompt": np.array([VOCAB], np.int32)},
    {"prompt": np.array([-1, 1], np.int32)},
    {"prompt": np.zeros(CONTEXT + 1, np.int32)},
    {"sampler_id": "none"},
    {"num_samples": 0},
    {"topk_prompt_logprobs": -1},
    {"topk_sample_logprobs": VOCAB + 1},
    {"prompt_alt_tokens_k": -1},
    {"prompt_logprobs_last_n": 10**6},
    {"target_prompt_logprobs": Matrix(np.array([1]), (10**6, 1))},
    {"target_prompt_logprobs": Matrix(np.array([1]), (0, 1), np.array([0, 9]), np.array([0]))},
]
WRONG_PARAMS = [
    {"max_tokens": 0},
    {"max_tokens": 10**6},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_k": 0},
    {"top_p": float("nan")},
    {"seed": -1},
    {"stop_strings": ("",)},
]


def test_what_no_api_has_checked(sampler_with, adapters):
    """Operations with a part that the API would have refused, among good ones: a failure of its own for each."""
    good = st.builds(sample, st.just(""), st.integers(1, 60).map(lambda length: prompt_of(length, length)))
    wrong = st.builds(replace, good).flatmap(
        lambda one: st.sampled_from(
            [replace(one, **change) for change in WRONG]
            + [replace(one, params=replace(one.params, **change)) for change in WRONG_PARAMS]
        )
    )

    @fuzzing(4)
    @given(st.sampled_from(SETTINGS), st.lists(st.tuples(st.booleans(), good, wrong), max_size=6))
    def play(options, operations):
        scenario = Scenario(sampler_with(**options), adapters)
        for is_good, one, other in operations:
            scenario.submit(one if is_good else other)
            scenario.step(1)
        scenario.ends()
        for number, (is_good, _, _) in enumerate(operations):
            result = scenario.answered[f"r{number}"]
            assert isinstance(result, SampleOutput) if is_good else result.category == "user"

    play()
