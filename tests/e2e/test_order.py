"""A run's operations run once each, in the order of their seq_ids, whatever comes out of order, twice or is refused."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file

from tests.e2e.by_hand import GOOD, PATIENCE, Run, datum, refused


@pytest.fixture(scope="module")
def run(server):
    """A training run that survives everything here."""
    made = Run(server.url)
    yield made
    made.close()


@pytest.mark.parametrize("seq_id", [-1, 2**31 - 1, -(2**31)])
def test_a_seq_id_in_protobuf(run, seq_id):
    message = run.message(seq_id=1)
    message.seq_id = seq_id
    assert refused(run.send, message).status == 400
    assert refused(run.send, message.SerializeToString() + b"\xff").status == 400
    run.trains_on()


@pytest.mark.parametrize("seq_id", [-1, 200_000, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, "one"])
def test_a_seq_id_in_json(run, seq_id):
    for _ in range(2):
        assert refused(run.post, "optim_step", seq_id=seq_id, adam_params={}).status == 400
        assert refused(run.post, "save_weights", seq_id=seq_id, path="x").status == 400
        assert refused(run.post, "optim_step", seq_id=seq_id).status == 400
    run.trains_on()


def test_a_seq_id_that_another_operation_has(run):
    taken = run.seq()
    assert run.post("optim_step", seq_id=taken, adam_params={}).status_code == 200
    assert "optim_step before" in refused(run.send, run.message(seq_id=taken)).detail
    assert "optim_step before" in refused(run.post, "save_weights", seq_id=taken, path="x").detail
    assert "create_model before" in refused(run.post, "optim_step", seq_id=0, adam_params={}).detail
    run.trains_on()


def weights_of(run, server, name):
    """The bits of the run's adapter and optimizer state."""
    path = run.sdk.save_state(name).result(PATIENCE).path
    (folder,) = [f for f in (server.data_dir / "checkpoints").rglob(f"{name}/**/adapter_model.safetensors")]
    assert path.endswith(name)
    return {
        f"{file.name}:{key}": tensor
        for file in folder.parent.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def same_bits(some, other):
    assert some.keys() == other.keys()
    assert all(torch.equal(some[name], other[name]) for name in some)


@pytest.fixture(scope="module")
def undisturbed(server):
    """The weights after two steps, as a run has them that was never refused."""
    calm = Run(server.url)
    calm.step()
    calm.step([datum(7, 8, 9)])
    yield weights_of(calm, server, "undisturbed")
    calm.close()


BAD = datum(1, 2, weights=np.array([1, math.nan], np.float32))


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([BAD], id="one chunk"),
        pytest.param([*GOOD * 512, BAD], id="the last of two chunks"),
        pytest.param([BAD, *GOOD * 512], id="the first of two chunks"),
        pytest.param([*GOOD * 512, BAD, *GOOD * 512], id="the middle of three chunks"),
    ],
)
def test_after_a_refused_chunk_a_run_is_as_if_it_had_not_been_sent(server, undisturbed, batch, request):
    disturbed = Run(server.url)
    disturbed.step()
    with pytest.raises((tinker.BadRequestError, tinker.RequestFailedError), match="NaN"):
        disturbed.sdk.forward_backward(batch, "cross_entropy").result(PATIENCE)
    disturbed.step_fails()
    with pytest.raises((tinker.BadRequestError, tinker.RequestFailedError), match="NaN"):
        disturbed.sdk.forward(batch, "cross_entropy").result(PATIENCE)
    disturbed.step([datum(7, 8, 9)])
    same_bits(weights_of(disturbed, server, f"after.{request.node.callspec.indices['batch']}"), undisturbed)
    disturbed.close()


def test_a_refusal_ahead_of_an_earlier_operation_is_a_future_that_fails(server):
    """The SDK sends the first chunk of a batch last, and never if another one was answered with an error."""
    ahead = Run(server.url)
    bad = ahead.message([BAD], seq_id=2)
    (future,) = {ahead.send(bad).json()["request_id"] for _ in range(2)}
    damaged = {ahead.send(ahead.message(seq_id=3).SerializeToString()[:-1]).json()["request_id"] for _ in range(2)}
    assert ahead.send(ahead.message(seq_id=1)).status_code == 200
    assert ahead.send(bad).json()["request_id"] == future, "the answer stays when the gap is gone"
    for request_id in (future, *damaged):
        failure = ahead.result(request_id)
        assert failure["category"] == "user" and ("NaN" in failure["error"] or "protobuf" in failure["error"])
    for _ in range(3):
        ahead.seq()
    ahead.step_fails()
    ahead.trains_on()
    ahead.close()


def test_operations_in_any_order_and_any_number_of_times(server, undisturbed):
    shuffled = Run(server.url)
    messages = [shuffled.message([one], seq_id=number) for number, one in enumerate(GOOD, start=1)]
    last = shuffled.post("optim_step", seq_id=5, adam_params={"learning_rate": 1e-3}).json()
    second_batch = shuffled.message([datum(7, 8, 9)], seq_id=4)
    first_step = {"seq_id": 3, "adam_params": {"learning_rate": 1e-3}}
    with ThreadPoolExecutor(30) as many:
        for message in (second_batch, messages[1], messages[0]):
            answers = list(many.map(lambda _, it=message: shuffled.send(it).json()["request_id"], range(30)))
            assert len(set(answers)) == 1
        steps = list(many.map(lambda _: shuffled.post("optim_step", **first_step).json()["request_id"], range(30)))
        assert len(set(steps)) == 1
    assert "metrics" in shuffled.result(last["request_id"])
    for _ in range(5):
        shuffled.seq()
    after = weights_of(shuffled, server, "shuffled")
    # The first batch came in two chunks here, which adds in another order than in one.
    assert after.keys() == undisturbed.keys()
    for name in after:
        torch.testing.assert_close(after[name], undisturbed[name], atol=1e-6, rtol=1e-5)
    shuffled.close()


def test_thirty_concurrent_duplicates_of_a_refusal(run):
    seq_id = run.seq()
    message = run.message([BAD], seq_id=seq_id)
    with ThreadPoolExecutor(30) as many:
        refusals = set(many.map(lambda _: refused(run.send, message), range(30)))
    assert len(refusals) == 1
    run.step_fails()
    run.trains_on()


def test_nobody_else_is_held_up(server, run):
    """A run whose first operation never comes, and one that is refused all the time, beside one that trains."""
    stuck, refusing = Run(server.url), Run(server.url)
    stuck.post("optim_step", seq_id=2, adam_params={})
    ended = threading.Event()

    def refuse():
        while not ended.is_set():
            refused(refusing.sdk.forward_backward, [BAD], "cross_entropy")

    hammering = threading.Thread(target=refuse)
    hammering.start()
    try:
        for _ in range(5):
            run.trains_on()
    finally:
        ended.set()
        hammering.join()
    refusing.step_fails()
    refusing.trains_on()
    stuck.seq(), stuck.seq()
    stuck.send(stuck.message(seq_id=1))
    stuck.trains_on()
    stuck.close()
    refusing.close()
