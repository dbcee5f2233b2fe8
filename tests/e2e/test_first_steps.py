"""The whole way once: train, save, sample, resume, through the official SDK."""

import numpy as np
import pytest
import tinker
from tinker import types


def datum(tokens: list[int], weights: float = 1.0) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:], np.int64),
            "weights": np.full(len(tokens) - 1, weights, np.float32),
        },
    )


@pytest.fixture
def batch(training):
    tokenizer = training.get_tokenizer()
    return [datum(tokenizer.encode(text)) for text in ("The sky is green today.", "Two and two is five.")]


def test_training_lowers_the_loss_and_shows_in_samples(training, batch):
    adam = types.AdamParams(learning_rate=3e-3)
    losses = []
    for _ in range(30):
        forward_backward = training.forward_backward(batch, "cross_entropy")
        step = training.optim_step(adam)
        losses.append(forward_backward.result().metrics["loss:sum"])
        step.result()
    assert losses[-1] < losses[0] / 4

    tokenizer = training.get_tokenizer()
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokenizer.encode("The sky is green"))
    greedy = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    answer = sampler.sample(prompt, 2, greedy).result()
    assert [s.tokens for s in answer.sequences] == [answer.sequences[0].tokens] * 2
    assert tokenizer.decode(answer.sequences[0].tokens).startswith(" today")
    assert answer.sequences[0].sequence_id != answer.sequences[1].sequence_id


def test_forward_only_leaves_no_gradient(training, batch):
    before = training.forward(batch, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1.0)).result()
    after = training.forward(batch, "cross_entropy").result()
    for one, other in zip(before.loss_fn_outputs, after.loss_fn_outputs, strict=True):
        assert one["logprobs"].tolist() == other["logprobs"].tolist()
    assert before.loss_fn_outputs[0]["logprobs"].to_numpy().shape == (len(batch[0].model_input.to_ints()),)


def test_a_resumed_run_goes_on_with_the_same_losses(client, training, batch):
    adam = types.AdamParams(learning_rate=1e-2)

    def steps(run, count):
        losses = []
        for _ in range(count):
            losses.append(run.forward_backward(batch, "cross_entropy").result().metrics["loss:sum"])
            run.optim_step(adam).result()
        return losses

    steps(training, 3)
    path = training.save_state("middle").result().path
    expected = steps(training, 3)
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert steps(resumed, 3) == expected
    fresh = client.create_training_client_from_state(path).result()
    assert steps(fresh, 3)[0] == expected[0], "the weights are the checkpoint's, the moments are not"


def test_a_sampler_keeps_its_weights_while_training_goes_on(training, batch):
    before = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(batch[0].model_input.to_ints())
    first = before.compute_logprobs(prompt).result()
    training.forward_backward(batch, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-1)).result()
    after = training.save_weights_and_get_sampling_client().result()
    assert before.compute_logprobs(prompt).result() == first
    assert after.compute_logprobs(prompt).result() != first
    assert first[0] is None and len(first) == prompt.length


def test_the_sampler_and_the_trainer_agree(training, batch):
    training.forward_backward(batch, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = batch[0].model_input.to_ints()[:4]
    drawn = sampler.sample(
        types.ModelInput.from_ints(prompt), 4, types.SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    ).result()
    data = [datum(prompt + sequence.tokens) for sequence in drawn.sequences]
    trained = training.forward(data, "cross_entropy").result()
    for sequence, output in zip(drawn.sequences, trained.loss_fn_outputs, strict=True):
        ours = output["logprobs"].to_numpy()[len(prompt) - 1 :]
        np.testing.assert_allclose(sequence.logprobs_np, ours, atol=1e-5)
    scored = [
        sampler.compute_logprobs(types.ModelInput.from_ints(prompt + sequence.tokens)) for sequence in drawn.sequences
    ]
    for logprobs, output in zip(scored, trained.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(logprobs.result()[1:], output["logprobs"].to_numpy(), atol=1e-5)


def test_an_unknown_base_model_is_refused_with_the_served_ones(client):
    with pytest.raises(tinker.NotFoundError, match="tinkercloud/nano"):
        client.create_lora_training_client(base_model="nobody/nothing").result()
