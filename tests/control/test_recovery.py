"""A client must not notice that the engine or the server was gone in between."""

import asyncio
import json
import os
import resource
import shutil
import signal
import sqlite3
import time

import numpy as np
import pytest
from sqlalchemy.exc import IntegrityError

from tests.control.conftest import BATCH, NANO, OWNER, Client, datum, kill_engine, park_silent
from tinkercloud.api.validate import lora_from
from tinkercloud.api.wire import json as wire
from tinkercloud.codec import encode
from tinkercloud.control import conductor, engines
from tinkercloud.control.engine_handle import EngineDied, EngineHandle
from tinkercloud.engine.operations import FindSample, ForwardBackward, Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput
from tinkercloud.errors import Ended, InvalidRequest, NotFound
from tinkercloud.ledger.records import SessionRecord, SnapshotRecord
from tinkercloud.model_settings import ModelSettings
from tinkercloud.nano import FOLDER


def test_a_run_goes_on_after_the_server_was_stopped(serving, run, undisturbed):
    async def story():
        expected = undisturbed[:6]
        async with serving() as service:
            client = await Client.create(service)
            losses = await client.steps(3)
            await client.forward_backward()  # the gradient of a half-done step survives, too
        async with serving() as service:
            client.service = service
            await client.optim_step()
            losses += [expected[3], *await client.steps(2)]
        assert losses == expected

    run(story)


def test_what_is_sent_while_an_engine_dies_runs_on_the_next_one(serving, run):
    """Its socket is closed some milliseconds before it is known to have ended, and uvloop's raises an error if written
    to then."""

    async def story():
        async with serving() as service:
            client = await Client.create(service)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            engine = await service.models.get(NANO).engine.running()
            engine._writer.close()
            asked, cycle = engine.ask(encode(FindSample("nobody"))), engine.run_cycle([])
            for answer in await asyncio.gather(asked, cycle, return_exceptions=True):
                assert isinstance(answer, EngineDied)
            entry = await service.samplers.sample(
                sampler,
                1,
                Sample("", sampler.sampler_id, np.array([5, 6], np.int32), SamplingParams(max_tokens=2, seed=1)),
            )
            _, outcome = await service.futures.outcome(entry.request_id, OWNER, timeout=60)
            assert isinstance(outcome, SampleOutput)
            assert len(await client.steps(1)) == 1

    run(story)


def test_an_engine_that_could_not_load_is_waited_for(shared, tmp_path):
    """A task that nobody holds may be collected while it runs, with a traceback in the log and a zombie left."""
    (tmp_path / "config.json").write_text("{}")

    async def story(service):
        with pytest.raises(InvalidRequest, match="cannot be served"):
            await service.models.add(ModelSettings(name="broken", source=str(tmp_path)))
        readers = [task for task in asyncio.all_tasks() if "EngineHandle._read" in repr(task)]
        assert len(readers) == len(list(service.models))

    shared(story)


def test_what_was_accepted_waits_for_a_base_model_that_cannot_be_loaded(serving, run, undisturbed, tmp_path):
    """A disk that is not mounted at a start costs nobody an operation."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder)
    weights, away = folder / "model.safetensors", tmp_path / "away"

    async def story():
        async with serving(models=[f"{NANO}={folder}"]) as service:
            client = await Client.create(service)
            losses = await client.steps(2)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
        weights.rename(away)
        async with serving(models=[f"{NANO}={folder}"]) as service:
            client.service = service
            await service.models.settled()
            step = await client.send("forward_backward", ForwardBackward(client.model.model_id, BATCH, "cross_entropy"))
            params = SamplingParams(max_tokens=2, seed=1)
            operation = Sample("", sampler.sampler_id, np.array([5, 6], np.int32), params)
            drawn, unwanted = [await service.samplers.sample(sampler, seq, operation) for seq in (1, 2)]
            for entry in (step, drawn):
                assert (await service.futures.outcome(entry.request_id, OWNER, timeout=0.3))[1] is None
                assert "has no *.safetensors file" in await service.futures.paused(entry)
            await service.samplers.cancel(unwanted.request_id, OWNER)
            assert isinstance(await client.result(unwanted), Failure)
        away.rename(weights)
        async with serving(models=[f"{NANO}={folder}"]) as service:
            client.service = service
            losses.append((await client.result(step)).metrics["loss:sum"])
            await client.optim_step()
            losses += await client.steps(1)
            assert isinstance(await client.result(drawn), SampleOutput)
        assert losses == undisturbed[:4]

    run(story)


def test_an_engine_is_started_again_whatever_its_start_raises(shared, monkeypatch):
    """Such as EOFError, if the process that engines are forked from ends in between."""
    start, failed = EngineHandle.start, []

    async def start_after_a_failure(handle):
        if not failed:
            failed.append(handle)
            raise EOFError
        return await start(handle)

    async def story(service):
        client = await Client.create(service)
        monkeypatch.setattr(engines, "RESTART_SECONDS", (0.0,))
        monkeypatch.setattr(EngineHandle, "start", start_after_a_failure)
        await kill_engine(service)
        await client.steps(1)
        assert failed

    shared(story)


def test_a_run_goes_on_after_its_engine_was_killed(serving, run, undisturbed):
    async def story():
        expected = undisturbed[:6]
        async with serving() as service:
            client = await Client.create(service)
            losses = await client.steps(3)
            engine = await service.models.get(NANO).engine.running()
            os.kill(engine.pid, signal.SIGKILL)
            losses += await client.steps(3)
            assert service.models.ready(), "a restart does not take readiness back"
        assert losses == expected

    run(story)


def test_a_run_comes_back_with_its_optimizer(serving, run, shared):
    """From its log alone, from a snapshot, and from a snapshot and the log behind it."""

    async def calm(service):
        return await (await Client.create(service, optimizer="dimuon")).steps(7)

    async def story():
        async with serving() as service:
            client = await Client.create(service, optimizer="dimuon")
            losses = await client.steps(2)
            os.kill((await service.models.get(NANO).engine.running()).pid, signal.SIGKILL)
            losses += await client.steps(1)
            await park_silent(service, time.time() + 10_000)
            losses += await client.steps(2)
            os.kill((await service.models.get(NANO).engine.running()).pid, signal.SIGKILL)
            losses += await client.steps(2)
            assert client.model.optimizer == "dimuon"
        assert losses == expected

    expected = shared(calm)
    run(story)


def test_a_run_keeps_its_alpha_when_the_servers_changes(serving, run, tmp_path):
    """Replayed from its log, and from a snapshot."""

    async def lora_of(service):
        return lora_from(wire.Lora(rank=4, seed=0), await service.models.info(NANO))

    async def story():
        async with serving(lora_alpha=64) as service:
            expected = await (await Client.create(service, lora=await lora_of(service))).steps(5)
            client = await Client.create(service, lora=await lora_of(service))
            losses = await client.steps(2)
            os.kill((await service.models.get(NANO).engine.running()).pid, signal.SIGKILL)
            losses += await client.steps(1)
        async with serving(lora_alpha=8) as service:
            client.service = service
            losses += await client.steps(2)
            assert losses == expected
            saved = await client.save("kept")
            assert (await service.checkpoints.get(saved.path, OWNER)).lora.alpha == 64
            other = await Client.create(service, lora=await lora_of(service))
            assert (await service.runs.find(other.model.model_id, OWNER)).lora.alpha == 8
            assert await other.steps(5) != expected
        (config,) = (tmp_path / "data" / "checkpoints").rglob("adapter_config.json")
        assert json.loads(config.read_text())["lora_alpha"] == 64

    run(story)


def test_a_parked_session_comes_back_by_itself(shared, undisturbed):
    async def story(service):
        expected = undisturbed[:4]
        client = await Client.create(service)
        losses = await client.steps(2)
        await park_silent(service, time.time() + 10_000)
        assert (await service.sessions.get(client.session.session_id, OWNER)).state == "parked"
        losses += await client.steps(2)
        assert (await service.sessions.get(client.session.session_id, OWNER)).state == "active"
        assert losses == expected
        await park_silent(service, time.time() + 10_000)
        await service.sessions.heartbeat(client.session.session_id, OWNER)
        assert (await service.sessions.get(client.session.session_id, OWNER)).state == "active"

    shared(story)


def test_snapshots_bound_the_replay_and_old_ones_go(serving, run, undisturbed, tmp_path):
    async def story():
        expected = undisturbed[:8]
        async with serving(snapshot_operations=3) as service:
            client = await Client.create(service)
            losses = await client.steps(5)
            newest, *_ = await service._ledger.find(SnapshotRecord, model_id=client.model.model_id)
            assert newest.seq_id >= client.seq_id - 3
            engine = await service.models.get(NANO).engine.running()
            os.kill(engine.pid, signal.SIGKILL)
            losses += await client.steps(3)
        assert losses == expected
        kept = list((tmp_path / "data" / "snapshots").glob("*/*"))
        assert len([folder for folder in kept if client.session.session_id in folder.parent.name]) <= 2

    run(story)


@pytest.mark.parametrize("setting, value", [("snapshot_bytes", 500), ("snapshot_seconds", 0.2)])
def test_snapshots_come_by_bytes_and_by_seconds(shared, monkeypatch, setting, value):
    async def story(service):
        monkeypatch.setattr(service.models.get(NANO).conductor._settings, setting, value)
        monkeypatch.setattr(conductor, "GAP_CHECK_SECONDS", 0.1)
        client = await Client.create(service)
        await client.steps(2)
        deadline = time.monotonic() + 30
        while not (snapshots := await service._ledger.find(SnapshotRecord, model_id=client.model.model_id)):
            assert time.monotonic() < deadline, "also of a run that nothing more is asked of"
            await asyncio.sleep(0.05)
        assert 0 < snapshots[0].seq_id <= 4

    shared(story)


def test_an_operation_that_kills_the_engine_each_time_is_given_up(serving, run):
    async def story():
        async with serving() as service:
            client, bystander = await Client.create(service), await Client.create(service)
            long = tuple(
                datum(*(i % 500 for i in range(3000))) for _ in range(20)
            )  # seconds of work: time to kill the engine in
            entry = await client.send(
                "forward_backward", ForwardBackward(client.model.model_id, long, "cross_entropy", forward_only=False)
            )
            conductor = service.models.get(NANO).conductor
            for _ in range(2):
                engine = await service.models.get(NANO).engine.running()
                while not (conductor._runs[client.model.model_id].resident(engine) and engine._waiting):
                    await asyncio.sleep(0.01)
                os.kill(engine.pid, signal.SIGKILL)
                await engine.died.wait()
            outcome = await client.result(entry)
            assert isinstance(outcome, Failure) and outcome.category == "server"
            assert "given up" in outcome.error
            refused = await client.optim_step()
            assert isinstance(refused, Failure) and "gradients lack" in refused.error
            assert await client.steps(2), "the model goes on"
            assert await bystander.steps(1)

    run(story)


def test_a_finished_session_ends_its_runs_and_keeps_its_checkpoints(shared):
    async def story(service):
        client = await Client.create(service)
        await client.steps(1)
        saved = await client.save("kept")
        client.seq_id += 1
        made = await client.result(await service.runs.save_ephemeral_sampler(client.model, client.seq_id, 0))
        sampler = await service.samplers.get(made.sampling_session_id, OWNER)
        assert (service._settings.data_dir / sampler.folder).is_dir()
        await service.sessions.finish(client.session.session_id, OWNER, "success")
        await service.sessions.finish(client.session.session_id, OWNER, "errored")
        assert (await service.sessions.get(client.session.session_id, OWNER)).finish_reason == "success"
        with pytest.raises(Ended):
            await service.sessions.heartbeat(client.session.session_id, OWNER)
        with pytest.raises(NotFound):
            await service.runs.live(client.model.model_id, OWNER)
        assert not (service._settings.data_dir / sampler.folder).exists()
        checkpoint = await service.checkpoints.get(saved.path, OWNER)
        assert (service._settings.data_dir / checkpoint.folder / "adapter_model.safetensors").is_file()

    shared(story)


def test_a_silent_session_is_finished_after_its_retention(shared):
    async def story(service):
        client = await Client.create(service)
        timeout, retention = service._settings.session_timeout_seconds, service._settings.session_retention_seconds
        for _ in range(2):
            await park_silent(service, time.time() + (timeout + retention) / 2)
        assert (await service.sessions.get(client.session.session_id, OWNER)).state == "parked"
        await park_silent(service, time.time() + retention + 1)
        assert (await service.sessions.get(client.session.session_id, OWNER)).state == "finished"

    shared(story)


def test_downtime_is_no_silence(serving, run, tmp_path):
    async def story():
        down, retention = 5000, 1000
        async with serving(session_retention_seconds=retention) as service:
            alive, silent = [await Client.create(service) for _ in range(2)]
            stopped = time.time() - down
            for client, heard_of in ((alive, stopped - 10), (silent, stopped - retention)):
                await service._ledger.change(SessionRecord, client.session.session_id, last_heartbeat=heard_of)
                service._ledger._deferred._touches.sessions.clear()
        os.utime(tmp_path / "data" / "ledger.lock", (stopped, stopped))
        with sqlite3.connect(tmp_path / "data" / "ledger.db") as database:
            database.execute("CREATE TRIGGER no BEFORE UPDATE ON sessions BEGIN SELECT RAISE(ABORT, 'not now'); END")
        async with serving(session_retention_seconds=retention) as service:
            with pytest.raises(IntegrityError):
                await park_silent(service, time.time())  # as the start could not record it
            with database:
                database.execute("DROP TRIGGER no")
            database.close()
            for _ in range(2):
                await park_silent(service, time.time())
            states = [
                (await service.sessions.get(client.session.session_id, OWNER)).state for client in (alive, silent)
            ]
            assert states == ["active", "finished"]
            client = Client(service, alive.session, alive.model)
            assert await client.steps(1)

    run(story)


LONG = tuple(datum(*(i % 500 for i in range(start, start + 550))) for start in range(34))
"""A batch whose results are too large for a small blob."""


def test_a_full_disk_delays_a_run_and_changes_nothing(shared, caplog, monkeypatch):
    """Outcomes that could not be stored: their operations run again from what is on disk, and count once."""
    monkeypatch.setattr(conductor, "RETRY_SECONDS", 0.01)

    async def losses(service, disk_fills_up):
        client, losses = await Client.create(service), []
        for batch in (BATCH, LONG, BATCH):
            operation = ForwardBackward(client.model.model_id, batch, "cross_entropy")
            async with service.models.get(NANO).conductor._between_cycles:  # it is accepted, and does not run yet
                entry = await client.send("forward_backward", operation)
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                if disk_fills_up and batch is LONG:
                    newest = max((service._settings.data_dir / "segments").iterdir())
                    resource.setrlimit(resource.RLIMIT_FSIZE, (newest.stat().st_size + 10_000, limits[1]))
            try:
                while disk_fills_up and batch is LONG and caplog.text.count("DiskFull") < 2:
                    await asyncio.sleep(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            losses.append((await client.result(entry)).metrics["loss:sum"])
            if batch is LONG:  # its gradient counts once, beside that of the first batch
                await client.optim_step()
        return losses

    async def story(service):
        assert await losses(service, disk_fills_up=True) == await losses(service, disk_fills_up=False)

    shared(story)


def test_a_smaller_max_rank_is_for_new_runs_alone(serving, run, without_snapshots):
    async def story():
        async with serving() as service:
            expected = await (await Client.create(service)).steps(2)
            client = await Client.create(service)
            losses = await client.steps(1)
            checkpoint = await client.save("it")
            await client.created_from(checkpoint)
        async with serving(max_rank=2) as service:
            client.service = service
            losses += await client.steps(1)  # after a replay of its creation
            assert not isinstance(await client.load(checkpoint), Failure)
            sampler = await service.samplers.create(client.session, 0, None, checkpoint.path)
            params = SamplingParams(max_tokens=2, seed=1)
            sample = Sample("", sampler.sampler_id, np.arange(5, 9, dtype=np.int32), params)
            entry = await service.samplers.sample(sampler, 0, sample)
            assert not isinstance(await client.result(entry), Failure)
            assert (await service.runs.create_from(client.session, 1, checkpoint, True, {})).repeated
            with pytest.raises(InvalidRequest, match="rank 4, which exceeds max LoRA rank 2"):
                await client.created_from(checkpoint, model_seq_id=2)
        assert losses == expected

    run(story)
