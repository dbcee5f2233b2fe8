"""What training computes on each family, judged by transformers + PEFT in float32, one datum at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine import reference
from tests.engine.examples import forward_backward, make_datum, run, shaken, together
from tests.engine.families.conftest import FAMILIES
from tests.engine.precision import EXACT, assert_as_near, assert_logprobs, assert_sum, assert_tensors
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import AdamParams, LoadWeights, OptimStep, SaveWeights
from tinkercloud.engine.results import Failure, LossOutput
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.trainer import TorchTrainer

PARTS = {
    "all": dict(rank=8),
    "attn": dict(rank=4, train_mlp=False, train_unembed=False),
    "mlp": dict(rank=2, train_attn=False, train_unembed=False),
}
RAGGED = {
    "all": [make_datum(1, 5), make_datum(2, 23), make_datum(3, 23), make_datum(4, 1)],
    "attn": [make_datum(5, 17, several=3), make_datum(6, 9)],
    "mlp": [make_datum(7, 30, targets=11), make_datum(8, 2), make_datum(9, 5)],
}
ADAM = AdamParams(learning_rate=0.1, eps=0.1)
"""Where a step hangs on a gradient's size, not on the sign of one that is nearly zero."""


def _load(trainer: TorchTrainer, folder) -> None:
    """Adapters with nothing at zero, and no optimizer state."""
    for name, lora in PARTS.items():
        saved = SaveWeights(name, str(folder / name))
        results = run(trainer, *shaken(name, **lora), saved, LoadWeights(name, saved.folder))
        assert not any(isinstance(result, Failure) for result in results), results


@pytest.mark.device
def test_a_ragged_batch_of_several_adapters_and_a_step_equal_peft(family, trainer_of, model_folder, tmp_path):
    trainer, routed = trainer_of(family), hasattr(FAMILIES[family], "num_experts_per_tok")
    _load(trainer, tmp_path)
    results = together(trainer, *(forward_backward(name, RAGGED[name]) for name in PARTS))
    numbers = []
    for name, result in zip(PARTS, results, strict=True):
        assert isinstance(result, LossOutput)
        plain = reference.load_peft(model_folder(family), tmp_path / name, trainable=True)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.95), eps=0.1, weight_decay=0.0)
        loss, logprobs = reference.cross_entropy(plain, RAGGED[name])
        assert_sum(result.metrics["loss:sum"], loss, sum(part.numel() for part in logprobs))
        sides = [[output["logprobs"] for output in result.outputs], logprobs]
        if not EXACT:
            alike = reference.load_alike(model_folder(family), tmp_path / name)
            with torch.no_grad():
                sides.append([reference.target_logprobs(alike, datum) for datum in RAGGED[name]])
        numbers.append([np.concatenate([np.ravel(part) for part in side]) for side in sides])

        after = tmp_path / f"{name}-after"
        run(trainer, SaveWeights(name, str(tmp_path / f"{name}-before"), with_gradients=True))
        run(trainer, OptimStep(name, ADAM), SaveWeights(name, str(after)))
        gradients = reference.saved_gradients(tmp_path / f"{name}-before")
        assert_tensors(gradients, reference.lora_gradients(plain), routed=routed)
        optimizer.step()
        weights = load_file(after / "adapter_model.safetensors")
        # A step divides small gradients by little: an error relative to the largest gradient is an absolute one here.
        stepped = {key: weights[key] for key in gradients}
        assert_tensors(stepped, reference.lora_parameters(plain), atol=3e-5, routed=routed)

    ours, exact, *theirs = (np.concatenate(side) for side in zip(*numbers, strict=True))
    assert_logprobs(ours, exact) if EXACT else assert_as_near(ours, *theirs, exact)


def test_half_precision_is_near(family, trainer_of, model_folder, tmp_path):
    """As near as transformers + PEFT come in half precision."""
    options = EngineOptions(name=family, source=str(model_folder(family)), device="cpu", dtype="bfloat16")
    half = TorchTrainer(BaseModel.load(options), EngineOptions(name=family, source=""))
    saved = SaveWeights("m", str(tmp_path / "m"))
    run(trainer_of(family), *shaken("m"), saved)
    _, output, step = run(
        half, LoadWeights("m", saved.folder), forward_backward("m", RAGGED["all"]), OptimStep("m", ADAM)
    )
    assert not isinstance(step, Failure)
    exact, theirs = (reference.load_peft(model_folder(family), tmp_path / "m") for _ in range(2))
    theirs.to(torch.bfloat16)
    with torch.no_grad():
        exact, theirs = (
            np.concatenate([reference.target_logprobs(model, datum).float() for datum in RAGGED["all"]])
            for model in (exact, theirs)
        )
    ours = np.concatenate([datum["logprobs"] for datum in output.outputs])
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()
