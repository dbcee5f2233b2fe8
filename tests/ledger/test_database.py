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

from tinkercloud.engine.types import LoraConfig
from tinkercloud.ledger import Ledger, database, schema
from tinkercloud.ledger.lock import DataDirInUse, DataDirLock
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord

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


@pytest.mark.anyio
async def test_a_ledger_of_the_first_version_is_brought_up(tmp_path: Path) -> None:
    """Its runs and checkpoints have the only optimizer that there was."""
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", connections=1)
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    lora = '{"rank": 8}'
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO models (model_id, session_id, model_seq_id, owner, base_model, lora, created_at, "
                "last_request_at, state, applied_seq, user_metadata) "
                "VALUES ('m', 's', 0, 'alice', 'base', :lora, 1, 1, 'live', 3, '{}')"
            ),
            {"lora": lora},
        )
        connection.execute(
            text(
                "INSERT INTO checkpoints (path, model_id, kind, name, owner, base_model, lora, folder, size_bytes, "
                "created_at, public) VALUES ('p', 'm', 'training', 'n', 'alice', 'base', :lora, 'f', 5, 1, 0)"
            ),
            {"lora": lora},
        )
    engine.dispose()
    ledger = await Ledger.open(tmp_path)
    try:
        model, checkpoint = await ledger.get(ModelRecord, "m"), await ledger.get(CheckpointRecord, "p")
        assert (model.optimizer, model.lora, model.applied_seq) == ("adamw", LoraConfig(rank=8), 3)
        assert (checkpoint.optimizer, checkpoint.size_bytes) == ("adamw", 5)
    finally:
        await ledger.close()
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        assert "optimizer" not in {column["name"] for column in inspect(connection).get_columns("models")}
        assert connection.scalar(text("SELECT applied_seq FROM models")) == 3


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
