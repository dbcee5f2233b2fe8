"""Dimuon against singular value decompositions in float64 numpy; its checkpoints; and beside other optimizers."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, together
from tinkercloud.engine.operations import (
    AdamParams,
    CreateModel,
    DimuonParams,
    LoadWeights,
    LoraConfig,
    OptimStep,
    SaveWeights,
)
from tinkercloud.engine.results import Failure, LoadOutput, StepOutput
from tinkercloud.engine.torch.optimizer_dimuon import DAMPING, inverse_root, matrix_sign

DATA = [make_datum(1, 30), make_datum(2, 40)]


def _sign(x: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def _inverse_root(gram: np.ndarray) -> np.ndarray:
    if not gram.any():
        return np.eye(len(gram))
    values, vectors = np.linalg.eigh(gram + DAMPING * np.trace(gram) / len(gram) * np.eye(len(gram)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def _step(momentum: np.ndarray, other: np.ndarray, rank: int) -> np.ndarray:
    """The direction of a factor [n, r] whose other factor is [m, r]."""
    root = _inverse_root(other.T @ other)
    direction = _sign(momentum @ root) @ root
    return direction * np.sqrt(rank) / np.linalg.norm(direction) if momentum.any() else np.zeros_like(momentum)


def _pairs(trainer, flat: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    views = trainer._adapters["m"].layout.views(flat.double())
    return [(a.numpy().copy(), b.numpy().copy()) for a, b in filter(None, views)]


@pytest.mark.parametrize("rank", [2, 8, 32])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_equal_the_formula(trainer_of, rank, clip):
    """From a fresh adapter, with dense gradients; the ranks reach and pass some layers' widths."""
    trainer = trainer_of()
    run(trainer, CreateModel("m", LoraConfig(rank=rank, seed=2), "dimuon"))
    pairs = _pairs(trainer, parameters_of(trainer, "m"))
    momenta = [(np.zeros_like(a), np.zeros_like(b)) for a, b in pairs]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        run(trainer, forward_backward("m", DATA))
        gradient = gradient_of(trainer, "m")
        for factor in chain(*filter(None, trainer._adapters["m"].layout.views(gradient))):
            factor.add_(torch.randn(factor.shape, generator=generator))
        norm = gradient.norm().item()
        scale = clip / norm if clip else 1.0
        for index, (own, slope) in enumerate(zip(momenta, _pairs(trainer, gradient), strict=True)):
            momenta[index] = tuple(0.8 * m + 0.2 * scale * g for m, g in zip(own, slope, strict=True))
        (output,) = run(trainer, OptimStep("m", DimuonParams(0.02, beta1=0.8, grad_clip_norm=clip)))
        assert output == StepOutput({"learning_rate:mean": 0.02, "unclipped_grad_l2:mean": pytest.approx(norm)})
        rate = 0.02 * rank / 32
        pairs = [
            (a - rate * _step(m_a.T, b, rank).T, b - rate * _step(m_b, a.T, rank))
            for (a, b), (m_a, m_b) in zip(pairs, momenta, strict=True)
        ]
        for expected, got in zip(pairs, _pairs(trainer, parameters_of(trainer, "m")), strict=True):
            for left, right in zip(got, expected, strict=True):
                # Of the step's own size: its norm is rate * sqrt(rank).
                assert np.linalg.norm(left - right) <= 0.01 * rate * np.sqrt(rank)


def test_the_matrix_sign_and_the_root_equal_their_decompositions():
    random = np.random.default_rng(5)
    for shape in ((48, 8), (8, 48), (64, 32)):
        x = random.normal(size=shape)
        got = matrix_sign(torch.from_numpy(x)[None])[0]
        np.testing.assert_allclose(got, _sign(x), atol=2e-3)
    for rank in (4, 128):
        # Eigenvalues over eight decades: the damping bounds what is left of them.
        factor = random.normal(size=(rank, rank)) * np.logspace(-4, 0, rank)
        gram = factor.T @ factor
        got, expected = inverse_root(torch.from_numpy(gram)[None])[0].numpy(), _inverse_root(gram)
        np.testing.assert_allclose(got / np.linalg.norm(got), expected / np.linalg.norm(expected), atol=1e-9)
    of_zero = inverse_root(torch.zeros(1, 3, 3).double())[0]
    assert torch.allclose(of_zero, of_zero[0, 0] * torch.eye(3).double()) and of_zero[0, 0] > 0
    assert not matrix_sign(torch.zeros(1, 5, 3)).any()


def test_a_step_has_the_norm_of_the_contract_whatever_the_gradients_size(trainer_of):
    """sqrt(rank) * learning_rate * rank / 32 for each factor; a fresh adapter's A stays where it is."""
    for rank in (4, 16):
        steps = []
        for size in (1.0, 1e-6, 1e6):
            trainer = trainer_of()
            run(trainer, CreateModel("m", LoraConfig(rank=rank), "dimuon"), forward_backward("m", DATA))
            gradient_of(trainer, "m").mul_(size)
            before = _pairs(trainer, parameters_of(trainer, "m"))
            run(trainer, OptimStep("m", DimuonParams(0.1)))
            steps.append(
                [
                    (a - c, b - d)
                    for (a, b), (c, d) in zip(_pairs(trainer, parameters_of(trainer, "m")), before, strict=True)
                ]
            )
        for (d_a, d_b), *others in zip(*steps, strict=True):
            assert not d_a.any()
            assert np.linalg.norm(d_b) == pytest.approx(np.sqrt(rank) * 0.1 * rank / 32, rel=1e-4)
            for _, other in others:
                np.testing.assert_allclose(other, d_b, atol=1e-4)


def test_it_trains(trainer_of):
    trainer = trainer_of()
    run(trainer, CreateModel("m", LoraConfig(rank=8), "dimuon"))
    losses = []
    for _ in range(12):
        data = [make_datum(place, 20) for place in range(2)]
        for datum in data:
            datum.inputs["weights"][:] = 1
        output, _ = run(trainer, forward_backward("m", data), OptimStep("m", DimuonParams(0.1)))
        losses.append(output.metrics["loss:sum"])
    assert losses[-1] < losses[0] / 4


# ---------------------------------------------------------------- checkpoints


def _train(trainer, model_id: str, steps: range) -> None:
    for step in steps:
        run(trainer, forward_backward(model_id, [make_datum(step, 12)]), OptimStep(model_id, DimuonParams(1e-2)))


def test_resume_has_the_same_bits_and_the_family(trainer_of, tmp_path):
    straight, resumed = trainer_of(), trainer_of()
    folder = str(tmp_path / "state")
    run(straight, CreateModel("m", LoraConfig(rank=4, seed=11), "dimuon"))
    _train(straight, "m", range(2))
    run(straight, forward_backward("m", DATA), SaveWeights("m", folder, with_optimizer=True, with_gradients=True))
    (loaded,) = run(resumed, LoadWeights("n", folder, with_optimizer=True, with_gradients=True))
    assert isinstance(loaded, LoadOutput)
    for trainer, name in ((straight, "m"), (resumed, "n")):
        run(trainer, OptimStep(name, DimuonParams(1e-2)))
        _train(trainer, name, range(2, 4))
    assert torch.equal(parameters_of(straight, "m"), parameters_of(resumed, "n"))
    assert resumed._adapters["n"].steps == 5


def test_weights_alone_take_any_optimizer_and_a_model_keeps_its_own(trainer_of, tmp_path):
    trainer, folder = trainer_of(), str(tmp_path / "state")
    run(trainer, CreateModel("m", LoraConfig(rank=4), "dimuon"))
    _train(trainer, "m", range(1))
    run(trainer, SaveWeights("m", folder, with_optimizer=True), LoadWeights("a", folder))
    run(trainer, LoadWeights("d", folder, optimizer="dimuon"), CreateModel("mine", LoraConfig(rank=4)))
    assert [trainer._adapters[name].optimizer for name in "ad"] == ["adamw", "dimuon"]
    (failure,) = run(trainer, LoadWeights("mine", folder, with_optimizer=True))
    assert isinstance(failure, Failure)
    assert "state is dimuon's, and this model's optimizer is adamw" in failure.error
    run(trainer, LoadWeights("mine", folder))
    assert isinstance(run(trainer, OptimStep("mine", AdamParams()))[0], StepOutput)


def test_optimizers_ranks_and_parts_share_a_batch(trainer_of):
    """Each becomes what it becomes alone, bit for bit."""
    models = {
        "a": (LoraConfig(rank=2, seed=1), AdamParams(1e-2)),
        "b": (LoraConfig(rank=16, seed=2, train_mlp=False), DimuonParams(2e-2)),
        "c": (LoraConfig(rank=8, seed=3, train_attn=False), DimuonParams(1e-2, beta1=0.5, grad_clip_norm=0.1)),
        "d": (LoraConfig(rank=32, seed=4, train_mlp=False, train_attn=False), AdamParams(1e-2, weight_decay=0.1)),
    }
    shared, alone = trainer_of(token_budget=64), trainer_of()
    for trainer in (shared, alone):
        for name, (lora, params) in models.items():
            run(trainer, CreateModel(name, lora, "adamw" if isinstance(params, AdamParams) else "dimuon"))
    for step in range(3):
        batches = {name: [make_datum(10 * step + i, 5 + 9 * i) for i in range(3)] for name in models}
        together(shared, *(forward_backward(name, batch) for name, batch in batches.items()))
        together(shared, *(OptimStep(name, params) for name, (_, params) in models.items()))
        for name, (_, params) in reversed(models.items()):
            run(alone, forward_backward(name, batches[name]), OptimStep(name, params))
    for name in models:
        assert torch.equal(parameters_of(shared, name), parameters_of(alone, name))
