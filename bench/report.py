"""Readings as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bench.measurement import Measurement
from bench.readings import Goal, Readings, spread

Row = tuple[Measurement, Readings]


def table_of(rows: Sequence[Row]) -> Table:
    """A line for each measurement."""
    table = Table()
    for heading in ("measurement", "ours", "against", "theirs", "ratio", "noise", "goal", "", "note"):
        table.add_column(heading, justify="left" if heading in ("measurement", "against", "goal", "note") else "right")
    for measurement, readings in rows:
        goal = measurement.goal
        ours = format_value(median(readings.ours), goal)
        theirs = format_value(median(readings.theirs), goal) if readings.theirs else ""
        ratio = f"{median(goal.judged(readings) if goal.is_ratio else readings.ratios):.2f}" if readings.theirs else ""
        noise = f"±{spread(goal.judged(readings)) / 2:.0%}" if len(readings.ours) > 1 else ""
        mark = "[green]✓[/]" if goal.met(readings) else "[red]✗[/]"
        cells = (measurement.what, ours, measurement.against, theirs, ratio, noise, format_goal(goal), mark)
        table.add_row(*cells, readings.note)
    return table


def format_value(value: float, goal: Goal) -> str:
    """A reading with its unit."""
    if goal.quantity in ("bytes", "fewer_bytes"):
        return f"{value / 1e6:.0f} MB"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def format_goal(goal: Goal) -> str:
    """Such as "≥ 0.95 x" or "≤ 60.0 ms"."""
    if goal.is_ratio:
        return f"{'≥' if goal.quantity == 'speed' else '≤'} {goal.limit:g} x"
    more = " more" if goal.quantity == "added_seconds" else ""
    return f"≤ {format_value(goal.limit, goal)}{more}"


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """All readings, what they were taken on, and whether they reach their goals; `settings` are the competitor's."""
    import torch

    results = {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "competitor": settings,
        "measurements": {
            measurement.name: {
                "what": measurement.what,
                "goal": {"quantity": measurement.goal.quantity, "limit": measurement.goal.limit},
                "against": measurement.against,
                "ours": readings.ours,
                "theirs": readings.theirs,
                "value": median(measurement.goal.judged(readings)),
                "spread": spread(measurement.goal.judged(readings)),
                "met": measurement.goal.met(readings),
                "note": readings.note,
            }
            for measurement, readings in rows
        },
    }
    return json.dumps(results, indent=2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
