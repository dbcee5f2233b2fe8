"""A service whose checkpoints live in a store: what its clients see, and what crashes leave."""

import asyncio
import json
import shutil
import time
from contextlib import asynccontextmanager

import pytest

from tests import s3 as moto
from tests.command_line import in_process
from tests.control.conftest import BATCH, NANO, OWNER, Client
from tests.control.stores import files_of, settled
from tinkercloud.config import Settings
from tinkercloud.control import checkpoint_cache
from tinkercloud.control.backup import back_up
from tinkercloud.control.checkpoint_cache import CheckpointCache
from tinkercloud.control.checkpoint_store import CheckpointStore, UnusableStore
from tinkercloud.control.folders import is_import, is_stored, key_of
from tinkercloud.control.store_owner import StoreOwner
from tinkercloud.control.verify import problems
from tinkercloud.engine.operations import Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SessionRecord


@asynccontextmanager
async def store_of(service, url, monkeypatch, budget=2**30):
    """Give the shared service a store for a while."""
    data_dir = service.storage._data_dir
    cache = CheckpointCache(CheckpointStore(url, StoreOwner(data_dir)), data_dir, budget)
    with monkeypatch.context() as given:
        given.setattr(service.storage, "_cache", cache)
        given.setattr(checkpoint_cache, "PAUSES", (0.01, 0.01))
        given.setattr(checkpoint_cache, "IN_USE_SECONDS", 0.0)
        yield cache
        await cache.close()


def test_checkpoints_live_in_the_store(shared, store_url, monkeypatch, undisturbed):
    async def story(service):
        async with store_of(service, store_url, monkeypatch, budget=1) as cache:
            client = await Client.create(service)
            await client.steps(2)
            saved = await client.save("it")
            weights = await client.save("it", kind="sampler")
            external = await client.save("it", kind="external")
            assert all(is_stored(one.folder) for one in (saved, weights, external))
            assert cache.store.keys() == {key_of(one.folder) for one in (saved, weights, external)}

            await asyncio.sleep(0.01)
            await service.storage.evict()
            assert not any(service.checkpoints.folder(one).exists() for one in (saved, weights, external))
            assert await (await client.created_from(saved)).steps(2) == undisturbed[2:4]
            await client.load(saved)
            assert await client.steps(1) == undisturbed[2:3]
            sampler = await service.samplers.create(client.session, 5, None, weights.path)
            operation = Sample("", sampler.sampler_id, BATCH[0].tokens, SamplingParams(max_tokens=2, seed=1))
            assert isinstance(await client.result(await service.samplers.sample(sampler, 0, operation)), SampleOutput)
            assert len(await service.checkpoints.files(external)) == 2

            copy = await service.copies.into_project(saved.path, OWNER, "p", None, None, lambda: asyncio.sleep(0))
            await service.checkpoints.delete(saved.path, OWNER)
            await settled(cache)
            assert cache.store.damage(key_of(copy.folder)) is None, "the copy has the files"
            await service.checkpoints.delete(copy.path, OWNER)
            replaced = await client.save("other", ttl_seconds=1000)
            newer = await client.save("other", overwrite=True, ttl_seconds=1000)
            await settled(cache)
            assert cache.store.keys() == {key_of(one.folder) for one in (weights, external, newer)}
            assert not service.checkpoints.folder(replaced).exists()
            await service.checkpoints.drop_expired(time.time() + 2000)
            await settled(cache)
            assert cache.store.keys() == {key_of(one.folder) for one in (weights, external)}

            files, root = files_of(store_url)
            files.rm(f"{root}/{key_of(external.folder)}", recursive=True)
            await service.storage.evict()
            with pytest.raises(NotFound, match="removed there"):
                await service.checkpoints.files(external)
        with pytest.raises(InvalidRequest, match="checkpoints_url"):
            await service.storage.bring(weights.folder)

    shared(story)


def test_a_save_that_the_store_does_not_take_is_none(shared, store_url, monkeypatch):
    async def story(service):
        async with store_of(service, store_url, monkeypatch) as cache:
            client, other = await Client.create(service), await Client.create(service)
            put, failures = cache.store._fs.put_file, []
            goes_on = asyncio.Event()
            loop = asyncio.get_running_loop()

            def unreliable(local, remote, **options):
                if len(failures) < limit:
                    failures.append(remote)
                    if len(failures) == 1:
                        asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(10)
                    raise OSError("the store is away")
                return put(local, remote, **options)

            monkeypatch.setattr(cache.store._fs, "put_file", unreliable)
            limit = 2
            saving = asyncio.create_task(client.save("retried"))
            while not failures:
                await asyncio.sleep(0.01)
            await other.steps(1)  # nobody waits but the run whose save it is
            goes_on.set()
            assert (await saving).name == "retried" and len(failures) == 2
            failures.clear()
            limit = 100
            client.seq_id += 1
            entry = await service.runs.save_weights(
                client.model, client.seq_id, "lost", kind="training", ttl_seconds=None
            )
            outcome = await client.result(entry)
            assert isinstance(outcome, Failure) and outcome.category == "server"
            assert "the store is away" in outcome.error and len(failures) == 3
            kept = await service.checkpoints.get(f"tinker://{client.model.model_id}/weights/retried", OWNER)
            with pytest.raises(Unavailable, match="the store is away"):
                await service.checkpoints.import_folder(service.checkpoints.folder(kept), "theirs", NANO, OWNER)
            assert not [run for run in await service._ledger.find(ModelRecord) if is_import(run.model_id)]
            await settled(cache)
            assert len(cache.store.keys()) == 1
            with pytest.raises(NotFound):
                await service.checkpoints.get(f"tinker://{client.model.model_id}/weights/lost", OWNER)
            limit = 0
            await client.steps(1)
            assert (await client.save("lost")).name == "lost", "the name is free"

    shared(story)


def test_a_store_that_does_not_answer_is_waited_for(shared, s3_server, monkeypatch):
    """By who loads, with 503, which the SDK repeats."""

    async def story(service):
        moto.use(monkeypatch, s3_server)
        async with store_of(service, s3_server.bucket(), monkeypatch, budget=1) as cache:
            monkeypatch.setattr(cache.store._fs, "retries", 1)
            client = await Client.create(service)
            saved = await client.save("it")
            await asyncio.sleep(0.01)
            await service.storage.evict()
            s3_server.stop()
            with pytest.raises(Unavailable, match="cannot be used now"):
                await client.load(saved)
            s3_server.start()
            client.seq_id -= 1
            await client.load(saved)

    shared(story)


def test_a_crash_between_two_steps_leaves_nothing_for_long(serving, run, tmp_path, monkeypatch, undisturbed):
    """Between the upload and its record, and between a record's removal and the files'. Also: fsck and backup."""
    url = f"file://{tmp_path}/store"

    async def cancelled(folder):
        raise asyncio.CancelledError

    async def story():
        async with serving(checkpoints_url=url) as service:
            client = await Client.create(service)
            await client.steps(2)
            saved, other = await client.save("it"), await client.save("other")
            store = service._cache.store
            folder = service.checkpoints.folder(saved)
            store.put(folder, key_of(saved.folder).replace("/it/", "/dead/"))  # as if its end had not been recorded
            store.put(folder, key_of(saved.folder).replace("/it/5", "/ahead/50"))
            imported = await service.checkpoints.import_folder(folder, "theirs", NANO, OWNER)
            for one in (other, imported):
                await service._ledger.remove(CheckpointRecord, one.path)
            with monkeypatch.context() as patch:  # between the run's record and the upload, and before the checkpoint's
                patch.setattr(service.storage, "publish", cancelled)
                with pytest.raises(asyncio.CancelledError):
                    await service.checkpoints.import_folder(folder, "torn", NANO, OWNER)
            assert len(await service._ledger.without_checkpoints("import-")) == 1
        data, reading = tmp_path / "data", CheckpointStore(url)
        assert len(reading.keys()) == 5
        assert [one.what for one in problems(data, None, reading) if one.lost] == []
        assert "not looked at" in " ".join(one.what for one in problems(data))
        unseen = in_process("fsck", str(data))
        verdict = (
            "nothing is lost; 1 checkpoint in a store was not looked at: give --checkpoints-url, as the server has"
        )
        assert verdict in unseen.stdout.splitlines()[-1] and unseen.exit_code == 0
        back_up(data, None, tmp_path / "backup")
        assert not (tmp_path / "backup" / "cache").exists() and not (tmp_path / "backup" / "store_id").exists()
        assert [one.what for one in problems(tmp_path / "backup", None, reading) if one.lost] == []
        async with serving(checkpoints_url=url) as service:
            await service._sweeping
            await settled(service._cache)
            left = {key_of(saved.folder), key_of(saved.folder).replace("/it/5", "/ahead/50")}
            assert reading.keys() == left, "what this ledger has not come to is somebody's"
            (run_left,) = await service._ledger.find(ModelRecord, state="unloaded")
            assert run_left.model_id == imported.model_id and await service._ledger.count(SessionRecord) == 2
            client.service = service
            assert await (await client.created_from(saved)).steps(1) == undisturbed[2:3]
        store_file = tmp_path / "store" / key_of(saved.folder) / "adapter_model.safetensors"
        store_file.write_bytes(b"rust")
        (lost,) = [one for one in problems(data, None, reading) if one.lost]
        assert "adapter_model.safetensors is damaged" in lost.what
        shutil.rmtree(store_file.parent)
        (lost,) = [one for one in problems(data, None, reading) if one.lost]
        assert "is missing" in lost.what and f"copy the files of {saved.folder} there again" in lost.mend
        shutil.copytree(data / saved.folder, store_file.parent)
        assert not [one for one in problems(data, None, reading) if one.lost]
        settings = Settings.load(data_dir=data, checkpoints_url=url)
        owner = json.loads((tmp_path / "store" / "owner.json").read_text())["data_directory"]
        assert owner == StoreOwner(settings.data_dir).id
        (data / "store_id").unlink()  # as a backup is restored
        with pytest.raises(UnusableStore, match="another data directory"):
            async with serving(checkpoints_url=url):
                pass
        DataDirLock(data).release()  # whoever was refused has let go of the data directory

    run(story)
