"""Architectures that are refused when they load, and that this is known before, in the same words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    T5Config,
)

from tests.engine.families.conftest import FAMILIES
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.architecture import refusal_of
from tinkercloud.engine.torch.model import BaseModel

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip

REFUSED = {
    "no linear layers": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2),
        r"h\.0\.attn\.c_attn, a Conv1D, would stay",
    ),
    "none of the names": (
        GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ),
        "query_key_value, a Linear, would stay without LoRA",
    ),
    "only attention has the names": (
        OPTConfig(
            vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64,
        ),
        "fc1, a Linear, would stay without LoRA",
    ),
    "one layer for q, k and v": (Phi3Config(**SHAPE), "gate_up_proj would stay without LoRA"),
    "positions that depend on the batch": (
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "longest sequence in a batch",
    ),
}  # fmt: skip


def _options(folder) -> EngineOptions:
    return EngineOptions(name="it", source=str(folder), device="cpu")


@pytest.mark.parametrize("config, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_known_without_weights(config, words, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(OperationError, match=words) as refused:
        BaseModel.load(_options(tmp_path))
    assert refusal_of(_options(tmp_path)) == str(refused.value)


def test_what_is_no_causal_language_model_is_known_without_weights(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(OperationError, match="as a causal language model: Unrecognized configuration class") as refused:
        BaseModel.load(_options(tmp_path))
    assert refusal_of(_options(tmp_path)) == str(refused.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "who_knows"}))
    with pytest.raises(OperationError, match="transformers does not know this model") as refused:
        BaseModel.load(_options(tmp_path))
    assert refusal_of(_options(tmp_path)) == str(refused.value)


def test_recurrent_models_are_refused_either_way(tmp_path):
    """That their tokens meet outside of attention shows in numbers alone; that LoRA has no part in it, without them."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(OperationError, match="MambaForCausalLM is not supported"):
        BaseModel.load(_options(tmp_path))
    assert "MambaForCausalLM is not supported: its layer" in refusal_of(_options(tmp_path))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_what_is_served_is_not_refused(config, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    assert refusal_of(_options(tmp_path)) is None
