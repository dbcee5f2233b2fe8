"""The command line of the bench."""

from __future__ import annotations

import fnmatch
import os
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from bench import profile as profiling
from bench import report
from bench.competitor import thread_counts
from bench.measurement import Measurement
from bench.measurements import AGAINST_VLLM, ALL
from bench.memory import tree
from bench.model import Shape
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
    only: Annotated[
        list[str] | None, typer.Option(help="Measure only this, such as ragged_4m or 'tenants*'; repeatable.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of readings for each measurement.")] = 7,
    json: Annotated[Path, typer.Option(help="Where all readings are written.")] = RESULTS,
    vllm: Annotated[
        Path | None, typer.Option(help="Python of an environment with vLLM: measure sampling_vllm_* as well.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the server's time goes (needs py-spy).")
    ] = False,
) -> None:
    """Measure the server beside torch + PEFT by hand, interleaved, on this machine."""
    measurements = ALL + (AGAINST_VLLM if vllm else ())
    names = [measurement.name for measurement in measurements]
    for pattern in only or ():
        if not fnmatch.filter(names, pattern):
            text = f"{pattern} is not measured; measured are: {', '.join(names)}"
            raise typer.BadParameter(text, param_hint="--only")
    wanted = {name for pattern in only or ("*",) for name in fnmatch.filter(names, pattern)}
    chosen = [measurement for measurement in measurements if measurement.name in wanted]
    os.environ["TINKER_TELEMETRY"] = "0"
    os.environ.pop("OMP_NUM_THREADS", None)  # each side chooses for itself
    rows: list[report.Row] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tinkercloud-bench-"))
        stages: dict[Shape, Stage] = {}
        for measurement in chosen:
            shape = measurement.shape
            stage = stages.setdefault(shape, Stage(Path(folder) / shape.label, stack, shape, vllm))
            with out.status(f"measuring {measurement.what} ..."):
                readings = _take(measurement, stage, repeat, profile)
                if measurement.task and not measurement.goal.met(readings):
                    readings = replace(readings, note=f"{readings.note}; {_bounds(measurement, stage)}".strip("; "))
                rows.append((measurement, readings))
    out.print(report.table_of(rows))
    settings = {shape.name: stage.chosen_settings for shape, stage in stages.items()}
    json.write_text(report.to_json(rows, settings) + "\n")
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


def _bounds(measurement: Measurement, stage: Stage) -> str:
    """What the engine spends its time on where a goal is missed, by its own profile."""
    name, work = measurement.task
    threads = thread_counts()[-1]
    shares = stage.engine_alone.returned("shares", wait="passive", threads=threads, of=name, work=work)
    return "engine: " + ", ".join(f"{kind} {part:.0%}" for kind, part in shares.items())


if __name__ == "__main__":
    typer.run(main)
