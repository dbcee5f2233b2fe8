"""`tinkercloud backup` and `tinkercloud restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tinkercloud.cli import options
from tinkercloud.cli.console import CommandError, out
from tinkercloud.config import Settings

DatabaseUrl = Annotated[
    str | None, typer.Option(help=Settings.model_fields["database_url"].description, show_default=False)
]


def backup(
    target: Annotated[Path, typer.Argument(help="The folder to make, which must not be there.", metavar="BACKUP")],
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    config: options.Config = None,
) -> None:
    """Copy a server's data directory, also while it runs: all that was acknowledged when it began to copy
    the database.

    Where it is on the same file system, weights take no space as long as the original has them. `tinkercloud fsck
    BACKUP` verifies it, `tinkercloud restore BACKUP` brings it back.
    """
    from tinkercloud.control.backup import BackupError, back_up
    from tinkercloud.ledger.database import UnusableDatabase, WrongVersion
    from tinkercloud.ledger.verify import NoLedger

    settings = Settings.load(data_dir=data_dir, database_url=database_url, config=config)
    try:
        back_up(settings.data_dir, settings.database_url, target)
    except (BackupError, UnusableDatabase, WrongVersion, NoLedger) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or target}: {error.strerror}; nothing is left of the backup") from None
    out.print(f"{escape(str(target))} is a copy of {escape(str(settings.data_dir))}", soft_wrap=True)


def restore(
    source: Annotated[Path, typer.Argument(help="What `tinkercloud backup` has made.", metavar="BACKUP")],
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    config: options.Config = None,
) -> None:
    """Make a data directory of a backup, which stays. Training runs go on from where they were when it was made."""
    from tinkercloud.control.backup import BackupError
    from tinkercloud.control.backup import restore as bring_back
    from tinkercloud.ledger.backup import NotEmpty
    from tinkercloud.ledger.database import UnusableDatabase, WrongVersion

    settings = Settings.load(data_dir=data_dir, database_url=database_url, config=config)
    try:
        bring_back(source, settings.data_dir, settings.database_url)
    except (BackupError, NotEmpty, UnusableDatabase, WrongVersion) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or settings.data_dir}: {error.strerror}; nothing was restored") from None
    out.print(f"{escape(str(settings.data_dir))} is as it was in {escape(str(source))}", soft_wrap=True)
