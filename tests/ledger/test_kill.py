"""Whatever a SIGKILL leaves behind opens again, with everything that was acknowledged."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger.conftest import MODEL, model_record
from tinkercloud.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord
from tinkercloud.ledger.writer import SMALL_BYTES

KILLS = 4
SIZES = [0, 10, SMALL_BYTES, SMALL_BYTES + 1, 500_000]


def content(seq_id: int, part: str) -> bytes:
    """What operation `seq_id` stores; some in SQL, some in a segment file."""
    return random.Random(f"{seq_id} {part}").randbytes(SIZES[seq_id % len(SIZES)])


async def write_until_killed(data_dir: Path, url: str | None) -> None:
    """Appends in bursts and completes one by one, saying each on stdout once it is acknowledged."""
    ledger = await Ledger.open(data_dir, url)
    await ledger.insert(model_record())

    async def append(seq_id: int) -> None:
        await ledger.append(MODEL, seq_id, "forward_backward", content(seq_id, "payload"))
        print("appended", seq_id, flush=True)

    for entry in await ledger.pending(MODEL):
        await ledger.complete(entry.request_id, content(entry.seq_id, "outcome"))
        print("completed", entry.seq_id, flush=True)
    first = await ledger.highest_seq(MODEL) + 1
    while True:
        await asyncio.gather(*(append(seq_id) for seq_id in range(first, first + 8)))
        for seq_id in range(first, first + 4):
            await ledger.complete(f"{MODEL}:{seq_id}", content(seq_id, "outcome"))
            print("completed", seq_id, flush=True)
        first += 8


@pytest.mark.anyio
async def test_every_acknowledged_write_outlives_a_kill(tmp_path: Path, database_url: str | None) -> None:
    program = (
        "import asyncio, pathlib; from tests.ledger.test_kill import write_until_killed; "
        f"asyncio.run(write_until_killed(pathlib.Path({str(tmp_path)!r}), {database_url!r}))"
    )
    said: dict[str, set[int]] = {"appended": set(), "completed": set()}
    for kill in range(KILLS):
        root = Path(__file__).parents[2]
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(random.Random(kill).randint(1, 40))]
            child.kill()
            lines += child.stdout.readlines()
        for line in lines:
            verb, seq_id = line.split()
            said[verb].add(int(seq_id))
    assert len(said["appended"]) > KILLS and said["completed"]

    ledger = await Ledger.open(tmp_path, database_url)
    pending, history = await ledger.pending(MODEL), await ledger.history(MODEL, after_seq=-1)
    assert said["appended"] <= {entry.seq_id for entry in pending + history}
    assert said["completed"] <= {entry.seq_id for entry in history}
    for entries in (pending, history):
        assert [entry.seq_id for entry in entries] == sorted(entry.seq_id for entry in entries)
    numbers = [entry.completion for entry in history]
    assert len(set(numbers)) == len(numbers)
    for entry in pending + history:
        assert await ledger.payload(entry.request_id) == content(entry.seq_id, "payload")
    for entry in history:
        assert await ledger.outcome(entry.request_id) == content(entry.seq_id, "outcome")
    model = await ledger.get(ModelRecord, MODEL)
    assert model is not None and model.applied_seq == max(entry.seq_id for entry in history)
    await ledger.close()
