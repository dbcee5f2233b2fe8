"""A real server process for tests: started by the command line, stopped by its own pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`tinkercloud serve` on a free loopback port. Start and stop it as often as you like: the data stay.

    Keyword arguments are environment variables.
    """

    def __init__(self, data_dir: Path, *options: str, **environ: str):
        self.data_dir = data_dir
        self.options = options
        self.environ = os.environ | environ
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.prefix: tuple[str, ...] = ()
        """A command that starts it as its own process, such as in another namespace."""

    def start(self, wait: bool = True) -> Server:
        command = [*self.prefix, sys.executable, "-m", "tinkercloud", "serve", "--port", str(self.port)]
        command += ["--data-dir", str(self.data_dir), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environ)
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, verify: Any = True) -> None:
        """`verify` as httpx has it, for a server with a certificate of its own."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5, verify=verify).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_SECONDS} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Ask it to stop as an operator would; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """As a power cut would, as far as one process can tell."""
        self.process.kill()
        self.process.wait()

    def engine_pids(self) -> list[int]:
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if "tinkercloud engine" in " ".join(child.cmdline())]

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.stop()
