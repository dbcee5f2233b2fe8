from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from tinkercloud.ledger import Ledger, database
from tinkercloud.ledger.lock import FILE, DataDirInUse, DataDirLock, holder
from tinkercloud.ledger.records import SessionRecord

DOWN = 8 * 86400.0
"""Seconds"""

pytestmark = pytest.mark.anyio


async def left_by_a_server(data_dir: Path) -> SessionRecord:
    """A session that was heard of 10 s before its server stopped, `DOWN` ago."""
    stopped = time.time() - DOWN
    ledger = await Ledger.open(data_dir)
    await ledger.forgive_downtime()
    session = await ledger.insert(SessionRecord("session-1", "alice", stopped - 10, stopped - 10, "parked"))
    await ledger.close()
    os.utime(data_dir / FILE, (stopped, stopped))
    return session


async def silence(ledger: Ledger) -> float:
    (session,) = await ledger.find(SessionRecord, session_id="session-1")
    return time.time() - session.last_heartbeat


async def test_starts_that_fail_leave_the_downtime_as_it_was(tmp_path: Path) -> None:
    await left_by_a_server(tmp_path)
    with pytest.raises(database.UnusableDatabase):
        await Ledger.open(tmp_path, "sqlite:////no/such/folder/ledger.db")
    DataDirLock(tmp_path).release()  # as one ends that is killed when it has the lock
    await (await Ledger.open(tmp_path)).close()  # and one that was refused for want of keys
    ledger = await Ledger.open(tmp_path)
    assert ledger.downtime == pytest.approx(DOWN, abs=60)
    assert await silence(ledger) == pytest.approx(DOWN + 10, abs=60)
    await ledger.forgive_downtime()
    await ledger.forgive_downtime()
    assert await silence(ledger) == pytest.approx(10, abs=60)
    await ledger.close()
    again = await Ledger.open(tmp_path)
    assert again.downtime < 60, "it is forgiven once"
    await again.close()


async def test_downtime_whose_forgiveness_was_not_recorded_is_forgiven_later(tmp_path: Path) -> None:
    await left_by_a_server(tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path / database.DATABASE_FILE}")
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TRIGGER no BEFORE UPDATE ON sessions BEGIN SELECT RAISE(ABORT, 'not now'); END")
        )
    killed = await Ledger.open(tmp_path)
    with pytest.raises(IntegrityError):
        await killed.forgive_downtime()
    await killed.close()
    ledger = await Ledger.open(tmp_path)
    with pytest.raises(IntegrityError):
        await ledger.forgive_downtime()
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER no"))
    engine.dispose()
    await ledger.forgive_downtime()
    assert await silence(ledger) == pytest.approx(10, abs=60)
    await ledger.close()


async def test_a_server_that_was_killed_before_it_said_that_it_had_forgiven_forgives_no_more_than_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await left_by_a_server(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(DataDirLock, "alive", lambda _: None)
        ledger = await Ledger.open(tmp_path)
        await ledger.forgive_downtime()
        await ledger.close()
    ledger = await Ledger.open(tmp_path)
    await ledger.forgive_downtime()
    assert 0 <= await silence(ledger) < 60, "never heard of in the future"
    await ledger.close()


async def test_who_only_looks_keeps_no_server_from_starting(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    assert holder(tmp_path) is None
    looker = os.open(tmp_path / FILE, os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [looker]).start()
    lock = DataDirLock(tmp_path)
    assert holder(tmp_path) == (str(os.getpid()), "serve")
    begun = time.monotonic()
    with pytest.raises(DataDirInUse, match=rf"by a server \(process {os.getpid()}\): stop"):
        DataDirLock(tmp_path)
    assert time.monotonic() - begun < 0.5, "a server is not waited for"
    lock.release()
