"""The sampler, judged by transformers' own forward and generate, and by peft for adapters."""

from __future__ import annotations

import re
import shutil

import numpy as np
import peft
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tinkercloud.engine.torch import batching
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.types import (
    CancelSample,
    CloseSampler,
    Done,
    EngineOptions,
    Failure,
    OpenSampler,
    Sample,
    SampleOutput,
    SamplingParams,
)

VOCAB = 96


@pytest.fixture(scope="module")
def reference(model_folder):
    """family, adapter folder or "" -> plain transformers (+ peft) model."""
    models = {}

    def model_of(family: str, adapter: str = ""):
        if (family, adapter) not in models:
            model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).eval()
            models[family, adapter] = peft.PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        return models[family, adapter]

    return model_of


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    """(family, number) -> folder of a random adapter that peft saved."""
    folders = {}

    def folder_of(family: str, number: int = 0) -> str:
        if (family, number) not in folders:
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
            config = peft.LoraConfig(
                r=4 + 4 * number, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
            )
            adapted = peft.get_peft_model(model, config)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            folder = tmp_path_factory.mktemp("adapters") / f"{family}-{number}"
            adapted.save_pretrained(folder)
            folders[family, number] = str(folder)
        return folders[family, number]

    return folder_of


@pytest.fixture
def sampler_of(base_model):
    """family, options -> a fresh sampler with the base model open as "base"; afterwards it must hold no page."""
    samplers = []

    def make(family: str, **options) -> TorchSampler:
        model = base_model(family)
        sampler = TorchSampler(model, EngineOptions(name=family, source=model.info.folder, **options))
        assert sampler.open(OpenSampler("base")) == Done()
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        assert not sampler.busy
        assert sampler.pages_used == 0


@pytest.fixture
def small_chunks(monkeypatch):
    """Prefill in chunks that the tests' prompts are longer than."""
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(batching, "PREFILL_BUDGET", 40)


def prompt_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def sample(request_id: str, prompt: np.ndarray, sampler_id: str = "base", **options) -> Sample:
    ours = {name: options.pop(name) for name in list(options) if name not in SamplingParams.__struct_fields__}
    params = SamplingParams(**{"max_tokens": 12, "seed": 0, **options})
    return Sample(request_id, sampler_id, prompt, params, **ours)


def run(sampler: TorchSampler, *requests: Sample) -> dict[str, SampleOutput]:
    for request in requests:
        sampler.submit(request)
    results = {}
    while sampler.busy:
        results.update(sampler.step())
    return results


def full_logits(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]


def assert_logprobs(model, request: Sample, output: SampleOutput) -> None:
    """Each sampled logprob is the full forward's at the request's temperature."""
    temperature = request.params.temperature or 1.0
    n = len(request.prompt)
    for sequence in output.sequences:
        tokens = np.concatenate([request.prompt, sequence.tokens])
        expected = torch.log_softmax(full_logits(model, tokens)[n - 1 : -1] / temperature, -1)
        chosen = expected.gather(-1, torch.from_numpy(sequence.tokens.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(sequence.logprobs, chosen, atol=1e-5)


# ---------------------------------------------------------------- against transformers and peft


def test_greedy_is_generate_for_ragged_requests_of_base_and_adapters(family, sampler_of, reference, adapter_folder):
    sampler = sampler_of(family)
    adapters = {"base": "", "one": adapter_folder(family, 0), "two": adapter_folder(family, 1)}
    for name in ("one", "two"):
        assert sampler.open(OpenSampler(name, adapters[name])) == Done()
    requests = [
        sample(f"{name}-{length}", prompt_of(length, length), name, temperature=0, max_tokens=20)
        for length in (1, 3, 16, 17, 40)
        for name in adapters
    ]
    results = run(sampler, *requests)
    told_apart = set()
    for request in requests:
        model = reference(family, adapters[request.sampler_id])
        expected = model.generate(
            input_ids=torch.from_numpy(request.prompt.astype(np.int64))[None],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(request.prompt) :]
        (sequence,) = results[request.request_id].sequences
        assert sequence.tokens.tolist() == expected.tolist()
        assert sequence.stop_reason == "length"
        assert_logprobs(model, request, results[request.request_id])
        told_apart.add(tuple(sequence.tokens.tolist()))
    assert len(told_apart) == len(requests)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_sampled_logprobs(family, temperature, sampler_of, reference, adapter_folder):
    sampler = sampler_of(family)
    sampler.open(OpenSampler("adapter", adapter_folder(family)))
    requests = [
        sample(f"{name}{n}", prompt_of(n, n), name, temperature=temperature, top_k=5, top_p=0.9, seed=n, max_tokens=30)
        for n in (2, 21)
        for name in ("base", "adapter")
    ]
    results = run(sampler, *requests)
    for request in requests:
        adapter = adapter_folder(family) if request.sampler_id == "adapter" else ""
        assert_logprobs(reference(family, adapter), request, results[request.request_id])


def test_top_logprobs_of_samples(sampler_of, reference):
    request = sample("r", prompt_of(1, 9), temperature=0.7, topk_sample_logprobs=4)
    other = sample("other", prompt_of(2, 5), topk_sample_logprobs=7)
    results = run(sampler_of("qwen3"), request, other)
    (sequence,) = results["r"].sequences
    logits = full_logits(reference("qwen3"), np.concatenate([request.prompt, sequence.tokens]))[8:-1]
    values, ids = torch.log_softmax(logits / 0.7, -1).topk(4)
    np.testing.assert_array_equal(sequence.top_logprobs.token_ids, ids)
    np.testing.assert_allclose(sequence.top_logprobs.logprobs, values, atol=1e-5)
    assert results["other"].sequences[0].top_logprobs.logprobs.shape == (12, 7)


@pytest.mark.parametrize("logits_bytes", [1, 64 * 2**20])
def test_prompt_logprobs_are_the_raw_models(logits_bytes, small_chunks, sampler_of, reference, adapter_folder):
    """Also of a prompt that is prefilled in several steps, and in chunks of a single row of logits."""
    sampler = sampler_of("qwen3", logits_bytes=logits_bytes)
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    wanted = dict(prompt_logprobs=True, topk_prompt_logprobs=3, temperature=0.3, max_tokens=1)
    requests = [
        sample("base", prompt_of(3, 255), **wanted),
        sample("adapter", prompt_of(4, 20), "adapter", num_samples=3, **wanted),
        sample("short", prompt_of(5, 1), **wanted),
        sample("without", prompt_of(6, 7)),
    ]
    results = run(sampler, *requests)
    for request in requests[:3]:
        adapter = adapter_folder("qwen3") if request.sampler_id == "adapter" else ""
        expected = torch.log_softmax(full_logits(reference("qwen3", adapter), request.prompt), -1)[:-1]
        result = results[request.request_id]
        assert np.isnan(result.prompt_logprobs[0]) and result.prompt_logprobs.shape == request.prompt.shape
        chosen = expected.gather(-1, torch.from_numpy(request.prompt[1:].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(result.prompt_logprobs[1:], chosen, atol=1e-5)
        values, ids = expected.topk(3)
        np.testing.assert_array_equal(result.prompt_top_logprobs.token_ids[1:], ids)
        np.testing.assert_allclose(result.prompt_top_logprobs.logprobs[1:], values, atol=1e-5)
        assert (result.prompt_top_logprobs.logprobs[0] == -99999).all()
    assert results["without"].prompt_logprobs is None and results["without"].prompt_top_logprobs is None


# ---------------------------------------------------------------- who shares the batch changes nothing


def mixture(adapter: str = "adapter") -> list[Sample]:
    return [
        sample(
            f"r{i}",
            prompt_of(i, 1 + 7 * i),
            ("base", adapter)[i % 2],
            seed=i,
            temperature=(1.0, 0.0, 0.7)[i % 3],
            top_k=(-1, 4)[i % 2],
            top_p=(1.0, 0.8)[i // 2 % 2],
            max_tokens=5 + 4 * i,
            num_samples=1 + i % 3,
        )
        for i in range(9)
    ]


def tokens_of(results: dict[str, SampleOutput]) -> dict[str, list[list[int]]]:
    return {name: [sequence.tokens.tolist() for sequence in result.sequences] for name, result in results.items()}


def test_co_tenants_change_no_token(family, small_chunks, sampler_of, adapter_folder):
    sampler = sampler_of(family)
    sampler.open(OpenSampler("adapter", adapter_folder(family)))
    together = tokens_of(run(sampler, *mixture()))
    for request in mixture():
        assert tokens_of(run(sampler, request)) == {request.request_id: together[request.request_id]}


def test_samples_of_a_request_differ_and_come_again(sampler_of):
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(1, 30), num_samples=8, seed=5)
    first = tokens_of(run(sampler, request))["r"]
    assert len({tuple(tokens) for tokens in first}) == 8
    assert tokens_of(run(sampler, request))["r"] == first
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 30), num_samples=3, seed=5)))["r"] == first[:3]
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 30), num_samples=8, seed=6)))["r"] != first


def test_samples_are_spread_as_the_model_says(sampler_of, reference):
    """Chi-square of the first tokens of 1,000 samples, most of them wide apart in the queue."""
    request = sample("r", prompt_of(3, 20), num_samples=1000, max_tokens=1, temperature=0.8, top_k=6)
    tokens = [int(sequence.tokens[0]) for sequence in run(sampler_of("qwen3"), request)["r"].sequences]
    values, ids = (full_logits(reference("qwen3"), request.prompt)[-1] / 0.8).topk(6)
    expected = values.softmax(-1).numpy() * 1000
    observed = np.array([tokens.count(token) for token in ids.tolist()])
    assert observed.sum() == 1000
    assert ((observed - expected) ** 2 / expected).sum() < 30  # 5 degrees of freedom: p = 1.5e-5


def test_preemption_changes_no_token(sampler_of, adapter_folder):
    """With memory for a single context, running sequences are interrupted again and again."""
    roomy = sampler_of("llama")
    roomy.open(OpenSampler("adapter", adapter_folder("llama")))
    tight = sampler_of("llama", kv_cache_bytes=1)
    tight.open(OpenSampler("adapter", adapter_folder("llama")))
    requests = [
        sample(f"r{i}", prompt_of(i, 20 + i), ("base", "adapter")[i % 2], seed=i, max_tokens=60, num_samples=2)
        for i in range(8)
    ]
    results = run(tight, *requests)
    assert tokens_of(results) == tokens_of(run(roomy, *requests))
    assert tight.preemptions > 0 == roomy.preemptions


def test_prompt_logprobs_survive_preemption(sampler_of):
    wanted = [sample(f"r{i}", prompt_of(i, 100), max_tokens=100, prompt_logprobs=True, num_samples=2) for i in range(4)]
    tight_sampler = sampler_of("qwen3", kv_cache_bytes=1)
    roomy, tight = run(sampler_of("qwen3"), *wanted), run(tight_sampler, *wanted)
    assert tight_sampler.preemptions > 0
    for request in wanted:
        name = request.request_id
        np.testing.assert_allclose(tight[name].prompt_logprobs, roomy[name].prompt_logprobs, atol=1e-5)


def test_an_open_sampler_is_unmoved_by_its_folder(sampler_of, adapter_folder, tmp_path):
    """Weights are read when it is opened; what happens to the files later does not matter."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder("qwen3"), folder)
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", str(folder)))
    before = tokens_of(run(sampler, sample("r", prompt_of(1, 5), "adapter")))
    shutil.rmtree(folder)
    shutil.copytree(adapter_folder("qwen3", 1), folder)
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 5), "adapter"))) == before
    sampler.open(OpenSampler("new", str(folder)))
    assert tokens_of(run(sampler, sample("r", prompt_of(1, 5), "new"))) != before


# ---------------------------------------------------------------- joining, leaving, stopping


def test_short_requests_do_not_wait_for_a_long_one(sampler_of):
    sampler = sampler_of("qwen3")
    sampler.submit(sample("long", prompt_of(0, 8), max_tokens=100))
    for _ in range(10):
        assert sampler.step() == []
    for i in range(15):
        sampler.submit(sample(f"short{i}", prompt_of(i, 8), max_tokens=4 + i % 2))
    ended_at = {}
    for step in range(1, 200):
        for name, _ in sampler.step():
            ended_at[name] = step
        if not sampler.busy:
            break
    assert ended_at == {**{f"short{i}": 4 + i % 2 for i in range(15)}, "long": 90}


def test_a_long_prompt_does_not_stall_the_others(small_chunks, sampler_of):
    """200 tokens take 9 steps of 24, in each of which the running sequence gets its token."""
    sampler = sampler_of("qwen3")
    sampler.submit(sample("running", prompt_of(0, 8), max_tokens=20))
    sampler.step()
    sampler.submit(sample("long", prompt_of(1, 200), max_tokens=1))
    ended_at = {}
    for step in range(2, 40):
        for name, _ in sampler.step():
            ended_at[name] = step
    assert ended_at == {"running": 20, "long": 10}


def test_no_more_sequences_run_than_allowed(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=3)
    requests = [sample(f"r{i}", prompt_of(i, 20), num_samples=1 + i, max_tokens=4) for i in range(5)]
    for request in requests:
        sampler.submit(request)
    results, most = {}, 0
    while sampler.busy:
        results.update(sampler.step())
        most = max(most, sampler.num_running)
    assert most == 3
    assert tokens_of(results) == tokens_of(run(sampler_of("qwen3"), *requests))


def test_a_shared_prompt_takes_its_pages_once(sampler_of):
    sampler = sampler_of("qwen3")
    sampler.submit(sample("r", prompt_of(0, 100), num_samples=8, max_tokens=4))
    sampler.step()
    assert sampler.pages_used == 7
    sampler.step()
    assert sampler.pages_used == 6 + 8
    run(sampler)


def test_a_stop_token_is_kept_and_comes_before_length(sampler_of):
    sampler = sampler_of("qwen3")
    (free,) = run(sampler, sample("r", prompt_of(1, 5)))["r"].sequences
    assert free.stop_reason == "length" and len(free.tokens) == 12
    last = int(free.tokens[-1])
    first_at = free.tokens.tolist().index(last)
    (stopped,) = run(sampler, sample("r", prompt_of(1, 5), stop_tokens=(last,)))["r"].sequences
    assert stopped.stop_reason == "stop"
    assert stopped.tokens.tolist() == free.tokens.tolist()[: first_at + 1]
    assert len(stopped.logprobs) == len(stopped.tokens)


def test_without_stops_nothing_stops_it(sampler_of, base_model):
    """Not even the model's end-of-sequence token."""
    eos = base_model("qwen3").info.eos_tokens[0]
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(1, 2), max_tokens=200, num_samples=4, temperature=2.0)
    sequences = run(sampler, request)["r"].sequences
    assert any(eos in sequence.tokens[:-1] for sequence in sequences)
    assert all(len(sequence.tokens) == 200 and sequence.stop_reason == "length" for sequence in sequences)


def test_a_stop_string_ends_its_own_sequence(model_folder, tmp_path):
    """With a tokenizer of one printable character per id."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    vocab = {chr(33 + index): index for index in range(VOCAB - 2)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    fast.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(folder)
    options = EngineOptions(name="qwen3", source=str(folder), device="cpu")
    sampler = TorchSampler(BaseModel.load(options), options)
    sampler.open(OpenSampler("base"))
    free = run(sampler, sample("r", prompt_of(1, 5), num_samples=3, max_tokens=30))["r"].sequences
    text = "".join(chr(33 + token) for token in free[1].tokens)
    request = sample("r", prompt_of(1, 5), num_samples=3, max_tokens=30, stop_strings=(text[10:13],))
    stopped = run(sampler, request)["r"].sequences
    assert (stopped[1].stop_reason, len(stopped[1].tokens)) == ("stop", text.index(text[10:13]) + 3)
    assert [sequence.stop_reason for sequence in (stopped[0], stopped[2])] == ["length", "length"]
    for before, after in zip(free, stopped, strict=True):
        assert before.tokens.tolist()[: len(after.tokens)] == after.tokens.tolist()


def test_stop_strings_need_a_tokenizer(sampler_of):
    results = run(sampler_of("qwen3"), sample("r", prompt_of(1, 3), stop_strings=("x",)), sample("ok", prompt_of(1, 3)))
    assert results["r"].category == "user" and "use stop token ids instead" in results["r"].error
    assert len(results["ok"].sequences[0].tokens) == 12


def test_the_whole_context_can_be_used(sampler_of):
    sampler = sampler_of("qwen3", kv_cache_bytes=1)
    results = run(sampler, sample("r", prompt_of(0, 200), max_tokens=56, num_samples=2))
    assert [len(sequence.tokens) for sequence in results["r"].sequences] == [56, 56]


def test_cancel_frees_memory_at_once(sampler_of):
    sampler = sampler_of("qwen3", max_decode_batch=4)
    sampler.submit(sample("keep", prompt_of(0, 20), max_tokens=20))
    sampler.submit(sample("drop", prompt_of(1, 40), max_tokens=50, num_samples=9))
    for _ in range(4):
        assert sampler.step() == []
    before = sampler.pages_used
    assert sampler.cancel(CancelSample("drop")) == Done()
    assert sampler.pages_used == 2 < before
    assert sampler.cancel(CancelSample("drop")) == Done()
    results = run(sampler)
    assert results["drop"] == Failure("the sample was cancelled", "user")
    assert tokens_of({"keep": results["keep"]}) == tokens_of(
        run(sampler, sample("keep", prompt_of(0, 20), max_tokens=20))
    )


def test_cancelling_the_one_that_prefills_lets_the_others_go_on(sampler_of):
    sampler = sampler_of("qwen3")
    sampler.submit(sample("drop", prompt_of(1, 40), num_samples=3))
    sampler.cancel(CancelSample("drop"))
    assert set(run(sampler, sample("r", prompt_of(1, 40), num_samples=3))) == {"drop", "r"}
    assert sampler.cancel(CancelSample("never")) == Done()


def test_close_lets_running_requests_end(sampler_of, adapter_folder):
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    alone = tokens_of(run(sampler, sample("r", prompt_of(0, 20), "adapter")))
    sampler.submit(sample("r", prompt_of(0, 20), "adapter"))
    sampler.step()
    assert sampler.close(CloseSampler("adapter")) == Done()
    sampler.submit(sample("late", prompt_of(0, 20), "adapter"))
    results = run(sampler)
    assert results["late"].category == "user" and "no open sampler adapter" in results["late"].error
    assert tokens_of({"r": results["r"]}) == alone


# ---------------------------------------------------------------- faults stay with their request


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (sample("bad", prompt_of(0, 3), "nobody"), "no open sampler nobody"),
        (sample("bad", np.array([], dtype=np.int32)), "the prompt is empty"),
        (sample("bad", np.array([1, VOCAB], dtype=np.int32)), f"token id {VOCAB} in the prompt"),
        (sample("bad", np.array([-1, 2], dtype=np.int32)), "token id -1 in the prompt"),
        (sample("bad", prompt_of(0, 200), max_tokens=57), r"200 \+ 57 > 256"),
        (sample("bad", prompt_of(0, 3), max_tokens=0), "max_tokens is 0"),
        (sample("bad", prompt_of(0, 3), num_samples=0), "num_samples is 0"),
        (sample("bad", prompt_of(0, 3), topk_sample_logprobs=VOCAB + 1), "topk_sample_logprobs is 97"),
        (sample("bad", prompt_of(0, 3), temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_a_bad_request_fails_alone(request_, message, sampler_of):
    sampler = sampler_of("qwen3")
    good = sample("good", prompt_of(0, 6))
    alone = tokens_of(run(sampler, good))
    results = run(sampler, request_, good)
    failure = results.pop("bad")
    assert isinstance(failure, Failure) and failure.category == "user"
    assert re.search(message, failure.error)
    assert tokens_of(results) == alone


def test_weights_that_diverged_fail_their_own_requests(sampler_of, adapter_folder, tmp_path):
    """Also those that later get the memory that held their NaN."""
    shutil.copytree(adapter_folder("qwen3"), tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor.mul(1e30) if "v_proj" in name else tensor for name, tensor in weights.items()}, file)
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("nan", str(tmp_path / "nan")))
    good = sample("good", prompt_of(0, 6), num_samples=2)
    alone = tokens_of(run(sampler, good))
    for temperature in (0.0, 1.0):
        bad = sample("bad", prompt_of(1, 40), "nan", num_samples=3, temperature=temperature)
        results = run(sampler, bad, good)
        assert "not finite" in results.pop("bad").error
        assert tokens_of(results) == alone
        assert tokens_of(run(sampler, good)) == alone


def test_an_adapter_that_does_not_load_says_so(sampler_of, tmp_path):
    failure = sampler_of("qwen3").open(OpenSampler("adapter", str(tmp_path / "nothing")))
    assert isinstance(failure, Failure) and "nothing" in failure.error


def test_an_id_keeps_its_weights(sampler_of, adapter_folder):
    sampler = sampler_of("qwen3")
    assert sampler.open(OpenSampler("a", adapter_folder("qwen3"))) == Done()
    assert sampler.open(OpenSampler("a", adapter_folder("qwen3"))) == Done()
    assert "already" in sampler.open(OpenSampler("a")).error
    assert sampler.close(CloseSampler("a")) == sampler.close(CloseSampler("a")) == Done()


request_strategy = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, 300).map(lambda length: prompt_of(length, length)),
        "sampler_id": st.sampled_from(["base", "adapter", "nobody"]),
        "max_tokens": st.integers(0, 40),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 1, 7, 1000]),
        "top_p": st.sampled_from([0.01, 0.9, 1.0]),
        "stop_tokens": st.sampled_from([(), (1,), tuple(range(30))]),
        "num_samples": st.integers(1, 5),
        "prompt_logprobs": st.booleans(),
        "topk_sample_logprobs": st.integers(0, 3),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=8),
    arrivals=st.lists(st.integers(0, 10), min_size=8, max_size=8),
    cancelled=st.dictionaries(st.integers(0, 7), st.integers(0, 30), max_size=2),
    batch=st.integers(1, 9),
)
def test_any_mixture_is_answered(small_chunks, sampler_of, adapter_folder, requests, arrivals, cancelled, batch):
    """Requests arrive and are cancelled while others run in memory for one context: each gets one answer."""
    sampler = sampler_of("qwen3", kv_cache_bytes=1, max_decode_batch=batch)
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    answers: list[str] = []
    step = 0
    while sampler.busy or step <= 10:
        for index, request in enumerate(requests):
            if arrivals[index] == step:
                sampler.submit(sample(str(index), **request))
        for index, at in cancelled.items():
            if at == step:
                sampler.cancel(CancelSample(str(index)))
        for name, result in sampler.step():
            answers.append(name)
            if isinstance(result, SampleOutput):
                assert len(result.sequences) == requests[int(name)]["num_samples"]
                for sequence in result.sequences:
                    assert len(sequence.tokens) == len(sequence.logprobs) <= requests[int(name)]["max_tokens"]
                    assert np.isfinite(sequence.logprobs).all()
        step += 1
    assert sorted(answers) == [str(index) for index in range(len(requests))]
    assert sampler.pages_used == 0
