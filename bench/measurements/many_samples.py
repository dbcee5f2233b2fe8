"""Whether the server still answers while one client has 2,000 samples in flight and eight others send theirs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from statistics import median

import httpx

from bench.flood import NEW_TOKENS, PROMPT_TOKENS
from bench.measurement import Measurement
from bench.memory import process_bytes, tree
from bench.readings import Goal, Readings
from bench.stage import Stage

SAMPLES, OTHERS, THEIRS = 2000, 8, 4
PAUSE = 0.02
"""Seconds between two heartbeats."""


def take(stage: Stage, repeat: int) -> Readings:
    """Median seconds of a heartbeat meanwhile, and in the note what became of the rest."""
    readings, notes = zip(*(_round(stage) for _ in range(repeat)), strict=True)
    return Readings(tuple(readings), note=notes[-1])


def _round(stage: Stage) -> tuple[float, str]:
    command = [sys.executable, "-m", "bench.flood", stage.server.url, stage.shape.name]
    flood, others = (
        subprocess.Popen([*command, str(clients), str(samples)], stdin=-1, stdout=-1, text=True)
        for clients, samples in ((1, SAMPLES), (OTHERS, THEIRS))
    )
    assert flood.stdout and flood.stdin and others.stdout and others.stdin
    flood.stdout.readline()
    others.stdout.readline()
    pids = tree(stage.server.pid)
    before = [process_bytes(pid) for pid in pids]
    most = list(before)
    beats: list[float] = []
    with httpx.Client(base_url=f"{stage.server.url}/api/v1") as http:
        session = http.post("create_session", json={"tags": [], "sdk_version": "bench"}).json()["session_id"]

        def beat() -> None:
            while flood.poll() is None:
                sent = time.perf_counter()
                http.post("session_heartbeat", json={"session_id": session}).raise_for_status()
                beats.append(time.perf_counter() - sent)
                most[:] = [max(high, process_bytes(pid)) for high, pid in zip(most, pids, strict=True)]
                time.sleep(PAUSE)

        thread = threading.Thread(target=beat)
        flood.stdin.write("\n")
        flood.stdin.flush()
        thread.start()
        time.sleep(2)  # until most of the many are accepted
        others.stdin.write("\n")
        others.stdin.flush()
        their_seconds = max(json.loads(others.stdout.readline()))
        (own_seconds,) = json.loads(flood.stdout.readline())
        thread.join()
    assert flood.wait() == others.wait() == 0
    grown = [(high - low) / 1e6 for high, low in zip(most, before, strict=True)]
    return median(beats), (
        f"{SAMPLES} samples of {NEW_TOKENS} tokens after {PROMPT_TOKENS} took {own_seconds:.1f} s; {OTHERS} clients "
        f"with {THEIRS} each, 2 s later, waited {their_seconds:.1f} s; slowest of {len(beats)} heartbeats "
        f"{max(beats) * 1000:.0f} ms; the processes grew by at most {', '.join(f'{each:.0f} MB' for each in grown)}"
    )


MANY_SAMPLES = Measurement(
    "many_samples",
    f"a heartbeat while one client has {SAMPLES} samples in flight and {OTHERS} others send {THEIRS} each",
    "",
    Goal("seconds", 0.02),
    take,
)
