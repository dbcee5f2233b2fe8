"""A run's state is rebuilt from what can be read of it; what cannot be rebuilt is said, and not for ever."""

import contextlib
import logging
import shutil
import sqlite3
import zlib
from importlib.metadata import version

import pytest
from msgspec.structs import replace

from tests.control.conftest import NANO, Client, kill_engine
from tinkercloud.codec import decode, encode
from tinkercloud.engine.results import Failure, LossOutput
from tinkercloud.ledger.records import ModelUnloaded, SnapshotRecord, WeightsLoaded
from tinkercloud.ledger.segments import Corrupt


def _cut_short(content: bytes) -> bytes:
    return content[:1000]


def _with_a_flipped_bit(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


async def damage_snapshots(
    client: Client, data, count: int, damaged=_cut_short, name: str = "adapter_model.safetensors"
) -> None:
    """Damage the newest snapshots of a run that is not in its engine."""
    snapshots = await client.service._ledger.find(SnapshotRecord, model_id=client.model.model_id)
    assert len(snapshots) == 2
    for snapshot in snapshots[:count]:
        file = data / snapshot.folder / name
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(damaged(content))


@pytest.mark.parametrize(
    ("damaged", "name"),
    [
        (_cut_short, "adapter_model.safetensors"),
        (_with_a_flipped_bit, "adapter_model.safetensors"),
        (_with_a_flipped_bit, "optimizer.safetensors"),
    ],
)
def test_a_damaged_snapshot_costs_a_longer_replay(serving, run, tmp_path, caplog, damaged, name):
    async def story():
        async with serving() as service:
            client, undisturbed = await Client.create(service), await Client.create(service)
            expected = await undisturbed.steps(5)
            losses = []
            for _ in range(2):
                losses += await client.steps(2)
                await service.models.get(NANO).conductor.park_all()
            await damage_snapshots(client, tmp_path / "data", 1, damaged, name)
            with caplog.at_level(logging.WARNING):
                assert losses + await client.steps(1) == expected
            assert "an older state and a longer replay" in caplog.text

    run(story)


def test_a_run_without_a_readable_state_can_be_given_one(serving, run, tmp_path):
    """By a load, with or without its optimizer; all else fails and says so, but for the run's end."""

    async def story():
        async with serving() as service:
            conductor = service.models.get(NANO).conductor
            client, unloading = await Client.create(service), await Client.create(service)
            checkpoint = await client.save("it")
            expected = await client.steps(2)
            for with_optimizer in (True, False):
                for run_ in (client, unloading):
                    for _ in range(2):
                        await run_.steps(1)
                        await conductor.park_all()
                    await damage_snapshots(run_, tmp_path / "data", 2)
                for lost in (await client.forward_backward(), await client.optim_step()):
                    assert isinstance(lost, Failure) and lost.category == "server"
                    for said in ("could not be rebuilt", "its snapshot after", "create_training_client_from_state"):
                        assert said in lost.error
                assert isinstance(await client.load(checkpoint, with_optimizer), WeightsLoaded)
                assert await client.steps(2) == expected
                if with_optimizer:
                    unload = await unloading.result(await service.runs.unload(unloading.model))
                    assert isinstance(unload, ModelUnloaded)
                    unloading = await Client.create(service)
            await client.forward_backward()
            await kill_engine(service)
            assert isinstance(await client.forward_backward(), LossOutput)

    run(story)


def test_a_load_is_a_state_to_begin_from(serving, run, tmp_path):
    """Also while no snapshot has passed it and those before it are lost."""

    async def story():
        async with serving() as service:
            conductor = service.models.get(NANO).conductor
            client = await Client.create(service)
            checkpoint = await client.save("it")
            expected = await client.steps(3)
            for _ in range(2):
                await client.steps(1)
                await conductor.park_all()
            await damage_snapshots(client, tmp_path / "data", 2)
            snapshots = tmp_path / "data" / "snapshots" / client.model.model_id.replace(":", "_")
            snapshots.rename(snapshots.with_name("hidden"))
            snapshots.write_text("no snapshot can be written here")
            await client.load(checkpoint)
            losses = await client.steps(2)
            await kill_engine(service)
            losses += await client.steps(1)
            assert losses == expected
            snapshots.unlink()
            shutil.rmtree(snapshots.with_name("hidden"))

    run(story)


CHANGES = {
    "nothing": (None, 0.0, True),
    "a bit": (None, 1e-7, False),
    "a bit, by another build": ("another", 1e-7, True),
    "a bit, before builds were recorded": ("", 1e-7, True),
    "the loss, by another build": ("another", 1e-3, False),
}
"""(the build on record instead of the engine's own, by how much the stored loss differs, whether the run goes on)"""


def test_a_replay_that_gives_other_results_is_stopped(serving, run, tmp_path, without_snapshots, caplog):
    async def story():
        async with serving() as service:
            clients = [await Client.create(service) for _ in CHANGES]
            expected = await (await Client.create(service)).steps(2)
            assert [await client.steps(1) for client in clients] == [expected[:1]] * len(clients)
            entry = await service._ledger.entry(f"{clients[0].model.model_id}:1")
            assert entry.build == service.models.get(NANO).engine.info.build
            assert f"torch {version('torch')}" in entry.build and "float32" in entry.build
        for client, (build, change, _) in zip(clients, CHANGES.values(), strict=True):
            change_outcome(tmp_path / "data", f"{client.model.model_id}:1", build, change)
        async with serving() as service:
            for client, (name, (build, _, goes_on)) in zip(clients, CHANGES.items(), strict=True):
                client.service = service
                caplog.clear()
                outcome = await client.forward_backward()
                assert isinstance(outcome, LossOutput if goes_on else Failure), (name, outcome)
                if goes_on:
                    assert outcome.metrics["loss:sum"] == expected[1]
                else:
                    assert (
                        outcome.category == "server" and "operation 1 (forward_backward) did not give" in outcome.error
                    )
                assert (build is not None) == ("not bit for bit" in caplog.text), name

    run(story)


def test_a_stored_result_that_cannot_be_read_is_not_compared(serving, run, tmp_path, without_snapshots, caplog):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            expected = await (await Client.create(service)).steps(2)
            losses = await client.steps(1)
        with contextlib.closing(sqlite3.connect(tmp_path / "data" / "ledger.db")) as database, database:
            where = "part = 'outcome' AND request_id = ?"
            database.execute(f"UPDATE small_blobs SET crc = crc - 1 WHERE {where}", [f"{client.model.model_id}:1"])
        async with serving() as service:
            client.service = service
            assert losses + await client.steps(1) == expected
            assert "operation 1 of" in caplog.text and "is not compared" in caplog.text

    run(story)


def change_outcome(data, request_id: str, build: str | None, change: float) -> None:
    """Let the ledger remember another loss, and another build."""
    with contextlib.closing(sqlite3.connect(data / "ledger.db")) as database, database:
        where = "FROM small_blobs WHERE part = 'outcome' AND request_id = ?"
        (stored,) = database.execute(f"SELECT data {where}", [request_id]).fetchone()
        outcome = decode(stored, LossOutput)
        metrics = outcome.metrics | {"loss:sum": outcome.metrics["loss:sum"] * (1 + change)}
        changed = encode(replace(outcome, metrics=metrics))
        assert (changed != stored) == bool(change)
        values = [changed, zlib.crc32(changed), request_id]
        database.execute("UPDATE small_blobs SET data = ?, crc = ? WHERE part = 'outcome' AND request_id = ?", values)
        if build is not None:
            database.execute("UPDATE entries SET build = ? WHERE stream = ?", [build or None, request_id[:-2]])


def test_a_step_that_cannot_be_read_clears_what_it_was_to_apply(shared, monkeypatch):
    """In the engine as in the ledger, or the next step would apply it, and no replay give that again."""

    async def story(service):
        calm, client = await Client.create(service), await Client.create(service)
        await client.forward_backward()
        with monkeypatch.context() as patch:

            async def unreadable(request_id):
                raise Corrupt(f"the payload of {request_id} is damaged")

            patch.setattr(service._ledger, "payload", unreadable)
            failed = await client.optim_step()
            assert isinstance(failed, Failure) and failed.category == "server" and "is damaged" in failed.error
        expected = []
        for one in (calm, client):
            await one.forward_backward()
            expected.append((await one.optim_step()).metrics["unclipped_grad_l2:mean"])
        assert expected[0] == expected[1]
        await kill_engine(service)
        assert await client.steps(1) == await calm.steps(1)

    shared(story)
