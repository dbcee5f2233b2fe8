"""Tiny random models of all families in docs/models.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from tests.engine.examples import VOCAB
from tests.engine.precision import DEVICE, DTYPE
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.torch.model import BaseModel

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
    initializer_range=0.2,
)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
_GATED_DELTA = dict(
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)
_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)

FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SHAPE, sliding_window=6),
    "llama3": LlamaConfig(
        **_SHAPE,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, **_EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]),
    "gemma3": Gemma3TextConfig(
        **_SHAPE,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
        },
    ),
    "gpt_oss": GptOssConfig(
        **_SHAPE,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(**_YARN, beta_fast=32.0, beta_slow=1.0, truncate=False),
        attention_bias=True,
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**_SHAPE, "num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=12,
        kv_lora_rank=12,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=1,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=16,
        rope_parameters=dict(**_YARN, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "qwen3_5": Qwen3_5TextConfig(**_SHAPE, **_GATED_DELTA),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(
        **{name: value for name, value in _SHAPE.items() if name != "intermediate_size"},
        **_GATED_DELTA,
        **_EXPERTS,
        shared_expert_intermediate_size=24,
    ),
    "qwen3_next": Qwen3NextConfig(
        **_SHAPE, **_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=24, decoder_sparse_step=1
    ),
}


def every_day(*families: str) -> list:
    """All families, of which only these are run outside of `make test-engines`."""
    return [pytest.param(name, marks=() if name in families else pytest.mark.slow) for name in FAMILIES]


def _save(family: str, folder: Path) -> Path:
    """Write a random model to `folder`, the same one every time; nothing in it is exactly zero or one."""
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "norm.weight", "sinks")):
            tensor.data += torch.randn_like(tensor) * 0.1
        if name.endswith("A_log"):
            tensor.data.uniform_(-4, -1)  # Slow decays: what a state holds is many tokens'.
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """family -> folder of its saved model."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = _save(family, tmp_path_factory.mktemp("families") / family)
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def base_model(model_folder):
    """family -> its `BaseModel`, shared by all tests (it is frozen); see `precision`."""
    models: dict[str, BaseModel] = {}

    def model_of(family: str) -> BaseModel:
        if family not in models:
            folder = str(model_folder(family))
            models[family] = BaseModel.load(EngineOptions(family, folder, device=DEVICE, dtype=DTYPE, max_rank=32))
        return models[family]

    return model_of


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param
