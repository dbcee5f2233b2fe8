"""A real PostgreSQL for tests: a cluster in a temporary directory, run as an unprivileged user on a free port."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

from sqlalchemy import create_engine, text

from tests.serving import free_port

USER = "postgres" if os.geteuid() == 0 else None
"""Whom the server runs as; PostgreSQL refuses root. Debian's package makes this user."""

HOW_TO_INSTALL = "PostgreSQL is needed by the tests: `make packages`, or on Debian `sudo apt-get install postgresql`"

FAST = ("fsync=off", "full_page_writes=off")
"""The machine's crash would cost tests nothing."""


class PostgreSQL:
    """Make it with `with`; it is gone at the end."""

    def __enter__(self) -> PostgreSQL:
        programs = _programs()
        self._home = Path(tempfile.mkdtemp(prefix="tinkercloud-postgresql-"))
        self._log = self._home / "log"
        if USER:
            shutil.chown(self._home, USER)
        cluster = self._home / "cluster"
        self._run(programs / "initdb", "-D", cluster, "-A", "trust", "-U", "tinkercloud", "-E", "UTF8", "--no-sync")
        self._port = free_port()
        options = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self._home} " + " ".join(
            f"-c {option}" for option in FAST
        )
        self._control = (programs / "pg_ctl", "-D", cluster, "-w", "-l", self._log, "-o", f"-p {self._port} {options}")
        self._run(*self._control, "start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(*self._control, "-m", "immediate", "stop")
        shutil.rmtree(self._home)

    def restart(self) -> None:
        """Every connection is lost."""
        self._run(*self._control, "-m", "fast", "restart")

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        engine = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://tinkercloud@127.0.0.1:{self._port}/{database}"

    def _run(self, *command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            user=USER,
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be kept open by the server
            stderr=subprocess.DEVNULL,
        )
        log = self._log.read_text() if self._log.exists() else ""
        assert done.returncode == 0, f"{command[0]} failed ({done.returncode})\n{log}"


def _programs() -> Path:
    """The folder of initdb and pg_ctl; Debian has it outside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    assert found or on_path, HOW_TO_INSTALL
    return found[-1].parent if found else Path(on_path).parent
