"""A stop does not wait for a base model that is still loading."""

import os
import shutil
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest

from tests.serving import Server
from tinkercloud.nano import FOLDER

NEVER = "me/never"


@pytest.fixture
def endless(tmp_path):
    """A model whose weights are never read to their end: a pipe that nobody writes to."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    os.mkfifo(folder / "model.safetensors")
    return folder


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_signal_says_what_is_true(tmp_path):
    server = Server(tmp_path / "data", "--model", f"{NEVER}={FOLDER},lazy=true")
    head = "POST /api/v1/create_session HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    with server, socket.create_connection(("127.0.0.1", server.port)) as unfinished:  # a stop waits for its body
        unfinished.sendall(f"{head}expect: 100-continue\r\ncontent-length: 9\r\n\r\n".encode())
        assert b"100 Continue" in unfinished.recv(1000), "the server reads it now"
        for said in ("Stopping: ", "Still stopping: "):
            server.process.send_signal(signal.SIGINT)
            until(lambda said=said: said in server.log.read_text())
        assert server.process.wait(timeout=60) == 0
    log = server.log.read_text()
    assert f"`kill -9 {server.process.pid}` ends it at once and loses nothing" in log
    assert log.endswith("Stopped; everything is on disk.\n") and "Traceback" not in log


def test_a_stop_ends_a_load_and_lets_go_of_who_waits_for_it(tmp_path, endless):
    server = Server(tmp_path / "data", "--model", f"{NEVER}={endless},lazy=true").start()
    with httpx.Client(base_url=f"{server.url}/api/v1", timeout=60) as http:
        session = http.post("create_session", json={"tags": [], "sdk_version": "x"}).json()["session_id"]
        wanted = {"session_id": session, "model_seq_id": 0, "base_model": NEVER, "lora_config": {"rank": 4}}
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(http.post("create_model", json=wanted)))
        waiting.start()
        until(server.engine_pids)
        (engine,) = (psutil.Process(pid) for pid in server.engine_pids())
        assert NEVER in engine.cmdline()[0], "whoever lists the processes sees which model it has"
        assert server.stop() == 0
        waiting.join()
    assert answers[0].status_code == 503 and "the server is stopping" in answers[0].json()["detail"]
    assert not engine.is_running()
    said = server.log.read_text()
    assert "Stopping: " in said and "did not stop within" not in said and "Traceback" not in said
