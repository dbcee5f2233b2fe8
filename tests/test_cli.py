"""The command line as its users have it: a process, its exit status and what it prints."""

import contextlib
import inspect
import io
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from rich.color import ColorSystem
from typer.testing import CliRunner

from tinkercloud.api import tokens
from tinkercloud.cli import admin, doctor, serve
from tinkercloud.cli.app import app
from tinkercloud.cli.console import CommandError
from tinkercloud.cli.demo import LESSON
from tinkercloud.nano import FOLDER

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
    }
    for arguments, said in wrong.items():
        assert said in str(keys(*arguments).exception)


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


def test_doctor_finds_a_sound_machine_sound(tmp_path):
    done = run("doctor", "--port", "0", "--device", "cpu", "--data-dir", str(tmp_path / "not" / "yet"))
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout
    assert "model tinkercloud/nano" in done.stdout
    assert not (tmp_path / "not").exists(), "doctor only looks"


def test_doctor_says_how_to_mend_what_is_broken(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        models = ("--model", f"mine={tmp_path}", "--model", "nobody/nothing")
        data_dir = ("--data-dir", "/proc/tinkercloud")
        done = run("doctor", "--port", port, *models, *data_dir, TINKERCLOUD_PROT="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    broken = {line.split(" ", 1)[1]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("✗")}
    assert all(mend.startswith("  → ") for mend in broken.values())
    for start in ("TINKERCLOUD_PROT", "port 127.0.0.1", "data folder", "model mine", "model nobody/nothing"):
        assert any(name.startswith(start) for name in broken), (start, done.stdout)


def test_doctor_goes_on_after_models_that_are_wrong(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    cut = shutil.copytree(FOLDER, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    wrong = ("--model", "a=/no/such/folder", "--model", "nobody/x/y/z", "--model", "b,max_rank=0")
    folders = ("--model", f"half={tmp_path / 'half'}", "--model", f"cut={cut}")
    done = run("doctor", "--port", "0", *wrong, *folders, TINKERCLOUD_PROT="1")
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    for said in (
        "'/no/such/folder'",
        "'nobody/x/y/z'",
        "max_rank",
        "model half",
        "model cut model.safetensors is damaged",
        "TINKERCLOUD_PROT",
    ):
        assert any(said in line for line in broken), (said, done.stdout)
    assert "data folder" in done.stdout, "the rest is looked at as well"
    at_once = run("serve", *wrong)
    assert at_once.returncode == 2 and at_once.stderr.count("\n") == 1
    for said in ("'/no/such/folder'", "'nobody/x/y/z'", "max_rank"):
        assert said in at_once.stderr


def test_a_model_without_a_tokenizer_is_sound_but_for_that(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    line = ("doctor", "--port", "0", "--device", "cpu", "--data-dir", str(tmp_path / "data"), "--model", f"m={folder}")
    done = run(*line)
    assert done.returncode == 0, done.stdout
    (warned,) = [line for line in done.stdout.splitlines() if line.startswith("!")]
    assert warned == f"! model m {folder} has no tokenizer"
    (folder / "tokenizer.json").write_text("{}")
    done = in_process(*line)
    assert "no tokenizer" not in done.stdout and done.exit_code == 0


def test_doctor_says_that_a_model_cannot_be_served_as_the_engine_says_it(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", f"m={folder}")
    assert done.exit_code == 1
    layer = "its layer h.0.attn.c_attn, a Conv1D, would stay without LoRA"
    assert f"✗ model m GPT2LMHeadModel is not supported: {layer}" in done.stdout


def test_a_model_that_only_the_hub_could_give_is_refused_in_one_sentence_and_without_a_url(tmp_path):
    options = ("--port", "0", "--data-dir", str(tmp_path), "--model", "some/model")
    done = run("serve", *options, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    why = "not in the Hugging Face cache; offline (HF_HUB_OFFLINE)"
    assert (
        f"error: some/model: it is no folder and {why}; correct the name, or with a network: hf download" in done.stderr
    )
    assert "http://" not in done.stderr
    assert (
        why in run("doctor", "--port", "0", "--model", "some/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).stdout
    )


def test_doctor_takes_what_serve_takes():
    assert inspect.signature(doctor.doctor).parameters == inspect.signature(serve.serve).parameters


def model_of(folder: Path, numbers: int, names: tuple[str, ...] = ("w",), **config: int) -> str:
    """A model's folder whose weights, in bfloat16 and as many under each name, are a hole in the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    places = {name: [2 * numbers * i, 2 * numbers * (i + 1)] for i, name in enumerate(names)}
    tensors = {name: {"dtype": "BF16", "shape": [numbers], "data_offsets": place} for name, place in places.items()}
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * numbers * len(names))
    return f"{folder.name}={folder}"


NANO_MIB = (512, 256, 64)
"""Beside the weights: the engine, the sampler's cache, the logits."""
OF_128_MIB = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
"""1024 numbers of each token: with 2**15 tokens of context, 128 MiB in float32."""


@pytest.mark.parametrize(
    ("options", "config", "needed"),
    [
        ((), {}, sum(NANO_MIB) + 400),
        (("--dtype", "bfloat16"), {}, sum(NANO_MIB) + 200),
        (("--set", "kv_cache_bytes=1MiB"), {}, 512 + 64 + 1 + 400),
        (("--set", "kv_cache_bytes=1MiB"), OF_128_MIB | {"max_position_embeddings": 2**15}, 512 + 64 + 128 + 400),
        (("--set", "kv_cache_bytes=1MiB", "--max-context", "4096"), OF_128_MIB, 512 + 64 + 16 + 400),
    ],
)
def test_doctor_counts_memory_as_the_engine_takes_it(tmp_path, options, config, needed):
    model = model_of(tmp_path / "m", 100 * 2**20, **config)
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", model, *options)
    assert f"about {needed:,} MiB needed\n" in done.stdout


@pytest.mark.parametrize(
    ("quantization", "needed"), [("none", 6 * 256), ("8bit", 4 * 256 + 2 * 64), ("4bit", 4 * 256 + 2 * 36)]
)
def test_doctor_counts_what_is_quantised(tmp_path, quantization, needed):
    """Of a model whose files have each expert by itself: the engine fuses those and does not quantise them."""
    names = ("self_attn.q_proj.weight", "mlp.shared_expert.up_proj.weight", "self_attn.q_proj.bias")
    names = tuple(f"model.layers.0.{name}" for name in (*names, "mlp.experts.0.up_proj.weight"))
    model = model_of(tmp_path / "m", 64 * 2**20, (*names, "lm_head.weight", "model.embed_tokens.weight"))
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", f"{model},quantization={quantization}")
    assert f"about {sum(NANO_MIB) + needed:,} MiB needed\n" in done.stdout
    assert ("✓ bitsandbytes" in done.stdout) == (quantization != "none")


def test_doctor_counts_a_models_own_settings(tmp_path):
    models = [f"{model_of(tmp_path / name, 2**20)},kv_cache_bytes={size}MiB" for name, size in (("a", 1), ("b", 2))]
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", models[0], "--model", models[1])
    assert f"about {2 * (512 + 64 + 4) + 1 + 2:,} MiB needed\n" in done.stdout


def test_doctor_asks_the_hub_how_large_a_model_is(tmp_path):
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        model = "some/model,quantization=8bit"  # the hub does not say how much of it is layers
        line = ("doctor", "--port", "0", "--device", "cpu", "--model")
        with ThreadPoolExecutor() as pool:
            asked, quantised = pool.submit(run, *line, "some/model", **hub), pool.submit(run, *line, model, **hub)
            offline = pool.submit(run, *line, "some/model", HF_HUB_OFFLINE="1")
        server.shutdown()
    assert f"about {sum(NANO_MIB) + 40:,} MiB needed\n" in asked.result().stdout
    for answer in (quantised, offline):
        assert "about 512 MiB needed, and what some/model takes, whose size is not known yet" in answer.result().stdout


def test_doctor_reports_settings_that_cannot_be_read():
    done = run("doctor", TINKERCLOUD_PORT="tcp://10.0.0.1:80")
    assert done.returncode == 1
    assert "✗ settings port" in done.stdout


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
