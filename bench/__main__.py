"""The command line of the bench."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from bench import profile as profiling
from bench import report
from bench.competitor import thread_counts
from bench.measurement import Measurement
from bench.measurements import ALL
from bench.memory import tree
from bench.readings import Readings
from bench.stage import Stage

RESULTS = Path(__file__).parent / "results.json"
WIDTH = 140
"""Columns where the output is not a terminal."""
PROFILES = Path(__file__).parent / "profiles"

out = Console()
if not out.is_terminal:
    out = Console(width=WIDTH)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Measure only this; repeatable.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of readings for each measurement.")] = 7,
    json: Annotated[Path, typer.Option(help="Where all readings are written.")] = RESULTS,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the server's time goes (needs py-spy).")
    ] = False,
) -> None:
    """Measure the server beside torch + PEFT by hand, interleaved, on this machine."""
    known = {measurement.name: measurement for measurement in ALL}
    for name in only or ():
        if name not in known:
            raise typer.BadParameter(f"{name} is not measured; measured are: {', '.join(known)}", param_hint="--only")
    chosen = [measurement for measurement in ALL if not only or measurement.name in only]
    os.environ["TINKER_TELEMETRY"] = "0"
    os.environ.pop("OMP_NUM_THREADS", None)  # each side chooses for itself
    rows: list[report.Row] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tinkercloud-bench-"))
        stage = Stage(Path(folder), stack)
        for measurement in chosen:
            with out.status(f"measuring {measurement.what} ..."):
                rows.append((measurement, _take(measurement, stage, repeat, profile)))
    out.print(report.table_of(rows))
    json.write_text(report.to_json(rows, stage.chosen_settings) + "\n")
    out.print(f"all readings: {json}", highlight=False)


def _take(measurement: Measurement, stage: Stage, repeat: int, profile: bool) -> Readings:
    if not (profile and measurement.task):
        return measurement.take(stage, repeat)
    measurement.take(stage, 1)  # so that the server, its client and the competitor are there and warm
    control, *engines = tree(stage.server.pid)
    processes = [("control", control), *((f"engine-{number}", pid) for number, pid in enumerate(engines))]
    with profiling.profiled(processes, PROFILES / measurement.name) as profiles:
        readings = measurement.take(stage, repeat)
    for each in profiles:
        out.print(profiling.table_of(each, measurement.name))
    name, work = measurement.task
    threads = thread_counts()[-1]
    alone = [stage.engine_alone.seconds(name, wait="passive", threads=threads, **work) for _ in range(1 + repeat)][1:]
    whole, engine = median(readings.ours), median(alone)
    out.print(
        f"{measurement.name}: {whole * 1e3:.1f} ms through the server, {engine * 1e3:.1f} ms in its engine alone; "
        f"SDK, HTTP, ledger and waiting: {(whole - engine) * 1e3:.1f} ms",
        highlight=False,
    )
    return readings


if __name__ == "__main__":
    typer.run(main)
