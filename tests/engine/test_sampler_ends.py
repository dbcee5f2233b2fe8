"""How samples end: by a stop, by their length, by a cancel, by the closing of their sampler."""

from __future__ import annotations

import gc
import shutil
import weakref

import tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.examples import VOCAB
from tests.engine.sampler_requests import prompt_of, run, sample, tokens_of
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CancelSample, CloseSampler, OpenSampler
from tinkercloud.engine.results import Done, Failure
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler


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


def test_the_weights_of_a_closed_sampler_go_with_its_last_answer(sampler_of, adapter_folder):
    """At once, not when garbage is collected."""
    sampler = sampler_of("qwen3")
    gc.collect()
    gc.disable()
    try:
        sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
        opened = weakref.ref(sampler._samplers["adapter"])
        sampler.submit(sample("r", prompt_of(0, 20), "adapter", num_samples=2))
        sampler.submit(sample("drop", prompt_of(1, 20), "adapter", num_samples=2))
        sampler.step()
        sampler.close(CloseSampler("adapter"))
        sampler.cancel(CancelSample("drop"))
        assert opened() is not None
        run(sampler)
        assert opened() is None
    finally:
        gc.enable()
