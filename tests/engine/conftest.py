"""Tiny random base models of several families, made once per test run."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tests.engine.examples import VOCAB
from tests.engine.precision import DEVICE, DTYPE
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OpenSampler
from tinkercloud.engine.results import Done
from tinkercloud.engine.torch import batching
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    initializer_range=0.2,
)

FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied": Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=False),
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
}
"""All with grouped-query attention; Qwen2 with biases."""


def save_model(family: str, folder: Path) -> Path:
    """Write a random model of a family to `folder`, the same one every time."""
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """family -> folder of its saved model."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = save_model(family, tmp_path_factory.mktemp("models") / family)
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


@pytest.fixture(params=["qwen3", "llama", "qwen2"])
def family(request) -> str:
    return request.param


@pytest.fixture
def trainer_of(base_model):
    """(family, **options) -> a fresh trainer."""

    def make(family: str = "qwen3", **options) -> TorchTrainer:
        return TorchTrainer(base_model(family), EngineOptions(name=family, source="", **options))

    return make


@pytest.fixture(scope="session")
def reference(model_folder):
    """family, adapter folder or "" -> plain transformers (+ peft) model."""
    models = {}

    def model_of(family: str, adapter: str = ""):
        if (family, adapter) not in models:
            model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).eval()
            models[family, adapter] = peft.PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        return models[family, adapter]

    return model_of


@pytest.fixture(scope="session")
def adapter_folder(model_folder, tmp_path_factory):
    """(family, number) -> folder of a random adapter that peft saved."""
    folders = {}

    def folder_of(family: str, number: int = 0) -> str:
        if (family, number) not in folders:
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32)
            config = peft.LoraConfig(
                r=4 + 4 * number, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
            )
            adapted = peft.get_peft_model(model, config)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            folder = tmp_path_factory.mktemp("adapters") / f"{family}-{number}"
            adapted.save_pretrained(folder)
            folders[family, number] = str(folder)
        return folders[family, number]

    return folder_of


@pytest.fixture
def sampler_of(base_model):
    """family, options -> a fresh sampler with the base model open as "base"; afterwards it must hold no page."""
    samplers = []

    def make(family: str, **options) -> TorchSampler:
        model = base_model(family)
        sampler = TorchSampler(model, EngineOptions(name=family, source=model.info.folder, **options))
        assert sampler.open(OpenSampler("base")) == Done()
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        assert not sampler.busy
        assert sampler.pages_used == 0


@pytest.fixture
def small_chunks(monkeypatch):
    """Prefill in chunks that the tests' prompts are longer than."""
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(batching, "PREFILL_BUDGET", 40)
