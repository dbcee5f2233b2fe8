"""Checkpoints in a folder and in S3, by the same tests: published whole or not at all, read as they were written."""

import asyncio
import hashlib
import json
import shutil
import threading
import time
from contextlib import asynccontextmanager

import fsspec
import pytest

from tests import s3 as moto
from tests.control.conftest import BATCH, NANO, OWNER, Client
from tinkercloud.cli import doctor
from tinkercloud.config import Settings
from tinkercloud.control import checkpoint_cache, checkpoint_store
from tinkercloud.control.backup import back_up
from tinkercloud.control.checkpoint_cache import CheckpointCache, left_over
from tinkercloud.control.checkpoint_store import CheckpointStore, StoreUnavailable, UnusableStore
from tinkercloud.control.folders import is_import, is_stored, key_of
from tinkercloud.control.store_owner import StoreOwner, without_userinfo
from tinkercloud.control.verify import problems
from tinkercloud.engine.operations import Sample, SamplingParams
from tinkercloud.engine.results import Failure, SampleOutput
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord

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


@pytest.fixture
def us(tmp_path):
    (tmp_path / "us").mkdir()
    return StoreOwner(tmp_path / "us")


# ---------------------------------------------------------------- the store


def test_what_was_put_is_got(url, us, saved, tmp_path):
    store = CheckpointStore(url, us)
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


def test_files_without_their_manifest_are_no_checkpoint(url, us, saved, tmp_path, monkeypatch):
    store = CheckpointStore(url, us)
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


def test_what_the_store_has_changed_is_refused(url, us, saved, tmp_path):
    store = CheckpointStore(url, us)
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
    of = json.dumps({"size": len("{}"), "sha256": hashlib.sha256(b"{}").hexdigest()})
    files.pipe_file(f"{root}/{KEY}/../elsewhere" if store._is_local else f"{root}/{KEY}/x", b"{}")
    files.pipe_file(f"{root}/{KEY}/manifest.json", f'{{"files": {{"../elsewhere": {of}}}}}'.encode())
    with pytest.raises(InvalidRequest, match="manifest"):
        store.get(KEY, tmp_path / "it")
    assert not (tmp_path / "it").exists() and not (tmp_path / "elsewhere").exists()


def test_a_store_belongs_to_one_data_directory(url, us, saved, tmp_path):
    CheckpointStore(url, us).put(saved, KEY)
    ours = StoreOwner(tmp_path / "us").id
    assert ours == us.id
    other = CheckpointStore(url, StoreOwner(tmp_path))
    for change in (lambda: other.put(saved, KEY), lambda: other.remove(KEY), other.claim):
        with pytest.raises(UnusableStore, match=f"another data directory .*{ours}.*owner.json"):
            change()
    other.get(KEY, tmp_path / "it")
    assert other.check() is None


def test_a_store_that_cannot_be_used_is_said(tmp_path, s3_server, monkeypatch):
    moto.use(monkeypatch, s3_server)
    with pytest.raises(UnusableStore, match="nowhere"):
        CheckpointStore("nowhere://bucket")
    with pytest.raises(UnusableStore, match="pip install"):
        CheckpointStore("gs://bucket")
    assert "no-such-bucket" in CheckpointStore("s3://no-such-bucket/x").check()
    (tmp_path / "file").touch()
    assert "cannot be used now" in CheckpointStore(f"file://{tmp_path}/file/x").check()


def test_a_disk_that_is_not_mounted_is_no_new_store(us, saved, tmp_path):
    url, disk = f"file://{tmp_path}/store", tmp_path / "store"
    CheckpointStore(url, us).put(saved, KEY)
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    for store in (CheckpointStore(url, us), CheckpointStore(url, StoreOwner(tmp_path / "us"))):
        uses = (lambda: store.put(saved, KEY), lambda: store.remove(KEY), lambda: store.get(KEY, tmp_path / "it"))
        for use in (*uses, store.claim, lambda: store.damage(KEY), lambda: CheckpointStore(url).damage(KEY)):
            with pytest.raises(StoreUnavailable, match="mounted"):
                use()
        assert "mounted" in store.check()
    assert list(disk.iterdir()) == []
    disk.rmdir()
    (tmp_path / "unmounted").rename(disk)
    store.get(KEY, tmp_path / "it")
    emptied = tmp_path / "emptied"
    emptied.mkdir()
    (disk / "owner.json").rename(emptied / "owner.json")
    CheckpointStore(url, StoreOwner(emptied)).claim()
    with pytest.raises(StoreUnavailable, match="another data directory's now"):
        store.put(saved, KEY)
    (disk / "owner.json").unlink()
    with pytest.raises(StoreUnavailable) as refused:
        store.put(saved, KEY)
    (disk / "owner.json").write_text(str(refused.value).partition("must hold ")[2])
    store.put(saved, KEY)


def test_a_torn_owner_is_said(url, us, saved):
    store = CheckpointStore(url, us)
    store.claim()
    files, root = files_of(url)
    assert [path.split("/")[-1] for path in files.find(root)] == ["owner.json"]
    files.pipe_file(f"{root}/owner.json", b'{"data')
    with pytest.raises(UnusableStore, match=r"owner\.json is damaged"):
        store.put(saved, KEY)


def test_nobody_is_told_a_password():
    for url in ("nowhere://me:se@cret@host/x", "ftp://me:se@cret@127.0.0.1:1/x"):
        with pytest.raises(UnusableStore) as refused:
            CheckpointStore(url)
        assert "cret" not in str(refused.value) and url.split("@")[-1] in str(refused.value)
    store = CheckpointStore("memory://me:secret@host/x")
    store._fs.cat_file = lambda path: (_ for _ in ()).throw(OSError("no memory://me:secret@host/x"))
    with pytest.raises(StoreUnavailable, match=r"^memory://host/x .* no memory://host/x$"):
        store.get(KEY, None)
    assert without_userinfo("s3://bucket/a@b and file:///c/d@e") == "s3://bucket/a@b and file:///c/d@e"


def test_what_a_crash_has_left_is_told_from_what_is_needed():
    keys = ["a_train_0/weights/x/3", "a_train_0/weights/x/9", "a_train_0/weights/y/4", "b_train_0/weights/x/1"]
    named = {"cache/a_train_0/weights/y/4", "checkpoints/a_train_0/weights/x/3"}
    applied = {"a_train_0": 5, "b_train_0": 7}
    assert left_over(keys, named, applied, {"b_train_0"}) == ["a_train_0/weights/x/3"]
    assert left_over(["unknown/weights/x/1", "notes"], set(), applied, set()) == []


# ---------------------------------------------------------------- copies, and what is on its way


FOLDER = f"cache/{KEY}"


@pytest.fixture
def cache(us, saved, tmp_path, monkeypatch):
    """With one folder that was saved."""
    monkeypatch.setattr(checkpoint_cache, "PAUSES", (0.0,))
    (tmp_path / "data" / FOLDER).parent.mkdir(parents=True)
    saved.rename(tmp_path / "data" / FOLDER)
    return CheckpointCache(CheckpointStore(f"file://{tmp_path}/store", us), tmp_path / "data", 2**30)


def held(monkeypatch, place, name):
    """(set when the method is called the first time, what that call waits for, how often it was called)."""
    called, goes_on, calls, method = threading.Event(), threading.Event(), [], getattr(place, name)

    def late(*arguments, **options):
        calls.append(arguments)
        called.set()
        assert goes_on.wait(20) or len(calls) > 1
        return method(*arguments, **options)

    monkeypatch.setattr(place, name, late)
    return called, goes_on, calls


def test_a_removal_that_is_late_does_not_take_what_was_saved_again(cache, monkeypatch, run):
    async def story():
        with monkeypatch.context() as broken:
            broken.setattr(cache.store._fs, "put_file", lambda *_: (_ for _ in ()).throw(OSError("away")))
            removing, goes_on, _ = held(monkeypatch, cache.store, "remove")
            with pytest.raises(StoreUnavailable, match="away"):
                await cache.publish(FOLDER)
        await asyncio.to_thread(removing.wait, 20)
        again = asyncio.create_task(cache.publish(FOLDER))
        await asyncio.sleep(0.05)
        assert not again.done() and cache.store.damage(KEY) is not None
        goes_on.set()
        await again
        cache.discard(FOLDER)
        await cache.publish(FOLDER)  # before the other has begun
        await settled(cache)
        assert cache.store.damage(KEY) is None
        await cache.close()

    run(story)


def test_removals_do_not_hold_up_the_rest(cache, monkeypatch, run):
    async def story():
        goes_on = threading.Event()
        monkeypatch.setattr(cache.store, "remove", lambda key: goes_on.wait(20))
        for number in range(checkpoint_cache.STREAMS + 1):
            cache.discard(f"cache/a_train_0/weights/it/{number}")
        await asyncio.sleep(0)
        await asyncio.wait_for(cache.publish(FOLDER), 10)
        goes_on.set()
        await settled(cache)
        await cache.close()

    run(story)


def test_a_publication_that_was_given_up_ends_before_the_next_of_its_key(cache, monkeypatch, run):
    async def story():
        putting, goes_on, calls = held(monkeypatch, cache.store._fs, "put_file")
        first = asyncio.create_task(cache.publish(FOLDER))
        await asyncio.to_thread(putting.wait, 20)
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("checkpoint store"))
        first.cancel()
        again = asyncio.create_task(cache.publish(FOLDER))
        await asyncio.sleep(0.05)
        assert first.cancelled() and len(calls) == 1
        goes_on.set()
        await again
        names = [str(path).split("/")[-1] for path, _ in calls]
        assert names == ["adapter_config.json", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
        assert cache.store.damage(KEY) is None
        await cache.close()
        with pytest.raises(RuntimeError, match="shut down"):
            await cache.keys()

    run(story)


def test_a_copy_that_the_disk_has_cut_is_fetched_again(cache, run):
    async def story():
        await cache.publish(FOLDER)
        weights = cache._data_dir / FOLDER / "adapter_model.safetensors"
        expected = weights.read_bytes()
        for _ in "saved here", "fetched":
            weights.write_bytes(expected[:100])
            await cache.fetch(FOLDER)
            assert weights.read_bytes() == expected
        assert [path.name for path in weights.parent.parent.iterdir()] == ["3"]
        await cache.close()

    run(story)


def test_what_this_machine_cannot_do_now_is_tried_again(cache, monkeypatch, run):
    async def story():
        def broken(file):
            tried.append(file)
            raise OSError(5, "Input/output error")

        tried = []
        with monkeypatch.context() as breaking:
            breaking.setattr(checkpoint_store, "_digest_of", broken)
            with pytest.raises(StoreUnavailable, match="Input/output"):
                await cache.publish(FOLDER)
        assert len(tried) == 2
        await cache.publish(FOLDER)
        cache._remove(FOLDER)
        with monkeypatch.context() as breaking:
            breaking.setattr(checkpoint_store, "sync", broken)
            with pytest.raises(StoreUnavailable, match="Input/output"):
                await cache.fetch(FOLDER)
        assert not list((cache._data_dir / FOLDER).parent.iterdir()), "nor a draft"
        await cache.close()

    run(story)


# ---------------------------------------------------------------- a service with a store


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


async def settled(cache):
    await asyncio.gather(*cache._discards.values())


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
        data, reading = tmp_path / "data", CheckpointStore(url)
        assert len(reading.keys()) == 5
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
