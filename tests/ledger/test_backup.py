"""Copies of the ledger's files, and what they can go on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinkercloud.ledger import Ledger, keys
from tinkercloud.ledger.backup import copy_database, copy_segments
from tinkercloud.ledger.database import address_in
from tinkercloud.ledger.records import AuditRecord, KeyRecord

EVENT = AuditRecord(1.0, "alice", None, "session_create", "organizations", {})


def key() -> KeyRecord:
    secret = keys.new_secret()
    return KeyRecord(0, keys.digest(secret), keys.hint(secret), "alice", "laptop", False, 1.0)


@pytest.mark.anyio
async def test_a_copied_database_counts_on(tmp_path: Path, database_url: str | None) -> None:
    """Under a path that a URL cannot have as it is."""
    source, target = tmp_path / "old?mode=rw#1", tmp_path / "new"
    ledger = await Ledger.open(source)
    await ledger.record_event(EVENT)
    await ledger.close()
    with keys.changing(source, None) as connection:
        keys.add(connection, key())
    target.mkdir()
    copy_database(address_in(source, None), address_in(target, database_url))
    ledger = await Ledger.open(target, database_url)
    await ledger.record_event(EVENT)
    assert await ledger.events(0, 2) == [EVENT, EVENT]
    await ledger.close()
    with keys.changing(target, database_url) as connection:
        assert keys.add(connection, key()).key_id == 2


def test_a_segment_is_copied_again_when_its_end_was_written_over(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    file = source / "1.seg"
    file.write_bytes(b"a batch that failed")
    os.utime(file, ns=(1, 1))
    copy_segments(source, target)
    file.write_bytes(b"one that came later")
    copy_segments(source, target)
    assert (target / "1.seg").read_bytes() == b"one that came later"
    (target / "1.seg").chmod(0o400)  # what has not changed is not written
    inode = (target / "1.seg").stat().st_ctime_ns
    copy_segments(source, target)
    assert (target / "1.seg").stat().st_ctime_ns == inode
