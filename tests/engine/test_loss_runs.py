"""Every loss through the whole trainer: outputs, gradients of the weights, and metrics that merge as the SDK merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.types import ForwardBackwardOutput

from tests.engine import reference
from tests.engine.examples import forward_backward, gradient_of, make_datum, run, shaken, together
from tests.engine.loss_reference import loss_and_slope, rows_of
from tinkercloud.engine.losses import LOSSES, loss_config
from tinkercloud.engine.operations import Datum, SaveWeights
from tinkercloud.engine.results import Failure, LossOutput
from tinkercloud.engine.torch.logprobs import row_entropies

LENGTHS = (5, 17, 1, 17, 30)


def data_of(loss: str) -> list[Datum]:
    """Ragged; with several targets a position where the loss takes them, one row of them without any weight."""
    data = [make_datum(300 + i, length, loss=loss) for i, length in enumerate(LENGTHS)]
    if LOSSES[loss].several_targets:
        several = make_datum(310, 12, several=3)
        several.inputs["weights"][4:6] = 0
        several.inputs["weights"][7, 1:] = 0
        data += [several, make_datum(311, 9, targets=4)]
    return data


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"token_budget": 32}], ids=["whole", "cut"])
def test_outputs_and_gradients_equal_peft_and_the_formula(trainer_of, model_folder, loss, options, tmp_path):
    trainer, data = trainer_of(**options), data_of(loss)
    run(trainer, *shaken("m"))
    (result,) = run(trainer, forward_backward("m", data, loss=loss))
    assert isinstance(result, LossOutput)
    saved = run(trainer, SaveWeights("m", str(tmp_path / "m"), with_gradients=True))[0]
    assert not isinstance(saved, Failure)
    plain = reference.load_peft(model_folder("qwen3"), tmp_path / "m", trainable=True)
    config, total = loss_config(LOSSES[loss], {}), 0.0
    for datum, output in zip(data, result.outputs, strict=True):
        logprobs = reference.target_logprobs(plain, datum)
        rows = rows_of(datum, logprobs.detach().numpy())
        values, slopes = np.transpose([loss_and_slope(loss, row, rows, config) for row in rows])
        shape = datum.inputs["target_tokens"].shape
        assert output["logprobs"].shape == output["elementwise_loss"].shape == shape
        np.testing.assert_allclose(output["logprobs"], logprobs.detach(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(output["elementwise_loss"].ravel(), values, atol=1e-4, rtol=1e-4)
        (logprobs.flatten() * torch.from_numpy(slopes).float()).sum().backward()
        total += values.sum()
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-5, abs=1e-4)
    gradients = load_file(tmp_path / "m" / "gradients.safetensors")
    for key, expected in reference.lora_gradients(plain).items():
        torch.testing.assert_close(gradients[key], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_of_chunks_merge_to_those_of_the_whole(trainer_of, loss):
    trainer, data = trainer_of(), data_of(loss)
    run(trainer, *shaken("m"))

    def chunk(*part: Datum) -> ForwardBackwardOutput:
        (result,) = run(trainer, forward_backward("m", part, loss=loss, loss_fn_config={"entropy": 1.0}))
        return ForwardBackwardOutput(result.output_type, list(result.outputs), result.metrics)

    merged = combine_fwd_bwd_output_results([chunk(*data[:1]), chunk(*data[1:3]), chunk(*data[3:])])
    whole = chunk(*data)
    assert merged.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        assert merged.metrics[name] == pytest.approx(value, rel=1e-6), name


def mean_of_means(datums: list[tuple[np.ndarray, np.ndarray]], empty: float = 0.0) -> float:
    """Over datums, of (values, which count)."""
    return np.mean([values[counts].mean() if counts.any() else empty for values, counts in datums])


@pytest.mark.parametrize(
    "loss", [name for name, loss in LOSSES.items() if "advantages" in [wanted.name for wanted in loss.inputs]]
)
def test_policy_metrics(trainer_of, loss):
    data = [*data_of(loss), make_datum(320, 6, loss=loss)]
    for silent in ("advantages", "sequence_ratio_mask", "sampled"):
        if silent in data[-1].inputs:
            data[-1].inputs[silent][:] = 0
    trainer = trainer_of(token_budget=40)
    run(trainer, *shaken("m"))
    (result,) = run(trainer, forward_backward("m", data, loss=loss))
    counts = [datum.inputs[LOSSES[loss].counts] != 0 for datum in data]
    differences = [
        output["logprobs"].astype(float) - datum.inputs["logprobs"]
        for datum, output in zip(data, result.outputs, strict=True)
    ]
    ratios = [np.exp(difference) for difference in differences]
    if loss == "gspo":
        means = [d[c].mean() if c.any() else 0.0 for d, c in zip(differences, counts, strict=True)]
        ratios = [np.full_like(d, np.exp(mean)) for d, mean in zip(differences, means, strict=True)]
    if loss == "stable_reinforce":
        moves = [d + datum.inputs["logprobs"] - datum.inputs["policy_logprobs"].astype(float)
                 for d, datum in zip(differences, data, strict=True)]  # fmt: skip
        ratios = [np.exp(move) for move in moves]
    metrics = dict(result.metrics)
    assert metrics.pop("tokens:sum") == sum(LENGTHS) + 6
    assert metrics.pop("active_tokens:sum") == sum(count.sum() for count in counts)
    expected = {
        "ratio:mean": mean_of_means(list(zip(ratios, counts, strict=True)), empty=1.0),
        "kl_sample_train_v1:mean": mean_of_means([(-d, c) for d, c in zip(differences, counts, strict=True)]),
        "kl_sample_train_v2:mean": mean_of_means([(d**2 / 2, c) for d, c in zip(differences, counts, strict=True)]),
    }
    config = loss_config(LOSSES[loss], {})
    if "clip_low_threshold" in config:
        low, high = config["clip_low_threshold"], config["clip_high_threshold"]
        clips = []
        for datum, ratio in zip(data, ratios, strict=True):
            advantages = datum.inputs["advantages"]
            gains, losses = (True, True) if loss == "cispo" else (advantages > 0, advantages < 0)
            clips.append((gains & (ratio > high)) | (losses & (ratio < low)))
        if loss == "stable_reinforce":
            clips = [clip | (np.exp(d) > high) for clip, d in zip(clips, differences, strict=True)]
            rows = [rows_of(d, o["logprobs"]) for d, o in zip(data, result.outputs, strict=True)]
            only_kl = {**config, "kl_coeff": 1.0}
            kls = [np.array([loss_and_slope(loss, row | {"A": 0.0}, datum, only_kl)[0] for row in datum])
                   for datum in rows]  # fmt: skip
            expected["kl_sample_train_v3:mean"] = mean_of_means(list(zip(kls, counts, strict=True)))
        expected["clip_fraction:mean"] = mean_of_means(list(zip(clips, counts, strict=True)))
        assert 0 < expected["clip_fraction:mean"] < 1
    assert metrics.pop("loss:sum") == pytest.approx(sum(output["elementwise_loss"].sum() for output in result.outputs))
    assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"logits_bytes": 8 * 96 * 4}], ids=["whole", "chunked"])
def test_entropy_is_of_the_counted_positions(trainer_of, model_folder, options, tmp_path):
    trainer, data = trainer_of(**options), data_of("cross_entropy")
    run(trainer, *shaken("m"), *shaken("other"))
    plain_run, other = forward_backward("m", data), forward_backward("other", data_of("cross_entropy")[:3])
    without, alone = together(trainer, plain_run, other)
    assert "entropy:mean" not in without.metrics
    asking = forward_backward("m", data, loss_fn_config={"entropy": 1.0})
    result, beside = together(trainer, asking, other)
    assert without.metrics == {name: value for name, value in result.metrics.items() if name != "entropy:mean"}
    assert beside.metrics == alone.metrics
    run(trainer, SaveWeights("m", str(tmp_path / "m")))
    plain = reference.load_peft(model_folder("qwen3"), tmp_path / "m")
    means = []
    for datum in data:
        weights = datum.inputs["weights"]
        counts = (weights != 0).reshape(len(weights), -1).any(1)
        entropies = torch.distributions.Categorical(logits=reference.logits(plain, datum.tokens)).entropy()
        means.append((entropies.detach().numpy()[-len(weights) :], counts))
    assert result.metrics["entropy:mean"] == pytest.approx(mean_of_means(means), rel=1e-5)
    assert result.metrics["active_tokens:sum"] == sum(counts.sum() for _, counts in means) < sum(LENGTHS) + 12 + 4


def test_the_entropy_of_a_row_by_itself_has_the_bits_that_it_has_beside_others():
    """Also where its sum is long enough to be cut among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = torch.randn(16, 150_000, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
        alone = torch.cat([row_entropies(row[None]) for row in rows])
        assert torch.equal(row_entropies(rows), alone)
    finally:
        torch.set_num_threads(threads)


def test_entropy_changes_no_gradient(trainer_of):
    trainer = trainer_of()
    run(trainer, *shaken("a"), *shaken("b"))
    run(trainer, forward_backward("a", data_of("ppo"), loss="ppo"))
    run(trainer, forward_backward("b", data_of("ppo"), loss="ppo", loss_fn_config={"entropy": 1.0}))
    assert torch.equal(gradient_of(trainer, "a"), gradient_of(trainer, "b"))
