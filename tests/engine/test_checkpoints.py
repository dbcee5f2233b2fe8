"""Checkpoints: exact resume, PEFT both ways, and refusals that say what does not fit."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.disks import durable, lost
from tests.engine import reference
from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken, together
from tinkercloud.engine.operations import AdamParams, CreateModel, LoadWeights, LoraConfig, OptimStep, SaveWeights
from tinkercloud.engine.peft_layout import read_adapter_config
from tinkercloud.engine.results import Failure, LoadOutput, SaveOutput
from tinkercloud.engine.torch import checkpoints

DATA = [make_datum(100 + i, 6 + 7 * i) for i in range(3)]


def _logprobs(trainer, model_id: str) -> list[np.ndarray]:
    (output,) = run(trainer, forward_backward(model_id, DATA, forward_only=True))
    return [each["logprobs"] for each in output.outputs]


def _train(trainer, model_id: str, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        run(
            trainer,
            forward_backward(model_id, [make_datum(step, 12), make_datum(step + 50, 7)]),
            OptimStep(model_id, AdamParams(1e-2, weight_decay=0.01)),
        )


def test_resume_has_the_same_bits(trainer_of, tmp_path):
    """Moments, step count and a half-accumulated gradient come back exactly."""
    straight, resumed = trainer_of(), trainer_of()
    run(straight, CreateModel("m", LoraConfig(rank=4, seed=11)))
    _train(straight, "m", 2)
    run(straight, forward_backward("m", DATA))
    folder = str(tmp_path / "state")
    (saved,) = run(straight, SaveWeights("m", folder, with_optimizer=True, with_gradients=True))
    assert isinstance(saved, SaveOutput)
    assert saved.size_bytes == sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    (loaded,) = run(resumed, LoadWeights("other", folder, with_optimizer=True, with_gradients=True))
    assert loaded == LoadOutput(LoraConfig(rank=4, seed=11))
    for trainer, name in ((straight, "m"), (resumed, "other")):
        run(trainer, OptimStep(name, AdamParams(1e-2)))
        _train(trainer, name, 2, first=2)
    assert torch.equal(parameters_of(straight, "m"), parameters_of(resumed, "other"))


def test_loading_weights_alone_forgets_moments_and_gradients(trainer_of, tmp_path):
    trainer = trainer_of()
    run(trainer, *shaken("m"), forward_backward("m", DATA))
    folder = str(tmp_path / "state")
    run(trainer, SaveWeights("m", folder, with_optimizer=True, with_gradients=True))
    before = parameters_of(trainer, "m").clone()
    _train(trainer, "m", 1)
    run(trainer, LoadWeights("m", folder))
    adapter = trainer._adapters["m"]
    assert torch.equal(adapter.parameters, before)
    assert (adapter.moments, adapter.gradient, adapter.steps) == ({}, None, 0)


def test_a_fresh_models_state_comes_back(trainer_of, tmp_path):
    """No moments and no gradients are a state too."""
    trainer = trainer_of()
    folder = str(tmp_path / "state")
    run(trainer, CreateModel("m", LoraConfig(rank=4)), SaveWeights("m", folder, True, True))
    (loaded,) = run(trainer, LoadWeights("n", folder, True, True))
    assert isinstance(loaded, LoadOutput)
    _train(trainer, "m", 1)
    _train(trainer, "n", 1)
    assert torch.equal(parameters_of(trainer, "m"), parameters_of(trainer, "n"))


@pytest.mark.parametrize("parts", [{}, {"train_mlp": False, "train_unembed": False}, {"train_attn": False}])
def test_peft_loads_a_checkpoint(trainer_of, model_folder, family, parts, tmp_path):
    trainer = trainer_of(family)
    run(trainer, *shaken("m", **parts), SaveWeights("m", str(tmp_path / "adapter")))
    plain = reference.load_peft(model_folder(family), tmp_path / "adapter")
    for datum, logprobs in zip(DATA, _logprobs(trainer, "m"), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(logprobs, reference.target_logprobs(plain, datum), atol=1e-5, rtol=0)
    base = reference.load_plain(model_folder(family))
    assert np.abs(logprobs - reference.target_logprobs(base, datum).detach().numpy()).max() > 1e-2


FOREIGN = {
    "suffixes": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "regex": dict(r=3, lora_alpha=16, target_modules=r".*layers\.1\..*(up|o)_proj"),
    "unembedding": dict(r=2, lora_alpha=2, target_modules=["lm_head", "k_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["gate_proj", "q_proj"]),
}


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_adapter_made_by_peft_is_imported_and_goes_back(trainer_of, model_folder, family, config, tmp_path):
    made = reference.new_peft(model_folder(family), **config)
    made.save_pretrained(tmp_path / "made")
    trainer = trainer_of(family)
    (loaded,) = run(trainer, LoadWeights("m", str(tmp_path / "made")))
    assert isinstance(loaded, LoadOutput), loaded
    assert loaded.lora == read_adapter_config(tmp_path / "made")
    assert loaded.lora.rank == config["r"]
    run(trainer, SaveWeights("m", str(tmp_path / "again")))
    again = reference.load_peft(model_folder(family), tmp_path / "again")
    for datum, logprobs in zip(DATA, _logprobs(trainer, "m"), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(logprobs, reference.target_logprobs(made, datum), atol=1e-5, rtol=0)
            np.testing.assert_allclose(logprobs, reference.target_logprobs(again, datum), atol=1e-5, rtol=0)
    _train(trainer, "m", 1)
    assert not np.array_equal(_logprobs(trainer, "m")[0], logprobs)


def test_a_name_is_taken_until_it_is_replaced_whole(trainer_of, tmp_path):
    trainer = trainer_of()
    run(trainer, *shaken("m"))
    folder = tmp_path / "runs" / "one"
    save = SaveWeights("m", str(folder), with_optimizer=True)
    assert isinstance(run(trainer, save)[0], SaveOutput)
    _train(trainer, "m", 1)
    (failure,) = run(trainer, save)
    assert isinstance(failure, Failure)
    assert "already a checkpoint 'one'" in failure.error
    (replaced,) = run(trainer, SaveWeights("m", str(folder), replace=True))
    assert isinstance(replaced, SaveOutput)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    (loaded,) = run(trainer, LoadWeights("n", str(folder)))
    assert isinstance(loaded, LoadOutput)
    assert torch.equal(parameters_of(trainer, "n"), parameters_of(trainer, "m"))


def test_what_is_saved_together_is_each_ones_own(trainer_of, tmp_path, monkeypatch):
    trainer = trainer_of()
    names = [f"m{number}" for number in range(4)]
    for number, name in enumerate(names):
        run(trainer, CreateModel(name, LoraConfig(rank=2, seed=number)))
    (tmp_path / "m1").mkdir()
    sync = checkpoints._sync

    def unreliable(folder):
        if folder.name.startswith(".m3."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(folder)

    monkeypatch.setattr(checkpoints, "_sync", unreliable)
    saved = together(trainer, *(SaveWeights(name, str(tmp_path / name)) for name in names))
    assert [type(result) for result in saved] == [SaveOutput, Failure, SaveOutput, Failure]
    assert [result.category for result in saved[1::2]] == ["user", "server"]
    assert "could not be written ([Errno 28] No space" in saved[3].error
    for name in ("m0", "m2"):
        run(trainer, LoadWeights(f"{name} again", str(tmp_path / name)))
        assert torch.equal(parameters_of(trainer, f"{name} again"), parameters_of(trainer, name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]


def test_a_power_cut_takes_nothing_of_what_was_saved(trainer_of, tmp_path, monkeypatch):
    trainer = trainer_of()
    run(trainer, CreateModel("m", LoraConfig(rank=2)))
    kept = durable(monkeypatch)
    for folder in (tmp_path / "checkpoints" / "run" / "weights" / name / "1" for name in ("first", "second")):
        run(trainer, SaveWeights("m", str(folder), with_optimizer=True))
        assert lost(kept, folder, tmp_path) == []


# ---------------------------------------------------------------- refusals


def _edit_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder, edit, metadata=None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

SPOILED = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "no checkpoint folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "bad config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "cut off": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"abc"), "is damaged or cut short"),
    "dora": (lambda folder: _edit_config(folder, use_dora=True), "DoRA"),
    "bias": (lambda folder: _edit_config(folder, bias="all"), "biases"),
    "modules": (lambda folder: _edit_config(folder, modules_to_save=["norm"]), "modules_to_save"),
    "pissa": (lambda folder: _edit_config(folder, init_lora_weights="pissa_niter_4"), "changes the base model"),
    "kind": (lambda folder: _edit_config(folder, peft_type="IA3"), "only LoRA"),
    "r": (lambda folder: _edit_config(folder, r="8"), "r \\(a positive integer\\)"),
    "rank": (lambda folder: _edit_config(folder, r=64), "rank 64 need a float \\[64, 32\\]"),
    "shape": (lambda folder: _edit_config(folder, r=7), "rank 7 need a float \\[7, 32\\]"),
    "key": (lambda folder: _edit_weights(folder, lambda t: t.update(x=torch.zeros(1))), "'x', which is not a LoRA"),
    "half": (lambda folder: _edit_weights(folder, lambda t: t.pop(KEY)), "lacks base_model"),
    "module": (
        lambda folder: _edit_weights(
            folder, lambda t: t.update({key.replace("layers.0", "layers.9"): t[key].clone() for key in list(t)})
        ),
        "no adaptable layer",
    ),
    "changed base": (
        lambda folder: _edit_weights(
            folder, lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(96, 32)})
        ),
        "changed 'lm_head.weight'",
    ),
    "NaN": (lambda folder: _edit_weights(folder, lambda t: t[KEY].fill_(float("nan"))), "NaN"),
    "base": (lambda folder: _edit_weights(folder, lambda t: None, {"base_model": "llama"}), "belongs to base model"),
    "optimizer": (lambda folder: (folder / "optimizer.safetensors").unlink(), "has no optimizer.safetensors"),
}


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "gradients"])
def test_a_flipped_bit_is_noticed(trainer_of, name, tmp_path):
    """It is a number like any other, so that nothing but the checksum tells."""
    trainer, folder = trainer_of(), tmp_path / "adapter"
    whole = SaveWeights("m", str(folder), with_optimizer=True, with_gradients=True)
    run(trainer, *shaken("m"), forward_backward("m", DATA), OptimStep("m", AdamParams(1e-3)))
    run(trainer, forward_backward("m", DATA), whole)
    file = folder / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    load = LoadWeights("m", str(folder), with_optimizer=True, with_gradients=True)
    (failure,) = run(trainer, load)
    assert isinstance(failure, Failure) and f"{file.name} of the checkpoint is damaged" in failure.error
    content[-9] ^= 1
    file.write_bytes(content)
    assert not isinstance(run(trainer, load)[0], Failure)
    (folder / "checksums.json").write_text("[]")
    (failure,) = run(trainer, load)
    assert isinstance(failure, Failure) and "checksums.json" in failure.error


@pytest.mark.parametrize("spoil, words", SPOILED.values(), ids=SPOILED.keys())
def test_what_does_not_fit_is_named_and_changes_nothing(trainer_of, spoil, words, tmp_path):
    trainer = trainer_of()
    folder = tmp_path / "adapter"
    run(trainer, *shaken("m"), SaveWeights("m", str(folder), with_optimizer=True), forward_backward("m", DATA))
    before = parameters_of(trainer, "m").clone(), gradient_of(trainer, "m").clone()
    (folder / "checksums.json").unlink()  # as another program's
    spoil(folder)
    for model_id in ("m", "new"):
        (failure,) = run(trainer, LoadWeights(model_id, str(folder), with_optimizer=True))
        assert isinstance(failure, Failure), failure
        assert failure.category == "user", failure.error
        assert re.search(words, failure.error), failure.error
    assert torch.equal(parameters_of(trainer, "m"), before[0])
    assert torch.equal(gradient_of(trainer, "m"), before[1])
    assert "new" not in trainer._adapters


def test_another_layout_needs_a_new_model(trainer_of, tmp_path):
    trainer = trainer_of()
    run(trainer, *shaken("a", rank=4), *shaken("b", rank=8), SaveWeights("a", str(tmp_path / "a")))
    (failure,) = run(trainer, LoadWeights("b", str(tmp_path / "a")))
    assert isinstance(failure, Failure)
    assert "create a new model" in failure.error


def test_an_adapter_folder_is_described_without_torch(trainer_of, tmp_path):
    trainer = trainer_of()
    run(
        trainer,
        CreateModel("m", LoraConfig(rank=4, alpha=8, seed=-2, train_mlp=False)),
        SaveWeights("m", str(tmp_path / "a")),
    )
    code = (
        "import sys; from tinkercloud.engine.peft_layout import read_adapter_config; "
        f"print(read_adapter_config({str(tmp_path / 'a')!r})); assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(LoraConfig(rank=4, alpha=8.0, seed=-2, train_mlp=False))
