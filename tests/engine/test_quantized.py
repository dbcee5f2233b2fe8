"""Base models in 8 and 4 bits, judged by transformers and PEFT on what the same library makes of the same files."""

from __future__ import annotations

import sys

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig

from tests.engine import reference, sampler_requests
from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken, together
from tests.engine.sampler_requests import prompt_of, sample
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CreateModel, Datum, LoraConfig, OpenSampler, OperationError, SaveWeights
from tinkercloud.engine.results import Done, LossOutput
from tinkercloud.engine.torch.experts import ExpertsLinear
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.quantized import QuantizedLoraLinear
from tinkercloud.engine.torch.sampler import TorchSampler
from tinkercloud.engine.torch.trainer import TorchTrainer

SHAPE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
DATA = [make_datum(1, 5), make_datum(2, 23), make_datum(3, 23), make_datum(4, 1)]
OF_THE_LIBRARY = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(folder)
    return folder


def load(folder, quantization: str, **options) -> BaseModel:
    return BaseModel.load(
        EngineOptions(name="it", source=str(folder), device="cpu", quantization=quantization, **options)
    )


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def base(request, folder) -> BaseModel:
    return load(folder, request.param)


@pytest.fixture
def trainer(base) -> TorchTrainer:
    return TorchTrainer(base, EngineOptions(name="it", source=""))


def by_the_library(base: BaseModel):
    """The same files, quantised by transformers with the library's defaults."""
    return AutoModelForCausalLM.from_pretrained(
        base.info.folder, dtype=base.dtype, quantization_config=OF_THE_LIBRARY[base.info.quantization]
    ).eval()


def test_the_layers_are_the_librarys(base):
    theirs = by_the_library(base)
    kinds = {layer.name: type(layer) is QuantizedLoraLinear for layer in base.linears}
    assert kinds.pop("lm_head") is False
    assert len(kinds) == 2 * 7
    assert all(kinds.values())
    for layer in base.linears[:-1]:
        assert torch.equal(layer.weight, theirs.get_submodule(layer.name).weight)
    plain = reference.load_plain(base.info.folder)
    assert base.info.num_parameters == plain.num_parameters()
    assert base.weight_bytes < {"8bit": 0.5, "4bit": 0.4}[base.info.quantization] * plain.get_memory_footprint()
    assert f"{base.info.quantization} by bitsandbytes" in base.info.build


def test_training_equals_peft(base, trainer, tmp_path):
    """To float32's rounding, against PEFT over the library's own layers, which multiply as ours do while they train."""
    run(trainer, *shaken("m", rank=4))
    (result,) = run(trainer, forward_backward("m", DATA))
    assert isinstance(result, LossOutput)
    run(trainer, SaveWeights("m", str(tmp_path / "m"), with_gradients=True))
    theirs = peft.PeftModel.from_pretrained(by_the_library(base), tmp_path / "m", is_trainable=True).train()
    assert theirs.peft_config["default"].base_model_name_or_path == "it"
    loss, logprobs = reference.cross_entropy(theirs, DATA)
    assert result.metrics["loss:sum"] == pytest.approx(loss, abs=1e-4)
    for output, expected in zip(result.outputs, logprobs, strict=True):
        np.testing.assert_allclose(output["logprobs"], expected, atol=2e-5, rtol=0)
    gradients, expected_gradients = reference.saved_gradients(tmp_path / "m"), reference.lora_gradients(theirs)
    assert gradients.keys() == expected_gradients.keys()
    for key, expected in expected_gradients.items():
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradients[key], expected, atol=1e-5 * largest, rtol=0)


def test_co_tenants_change_nothing(base, trainer):
    """To the bit, also where another's numbers are a hundred times as large."""
    run(trainer, *shaken("m", rank=4), *shaken("other", rank=4))
    trainer._adapters["other"].parameters.mul_(100)
    (alone,) = run(trainer, forward_backward("m", DATA))
    gradient = gradient_of(trainer, "m").clone()
    beside, _ = together(trainer, forward_backward("m", DATA), forward_backward("other", DATA))
    for left, right in zip(alone.outputs, beside.outputs, strict=True):
        np.testing.assert_array_equal(left["logprobs"], right["logprobs"])
    assert torch.equal(gradient_of(trainer, "m"), 2 * gradient)


def test_samples_carry_the_trainers_logprobs(base, trainer, tmp_path):
    run(trainer, *shaken("m", rank=4), SaveWeights("m", str(tmp_path / "m")))
    sampler = TorchSampler(base, EngineOptions(name="it", source=""))
    assert sampler.open(OpenSampler("s", str(tmp_path / "m"))) == Done()
    prompt = prompt_of(5, 40)
    answers = sampler_requests.run(sampler, sample("r", prompt, "s", max_tokens=20, num_samples=3))
    for sequence in answers["r"].sequences:
        tokens = np.concatenate([prompt, sequence.tokens])
        targets, count = tokens[1:].astype(np.int64), len(sequence.tokens)
        datum = Datum(tokens[:-1], {"target_tokens": targets, "weights": np.ones(len(targets), np.float32)})
        (output,) = run(trainer, forward_backward("m", [datum], forward_only=True))
        np.testing.assert_allclose(sequence.logprobs, output.outputs[0]["logprobs"][-count:], atol=1e-5, rtol=0)


def test_fused_experts_stay_as_they_are(tmp_path):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    config = Qwen3MoeConfig(**SHAPE, **experts, head_dim=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load(tmp_path, "4bit")
    kinds = {layer.name.rpartition(".")[2]: type(layer) for layer in base.linears}
    assert kinds["q_proj"] is QuantizedLoraLinear
    assert kinds["gate_up_proj"] is kinds["down_proj"] is ExpertsLinear
    trainer = TorchTrainer(base, EngineOptions(name="it", source=""))
    run(trainer, *shaken("m", rank=4))
    (result,) = run(trainer, forward_backward("m", DATA))
    assert isinstance(result, LossOutput)
    assert gradient_of(trainer, "m").abs().sum() > 0


def test_half_precision(folder):
    """As on a GPU: as far from float32, over the same weights, as the library's own layers are."""
    base = load(folder, "4bit", dtype="bfloat16")
    trainer = TorchTrainer(base, EngineOptions(name="it", source=""))
    _, result = run(trainer, CreateModel("m", LoraConfig(rank=4)), forward_backward("m", DATA, forward_only=True))
    ours = np.concatenate([output["logprobs"] for output in result.outputs])
    models = by_the_library(base), by_the_library(base).dequantize().float()
    with torch.no_grad():
        theirs, exact = (torch.cat(reference.cross_entropy(model, DATA)[1]).float().numpy() for model in models)
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()
    assert np.abs(theirs - exact).max() < 0.5


def test_refused_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(OperationError, match=r"8bit needs bitsandbytes: pip install -e '.\[quantized\]'"):
        load(folder, "8bit")


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_files_that_are_quantised_already_are_refused(base, tmp_path, quantization):
    by_the_library(base).save_pretrained(tmp_path)
    with pytest.raises(OperationError, match="quantised already"):
        load(tmp_path, quantization)
