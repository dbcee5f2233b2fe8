"""What is held and what goes in the data directory, also when a crash comes between two steps."""

import asyncio
import errno
import os
import shutil
import signal
import time

import pytest

from tests.control.conftest import NANO, OWNER, Client, kill_engine
from tests.disks import durable, lost
from tinkercloud.control import publications, storage
from tinkercloud.engine import checksums
from tinkercloud.engine.results import SaveOutput
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger import files
from tinkercloud.ledger.writer import DiskFull


def test_loads_are_replayed_after_their_checkpoints_have_gone(serving, run, tmp_path, without_snapshots):
    async def story():
        async with serving() as service:
            losses = []
            for disturbed in (False, True):
                client = await Client.create(service)
                await client.steps(1)
                overwritten = await client.save("overwritten")
                expiring = await client.save("expiring", ttl_seconds=1000)
                await client.steps(2)
                await client.load(overwritten)
                created = await client.created_from(expiring)
                seen = [await client.steps(1), await created.steps(1)]
                if disturbed:
                    assert (await client.save("overwritten", overwrite=True)).folder != overwritten.folder
                    await service.checkpoints.drop_expired(time.time() + 2000)
                    for gone in (overwritten, expiring):
                        assert not (tmp_path / "data" / gone.folder).exists(), "it goes at once"
                    await kill_engine(service)
                losses.append([*seen, await client.steps(2), await created.steps(2)])
            assert losses[0] == losses[1]

    run(story)


def pins(tmp_path) -> list:
    return list((tmp_path / "data" / "pins").glob("*/*"))


def test_a_pin_goes_when_no_replay_needs_it_any_more(serving, run, tmp_path):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            checkpoint = await client.save("it")
            await client.load(checkpoint)
            assert len(pins(tmp_path)) == 1, "the older snapshot is before the load"
            again = await service.runs.load_weights(client.model, client.seq_id, checkpoint, True)
            assert again.repeated and len(pins(tmp_path)) == 1, "a repeat holds nothing"
            await client.steps(1)
            await service.models.get(NANO).conductor.park_all()
            await client.steps(1)
            await service.models.get(NANO).conductor.park_all()
            assert not pins(tmp_path)
            other = await client.created_from(checkpoint)
            assert len(pins(tmp_path)) == 1
            await other.result(await service.runs.unload(other.model))
        assert not pins(tmp_path), "the log has ended"
        kept = [folder.name for folder in (tmp_path / "data" / "snapshots").iterdir()]
        assert kept == [client.model.model_id.replace(":", "_")], "an unloaded run's snapshots go, too"

    run(story)


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "no links here")

    source = tmp_path / "checkpoints" / "it"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"w")
    files.link_files(source, tmp_path / "pins" / "linked", tmp_path)
    monkeypatch.setattr(os, "link", no_link)
    files.link_files(source, tmp_path / "pins" / "copied", tmp_path)
    shutil.rmtree(source)
    assert (tmp_path / "pins" / "linked" / "weights").read_bytes() == b"w"
    assert (tmp_path / "pins" / "copied" / "weights").read_bytes() == b"w"


def test_a_sampler_keeps_the_folder_of_a_checkpoint_that_went(serving, run, tmp_path):
    async def story():
        async with serving() as service:
            client = await Client.create(service)
            kept, gone = [await client.save(name, ttl_seconds=1000) for name in ("kept", "gone")]
            await service.samplers.create(client.session, 0, None, kept.path)
            await service.checkpoints.drop_expired(time.time() + 2000)
            assert (tmp_path / "data" / kept.folder).exists() and not (tmp_path / "data" / gone.folder).exists()
            with pytest.raises(NotFound, match="any more"):  # it went while its load came
                await service.runs.create_from(client.session, 1, gone, True, {})
            assert not pins(tmp_path)
            assert (await service.runs.list(OWNER, 10, 0))[1] == 1, "no run without a log is left"
        async with serving():
            assert (tmp_path / "data" / kept.folder).exists()

    run(story)


def test_the_start_removes_what_a_crash_left_and_nothing_else(serving, run, tmp_path, monkeypatch):
    data = tmp_path / "data"

    async def story():
        async with serving() as service:
            client = await Client.create(service)
            checkpoint = await client.save("it")
            client.seq_id += 1
            await client.result(await service.runs.save_ephemeral_sampler(client.model, client.seq_id, 0))
            with monkeypatch.context() as patch:  # killed between the pin and the record of its load

                async def killed(*_):
                    pass

                patch.setattr(storage.Storage, "unpin", killed)
                async with service.storage.pinned(client.model.model_id, checkpoint):
                    pass
            assert len(pins(tmp_path)) == 1
            named = client.model.model_id.replace(":", "_")
            left = [
                f"checkpoints/{named}/weights/it/77",
                f"checkpoints/{named}/weights/never/.3.abcd.draft",
                f"snapshots/{named}/1000",
                "checkpoints/.import-1234/weights/it/0",
                f"samplers/.{client.session.session_id}_sample_9.abcd.old",
            ]
            others = [
                "checkpoints/other_train_0/weights/a/1",
                "checkpoints/import-5/weights/a/0",
                "samplers/other_sample_0",
            ]
            for folder in left + others:
                (data / folder).mkdir(parents=True)
        async with serving() as service:
            assert not pins(tmp_path) and not [folder for folder in left if (data / folder).exists()]
            assert not (data / f"checkpoints/{named}/weights/never").exists(), "nor what is empty by it"
            assert all((data / folder).exists() for folder in others), "another ledger's"
            assert (data / checkpoint.folder).exists() and len(list((data / "samplers").glob(f"{named[:36]}*"))) == 1
            client.service = service
            assert await client.steps(1)

    run(story)


def test_a_failed_import_leaves_nothing(serving, run, tmp_path, monkeypatch):
    data = tmp_path / "data"

    def imports(pattern: str = "*import-*/weights/*/*") -> int:
        return len(list((data / "checkpoints").glob(pattern)))

    async def story():
        async with serving() as service:
            client = await Client.create(service)
            source = data / (await client.save("it")).folder

            async def take_in():
                return await service.checkpoints.import_folder(source, "theirs", NANO, OWNER)

            engine = await service.models.get(NANO).engine.running()
            os.kill(engine.pid, signal.SIGSTOP)
            importing = asyncio.create_task(take_in())
            while not engine._waiting and not importing.done():
                await asyncio.sleep(0.01)
            assert imports() == imports(".import-*/weights/*/*") == 1, "a crash leaves what the next start removes"
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(Unavailable, match=r"engine of .* ended while it opened the adapter.*import it again"):
                await importing
            assert not imports()

            async def full(*_):
                raise DiskFull("no space left")

            with monkeypatch.context() as patch:
                patch.setattr(service._ledger, "insert", full)
                with pytest.raises(DiskFull):
                    await take_in()
            assert not imports()
            with monkeypatch.context() as patch:
                kept = durable(patch)
                checkpoint = await take_in()
            assert lost(kept, data / checkpoint.folder, data) == [], "nor does a power cut take anything"
            with (data / checkpoint.folder / "adapter_model.safetensors").open("r+b") as weights:
                weights.seek(-1, os.SEEK_END)
                weights.write(b"\x7f")
            assert "adapter_model.safetensors is damaged" in (checksums.damage(data / checkpoint.folder) or "")
            (source / "adapter_config.json").write_text((source / "adapter_config.json").read_text() + "\n")
            with pytest.raises(InvalidRequest, match=r"cannot be imported: adapter_config.json .*damaged"):
                await take_in()
        async with serving():
            assert imports() == 1 and (data / checkpoint.folder).is_dir()

    run(story)


def test_a_publication_that_fails_for_an_unknown_reason_is_logged_and_tried_again_later(shared, monkeypatch, caplog):
    monkeypatch.setattr(publications, "RETRY_SECONDS", 0.2)

    async def story(service):
        async def wrong(_):
            raise ValueError("not as it should be")

        async def then(_):
            raise AssertionError("it has not ended")

        monkeypatch.setattr(service.storage, "publish", wrong)
        waiting, goes_on = publications.Publications(service.storage), asyncio.Event()
        begun = time.monotonic()
        waiting.start("run", SaveOutput("cache/run/weights/it/1", 1), then, goes_on.set)
        await goes_on.wait()
        assert time.monotonic() - begun >= 0.2 and "run" not in waiting
        assert "cache/run/weights/it/1 was not published" in caplog.text and "not as it should be" in caplog.text

    shared(story)
