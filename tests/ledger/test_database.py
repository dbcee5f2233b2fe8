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
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import OperationalError

from tests.postgresql import PostgreSQL
from tests.serving import free_port
from tinkercloud.engine.operations import LoraConfig
from tinkercloud.errors import Unavailable
from tinkercloud.ledger import Ledger, catalog, database, schema
from tinkercloud.ledger.lock import DataDirInUse, DataDirLock
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SessionRecord

MIGRATIONS = str(Path(database.__file__).parent / "migrations")


@pytest.fixture
def url(tmp_path: Path, database_url: str | None) -> str:
    """Of the database that `Ledger.open(tmp_path, database_url)` opens."""
    return database_url or f"sqlite:///{tmp_path / 'ledger.db'}"


def test_migrations_lead_to_the_tables_of_the_schema(url: str) -> None:
    engine = database.connect(url, connections=1)
    database.migrate(engine)
    database.migrate(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        if url.startswith("sqlite"):
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert connection.scalar(text("PRAGMA synchronous")) == 2
    engine.dispose()
    assert ScriptDirectory(MIGRATIONS).get_heads() == [database.HEAD]


def test_housekeeping_does_not_look_at_the_sessions_that_have_finished(tmp_path: Path) -> None:
    """Every few seconds; there may be years of them."""
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", connections=1)
    database.migrate(engine)
    plans: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def explain(_, cursor, statement, parameters, *__):
        plans.extend(row[3] for row in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())

    with engine.connect() as connection:
        catalog.find(connection, SessionRecord, {"state": "active"}, None, 0)
    engine.dispose()
    assert any("USING INDEX ix_sessions_state_created_at" in plan for plan in plans), plans


def test_a_migration_happens_whole_or_not_at_all(url: str) -> None:
    engine = database.connect(url, connections=1)
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
    engine.dispose()


@pytest.mark.anyio
async def test_a_ledger_of_the_first_version_is_brought_up(tmp_path: Path, url: str, database_url: str | None) -> None:
    """Its runs and checkpoints have the only optimizer that there was."""
    engine = database.connect(url, connections=1)
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
                "created_at, public) VALUES ('p', 'm', 'training', 'n', 'alice', 'base', :lora, 'f', 5, 1, :public)"
            ),
            {"lora": lora, "public": False},
        )
    engine.dispose()
    ledger = await Ledger.open(tmp_path, database_url)
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
    engine.dispose()


def test_a_newer_ledger_is_refused(url: str) -> None:
    engine = database.connect(url, connections=1)
    database.migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(database.WrongVersion, match="9999"):
        database.migrate(engine)
    engine.dispose()


@pytest.mark.anyio
@pytest.mark.parametrize("table", ["sessions", "past_checkpoints"])
async def test_a_page_that_the_disk_has_damaged_is_found_at_the_start(tmp_path: Path, table: str) -> None:
    """Also one that no start reads."""
    await (await Ledger.open(tmp_path)).close()
    file = tmp_path / "ledger.db"
    engine = database.connect(f"sqlite:///{file}", connections=1)
    with engine.begin() as connection:
        where = "SELECT rootpage FROM sqlite_master WHERE name = :table"
        page = connection.scalar(text(where), {"table": table})
        size = connection.scalar(text("PRAGMA page_size"))
    engine.dispose()
    with file.open("r+b") as opened:
        opened.seek((page - 1) * size)
        opened.write(b"\xff" * size)
    with pytest.raises(database.UnusableDatabase, match=r"ledger\.db .*restore|ledger\.db .*replaced by a backup"):
        await Ledger.open(tmp_path)
    DataDirLock(tmp_path).release()


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
    with pytest.raises(DataDirInUse, match=r"in use by a server \(process \d+\)"):
        await Ledger.open(tmp_path)
    await first.close()
    lock = DataDirLock(tmp_path)
    lock.release()


@pytest.mark.anyio
async def test_a_database_has_one_server(tmp_path: Path, postgresql: PostgreSQL, monkeypatch) -> None:
    """Whatever its data directory: the lock is in the database."""
    monkeypatch.setattr(database, "WRITER_LOCK_SECONDS", 0.2)
    url = postgresql.database()
    first = await Ledger.open(tmp_path / "first", url)
    with pytest.raises(database.DatabaseInUse, match="in use by another server"):
        await Ledger.open(tmp_path / "second", url)
    await first.append("stream", 0, "sample", b"payload")
    await first.close()
    second = await Ledger.open(tmp_path / "second", url)
    assert await second.highest_seq("stream") == 0
    await second.close()


@pytest.mark.anyio
async def test_a_restart_of_the_database_is_outlived(tmp_path: Path, postgresql: PostgreSQL, monkeypatch) -> None:
    """And whoever has taken the lock meanwhile keeps it."""
    monkeypatch.setattr(database, "WRITER_LOCK_SECONDS", 0.2)
    url = postgresql.database()
    ledger = await Ledger.open(tmp_path / "first", url)
    await ledger.append("stream", 0, "sample", b"payload")
    postgresql.restart()
    await ledger.append("stream", 1, "sample", b"payload")
    assert [entry.seq_id for entry in await ledger.pending("stream")] == [0, 1]
    postgresql.restart()
    other = await Ledger.open(tmp_path / "second", url)
    with pytest.raises(database.DatabaseInUse):
        await ledger.append("stream", 2, "sample", b"payload")
    await other.close()
    await ledger.append("stream", 2, "sample", b"payload")
    await ledger.close()


@pytest.mark.parametrize("sync_to_disk", [True, False])
def test_commits_wait_for_the_disk_unless_told_otherwise(url: str, sync_to_disk: bool) -> None:
    engine = database.connect_writer(url, sync_to_disk)
    asked, waits, not_at_all = (
        ("PRAGMA synchronous", 2, 0) if url.startswith("sqlite") else ("SHOW synchronous_commit", "on", "off")
    )
    with engine.connect() as connection:
        assert connection.scalar(text(asked)) == (waits if sync_to_disk else not_at_all)
    engine.dispose()


def test_a_database_that_does_not_answer_is_waited_for_and_a_wrong_statement_is_not(tmp_path: Path) -> None:
    away = database.connect(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none", 1)
    with pytest.raises(Unavailable, match="does not answer"), database.answering(), away.connect():
        pass
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}", 2)
    with pytest.raises(OperationalError, match="no such table"), database.answering(), engine.connect() as connection:
        connection.execute(text("SELECT 1 FROM missing"))
    with engine.connect() as writing, engine.connect() as waiting:
        writing.execute(text("CREATE TABLE something (x)"))
        waiting.execute(text("PRAGMA busy_timeout=0"))
        with pytest.raises(Unavailable, match="does not answer"), database.answering():
            waiting.execute(text("CREATE TABLE another (x)"))
    engine.dispose()
