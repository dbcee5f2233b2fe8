"""A ledger that the first version left with operations in flight is brought up by the start, and they are answered.

`ledger_0001.sql` is what the server that had the first tables left in its database when it was killed: a run of
`Client` after two steps, with another step, half of the next one and a sample accepted and not run.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Connection, MetaData, insert, select

from tests.control.conftest import NANO, OWNER, Client
from tinkercloud.codec import decode
from tinkercloud.engine.operations import TrainOperation
from tinkercloud.engine.results import LossOutput, SampleOutput, StepOutput
from tinkercloud.ledger import Ledger, database
from tinkercloud.ledger.records import ModelRecord

FIRST = Path(__file__).with_name("ledger_0001.sql")


def left_by_the_first_version(data: Path, url: str | None) -> tuple[str, float]:
    """(the run, when it was used last) of the ledger that is now in `data`, or in the database at `url`."""
    data.mkdir()
    file = data / "ledger.db"
    with contextlib.closing(sqlite3.connect(file)) as old:
        old.executescript(FIRST.read_text())
        model_id, used = old.execute("SELECT model_id, last_request_at FROM models").fetchone()
    if url is not None:
        _move(file, url)
    (data / "ledger.lock").touch()
    os.utime(data / "ledger.lock", (used, used))  # the server was killed then
    return model_id, used


def migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    return config


def _move(file: Path, url: str) -> None:
    """The same rows in another database, whose tables the first migration made."""
    config = migrations()
    source, target = database.connect(f"sqlite:///{file}", 1), database.connect(url, 1)
    with source.connect() as old, target.begin() as new:
        config.attributes["connection"] = new
        command.upgrade(config, "0001")
        tables = MetaData()
        tables.reflect(new)
        for table in tables.sorted_tables:
            if table.name != "alembic_version" and (rows := old.execute(select(table)).mappings().all()):
                new.execute(insert(table), [dict(row) for row in rows])
    source.dispose()
    target.dispose()
    file.unlink()


@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_operations_in_flight_are_answered_after_an_upgrade(on, request, serving, run, tmp_path, undisturbed):
    url = request.getfixturevalue("postgresql").database() if on == "postgresql" else None
    model_id, _ = left_by_the_first_version(tmp_path / "data", url)

    async def story():
        async with serving(database_url=url) as service:
            model = await service._ledger.get(ModelRecord, model_id)
            client = Client(service, await service.sessions.get(model.session_id, OWNER), model)
            in_flight = [await service._ledger.entry(f"{model_id}:{seq_id}") for seq_id in (5, 6, 7)]
            losses = [await client.result(entry) for entry in in_flight]
            assert [type(loss) for loss in losses] == [LossOutput, StepOutput, LossOutput]
            found = [losses[0].metrics["loss:sum"], losses[2].metrics["loss:sum"]]
            client.seq_id = 7
            await client.optim_step()
            found += await client.steps(1)
            assert found == pytest.approx(undisturbed[2:5], rel=1e-4), "another build computed the first steps"
            sample = await service._ledger.entry(f"{model.session_id}:sample:5:0")
            outcome = await client.result(sample)
            assert isinstance(outcome, SampleOutput) and len(outcome.sequences[0].tokens) == 4
            assert service.models.get(NANO).conductor.failure is None

    run(story)


VALUES = {str: "it", int: 7, float: 1.5, bool: True, dict: {"it": [1]}, bytes: b"it"}


def rows_of(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """By table; one whole row is added to each that has none."""
    tables, rows = MetaData(), {}
    tables.reflect(connection)
    for table in tables.sorted_tables:
        if table.name == "alembic_version":
            continue
        if connection.execute(select(table).limit(1)).first() is None:
            kinds = {c.name: dict if isinstance(c.type, JSON) else c.type.python_type for c in table.columns}
            connection.execute(insert(table), {name: VALUES[kind] for name, kind in kinds.items()})
        rows[table.name] = [dict(row) for row in connection.execute(select(table)).mappings()]
    return rows


@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_no_migration_loses_a_row_or_what_is_in_flight(on, request, run, tmp_path):
    """Each one, on a ledger in which all tables of the version before it have rows, and every column has a value."""
    data = tmp_path / "data"
    url = request.getfixturevalue("postgresql").database() if on == "postgresql" else None
    model_id, _ = left_by_the_first_version(data, url)
    config = migrations()
    engine = database.connect(url or f"sqlite:///{data / 'ledger.db'}", 1)
    versions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    for version in versions[1:]:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            before = rows_of(connection)
            command.upgrade(config, version)
            after = rows_of(connection)
        for table, rows in before.items():
            kept = [{name: row[name] for name in rows[0]} for row in after[table]]
            assert kept == rows, (version, table)
    engine.dispose()
    assert version == database.HEAD

    async def story():
        ledger = await Ledger.open(data, url)
        waiting = await ledger.pending(model_id)
        assert [entry.seq_id for entry in waiting] == [5, 6, 7]
        for entry in waiting:
            assert decode(await ledger.payload(entry.request_id), TrainOperation).model_id == model_id
        assert f"{model_id.split(':')[0]}:sample:5" in await ledger.pending_streams()
        await ledger.close()

    run(story)
