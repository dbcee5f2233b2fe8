"""Runs end whole: whatever comes between two steps of an end, nothing that was accepted waits for ever."""

import pytest

from tests.control.conftest import BATCH, NANO, OWNER, Client, before_the_next_append
from tinkercloud.codec import decode
from tinkercloud.engine.operations import CreateModel, ForwardBackward, LoraConfig
from tinkercloud.engine.results import Failure
from tinkercloud.errors import InvalidRequest, NotFound
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord, ModelUnloaded, SessionRecord
from tinkercloud.ledger.writer import DiskFull


def operation(client: Client) -> ForwardBackward:
    return ForwardBackward(client.model.model_id, BATCH, "cross_entropy")


def test_an_operation_that_its_runs_end_overtakes_fails(shared, monkeypatch):
    async def story(service):
        client, unloaded = await Client.create(service), await Client.create(service)

        async def finish():
            await service.sessions.finish(client.session.session_id, OWNER, "success")

        async def unload():
            await unloaded.result(await service.runs.unload(unloaded.model))

        for overtaken, end in ((client, finish), (unloaded, unload)):
            before_the_next_append(service, monkeypatch, end)
            late = await service.runs.submit(overtaken.model, 5, "forward_backward", operation(overtaken))
            outcome = await overtaken.result(late)
            assert isinstance(outcome, Failure) and outcome.category == "user" and "unloaded" in outcome.error

        client = await Client.create(service)
        before_the_next_append(service, monkeypatch, finish)
        entry = await service.runs.create(client.session, 1, NANO, LoraConfig(rank=4), {})
        await client.result(entry)
        with pytest.raises(NotFound):  # a run that is created while its session finishes ends with it
            await service.runs.live(entry.stream, OWNER)

    shared(story)


def test_an_end_that_a_crash_cut_short_is_completed(serving, run, monkeypatch):
    async def ended(service, client, waiting):
        assert isinstance(await Client._finished(service, waiting), Failure)
        assert (await service.runs.find(client.model.model_id, OWNER)).state == "unloaded"

    async def killed(*_):
        raise RuntimeError("killed")

    async def story():
        async with serving() as service:
            repeated, finished, unloaded = [await Client.create(service) for _ in range(3)]
            waiting = [
                await service.runs.submit(client.model, 2, "forward_backward", operation(client))
                for client in (repeated, finished, unloaded)
            ]
            with monkeypatch.context() as patch:
                patch.setattr(service.models, "end_runs", killed)
                for client in (repeated, finished):
                    with pytest.raises(RuntimeError, match="killed"):
                        await service.sessions.finish(client.session.session_id, OWNER, "success")
            await service.sessions.finish(repeated.session.session_id, OWNER, "errored")
            await ended(service, repeated, waiting[0])
            session = await service.sessions.get(repeated.session.session_id, OWNER)
            assert session.finish_reason == "success", "the first reason stays"
            unloading = await service._ledger.append(unloaded.model.model_id, 1, "unload_model", b"")
            await service._ledger.complete(unloading.request_id, b"")  # and no more
        async with serving() as service:
            await ended(service, finished, waiting[1])
            await ended(service, unloaded, waiting[2])

    run(story)


def test_a_start_on_a_full_disk_leaves_ends_to_the_next_one(serving, run, monkeypatch):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            waiting = await service.runs.submit(client.model, 2, "forward_backward", operation(client))
            await service._ledger.change(SessionRecord, client.session.session_id, state="finished")  # and no more

        async def full(*_, **options):
            raise DiskFull("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "complete", full)
            async with serving() as service:
                assert (await service.futures.outcome(waiting.request_id, OWNER, 0))[1] is None
        async with serving() as service:
            assert isinstance(await Client._finished(service, waiting), Failure)

    run(story)


def test_what_a_full_disk_keeps_from_ending_ends_when_there_is_room(shared, monkeypatch):
    async def story(service):
        client = await Client.create(service)
        complete, full = service._ledger.complete, [True]
        async with service.models.get(NANO).conductor._between_cycles:
            await service.runs.submit(client.model, 1, "forward_backward", operation(client))
            unloading = await service.runs.unload(client.model)
            behind = await service.runs.submit(
                client.model, unloading.seq_id + 1, "forward_backward", operation(client)
            )

        async def without_room(request_id, *arguments, **options):
            if full and request_id == behind.request_id:
                raise DiskFull("the server's disk is full")
            return await complete(request_id, *arguments, **options)

        monkeypatch.setattr(service._ledger, "complete", without_room)
        assert isinstance(await client.result(unloading), ModelUnloaded)
        assert (await service.futures.outcome(behind.request_id, OWNER, 0.5))[1] is None
        full.clear()
        await service.models.take_up()
        outcome = await client.result(behind)
        assert isinstance(outcome, Failure) and "was unloaded before this" in outcome.error

    shared(story)


def test_operations_of_a_withdrawn_model_wait_and_say_why(serving, run, monkeypatch):
    """Also one that is recorded while its model is withdrawn."""

    async def story():
        async with serving() as service:
            client, leaving = await Client.create(service), await Client.create(service)
            ahead = await service.runs.submit(leaving.model, 2, "forward_backward", operation(leaving))
            served = service.models.get(NANO)
            before_the_next_append(service, monkeypatch, lambda: service.models.withdraw(NANO))
            late = await service.runs.submit(client.model, 1, "forward_backward", operation(client))
            with pytest.raises(BaseException) as refused:
                await served.engine.running()
            assert refused.typename == "CancelledError" and served.engine.state == "stopped", "it does not come back"
            assert (await service.futures.outcome(late.request_id, OWNER, 0))[1] is None
            assert f"tinkercloud models add {NANO}" in await service.futures.paused(late)
            await service.sessions.finish(leaving.session.session_id, OWNER, "success")
            assert isinstance(await leaving.result(ahead), Failure), "a session finishes whole all the same"
            assert (await service.runs.find(leaving.model.model_id, OWNER)).state == "unloaded"
            await service.models.serve(served.settings)
            assert await service.futures.paused(late) is None
            assert not isinstance(await client.result(late), Failure), "they go on when it is served again"

    run(story)


def test_a_repeated_create_is_the_first_one_or_says_that_it_is_not(shared, monkeypatch):
    async def story(service):
        client = await Client.create(service)
        repeat = await service.runs.create(client.session, 0, NANO, LoraConfig(rank=4, seed=9), {})
        assert repeat.repeated and repeat.stream == client.model.model_id
        with pytest.raises(InvalidRequest, match=r"lora_config .*rank=4.*, not .*rank=8"):
            await service.runs.create(client.session, 0, NANO, LoraConfig(rank=8), {})
        with pytest.raises(InvalidRequest, match="optimizer_config adamw, not dimuon"):
            await service.runs.create(client.session, 0, NANO, LoraConfig(rank=4), {}, "dimuon")

        async def killed():
            raise RuntimeError("killed")

        before_the_next_append(service, monkeypatch, killed)
        with pytest.raises(RuntimeError, match="killed"):
            await service.runs.create(client.session, 1, NANO, LoraConfig(rank=4, seed=1), {})
        entry = await service.runs.create(client.session, 1, NANO, LoraConfig(rank=4, seed=2), {})
        payload = decode(await service._ledger.payload(entry.request_id), CreateModel)
        assert payload.lora == (await service._ledger.get(ModelRecord, entry.stream)).lora
        assert payload.lora.seed == 1, "the seed that is on record made the weights"

        checkpoints = []
        for name in ("one", "two"):
            entry = await service.runs.save_weights(
                client.model,
                None,
                name,
                kind="training",
                ttl_seconds=None,
                overwrite=False,
                user_metadata=None,
            )
            checkpoints.append(await service.checkpoints.get((await client.result(entry)).path, OWNER))
        first, second = checkpoints
        entry = await service.runs.create_from(client.session, 2, first, True, {})
        assert (await service.runs.create_from(client.session, 2, first, True, {})).repeated
        with pytest.raises(InvalidRequest, match=r"was created from .*/one before"):
            await service.runs.create_from(client.session, 2, second, True, {})
        assert not isinstance(await client.result(entry), Failure)

    shared(story)
