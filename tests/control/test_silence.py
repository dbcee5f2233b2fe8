"""An engine that lives and does not go on: it is seen, nobody else waits for it, and it can be ended by itself."""

import asyncio
import logging
import os
import re
import signal
import time

from tests.control.conftest import NANO, OWNER, Client
from tests.control.test_suspects import sample, tokens_of
from tinkercloud.control import chores, sampler_desk, silence
from tinkercloud.control.engine_state import SOUND_STATES
from tinkercloud.engine.results import Failure

OTHER = "me/other"


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_an_engine_that_does_not_go_on(serving, run, monkeypatch, caplog):
    """First for a while, then for ever: its samples have the tokens that they have on every other day, and what is of
    the other base model does not wait for it."""
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(silence, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(sampler_desk, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(chores, "CHORE_SECONDS", 0.1)
    caplog.set_level(logging.INFO, silence.__name__)

    async def story():
        models = [{"name": name, "source": "builtin"} for name in (NANO, OTHER)]
        async with serving(models=models, stuck_seconds=3.0) as service:
            served = service.models.get(NANO)
            well = await Client.create(service, base_model=OTHER)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            client = await Client.create(service)
            other = await service.samplers.create(client.session, 0, NANO, None)
            losses = await client.steps(1)
            ready = dict.fromkeys((NANO, OTHER), "ready")
            await until(lambda: service.models.states() == ready)
            expected = tokens_of(await Client._finished(service, await sample(service, sampler, 0, 1)))
            await Client._finished(service, await sample(service, other, 0, 1, max_tokens=1))
            load = await served.desk.load()
            assert (load.running, load.waiting, load.pages_used, load.places) == (0, 0, 0, 64) and load.pages > 64
            engine = served.engine.handle
            engine.heard_at -= 100
            assert served.engine.status in SOUND_STATES
            assert service.models.states() == ready, "what has nothing to do is not silent"

            os.kill(engine.pid, signal.SIGSTOP)
            running, dropped = await sample(service, sampler, 1, 1), await sample(service, sampler, 2, 2)
            await until(lambda: "come no further" in service.models.states()[NANO])
            assert served.engine.state == "ready" and served.engine.status not in SOUND_STATES
            began = time.monotonic()
            await service.samplers.cancel(dropped.request_id, OWNER)
            assert isinstance(await Client._finished(service, dropped), Failure), "who cancels does not wait for it"
            await served.desk.close(other.sampler_id)
            assert await served.desk.load() is None
            await service.tidy(time.time() + 300)
            assert time.monotonic() - began < 1
            await until(lambda: list(service._chores._left) == [f"let go in {NANO}"])  # the other chores are done
            sessions = [client.session.session_id, well.session.session_id]
            assert [(await service.sessions.get(one, OWNER)).state for one in sessions] == ["parked", "parked"]
            of_other = service.models.get(OTHER)
            assert not of_other.conductor._runs[well.model.model_id].resident(of_other.engine.handle)
            await service.sessions.mark_silent(time.time() + 2 * service._settings.session_retention_seconds)
            await service.tidy(time.time())
            await until(lambda: well.model.model_id not in of_other.conductor._runs)
            assert served.conductor._runs[client.model.model_id].resident(engine), "it waits"
            os.kill(engine.pid, signal.SIGCONT)
            await until(lambda: not service._chores._left)
            assert client.model.model_id not in served.conductor._runs
            assert await (await Client.create(service)).steps(1) == losses
            assert tokens_of(await Client._finished(service, running)) == expected
            await until(lambda: service.models.states() == ready)

            os.kill(engine.pid, signal.SIGSTOP)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            running = await sample(service, sampler, 3, 1)
            await until(engine.died.is_set)
            assert tokens_of(await Client._finished(service, running)) == expected

    run(story)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert re.search(r"kill -9(.*\n)*.*goes on\n(.*\n)*.*kill -9(.*\n)*.*has come no further for 3 s .*ending it", said)


def test_an_engine_is_heard_out_after_this_process_stood_still(shared, monkeypatch):
    """What it has said meanwhile has not been read when it is looked at."""

    async def story(service):
        engine = await service.models.get(NANO).engine.running()
        sampler = await service.samplers.unbound(OWNER, NANO, None)
        await Client._finished(service, await sample(service, sampler, None, max_tokens=1))  # the first takes longer
        monkeypatch.setattr(silence, "LOOK_SECONDS", 0.0)
        watching = asyncio.create_task(silence.watch(NANO, engine, 0.3))
        drawn = await sample(service, sampler, None, max_tokens=1)
        while not engine.silent_seconds:
            await asyncio.sleep(0)
        time.sleep(0.4)
        monkeypatch.setattr(silence, "LOOK_SECONDS", 0.5)
        for one in (drawn, await sample(service, sampler, None, max_tokens=1)):
            assert tokens_of(await Client._finished(service, one))
        assert not engine.died.is_set() and not watching.done()
        watching.cancel()

    shared(story)
