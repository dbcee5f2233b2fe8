"""What sampling draws from each family, judged by transformers' `generate`, and by training's own forward pass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.engine import reference
from tests.engine.examples import VOCAB, forward_backward, run, shaken
from tinkercloud.engine.torch import batching
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.types import (
    Datum,
    Done,
    EngineOptions,
    OpenSampler,
    Sample,
    SampleOutput,
    SamplingParams,
    SaveWeights,
)

RANKS = {"one": 8, "two": 3}
LENGTHS = [1, 9, 26, 40, 9]


@pytest.fixture
def adapters(family, trainer_of, tmp_path):
    """(trainer, folder of each adapter's weights)"""
    trainer = trainer_of(family)
    for name, rank in RANKS.items():
        run(trainer, *shaken(name, rank), SaveWeights(name, str(tmp_path / name)))
    return trainer, {name: str(tmp_path / name) for name in RANKS}


@pytest.fixture
def sampler_of(family, base_model, adapters, monkeypatch):
    """**options -> a sampler with the adapters and the base model open, which prefills in small chunks; afterwards it
    must hold no page and no state."""
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(batching, "PREFILL_BUDGET", 40)
    samplers = []

    def make(**options) -> TorchSampler:
        model = base_model(family)
        sampler = TorchSampler(model, EngineOptions(name=family, source=model.info.folder, **options))
        for name, folder in {"base": "", **adapters[1]}.items():
            assert sampler.open(OpenSampler(name, folder)) == Done()
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        assert not sampler.busy
        assert (sampler.pages_used, sampler.states_used) == (0, 0)


def _requests(temperature: float, max_tokens: int, **options) -> list[Sample]:
    """Some of each sampler's, of ragged lengths."""
    return [
        Sample(
            f"{name}-{place}",
            name,
            np.random.default_rng(place).integers(2, VOCAB, length).astype(np.int32),
            SamplingParams(max_tokens=max_tokens + place, seed=place, temperature=temperature),
            **options,
        )
        for name in ("base", *RANKS)
        for place, length in enumerate(LENGTHS)
    ]


def _run(sampler: TorchSampler, requests: list[Sample]) -> dict[str, SampleOutput]:
    """Submit a request before every other step, so that sequences join those that are running."""
    results = {}
    waiting = iter(requests)
    for step in itertools.count():
        request = next(waiting, None) if step % 2 == 0 else None
        if request is not None:
            sampler.submit(request)
        elif step >= 2 * len(requests) and not sampler.busy:
            return results
        results.update(sampler.step())


def test_greedy_is_generate_while_sequences_join_and_leave(family, sampler_of, adapters, model_folder):
    requests = _requests(0.0, 8)
    results = _run(sampler_of(), requests)
    for name, group in itertools.groupby(requests, key=lambda request: request.sampler_id):
        folder = model_folder(family)
        model = reference.load_plain(folder) if name == "base" else reference.load_peft(folder, adapters[1][name])
        for request in group:
            (sequence,) = results[request.request_id].sequences
            prompt = torch.from_numpy(request.prompt.astype(np.int64))[None]
            expected = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.params.max_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=-1,
            )
            assert sequence.tokens.tolist() == expected[0, len(request.prompt) :].tolist()


def test_what_a_sample_says_is_what_training_computes(family, adapters, sampler_of):
    """Log-probabilities of drawn tokens and of the prompt's, of interrupted sequences too."""
    sampler = sampler_of(kv_cache_bytes=1 << 17, max_decode_batch=12)
    requests = _requests(1.0, 30, prompt_logprobs=True, num_samples=2)[len(LENGTHS) :]
    results = _run(sampler, requests)
    assert sampler.preemptions > 0
    for request, index in itertools.product(requests, range(2)):
        sequence = results[request.request_id].sequences[index]
        tokens = np.concatenate([request.prompt, sequence.tokens])
        datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
        datum.inputs["weights"] = np.ones(len(datum.tokens), np.float32)
        (output,) = run(adapters[0], forward_backward(request.sampler_id, [datum], forward_only=True))
        said = np.concatenate([results[request.request_id].prompt_logprobs[1:], sequence.logprobs])
        np.testing.assert_allclose(said, output.outputs[0]["logprobs"], atol=1e-5, rtol=0)


def _assert_same_bits(result: SampleOutput, other: SampleOutput) -> None:
    for one, two in zip(result.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.logprobs, two.logprobs)


def test_a_sample_has_the_same_bits_whatever_else_there_is(sampler_of):
    """Alone, in a crowd, interrupted, with its prompt kept from before, and with its prompt scored."""
    requests = _requests(1.0, 30, num_samples=2)
    scored = [structs.replace(request, prompt_logprobs=True) for request in requests]
    tight, roomy = sampler_of(kv_cache_bytes=1 << 17, max_decode_batch=12), sampler_of()
    expected = _run(roomy, scored)
    for sampler, asked in ((roomy, requests), (tight, scored)):
        for name, result in _run(sampler, asked).items():
            _assert_same_bits(result, expected[name])
            if asked is scored:
                np.testing.assert_array_equal(result.prompt_logprobs, expected[name].prompt_logprobs)
    assert tight.preemptions > 0
    for request in requests[2::5]:
        (alone,) = _run(sampler_of(), [request]).values()
        _assert_same_bits(alone, expected[request.request_id])
