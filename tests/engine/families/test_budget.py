"""The bytes that a sampler takes for its sequences, counted in its tensors, against `kv_cache_bytes`."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.engine.families.conftest import every_day
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OpenSampler, Sample, SamplingParams
from tinkercloud.engine.results import SampleOutput
from tinkercloud.engine.torch.sampler import TorchSampler

BUDGET = 2**18

TABLES = 5000
"""Bytes of what is no key, value or state of a sequence: addresses, and one state for its shape. A page is more."""

SCRATCH = 2**15
"""Bytes that passes leave behind for the next ones, whatever the budget is."""

REQUESTS = 20


def storages() -> dict[int, int]:
    """Bytes of the memory behind each tensor that is alive, by its address."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize("family", every_day("qwen3", "qwen3_5"))
def test_a_sampler_stays_within_its_budget(family, base_model):
    """When it is made, and while more sequences than have room are drawn."""
    model = base_model(family)
    options = EngineOptions(family, model.info.folder, kv_cache_bytes=BUDGET)
    TorchSampler(model, options)  # what is the model's is there from now on
    before = storages()
    sampler = TorchSampler(model, options)

    def taken() -> int:
        return sum(size for place, size in storages().items() if place not in before)

    made = taken()
    assert BUDGET // 2 < made <= BUDGET + TABLES, "most of it is taken at once"
    sampler.open(OpenSampler("base"))
    random = np.random.default_rng(0)
    for number in range(REQUESTS):
        prompt = random.integers(2, 90, 120).astype(np.int32)
        sampler.submit(Sample(f"{number}", "base", prompt, SamplingParams(max_tokens=40, seed=number), num_samples=2))
    results: dict[str, object] = {}
    for _ in range(20):
        results.update(sampler.step())
    assert 0 < sampler.num_running < 2 * REQUESTS, "the others wait"
    assert taken() <= BUDGET + TABLES + SCRATCH
    while sampler.busy:
        results.update(sampler.step())
    assert len(results) == REQUESTS and all(isinstance(one, SampleOutput) for one in results.values())
