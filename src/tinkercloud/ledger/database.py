"""Opening the SQL database: connection settings and migrations."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from tinkercloud.errors import Unavailable

HEAD = "0013"
"""The newest migration. Known here so that opening a database that is up to date need not import Alembic (0.3 s)."""

BUSY_TIMEOUT = 30
"""Seconds for which a statement waits for SQLite's lock, such as while a backup copies the database."""

CHECKPOINT_PAGES = 4096
"""Size of the write-ahead log, in pages of 4 KiB, at which SQLite copies it into the database file."""


WRITER_LOCK = 0x74_69_6E_6B_65_72
"""The PostgreSQL advisory lock of a database's only writer."""

WRITER_LOCK_SECONDS = 5.0
"""How long a server waits for the lock: PostgreSQL needs a moment to see that the one before was killed."""

DATABASE_FILE = "ledger.db"
"""Of SQLite, in the data directory."""


class DatabaseInUse(Unavailable):
    """Another server writes to the database."""


class Silent(Unavailable):
    """The database cannot be reached now, or is busy. Works again when it can."""


class WrongVersion(Exception):
    """The database was written by a newer tinkercloud."""


class UnusableDatabase(Exception):
    """The database cannot be opened. The text says why and what would be right, without the URL's password."""


def parse_url(text: str) -> URL:
    """An SQLAlchemy URL. Raises `UnusableDatabase`."""
    wrong = UnusableDatabase(f"database_url is not the URL of a database that can be used: write {_RIGHT}")
    try:
        url = make_url(text)
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except ImportError as error:
        package = "psycopg[binary]" if url.get_backend_name() == "postgresql" else error.name
        mend = f"pip install '{package}', or write {_RIGHT}"
        raise UnusableDatabase(f"database_url needs a Python package that is missing: {mend}") from None
    except (ArgumentError, ValueError):  # a port that is no number is a ValueError
        raise wrong from None
    if dialect.is_async:
        raise wrong
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UnusableDatabase(f"database_url names a database in memory, which no stop would survive: write {_RIGHT}")
    return url


_RIGHT = "sqlite:////absolute/path/ledger.db or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


def address_in(data_dir: Path, url: str | None) -> URL:
    """The database of a data directory; without a `url`, SQLite in it. Raises `UnusableDatabase`."""
    if url is None:
        return URL.create("sqlite", database=str(data_dir.absolute() / DATABASE_FILE))  # a path may have any character
    return parse_url(url)


@contextlib.contextmanager
def opening(url: URL) -> Iterator[None]:
    """Whatever goes wrong with the database in this block is `UnusableDatabase`."""
    try:
        yield
    except SQLAlchemyError as error:
        why = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
        mend = (
            "its folder must exist and be this user's, and a damaged file be replaced by a backup"
            if url.get_backend_name() == "sqlite"
            else "its server must run and let this user make tables"
        )
        raise UnusableDatabase(f"the database {url.render_as_string()} cannot be used: {why}; {mend}") from None


_SQLITE_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR}
"""SQLite calls an error in a statement operational too; these are none."""


def explained(error: DBAPIError) -> Exception:
    """`Silent` for what passes when the database is there again; anything else is itself."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    # The low byte is the kind of the error, what is above it the details.
    passes = isinstance(error, OperationalError) if code is None else code & 0xFF in _SQLITE_PASSING
    if not (passes or error.connection_invalidated):
        return error
    silent = Silent("the database does not answer; send this again later (the server's log has the reason)")
    silent.__cause__ = error
    return silent


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Errors of the database in this block are `explained`."""
    try:
        yield
    except DBAPIError as error:
        silent = explained(error)
        if silent is error:
            raise
        raise silent from error


def connect(url: URL | str, connections: int) -> Engine:
    """An engine for `connections` concurrent users, with SQLite made durable and concurrent."""
    # A database that was restarted has dropped its connections: they are tried before they are used.
    is_file = make_url(url).get_backend_name() == "sqlite"
    engine = create_engine(url, pool_size=connections, max_overflow=0, pool_pre_ping=not is_file)
    if is_file:
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def connect_writer(url: URL | str, sync_to_disk: bool = True) -> Engine:
    """An engine of one connection, which only one process at a time can have. To open it raises `DatabaseInUse`.

    The lock is the connection's: who has lost it, by a restart of PostgreSQL, must have it again before it writes.
    SQLite's file needs none beside that of its data directory.
    """
    engine = connect(url, 1)
    if engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _lock_postgresql)
    if not sync_to_disk:
        event.listen(engine, "connect", _without_sync(engine.dialect.name))
    return engine


def _without_sync(dialect: str) -> Callable[[Any, Any], None]:
    statement = {"sqlite": "PRAGMA synchronous=OFF", "postgresql": "SET synchronous_commit = off"}[dialect]

    def set_it(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    return set_it


def _lock_postgresql(connection: Any, _record: Any) -> None:
    deadline = time.monotonic() + WRITER_LOCK_SECONDS
    while True:
        cursor = connection.cursor()
        cursor.execute(f"SELECT pg_try_advisory_lock({WRITER_LOCK})")
        (is_ours,) = cursor.fetchone()
        cursor.close()
        connection.commit()  # the lock is the session's and stays
        if is_ours:
            return
        if time.monotonic() > deadline:
            connection.close()
            raise DatabaseInUse(
                "the database is in use by another server: stop that one, or give this one a database of its own "
                "(database_url)"
            )
        time.sleep(0.1)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # sqlite3 would open transactions by itself, but only before DML: migrations would not be atomic.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # In WAL mode FULL syncs the log at every commit, so that a committed transaction survives a power cut.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT * 1000}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


CHECKED_BYTES = 2**30
"""A larger SQLite file is not looked through at a start: each GB takes 0.7 s, and from a cold disk what that takes."""


def check(engine: Engine) -> None:
    """Look for pages of an SQLite file that the disk has damaged: whoever comes upon one later could only fail.
    Other databases look after themselves. Raises `UnusableDatabase`."""
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        pages, size = (connection.scalar(text(f"PRAGMA {what}")) for what in ("page_count", "page_size"))
        found = connection.scalar(text("PRAGMA quick_check(1)")) if pages * size <= CHECKED_BYTES else "ok"
    if found != "ok":
        raise UnusableDatabase(
            f"the database {engine.url.render_as_string()} is damaged ({' '.join(found.split())}): restore the data "
            "directory from a backup"
        )


def migrate(engine: Engine) -> None:
    """Bring the database to `HEAD`, in one transaction. Raises `WrongVersion`."""
    with engine.begin() as connection:
        if inspect(connection).has_table("alembic_version"):
            revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
            if revision == HEAD:
                return
            if revision is not None and revision > HEAD:
                raise WrongVersion(
                    f"the ledger is at version {revision}, this tinkercloud knows up to {HEAD}: "
                    "install the newer tinkercloud, or use another data directory"
                )
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)
