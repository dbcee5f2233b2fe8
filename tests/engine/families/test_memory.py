"""What each family's passes and samplers take, against what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.torch import attention
from tinkercloud.engine.torch.activations import _bytes_per_token
from tinkercloud.engine.torch.attention import PackedAttention
from tinkercloud.engine.torch.lora import BASE_ONLY
from tinkercloud.engine.torch.sampler import TorchSampler


@pytest.mark.parametrize("lengths", [[2] * 256, [1, 2] * 16, [63] * 4, [65] * 4, [200]], ids=lambda own: str(own[:2]))
def test_a_pass_keeps_no_more_than_its_budget_says(family, base_model, lengths):
    model = base_model(family)
    memory = model.info.activations
    assert _bytes_per_token(model, lengths, recompute=False) < memory.per_token
    assert _bytes_per_token(model, lengths, recompute=True) < memory.per_token_recomputed


class Masks(TorchDispatchMode):
    """How many causal masks were made."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.tril.default, torch.ops.aten.tril_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_a_pass_makes_one_mask_for_all_layers(family, base_model):
    model = base_model(family)
    positions = torch.arange(20)
    with Masks() as masks, torch.no_grad():
        model.hidden_states(positions, positions, PackedAttention([20]), BASE_ONLY)
    assert masks.count == 1


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numbers = max(self.numbers, output.untyped_storage().nbytes() // output.itemsize)
        return output


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_windows_are_looked_through_by_parts_and_nothing_is_square(family, base_model, monkeypatch):
    """The numbers are those of a mask over the whole sequence."""
    model, lengths = base_model(family), [100, 41, 41, 3]
    tokens = torch.arange(sum(lengths)) * 7 % model.info.vocab_size
    positions = torch.cat([torch.arange(length) for length in lengths])

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return model.hidden_states(tokens, positions, PackedAttention(lengths), BASE_ONLY)

    whole = hidden()
    monkeypatch.setattr(attention, "WINDOW_QUERIES", 16)
    torch.testing.assert_close(hidden(), whole, atol=1e-5, rtol=1e-5)
    query, key, value = (torch.randn(1, 4, 600, 16) for _ in range(3))
    for sinks in (None, torch.zeros(4)):
        with Largest() as largest:
            PackedAttention([600])(0, query, key, value, scaling=0.25, sliding_window=8, sinks=sinks)
        assert largest.numbers < 600 * 600 / 4


def test_a_small_cache_says_what_it_holds_and_how_many_decode(base_model, caplog):
    model = base_model("qwen3_5")
    with caplog.at_level(logging.WARNING):
        TorchSampler(model, EngineOptions("qwen3_5", model.info.folder, kv_cache_bytes=40_000, max_decode_batch=8))
    decoding, pages = (record.getMessage() for record in caplog.records)
    # A state is 3 rows of 128 numbers and 4 heads of 16 x 16, in float32: 5632 bytes, so three fit in 20000.
    assert decoding.startswith("at most 3 sequences of qwen3_5 decode together, not max_decode_batch = 8")
    # 40000 - 3 * 5632 bytes hold five pages of 16 tokens of 64 numbers, one of them of zeros.
    assert pages.startswith(
        "kv_cache_bytes = 40000 holds, beside 16896 bytes for decode windows and states, 64 tokens of qwen3_5, less "
        "than one context of 256"
    )
