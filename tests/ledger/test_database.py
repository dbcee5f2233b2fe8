from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from tinkercloud.ledger import Ledger, database, schema
from tinkercloud.ledger.lock import DataDirInUse, DataDirLock

MIGRATIONS = str(Path(database.__file__).parent / "migrations")


def test_migrations_lead_to_the_tables_of_the_schema(tmp_path: Path) -> None:
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", connections=1)
    database.migrate(engine)
    database.migrate(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2
    assert ScriptDirectory(MIGRATIONS).get_heads() == [database.HEAD]


def test_a_migration_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", connections=1)
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        connection.begin()
        command.upgrade(config, "head")
        assert inspect(connection).has_table("entries")
        connection.rollback()
        assert inspect(connection).get_table_names() == []
        command.upgrade(config, "head")
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]


def test_a_newer_ledger_is_refused(tmp_path: Path) -> None:
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", connections=1)
    database.migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(database.WrongVersion, match="9999"):
        database.migrate(engine)


def test_opening_a_current_ledger_does_not_load_alembic(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from tinkercloud.ledger import Ledger\n"
        "async def main():\n"
        f"    await (await Ledger.open(Path({str(tmp_path)!r}))).close()\n"
        "asyncio.run(main()); print('alembic' in sys.modules)"
    )
    for expected in ("True", "False"):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == expected


@pytest.mark.anyio
async def test_a_data_directory_has_one_server(tmp_path: Path) -> None:
    first = await Ledger.open(tmp_path)
    with pytest.raises(DataDirInUse, match=r"in use by another server \(process \d+\)"):
        await Ledger.open(tmp_path)
    await first.close()
    lock = DataDirLock(tmp_path)
    lock.release()
