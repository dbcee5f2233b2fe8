"""API keys in the database: stored as hashes, never deleted, and changed from outside while a server runs."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
from sqlalchemy import URL, Connection, Engine, insert, inspect, select, text, update

from tinkercloud.ledger import database
from tinkercloud.ledger.files import make_private
from tinkercloud.ledger.lock import DataDirInUse, DataDirLock
from tinkercloud.ledger.records import KeyRecord
from tinkercloud.ledger.schema import api_keys
from tinkercloud.ledger.writer import Transaction

PREFIX = "tml-"
"""How every key begins; the SDK takes no other."""

HINT_CHARACTERS = 8
"""How much of a key is kept in clear, so that people can tell keys apart."""


def new_secret() -> str:
    """A key that nobody has: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """What is stored of a key. With so many random bits a plain hash cannot be searched, and needs no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()


def hint(secret: str) -> str:
    """The beginning of a key."""
    return secret[: len(PREFIX) + HINT_CHARACTERS]


def add(connection: Connection, record: KeyRecord) -> KeyRecord:
    """Store a key under the next free id, whatever its own says."""
    row = msgspec.structs.asdict(record)
    del row["key_id"]
    (key_id,) = connection.execute(insert(api_keys), row).inserted_primary_key
    return msgspec.structs.replace(record, key_id=key_id)


def find_all(connection: Connection) -> list[KeyRecord]:
    """Every key that there ever was, oldest first."""
    rows = connection.execute(select(api_keys).order_by(api_keys.c.key_id))
    return [KeyRecord(**row._mapping) for row in rows]


def revoke(connection: Connection, key_id: int, now: float) -> bool:
    """Revoke a key for good; whether it was still valid."""
    where = (api_keys.c.key_id == key_id) & api_keys.c.revoked_at.is_(None)
    return connection.execute(update(api_keys).where(where).values(revoked_at=now)).rowcount > 0


def revoke_all(transaction: Transaction, revocations: list[tuple[int, float]]) -> list[bool]:
    """`revoke` as the ledger's writer calls it."""
    return [revoke(transaction.connection, key_id, now) for key_id, now in revocations]


@contextlib.contextmanager
def changing(data_dir: Path, url: str | None) -> Iterator[Connection]:
    """The database of a data directory, in one transaction, beside a server that may be running on it.

    Raises `UnusableDatabase`, `WrongVersion`, and `DataDirInUse` or `DatabaseInUse` if the database is of an older
    version and a server has it open.
    """
    make_private(data_dir)
    address = database.address_in(data_dir, url)
    with database.opening(address):
        engine = database.connect(address, 1)
        try:
            _bring_up(engine, address, data_dir)
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()


def _bring_up(engine: Engine, address: URL, data_dir: Path) -> None:
    with engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
            if revision == database.HEAD:
                return
    lock = DataDirLock(data_dir, "keys")  # an older server may be using it
    writing = database.connect_writer(address)  # another data directory's may be using the database
    try:
        database.migrate(writing)
    finally:
        writing.dispose()
        lock.release()


__all__ = ["DataDirInUse", "add", "changing", "digest", "find_all", "hint", "new_secret", "revoke", "revoke_all"]
