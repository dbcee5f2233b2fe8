"""The loop that runs the operations goes on after whatever happens to it; if it ever ends, everybody can see it."""

import asyncio
import contextlib
import logging
import sqlite3

import httpx

from tests.control.conftest import BATCH, NANO, Client
from tinkercloud.api.app import create_app
from tinkercloud.codec import decode
from tinkercloud.config import Settings
from tinkercloud.control import conductor
from tinkercloud.control.training_run import TrainingRun
from tinkercloud.engine.operations import ForwardBackward, TrainOperation
from tinkercloud.engine.results import LossOutput
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import SnapshotRecord


def test_a_database_that_fails_again_and_again_delays_a_run(serving, run, tmp_path, monkeypatch, caplog):
    """Outcomes cannot be stored, and then what was stored cannot be read either."""
    monkeypatch.setattr(conductor, "RETRY_SECONDS", 0.01)

    async def story():
        async with serving() as service:
            expected = await (await Client.create(service)).steps(2)
            client = await Client.create(service)
            losses = await client.steps(1)
            ahead = ForwardBackward(client.model.model_id, BATCH, "cross_entropy")
            with contextlib.closing(sqlite3.connect(tmp_path / "data" / "ledger.db", timeout=30)) as database:
                database.execute("ALTER TABLE models RENAME TO hidden_models")  # so that completions fail
                entry = await client.send("forward_backward", ahead)
                await until(lambda: "no such table: models" in caplog.text)
                database.execute("ALTER TABLE entries RENAME TO hidden_entries")
                service._ledger._recent.entries.put("nothing else", None, 20_000)  # what was used long ago is not known
                caplog.clear()
                await until(lambda: caplog.text.count("no such table: entries") >= 2)
                database.execute("ALTER TABLE hidden_entries RENAME TO entries")
                database.execute("ALTER TABLE hidden_models RENAME TO models")
            outcome = await client.result(entry)
            assert isinstance(outcome, LossOutput)
            losses.append(outcome.metrics["loss:sum"])
            assert losses == expected
            await client.optim_step()
            assert not service.models.broken

    run(story)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_loop_that_ended_shows_in_the_health_and_in_the_log(serving, run, tmp_path, caplog):
    async def story():
        async with serving() as service:
            app = create_app(service, Settings.load(data_dir=tmp_path / "data"))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as http:
                await service.models.settled()
                assert (await http.get("/api/v1/healthz")).status_code == 200
                with caplog.at_level(logging.CRITICAL):
                    loop = service.models.get(NANO).conductor._task
                    loop.cancel()
                    await asyncio.wait([loop])
                    await asyncio.sleep(0)
                health = await http.get("/api/v1/healthz")
            assert health.status_code == 503 and health.json()["status"] == "failed"
            assert "training loop has ended" in health.json()["engines"][NANO]
            assert "training loop has ended" in caplog.text
            caplog.clear()
        assert "training loop" not in caplog.text, "a stop ends it, too"

    run(story)


def test_an_operation_waits_for_the_snapshot_of_one_idle_run_at_most(shared, monkeypatch):
    async def story(service):
        client, _ = [await Client.create(service) for _ in range(2)]
        loop = service.models.get(NANO).conductor
        run_cycle, events, sent = loop._run_cycle, [], asyncio.get_running_loop().create_future()

        async def cycle(runs):
            events.append("cycle")
            await run_cycle(runs)

        async def snapshot(run, engine):
            events.append("snapshot")
            if len(events) == 1:
                batch = ForwardBackward(client.model.model_id, BATCH, "cross_entropy")
                sent.set_result(await client.send("forward_backward", batch))

        monkeypatch.setattr(loop, "_run_cycle", cycle)
        monkeypatch.setattr(TrainingRun, "snapshot", snapshot)
        monkeypatch.setattr(TrainingRun, "wants_snapshot", lambda run, settings, now: True)
        loop._work.set()
        assert isinstance(await client.result(await sent), LossOutput)
        assert events[:2] == ["snapshot", "cycle"]

    shared(story)


def test_a_folder_that_cannot_be_removed_delays_nobody(shared, monkeypatch, caplog):
    """The save that has taken its place is recorded, and its client hears so."""

    async def story(service):
        client = await Client.create(service)
        first = await client.save("name")
        failing = True

        async def count(ledger, kind, **fields):
            if failing and fields == {"folder": first.folder}:
                raise OSError("the database is gone for a moment")
            return await counted(ledger, kind, **fields)

        counted = Ledger.count
        monkeypatch.setattr(Ledger, "count", count)
        second = await asyncio.wait_for(client.save("name", overwrite=True), timeout=20)
        failing = False
        assert second.folder != first.folder
        assert f"{first.folder}, which nothing needs any more, stays until the next start" in caplog.text
        await client.steps(1)

    shared(story)


def test_runs_are_put_on_disk_together(shared, monkeypatch, caplog, undisturbed):
    """What is wrong with one of them is that one's alone: it is rebuilt from its log."""

    async def story(service):
        served = service.models.get(NANO)
        await served.conductor.park_all()  # of the other tests
        engine, insert, cycles = await served.engine.running(), service._ledger.insert, []
        clients = [await Client.create(service) for _ in range(3)]
        losses = [await client.steps(2) for client in clients]
        run_cycle = engine.run_cycle

        async def seen(operations):
            cycles.append([type(decode(each, TrainOperation)).__name__ for each in operations])
            return await run_cycle(operations)

        async def unreliable(record):
            if isinstance(record, SnapshotRecord) and record.model_id == clients[1].model.model_id:
                raise OSError("this one is not recorded")
            return await insert(record)

        with monkeypatch.context() as failing:
            failing.setattr(engine, "run_cycle", seen)
            failing.setattr(service._ledger, "insert", unreliable)
            await served.conductor.park_all()
        assert cycles == [["SaveWeights"] * 3, ["DropModel"] * 3] and "this one is not recorded" in caplog.text
        for client, before in zip(clients, losses, strict=True):
            recorded = await service._ledger.find(SnapshotRecord, model_id=client.model.model_id)
            assert len(recorded) == (client is not clients[1])
            assert before + await client.steps(1) == undisturbed[:3]

    shared(story)
