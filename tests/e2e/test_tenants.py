"""What one client does changes no number of another's, and what it asked for is what it gets."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types

from tests.e2e.by_hand import GOOD, NANO, PATIENCE, Run, datum

PROMPT = types.ModelInput.from_ints([10, 11, 12, 13])
ADAM = types.AdamParams(learning_rate=1e-2)


@pytest.fixture
def run(server):
    made = Run(server.url)
    yield made
    made.close()


def files_of(server, path: str) -> dict[str, torch.Tensor]:
    """Every tensor of a saved checkpoint, by file and key."""
    _, segment, name = path.removeprefix("tinker://").split("/")
    run_folder = path.removeprefix("tinker://").split("/")[0].replace(":", "*")
    files = list((server.data_dir / "checkpoints").glob(f"*{run_folder}*/{segment}/{name}/**/*.safetensors"))
    assert files, path
    return {f"{file.name}:{key}": tensor for file in files for key, tensor in load_file(file).items()}


def policy(*tokens: int) -> types.Datum:
    length = len(tokens)
    return datum(
        *tokens,
        weights=None,
        logprobs=np.full(length, -3, np.float32),
        advantages=np.linspace(-1, 1, length, dtype=np.float32),
    )


LOSSES = [
    ("cross_entropy", None, lambda n: datum(*range(n, n + 9))),
    ("importance_sampling", None, lambda n: policy(*range(n, n + 7))),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}, lambda n: policy(*range(n, n + 5))),
]


def losses_of(client: tinker.ServiceClient, number: int) -> list[float]:
    """What tenant `number` sees in four steps: its own rank, seed, loss and data."""
    name, config, example = LOSSES[number % 3]
    run = client.create_lora_training_client(base_model=NANO, rank=2 + number, seed=number).result(PATIENCE)
    data = [example(50 + number), example(90 + number)]
    seen = []
    for _ in range(4):
        batch = run.forward_backward(data, name, config)
        step = run.optim_step(ADAM)
        seen.append(batch.result(PATIENCE).metrics["loss:sum"])
        step.result(PATIENCE)
    return seen


def test_eight_tenants_at_once_get_the_losses_that_each_gets_alone(server):
    clients = [tinker.ServiceClient(base_url=server.url, api_key=f"tml-{number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(losses_of, clients, range(8)))
    alone = [losses_of(client, number) for number, client in enumerate(clients)]
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6)
    assert all(losses[0] != losses[-1] for losses in alone)
    for client in clients:
        client.holder.close()


def test_a_step_of_one_tenant_leaves_weights_and_moments_of_another(server, run):
    """Weight decay and Adam's moments are each adapter's own."""
    run.step()
    before = files_of(server, run.sdk.save_state("before").result(PATIENCE).path)
    other = Run(server.url, rank=4, seed=1)
    decay = types.AdamParams(learning_rate=0.1, weight_decay=0.5)
    for _ in range(2):
        other.sdk.forward_backward(GOOD, "cross_entropy").result(PATIENCE)
        other.sdk.optim_step(decay).result(PATIENCE)
    after = files_of(server, run.sdk.save_state("after").result(PATIENCE).path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    other.close()


def test_sampling_an_old_checkpoint_leaves_the_training_run_alone(run):
    run.step()
    old = run.sdk.save_weights_for_sampler("old").result(PATIENCE).path
    run.step(learning_rate=1e-2)
    before = run.sdk.forward(GOOD, "cross_entropy").result(PATIENCE).metrics
    sampler = run.service.create_sampling_client(model_path=old).result(PATIENCE)
    params = types.SamplingParams(max_tokens=8, stop=[])
    first = sampler.compute_logprobs(PROMPT).result(PATIENCE)
    sampler.sample(PROMPT, 4, params).result(PATIENCE)
    assert run.sdk.forward(GOOD, "cross_entropy").result(PATIENCE).metrics == before
    run.step(learning_rate=1e-2)
    assert sampler.compute_logprobs(PROMPT).result(PATIENCE) == first, "nor does training change the sampler"


def test_a_training_and_a_sampler_checkpoint_of_one_name_are_two(server, run):
    run.step()
    training = run.sdk.save_state("same").result(PATIENCE).path
    run.step(learning_rate=1e-1)
    sampling = run.sdk.save_weights_for_sampler("same").result(PATIENCE).path
    assert training != sampling
    states, weights = files_of(server, training), files_of(server, sampling)
    assert any(key.startswith("optimizer") for key in states) and not any(key.startswith("opt") for key in weights)
    assert any(not torch.equal(states[key], weights[key]) for key in weights)
    ask = run.service.create_sampling_client
    first, second = (ask(model_path=path).result(PATIENCE).compute_logprobs(PROMPT) for path in (training, sampling))
    assert first.result(PATIENCE) != second.result(PATIENCE)


def test_a_name_that_is_taken_is_refused_and_training_goes_on(run):
    run.sdk.save_state("taken").result(PATIENCE)
    with pytest.raises(tinker.RequestFailedError, match="exists already") as refusal:
        run.sdk.save_state("taken").result(PATIENCE)
    assert refusal.value.category == types.RequestErrorCategory.User
    run.trains_on()


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"self_attn"}),
        ({"train_attn": False, "train_unembed": False}, {"mlp"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
        ({}, {"self_attn", "mlp", "lm_head"}),
    ],
)
def test_the_parts_that_a_client_asks_for_are_trained_and_no_others(server, run, parts, keys):
    trained = run.service.create_lora_training_client(base_model=NANO, rank=2, seed=3, **parts).result(PATIENCE)
    trained.forward_backward(GOOD, "cross_entropy").result(PATIENCE)
    trained.optim_step(ADAM).result(PATIENCE)
    saved = files_of(server, trained.save_weights_for_sampler("parts").result(PATIENCE).path)
    for part in ("self_attn", "mlp", "lm_head"):
        own = [tensor for key, tensor in saved.items() if part in key]
        assert bool(own) == (part in keys)
        assert all(tensor.any() for tensor in own), "every B has moved away from zero"


def weights_after(server, run, seed: int = 5, **adam) -> dict[str, torch.Tensor]:
    """The weights after two steps on two batches."""
    trained = run.service.create_lora_training_client(base_model=NANO, rank=2, seed=seed).result(PATIENCE)
    for data in (GOOD, [datum(7, 8, 9)]):
        trained.forward_backward(data, "cross_entropy").result(PATIENCE)
        trained.optim_step(types.AdamParams(**{"learning_rate": 1e-2} | adam)).result(PATIENCE)
    return files_of(server, trained.save_weights_for_sampler("adam").result(PATIENCE).path)


def test_every_option_of_a_step_and_the_seed_change_the_weights(server, run):
    plain = weights_after(server, run)
    again = weights_after(server, run)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    options = {"seed": 6, "learning_rate": 2e-2, "beta1": 0.5, "beta2": 0.5, "eps": 1e-2, "weight_decay": 0.9,
               "grad_clip_norm": 1e-3}  # fmt: skip
    for name, value in options.items():
        changed = weights_after(server, run, **{name: value})
        assert any(not torch.equal(plain[key], changed[key]) for key in plain), f"{name} changes nothing"


def test_samples_of_one_request_have_streams_of_their_own_and_greedy_ones_do_not(run):
    sampler = run.service.create_sampling_client(base_model=NANO).result(PATIENCE)

    def draw(**params):
        answer = sampler.sample(PROMPT, 8, types.SamplingParams(max_tokens=12, stop=[], **params)).result(PATIENCE)
        return [tuple(sequence.tokens) for sequence in answer.sequences]

    hot = {"temperature": 2.0, "seed": 4}
    assert len(set(draw(**hot))) == 8 and draw(**hot) == draw(**hot) != draw(temperature=2.0, seed=5)
    assert len(set(draw(temperature=0.0))) == 1
    assert draw(temperature=0.0, seed=1) == draw(temperature=0.0, seed=2)


def test_the_loss_is_a_sum(run):
    """Twice the data or twice the weights is twice the loss; two equal chunks have as much gradient as one twice."""
    loss = run.sdk.forward(GOOD, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
    twice = run.sdk.forward(GOOD * 2, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
    heavy = [datum(10, 11, 12, 13, weights=np.full(4, 2, np.float32)), datum(40, 41, weights=np.full(2, 2, np.float32))]
    weighted = run.sdk.forward(heavy, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
    assert twice == pytest.approx(2 * loss) and weighted == pytest.approx(2 * loss)
