"""Long sequences in little memory: layers that run again change no bit, and what is said about memory is so."""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM

from tests.engine.conftest import FAMILIES
from tests.engine.examples import VOCAB, forward_backward, gradient_of, make_datum, run, shaken, together
from tinkercloud.engine.base_model import ActivationMemory, EngineOptions
from tinkercloud.engine.operations import CreateModel, LoraConfig, OperationError
from tinkercloud.engine.results import LossOutput
from tinkercloud.engine.torch.activations import Storages
from tinkercloud.engine.torch.attention import PackedAttention
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.trainer import TorchTrainer
from tinkercloud.engine.validation import check_memory

DATA = [make_datum(1, 60), make_datum(2, 23, several=3), make_datum(3, 23, several=3), make_datum(4, 1, several=3)]
LONG = [make_datum(5, 200, targets=120)]


class Peak(Storages):
    """The most that was there at once."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, *arguments, **named):
        output = super().__torch_dispatch__(*arguments, **named)
        self.bytes = max(self.bytes, self.live_bytes)
        return output


@pytest.fixture(params=[True, False], ids=["lean", "modules"])
def lean(request) -> bool:
    """Whether passes take the lean decoder, or transformers' own modules."""
    return request.param


@pytest.fixture
def trainer_with(model_folder):
    """(family, lean, bytes for activations; 0 is the default) -> a trainer with two models."""

    def make(family: str, lean: bool = True, activation_bytes: int = 0) -> TorchTrainer:
        folder = str(model_folder(family))
        options = EngineOptions(family, folder, device="cpu", max_rank=8, activation_bytes=activation_bytes)
        model = BaseModel.load(options)
        if not lean:
            model._lean = None
        trainer = TorchTrainer(model, options)
        run(trainer, *shaken("a"), *shaken("bb", rank=3, train_mlp=False))
        return trainer

    return make


class AttentionCalls:
    """How often attention ran forwards: once for each layer."""

    def __enter__(self) -> AttentionCalls:
        self.count, call = 0, PackedAttention.__call__

        def counted(*arguments, **named):
            self.count += 1
            return call(*arguments, **named)

        self._patch = mock.patch.object(PackedAttention, "__call__", counted)
        self._patch.start()
        return self

    def __exit__(self, *_) -> None:
        self._patch.stop()


def test_layers_that_run_again_change_no_bit(trainer_with, family, lean):
    plain = trainer_with(family, lean)
    memory = plain.info.activations
    tight = trainer_with(family, lean, activation_bytes=50 * memory.per_token)
    assert tight.info.activations.tokens == 50
    for batch, fits in ((LONG, False), ([DATA[0]], False), (DATA[1:], True)):
        with AttentionCalls() as once:
            run(plain, *(forward_backward(model_id, batch, forward_only=True) for model_id in ("a", "bb")))
        expected = together(plain, forward_backward("a", batch), forward_backward("bb", batch))
        assert once.count > 0
        with AttentionCalls() as attention:
            results = together(tight, forward_backward("a", batch), forward_backward("bb", batch))
        assert attention.count == once.count * (1 if fits else 2)
        for left, right in zip(expected, results, strict=True):
            assert isinstance(right, LossOutput) and left.metrics == right.metrics
            for one, other in zip(left.outputs, right.outputs, strict=True):
                assert np.array_equal(one["logprobs"], other["logprobs"])
        for model_id in ("a", "bb"):
            assert torch.equal(gradient_of(plain, model_id), gradient_of(tight, model_id))


def test_a_forward_pass_runs_once_however_long(trainer_with):
    plain, tight = trainer_with("qwen3"), trainer_with("qwen3", activation_bytes=1000)
    with AttentionCalls() as attention:
        run(tight, forward_backward("a", LONG, forward_only=True))
    with AttentionCalls() as once:
        run(plain, forward_backward("a", LONG, forward_only=True))
    assert attention.count == once.count


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """Eight layers: with two, there is little to run again."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES["qwen3"])
    config.num_hidden_layers, config.layer_types = 8, ["full_attention"] * 8
    folder = tmp_path_factory.mktemp("deep")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def peak_of(folder, data, activation_bytes: int = 0, **how) -> tuple[int, ActivationMemory]:
    """Most bytes that a forward_backward holds besides gradients and logits, and what was said about them."""
    options = EngineOptions("deep", str(folder), device="cpu", max_rank=2, activation_bytes=activation_bytes)
    trainer = TorchTrainer(BaseModel.load(options), options)
    run(trainer, CreateModel("m", LoraConfig(rank=2)))
    with Peak() as peak:
        (result,) = run(trainer, forward_backward("m", data, **how))
    assert isinstance(result, LossOutput)
    rows = min(sum(datum.num_tokens for datum in data), max(trainer.info.activations.tokens, data[0].num_tokens))
    logits = 2 * rows * trainer.info.vocab_size * 4
    gradient = gradient_of(trainer, "m")
    return peak.bytes - (0 if gradient is None else gradient.nbytes) - logits, trainer.info.activations


def test_a_pass_takes_about_what_was_measured(deep_folder):
    peak, memory = peak_of(deep_folder, LONG)
    assert 0.7 < peak / (200 * memory.per_token) < 1.05


def test_logits_take_what_they_may_however_many_tokens_there_are(base_model, monkeypatch):
    """Forwards and, once more, backwards."""
    rows, logits = [], BaseModel.logits

    def noted(model, hidden, lora):
        rows.append(len(hidden))
        return logits(model, hidden, lora)

    monkeypatch.setattr(BaseModel, "logits", noted)
    trainer = TorchTrainer(base_model("qwen3"), EngineOptions(name="qwen3", source="", logits_bytes=16 * VOCAB * 4))
    run(trainer, CreateModel("m", LoraConfig(rank=2)))
    for length in (20, 100):
        rows.clear()
        (result,) = run(trainer, forward_backward("m", [make_datum(1, length)] * 3))
        assert isinstance(result, LossOutput)
        assert max(rows) == 16 and sum(rows) == 2 * 3 * length


def test_many_datums_stay_within_the_budget(deep_folder):
    budget = 100 * peak_of(deep_folder, LONG)[1].per_token
    peak, _ = peak_of(deep_folder, [make_datum(n, 20) for n in range(30)], budget)
    assert 0.6 < peak / budget < 1.2, "on a model this small, what a pass holds besides shows"


def test_a_long_datum_takes_less_when_its_layers_run_again(deep_folder):
    whole, memory = peak_of(deep_folder, LONG)
    assert memory.per_token_recomputed < memory.per_token / 2
    again, _ = peak_of(deep_folder, LONG, 200 * memory.per_token_recomputed)
    assert again < whole / 2 and again < 1.05 * 200 * memory.per_token_recomputed


def test_a_forward_pass_takes_no_more_than_is_said(deep_folder):
    peak, memory = peak_of(deep_folder, LONG, forward_only=True)
    assert 0.2 < peak / (200 * memory.per_token_forward) < 1
    assert memory.per_token_forward < memory.per_token_recomputed


def test_a_datum_whose_pass_would_not_fit_is_refused_with_the_numbers(trainer_with):
    info = trainer_with("qwen3").info
    memory = info.activations
    tight = structs.replace(info, activations=structs.replace(memory, budget=100 * memory.per_token_forward))
    check_memory(forward_backward("m", [make_datum(1, 100)], forward_only=True), tight)
    numbers = (
        f"101 tokens needs {101 * memory.per_token_forward:,} bytes .* gives it {100 * memory.per_token_forward:,} "
    )
    with pytest.raises(OperationError, match=f"datum 1: the forward pass of {numbers}.*at most 100 tokens fit"):
        check_memory(forward_backward("m", [make_datum(1, 9), make_datum(2, 101)], forward_only=True), tight)
    with pytest.raises(
        OperationError, match=r"datum 0: the backward pass of 100 tokens .* even if layers are run again"
    ):
        check_memory(forward_backward("m", [make_datum(1, 100)]), tight)
