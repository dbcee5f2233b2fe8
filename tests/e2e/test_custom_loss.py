"""The SDK's own custom losses (forward, then backward with weights) against autograd in float64."""

import pytest
import torch
from safetensors.torch import load_file
from tinker import types

from tests.e2e.test_first_steps import datum
from tests.engine import reference
from tests.engine.examples import Datum
from tinkercloud.control.folders import checkpoint_folder, parse_checkpoint_path
from tinkercloud.nano import FOLDER

LINEAR = 1e12
"""An eps beside which any gradient is nothing: AdamW's first step is then learning_rate / eps times the gradient."""


def _loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Not a sum over tokens: each datum's tokens matter to one another, and the datums too."""
    means = torch.stack([each.mean() for each in logprobs])
    loss = (means - means.mean()).square().sum() + sum(each.square().sum() for each in logprobs)
    return loss, {"spread": float(means.std())}


def _folder(server, path: str):
    """Where the server keeps a checkpoint."""
    run, kind, name = parse_checkpoint_path(path)
    return next((server.data_dir / checkpoint_folder(run, kind, name, 0)).parent.iterdir())


def test_a_custom_loss_has_the_gradient_of_its_formula(server, client, training):
    tokenizer = training.get_tokenizer()
    texts = ("The sky is green today.", "Two and two is five.", "Hello there.")
    data = [datum(tokenizer.encode(text)) for text in texts]
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    path = training.save_state("before").result().path

    fresh = client.create_training_client_from_state(path).result()
    output = fresh.forward_backward_custom(data, _loss).result()
    fresh.optim_step(types.AdamParams(learning_rate=LINEAR, beta1=0.0, beta2=0.0, eps=LINEAR)).result()
    after = load_file(_folder(server, fresh.save_state("after").result().path) / "adapter_model.safetensors")

    before = _folder(server, path)
    plain = reference.load_peft(FOLDER, before, trainable=True).double()
    engine_data = [
        Datum(
            torch.tensor(each.model_input.to_ints()).numpy(),
            {"target_tokens": each.loss_fn_inputs["target_tokens"].to_numpy()},
        )
        for each in data
    ]
    loss, metrics = _loss(data, [reference.target_logprobs(plain, each) for each in engine_data])
    loss.backward()
    assert output.metrics["spread"] == pytest.approx(metrics["spread"], rel=1e-5)
    weights, expected = load_file(before / "adapter_model.safetensors"), reference.lora_gradients(plain)
    assert weights.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1
    for key, gradient in expected.items():
        step = weights[key].double() - after[key].double()
        torch.testing.assert_close(step, gradient, atol=1e-5 * largest, rtol=0)
