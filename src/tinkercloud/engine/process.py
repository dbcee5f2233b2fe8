"""An engine process: one base model, one thread that computes, one that listens.

Started by the control process with one end of a socket pair (`run`). The computing thread runs training cycles and
sampling steps in turns; it ends when the control process does.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path

from setproctitle import setproctitle

from tinkercloud.codec import decode
from tinkercloud.engine.messages import (
    Answer,
    Ask,
    CycleDone,
    FrameTooLarge,
    LoadFailed,
    Progress,
    Ready,
    RunCycle,
    Start,
    Stop,
    ToEngine,
    Working,
    frame,
    receive,
)
from tinkercloud.engine.operations import (
    AskLoad,
    CancelSample,
    CloseSampler,
    FindSample,
    OpenSampler,
    OperationError,
    Sample,
    SampleOperation,
    TrainOperation,
)
from tinkercloud.engine.protocol import Sampler, Trainer
from tinkercloud.engine.results import Failure, Result

log = logging.getLogger(__name__)

WORKING_SECONDS = 1.0
"""How often an engine that computes says that it has come further, if its steps and micro-batches are no longer."""


AWAITED_SECONDS = 1.0
"""For how long after a sample the next one is awaited."""


class Engine:
    """Shares one device between a trainer and a sampler.

    The policy: while both have work they get equal shares of time. After each training micro-batch the sampler runs
    steps for as long as that micro-batch took (at least one; what the last one took too long is taken off its next
    turn), so the time between two tokens of a sequence is bounded by one micro-batch, and a flood of samples can at
    most halve training's speed. Micro-batches are short while there are samples, and for a moment after the last one
    came. Samples go on while a save waits for the disk.
    """

    def __init__(self, trainer: Trainer, sampler: Sampler, sock: socket.socket, inbox: queue.SimpleQueue[ToEngine]):
        self._trainer = trainer
        self._sampler = sampler
        self._socket = sock
        self._inbox = inbox
        self._cycles: list[RunCycle] = []
        self._asks: dict[str, int] = {}
        self._stopping = False
        self._turn_started = 0.0
        self._overdrawn = 0.0
        """Seconds that the sampler's last turn took too long, at most what it was for."""
        self._steps: list[tuple[float, float]] = []
        self._said = 0.0
        self._asked = float("-inf")
        """When the last sample came."""

    def serve(self) -> None:
        """Run until told to stop."""
        while not self._stopping or self._cycles:
            self._take_messages(wait=not self._cycles and not self._sampler.busy)
            if self._cycles:
                self._run_cycle(self._cycles.pop(0))
            elif self._sampler.busy:
                self._step_sampler()

    def _take_messages(self, wait: bool) -> None:
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            match message:
                case RunCycle():
                    self._cycles.append(message)
                case Ask():
                    self._ask(message)
                case Stop():
                    self._stopping = True

    def _run_cycle(self, cycle: RunCycle) -> None:
        operations = [decode(payload, TrainOperation) for payload in cycle.operations]
        self._steps.clear()
        self._turn_started, self._overdrawn = time.monotonic(), 0.0
        results = self._trainer.run(operations, self)
        self._note_step(time.monotonic())
        self._send(CycleDone(cycle.cycle_id, tuple(results), self._trainer.adapter_memory, tuple(self._steps)))

    def _note_step(self, ended: float) -> None:
        epoch = time.time() - time.monotonic()
        self._steps.append((epoch + self._turn_started, epoch + ended))

    @property
    def wanted(self) -> bool:
        """See `protocol.Turns`: whether samples wait, run or are awaited."""
        is_awaited = time.monotonic() - self._asked < AWAITED_SECONDS
        return is_awaited or self._sampler.busy or not self._inbox.empty()

    def next(self) -> None:
        """See `protocol.Turns`."""
        started = time.monotonic()
        self._note_step(started)
        self._has_come_further(started)
        micro_batch = started - self._turn_started
        share = micro_batch - self._overdrawn
        self._take_messages(wait=False)
        while self._sampler.busy:
            self._step_sampler()
            self._take_messages(wait=False)
            if time.monotonic() - started >= share:
                break
        self._turn_started = time.monotonic()
        self._overdrawn = min(max(0.0, self._turn_started - started - share), micro_batch)

    def _step_sampler(self) -> None:
        for request_id, result in self._sampler.step():
            self._answer(self._asks.pop(request_id), result)
        self._has_come_further(time.monotonic())

    def _answer(self, ask_id: int, result: Result) -> None:
        """Of a sample. One that is too large is its request's fault, and must not end everybody's engine."""
        try:
            self._send(Answer(ask_id, result))
        except FrameTooLarge as error:
            why = f"the sample's answer is too large ({error}); ask for fewer samples, tokens or log-probabilities"
            self._send(Answer(ask_id, Failure(why, "user")))

    def _has_come_further(self, now: float) -> None:
        if now - self._said >= WORKING_SECONDS:
            self._said = now
            self._send(Working())

    def _ask(self, ask: Ask) -> None:
        operation = decode(ask.operation, SampleOperation)
        match operation:
            case Sample():
                self._asked = time.monotonic()
                self._asks[operation.request_id] = ask.ask_id
                self._sampler.submit(operation)
            case OpenSampler():
                self._send(Answer(ask.ask_id, self._sampler.open(operation)))
            case CloseSampler():
                self._send(Answer(ask.ask_id, self._sampler.close(operation)))
            case CancelSample():
                self._send(Answer(ask.ask_id, self._sampler.cancel(operation)))
            case FindSample():
                self._send(Answer(ask.ask_id, self._sampler.find(operation)))
            case AskLoad():
                self._send(Answer(ask.ask_id, self._sampler.load))

    def _send(self, message: CycleDone | Answer | Working) -> None:
        self._socket.sendall(frame(message))


def _listen(sock: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    """Move messages from the socket to the computing thread; end the process when the control process is gone."""
    try:
        while (message := receive(sock)) is not None:
            inbox.put(message)
    finally:  # an end of file, or a reset if it left answers unread: the computing thread may be busy for long
        os._exit(0)


def _load(start: Start, sock: socket.socket) -> tuple[Trainer, Sampler]:
    """Bring up the torch engine. Imported here: the control process knows this module, and has no torch."""

    def progress(fraction: float, text: str) -> None:
        sock.sendall(frame(Progress(fraction, text)))

    from tinkercloud.engine.torch.model import BaseModel
    from tinkercloud.engine.torch.sampler import TorchSampler
    from tinkercloud.engine.torch.trainer import TorchTrainer

    model = BaseModel.load(start.options, progress, Path(start.fingerprints))
    return TorchTrainer(model, start.options, Path(start.scratch)), TorchSampler(model, start.options)


def run(name: str, folder: str, sock: socket.socket) -> None:
    """Be an engine: serve the control process at the other end of a socket. The folders in operations are relative to
    `folder`; `name` is for whoever lists the processes."""
    os.setsid()  # Ctrl-C at the terminal is the control process's to handle
    os.chdir(folder)
    setproctitle(f"tinkercloud engine {name}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s engine: %(message)s")
    start = receive(sock)
    if not isinstance(start, Start):
        return
    try:
        trainer, sampler = _load(start, sock)
    except OperationError as error:
        sock.sendall(frame(LoadFailed(str(error))))
        return
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sock, inbox), name="listener", daemon=True).start()
    sock.sendall(frame(Ready(trainer.info)))
    Engine(trainer, sampler, sock, inbox).serve()
