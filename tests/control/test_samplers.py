"""How long samplers and their results stay, and what a client is told of those that are gone."""

import asyncio
import os
import signal
import time

import numpy as np
import pytest

from tests.control.conftest import BATCH, NANO, OWNER, Client, before_the_next_append
from tinkercloud.codec import decode
from tinkercloud.control import sampler_desk
from tinkercloud.control.verify import problems
from tinkercloud.engine.operations import CloseSampler, ForwardBackward, OpenSampler, Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput
from tinkercloud.errors import Ended, NotFound
from tinkercloud.ledger.records import CheckpointRecord, SessionRecord

DAY = 86400.0


async def sample(service, sampler, seq_id: int | None, max_tokens: int = 3):
    prompt, params = np.arange(5, 9, dtype=np.int32), SamplingParams(max_tokens=max_tokens, seed=1)
    return await service.samplers.sample(sampler, seq_id, Sample("", sampler.sampler_id, prompt, params))


def test_acknowledged_results_go_and_nobody_elses(serving, run):
    async def story():
        async with serving() as service:
            one = await service.samplers.unbound(OWNER, NANO, None)
            client = await Client.create(service)
            other = await service.samplers.create(client.session, 0, NANO, None)
            mine = [await sample(service, one, seq_id) for seq_id in range(2)]
            theirs = await sample(service, other, 0)
            for entry in (*mine, theirs):
                assert isinstance(await Client._finished(service, entry), SampleOutput)
            step = await client.send("forward_backward", ForwardBackward(client.model.model_id, BATCH, "cross_entropy"))
            await client.result(step)
            named = [mine[0].request_id, theirs.request_id, step.request_id, "nonsense", ":"]
            told = await service.futures.completions(one, 0, 0, named, timeout=0)
            assert {each.request_id for each in told} == {each.request_id for each in mine}
            assert await service._ledger.expire(time.time() + 300) == 1
            with pytest.raises(Ended):
                await service.futures.outcome(mine[0].request_id, OWNER, 0)
            assert isinstance(await Client._finished(service, mine[1]), SampleOutput)

    run(story)


async def ephemeral(client: Client, number: int):
    """A sampler of the run as it is now."""
    client.seq_id += 1
    made = await client.result(await client.service.runs.save_ephemeral_sampler(client.model, client.seq_id, number))
    return await client.service.samplers.get(made.sampling_session_id, OWNER)


def test_samplers_of_finished_sessions_go_and_with_them_what_they_kept(serving, run, tmp_path):
    """Those of requests without a session too, and come again."""

    async def story():
        async with serving() as service:
            unbound = await service.samplers.unbound(OWNER, NANO, None)
            expected = await Client._finished(service, await sample(service, unbound, 0))
            client, reader = await Client.create(service), await Client.create(service)
            saved = await client.save("kept", kind="sampler")
            path, checkpoint = saved.path, tmp_path / "data" / saved.folder
            named = await service.samplers.create(reader.session, 0, None, path)
            running = await ephemeral(reader, 1)
            entry = await sample(service, running, 0, max_tokens=400)
            await service._ledger.remove(CheckpointRecord, path)
            await service.sessions.finish(reader.session.session_id, OWNER, "success")
            assert isinstance(await Client._finished(service, entry), SampleOutput), "it was running at the end"

            now = time.time()
            await service.tidy(now + 2 * 3600)
            assert await service.samplers.get(named.sampler_id, OWNER) and checkpoint.is_dir()
            with pytest.raises(Ended):
                await sample(service, named, 0)
            await service.tidy(now + 2 * DAY)
            for sampler in (named, running, unbound):
                with pytest.raises(NotFound, match="dropped some time after its session"):
                    await service.samplers.get(sampler.sampler_id, OWNER)
            assert not checkpoint.exists() and not (tmp_path / "data" / running.folder).exists()
            assert await service._ledger.last_arrival(running.sampler_id) is None, "nor is a row left of its samples"
            assert (await service.samplers.unbound(OWNER, NANO, None)).sampler_id == unbound.sampler_id
            again = await Client._finished(service, await sample(service, unbound, 1))
            assert again.sequences[0].tokens.tolist() == expected.sequences[0].tokens.tolist()

    run(story)


def test_ephemeral_samplers_have_a_budget(serving, run, tmp_path):
    """The least recently used of silent sessions go first; one in use and the newest of each live session never."""

    async def story():
        async with serving() as service:
            client = await Client.create(service)
            first = await ephemeral(client, 0)
            size = sum(file.stat().st_size for file in (tmp_path / "data" / first.folder).iterdir())
            service._keeper._budget = 4 * size + size // 2
            silent = await Client.create(service)
            samplers = [first, await ephemeral(client, 1), await ephemeral(client, 2), await ephemeral(client, 3)]
            theirs = [await ephemeral(silent, 0), await ephemeral(silent, 1), await ephemeral(silent, 2)]
            for used in (samplers[0], theirs[0]):
                await Client._finished(service, await sample(service, used, 0))
            running = await sample(service, theirs[1], 0, max_tokens=400)
            await service._ledger.change(SessionRecord, silent.session.session_id, state="parked")

            def there() -> list[bool]:
                return [(tmp_path / "data" / sampler.folder).is_dir() for sampler in samplers + theirs]

            await service.tidy(time.time())
            # Three too many: two of the silent session, of which one is in use, then the oldest unused of the other.
            assert there() == [True, False, True, True, False, True, False]
            assert isinstance(await Client._finished(service, running), SampleOutput)
            assert isinstance(await Client._finished(service, await sample(service, samplers[0], 1)), SampleOutput)
            for request in (sample(service, samplers[1], 0), service.samplers.join(samplers[1])):
                with pytest.raises(NotFound, match=r"ephemeral_sampler_bytes.*Make a new sampling client"):
                    await request
            await service.tidy(time.time() + 2 * DAY)

            service._keeper._budget = 1
            newest = await ephemeral(client, 4)
            await service.tidy(time.time())
            assert there() == [False] * 7
            assert isinstance(await Client._finished(service, await sample(service, newest, 0)), SampleOutput)

    run(story)


def test_an_accepted_sample_keeps_its_weights(serving, run, tmp_path):
    """Over the end of its session, over a start, and while its base model is not served."""

    async def story():
        async with serving() as service:
            client, silent, late = [await Client.create(service) for _ in range(3)]
            samplers = [await ephemeral(each, 0) for each in (client, silent, late)]
            folders = [tmp_path / "data" / sampler.folder for sampler in samplers]
            waiting = [await sample(service, sampler, 0, max_tokens=400) for sampler in samplers]
            dropped = await sample(service, samplers[1], 1, max_tokens=400)
            await service.sessions.finish(client.session.session_id, OWNER, "success")
            extra = await ephemeral(silent, 1)
            stopped = await sample(service, extra, 0, max_tokens=400)
            assert (await service.models.remove(NANO)).sequences == 5
            listed = await service.operator.list(False, 10, 0)
            assert {one["sampler_id"]: one["sequences"] for each in listed for one in each["samplers"]} == {
                samplers[1].sampler_id: 2,
                samplers[2].sampler_id: 1,
                extra.sampler_id: 1,
            }
            await service.samplers.cancel(dropped.request_id, OWNER)
            polled = asyncio.create_task(service.futures.completions(extra, 0, 0, (), timeout=60))
            await asyncio.sleep(0.05)
            await service.operator.stop_sampler(extra.sampler_id)
            assert [ended.request_id for ended in await asyncio.wait_for(polled, 10)] == [stopped.request_id]
            await service.sessions.finish(late.session.session_id, OWNER, "success")
            await service._ledger.change(SessionRecord, silent.session.session_id, state="parked")
            service._keeper._budget = 1
            await service.tidy(time.time())
            await service.tidy(time.time() + 2 * DAY)
            assert [folder.is_dir() for folder in folders] == [True] * 3
        assert problems(tmp_path / "data") == []
        async with serving() as service:
            for entry in waiting:
                assert isinstance(await Client._finished(service, entry), SampleOutput)
            assert "cancelled" in (await Client._finished(service, dropped)).error, "though nobody served it then"
            await service.tidy(time.time() + 2 * DAY)
            assert [folder.is_dir() for folder in folders] == [False, True, False], "then they go with their sessions"

    run(story)


def test_a_sample_outlives_what_happens_to_the_machine(shared, monkeypatch):
    """An opening that fails, and an outcome that cannot be stored."""
    monkeypatch.setattr(sampler_desk, "RETRY_SECONDS", 0.01)

    def fail_once(owner, name, error):
        works = getattr(owner, name)

        async def fails(*_, **__):
            monkeypatch.setattr(owner, name, works)
            raise error

        monkeypatch.setattr(owner, name, fails)

    async def story(service):
        sampler = await service.samplers.create((await Client.create(service)).session, 0, NANO, None)
        fail_once(service.models.get(NANO).desk, "_ask_to_open", OSError("a disk that fails"))
        assert isinstance(await Client._finished(service, await sample(service, sampler, 0)), SampleOutput)

        fail_once(service._ledger, "payload", ValueError("what is stored is broken"))
        fail_once(service._ledger, "complete", OSError("a disk that fails"))
        outcome = await Client._finished(service, await sample(service, sampler, 1))
        assert isinstance(outcome, Failure) and "what is stored is broken" in outcome.error

    shared(story)


def test_a_session_that_finishes_does_not_come_back(shared):
    """Whoever has read its state before."""

    async def story(service):
        session, ledger = (await Client.create(service)).session, service._ledger
        parked = await ledger.change(SessionRecord, session.session_id, state="parked")
        await service.sessions.finish(session.session_id, OWNER, "success")
        with pytest.raises(Ended):
            await service.sessions.touch(parked)
        assert (await service.sessions.get(session.session_id, OWNER)).state == "finished"

    shared(story)


def test_a_sample_that_is_accepted_while_its_session_finishes_runs(shared, monkeypatch):
    async def story(service):
        client = await Client.create(service)
        sampler = await ephemeral(client, 0)

        async def finish():
            await service.sessions.finish(client.session.session_id, OWNER, "success")

        before_the_next_append(service, monkeypatch, finish)
        entry = await sample(service, sampler, 0)
        assert isinstance(await Client._finished(service, entry), SampleOutput)

    shared(story)


def test_an_operator_stops_samples_of_an_engine_that_does_not_answer(shared, monkeypatch):
    monkeypatch.setattr(sampler_desk, "ANSWER_SECONDS", 0.1)

    async def story(service):
        sampler = await service.samplers.unbound(OWNER, NANO, None)
        engine = await service.models.get(NANO).engine.running()
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            drawn = [await sample(service, sampler, None, 2000) for _ in range(3)]
            async with asyncio.timeout(10):
                await service.operator.stop_sampler(sampler.sampler_id)
            assert {(await service._ledger.entry(one.request_id)).state for one in drawn} == {"failed"}
        finally:
            os.kill(engine.pid, signal.SIGCONT)

    shared(story)


def test_a_sampler_is_not_closed_before_it_is_opened(shared, monkeypatch):
    """Its weights would stay in the engine, and nobody would know of them."""
    asked = []

    async def story(service):
        client = await Client.create(service)
        sampler = await service.samplers.create(client.session, 1, NANO, None)
        desk, engine = service.models.get(NANO).desk, await service.models.get(NANO).engine.running()
        ask, brought = engine.ask, asyncio.Event()

        async def recorded(payload):
            asked.append(decode(payload, OpenSampler | CloseSampler))
            return await ask(payload)

        monkeypatch.setattr(engine, "ask", recorded)
        monkeypatch.setattr(service.storage, "bring", lambda folder: brought.wait())
        opening = asyncio.create_task(desk._open(engine, sampler))
        await asyncio.sleep(0)
        closing = asyncio.create_task(desk.close(sampler.sampler_id))
        await asyncio.sleep(0)
        brought.set()
        await asyncio.gather(opening, closing)
        own = [type(operation) for operation in asked if operation.sampler_id == sampler.sampler_id]
        assert own == [OpenSampler, CloseSampler]

    shared(story)
