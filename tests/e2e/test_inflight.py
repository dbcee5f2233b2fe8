"""kind="inflight" through the official SDK: all of a run's clients go on with what is saved last."""

import pytest
from tinker import types

PROMPT = types.ModelInput.from_ints(list(range(5, 15)))


def train(training) -> None:
    inputs = {"target_tokens": list(range(6, 16)), "weights": [1.0] * 10}
    datum = types.Datum(model_input=PROMPT, loss_fn_inputs=inputs)
    batch, step = (
        training.forward_backward([datum], "cross_entropy"),
        training.optim_step(types.AdamParams(learning_rate=1e-2)),
    )
    batch.result()
    step.result()


def says(sampler) -> list[float]:
    return [pytest.approx(logprob, abs=1e-4) for logprob in sampler.compute_logprobs(PROMPT).result()[1:]]


def test_clients_of_a_run_share_its_newest_inflight_weights(training):
    first = training.save_weights_and_get_sampling_client(kind="inflight").result()
    snapshot = training.save_weights_and_get_sampling_client().result()
    before = says(first)
    train(training)
    second = training.save_weights_and_get_sampling_client(kind="inflight").result()
    after = says(second)
    now = training.save_weights_and_get_sampling_client().result().compute_logprobs(PROMPT).result()[1:]
    assert now == after and now != before
    assert first.compute_logprobs(PROMPT).result()[1:] == after, "the older client goes on with them too"
    assert snapshot.compute_logprobs(PROMPT).result()[1:] == before
    assert first.get_base_model() == second.get_base_model() == snapshot.get_base_model()


def test_a_save_of_equal_weights_keeps_no_prompt(training):
    one = types.SamplingParams(max_tokens=1, seed=1)
    found, drawn = [], []
    for _ in range(2):
        sampler = training.save_weights_and_get_sampling_client(kind="inflight").result()
        for _ in range(2):
            answer = sampler.sample(PROMPT, 1, one).result()
            found.append(answer.prompt_cache_hit_tokens)
            drawn.append(answer.sequences[0].tokens)
    assert found == [0, 9, 0, 9] and drawn == drawn[:1] * 4
