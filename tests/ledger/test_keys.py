"""Keys are changed beside a server that has the same database open."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from tinkercloud.control.keys import REFRESH_SECONDS, Keys
from tinkercloud.ledger import Ledger, keys
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.records import KeyRecord

pytestmark = pytest.mark.anyio


def record(secret: str, **fields: object) -> KeyRecord:
    return KeyRecord(0, keys.digest(secret), keys.hint(secret), "alice", "laptop", False, time.time(), **fields)


async def test_a_running_server_knows_within_a_second(tmp_path: Path, database_url: str | None) -> None:
    ledger = await Ledger.open(tmp_path, database_url)
    known = await Keys.open(ledger)
    try:
        assert not known.configured and known.find("tml-x") is None
        secret, short = keys.new_secret(), keys.new_secret()
        with keys.changing(tmp_path, database_url) as connection:
            stored = keys.add(connection, record(secret, max_models=3))
            keys.add(connection, record(short, expires_at=time.time() + 1.2))
        assert stored.key_id == 1
        await asyncio.sleep(1)
        assert known.configured and known.find(secret) == known.get(1) == stored
        assert known.find(short) is not None
        await asyncio.sleep(0.3)
        assert known.find(short) is None, "expired"
        with keys.changing(tmp_path, database_url) as connection:
            assert keys.revoke(connection, 1, time.time()) and not keys.revoke(connection, 1, time.time())
        await asyncio.sleep(2 * REFRESH_SECONDS)
        assert known.find(secret) is None and known.get(1) is None
        assert known.configured, "a server that had keys goes on wanting one"
    finally:
        await known.close()
        await ledger.close()


async def test_a_revoked_key_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was read before it was revoked, and is kept late."""
    secret = keys.new_secret()
    with keys.changing(tmp_path, None) as connection:
        stored = keys.add(connection, record(secret))
    ledger = await Ledger.open(tmp_path)
    known = await Keys.open(ledger)
    read, late, has_read = ledger.keys, asyncio.Event(), asyncio.Event()

    async def read_early() -> list[KeyRecord]:
        monkeypatch.setattr(ledger, "keys", read)
        found = await read()
        has_read.set()
        await late.wait()
        return found

    try:
        monkeypatch.setattr(ledger, "keys", read_early)
        refreshing = asyncio.create_task(known.refresh())
        await has_read.wait()
        revoking = asyncio.create_task(known.revoke(stored))
        await asyncio.wait([revoking], timeout=0.1)
        late.set()
        await asyncio.gather(refreshing, revoking)
        assert known.find(secret) is None
    finally:
        await known.close()
        await ledger.close()


async def test_keys_are_read_again_after_whatever_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinkercloud.control.keys.REFRESH_SECONDS", 0.01)
    ledger = await Ledger.open(tmp_path)
    known = await Keys.open(ledger)
    failed = asyncio.Event()

    async def wrong() -> list[KeyRecord]:
        failed.set()
        raise ValueError("what no key is like")

    try:
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "keys", wrong)
            await failed.wait()
        secret = keys.new_secret()
        with keys.changing(tmp_path, None) as connection:
            keys.add(connection, record(secret))
        async with asyncio.timeout(5):
            while known.find(secret) is None:
                await asyncio.sleep(0.01)
    finally:
        await known.close()
        await ledger.close()


async def test_a_transaction_that_fails_leaves_no_key(tmp_path: Path, database_url: str | None) -> None:
    with pytest.raises(RuntimeError), keys.changing(tmp_path, database_url) as connection:
        keys.add(connection, record(keys.new_secret()))
        raise RuntimeError
    with keys.changing(tmp_path, database_url) as connection:
        assert keys.find_all(connection) == []


async def test_making_the_database_is_no_sign_of_a_server(tmp_path: Path) -> None:
    (tmp_path / "ledger.lock").touch()
    os.utime(tmp_path / "ledger.lock", (1000, 1000))
    with keys.changing(tmp_path, None):
        pass
    assert DataDirLock(tmp_path).last_alive == 1000


async def test_a_data_directory_is_its_owners(tmp_path: Path) -> None:
    with keys.changing(tmp_path / "a" / "data", None):
        pass
    await (await Ledger.open(tmp_path / "b" / "data")).close()
    for made in ("a", "b"):
        assert (tmp_path / made / "data").stat().st_mode & 0o077 == 0
