"""Sessions and checkpoints as the SDK's RestClient finds, moves and copies them."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from tinker.types import SessionSearchRequest

from tests.e2e.test_first_steps import datum

TOKENS = [10, 11, 12, 13, 14]


@pytest.fixture
def rest(server):
    return tinker.RestClient(base_url=server.url, api_key="tml-test")


def search(rest, **wanted):
    return rest.search_sessions(SessionSearchRequest(**wanted)).result()


def logprobs(client, path: str) -> np.ndarray:
    sampler = client.create_sampling_client(model_path=path).result()
    return np.array(sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()[1:])


def test_a_copy_stays_when_its_source_goes(client, training, rest, server):
    training.forward_backward([datum(TOKENS)], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    path = training.save_state("final", ttl_seconds=3600, user_metadata={"step": "1"}).result().path
    expected = logprobs(client, path)
    copied = rest.copy_weights(path, "archive", ttl_seconds=7200).result()
    run = copied.removeprefix("tinker://").split("/")[0]
    (copy,) = rest.list_checkpoints(run).result().checkpoints
    assert copy.tinker_path == copied and copy.user_metadata == {"step": "1"} and copy.expires_at is not None
    assert rest.get_training_run(run).result().lora_rank == 8
    listed = rest.list_training_runs(project_id="archive").result()
    assert [found.training_run_id for found in listed.training_runs] == [run] and listed.cursor.total_count == 1
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        logprobs(client, path)
    np.testing.assert_array_equal(logprobs(client, copied), expected)
    resumed = client.create_training_client_from_state_with_optimizer(copied).result()
    resumed.forward_backward([datum(TOKENS)], "cross_entropy").result()
    with pytest.raises(tinker.NotFoundError, match="unloaded"):
        httpx_save(server, run)


def httpx_save(server, run: str) -> None:
    answer = httpx.post(f"{server.url}/api/v1/save_weights", json={"model_id": run, "path": "x", "seq_id": 1})
    if answer.status_code == 404:
        raise tinker.NotFoundError(answer.json()["detail"], response=answer, body=None)


def test_a_copy_is_made_once_for_its_key(training, server):
    path = training.save_weights_for_sampler("s").result().path
    http = httpx.Client(base_url=f"{server.url}/api/v1")

    def copy(key: str, **body: object) -> httpx.Response:
        return http.post("copy_weights", json={"source_path": path, **body}, headers={"x-idempotency-key": key})

    first, again, other = (copy(key, destination_project_id="p").json()["tinker_path"] for key in "aab")
    assert first == again != other and first.endswith("/sampler_weights/s")
    session = training.get_info().model_id.split(":")[0]
    inside = copy("c", session_id=session, model_seq_id=7).json()["tinker_path"]
    assert inside == f"tinker://{session}:train:7/sampler_weights/s"
    assert copy("d", session_id=session, model_seq_id=7).json()["tinker_path"] == inside
    for body in ({}, {"session_id": session}, {"destination_project_id": "p", "session_id": session}):
        assert copy("e", **body).status_code == 400
    taken = copy("f", session_id=session, model_seq_id=0)
    assert taken.status_code == 400 and "already" in taken.json()["detail"]
    lora = {"rank": 1}
    reused = http.post(
        "create_model",
        json={"session_id": session, "model_seq_id": 7, "base_model": "tinkercloud/nano", "lora_config": lora},
    )
    assert reused.status_code == 400


def test_sessions_are_found_and_moved(server, rest):
    made = []
    for name in ("Nightly Run one", "nightly run two", "else"):
        client = tinker.ServiceClient(
            base_url=server.url, api_key="tml-test", display_name=name, user_metadata={"team": name[:3]}
        )
        made.append(client.holder.get_session_id())
        if name == "else":
            client.close("errored").result()
        else:
            client.holder.close()
    one, two, other = made
    assert [found.session_id for found in search(rest, display_name="RUN night").sessions] == [two, one]
    assert [found.session_id for found in search(rest, display_name="two", session_id=one).sessions] == [two, one]
    assert [found.session_id for found in search(rest, user_metadata={"team": "Nig"}).sessions] == [one]
    (ended,) = search(rest, session_id=other).sessions
    assert ended.status.type == "client_finished" and ended.status.reason.type == "errored"
    finished = [{"type": "client_finished", "reasons": ["errored"]}]
    assert other in [found.session_id for found in search(rest, statuses=finished).sessions]
    assert other not in [found.session_id for found in search(rest, statuses=[{"type": "active"}]).sessions]
    first = search(rest, limit=1, display_name="nightly")
    second = search(rest, limit=1, display_name="nightly", cursor=first.next_cursor)
    assert [first.sessions[0].session_id, second.sessions[0].session_id] == [two, one]
    rest.assign_session_project(one, "moved").result()
    (moved,) = search(rest, project_ids=["moved"]).sessions
    assert (moved.session_id, moved.project_id, moved.checkpoints_count) == (one, "moved", 0)
    assert not search(rest, owner={"type": "user", "owner_urns": ["somebody"]}).sessions
    with pytest.raises(tinker.NotFoundError):
        rest.assign_session_project("none", "moved").result()
