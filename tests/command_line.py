"""The command line as its users run it, and a program at its other end that is no server of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

from click.testing import Result
from typer.testing import CliRunner

from tinkercloud.cli.app import app

COMMAND = [sys.executable, "-m", "tinkercloud"]


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TINKERCLOUD_", "TINKER_"))}
    return subprocess.run(
        [*COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=kept | {"COLUMNS": "200", "NO_COLOR": "1"} | environ,
    )


def in_process(*arguments: str) -> Result:
    """The same command without a process of its own, where only what it prints is looked at."""
    return CliRunner().invoke(app, arguments)


class OtherServer(BaseHTTPRequestHandler):
    """Programs that are no tinkercloud: a hub with one model, a page for every other GET, a refusal of every POST, and
    JSON of its own for every DELETE."""

    def do_GET(self):
        described = {"id": "some/model", "safetensors": {"parameters": {"BF16": 10 * 2**20}, "total": 10 * 2**20}}
        page = (
            json.dumps(described).encode() if self.path.startswith("/api/models/some/model") else b"<html>hello</html>"
        )
        self._answer(200, page)

    def do_DELETE(self):
        self._answer(200, b'{"deleted": true}')

    def do_POST(self):
        self._answer(400, b'{"detail": "there is no room for it; remove another model first"}')

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass
