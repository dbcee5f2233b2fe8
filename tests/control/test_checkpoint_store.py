"""Checkpoints in a folder and in S3, by the same tests: published whole or not at all, read as they were written."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import fsspec
import pytest

from tests import s3 as moto
from tests.control.conftest import BATCH, OWNER, Client
from tinkercloud.cli import doctor
from tinkercloud.config import Settings
from tinkercloud.control import checkpoint_cache
from tinkercloud.control.backup import back_up
from tinkercloud.control.checkpoint_cache import CheckpointCache, left_over
from tinkercloud.control.checkpoint_store import CheckpointStore, StoreUnavailable, UnusableStore, id_of
from tinkercloud.control.folders import is_stored, key_of
from tinkercloud.control.verify import problems
from tinkercloud.engine.types import Failure, Sample, SampleOutput, SamplingParams
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.records import CheckpointRecord

KEY = "session_train_0/weights/it/3"


@pytest.fixture(scope="module")
def s3_server():
    server = moto.S3()
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def url(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return f"file://{tmp_path}/store"
    s3 = request.getfixturevalue("s3_server")
    moto.use(monkeypatch, s3)
    return s3.bucket()


def files_of(url):
    """(the file system of a store, where it is in it), beside the code that is tested."""
    return fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    return folder


# ---------------------------------------------------------------- the store


def test_what_was_put_is_got(url, saved, tmp_path):
    store = CheckpointStore(url, "us")
    store.put(saved, KEY)
    target = tmp_path / "cache" / "it"
    store.get(KEY, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        file.name: file.read_bytes() for file in saved.iterdir()
    }
    assert store.keys() == {KEY} and store.damage(KEY) is None
    store.remove(KEY)
    store.remove(KEY)
    assert store.keys() == set()
    with pytest.raises(NotFound, match="nothing at"):
        store.get(KEY, tmp_path / "cache" / "gone")
    assert store.damage(KEY) == f"it is missing at {url}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["it"], "no draft stays"


def test_files_without_their_manifest_are_no_checkpoint(url, saved, tmp_path, monkeypatch):
    store = CheckpointStore(url, "us")
    store.put(saved, KEY)

    def cut(*arguments, **options):
        raise OSError("the connection was cut")

    with monkeypatch.context() as cutting:
        cutting.setattr(store._fs, "put_file", cut)
        with pytest.raises(StoreUnavailable, match="the connection was cut"):
            store.put(saved, KEY)
    with pytest.raises(NotFound):
        store.get(KEY, tmp_path / "it")
    assert store.keys() == {KEY}, "a sweep finds what there is"
    store.put(saved, KEY)
    store.get(KEY, tmp_path / "it")


def test_what_the_store_has_changed_is_refused(url, saved, tmp_path):
    store = CheckpointStore(url, "us")
    store.put(saved, KEY)
    files, root = files_of(url)
    weights = f"{root}/{KEY}/adapter_model.safetensors"
    files.pipe_file(weights, b"x" + files.cat_file(weights)[1:])
    with pytest.raises(InvalidRequest, match=r"adapter_model\.safetensors .* is not what was written"):
        store.get(KEY, tmp_path / "it")
    assert "adapter_model.safetensors is damaged" in store.damage(KEY)
    files.pipe_file(f"{root}/{KEY}/manifest.json", b'{"files": 3}')
    with pytest.raises(InvalidRequest, match="manifest"):
        store.get(KEY, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_a_store_belongs_to_one_data_directory(url, saved, tmp_path):
    ours = id_of(tmp_path)
    CheckpointStore(url, ours).put(saved, KEY)
    assert id_of(tmp_path) == ours
    other = CheckpointStore(url, "another")
    for change in (lambda: other.put(saved, KEY), lambda: other.remove(KEY), other.claim):
        with pytest.raises(UnusableStore, match=f"another data directory .*{ours}.*owner.json"):
            change()
    other.get(KEY, tmp_path / "it")
    assert other.check() is None


def test_a_store_that_cannot_be_used_is_said(tmp_path, s3_server, monkeypatch):
    moto.use(monkeypatch, s3_server)
    with pytest.raises(UnusableStore, match="nowhere"):
        CheckpointStore("nowhere://bucket", "us")
    with pytest.raises(UnusableStore, match="pip install"):
        CheckpointStore("gs://bucket", "us")
    assert "no-such-bucket" in CheckpointStore("s3://no-such-bucket/x", "us").check()
    (tmp_path / "file").touch()
    assert "cannot be used now" in CheckpointStore(f"file://{tmp_path}/file/x", "us").check()


def test_what_a_crash_has_left_is_told_from_what_is_needed():
    keys = ["a_train_0/weights/x/3", "a_train_0/weights/x/9", "a_train_0/weights/y/4", "b_train_0/weights/x/1"]
    named = {"cache/a_train_0/weights/y/4", "checkpoints/a_train_0/weights/x/3"}
    applied = {"a_train_0": 5, "b_train_0": 7}
    assert left_over(keys, named, applied, {"b_train_0"}) == ["a_train_0/weights/x/3"]
    assert left_over(["unknown/weights/x/1", "notes"], set(), applied, set()) == []


# ---------------------------------------------------------------- a service with a store


@asynccontextmanager
async def store_of(service, url, monkeypatch, budget=2**30):
    """Give the shared service a store for a while."""
    data_dir = service.storage._data_dir
    cache = CheckpointCache(CheckpointStore(url, id_of(data_dir)), data_dir, budget)
    with monkeypatch.context() as given:
        given.setattr(service.storage, "_cache", cache)
        given.setattr(checkpoint_cache, "PAUSES", (0.01, 0.01))
        given.setattr(checkpoint_cache, "IN_USE_SECONDS", 0.0)
        yield cache
        await cache.close()


async def settled(cache):
    await asyncio.gather(*cache._background)


def test_checkpoints_live_in_the_store(shared, url, monkeypatch, undisturbed):
    async def story(service):
        async with store_of(service, url, monkeypatch, budget=1) as cache:
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

            files, root = files_of(url)
            files.rm(f"{root}/{key_of(external.folder)}", recursive=True)
            await service.storage.evict()
            with pytest.raises(NotFound, match="removed there"):
                await service.checkpoints.files(external)
        with pytest.raises(InvalidRequest, match="checkpoints_url"):
            await service.storage.bring(weights.folder)

    shared(story)


def test_a_save_that_the_store_does_not_take_is_none(shared, url, monkeypatch):
    async def story(service):
        async with store_of(service, url, monkeypatch) as cache:
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

    async def story():
        async with serving(checkpoints_url=url) as service:
            client = await Client.create(service)
            await client.steps(2)
            saved, other = await client.save("it"), await client.save("other")
            store = service._cache.store
            folder = service.checkpoints.folder(saved)
            store.put(folder, key_of(saved.folder).replace("/it/", "/dead/"))  # as if its end had not been recorded
            store.put(folder, key_of(saved.folder).replace("/it/5", "/ahead/50"))
            await service._ledger.remove(CheckpointRecord, other.path)
        data, reading = tmp_path / "data", CheckpointStore(url, "")
        assert len(reading.keys()) == 4
        assert [one.what for one in problems(data, None, reading) if one.lost] == []
        assert "not looked at" in " ".join(one.what for one in problems(data))
        back_up(data, None, tmp_path / "backup")
        assert not (tmp_path / "backup" / "cache").exists() and not (tmp_path / "backup" / "store_id").exists()
        assert [one.what for one in problems(tmp_path / "backup", None, reading) if one.lost] == []
        async with serving(checkpoints_url=url) as service:
            await service._sweeping
            await settled(service._cache)
            left = {key_of(saved.folder), key_of(saved.folder).replace("/it/5", "/ahead/50")}
            assert reading.keys() == left, "what this ledger has not come to is somebody's"
            client.service = service
            assert await (await client.created_from(saved)).steps(1) == undisturbed[2:3]
        store_file = tmp_path / "store" / key_of(saved.folder) / "adapter_model.safetensors"
        store_file.write_bytes(b"rust")
        (lost,) = [one for one in problems(data, None, reading) if one.lost]
        assert "adapter_model.safetensors is damaged" in lost.what
        settings = Settings.load(data_dir=data, checkpoints_url=url)
        owner = json.loads((tmp_path / "store" / "owner.json").read_text())["data_directory"]
        assert owner == id_of(settings.data_dir)
        (data / "store_id").unlink()  # as a backup is restored
        with pytest.raises(UnusableStore, match="another data directory"):
            async with serving(checkpoints_url=url):
                pass
        DataDirLock(data).release()  # whoever was refused has let go of the data directory

    run(story)


def test_doctor_tries_the_store(url, tmp_path):
    (check,) = [
        one for one in doctor.storage(Settings.load(data_dir=tmp_path, checkpoints_url=url)) if "check" in one.name
    ]
    assert check.ok and url in check.found
    files, root = files_of(url)
    assert files.find(root) == []
    wrong = Settings.load(data_dir=tmp_path, checkpoints_url="nowhere://x")
    (check,) = [one for one in doctor.storage(wrong) if "check" in one.name]
    assert not check.ok and "nowhere" in check.found and "leave it out" in check.mend
