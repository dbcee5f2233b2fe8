"""Architectures that are refused when they load, and that this is known before, in the same words."""

from __future__ import annotations

import json
import shutil

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
from tinkercloud.engine.torch import model
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
    with pytest.raises(OperationError, match=r"transformers cannot read its config\.json") as refused:
        BaseModel.load(_options(tmp_path))
    assert refusal_of(_options(tmp_path)) == str(refused.value)


@pytest.mark.parametrize(
    "file, wrong, words",
    [
        ("config.json", {"vocab_size": "many"}, r"read its config\.json: .*'vocab_size' expected int, got str"),
        ("config.json", {"model_type": ["llama"]}, r"cannot read its config\.json: TypeError: unhashable"),
        ("config.json", {"num_attention_heads": 0}, r"cannot read its config\.json: ZeroDivisionError: "),
        ("config.json", {"hidden_act": "nonsense"}, r"its config\.json and weights cannot be .*: KeyError: 'nonsense'"),
        ("config.json", {"quantization_config": [1]}, r"cannot read its config\.json: AttributeError: "),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "are quantised already"),
        ("generation_config.json", [], r"cannot read its generation_config\.json: TypeError: "),
        (
            "generation_config.json",
            {"eos_token_id": ["x"]},
            r"in its generation_config\.json, eos_token_id is 'x', which",
        ),
    ],
)
def test_files_that_are_wrong_are_said_in_a_sentence_with_and_without_weights(
    file, wrong, words, model_folder, tmp_path
):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "m")
    content = json.loads((folder / file).read_text()) | wrong if wrong else wrong
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(OperationError, match=words) as refused:
        BaseModel.load(_options(folder))
    assert refusal_of(_options(folder)) == str(refused.value)


def test_what_a_mistake_of_ours_raises_is_a_sentence_and_the_log_has_where(model_folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(model, "row_multiple_of", lambda outputs: 1 // 0)
    with pytest.raises(OperationError, match=r"made of its config\.json and weights: ZeroDivisionError: ") as refused:
        BaseModel.load(_options(model_folder("llama")))
    assert "row_multiple_of(outputs" in caplog.text and isinstance(refused.value.__cause__, ZeroDivisionError)


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
