"""How a tenant's work is cut, packed, ordered and shared shows in no bit, or in the last one only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.engine import reference
from tests.engine.examples import forward_backward, gradient_of, make_datum, parameters_of, run, shaken, together
from tests.engine.precision import assert_flat, assert_same, assert_same_metrics, assert_tensors
from tinkercloud.engine.operations import AdamParams, Datum, DropModel, OptimStep, SaveWeights
from tinkercloud.engine.results import LossOutput
from tinkercloud.engine.torch import attention
from tinkercloud.engine.torch.kernels import products as kernel_products

pytestmark = pytest.mark.device

ROUNDING = 1e-7
"""Relative L2 distance of gradients that were added up in another order (float32's own rounding is 6e-8)."""

LENGTHS = {
    "long": [40, 47, 54, 61, 68, 75, 82, 89],
    "short": [3, 9, 1, 4, 9, 9, 2, 17],
    "equal": [24] * 8,
}


def _data(lengths: list[int], loss: str = "cross_entropy", seed: int = 300) -> list[Datum]:
    return [make_datum(seed + i, length, loss=loss) for i, length in enumerate(lengths)]


def _assert_same(left: LossOutput, right: LossOutput) -> None:
    assert_same_metrics(left.metrics, right.metrics)
    for name in left.outputs[0]:
        assert_same(*(np.concatenate([output[name] for output in side.outputs]) for side in (left, right)))


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_eight_datums_are_four_and_four_and_one_and_seven(trainer_of, lengths, loss):
    data = _data(lengths, loss)
    gradients = []
    for cut in (8, 4, 1):
        trainer = trainer_of()
        run(trainer, *shaken("m"))
        parts = [part for part in (data[:cut], data[cut:]) if part]
        results = run(trainer, *(forward_backward("m", part, loss=loss) for part in parts))
        outputs = np.concatenate([output["logprobs"] for result in results for output in result.outputs])
        gradients.append(gradient_of(trainer, "m"))
        if cut == 8:
            whole = outputs
        assert_same(outputs, whole)
    for gradient in gradients[1:]:
        assert_flat(gradient, gradients[0], relative=ROUNDING)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_micro_batches_show_in_no_bit(trainer_of, lengths):
    """Wherever the token budget cuts an operation, with its co-tenants' or alone."""
    data, results = _data(lengths), []
    for budget in (4096, 200, 90, 16):
        trainer = trainer_of(token_budget=budget, logits_bytes=24 * 96 * 4)
        run(trainer, *shaken("m"), *shaken("other", rank=4))
        mine, _ = together(trainer, forward_backward("m", data), forward_backward("other", _data([33, 5], seed=7)))
        results.append((mine, gradient_of(trainer, "m")))
    for output, gradient in results[1:]:
        _assert_same(output, results[0][0])
        assert_flat(gradient, results[0][1])


@pytest.mark.parametrize("loss", ["cross_entropy", "gspo"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_order_of_datums_shows_in_no_bit(trainer_of, lengths, loss):
    data = _data(lengths, loss)
    order = [5, 2, 7, 0, 4, 1, 6, 3]
    straight, permuted = trainer_of(token_budget=60), trainer_of(token_budget=60)
    for trainer in (straight, permuted):
        run(trainer, *shaken("m"))
    (one,) = run(straight, forward_backward("m", data, loss=loss))
    (other,) = run(permuted, forward_backward("m", [data[place] for place in order], loss=loss))
    _assert_same(structs.replace(one, outputs=tuple(one.outputs[place] for place in order)), other)
    assert_flat(gradient_of(permuted, "m"), gradient_of(straight, "m"))


def test_tenants_in_turns_are_tenants_one_after_another(trainer_of):
    """Each of three runs, of other ranks, parts and optimizers, has the same bits either way."""
    tenants = {"a": dict(rank=8), "b": dict(rank=3, train_mlp=False), "c": dict(rank=5, train_attn=False)}

    def step(trainer, name: str, number: int) -> LossOutput:
        lengths = LENGTHS["short"][number:]
        (output, _) = run(
            trainer,
            forward_backward(name, _data(lengths, seed=100 * number + ord(name))),
            OptimStep(name, AdamParams(1e-2, weight_decay=0.1)),
        )
        return output

    turns, series = trainer_of(), trainer_of()
    for trainer in (turns, series):
        for name, parts in tenants.items():
            run(trainer, *shaken(name, **parts))
    outputs = {(name, number): step(turns, name, number) for number in range(3) for name in tenants}
    for name in reversed(tenants):
        for number in range(3):
            _assert_same(step(series, name, number), outputs[name, number])
        assert_flat(parameters_of(series, name), parameters_of(turns, name))


CROWDS = {
    "nobody": {},
    "one like me": {"a": [12, 12, 30]},
    "a long one": {"a": [200]},
    "many": {"a": [1, 2, 3], "b": [64, 64], "c": [7], "d": [19] * 5},
}


def _three_steps(trainer, crowd: dict[str, list[int]], first: bool) -> tuple[list[LossOutput], torch.Tensor]:
    """What "m" gets and becomes, its operations sharing cycles with the crowd's, before or after them."""
    run(trainer, *shaken("m"))
    for place, name in enumerate(crowd):
        run(trainer, *shaken(name, rank=2 + 3 * place, train_mlp=place % 2 == 0))
    outputs = []
    for step in range(3):
        mine = forward_backward("m", _data([12, 30, 12, 5], seed=500 + 10 * step))
        others = [forward_backward(name, _data(lengths, seed=700 + step)) for name, lengths in crowd.items()]
        cycle = [mine, *others] if first else [*reversed(others), mine]
        outputs.append(together(trainer, *cycle)[cycle.index(mine)])
        steps = [OptimStep(name, AdamParams(1e-2)) for name in ("m", *crowd)]
        together(trainer, *(steps if first else reversed(steps)))
    return outputs, parameters_of(trainer, "m")


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("budget", [4096, 48])
def test_a_run_alone_is_the_run_among_any_others(trainer_of, budget, first):
    runs = [_three_steps(trainer_of(token_budget=budget), crowd, first) for crowd in CROWDS.values()]
    for outputs, parameters in runs[1:]:
        for one, other in zip(outputs, runs[0][0], strict=True):
            _assert_same(one, other)
        assert_flat(parameters, runs[0][1])


def test_processors_with_narrow_registers_keep_the_promise_too(trainer_of, monkeypatch):
    """They have no kernels for products; the gradients are the same but for rounding."""
    data, gradients = _data(LENGTHS["long"]), []
    for is_wide in (kernel_products._WIDE, False):
        monkeypatch.setattr(kernel_products, "_WIDE", is_wide)
        trainer = trainer_of()
        run(trainer, *shaken("m"))
        trainer._adapters["m"].parameters.copy_(parameters_of(trainer, "m").round(decimals=4))
        run(trainer, forward_backward("m", data))
        gradients.append(gradient_of(trainer, "m"))
    assert_flat(gradients[1], gradients[0], relative=1e-5)
    test_a_run_alone_is_the_run_among_any_others(trainer_of, 48, True)


def test_sequences_too_long_for_the_kernel_keep_the_promise_too(trainer_of, monkeypatch):
    """Those longer than `LONGEST` have torch's own attention, beside shorter ones in one pass."""
    monkeypatch.setattr(attention, "LONGEST", 12)
    test_a_run_alone_is_the_run_among_any_others(trainer_of, 48, True)


def test_a_tenant_that_goes_takes_nothing_with_it(trainer_of):
    """Between my forward_backward and my step, in the very cycle of my step, and before what comes then."""
    staying, leaving = trainer_of(), trainer_of()
    for trainer in (staying, leaving):
        run(trainer, *shaken("m"), *shaken("other"), *shaken("third"))
        together(trainer, forward_backward("m", _data([9, 14])), forward_backward("other", _data([20])))
    run(leaving, DropModel("other"))
    together(leaving, DropModel("third"), OptimStep("m", AdamParams(1e-2)))
    run(staying, OptimStep("m", AdamParams(1e-2)))
    results = [run(trainer, forward_backward("m", _data([9, 14]))) for trainer in (staying, leaving)]
    _assert_same(results[0][0], results[1][0])
    assert_flat(gradient_of(leaving, "m"), gradient_of(staying, "m"))
    assert_flat(parameters_of(leaving, "m"), parameters_of(staying, "m"))


def test_forward_then_weights_is_the_custom_losss_gradient(trainer_of, model_folder, tmp_path):
    """C = (sum of logp^2) + exp(mean logp of each datum), by w = -dC/dlogp, and in float64 all the way."""

    def custom(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return sum((each**2).sum() + each.mean().exp() for each in logprobs)

    trainer, data = trainer_of(), _data([11, 26, 3])
    run(trainer, *shaken("m"), SaveWeights("m", str(tmp_path / "m")))
    (forward,) = run(trainer, forward_backward("m", data, forward_only=True))
    logprobs = [torch.from_numpy(output["logprobs"].copy()).requires_grad_() for output in forward.outputs]
    custom(logprobs).backward()
    weighted = [
        Datum(datum.tokens, datum.inputs | {"weights": -each.grad.numpy()})
        for datum, each in zip(data, logprobs, strict=True)
    ]
    run(trainer, forward_backward("m", weighted))

    plain = reference.load_peft(model_folder("qwen3"), tmp_path / "m", trainable=True).double()
    custom([reference.target_logprobs(plain, datum) for datum in data]).backward()
    run(trainer, SaveWeights("m", str(tmp_path / "again"), with_gradients=True))
    gradients = reference.saved_gradients(tmp_path / "again")
    expected = reference.lora_gradients(plain)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    gradients = {key: gradient.double() / largest for key, gradient in gradients.items()}
    assert_tensors(gradients, {key: gradient / largest for key, gradient in expected.items()}, atol=2e-6)
