"""A ledger that the first version left with operations in flight is brought up by the start, and they are answered.

`ledger_0001.sql` is what the server that had the first tables left in its database when it was killed: a run of
`Client` after two steps, with another step, half of the next one and a sample accepted and not run.
"""

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, insert, select

from tests.control.conftest import NANO, OWNER, Client
from tinkercloud.engine.results import LossOutput, SampleOutput, StepOutput
from tinkercloud.ledger import database
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


def _move(file: Path, url: str) -> None:
    """The same rows in another database, whose tables the first migration made."""
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
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
