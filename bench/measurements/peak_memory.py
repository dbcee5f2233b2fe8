"""How much memory a training step takes above what is resident once the model is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.competitor import Competitor, thread_counts
from bench.data import uniform
from bench.measurement import Measurement
from bench.memory import PeakMemory, engine_of
from bench.model import MIDDLE, SMALL, Shape
from bench.readings import Goal, Readings, interleaved
from bench.stage import LEARNING_RATE, RANK, Stage, batch

ROWS, TOKENS, STEPS = 8, 256, 2
"""The second step has the optimizer's state beside the activations."""


def _ours(stage: Stage) -> float:
    """Bytes of the engine process of a fresh server, from readiness on: the adapter's own included."""
    import tinker

    from tinkercloud.cli.local_server import running_server

    with tempfile.TemporaryDirectory(dir=stage.folder) as folder, running_server(Path(folder), stage.served) as server:
        peak = PeakMemory(engine_of(server.pid))
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-bench")
        run = client.create_lora_training_client(base_model=stage.shape.name, rank=RANK, seed=0).result()
        for _ in range(STEPS):
            run.forward_backward(batch(uniform(ROWS, TOKENS)), "cross_entropy").result()
            run.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
        client.holder.close()
        return float(peak.above)


def _theirs(stage: Stage) -> float:
    """Bytes of a fresh competitor; its adapter is resident beforehand."""
    competitor = Competitor("bench.by_hand", stage.model_folder, waits=("passive",))
    try:
        peak = PeakMemory(competitor.pid("passive"))
        for _ in range(STEPS):
            competitor.seconds("step", wait="passive", threads=thread_counts()[-1], rows=ROWS, tokens=TOKENS)
        return float(peak.above)
    finally:
        competitor.close()


def _measurement(shape: Shape) -> Measurement:
    def take(stage: Stage, repeat: int) -> Readings:
        """Memory is steadier than time: three processes of each side say enough."""
        return interleaved(lambda: _ours(stage), [lambda: _theirs(stage)], min(repeat, 3), warm_up=0)

    return Measurement(
        f"peak_memory_{shape.label}",
        f"peak memory of a step of {ROWS} x {TOKENS} tokens above what is loaded, {shape.label}",
        "PEFT",
        Goal("fewer_bytes", 0.7),
        take,
        shape=shape,
    )


PEAK_MEMORY = tuple(_measurement(shape) for shape in (SMALL, MIDDLE))
