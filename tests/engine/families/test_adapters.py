"""Adapters of fused experts as PEFT writes and reads them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.engine import reference
from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken
from tests.engine.families.conftest import FAMILIES
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CreateModel, DimuonParams, LoadWeights, LoraConfig, OptimStep, SaveWeights
from tinkercloud.engine.published_layout import write_published
from tinkercloud.engine.results import Failure
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.optimizer_dimuon import direction
from tinkercloud.engine.torch.trainer import TorchTrainer

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DATA = [make_datum(1, 12), make_datum(2, 30)]


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe"])
def family(request) -> str:
    return request.param


def test_an_adapter_made_by_peft_is_imported_and_goes_back(family, trainer_of, model_folder, tmp_path):
    plain = reference.new_peft(
        model_folder(family), r=4, lora_alpha=12, target_modules=["o_proj"], target_parameters=EXPERTS
    )
    plain.save_pretrained(tmp_path / "theirs")
    trainer = trainer_of(family)
    _, output, _ = run(
        trainer,
        LoadWeights("m", str(tmp_path / "theirs")),
        forward_backward("m", DATA, forward_only=True),
        SaveWeights("m", str(tmp_path / "ours")),
    )
    for datum, mine in zip(DATA, output.outputs, strict=True):
        with torch.no_grad():
            expected = reference.target_logprobs(plain, datum)
        np.testing.assert_allclose(mine["logprobs"], expected, atol=1e-5, rtol=0)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_checkpoint_restores_every_bit(family, trainer_of, tmp_path):
    trainer = trainer_of(family)
    run(trainer, *shaken("m"), forward_backward("m", DATA))
    whole = dict(with_optimizer=True, with_gradients=True)
    run(trainer, SaveWeights("m", str(tmp_path / "m"), **whole), LoadWeights("n", str(tmp_path / "m"), **whole))
    assert torch.equal(parameters_of(trainer, "m"), parameters_of(trainer, "n"))
    assert torch.equal(gradient_of(trainer, "m"), gradient_of(trainer, "n"))
    one, other = (trainer._adapters[name].moments for name in "mn")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fresh_experts_are_uniform_and_each_its_own(family, trainer_of):
    trainer = trainer_of(family)
    run(trainer, CreateModel("m", LoraConfig(rank=8, seed=3)))
    for pair in filter(None, trainer._adapters["m"].weights.pairs):
        a, b = pair
        assert not b.any()
        bound = 1 / math.sqrt(a.shape[-1])
        assert 0.9 * bound < a.abs().max() <= bound
        if a.ndim == 3:
            assert not any(torch.equal(a[0], other) for other in a[1:])


def test_dimuon_steps_each_expert_by_itself(family, trainer_of):
    trainer = trainer_of(family)
    run(trainer, *shaken("m", 4)[:1])
    create = CreateModel("d", LoraConfig(rank=4, seed=1), optimizer="dimuon")
    run(trainer, create, forward_backward("d", DATA))
    adapter = trainer._adapters["d"]
    gradient, before = adapter.gradient.clone(), adapter.parameters.clone()
    run(trainer, OptimStep("d", DimuonParams(learning_rate=0.1)))
    layout = adapter.layout
    for moved, old, slope in zip(*map(layout.views, (adapter.parameters, before, gradient)), strict=True):
        if old is None or old[0].ndim == 2:
            continue
        for expert, momentum in enumerate(slope[1] * 0.1):
            a = old[0][expert].double()
            step = direction(momentum[None], (a @ a.t())[None])[0] * (0.1 * 4 / 32)
            torch.testing.assert_close(moved[1][expert], old[1][expert] - step, atol=1e-6, rtol=1e-5)


def test_the_published_form_says_the_same(family, trainer_of, model_folder, tmp_path):
    """The change of every expert's weights, from its factors there and as PEFT merges ours."""
    (tmp_path / "published").mkdir()
    run(trainer_of(family), *shaken("m", 4), SaveWeights("m", str(tmp_path / "m")))
    write_published(tmp_path / "m", tmp_path / "published")
    published = load_file(tmp_path / "published" / "adapter_model.safetensors")
    scale = json.loads((tmp_path / "published" / "adapter_config.json").read_text())["lora_alpha"] / 4

    def change(module: str) -> torch.Tensor:
        a, b = (published.pop(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
        return scale * b @ a

    base = dict(reference.load_plain(model_folder(family)).named_parameters())
    merged = reference.load_peft(model_folder(family), tmp_path / "m").merge_and_unload()
    for name, parameter in merged.named_parameters():
        if name not in base or torch.equal(parameter, base[name]):
            continue
        difference = parameter - base[name]
        if name.endswith("gate_up_proj"):
            experts = name.removesuffix(".gate_up_proj")
            gate, up = change(f"{experts}.w1"), change(f"{experts}.w3")
            if family == "gpt_oss":
                difference = difference.transpose(1, 2)
                expected = torch.stack([gate, up], dim=2).flatten(1, 2)
            else:
                expected = torch.cat([gate, up], dim=1)
        elif name.endswith("experts.down_proj"):
            expected = change(name.replace("down_proj", "w2"))
            expected = expected.transpose(1, 2) if family == "gpt_oss" else expected
        else:
            expected = change(name.removesuffix(".weight").replace("lm_head", "model.unembed_tokens"))
        torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)
    assert not published


def test_a_factor_that_all_experts_share_is_published_once(trainer_of, model_folder, tmp_path):
    """As the hosted service does on the side of the model's hidden size: A of w1 and w3, B of w2."""
    (tmp_path / "published").mkdir()
    trainer = trainer_of("qwen3_moe")
    run(trainer, *shaken("m", 4))
    changed = 0
    for pair in filter(None, trainer._adapters["m"].weights.pairs):
        if pair[0].ndim == 3:
            shared = pair[changed % 2]  # gate and up, then down
            shared.copy_(shared[:1].expand_as(shared).clone())
            changed += 1
    assert changed == 2
    run(trainer, SaveWeights("m", str(tmp_path / "m")))
    write_published(tmp_path / "m", tmp_path / "published")
    published = load_file(tmp_path / "published" / "adapter_model.safetensors")
    sizes = {key.split("experts.")[1]: len(tensor) for key, tensor in published.items() if ".mlp.experts." in key}
    assert sizes == {
        f"{layer}.lora_{factor}.weight": 1 if (layer == "w2") == (factor == "B") else 6
        for layer in ("w1", "w2", "w3")
        for factor in "AB"
    }
    base = dict(reference.load_plain(model_folder("qwen3_moe")).named_parameters())
    merged = reference.load_peft(model_folder("qwen3_moe"), tmp_path / "m").merge_and_unload().state_dict()
    experts = "model.layers.1.mlp.experts"
    scale = json.loads((tmp_path / "published" / "adapter_config.json").read_text())["lora_alpha"] / 4
    w1, w2, w3 = (
        scale
        * published[f"base_model.model.{experts}.{layer}.lora_B.weight"]
        @ published[f"base_model.model.{experts}.{layer}.lora_A.weight"]
        for layer in ("w1", "w2", "w3")
    )
    for name, change in {"gate_up_proj": torch.cat([w1, w3], dim=1), "down_proj": w2}.items():
        difference = merged[f"{experts}.{name}"] - base[f"{experts}.{name}"]
        torch.testing.assert_close(difference, change, atol=1e-5, rtol=1e-4)


def test_experts_that_were_adapted_in_part_are_refused(trainer_of, model_folder, tmp_path):
    plain = reference.new_peft(model_folder("qwen3_moe"), r=4, lora_alpha=12, target_parameters=EXPERTS[:1])
    plain.save_pretrained(tmp_path / "part")
    (failure,) = run(trainer_of("qwen3_moe"), LoadWeights("m", str(tmp_path / "part")))
    assert isinstance(failure, Failure)
    assert "in part" in failure.error


def test_experts_of_another_shape_are_refused(trainer_of, tmp_path):
    trainer = trainer_of("qwen3_moe")
    run(trainer, *shaken("m"), SaveWeights("m", str(tmp_path / "m")))
    path = tmp_path / "m" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    tensors[key] = tensors[key][:, :-8].contiguous()
    save_file(tensors, path)
    (path.parent / "checksums.json").unlink()  # as another program's
    (failure,) = run(trainer, LoadWeights("n", str(tmp_path / "m")))
    assert isinstance(failure, Failure)
    assert f"{key} in adapter_model.safetensors is float32 [32, 40]" in failure.error


def test_of_a_multimodal_checkpoint_the_text_model_is_adapted(tmp_path, trainer_of):
    text = FAMILIES["gemma3"].to_dict()
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    whole.save_pretrained(tmp_path / "m")
    model = BaseModel.load(EngineOptions(name="m", source=str(tmp_path / "m"), device="cpu"))
    trainer = TorchTrainer(model, EngineOptions(name="m", source=""))
    *_, output, _ = run(
        trainer, *shaken("a"), forward_backward("a", DATA, forward_only=True), SaveWeights("a", str(tmp_path / "a"))
    )
    plain = reference.load_peft(tmp_path / "m", tmp_path / "a")
    assert {name for name, _ in plain.named_parameters() if "lora" in name and "language_model" not in name} == {
        "base_model.model.lm_head.lora_A.default.weight",
        "base_model.model.lm_head.lora_B.default.weight",
    }
    for datum, mine in zip(DATA, output.outputs, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(mine["logprobs"], reference.target_logprobs(plain, datum), atol=1e-5, rtol=0)
