"""What is said of a base model's files that are not there, or not what they should be."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.fingerprint import fingerprint_of
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch import model
from tinkercloud.engine.torch.loading import weights_of
from tinkercloud.engine.torch.model import BaseModel


@pytest.fixture
def logged(caplog):
    """What was logged, by transformers too, which passes nothing on to others' handlers."""
    caplog.set_level(logging.WARNING, logger="tinkercloud")
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logging.getLogger("transformers").removeHandler(caplog.handler)


def _load(folder, **options) -> BaseModel:
    return BaseModel.load(EngineOptions(name="it", source=str(folder), device="cpu", **options))


def _with_other_weights(source, folder, change):
    """A copy of a model's folder whose weights `change` has changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_cannot_be_loaded_says_why(model_folder, tmp_path):
    with pytest.raises(OperationError, match="there is no folder /nowhere/at/all"):
        _load("/nowhere/at/all")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OperationError, match=r"no config\.json"):
        _load(empty)
    (empty / "config.json").write_text(json.dumps({"model_type": "who_knows"}))
    with pytest.raises(OperationError, match=r"no \*\.safetensors"):
        _load(empty)
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(OperationError, match=r"transformers cannot read its config\.json: The checkpoint"):
        _load(empty)
    with pytest.raises(OperationError, match="above the model's own 256"):
        _load(model_folder("qwen3"), max_context=257)
    with pytest.raises(OperationError, match="dtype 'int8' is not one of"):
        _load(model_folder("qwen3"), dtype="int8")


def test_an_index_of_weights_that_is_none_is_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(OperationError, match=f"the files in {folder} are not all there, or damaged: AttributeError"):
        _load(folder)


def test_a_damaged_weights_file_is_refused(model_folder, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in model_folder("qwen3").iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: 500 if path.suffix == ".safetensors" else None])
    with pytest.raises(OperationError, match="damaged or cut short"):
        _load(folder)


@pytest.mark.parametrize("changes", [1, 2])
def test_a_fingerprint_is_of_the_bytes_that_were_loaded(changes, model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "m")
    writes = iter(range(changes))

    def weights_then_a_change(*args):
        loaded = weights_of(*args)
        if next(writes, None) is not None:
            tensors = load_file(folder / "model.safetensors")
            tensors[UP] = tensors[UP].neg()
            save_file(tensors, folder / "new", {"format": "pt"})
            (folder / "new").replace(folder / "model.safetensors")
        return loaded

    monkeypatch.setattr(model, "weights_of", weights_then_a_change)
    if changes == 2:
        with pytest.raises(OperationError, match="they changed meanwhile; load them when they are complete"):
            _load(folder)
        return
    loaded = _load(folder)
    assert torch.equal(loaded.parameter(UP), load_file(folder / "model.safetensors")[UP])
    assert loaded.info.fingerprint == fingerprint_of(folder) != fingerprint_of(model_folder("llama"))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop(UP), rf"^its files lack 1 weights, such as {UP}$"),
        (lambda tensors: tensors.update({UP: torch.zeros(3, 5)}), rf"^its weight {UP} has the shape \[3, 5\], and by"),
    ],
    ids=["missing", "of another shape"],
)
def test_weights_that_do_not_fit_are_not_made_up(change, words, model_folder, tmp_path, logged):
    with pytest.raises(OperationError, match=words):
        _load(_with_other_weights(model_folder("llama"), tmp_path / "m", change))
    assert logged() == []


def test_experts_that_cannot_be_fused_are_named(tmp_path, logged):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    one = "model.layers.0.mlp.experts.1.up_proj.weight"
    folder = _with_other_weights(tmp_path / "m", tmp_path / "less", lambda tensors: tensors.pop(one))
    with pytest.raises(OperationError, match=r"make up model\.\S*\.experts\.gate_up_proj.* size 4 but got size 3"):
        _load(folder)
    assert logged() == []


def test_weights_of_no_use_are_warned_of_in_one_line(model_folder, tmp_path, logged):
    more = {"visual.x": torch.zeros(3), "visual.y": torch.zeros(3)}
    _load(_with_other_weights(model_folder("llama"), tmp_path / "m", lambda tensors: tensors.update(more)))
    assert logged() == [
        "it: its files have 2 weights that are of no part of a LlamaForCausalLM and are left out, such as visual.x"
    ]
