"""Copies of checkpoints in a store: what is on its way there, what goes and what is fetched again."""

import asyncio
import threading

import pytest

from tests.control.stores import KEY, settled
from tinkercloud.control import checkpoint_cache, checkpoint_store
from tinkercloud.control.checkpoint_cache import CheckpointCache, left_over
from tinkercloud.control.checkpoint_store import CheckpointStore, StoreUnavailable

FOLDER = f"cache/{KEY}"


@pytest.fixture
def cache(us, saved_folder, tmp_path, monkeypatch):
    """With one folder that was saved."""
    monkeypatch.setattr(checkpoint_cache, "PAUSES", (0.0,))
    (tmp_path / "data" / FOLDER).parent.mkdir(parents=True)
    saved_folder.rename(tmp_path / "data" / FOLDER)
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


def test_what_a_crash_has_left_is_told_from_what_is_needed():
    keys = ["a_train_0/weights/x/3", "a_train_0/weights/x/9", "a_train_0/weights/y/4", "b_train_0/weights/x/1"]
    named = {"cache/a_train_0/weights/y/4", "checkpoints/a_train_0/weights/x/3"}
    applied = {"a_train_0": 5, "b_train_0": 7}
    assert left_over(keys, named, applied, {"b_train_0"}) == ["a_train_0/weights/x/3"]
    assert left_over(["unknown/weights/x/1", "notes"], set(), applied, set()) == []
