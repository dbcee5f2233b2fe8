"""What sampling draws from each family, judged by transformers' `generate`, and by training's own forward pass."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.engine import reference
from tests.engine.examples import VOCAB, forward_backward, run, shaken
from tests.engine.families.conftest import FAMILIES, every_day
from tests.engine.precision import DEVICE, DTYPE, EXACT, REGRET, assert_as_near, assert_logprobs
from tests.engine.sampler_requests import assert_same_bits
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import Datum, OpenSampler, Sample, SamplingParams, SaveWeights
from tinkercloud.engine.results import Done, SampledSequence, SampleOutput
from tinkercloud.engine.torch.kernels.products import have_products
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer

RANKS = {"one": 8, "two": 3}
SAME_BITS = {"llama3", "qwen2", "qwen3", "qwen3_moe"}
"""Families whose passes have kernels for all that matters of sums, in training as in sampling. So has Mistral in its
window, which is shorter in these tests."""
assert FAMILIES.keys() > SAME_BITS
LENGTHS = [1, 9, 26, 40, 9]
_SCARCE = {} if EXACT else {"deepseek_v3": 1 << 15}
"""Bytes in which not all have room: where a token's latents are all that is kept of it, there is room for more."""


@pytest.fixture(scope="session")
def adapters_of(base_model, tmp_path_factory):
    """family -> (trainer, folder of each adapter's weights); tests only look at them."""
    made: dict[str, tuple[TorchTrainer, dict[str, str]]] = {}

    def of(family: str) -> tuple[TorchTrainer, dict[str, str]]:
        if family not in made:
            trainer = TorchTrainer(base_model(family), EngineOptions(name=family, source=""))
            folder = tmp_path_factory.mktemp("sampled")
            for name, rank in RANKS.items():
                run(trainer, *shaken(name, rank), SaveWeights(name, str(folder / name)))
            made[family] = trainer, {name: str(folder / name) for name in RANKS}
        return made[family]

    return of


@pytest.fixture
def adapters(family, adapters_of):
    """(trainer, folder of each adapter's weights)"""
    return adapters_of(family)


@pytest.fixture(scope="session")
def plain_of(model_folder, adapters_of):
    """(family, name of an adapter or "base") -> the model of transformers, with PEFT."""
    models = {}

    def of(family: str, name: str):
        if (family, name) not in models:
            folder = model_folder(family)
            adapter = adapters_of(family)[1].get(name)
            models[family, name] = reference.load_peft(folder, adapter) if adapter else reference.load_plain(folder)
        return models[family, name]

    return of


@pytest.fixture
def alike_of(family, model_folder, adapters):
    """name of an adapter or "base" -> the model of transformers, with PEFT, in the sampler's type"""
    return lambda name: reference.load_alike(model_folder(family), adapters[1].get(name))


@pytest.fixture
def sampler_of(family, base_model, adapters, small_chunks):
    """**options -> a sampler with the adapters and the base model open, which prefills in small chunks; afterwards it
    must hold no page and no state."""
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


def _requests(params: SamplingParams, **options) -> list[Sample]:
    """Some of each sampler's, of ragged lengths; each with a seed of its own, some of more tokens."""
    return [
        Sample(
            f"{name}-{place}",
            name,
            np.random.default_rng(place).integers(2, VOCAB, length).astype(np.int32),
            structs.replace(params, max_tokens=params.max_tokens + place, seed=place),
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


class _Draw(LogitsProcessor):
    """What `seed` draws, by the definition: number i of the stream Philox(seed, sample index) picks token i, the first
    at which the cumulative probability passes it."""

    def __init__(self, seed: int) -> None:
        self._uniforms = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores[0].double().softmax(-1).cumsum(-1).numpy()
        chosen = np.searchsorted(cumulative, self._uniforms.random() * cumulative[-1], side="right")
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([chosen]), 0.0)


def _processors(params: SamplingParams) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` has them, and the draw."""
    if params.temperature == 0:
        return LogitsProcessorList()
    own = [TemperatureLogitsWarper(params.temperature), TopKLogitsWarper(params.top_k), TopPLogitsWarper(params.top_p)]
    return LogitsProcessorList([*own, _Draw(params.seed)])


class Greed:
    """In bfloat16, what greedy samples are: their tokens are the likeliest but for what rounding takes for one, and
    their log-probabilities as near to float32's as transformers' are, which reads the same tokens."""

    def __init__(self) -> None:
        self._logprobs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._regrets: list[tuple[Tensor, Tensor]] = []

    def add(self, exact, alike, prompt: np.ndarray, sequence: SampledSequence) -> None:
        """One sample; the model that drew it in float32, and in the sampler's type."""
        tokens = np.concatenate([prompt, sequence.tokens])
        with torch.no_grad():
            rows, theirs = (
                reference.logits(model, tokens)[len(prompt) - 1 : -1].log_softmax(-1) for model in (exact, alike)
            )
        drawn = torch.from_numpy(sequence.tokens.astype(np.int64))[:, None]
        own = rows.gather(1, drawn)[:, 0]
        self._logprobs.append((torch.from_numpy(sequence.logprobs), theirs.gather(1, drawn)[:, 0], own))
        best = rows.amax(-1)
        self._regrets.append((best - own, best - rows.gather(1, theirs.argmax(-1)[:, None])[:, 0]))

    def check(self) -> None:
        assert_as_near(*(torch.cat(side) for side in zip(*self._logprobs, strict=True)))
        ours, theirs = (torch.cat(side).mean().item() for side in zip(*self._regrets, strict=True))
        assert ours <= theirs + REGRET


GREEDY = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
SEEDED = SamplingParams(max_tokens=8, seed=0, temperature=0.8, top_k=20, top_p=0.9)


@pytest.mark.device
def test_greedy_is_generate_while_sequences_join_and_leave(family, sampler_of, plain_of, alike_of):
    _assert_generated(_requests(GREEDY), sampler_of(), plain_of, alike_of, family)


@pytest.mark.parametrize("family", every_day("qwen3", "gpt_oss", "deepseek_v3", "qwen3_5"))
def test_seeded_draws_are_generates_with_the_same_numbers(family, sampler_of, plain_of, alike_of):
    _assert_generated(_requests(SEEDED), sampler_of(), plain_of, alike_of, family)


def _assert_generated(requests: list[Sample], sampler: TorchSampler, plain_of, alike_of, family: str) -> None:
    results, greed = _run(sampler, requests), Greed()
    for name, group in itertools.groupby(requests, key=lambda request: request.sampler_id):
        model = plain_of(family, name)
        alike = None if EXACT else alike_of(name)
        for request in group:
            (sequence,) = results[request.request_id].sequences
            if not EXACT:
                greed.add(model, alike, request.prompt, sequence)
                continue
            prompt = torch.from_numpy(request.prompt.astype(np.int64))[None]
            expected = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.params.max_tokens,
                do_sample=False,
                logits_processor=_processors(request.params),
                pad_token_id=0,
                eos_token_id=-1,
            )
            assert sequence.tokens.tolist() == expected[0, len(request.prompt) :].tolist()
    if not EXACT:
        greed.check()


@pytest.mark.device
def test_what_a_sample_says_is_what_training_computes(family, adapters, base_model, sampler_of):
    """Log-probabilities of drawn tokens and of the prompt's, of interrupted sequences too."""
    model, sampler = base_model(family), sampler_of(kv_cache_bytes=_SCARCE.get(family, 1 << 17), max_decode_batch=12)
    requests = _requests(SamplingParams(max_tokens=30, seed=0), prompt_logprobs=True, num_samples=2)[len(LENGTHS) :]
    results = _run(sampler, requests)
    assert sampler.preemptions > 0
    for request, index in itertools.product(requests, range(2)):
        sequence = results[request.request_id].sequences[index]
        tokens = np.concatenate([request.prompt, sequence.tokens])
        datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
        datum.inputs["weights"] = np.ones(len(datum.tokens), np.float32)
        (output,) = run(adapters[0], forward_backward(request.sampler_id, [datum], forward_only=True))
        said = np.concatenate([results[request.request_id].prompt_logprobs[1:], sequence.logprobs])
        assert_logprobs(said, output.outputs[0]["logprobs"])
        if family in SAME_BITS and have_products(torch.empty(0, dtype=model.dtype, device=model.device)):
            np.testing.assert_array_equal(said, output.outputs[0]["logprobs"])


@pytest.mark.skipif(DEVICE != "cpu" or DTYPE != "float32", reason="bits are promised on the CPU in float32")
def test_mistral_in_its_window_has_the_same_bits(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("mistral"), tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 60}))
    options = EngineOptions("wide", str(folder), device="cpu", dtype="float32")
    model = BaseModel.load(options)
    trainer, sampler = TorchTrainer(model, options), TorchSampler(model, options)
    run(trainer, *shaken("m", 8), SaveWeights("m", str(tmp_path / "m")))
    assert sampler.open(OpenSampler("m", str(tmp_path / "m"))) == Done()
    prompt = np.arange(2, 32, dtype=np.int32)
    (result,) = _run(sampler, [Sample("r", "m", prompt, SamplingParams(max_tokens=30, seed=0))]).values()
    tokens = np.concatenate([prompt, result.sequences[0].tokens])
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(59, np.float32)})
    (output,) = run(trainer, forward_backward("m", [datum], forward_only=True))
    trained = output.outputs[0]["logprobs"][-30:]
    if have_products(torch.empty(0)):
        np.testing.assert_array_equal(result.sequences[0].logprobs, trained)
    assert_logprobs(result.sequences[0].logprobs, trained)


def test_a_sample_has_the_same_bits_whatever_else_there_is(family, sampler_of):
    """Alone, in a crowd, interrupted, with its prompt kept from before (of hybrids only longer ones are, see
    `test_hybrid_prefixes`), and with its prompt scored."""
    requests = _requests(SamplingParams(max_tokens=30, seed=0), num_samples=2)
    scored = [structs.replace(request, prompt_logprobs=True) for request in requests]
    tight, roomy = sampler_of(kv_cache_bytes=_SCARCE.get(family, 1 << 17), max_decode_batch=12), sampler_of()
    expected = _run(roomy, scored)
    for sampler, asked in ((roomy, requests), (tight, scored)):
        for name, result in _run(sampler, asked).items():
            assert_same_bits(result, expected[name])
            if asked is requests:
                prompt_tokens = LENGTHS[int(name.rpartition("-")[2])]
                assert result.prompt_cache_hit_tokens == (0 if sampler._states else prompt_tokens - 1)
    assert tight.preemptions > 0
    for request in requests[2::5]:
        (alone,) = _run(sampler_of(), [request]).values()
        assert_same_bits(alone, expected[request.request_id])
