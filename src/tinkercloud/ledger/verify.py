"""Reading every stored byte of a ledger that no server has open, to find what the disk has damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import DatabaseError

from tinkercloud.ledger import database, entries
from tinkercloud.ledger.lock import DataDirLock
from tinkercloud.ledger.retention import needed_for_replay
from tinkercloud.ledger.schema import IS_KEPT, segments
from tinkercloud.ledger.schema import entries as table
from tinkercloud.ledger.segments import Corrupt, segment_file


class NoLedger(Exception):
    """There is no ledger to verify; the text says what there is."""


class DamagedBlob(NamedTuple):
    """A payload or outcome that is not what was written."""

    request_id: str
    stream: str
    what: str
    replayed: bool
    """Whether a recovery of its run may need it."""


@contextmanager
def opened(data_dir: Path, url: str | None = None) -> Iterator[Connection]:
    """A connection to a data directory's ledger that changes nothing. Raises `DataDirInUse` while a server has it,
    `NoLedger` if there is none of this version."""
    file = data_dir / database.DATABASE_FILE
    if url is None and not file.is_file():
        raise NoLedger(f"{data_dir} has no ledger.db: give the data directory of a server")
    lock = DataDirLock(data_dir, "fsck")
    try:
        engine = database.connect(database.address_in(data_dir, url), connections=1)
        try:
            with engine.connect() as connection:
                _check_version(connection, data_dir)
                yield connection
        except DatabaseError as error:
            raise NoLedger(f"the database of {data_dir} is damaged ({error.orig}): restore it from a backup") from error
        finally:
            engine.dispose()
    finally:
        lock.release()


def _check_version(connection: Connection, data_dir: Path) -> None:
    known = inspect(connection).has_table("alembic_version")
    version = connection.scalar(text("SELECT version_num FROM alembic_version")) if known else None
    if version != database.HEAD:
        raise NoLedger(
            f"the ledger of {data_dir} is at version {version}, this tinkercloud verifies {database.HEAD}: start this "
            "version's server on it once, or use the version that wrote it"
        )


def database_damage(connection: Connection) -> list[str]:
    """What SQLite finds wrong with its own file; other databases look after themselves."""
    if connection.dialect.name != "sqlite":
        return []
    return [line for line in connection.scalars(text("PRAGMA integrity_check")) if line != "ok"]


def used_segments(connection: Connection, data_dir: Path) -> list[Path]:
    """The segment files that hold something."""
    numbers = connection.scalars(select(segments.c.segment).where(segments.c.blobs > 0))
    return [segment_file(data_dir / "segments", number) for number in numbers]


def damaged_blobs(connection: Connection, data_dir: Path) -> Iterator[DamagedBlob]:
    """Read every payload and outcome that is kept, in the database and in the segment files."""
    replayed = set(connection.scalars(select(table.c.request_id).where(needed_for_replay())))
    for request_id, stream in connection.execute(select(table.c.request_id, table.c.stream).where(IS_KEPT)).all():
        for part in ("payload", "outcome"):
            try:
                entries.load(connection, data_dir / "segments", request_id, part)
            except Corrupt as error:
                yield DamagedBlob(request_id, stream, f"{part}: {error}", request_id in replayed)
