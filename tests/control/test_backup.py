"""`tinkercloud backup` beside a running server: what it made is whole, and trains on."""

import asyncio

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.control.conftest import OWNER, Client
from tinkercloud.cli.app import app
from tinkercloud.cli.console import CommandError
from tinkercloud.config import Settings
from tinkercloud.control.backup import BackupError, back_up, restore
from tinkercloud.control.service import Service
from tinkercloud.control.verify import problems
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.backup import NotEmpty
from tinkercloud.ledger.database import UnusableDatabase
from tinkercloud.ledger.writer import SMALL_BYTES


def test_a_backup_of_a_running_server_trains_on(serving, run, tmp_path, postgresql, undisturbed):
    """On each kind of database, from PostgreSQL to SQLite and back, while others train, save and load."""
    url = postgresql.database()

    async def busy(client: Client) -> None:
        for number in range(1000):
            await client.steps(1)
            await client.load(await client.save(f"busy-{number % 3}", overwrite=True))

    async def story():
        async with serving(database_url=url, snapshot_operations=4) as service:
            client, other = await Client.create(service), await Client.create(service)
            losses = await client.steps(3)
            saved = await client.save("kept")
            work = asyncio.create_task(busy(other))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(back_up, tmp_path / "data", url, tmp_path / "backup")
            await client.steps(1)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        for database_url in (None, postgresql.database()):
            data = tmp_path / f"restored {database_url is None}"
            restore(tmp_path / "backup", data, database_url)
            assert [problem for problem in problems(data, database_url) if problem.lost] == []
        with pytest.raises(NotEmpty):
            restore(tmp_path / "backup", tmp_path / "another", database_url)
        assert not (tmp_path / "another").exists()
        service = await Service.start(Settings.load(data_dir=data, database_url=database_url), lambda *report: None)
        try:
            session = await service.sessions.get(client.session.session_id, OWNER)
            restored = Client(service, session, await service.runs.live(client.model.model_id, OWNER))
            restored.seq_id = 7
            assert losses + await restored.steps(2) == undisturbed[:5]
            checkpoint = await service.checkpoints.get(saved.path, OWNER)
            assert await (await restored.created_from(checkpoint)).steps(2) == undisturbed[3:5]
        finally:
            await service.stop()

    run(story)


def test_a_backup_of_a_running_servers_sqlite_has_all_that_was_acknowledged(run, tmp_path):
    async def story():
        ledger = await Ledger.open(tmp_path / "data")
        kept = {seq_id: bytes([seq_id]) * (1 + seq_id * SMALL_BYTES // 2) for seq_id in range(6)}
        for seq_id, payload in kept.items():
            await ledger.append("stream", seq_id, "sample", payload)
        await asyncio.to_thread(back_up, tmp_path / "data", None, tmp_path / "backup")
        await ledger.append("stream", 6, "sample", bytes(SMALL_BYTES + 1))
        await ledger.close()
        restore(tmp_path / "backup", tmp_path / "restored", None)
        for place in ("backup", "restored"):  # a backup is a data directory itself
            ledger = await Ledger.open(tmp_path / place)
            assert await ledger.highest_seq("stream") == 5 and ledger.downtime < 60
            assert {seq_id: await ledger.payload(f"stream:{seq_id}") for seq_id in kept} == kept
            await ledger.append("stream", 6, "sample", bytes(SMALL_BYTES + 1))
            await ledger.close()

    run(story)


def test_what_cannot_be_backed_up_or_restored_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackupError, match="no data directory"):
        back_up(tmp_path / "empty", None, tmp_path / "backup")
    (tmp_path / "data" / "segments").mkdir(parents=True)
    with pytest.raises(BackupError, match="is there already"):
        back_up(tmp_path / "data", None, tmp_path / "empty")
    with pytest.raises(UnusableDatabase, match=r"ledger\.db"):
        back_up(tmp_path / "data", None, tmp_path / "backup")
    with pytest.raises(BackupError, match="is no backup"):
        restore(tmp_path / "empty", tmp_path / "new", None)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "ledger.db").touch()
    with pytest.raises(BackupError, match="is not empty"):
        restore(tmp_path / "made", tmp_path / "data", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty", "made"]


def test_the_commands(run, tmp_path):
    async def ledger_with_one():
        ledger = await Ledger.open(tmp_path / "data")
        await ledger.append("stream", 0, "sample", b"kept")
        await ledger.close()

    def command(*words: str) -> Result:
        return CliRunner().invoke(app, [*words])

    run(ledger_with_one)
    backup, restored = str(tmp_path / "backup"), str(tmp_path / "restored")
    made = command("backup", backup, "--data-dir", str(tmp_path / "data"))
    assert made.exit_code == 0 and f"{backup} is a copy of {tmp_path / 'data'}" in made.output, made.output
    again = command("backup", backup, "--data-dir", str(tmp_path / "data"))
    assert (
        again.exit_code != 0 and isinstance(again.exception, CommandError) and "there already" in str(again.exception)
    )
    nothing = command("backup", str(tmp_path / "other"), "--data-dir", str(tmp_path / "nothing"))
    assert "no data directory" in str(nothing.exception) and not (tmp_path / "other").exists()

    brought = command("restore", backup, "--data-dir", restored)
    assert brought.exit_code == 0 and f"{restored} is as it was in {backup}" in brought.output, brought.output
    assert problems(tmp_path / "restored") == []
    for source, target, why in ((backup, restored, "is not empty"), (restored + "x", backup + "x", "is no backup")):
        refused = command("restore", source, "--data-dir", target)
        assert isinstance(refused.exception, CommandError) and why in str(refused.exception)

    async def kept():
        ledger = await Ledger.open(tmp_path / "restored")
        assert await ledger.payload("stream:0") == b"kept"
        await ledger.close()

    run(kept)
