"""The long versions of tests/e2e/test_kills.py and test_faults.py: `make chaos`, or `python -m tests.chaos --help`."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import CALLS, Bench, Fault
from tests.chaos.kills import ANSWER_SECONDS, Kill, Outcome, differences, disturbed, undisturbed
from tests.postgresql import PostgreSQL
from tests.s3 import S3
from tests.serving import Server

SNAPSHOT_OPERATIONS = 7

MOST_CALLS = 60
"""Of a kind, that are tried at most."""

out = Console()
app = typer.Typer(pretty_exceptions_enable=False)


@app.command("kills")
def kills_command(
    kills: Annotated[int, typer.Option(min=1, help="How many kills.")] = 100,
    rounds: Annotated[int, typer.Option(min=0, help="Steps of each tenant; 0: twice as many as kills.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the script and of the kills.")] = 0,
    minutes: Annotated[float, typer.Option(help="Kill nothing after so many minutes.")] = 60.0,
    postgresql: Annotated[bool, typer.Option("--postgresql", help="Keep the ledger in PostgreSQL.")] = False,
    s3: Annotated[bool, typer.Option("--s3", help="Keep checkpoints in S3 (moto's).")] = False,
) -> None:
    """Kill the engine, the server or both at random moments of a training script and compare it with one to which
    nothing happens. Exit status 1 if the two differ in a bit or an answer took too long."""
    os.environ["TINKER_TELEMETRY"] = "0"
    rounds = rounds or 2 * kills  # fewer are over before the last kill: answers go on while one is struck
    folder = Path(tempfile.mkdtemp(prefix="tinkercloud-chaos-"))
    out.print(f"data, logs and the client's errors: {folder}")
    with Server(folder / "undisturbed") as server:
        expected = undisturbed(server, seed, rounds, folder / "undisturbed.err")
    out.print(f"undisturbed: {expected.num_answers} answers to {len(expected.answers)} tenants")
    options = ["--set", f"snapshot_operations={SNAPSHOT_OPERATIONS}"]
    if s3:
        store = S3()
        os.environ |= store.environ
        options += ["--set", f"checkpoints_url={store.bucket()}"]
    if postgresql:
        with PostgreSQL() as database:
            url = database.database()
            found, happened = _disturbed(folder, options, seed, rounds, kills, expected, minutes, url)
    else:
        found, happened = _disturbed(folder, options, seed, rounds, kills, expected, minutes)
    out.print(_table(happened))
    late = [kill for kill in happened if kill.seconds > ANSWER_SECONDS]
    for text in [*found[:20], *(f"{kill.what}: {kill.seconds:.1f} s" for kill in late)]:
        out.print(f"[red]✗[/] {text}", soft_wrap=True)
    if len(happened) < kills:
        out.print(f"[red]✗[/] only {len(happened)} kills: give it more --rounds, or more --minutes")
    if found or late or len(happened) < kills:
        raise typer.Exit(1)
    out.print(f"[green]✓[/] {len(happened)} kills, and every answer and all final weights are the same bits")


@app.command("faults")
def faults_command(
    only: Annotated[str | None, typer.Option(help="Only faults in these processes: engine or server.")] = None,
) -> None:
    """Kill a server or an engine before, or let fail, each of the system calls with which it writes, one after the
    other. Exit status 1 if one shows in a client's answers or in the state that is left."""
    os.environ["TINKER_TELEMETRY"] = "0"
    folder = Path(tempfile.mkdtemp(prefix="tinkercloud-faults-"))
    out.print(f"data and logs: {folder}")
    tried, wrong = 0, []
    with Server(folder / "data") as server:
        bench = Bench(server)
        for fault in (f for target, calls in CALLS.items() if only in (None, target) for f in faults_of(target, calls)):
            try:
                if not bench.hit(fault):
                    passed.add(fault[:2] + fault[3:])
                    continue
                tried += 1
                out.print(f"{tried:4}  {fault}", highlight=False)
                bench.verify()
            except Exception as error:
                wrong.append(fault)
                out.print(f"[red]✗[/] {fault}: {type(error).__name__}: {str(error)[-1500:]}", soft_wrap=True)
    if wrong:
        out.print(f"[red]✗[/] {len(wrong)} of {tried} faults showed")
        raise typer.Exit(1)
    out.print(f"[green]✓[/] {tried} faults, and none showed")


passed: set[tuple[object, ...]] = set()
"""(target, call, whether it kills) of which the script makes no more calls."""


def faults_of(target: str, calls: tuple[str, ...]) -> Iterator[Fault]:
    """Every call of a kind until one has none of that number."""
    for call in calls:
        for kills in (True, False):
            for number in range(1, MOST_CALLS + 1):
                if (target, call, kills) in passed:
                    break
                yield Fault(target, call, number, kills)


def _disturbed(
    folder: Path,
    options: list[str],
    seed: int,
    rounds: int,
    kills: int,
    expected: Outcome,
    minutes: float,
    database_url: str | None = None,
) -> tuple[list[str], list[Kill]]:
    if database_url is not None:
        options = [*options, "--set", f"database_url={database_url}"]
    began = time.monotonic()
    count = 0

    def on_kill(kill: Kill) -> None:
        nonlocal count
        count += 1
        out.print(f"{time.monotonic() - began:6.0f} s  {count:4}  {kill.what}: {kill.seconds:.1f} s", highlight=False)

    with Server(folder / "disturbed", *options) as server:
        outcome, happened = disturbed(
            server, seed, rounds, kills, expected.num_answers, folder / "disturbed.err", on_kill, minutes, database_url
        )
    return differences(expected, outcome), happened


def _table(happened: list[Kill]) -> Table:
    table = Table("killed", "times", "median s", "longest s", title="From the last kill to the first answer")
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for kill in happened:
        kind = "again while it starts" if "," in kill.what else kill.what
        by_kind[kind].append(kill.seconds)
    for kind, seconds in sorted(by_kind.items()):
        table.add_row(kind, str(len(seconds)), f"{median(seconds):.1f}", f"{max(seconds):.1f}")
    return table


if __name__ == "__main__":
    app()
