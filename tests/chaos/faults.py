"""A process that is killed, or a disk that fails, at each system call with which a training script's state is written.

strace attaches to a running engine or server and kills it before, or lets fail, the n-th call of a kind. Whatever was
hit, the script must get its answers, the same bits, and a state that starts.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import tinker
from tinker import types

from tests.e2e.test_first_steps import datum
from tests.serving import Server
from tinkercloud.control.verify import problems

CALLS = {
    "engine": ("mkdir", "write", "fsync", "rename"),
    "server": ("mkdir", "link", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "unlinkat", "rmdir"),
}
"""What each of the two writes with."""

ERRORS = {"write": "ENOSPC", "pwrite64": "ENOSPC", "mkdir": "ENOSPC", "link": "ENOSPC"}
"""How a call fails; the others with EIO."""

HOW_TO_INSTALL = "strace is needed by the tests: `make packages`, or on Debian `sudo apt-get install strace`"


class Fault(NamedTuple):
    target: str
    """engine or server"""
    call: str
    number: int
    """Of the call, from 1, counted in each thread."""
    kills: bool
    """The process is killed before it; else it fails."""

    def __str__(self) -> str:
        what = "killed before" if self.kills else f"{ERRORS.get(self.call, 'EIO')} from"
        return f"{self.target}: {what} {self.call} {self.number}"


class Bench:
    """A server whose processes are hit, and started again where they do not do so themselves."""

    def __init__(self, server: Server):
        assert shutil.which("strace"), HOW_TO_INSTALL
        self.server = server
        self.expected = self._script()
        """What the script gets without a fault."""

    def hit(self, fault: Fault) -> bool:
        """Run the script with a fault; whether it came to it. AssertionError if that shows."""
        before = self._pids()
        with self._watched(), _strace(before[fault.target], fault) as trace:
            found = self._script(may_refuse=not fault.kills)
        happened = "INJECTED" in trace() or (fault.kills and self._pids() != before)
        refused = found.pop("refused")
        assert found == {name: value for name, value in self.expected.items() if name in found}, (str(fault), found)
        if refused:  # the script got a clear answer; it goes well without the fault
            assert self._script() == self.expected
        return happened

    def verify(self) -> None:
        """Stop the server: nothing is lost, and it starts again."""
        assert self.server.stop() == 0
        lost = [problem for problem in problems(self.server.data_dir) if problem.lost]
        assert not lost, lost
        self.server.start()

    def _pids(self) -> dict[str, int]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                engines = self.server.engine_pids()
                if engines and self.server.process.poll() is None:
                    return {"server": self.server.process.pid, "engine": engines[0]}
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.05)
        raise AssertionError(f"there is no engine:\n{self.server.log.read_text()[-4000:]}")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Start the server again when it has been killed."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                if self.server.process.poll() is not None:
                    self.server.start(wait=False)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _script(self, may_refuse: bool = False) -> dict[str, object]:
        """Steps, a save, a load of it and a sampler of the weights then; with `may_refuse` the last three may fail."""
        client = tinker.ServiceClient(base_url=self.server.url, api_key="tml-test")
        run = client.create_lora_training_client(base_model="tinkercloud/nano", rank=4, seed=3).result()
        found: dict[str, object] = {"refused": None}

        def step(name: str) -> None:
            output = run.forward_backward([datum([10, 11, 12, 13, 14]), datum([30, 31, 32])], "cross_entropy")
            run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            found[name] = output.result().metrics["loss:sum"]

        try:
            step("first")
            path = run.save_state(f"it-{uuid.uuid4().hex}").result().path
            step("second")
            run.load_state_with_optimizer(path).result()
            step("second again")
            sampler = run.save_weights_and_get_sampling_client().result()
            found["scores"] = sampler.compute_logprobs(types.ModelInput.from_ints([10, 11, 12])).result()
        except tinker.RequestFailedError as error:
            if not may_refuse:
                raise
            found["refused"] = str(error)
        client.close("success").result()
        return found


@contextmanager
def _strace(pid: int, fault: Fault):
    """Attached to all threads of a process while this is entered; gives what strace has seen so far."""
    how = "signal=SIGKILL" if fault.kills else f"error={ERRORS.get(fault.call, 'EIO')}"
    command = ["strace", "-f", "-p", str(pid), "-e", f"trace={fault.call}"]
    command += ["-e", f"inject={fault.call}:{how}:when={fault.number}"]
    seen: list[str] = []
    attached = threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            seen.append(line)
            attached.set()
        attached.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert attached.wait(20), "strace did not attach"
    assert "attached" in seen[0], f"strace cannot look into other processes here: {seen[0]}"
    time.sleep(0.2)
    try:
        yield lambda: "".join(seen)
    finally:
        process.terminate()
        process.wait()
        reader.join()
