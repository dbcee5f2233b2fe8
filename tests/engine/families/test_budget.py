"""The bytes that a sampler takes for its sequences, counted in its tensors, against `kv_cache_bytes`."""

from __future__ import annotations

import gc
import types

import numpy as np
import pytest
import torch

from tests.engine.families.conftest import every_day
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OpenSampler, Sample, SamplingParams
from tinkercloud.engine.results import SampleOutput
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler

BUDGET = 2**19

TABLES = 1000
"""Bytes of tensors that hold no key, value or state: addresses of others. A page is more."""

REQUESTS = 25

NOT_ITS_OWN = (type, types.ModuleType, types.FunctionType, BaseModel)


def bytes_of(sampler: TorchSampler) -> int:
    """Of the memory behind each tensor that is reached from the sampler, but not through the model."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    todo: list[object] = [sampler]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, NOT_ITS_OWN):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(one)
    return sum(storages.values())


@pytest.mark.parametrize("family", every_day("qwen3", "deepseek_v3", "qwen3_5"))
def test_a_sampler_stays_within_its_budget(family, base_model):
    """When it is made, and while more sequences than have room are drawn."""
    model = base_model(family)
    sampler = TorchSampler(model, EngineOptions(family, model.info.folder, kv_cache_bytes=BUDGET))
    assert BUDGET // 2 < bytes_of(sampler) <= BUDGET + TABLES, "most of it is taken at once"
    sampler.open(OpenSampler("base"))
    random = np.random.default_rng(0)
    for number in range(REQUESTS):
        prompt = random.integers(2, 90, 120).astype(np.int32)
        sampler.submit(Sample(f"{number}", "base", prompt, SamplingParams(max_tokens=10, seed=number), num_samples=2))
    results: dict[str, object] = {}
    while sampler.busy:
        results.update(sampler.step())
        assert sampler.num_running < 2 * REQUESTS, "the others wait"
        assert bytes_of(sampler) <= BUDGET + TABLES
    assert len(results) == REQUESTS and all(isinstance(one, SampleOutput) for one in results.values())
