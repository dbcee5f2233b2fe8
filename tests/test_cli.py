"""The command line as its users have it: a process, its exit status and what it prints (`doctor` has its own file)."""

import contextlib
import io
import logging
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import HTTPServer

import httpx
import pytest
from click.testing import Result
from rich.color import ColorSystem
from typer.testing import CliRunner

from tests.command_line import OtherServer, in_process, run
from tinkercloud.api import tokens
from tinkercloud.cli import admin, serve
from tinkercloud.cli.app import app
from tinkercloud.cli.console import CommandError
from tinkercloud.cli.demo import LESSON


def test_help_does_not_load_torch():
    code = (
        "import sys, tinkercloud.cli.app\n"
        "heavy = {'torch', 'transformers', 'tinker', 'numpy', 'sqlalchemy', 'fastapi', 'httpx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_command_has_help():
    top = run("--help")
    assert top.returncode == 0
    for command in ("serve", "demo", "doctor", "fsck", "keys", "models", "checkpoints", "sessions", "version"):
        assert command in top.stdout
        assert in_process(command, "--help").exit_code == 0


def test_version_names_what_a_report_needs():
    printed = run("version").stdout
    assert in_process("--version").stdout == printed
    for name in ("tinkercloud 0.", "torch 2.", "transformers 5.", "tinker 0.38", "python 3."):
        assert name in printed


def test_a_server_that_others_can_reach_wants_keys(tmp_path):
    refused = run("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path))
    assert refused.returncode == 2 and "tinkercloud keys create" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_keys_are_made_listed_and_revoked(tmp_path):
    def keys(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(tmp_path)])

    assert "no server has ever worked in" in str(keys("list").exception) and not list(tmp_path.iterdir())
    limits = ("--max-models", "2", "--max-storage", "50GB", "--max-daily-tokens", "1000000")
    made = keys("create", "alice", "--name", "laptop", "--expires", "30d", "--project", "p", *limits)
    secret = made.stdout.strip()
    assert secret.startswith("tml-") and len(secret) > 40 and "wants a key" in made.stderr
    operator = keys("create", "root", "--operator")
    assert operator.stdout.strip() != secret and "wants a key" not in operator.stderr
    listed = keys("list").stdout
    assert secret not in listed and secret[:12] in listed
    for part in ("alice", "laptop", "until 20", "project p", "2 models", "50.0 GB", "1,000,000 tokens", "administer"):
        assert part in listed
    assert secret.encode() not in (tmp_path / "ledger.db").read_bytes()
    assert keys("revoke", secret).exit_code == 0 and keys("revoke", "2").exit_code == 0
    assert keys("list").stdout.count("revoked") == 2
    wrong = {
        ("revoke", "2"): "was revoked before",
        ("revoke", "tml-nobody"): "keys list",
        ("create", "bob", "--expires", "soon"): "30d",
        ("create", "bob", "--max-storage", "much"): "50GB",
        ("create", "bob", "--expires", "9999999w"): "at most 100 years",
        ("create", "bob", "--expires", f"{'9' * 5000}h"): "at most 100 years",
        ("create", "bob", "--max-storage", "90000000TB"): "at most 9223372036854775807 bytes",
        ("create", "bob", "--max-storage", f"1{'0' * 400}GB"): "50GB",
        ("create", "b" * 129): "at most 128 letters",
    }
    for arguments, said in wrong.items():
        assert said in str(keys(*arguments).exception)
    for limit, most in {"--max-models": 2**31 - 1, "--max-daily-tokens": 2**63 - 1}.items():
        refused = keys("create", "bob", limit, "1" + "0" * 19)
        assert refused.exit_code == 2
        assert f"less than or equal to {most}" in " ".join(refused.stderr.replace("│", "").split()), limit
    assert keys("create", "b" * 128, "--expires", "36500d", "--max-storage", "8000000TB").exit_code == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as database:  # as it could be made before
        database.execute("UPDATE api_keys SET expires_at = 6e12 WHERE key_id = 3")
        database.commit()
    assert re.search("b{128} .* valid ", keys("list").stdout)


MISTAKES = [
    (("serve", "--model", "a=/no/such/folder"), "there is no folder '/no/such/folder'"),
    (("serve", "--set", "prot=3"), "did you mean 'port'"),
    (("serve", "--set", "port"), "write it as SETTING=VALUE"),
    (("serve", "--config", "/no/such.toml"), "does not exist"),
    (("serve", "--config", "/tmp"), "/tmp is a folder"),
    (
        ("serve", "--port", "0", "--data-dir", "/proc/x"),
        "/proc/x: No such file or directory; give another --data-dir",
    ),
    (("serve", "--port", "0", "--data-dir", "/etc/passwd"), "/etc/passwd: File exists; give another --data-dir"),
    (("serve", "--log-file", "/proc/x.log"), "/proc/x.log: No such file or directory; give another --log-file"),
    (("fsck", "/"), "/ has no ledger.db: give the data directory of a server"),
    (("serve", "--port", "0", "--set", "database_url=nonsense"), "write sqlite:////absolute/path/ledger.db"),
    (("serve", "--port", "0", "--set", "database_url=postgresql://u:p@h:port/d"), "write sqlite:////absolute/path"),
    (("serve", "--port", "0", "--set", "database_url=sqlite://"), "in memory, which no stop would survive"),
    (("serve", "--port", "0", "--set", "database_url=sqlite:////nope/x.db"), "/nope/x.db cannot be used: unable"),
    (("serve", "--port", "0", "--set", "database_url=oracle+none://h/d"), "write sqlite:////absolute/path"),
    (
        ("serve", "--port", "0", "--set", "database_url=mysql+pymysql://h/d"),
        "pip install 'pymysql', or write sqlite",
    ),
    (("checkpoints", "import", "/"), "has no adapter_config.json"),
    (("models", "list", "--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
    (("models", "list", "--url", "nonsense"), "no server answers at nonsense"),
    (("models", "list", "--url", "http://[::1]:1"), "no server answers at http://[::1]:1"),
    (("models", "list", "--url", "http://[::1:1"), "no server answers at http://[::1:1"),
]
"""Of those who type a command: its arguments, and what it says of them."""


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory) -> Iterator[dict[tuple[str, ...], Future[subprocess.CompletedProcess[str]]]]:
    """All of them, some at a time, each with a data directory of its own."""
    with ThreadPoolExecutor(4) as pool:
        yield {
            arguments: pool.submit(run, *arguments, XDG_DATA_HOME=str(tmp_path_factory.mktemp("home")))
            for arguments, _ in MISTAKES
        }


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_is_one_line(arguments, said, mistaken):
    done = mistaken[arguments].result()
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_taken_port_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_here_is_said_to_be_the_host(tmp_path, host):
    assert in_process("keys", "create", "alice", "--data-dir", str(tmp_path)).exit_code == 0
    done = run("serve", "--host", host, "--port", "0", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.endswith("; give another --host, an address of this machine\n"), done.stderr
    assert f"cannot listen on {host}:0: " in done.stderr and "--port" not in done.stderr


def test_a_newer_servers_data_are_one_line(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
        database.commit()
    done = run("serve", "--port", "0", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the ledger is at version 9999") and done.stderr.count("\n") == 1


def test_a_damaged_database_is_one_line(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"no database " * 1000)
    done = run("serve", "--port", "0", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}/ledger.db cannot be used: file is not a database" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_ctrl_c_while_the_server_is_imported_ends_without_a_word(tmp_path):
    interrupting = """
import signal, sys
from tinkercloud.__main__ import main

class Finder:
    def find_spec(name, path, target=None):
        if name == "uvicorn":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
main()
"""
    command = [sys.executable, "-c", interrupting, "serve", "--port", "0", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_log_lines_on_a_terminal_are_neither_coloured_nor_wrapped(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(serve.err, "_file", screen)
    monkeypatch.setattr(serve.err, "_force_terminal", True)
    monkeypatch.setattr(serve.err, "_color_system", ColorSystem.TRUECOLOR)
    line = "engine Qwen/Qwen3-8B [bold]:smile: ready after 1.5 s " + "and " * 40 + "more"
    serve.TerminalHandler().emit(logging.makeLogRecord({"msg": line}))
    assert screen.getvalue() == line + "\n"


def test_answers_that_are_no_success_are_one_line():
    proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # none is a way to this machine
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        listed = run("models", "list", "--url", url, **proxies)
        removed = run("models", "remove", "a/b", "--url", url, **proxies)
        added = run("models", "add", "a/b", TINKER_BASE_URL=url, **proxies)
        server.shutdown()
    for done in (listed, removed):
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {url} is no tinkercloud server") and done.stderr.count("\n") == 1
    assert added.returncode == 2
    assert added.stderr == "error: the server refused: there is no room for it; remove another model first\n"


FOR_ANOTHER_SERVER = {
    "TINKER_API_KEY": "slime-dev-key",
    "TINKER_BASE_URL": "http://127.0.0.1:9",
    "TINKERCLOUD_MODELS": "no/where",
    "TINKERCLOUD_DATABASE_URL": "sqlite:////nope/x.db",
    "http_proxy": "http://127.0.0.1:9",
}


def test_the_demo_teaches_and_stops_its_server():
    done = run("demo", **FOR_ANOTHER_SERVER)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("What it says after:")
    for answer in LESSON.values():
        assert answer not in before and answer in after
    first, last = (float(loss) for loss in re.search(r"loss per token ([\d.]+) → ([\d.]+)", after).groups())
    assert last < 0.1 * first
    url = re.search(r"http://\S+", before)[0]
    assert "no server answers" in run("models", "list", "--url", url).stderr


@pytest.mark.parametrize("name", ["unbound-team/alice", "a..b", "a b", "", "..", "a\n"])
def test_a_user_has_a_name_that_a_folder_can_have(tmp_path, name):
    made = CliRunner().invoke(app, ["keys", "create", "--data-dir", str(tmp_path / "data"), "--", name])
    assert isinstance(made.exception, CommandError) and "is no name for a user" in str(made.exception)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("http://127.0.0.1:9", True),
        ("https://tinker.example", True),
        ("https://tinker.example:8443", False),
        ("http://tinker.example", False),
        ("https://somebody.else", False),
        ("https://127.0.0.1@somebody.else", False),
    ],
)
def test_only_the_own_server_sees_the_operators_token(tmp_path, monkeypatch, url, trusted):
    monkeypatch.setenv("TINKERCLOUD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TINKERCLOUD_PUBLIC_URL", "https://tinker.example/")
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    tokens.secret(tmp_path)
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["x-api-key"])
        return httpx.Response(401, json={"detail": "no"})

    monkeypatch.setattr(admin, "_client", lambda *given: httpx.Client(transport=httpx.MockTransport(answer)))
    with pytest.raises(CommandError, match="the server refused"):
        admin.list_models(url)
    assert [key for key in sent if not key.startswith("eyJ")] == ["tml-local"]
    assert (len(sent) == 2) is trusted
