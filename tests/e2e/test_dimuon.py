"""A run with Dimuon through the official SDK, from its creation to its resumption."""

import pytest
import tinker
from tinker import types

from tests.e2e.test_first_steps import datum

DIMUON = types.DimuonOptimizerConfig()
STEP = types.DimuonParams(learning_rate=0.1)


@pytest.fixture
def training(client):
    return client.create_lora_training_client(base_model="tinkercloud/nano", rank=8, seed=1, optimizer=DIMUON).result()


@pytest.fixture
def batch(training):
    tokenizer = training.get_tokenizer()
    return [datum(tokenizer.encode(text)) for text in ("The sky is green today.", "Two and two is five.")]


def _steps(run, batch, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(run.forward_backward(batch, "cross_entropy").result().metrics["loss:sum"])
        metrics = run.optim_step(STEP).result().metrics
        assert metrics["learning_rate:mean"] == 0.1 and metrics["unclipped_grad_l2:mean"] > 0
    return losses


def _optimizer(info: types.GetInfoResponse | types.WeightsInfoResponse) -> dict[str, object]:
    return info.optimizer_config.model_dump()


def test_it_trains_and_resumes(client, training, batch):
    assert _optimizer(training.get_info()) == DIMUON.model_dump()
    losses = _steps(training, batch, 8)
    assert losses[-1] < losses[0] / 2
    path = training.save_state("middle").result().path
    expected = _steps(training, batch, 3)

    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert _optimizer(resumed.get_info()) == DIMUON.model_dump()
    assert _steps(resumed, batch, 3) == expected
    resumed.load_state_with_optimizer(path).result()
    assert _steps(resumed, batch, 3) == expected
    fresh = client.create_training_client_from_state(path, optimizer=DIMUON).result()
    assert _steps(fresh, batch, 3)[0] == expected[0], "the weights are the checkpoint's, the momentum is not"
    other = client.create_training_client_from_state(path).result()
    assert _optimizer(other.get_info()) == {"type": "adamw"}
    with pytest.raises(tinker.BadRequestError, match="state of dimuon, this training run's optimizer is adamw"):
        other.load_state_with_optimizer(path).result()
    other.optim_step(types.AdamParams()).result()


def test_the_familys_parameters_are_asked_for_and_the_run_goes_on(training, batch):
    training.forward_backward(batch, "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match=r"optimizer is dimuon.*optimizer_params"):
        training.optim_step(types.AdamParams()).result()
    _steps(training, batch, 1)


def test_a_checkpoint_names_its_optimizer(server, training):
    path = training.save_state("here").result().path
    rest = tinker.ServiceClient(base_url=server.url, api_key="tml-test").create_rest_client()
    assert _optimizer(rest.get_weights_info_by_tinker_path(path).result()) == DIMUON.model_dump()
