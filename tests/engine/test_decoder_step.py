"""The kernel of whole sampling steps against the same layers one by one, and its promise: a row's bits depend on its
own sequence alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.test_decoder import CONFIGS
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import LoraConfig
from tinkercloud.engine.torch.adapter import frozen_weights, layout_of
from tinkercloud.engine.torch.decode_window import CacheRows
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kernels.products import have_products
from tinkercloud.engine.torch.kv_cache import KVCache, pages_for
from tinkercloud.engine.torch.lora import AdapterWeights, SampledLora, Segment
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler_memory import memory_of

pytestmark = pytest.mark.skipif(
    not have_products(torch.empty(1)), reason="this processor has no kernel for whole steps"
)

LENGTHS = [40, 5, 17, 23, 9]
TOKENS = [(torch.arange(length) * 31 + number) % 96 for number, length in enumerate(LENGTHS)]
ADAPTER_OF = [None, 0, 0, 1, 2]
"""Of each sequence; neighbours share one."""


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request, tmp_path) -> BaseModel:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(request.param)
    for name, parameter in whole.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    whole.save_pretrained(tmp_path)
    return BaseModel.load(EngineOptions(name="it", source=str(tmp_path), device="cpu", max_rank=32))


def adapters_of(model: BaseModel) -> list[AdapterWeights]:
    """Of other ranks and other parts."""
    configs = [LoraConfig(3), LoraConfig(16, train_attn=False), LoraConfig(8, train_mlp=False, train_unembed=False)]
    layouts = [layout_of(config, model.linears) for config in configs]
    return [frozen_weights(one, torch.randn(one.size) * 0.1, 0.5, torch.float32) for one in layouts]


def hidden_states(model: BaseModel, steps: Sequence[Mapping[int, int]]) -> dict[int, Tensor]:
    """Of each sequence's tokens, so many of which run in each step."""
    torch.manual_seed(1)
    adapters = adapters_of(model)
    cache = KVCache(memory_of(model).layers, 20, torch.float32, torch.device("cpu"))
    pages = {number: cache.allocate(pages_for(LENGTHS[number]))[::-1] for number in steps[0]}
    done = dict.fromkeys(steps[0], 0)
    outputs: dict[int, list[Tensor]] = {number: [] for number in steps[0]}
    for counts in steps:
        members = [CacheRows(pages[number], done[number], count) for number, count in counts.items()]
        tokens = [TOKENS[number][done[number] : done[number] + count] for number, count in counts.items()]
        positions = torch.cat([torch.arange(rows.start, rows.start + rows.count) for rows in members])
        segments, first = [], 0
        for number, count in counts.items():
            if ADAPTER_OF[number] is not None:
                segments.append(Segment(adapters[ADAPTER_OF[number]], first, first + count))
            first += count
        with torch.inference_mode():
            hidden = model.hidden_states(
                torch.cat(tokens), positions, InPlaceAttention(cache, members), SampledLora(segments)
            )
        for (number, count), rows in zip(counts.items(), hidden.split(list(counts.values())), strict=True):
            outputs[number].append(rows)
            done[number] += count
    return {number: torch.cat(rows) for number, rows in outputs.items()}


TOGETHER = [dict(enumerate(LENGTHS))]
IN_TURNS = [{0: 33, 1: 1, 2: 16, 3: 2, 4: 5}, {0: 6, 1: 4, 2: 1, 3: 20, 4: 1}, {0: 1, 3: 1, 4: 3}]


def test_same_as_layer_by_layer(model):
    got = hidden_states(model, IN_TURNS)
    model._lean.step = None
    for number, expected in hidden_states(model, IN_TURNS).items():
        torch.testing.assert_close(got[number], expected[: len(got[number])], atol=5e-6 * expected.abs().max(), rtol=0)


def test_same_bits_in_every_step(model):
    threads = torch.get_num_threads()
    together = hidden_states(model, TOGETHER)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            model._threads.most = count
            for number, rows in hidden_states(model, IN_TURNS).items():
                assert torch.equal(rows, together[number][: len(rows)])
        for number, length in enumerate(LENGTHS):
            one_by_one = hidden_states(model, [{number: length - 3}, {number: 1}, {number: 1}, {number: 1}])
            assert torch.equal(one_by_one[number], together[number])
    finally:
        torch.set_num_threads(threads)
