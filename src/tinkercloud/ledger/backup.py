"""A ledger's database and segment files as they are at one moment, beside a server that writes to them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

from sqlalchemy import URL, Connection, func, insert, inspect, select, text

from tinkercloud.ledger import database, schema
from tinkercloud.ledger.files import sync

ROWS = 1000
"""Rows that are read and written at a time."""


class NotEmpty(Exception):
    """The database that is to be filled has tables already."""


def copy_database(source: URL, target: URL) -> None:
    """Make the database at `target`, which has no tables yet, the same as the one at `source`; either kind to either.

    Others may write to `source` meanwhile. Raises `NotEmpty`, and `WrongVersion` if `source` is not of this version.
    """
    if source.get_backend_name() == target.get_backend_name() == "sqlite":
        _copy_file(source, target)
    else:
        _copy_rows(source, target)


def _copy_file(source: URL, target: URL) -> None:
    if Path(str(target.database)).exists():
        raise NotEmpty(f"{target.database} is there already")
    try:
        with (
            contextlib.closing(
                sqlite3.connect(f"{Path(str(source.database)).absolute().as_uri()}?mode=ro", uri=True)
            ) as old,
            contextlib.closing(sqlite3.connect(str(target.database))) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        raise database.UnusableDatabase(f"{source.database} cannot be copied to {target.database}: {error}") from error
    sync(Path(str(target.database)))


def _copy_rows(source: URL, target: URL) -> None:
    old_engine, new_engine = database.connect(source, 1), database.connect(target, 1)
    try:
        with new_engine.connect() as connection:
            if inspect(connection).get_table_names():
                raise NotEmpty(
                    f"the database {target.render_as_string()} has tables already: give an empty one; what an earlier "
                    "restore has left that was cut short goes with DROP SCHEMA public CASCADE; CREATE SCHEMA public"
                )
        options = {} if source.get_backend_name() == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        with old_engine.connect().execution_options(**options) as old:
            if old.scalar(text("SELECT version_num FROM alembic_version")) != database.HEAD:
                raise database.WrongVersion(
                    f"the ledger is not at this tinkercloud's version, {database.HEAD}: start its server on it once"
                )
            database.migrate(new_engine)
            with new_engine.begin() as new:
                for table in schema.metadata.sorted_tables:
                    for rows in old.execution_options(yield_per=ROWS).execute(select(table)).mappings().partitions():
                        new.execute(insert(table), [dict(row) for row in rows])
                if target.get_backend_name() == "postgresql":
                    _count_on(new)
    finally:
        old_engine.dispose()
        new_engine.dispose()


def _count_on(connection: Connection) -> None:
    """Let PostgreSQL's own numbers go on behind those of the rows that were copied: it does not notice given ones."""
    for table in schema.metadata.sorted_tables:
        column = table.autoincrement_column
        if column is not None:
            highest = connection.scalar(select(func.max(column)))
            if highest is not None:
                connection.execute(select(func.setval(func.pg_get_serial_sequence(table.name, column.name), highest)))


def copy_segments(source: Path, target: Path) -> None:
    """Copy the segment files that are there, again if they have changed since an earlier call.

    Not links: what is appended to one of two servers' files must not be in the other's.
    """
    target.mkdir(exist_ok=True)
    for file in sorted(source.glob("*.seg")):
        copy = target / file.name
        with contextlib.suppress(FileNotFoundError):  # its blobs have all expired
            before = file.stat()
            if not copy.exists() or _version(copy.stat()) != _version(before):
                shutil.copyfile(file, copy)
                os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
                sync(copy)


def _version(of: os.stat_result) -> tuple[int, int]:
    """What differs when a file was written to; not its size alone, since a batch that failed is written over."""
    return of.st_size, of.st_mtime_ns
