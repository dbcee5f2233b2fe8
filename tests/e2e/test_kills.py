"""The small version of `make chaos`."""

from tests.chaos.client import TENANTS
from tests.chaos.kills import ANSWER_SECONDS, differences, disturbed, undisturbed
from tests.serving import Server
from tinkercloud.control.checkpoint_store import CheckpointStore

SEED, ROUNDS, KILLS = 2, 4, 3


def test_a_client_does_not_notice_that_its_server_is_killed(server, tmp_path):
    expected = undisturbed(server, SEED, ROUNDS, tmp_path / "undisturbed.err")
    assert expected.weights.keys() == expected.answers.keys() == TENANTS.keys()
    store = ("--set", f"checkpoints_url=file://{tmp_path}/store")  # the undisturbed one's are in its data directory
    with Server(tmp_path / "data", "--set", "snapshot_operations=5", *store) as disturbed_server:
        outcome, kills = disturbed(
            disturbed_server, SEED, ROUNDS, KILLS, expected.num_answers, tmp_path / "disturbed.err"
        )
    assert differences(expected, outcome) == []
    kept = CheckpointStore(f"file://{tmp_path}/store")
    assert len(kept.keys()) >= len(TENANTS) and not any(map(kept.damage, kept.keys()))
    assert len(kills) == KILLS and max(kill.seconds for kill in kills) < ANSWER_SECONDS, kills
