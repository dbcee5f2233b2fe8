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
from tinkercloud.engine.results import Failure


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_an_engine_that_does_not_go_on(serving, run, monkeypatch, caplog):
    """First for a while, then for ever: its samples have the tokens that they have on every other day."""
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.2)
    monkeypatch.setattr(silence, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(sampler_desk, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(chores, "CHORE_SECONDS", 0.1)
    caplog.set_level(logging.INFO, silence.__name__)

    async def story():
        async with serving(stuck_seconds=600.0) as service:
            served = service.models.get(NANO)
            sampler = await service.samplers.unbound(OWNER, NANO, None)
            client = await Client.create(service)
            other = await service.samplers.create(client.session, 0, NANO, None)
            losses = await client.steps(1)
            expected = tokens_of(await Client._finished(service, await sample(service, sampler, 0, 1)))
            await Client._finished(service, await sample(service, other, 0, 1, max_tokens=1))
            load = await served.desk.load()
            assert (load.running, load.waiting, load.pages_used, load.places) == (0, 0, 0, 64) and load.pages > 64
            engine = served.engine.handle
            engine.heard_at -= 100
            assert service.models.states() == {NANO: "ready"}, "what has nothing to do is not silent"

            os.kill(engine.pid, signal.SIGSTOP)
            running, dropped = await sample(service, sampler, 1, 1), await sample(service, sampler, 2, 2)
            await until(lambda: "come no further" in service.models.states()[NANO])
            began = time.monotonic()
            await service.samplers.cancel(dropped.request_id, OWNER)
            assert isinstance(await Client._finished(service, dropped), Failure), "who cancels does not wait for it"
            await served.desk.close(other.sampler_id)
            assert await served.desk.load() is None
            await service.tidy(time.time() + 300)
            assert time.monotonic() - began < 1
            assert list(service._chores._left) == ["Sessions.park_silent"], "the other chores have been done"
            os.kill(engine.pid, signal.SIGCONT)
            await until(lambda: not service._chores._left)
            assert await client.steps(1) != losses
            assert tokens_of(await Client._finished(service, running)) == expected
            await until(lambda: service.models.states() == {NANO: "ready"})

            assert served.engine.stuck_seconds == 600
            served.engine.stuck_seconds = 1.4
            os.kill(engine.pid, signal.SIGSTOP)
            running = await sample(service, sampler, 3, 1)
            await until(engine.died.is_set)
            served.engine.stuck_seconds = 0.0
            assert tokens_of(await Client._finished(service, running)) == expected

    run(story)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert re.search(r"kill -9(.*\n)*.*goes on\n(.*\n)*.*kill -9(.*\n)*.*has come no further for 1 s .*ending it", said)
