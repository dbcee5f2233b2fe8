"""Engine processes without an engine in them, and the fork server, which is this test's own: started from a process of
its own, without torch."""

import asyncio
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
from pathlib import Path

from tinkercloud.control import engine_process
from tinkercloud.control.engine_process import EngineProcess, engine_environment


async def _outlived(folder: Path) -> None:
    before = dict(os.environ)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await EngineProcess.start("outlived", folder, theirs)
    assert dict(os.environ) == before
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    given = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
    for name, value in engine_environment().items():
        assert f"{name}={value.partition(':')[0]}".encode() in given  # glibc takes its tunables apart in place
    os.kill(server, signal.SIGKILL)
    assert await process.wait() == 255, "nobody knows how it ends any more"
    process.kill()
    os.kill(process.pid, 0)
    process.kill(connected=True)
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1), 30) == b""


def _alone(folder: Path) -> None:
    engine_process._CONTEXT.set_forkserver_preload([])
    asyncio.run(_outlived(folder))


def test_an_engine_that_outlives_the_fork_server_can_be_ended(tmp_path):
    """Its exit is no longer told, so it seems to have ended."""
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
