"""A training script whose server, engine, or both are killed at random moments, beside one to which nothing happens."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import tinker
from safetensors.numpy import load_file
from tinker import types

from tests.serving import Server
from tinkercloud.control.verify import problems

ANSWER_SECONDS = 30
"""Until when after a kill something must have been computed and answered."""

PATIENCE_SECONDS = 180
"""How long the harness itself waits for an answer before it says that there is none."""

AGAIN = 0.25
"""The share of kills that the server does not get over before it is killed again."""

ROOT = Path(__file__).parents[2]


class Script:
    """The client process, and what it has been answered."""

    def __init__(self, url: str, seed: int, rounds: int, errors: Path):
        self.errors = errors
        command = [sys.executable, "-m", "tests.chaos.client", url, str(seed), str(rounds)]
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)
        self.answers: list[dict[str, Any]] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.answers.append(json.loads(line))

    @property
    def running(self) -> bool:
        return self._reading.is_alive()

    def all_have_gone_on(self, since: int) -> bool:
        """Whether every tenant that has not ended has been answered something that was computed after answer `since`:
        its last two may have been computed before. What has ended two engines is given up by design, so nothing that
        one kill has hit may be hit by the next."""
        answers = list(self.answers)
        ended = {answer["tenant"] for answer in answers if answer["what"] == "final"}
        since_then = Counter(answer["tenant"] for answer in answers[since:])
        return all(since_then[tenant] > 2 for tenant in {answer["tenant"] for answer in answers} - ended)

    def wait(self) -> None:
        self._reading.join()
        assert self._process.wait() == 0, f"an exception in the client:\n{self.errors.read_text()[-4000:]}"

    def end(self) -> None:
        """Also of one that hangs."""
        self._process.kill()
        self._reading.join()
        self._process.wait()


class Outcome(NamedTuple):
    """What every tenant was answered, in its order, and the bits of its final weights, moments and gradients."""

    answers: dict[str, list[tuple[str, Any]]]
    weights: dict[str, dict[str, bytes]]

    @property
    def num_answers(self) -> int:
        return sum(map(len, self.answers.values()))


class Kill(NamedTuple):
    what: str
    seconds: float
    """From the last kill to the first answer that was computed after it."""


def outcome_of(script: Script, data_dir: Path) -> Outcome:
    answers: defaultdict[str, list[tuple[str, Any]]] = defaultdict(list)
    weights = {}
    for answer in script.answers:
        if answer["what"] == "final":
            run = answer["value"].removeprefix("tinker://").partition("/")[0]
            tree = "cache" if (data_dir / "cache").is_dir() else "checkpoints"  # copies of what is in a store
            weights[answer["tenant"]] = _bits(data_dir / tree / run.replace(":", "_") / "weights" / "final")
        else:
            answers[answer["tenant"]].append((answer["what"], answer["value"]))
    return Outcome(dict(answers), weights)


def _bits(folder: Path) -> dict[str, bytes]:
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*/*.safetensors"):
        tensors |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    assert tensors, f"{folder} has no weights"
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def undisturbed(server: Server, seed: int, rounds: int, errors: Path) -> Outcome:
    script = Script(server.url, seed, rounds, errors)
    try:
        script.wait()
    finally:
        script.end()
    return outcome_of(script, server.data_dir)


def disturbed(
    server: Server,
    seed: int,
    rounds: int,
    kills: int,
    answers: int,
    errors: Path,
    on_kill: Callable[[Kill], None] = lambda kill: None,
    minutes: float = 60.0,
    database_url: str | None = None,
) -> tuple[Outcome, list[Kill]]:
    """The same script with `kills` kills spread over its `answers` answers, none after so many minutes. The server is
    stopped at the end, and its data directory verified, with its database if that is not in it."""
    dice = random.Random(seed)
    moments = sorted(dice.sample(range(1, answers * 9 // 10), kills))
    script = Script(server.url, seed, rounds, errors)
    probe = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    happened: list[Kill] = []
    deadline = time.monotonic() + 60 * minutes
    try:
        sampler = probe.create_sampling_client(base_model="tinkercloud/nano").result()
        for moment in moments:
            while script.running and len(script.answers) < moment:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
            if not script.running or time.monotonic() > deadline:
                break
            before = len(script.answers)
            happened.append(_strike(server, sampler, dice))
            on_kill(happened[-1])
            while script.running and time.monotonic() < deadline and not script.all_have_gone_on(before):
                time.sleep(0.005)
        script.wait()
    finally:
        script.end()
        probe.holder.close()
    assert server.stop() == 0
    assert "crashed" not in server.log.read_text(), "no request may end in the last net"
    lost = [problem for problem in problems(server.data_dir, database_url) if problem.lost]
    assert not lost, lost
    return outcome_of(script, server.data_dir), happened


def _strike(server: Server, sampler: tinker.SamplingClient, dice: random.Random) -> Kill:
    """Kill something, perhaps once more before that is over, and wait until the server computes again."""
    what = dice.choice(["engine", "children", "server", "both"])
    if what == "children":  # the process from which engines are forked, too
        for child in psutil.Process(server.process.pid).children(recursive=True):
            child.kill()
    if what in ("engine", "both"):
        for pid in server.engine_pids():
            os.kill(pid, signal.SIGKILL)
    if what in ("server", "both"):
        _restart(server)
    while dice.random() < AGAIN:
        time.sleep(dice.uniform(0, 5))
        _restart(server)
        what += ", server"
    killed = time.monotonic()
    sampler.compute_logprobs(types.ModelInput.from_ints([1, 2, 3])).result(timeout=PATIENCE_SECONDS)
    return Kill(what, time.monotonic() - killed)


def _restart(server: Server) -> None:
    assert server.process is not None and server.process.poll() is None, f"it ended:\n{server.log.read_text()[-4000:]}"
    server.kill()
    server.start(wait=False)


def differences(one: Outcome, other: Outcome) -> list[str]:
    """Where two outcomes are not the same bits; nothing if they are."""
    found = []
    for tenant in one.answers.keys() | other.answers.keys():
        mine, its = one.answers.get(tenant, []), other.answers.get(tenant, [])
        found += [
            f"{tenant}, answer {n}: {a} != {b}" for n, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b
        ]
        if len(mine) != len(its):
            found.append(f"{tenant}: {len(mine)} answers and {len(its)}")
    for tenant in one.weights.keys() | other.weights.keys():
        mine, its = one.weights.get(tenant, {}), other.weights.get(tenant, {})
        found += [f"{tenant}: {name}" for name in sorted(mine.keys() | its.keys()) if mine.get(name) != its.get(name)]
    return found
