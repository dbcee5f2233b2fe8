"""A server in a process of its own on this machine, for as long as a `with` block lasts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tinkercloud.cli.console import CommandError

START_SECONDS = 120.0
"""How long the server may take to be ready; a machine that imports torch for the first time is slow."""
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05
LOG_LINES = 15
"""Lines of the server's log that are shown if it does not start."""


@dataclass(frozen=True)
class LocalServer:
    """A server that is ready."""

    url: str
    pid: int
    """Of the control process; the engines are its children."""
    start_seconds: float
    """From the command to readiness."""


@contextmanager
def running_server(folder: Path, arguments: Sequence[str] = ()) -> Iterator[LocalServer]:
    """`tinkercloud serve` with these arguments on a free loopback port, everything it keeps under `folder`.

    Yields when every preloaded model is ready. Raises CommandError with the end of its log if that does not happen.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    command = [sys.executable, "-m", "tinkercloud", "serve", "--host", "127.0.0.1", "--port", str(port)]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal ends the block, and the block ends the server
        )
    try:
        _wait_until_ready(process, url, log)
        yield LocalServer(url, process.pid, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CommandError(f"the server ended with status {process.returncode} before it was ready:\n{_tail(log)}")
        try:
            if httpx.get(url + "/api/v1/healthz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(POLL_SECONDS)
    raise CommandError(f"the server was not ready within {START_SECONDS:.0f} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
