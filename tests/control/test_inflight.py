"""Inflight samplers: those of a run share its newest weights, over restarts, ends and budgets; older folders go."""

import asyncio
import time

import numpy as np
import pytest

from tests.control.conftest import NANO, OWNER, Client, kill_engine
from tinkercloud.control.engine_handle import EngineHandle
from tinkercloud.control.inflight import InflightWeights
from tinkercloud.control.verify import problems
from tinkercloud.engine.operations import Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput
from tinkercloud.errors import Ended, NotFound
from tinkercloud.ledger.records import SessionRecord


async def saved(client: Client, number: int, inflight: bool = True):
    """A sampler of the run as it is now."""
    client.seq_id += 1
    runs = client.service.runs
    made = await client.result(
        await runs.save_ephemeral_sampler(client.model, client.seq_id, number, inflight=inflight)
    )
    return await client.service.samplers.get(made.sampling_session_id, OWNER)


async def drawn(service, sampler) -> list[float]:
    """What its weights say of a prompt, to a precision at which equal weights say the same."""
    output = await Client._finished(service, await sample(service, sampler, 1))
    return output.prompt_logprobs[1:].round(3).tolist()


async def sample(service, sampler, max_tokens: int):
    prompt, params = np.arange(5, 12, dtype=np.int32), SamplingParams(max_tokens=max_tokens, seed=1)
    operation = Sample("", sampler.sampler_id, prompt, params, prompt_logprobs=True)
    return await service.samplers.sample(sampler, None, operation)


async def until_gone(folder) -> None:
    async with asyncio.timeout(30):
        while folder.exists():
            await asyncio.sleep(0.01)


def test_older_weights_are_told_of_once(shared):
    """Each opening would remove a hundred folders that are gone."""

    async def story(service):
        client = await Client.create(service)
        made = [await saved(client, number) for number in range(4)]
        told = InflightWeights(service._ledger)
        assert await told.superseded(made[1]) == [made[0].folder]
        assert await told.superseded(made[1]) == []
        assert await told.superseded(made[3]) == sorted(one.folder for one in made[1:3])
        assert await told.superseded(made[2]) == []

    shared(story)


def test_all_of_a_run_have_the_newest_weights_whatever_happens(serving, run, tmp_path):
    data = tmp_path / "data"

    async def story():
        async with serving() as service:
            client, other = await Client.create(service), await Client.create(service, seed=1)
            await client.steps(1)
            first, snapshot, apart = await saved(client, 0), await saved(client, 1, False), await saved(other, 0)
            before, theirs = await drawn(service, first), await drawn(service, apart)
            running = await sample(service, first, 400)
            await client.steps(1)
            assert await drawn(service, first) == before == await drawn(service, snapshot), "nothing was saved"
            second = await saved(client, 2)
            after = await drawn(service, second)
            assert after == await drawn(service, first) == await drawn(service, await saved(client, 3, False)) != before
            assert await drawn(service, snapshot) == before and await drawn(service, apart) == theirs != before
            assert isinstance(await Client._finished(service, running), SampleOutput), "over the change of weights"
            await until_gone(data / first.folder)
            assert (data / second.folder).is_dir()

            await kill_engine(service)
            assert await drawn(service, first) == await drawn(service, second) == after
            await client.steps(1)
            running = await sample(service, first, 400)
            third = await saved(client, 4)
            newest = await drawn(service, third)
            assert newest != after
        assert problems(data) == []
        async with serving() as service:
            assert isinstance(await Client._finished(service, running), SampleOutput)
            assert await drawn(service, first) == await drawn(service, third) == newest
            assert await drawn(service, snapshot) == before
            live = [(data / sampler.folder).is_dir() for sampler in (first, second, third, apart)]
            assert live == [False, False, True, True]

    run(story)


def test_one_that_is_stopped_leaves_its_weights_to_the_others(shared):
    async def story(service):
        desk, data = service.models.get(NANO).desk, service._keeper._data_dir
        client = await Client.create(service)
        first = await saved(client, 0)
        await client.steps(1)
        newest = await saved(client, 1)
        expected = await drawn(service, first)
        await service.operator.stop_sampler(newest.sampler_id)
        with pytest.raises(NotFound):
            await service.samplers.get(newest.sampler_id, OWNER)
        await desk.close(first.sampler_id)
        assert await drawn(service, first) == expected
        assert (await InflightWeights(service._ledger).of(first)).folder == newest.folder, "after a start, too"
        assert (data / newest.folder).is_dir()
        await service.operator.stop_sampler(first.sampler_id)
        assert not (data / newest.folder).exists()

    shared(story)


def test_new_weights_are_opened_when_all_places_are_in_use(shared, monkeypatch):
    async def story(service):
        desk, data = service.models.get(NANO).desk, service._keeper._data_dir
        monkeypatch.setattr(desk, "_limit", 1)
        client = await Client.create(service)
        first = await saved(client, 0)
        running = await sample(service, first, 400)
        newest = await saved(client, 1)
        await asyncio.gather(*desk._unawaited)
        assert newest.sampler_id in desk._opened
        await until_gone(data / first.folder)
        assert isinstance(await Client._finished(service, running), SampleOutput)

    shared(story)


def test_weights_that_cannot_be_opened_are_nobody_elses(shared, monkeypatch):
    """The others go on with those before, also when they are opened anew, until a save gives all of them others."""

    async def story(service):
        desk, data = service.models.get(NANO).desk, service._keeper._data_dir
        client = await Client.create(service)
        await client.steps(1)
        first = await saved(client, 0)
        before = await drawn(service, first)
        publish = desk.publish

        def damaged(sampler):
            (whole,) = (data / sampler.folder).glob("*.safetensors")
            whole.rename(whole.with_suffix(".away"))
            publish(sampler)

        await client.steps(1)
        with monkeypatch.context() as patch:
            patch.setattr(desk, "publish", damaged)
            second = await saved(client, 1)
        refused = await Client._finished(service, await sample(service, second, 1))
        assert isinstance(refused, Failure) and "no adapter_model.safetensors" in refused.error
        await desk.close(first.sampler_id)
        assert await drawn(service, first) == before
        (away,) = (data / second.folder).glob("*.away")
        away.rename(away.with_suffix(".safetensors"))
        assert await drawn(service, second) == await drawn(service, first) != before, "they can be opened again"
        await client.steps(1)
        third = await saved(client, 2)
        assert await drawn(service, first) == await drawn(service, second) == await drawn(service, third)

    shared(story)


def test_those_before_are_there_after_a_restart_too(serving, run, tmp_path):
    """Until weights that can be opened are saved."""
    data = tmp_path / "data"

    async def story():
        async with serving() as service:
            client = await Client.create(service)
            first = await saved(client, 0)
            before = await drawn(service, first)
            await client.steps(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(service.models.get(NANO).desk, "publish", lambda sampler: None)  # a crash is quicker
                second = await saved(client, 1)
            (whole,) = (data / second.folder).glob("*.safetensors")
            whole.unlink()
        async with serving() as service:
            assert await drawn(service, first) == before
            assert isinstance(await Client._finished(service, await sample(service, second, 1)), Failure)
            assert await drawn(service, first) == before
            client.service = service
            client.model = await service.runs.live(client.model.model_id, OWNER)
            third = await saved(client, 2)
            await asyncio.gather(*service.models.get(NANO).desk._unawaited)
            assert await drawn(service, first) == await drawn(service, second) == await drawn(service, third) != before
            for older in (first, second):
                await until_gone(data / older.folder)
            assert (data / third.folder).is_dir()

    run(story)


def test_weights_that_could_not_be_read_once_are_asked_for_again(shared, monkeypatch):
    async def story(service):
        desk = service.models.get(NANO).desk
        client = await Client.create(service)
        first = await saved(client, 0)
        await client.steps(1)
        second = await saved(client, 1)
        newest = await drawn(service, second)
        ask = EngineHandle.ask
        for sampler in (first, second):
            await desk.close(sampler.sampler_id)

        async def out_of_files(self, operation):
            if b"open_sampler" in operation:
                return Failure("the sampler's weights cannot be read: too many open files", "server")
            return await ask(self, operation)

        with monkeypatch.context() as patch:
            patch.setattr(EngineHandle, "ask", out_of_files)
            failed = await Client._finished(service, await sample(service, first, 1))
            assert isinstance(failed, Failure) and failed.category == "server"
        assert await drawn(service, first) == newest

    shared(story)


def test_they_stay_while_their_session_lives_and_go_with_it(serving, run, tmp_path):
    data = tmp_path / "data"

    async def story():
        async with serving(ephemeral_sampler_bytes=1) as service:
            client, silent = await Client.create(service), await Client.create(service)
            first, theirs = await saved(client, 0), [await saved(silent, number) for number in range(2)]
            await saved(client, 1, False)
            running = await sample(service, theirs[0], 400)
            await service._ledger.change(SessionRecord, silent.session.session_id, state="parked")
            await service.tidy(time.time())
            assert (data / first.folder).is_dir(), "its clients have no other weights"
            assert (data / theirs[1].folder).is_dir(), "an older sampler has a sample of them"
            assert isinstance(await Client._finished(service, running), SampleOutput)
            await service.tidy(time.time())
            assert not (data / theirs[1].folder).exists()
            for gone in theirs:
                with pytest.raises(NotFound, match="ephemeral_sampler_bytes"):
                    await drawn(service, gone)
            again = await saved(silent, 2)
            assert await drawn(service, theirs[0]) == await drawn(service, again), "a save serves the old ones too"

            second = await saved(client, 2)
            running = await sample(service, first, 400)
            await service.sessions.finish(client.session.session_id, OWNER, "success")
            with pytest.raises(Ended):
                await drawn(service, second)
            assert isinstance(await Client._finished(service, running), SampleOutput)
        async with serving() as service:
            assert not (data / second.folder).exists() and (data / again.folder).is_dir()
        assert problems(data) == []

    run(story)
