"""Loading base models, attention in packs, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    NemotronHConfig,
)

from tests.engine import reference
from tests.engine.examples import run
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CreateModel, LoraConfig, OperationError
from tinkercloud.engine.results import Done, Failure
from tinkercloud.engine.torch.adapter import layout_of
from tinkercloud.engine.torch.attention import PackedAttention, dense_attention
from tinkercloud.engine.torch.lora import BASE_ONLY
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.trainer import TorchTrainer

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
)


def _saved(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _load(folder, **options) -> BaseModel:
    return BaseModel.load(EngineOptions(name="it", source=str(folder), device="cpu", **options))


def _packed_logits(model: BaseModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden = model.hidden_states(torch.cat(sequences), positions, PackedAttention(lengths), BASE_ONLY)
        return model.logits(hidden, BASE_ONLY)


def test_info_and_progress(model_folder):
    folder = model_folder("qwen3")
    steps = []
    model = BaseModel.load(
        EngineOptions(name="some/name", source=str(folder), device="cpu", max_rank=4, max_context=100),
        lambda fraction, what: steps.append(fraction),
    )
    info = model.info
    assert (info.name, info.folder, info.architecture) == ("some/name", str(folder), "Qwen3ForCausalLM")
    assert (info.vocab_size, info.max_context, info.max_rank, info.eos_tokens) == (96, 100, 4, (1,))
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.num_parameters == sum(parameter.numel() for parameter in reference.load_plain(folder).parameters())
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 1)
    assert [layer.name for layer in model.linears][-1] == "lm_head"


def test_end_of_sequence_ids_come_from_both_configurations(tmp_path):
    folder = _saved(MistralConfig(**SHAPE), tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1, 7]}))
    assert _load(folder).info.eos_tokens == (5, 1, 7)


def test_a_pack_equals_its_sequences_alone(model_folder, base_model, family):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 96, (length,), generator=generator) for length in (7, 7, 1, 12, 7)]
    plain = reference.load_plain(model_folder(family))
    expected = torch.cat([plain(input_ids=sequence[None]).logits[0] for sequence in sequences])
    torch.testing.assert_close(_packed_logits(base_model(family), sequences), expected, atol=1e-5, rtol=0)


def test_sliding_windows(tmp_path):
    folder = _saved(MistralConfig(**SHAPE, sliding_window=4, initializer_range=0.2), tmp_path / "m")
    sequences = [torch.arange(3), torch.arange(20) * 3 % 64, torch.arange(20)]
    plain = reference.load_plain(folder)
    expected = torch.cat([plain(input_ids=sequence[None]).logits[0] for sequence in sequences])
    torch.testing.assert_close(_packed_logits(_load(folder), sequences), expected, atol=1e-5, rtol=0)


def test_soft_caps():
    """Against the definition, a query at a time; with a cap that is never reached, against no cap."""
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    key, value = key[:, :2], value[:, :2]
    got = dense_attention(query, key, value, scaling=0.3, mask=None, softcap=1.5)
    for head in range(4):
        for last in range(9):
            scores = 1.5 * torch.tanh(0.3 / 1.5 * key[0, head // 2, : last + 1] @ query[0, head, last])
            torch.testing.assert_close(got[0, head, last], scores.softmax(0) @ value[0, head // 2, : last + 1])
    torch.testing.assert_close(
        dense_attention(query, key, value, scaling=0.3, mask=None, softcap=1e5),
        dense_attention(query, key, value, scaling=0.3, mask=None),
        atol=1e-4,
        rtol=1e-4,
    )


UNSUPPORTED = {
    "recurrent": (
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
        "cannot run packed|outside of attention",
    ),
    "convolutions": (
        Lfm2Config(**SHAPE, initializer_range=0.2, layer_types=["conv", "full_attention"]),
        "outside of attention",
    ),
    "logits": (Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0), "changes logits after the unembedding"),
}


@pytest.mark.parametrize("config, words", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_architectures_that_cannot_be_packed_are_refused(config, words, tmp_path):
    with pytest.raises(OperationError, match=words):
        _load(_saved(config, tmp_path / "m"), max_context=64)


def test_parts_that_a_model_has_not_are_named_together(base_model):
    with pytest.raises(OperationError, match=r"no attn and no mlp layers.*; set train_attn and train_mlp to false"):
        layout_of(LoraConfig(rank=4), base_model("llama").linears[-1:])


def test_experts_cannot_be_trained_in_part(tmp_path):
    """Those of Nemotron have no gate; the shared expert beside them has linear layers."""
    config = NemotronHConfig(
        **SHAPE, layers_block_type=["attention", "moe"], n_routed_experts=4, num_experts_per_tok=2, head_dim=8,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, mamba_num_heads=2, mamba_head_dim=8,
    )  # fmt: skip
    model = _load(_saved(config, tmp_path / "m"), max_context=64)
    trainer = TorchTrainer(model, EngineOptions(name="it", source=""))
    failure, done = run(
        trainer, CreateModel("m", LoraConfig(rank=4)), CreateModel("m", LoraConfig(rank=4, train_mlp=False))
    )
    assert isinstance(failure, Failure)
    assert "set train_mlp to false" in failure.error
    assert done == Done()


def test_weights_that_are_no_numbers_are_refused(model_folder, tmp_path):
    """What is computed with one of them need not show it: a short sequence may stay finite."""
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OperationError, match=r"layers\.1\.self_attn\.q_proj\S* have numbers that are not finite"):
        _load(folder)


def test_half_precision(model_folder):
    model = _load(model_folder("qwen3"), dtype="bfloat16")
    assert model.info.dtype == "bfloat16"
    plain = reference.load_plain(model_folder("qwen3"))
    tokens = torch.arange(20)
    logits = _packed_logits(model, [tokens])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain(input_ids=tokens[None]).logits[0], atol=0.5, rtol=0.1)
