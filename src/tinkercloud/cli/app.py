"""The commands and their order in `tinkercloud --help`."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from tinkercloud.cli import admin, backup, demo, doctor, fsck, keys, serve, version
from tinkercloud.cli.console import CommandError, err
from tinkercloud.setting_errors import ConfigError

app = typer.Typer(
    help="A server that speaks the Tinker API, on hardware you own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(version.common)
app.command()(serve.serve)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(fsck.fsck)
app.command()(backup.backup)
app.command()(backup.restore)
app.add_typer(keys.keys, name="keys")
app.add_typer(admin.models, name="models")
app.add_typer(admin.checkpoints, name="checkpoints")
app.add_typer(admin.sessions, name="sessions")
app.command()(version.version)


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit status 2."""
    try:
        app()
    except (ConfigError, CommandError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
