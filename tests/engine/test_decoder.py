"""The lean decoder against transformers' own modules, which run with the same attention and the same LoRA layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.torch.attention import PackedAttention
from tinkercloud.engine.torch.lora import BASE_ONLY
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.trainer import TorchTrainer

SHAPE = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "llama-yarn": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2-windows": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=9),
}
LENGTHS = [13, 13, 40, 6]
TOKENS = torch.arange(72) * 31 % 96
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def models(request, tmp_path) -> tuple[BaseModel, BaseModel]:
    """The same weights, run by the lean decoder and by the modules."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(tmp_path)
    lean, modules = (
        BaseModel.load(EngineOptions(name="it", source=str(tmp_path), device="cpu", max_rank=32)) for _ in range(2)
    )
    assert lean._lean is not None
    modules._lean = None
    return lean, modules


@torch.no_grad()
def test_hidden_states(models):
    got, expected = (model.hidden_states(TOKENS, POSITIONS, PackedAttention(LENGTHS), BASE_ONLY) for model in models)
    torch.testing.assert_close(got, expected, atol=5e-6 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("parts", [{}, {"train_attn": False}, {"train_mlp": False, "train_unembed": False}], ids=str)
def test_gradients(models, parts):
    data = [make_datum(i, length) for i, length in enumerate(LENGTHS)]
    gradients = []
    for model in models:
        trainer = TorchTrainer(model, EngineOptions(name="it", source=""))
        run(trainer, *shaken("m", **parts), forward_backward("m", data))
        gradients.append(gradient_of(trainer, "m"))
    torch.testing.assert_close(*gradients, atol=1e-5 * gradients[1].abs().max().item(), rtol=0)


def test_fused_weights_are_the_modules_own(models):
    """Nothing is held twice: the modules' weights are views of the fused ones."""
    for model in models:
        held = {tensor.untyped_storage().data_ptr(): tensor for tensor in model._model.state_dict().values()}
        numbers = sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in held.values())
        assert numbers == model.info.num_parameters
        groups = {layer.group for layer in model.linears}
        assert len(groups) == 3 * 4 + 1
