"""Prompts that begin alike are computed once, and nobody sees in a sample whether its prompt was in the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.engine.examples import forward_backward, shaken
from tests.engine.examples import run as train
from tests.engine.sampler_requests import assert_same_bits, prompt_of, run, sample
from tinkercloud.engine.operations import CancelSample, CloseSampler, Datum, OpenSampler, SaveWeights
from tinkercloud.engine.torch import batching
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, OutOfPages
from tinkercloud.engine.torch.prefix_cache import Namespace, Node, PrefixCache, page_keys


@pytest.fixture
def rows_run(base_model, monkeypatch):
    """Rows of each step of qwen3, filling included."""
    model, rows = base_model("qwen3"), []
    hidden_states = model.hidden_states

    def counted(tokens, *others, **named):
        rows.append(len(tokens))
        return hidden_states(tokens, *others, **named)

    monkeypatch.setattr(model, "hidden_states", counted)
    return rows


def joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32)


@pytest.mark.parametrize("common", [0, 15, 16, 31, 64, 90, 140])
def test_a_prompt_that_begins_like_an_earlier_one_goes_on_from_it(common, small_chunks, sampler_of):
    """In whole pages, with the bits of one that was computed from the start."""
    prompt = joined(prompt_of(0, 140)[:common], prompt_of(1, 150 - common))
    request = sample("r", prompt, num_samples=2)
    (cold,) = run(sampler_of("qwen3"), request).values()
    warm_sampler = sampler_of("qwen3")
    run(warm_sampler, sample("before", prompt_of(0, 140)))
    (warm,) = run(warm_sampler, request).values()
    assert cold.prompt_cache_hit_tokens == 0
    assert warm.prompt_cache_hit_tokens == common // PAGE_TOKENS * PAGE_TOKENS
    assert_same_bits(warm, cold)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 100])
def test_the_same_prompt_again_computes_its_last_token(length, sampler_of, rows_run):
    sampler = sampler_of("qwen3")
    request = sample("r", prompt_of(length, length), num_samples=2, max_tokens=3)
    (cold,) = run(sampler, request).values()
    del rows_run[:]
    (warm,) = run(sampler, request).values()
    assert_same_bits(warm, cold)
    assert warm.prompt_cache_hit_tokens == length - 1, "once, not for each sample"
    assert max(rows_run) <= 4


@pytest.mark.parametrize("length", [100, 96, 3])
@pytest.mark.parametrize("has_whole_steps", [True, False])
def test_turns_of_a_conversation(has_whole_steps, length, base_model, sampler_of, monkeypatch):
    """What was drawn is not computed again where its numbers are those of a prompt to the bit; else once, as part of
    the next prompt, which is then kept."""
    if not has_whole_steps:  # as on a processor without AVX-512
        monkeypatch.setattr(base_model("qwen3")._lean, "step", None)
    drawn_are_kept = base_model("qwen3").has_whole_steps
    sampler = sampler_of("qwen3")
    prompt, before = prompt_of(0, length), 0
    for turn in range(3):
        (result,) = run(sampler, sample(f"{turn}", prompt, max_tokens=35)).values()
        assert result.prompt_cache_hit_tokens == before // PAGE_TOKENS * PAGE_TOKENS
        (alone,) = run(sampler_of("qwen3"), sample("r", prompt, max_tokens=35)).values()
        assert_same_bits(result, alone)
        before = len(prompt) + (34 if drawn_are_kept else 0)  # the last drawn token was never run
        prompt = joined(prompt, result.sequences[0].tokens, prompt_of(10 + turn, 7))


def test_each_of_several_samples_is_gone_on_from(base_model, sampler_of):
    """In one step with the others, and with the prompt itself asked once more."""
    sampler, prompt = sampler_of("qwen3"), prompt_of(0, 53)
    (first,) = run(sampler, sample("first", prompt, num_samples=4, max_tokens=30)).values()
    turns = [joined(prompt, one.tokens, prompt_of(9, 5)) for one in first.sequences]
    requests = [sample(f"{number}", turn) for number, turn in enumerate(turns)] + [sample("again", prompt)]
    together = run(sampler, *requests)
    kept = 80 if base_model("qwen3").has_whole_steps else 48
    assert [result.prompt_cache_hit_tokens for result in together.values()] == [kept] * 4 + [52]
    for request in requests:
        (alone,) = run(sampler_of("qwen3"), request).values()
        assert_same_bits(together[request.request_id], alone)


@pytest.mark.parametrize("requests", [16, 1])
def test_samples_of_one_prompt_compute_it_once(requests, small_chunks, sampler_of, rows_run):
    """As many requests as one with as many samples, all at once."""
    sampler = sampler_of("qwen3")
    asked = [sample(f"r{i}", prompt_of(0, 100), seed=i, num_samples=16 // requests) for i in range(requests)]
    del rows_run[:]
    results = run(sampler, *asked)
    assert rows_run[:5] == [24, 24, 24, 24, 4]
    assert sum(rows_run[:6]) <= 100 + 15 + 1, "then each computes the last token"
    hits = sorted(result.prompt_cache_hit_tokens for result in results.values())
    assert hits == [0] + [99] * (requests - 1)
    for request in asked:
        assert_same_bits(run(sampler_of("qwen3"), request)[request.request_id], results[request.request_id])


def test_prompts_that_begin_alike_wait_only_for_what_they_share(small_chunks, sampler_of, rows_run):
    """Then they go on side by side; those that share little do not wait."""
    sampler = sampler_of("qwen3")
    alike = [sample(f"r{i}", joined(prompt_of(0, 96), prompt_of(i, 20)), max_tokens=1) for i in range(1, 4)]
    other = sample("other", joined(prompt_of(0, 10), prompt_of(9, 30)), max_tokens=1)
    del rows_run[:]
    results = run(sampler, *alike, other)
    assert sum(rows_run) <= 96 + 3 * 20 + 40 + 8
    assert [results[f"r{i}"].prompt_cache_hit_tokens for i in range(1, 4)] == [0, 96, 96]
    assert results["other"].prompt_cache_hit_tokens == 0


def test_who_waits_goes_on_when_the_other_is_cancelled(small_chunks, sampler_of):
    sampler = sampler_of("qwen3")
    for name in ("first", "second", "third"):
        sampler.submit(sample(name, prompt_of(0, 100)))
    for _ in range(2):
        sampler.step()
    assert sampler.num_running == 1
    sampler.cancel(CancelSample("first"))
    assert sampler.pages_used == 0
    results = run(sampler)
    assert results["second"].prompt_cache_hit_tokens == 48, "what the first one had computed"
    (alone,) = run(sampler_of("qwen3"), sample("r", prompt_of(0, 100))).values()
    assert_same_bits(results["second"], alone)
    assert_same_bits(results["third"], alone)


def test_nobody_waits_for_ever_for_what_others_leave(sampler_of, monkeypatch):
    """Scored requests, which wait for nobody, begin like one that waits for the first of them, and come without end.
    What they leave is a little less than what it waits for, which ends within a page."""
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(batching, "PREFILL_BUDGET", 64)
    sampler, start, ended = sampler_of("qwen3"), prompt_of(0, 200), []
    for number in range(60):
        if number == 16:
            sampler.submit(sample("waits", start, max_tokens=1))
        prompt = joined(start[:190], prompt_of(number, 10))
        sampler.submit(sample(f"r{number}", prompt, max_tokens=1, prompt_logprobs=True))
        ended += [name for name, _ in sampler.step()]
    ended += run(sampler)
    assert len(ended) == 61 and ended.index("waits") < 30


def test_what_is_scored_is_computed(sampler_of):
    sampler = sampler_of("qwen3")
    scored = sample("scored", prompt_of(0, 100), prompt_logprobs=True, num_samples=3)
    some = sample("some", prompt_of(0, 100), prompt_logprobs=True, prompt_logprobs_last_n=30)
    (cold,) = run(sampler, scored).values()
    results = run(sampler, scored, some)
    assert_same_bits(results["scored"], cold)
    assert results["scored"].prompt_cache_hit_tokens == 0
    assert results["some"].prompt_cache_hit_tokens == 69, "the hidden state before the first scored token is needed"
    np.testing.assert_array_equal(results["some"].prompt_logprobs[70:], cold.prompt_logprobs[70:])


def test_weights_share_with_none_but_themselves(sampler_of, adapter_folder):
    """A folder is one set of weights, however often it is opened, until the last is closed; so is the base model."""
    sampler = sampler_of("qwen3")
    folder = adapter_folder("qwen3")
    for name, where in {"one": folder, "two": folder, "other": adapter_folder("qwen3", 1), "base too": ""}.items():
        sampler.open(OpenSampler(name, where))

    def hits(name: str) -> int:
        return run(sampler, sample("r", prompt_of(0, 50), name, max_tokens=2))["r"].prompt_cache_hit_tokens

    assert [hits(name) for name in ("one", "two", "other", "base", "base too", "other")] == [0, 49, 0, 0, 49, 49]
    sampler.close(CloseSampler("one"))
    assert hits("two") == 49
    sampler.close(CloseSampler("two"))
    sampler.open(OpenSampler("two", folder))
    assert [hits("two"), hits("base")] == [0, 49]


@pytest.mark.parametrize("folder", ["adapter", "base model"])
def test_nobody_learns_what_another_owner_has_sent(folder, sampler_of, adapter_folder, monkeypatch):
    """Not even where weights are the same, which are held once and make one segment of a step's rows."""
    sampler = sampler_of("qwen3")
    where = adapter_folder("qwen3") if folder == "adapter" else ""
    for name, owner in {"mine": "me", "theirs": "them", "mine too": "me"}.items():
        sampler.open(OpenSampler(name, where, owner=owner))
    results = [
        run(sampler, sample("r", prompt_of(0, 50), name, max_tokens=2))["r"] for name in ("mine", "theirs", "mine too")
    ]
    assert [result.prompt_cache_hit_tokens for result in results] == [0, 0, 49]
    for result in results[1:]:
        assert_same_bits(result, results[0])
    segments, hidden_states = [], sampler._model.hidden_states

    def seen(tokens, positions, attention, lora):
        segments.append(len(lora))
        return hidden_states(tokens, positions, attention, lora)

    monkeypatch.setattr(sampler._model, "hidden_states", seen)
    names = ("mine", "theirs", "mine too", "theirs")
    together = run(sampler, *(sample(f"{i}", prompt_of(0, 50), name, max_tokens=2) for i, name in enumerate(names)))
    for result in together.values():
        assert_same_bits(result, results[0])
    assert set(segments) == {1 if where else 0}


def test_the_pages_of_a_closed_sampler_go(sampler_of, adapter_folder):
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    run(sampler, sample("before", prompt_of(0, 50), "adapter"))
    sampler.submit(sample("r", prompt_of(0, 50), "adapter"))
    sampler.step()
    assert (sampler.pages_used, sampler.pages_kept) == (4, 1)
    sampler.close(CloseSampler("adapter"))
    assert (sampler.pages_used, sampler.pages_kept) == (4, 0)
    run(sampler)
    assert (sampler.pages_used, sampler.pages_kept) == (0, 0)


def test_samples_of_a_closed_sampler_do_not_wait_for_one_another(small_chunks, sampler_of, adapter_folder):
    """Nothing is kept any more, so there is nothing to wait for."""
    sampler = sampler_of("qwen3")
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    request = sample("r", prompt_of(0, 100), "adapter", num_samples=4)
    (alone,) = run(sampler, request).values()
    sampler.close(CloseSampler("adapter"))
    sampler.open(OpenSampler("adapter", adapter_folder("qwen3")))
    sampler.submit(request)
    sampler.step()
    assert sampler.num_running == 1
    sampler.close(CloseSampler("adapter"))
    sampler.step()
    assert sampler.num_running == 4
    assert_same_bits(run(sampler)["r"], alone)


def test_kept_pages_make_room_for_what_runs(sampler_of):
    """In memory for one context, the prompts that were used last are still there."""
    sampler = sampler_of("qwen3", kv_cache_bytes=1)
    for seed in range(6):
        run(sampler, sample("r", prompt_of(seed, 64), max_tokens=4))
        assert sampler.pages_kept <= 16
    results = [run(sampler, sample("r", prompt_of(seed, 64), max_tokens=4))["r"] for seed in (5, 4, 0)]
    assert [result.prompt_cache_hit_tokens for result in results] == [63, 63, 0]
    (whole,) = run(sampler, sample("r", prompt_of(9, 200), max_tokens=56)).values()
    assert len(whole.sequences[0].tokens) == 56


def test_many_long_prompts_do_not_starve_a_short_one_nor_it_them(small_chunks, sampler_of):
    """The oldest has its chunk in every step, the rest goes to who has the least left to do."""
    sampler = sampler_of("qwen3")
    for i in range(6):
        sampler.submit(sample(f"long{i}", prompt_of(i, 200), max_tokens=1))
    sampler.step()
    for i in range(10):
        sampler.submit(sample(f"short{i}", prompt_of(20 + i, 10), max_tokens=1))
    ended_at = {}
    for step in range(2, 100):
        for name, _ in sampler.step():
            ended_at[name] = step
    assert max(ended_at[f"short{i}"] for i in range(10)) <= 11, "one in each step, in what a chunk of 24 leaves of 40"
    assert ended_at["long0"] == 9, "200 tokens, 24 a step"
    assert len(ended_at) == 16


def test_what_a_sample_says_is_what_training_computes(small_chunks, sampler_of, trainer_of, tmp_path):
    """For a prompt that is computed, kept, scored, interrupted, of several adapters at once."""
    trainer, names = trainer_of("qwen3"), ("one", "two")
    requests = []
    for place, name in enumerate(names):
        train(trainer, *shaken(name, 4 + 4 * place), SaveWeights(name, str(tmp_path / name)))
        for i, prompt in enumerate((prompt_of(0, 70), joined(prompt_of(0, 70), prompt_of(1, 30)), prompt_of(2, 9))):
            requests.append(sample(f"{name}{i}", prompt, name, num_samples=2, seed=i, max_tokens=40))
    scored = [structs.replace(request, prompt_logprobs=True) for request in requests]
    expected, interrupted = {}, 0
    for memory in ({}, {"kv_cache_bytes": 1}):
        sampler = sampler_of("qwen3", **memory)
        for name in names:
            sampler.open(OpenSampler(name, str(tmp_path / name)))
        for asked in (requests, requests, scored):
            for name, result in run(sampler, *asked).items():
                assert_same_bits(result, expected.setdefault((name, asked is scored), result))
        interrupted += sampler.preemptions
    assert interrupted
    for request in scored:
        result = expected[request.request_id, True]
        for sequence in result.sequences:
            tokens = joined(request.prompt, sequence.tokens)
            datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
            datum.inputs["weights"] = np.ones(len(datum.tokens), np.float32)
            (output,) = train(trainer, forward_backward(request.sampler_id, [datum], forward_only=True))
            said = np.concatenate([result.prompt_logprobs[1:], sequence.logprobs])
            np.testing.assert_allclose(said, output.outputs[0]["logprobs"], atol=1e-5, rtol=0)
        assert_same_bits(expected[request.request_id, False], structs.replace(result, prompt_logprobs=None))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.lists(st.integers(0, 1), max_size=5), st.integers(0, 15)),
        max_size=30,
    )
)
def test_what_is_found_is_what_was_kept(actions):
    """Prompts of pages of ones and zeros are read, kept, drawn after and given back in any order, in a pool that is too
    small: what is found has the prompt's own tokens, and the pool's accounts are right."""
    cache = KVCache({0: LayerShape(1, 1, 1)}, 8, torch.float32, torch.device("cpu"))
    prefixes, namespaces = PrefixCache(cache), [Namespace(), Namespace()]
    running: list[tuple[int, Namespace, Node | Namespace, np.ndarray, list[int]]] = []

    def marks_of(which: int, tokens: np.ndarray) -> list[float]:
        return [float(1000 * which + token) for token in tokens]

    def write(pages: list[int], which: int, tokens: np.ndarray) -> None:
        marks = marks_of(which, tokens)
        for place, page in enumerate(pages):
            own = torch.tensor(marks[place * PAGE_TOKENS : (place + 1) * PAGE_TOKENS])[:, None, None]
            cache.write(0, torch.arange(len(own)) + page * PAGE_TOKENS, own, own)

    def give_back(number: int, drawn: int) -> None:
        """With the last page filled up by drawn tokens, if there is room in it."""
        which, namespace, node, tokens, pages = running.pop(number)
        whole, missing = len(tokens) // PAGE_TOKENS, -len(tokens) % PAGE_TOKENS
        if missing and namespace.open:
            last = np.concatenate((tokens[whole * PAGE_TOKENS :], [drawn] * missing)).astype(np.int32)
            write(pages[whole:], which, last)
            own = pages[whole:]
            prefixes.keep(node, page_keys(last), own)
            pages[whole:] = own
        cache.release(pages)

    for action, which, blocks, rest in actions:
        if action == 4:
            prefixes.drop(namespaces[which])
            namespaces[which] = Namespace()
        elif action == 3 and running:
            give_back(len(blocks) % len(running), drawn=rest % 4)
        else:
            tokens = np.array([block for block in blocks for _ in range(PAGE_TOKENS)] + [2] * rest, np.int32)
            keys = page_keys(tokens)
            found = prefixes.find(namespaces[which], keys, len(tokens))
            assert found.tokens <= len(tokens)
            marks = marks_of(which, tokens)
            read = [cache.read(0, torch.tensor([[page]]))[0][0, 0, :, 0].tolist() for page in found.pages]
            assert [mark for page in read for mark in page] == marks[: len(found.pages) * PAGE_TOKENS]
            if found.partial is not None:
                partial = cache.read(0, torch.tensor([[found.partial]]))[0][0, 0, :, 0].tolist()
                assert partial[:rest] == marks[-rest:]
            pages = cache.share(found.pages)
            try:
                pages += cache.allocate(len(keys) - len(pages))
            except OutOfPages:
                cache.release(pages)
                continue
            own = pages[len(found.pages) :]
            write(own, which, tokens[len(found.pages) * PAGE_TOKENS :])
            node = prefixes.keep(found.node, keys[len(found.pages) :], own)
            running.append((which, namespaces[which], node, tokens, pages[: len(found.pages)] + own))
        assert cache.used == len({page for *_, pages in running for page in pages})
    while running:
        give_back(0, drawn=3)
    assert cache.used == 0
    for namespace in namespaces:
        prefixes.drop(namespace)
    assert cache.idle == 0
