"""`tinkercloud fsck`: every kind of damage is found, and only what no server brings back is called lost."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.control.conftest import NANO, Client
from tinkercloud.control.verify import problems
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.lock import DataDirInUse, DataDirLock
from tinkercloud.ledger.records import SnapshotRecord
from tinkercloud.ledger.verify import NoLedger, opened
from tinkercloud.ledger.writer import SMALL_BYTES


async def data_of_a_stopped_server(serving, data):
    """(a checkpoint's folder, a run's snapshots, newest first)"""
    async with serving() as service:
        client = await Client.create(service)
        for _ in range(2):
            await client.steps(1)
            await service.models.get(NANO).conductor.park_all()
        checkpoint = await client.save("it")
        client.seq_id += 1
        await client.result(await service.runs.load_weights(client.model, client.seq_id, checkpoint, True))
        with pytest.raises(DataDirInUse):
            problems(data)
    ledger = await Ledger.open(data)
    await ledger.append("large", 0, "sample", bytes(SMALL_BYTES + 1))
    snapshots = await ledger.find(SnapshotRecord)
    await ledger.close()
    return checkpoint.folder, [snapshot.folder for snapshot in snapshots]


def last_alive(data):
    lock = DataDirLock(data)
    lock.release()
    return lock.last_alive


def flip(file, at=-1):
    changed = bytearray(file.read_bytes())
    changed[at] ^= 1
    file.unlink()  # its links elsewhere stay as they are
    file.write_bytes(changed)


def fsck(*folder, **environ) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinkercloud", "fsck", *map(str, folder)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=os.environ | environ)


def test_damage_is_found(serving, run, tmp_path):
    data = tmp_path / "data"
    folders = {}

    async def story():
        folders["checkpoint"], folders["snapshots"] = await data_of_a_stopped_server(serving, data)

    run(story)
    alive = last_alive(data)
    assert problems(data) == []
    assert last_alive(data) == pytest.approx(alive, abs=1e-3), "no server was there meanwhile"
    sound = fsck(data)
    assert (sound.returncode, sound.stdout) == (0, "All is as it was written.\n"), sound.stderr
    of_serve = fsck(TINKERCLOUD_DATA_DIR=str(data))
    assert (of_serve.returncode, of_serve.stdout) == (0, f"{data}\nAll is as it was written.\n"), of_serve.stderr
    server = DataDirLock(data)
    in_use = fsck(data)
    server.release()
    assert in_use.returncode == 2
    assert in_use.stderr == f"error: {data} is in use by a server (process {os.getpid()}): stop that one\n"
    with opened(data), pytest.raises(DataDirInUse, match=rf"by `tinkercloud fsck` \(process {os.getpid()}\): wait"):
        DataDirLock(data)

    newest, older = folders["snapshots"]
    flip(data / newest / "optimizer.safetensors")
    (found,) = problems(data)
    assert newest in found.what and "optimizer.safetensors is damaged" in found.what and not found.lost
    (data / newest.rsplit("/", 1)[0] / "999").mkdir()
    (data / "samplers" / "other_sample_0").mkdir(parents=True)
    assert fsck(data).returncode == 0, "nothing is lost"
    assert [problem.lost for problem in problems(data)] == [False] * 3

    shutil.rmtree(data / older)
    flip(data / folders["checkpoint"] / "adapter_model.safetensors")
    (pin,) = (data / "pins").glob("*/*")
    (pin / "adapter_config.json").unlink()
    (segment,) = (data / "segments").iterdir()
    flip(segment, at=1000)
    lost = {problem.what for problem in problems(data) if problem.lost}
    for said in (newest, f"{older}: it is missing", folders["checkpoint"], pin.name, "operation large:0, payload"):
        assert [what for what in lost if said in what], (said, lost)
    assert len(lost) == 5
    broken = fsck(data)
    assert broken.returncode == 1 and "To mend: 5 of 7." in broken.stdout and "backup" in broken.stdout


def test_what_is_no_data_directory_is_said(tmp_path):
    with pytest.raises(NoLedger, match=r"has no ledger\.db"):
        problems(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "ledger.db").write_bytes(b"no database" * 1000)
    refused = fsck(tmp_path)
    assert refused.returncode == 2 and "is damaged" in refused.stderr and refused.stderr.count("\n") == 1
