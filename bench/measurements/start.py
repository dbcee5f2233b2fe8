"""How long a user waits for a server with the embedded model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.measurement import Measurement
from bench.readings import Goal, Readings
from bench.stage import Stage


def take(stage: Stage, repeat: int) -> Readings:
    """Seconds from the command to the first healthz that says ready, each time in an empty data directory."""
    from tinkercloud.cli.local_server import running_server

    readings = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(dir=stage.folder) as folder, running_server(Path(folder)) as server:
            readings.append(server.start_seconds)
    return Readings(tuple(readings))


START = Measurement("start", "start to ready, embedded model", "", Goal("seconds", 10.0), take)
