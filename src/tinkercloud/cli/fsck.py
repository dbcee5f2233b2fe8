"""`tinkercloud fsck`: whether a data directory is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tinkercloud.cli.console import CommandError, out
from tinkercloud.config import Settings


def fsck(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A data directory, whose server must be stopped; without it, the one that `serve` would use.",
            metavar="[DIR]",
            show_default=False,
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(help=Settings.model_fields["database_url"].description, show_default=False),
    ] = None,
    checkpoints_url: Annotated[
        str | None,
        typer.Option(help=Settings.model_fields["checkpoints_url"].description, show_default=False),
    ] = None,
) -> None:
    """Verify a data directory: the log and its results, snapshots, checkpoints and samplers, by their checksums, those
    in a store too.

    Changes nothing. Exit status 1 if something is lost that the server does not bring back by itself.
    """
    from tinkercloud.control.checkpoint_store import CheckpointStore, UnusableStore
    from tinkercloud.control.verify import problems
    from tinkercloud.ledger.lock import SERVER, DataDirInUse
    from tinkercloud.ledger.verify import NoLedger

    if folder is None:
        settings = Settings.load()
        folder, database_url = settings.data_dir, database_url or settings.database_url
        checkpoints_url = checkpoints_url or settings.checkpoints_url
        out.print(escape(str(folder)), soft_wrap=True)
    try:
        store = CheckpointStore(checkpoints_url) if checkpoints_url else None
        found = problems(folder, database_url, store)
    except UnusableStore as error:
        raise CommandError(str(error)) from None
    except DataDirInUse as error:
        mend = "stop that one" if error.holder.command == SERVER else "wait until that has ended"
        raise CommandError(f"{error.data_dir} is in use by {error.holder}: {mend}") from None
    except NoLedger as error:
        raise CommandError(str(error)) from None
    for problem in found:
        mark = "[bold red]✗[/]" if problem.lost else "[yellow]![/]"
        out.print(f"{mark} {escape(problem.what)}", soft_wrap=True)
        out.print(f"  [yellow]→[/] {escape(problem.mend)}", soft_wrap=True)
    lost = sum(problem.lost for problem in found)
    unseen = sum(problem.unseen for problem in found)
    if lost:
        verdict = f"\nTo mend: {lost} of {len(found)}"
    elif unseen:
        verdict = "Of what was looked at, nothing is lost"
    else:
        verdict = "Nothing is lost" if found else "All is as it was written"
    if unseen:
        those = f"{unseen} checkpoints in a store were" if unseen > 1 else "1 checkpoint in a store was"
        verdict += f"; {those} not looked at: give --checkpoints-url, as the server has it"
    out.print(f"{verdict}.", soft_wrap=True)
    raise typer.Exit(1 if lost else 0)
