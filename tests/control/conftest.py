from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tests import s3 as moto
from tinkercloud.config import Settings
from tinkercloud.control.service import Service
from tinkercloud.control.store_owner import StoreOwner
from tinkercloud.control.training_run import TrainingRun
from tinkercloud.engine.operations import (
    AdamParams,
    Datum,
    DimuonParams,
    ForwardBackward,
    LoraConfig,
    OptimizerFamily,
    OptimStep,
)
from tinkercloud.event_loop import new_event_loop
from tinkercloud.ledger.records import CheckpointRecord

NANO = "tinkercloud/nano"
OWNER = "local"


def datum(*tokens: int) -> Datum:
    ids = np.array(tokens, np.int32)
    return Datum(ids[:-1], {"target_tokens": ids[1:].astype(np.int64), "weights": np.ones(len(ids) - 1, np.float32)})


BATCH = (datum(5, 6, 7, 8, 9, 10), datum(20, 21, 22))


class Client:
    """A training run driven through the service, one operation after another."""

    def __init__(self, service: Service, session, model):
        self.service, self.session, self.model = service, session, model
        self.seq_id = 0

    @classmethod
    async def create(
        cls,
        service: Service,
        seed: int = 0,
        optimizer: OptimizerFamily = "adamw",
        lora: LoraConfig | None = None,
        base_model: str = NANO,
    ) -> Client:
        session = await service.sessions.create(
            owner=OWNER, tags=[], user_metadata={}, sdk_version="0.38.0", project_id=None, display_name=None
        )
        entry = await service.runs.create(session, 0, base_model, lora or LoraConfig(rank=4, seed=seed), {}, optimizer)
        await cls._finished(service, entry)
        return cls(service, session, await service.runs.live(entry.stream, OWNER))

    async def send(self, kind: str, operation):
        self.seq_id += 1
        return await self.service.runs.submit(self.model, self.seq_id, kind, operation)

    async def forward_backward(self, batch=BATCH):
        operation = ForwardBackward(self.model.model_id, batch, "cross_entropy")
        return await self.result(await self.send("forward_backward", operation))

    async def optim_step(self, learning_rate: float = 1e-2):
        params = AdamParams(learning_rate) if self.model.optimizer == "adamw" else DimuonParams(learning_rate)
        return await self.result(await self.send("optim_step", OptimStep(self.model.model_id, params)))

    async def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append((await self.forward_backward()).metrics["loss:sum"])
            await self.optim_step()
        return losses

    async def save(self, name: str, **options) -> CheckpointRecord:
        """The checkpoint; `options` as `TrainingRuns.save_weights` takes them."""
        self.seq_id += 1
        given = {"kind": "training", "ttl_seconds": None, **options}
        saved = await self.result(await self.service.runs.save_weights(self.model, self.seq_id, name, **given))
        return await self.service.checkpoints.get(saved.path, OWNER)

    async def load(self, checkpoint: CheckpointRecord, with_optimizer: bool = True):
        self.seq_id += 1
        entry = await self.service.runs.load_weights(self.model, self.seq_id, checkpoint, with_optimizer)
        return await self.result(entry)

    async def created_from(self, checkpoint: CheckpointRecord, model_seq_id: int = 1) -> Client:
        entry = await self.service.runs.create_from(self.session, model_seq_id, checkpoint, True, {})
        await self.result(entry)
        return Client(self.service, self.session, await self.service.runs.live(entry.stream, OWNER))

    async def result(self, entry):
        return await self._finished(self.service, entry)

    @staticmethod
    async def _finished(service: Service, entry):
        entry, outcome = await service.futures.outcome(entry.request_id, OWNER, timeout=60)
        assert outcome is not None, f"{entry.kind} has not ended after 60 s"
        return outcome


async def kill_engine(service: Service) -> None:
    os.kill((await service.models.get(NANO).engine.running()).pid, signal.SIGKILL)


async def park_silent(service: Service, now: float) -> None:
    """What housekeeping does for the sessions that are silent at `now`."""
    await service.sessions.mark_silent(now)
    for base_model in service.sessions.leaving:
        await service.sessions.let_go(base_model)


def before_the_next_append(service, monkeypatch, happens):
    """Let something happen when the next operation has been let in and is about to be recorded."""
    append = service._ledger.append

    async def late(*arguments, **options):
        monkeypatch.setattr(service._ledger, "append", append)
        await happens()
        return await append(*arguments, **options)

    monkeypatch.setattr(service._ledger, "append", late)


@pytest.fixture
def without_snapshots(monkeypatch):
    """As if every crash came just before a snapshot."""

    async def none(runs, engine):
        pass

    monkeypatch.setattr(TrainingRun, "snapshot", none)


@pytest.fixture
def serving(tmp_path):
    """`async with serving() as service`: the real service on the embedded model, over one data directory."""

    @asynccontextmanager
    async def start(**options):
        settings = Settings.load(data_dir=tmp_path / "data", **options)
        service = await Service.start(settings, lambda model, fraction, text: None)
        try:
            yield service
        finally:
            await service.stop()

    return start


@pytest.fixture(scope="package")
def shared(tmp_path_factory):
    """Run a coroutine function with a service that many tests share (a start takes seconds), to its end within two
    minutes. It must leave the service as it found it: its engine alive, its base model served."""
    settings = Settings.load(data_dir=tmp_path_factory.mktemp("shared") / "data")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        service = runner.run(Service.start(settings, lambda model, fraction, text: None))
        yield lambda story: runner.run(asyncio.wait_for(story(service), timeout=120))
        runner.run(service.stop())


@pytest.fixture(scope="package")
def undisturbed(shared) -> list[float]:
    """The losses of a run to which nothing happens, step by step."""

    async def story(service):
        return await (await Client.create(service)).steps(8)

    return shared(story)


@pytest.fixture
def run():
    """Run a coroutine function to its end, within two minutes."""

    def run_it(coroutine_function):
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(asyncio.wait_for(coroutine_function(), timeout=120))

    return run_it


@pytest.fixture(scope="package")
def s3_server():
    """An S3 server of this process's own; who stops it starts it again."""
    server = moto.S3()
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store_url(request, tmp_path, monkeypatch):
    """Of a new store, once in a folder and once in S3."""
    if request.param == "folder":
        return f"file://{tmp_path}/store"
    s3 = request.getfixturevalue("s3_server")
    moto.use(monkeypatch, s3)
    return s3.bucket()


@pytest.fixture
def saved_folder(tmp_path):
    """As a save leaves it."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    return folder


@pytest.fixture
def us(tmp_path):
    """The owner of a store that is ours."""
    (tmp_path / "us").mkdir()
    return StoreOwner(tmp_path / "us")
