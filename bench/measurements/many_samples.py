"""Whether the server still answers while one client has 2,000 samples in flight and eight others send theirs, and in
how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import httpx

from bench.flood import EVERY, LONGER, NEW_TOKENS, is_long
from bench.measurement import Measurement
from bench.memory import engine_of, process_bytes, tree
from bench.readings import Goal, Readings
from bench.stage import Stage

SAMPLES, OTHERS, THEIRS = 2000, 8, 4
PAUSE = 0.02
"""Seconds between two heartbeats."""
MEMORY_EVERY = 10
"""Heartbeats from one look at the processes' memory to the next: each costs as much as several."""


class Round(NamedTuple):
    """What one flood showed."""

    heartbeats: list[float]
    """Seconds."""
    most: dict[int, int]
    """Bytes that each process held at most, by its pid."""
    waits: list[float]
    """Seconds until each of the many samples was there."""
    others: float
    """Seconds until the others had all of theirs."""


class Rounds(NamedTuple):
    """All floods of a server that did nothing before."""

    engine: int
    """Its pid."""
    before: dict[int, int]
    """Bytes that each process held before the first, by its pid."""
    rounds: list[Round]

    def growth(self, pids: Sequence[int]) -> int:
        """Bytes that these processes held at most, in any round, above what they held before the first."""
        return max(sum(each.most[pid] - self.before[pid] for pid in pids) for each in self.rounds)


@cache
def _rounds(stage: Stage, repeat: int) -> Rounds:
    """Both measurements are about the same ones, half as many as others take: each is long."""
    from tinkercloud.cli.local_server import running_server

    with tempfile.TemporaryDirectory(dir=stage.folder) as folder, running_server(Path(folder), stage.served) as server:
        before = {pid: process_bytes(pid) for pid in tree(server.pid)}
        rounds = [_round(server.url, stage.shape.name, list(before)) for _ in range((repeat + 1) // 2)]
        return Rounds(engine_of(server.pid), before, rounds)


def _round(url: str, model: str, pids: list[int]) -> Round:
    command = [sys.executable, "-m", "bench.flood", url, model]
    flood, others = (
        subprocess.Popen([*command, str(clients), str(samples)], stdin=-1, stdout=-1, text=True)
        for clients, samples in ((1, SAMPLES), (OTHERS, THEIRS))
    )
    assert flood.stdout and flood.stdin and others.stdout and others.stdin
    flood.stdout.readline()
    others.stdout.readline()
    most = dict.fromkeys(pids, 0)
    beats: list[float] = []
    with httpx.Client(base_url=f"{url}/api/v1") as http:
        session = http.post("create_session", json={"tags": [], "sdk_version": "bench"}).json()["session_id"]

        def beat() -> None:
            while flood.poll() is None:
                sent = time.perf_counter()
                http.post("session_heartbeat", json={"session_id": session}).raise_for_status()
                beats.append(time.perf_counter() - sent)
                if len(beats) % MEMORY_EVERY == 0:
                    most.update({pid: max(high, process_bytes(pid)) for pid, high in most.items()})
                time.sleep(PAUSE)

        thread = threading.Thread(target=beat)
        flood.stdin.write("\n")
        flood.stdin.flush()
        thread.start()
        time.sleep(2)  # until most of the many are accepted
        others.stdin.write("\n")
        others.stdin.flush()
        theirs = max(map(max, json.loads(others.stdout.readline())))
        (own,) = json.loads(flood.stdout.readline())
        thread.join()
    assert flood.wait() == others.wait() == 0
    return Round(beats, most, own, theirs)


def take_heartbeat(stage: Stage, repeat: int) -> Readings:
    """Median seconds of a heartbeat meanwhile, and in the note what became of the samples in the last round."""
    rounds = _rounds(stage, repeat).rounds
    waits, slowest = rounds[-1].waits, max(max(each.heartbeats) for each in rounds)
    long = [wait for number, wait in enumerate(waits) if is_long(number)]
    meanwhile = [wait for number, wait in enumerate(waits) if not is_long(number) and wait < max(long)]
    ahead = mean(longer - wait for number, (longer, wait) in enumerate(pairwise(waits)) if is_long(number))
    note = (
        f"the last sample came after {max(waits):.1f} s; median of those of {NEW_TOKENS * LONGER} tokens "
        f"{median(long):.1f} s, of the {len(meanwhile)} of {NEW_TOKENS} that came before the last of these "
        f"{median(meanwhile):.1f} s; one sent right behind a longer one came {ahead:.2f} s before it on average; "
        f"{OTHERS} clients with {THEIRS} each, 2 s later, waited {rounds[-1].others:.1f} s; slowest of all heartbeats "
        f"{slowest * 1e3:.0f} ms"
    )
    return Readings(tuple(median(each.heartbeats) for each in rounds), note=note)


def take_memory(stage: Stage, repeat: int) -> Readings:
    """Bytes that the engine took at most in any of the rounds above what it held before the first."""
    rounds = _rounds(stage, repeat)
    rest = [pid for pid in rounds.before if pid != rounds.engine]
    note = (
        f"{rounds.before[rounds.engine] / 1e6:.0f} MB before; the other processes grew by "
        f"{rounds.growth(rest) / 1e6:.0f} MB"
    )
    return Readings((float(rounds.growth([rounds.engine])),), note=note)


MANY_SAMPLES = (
    Measurement(
        "many_samples",
        f"a heartbeat while one client has {SAMPLES} samples in flight, every {EVERY}th {LONGER} x as long, and "
        f"{OTHERS} others send {THEIRS} each",
        "",
        Goal("seconds", 0.02),
        take_heartbeat,
    ),
    Measurement(
        "many_samples_memory",
        f"memory that the engine takes for these {SAMPLES} samples at most",
        "",
        Goal("bytes", 256e6),
        take_memory,
    ),
)
