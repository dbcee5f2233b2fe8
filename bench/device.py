"""Tokens per second of the engine on one device, and how much of what the device can do that is: for a GPU.

`python -m bench.device --device cuda` measures a model of Qwen3-8B's shape with random weights, the engine by itself in
one process (no server, no competitor): training with one tenant and with several that share the same tokens, and
sampling from one adapter.

A model FLOP is one that the work needs: 4 for each frozen weight and token of a forward_backward (forwards, and
backwards to the input), 2 in sampling, with the adapter's; attention and what is computed again are left out. Their
number per second, as part of `--peak-tflops`, is the MFU. Without it the peak is what a square product reaches here.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from bench.engine_alone import EngineAlone
from bench.model import LARGE, MIDDLE, SMALL, Shape, make_model
from bench.stage import RANK

SHAPES: dict[str, Shape] = {shape.label: shape for shape in (SMALL, MIDDLE, LARGE)}
SQUARE = 4096
"""Side of the product whose rate is the peak where none is given."""

PROMPT = 32
"""Tokens before those that are sampled."""

out = Console()


class Reading(NamedTuple):
    """One row of the table."""

    what: str
    tokens: int
    seconds: float
    """Median of the repetitions."""
    flop: int
    """Of the model, in one repetition."""

    def row(self, peak: float) -> dict[str, Any]:
        """As written to the file; `peak` in floating point operations a second."""
        rate = self.flop / self.seconds
        return {
            "what": self.what,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "tflops": rate / 1e12,
            "mfu": rate / peak,
        }


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}: random weights of this size.")] = LARGE.label,
    tenants: Annotated[list[int] | None, typer.Option(help="Tenants that share the tokens; repeatable.")] = None,
    sequences: Annotated[int, typer.Option(help="Of a forward_backward, all tenants together.")] = 16,
    tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 512,
    samples: Annotated[int, typer.Option(help="Requests that are sampled at once.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each of them draws.")] = 128,
    token_budget: Annotated[int, typer.Option(help="Most tokens in one micro-batch.")] = 8192,
    peak_tflops: Annotated[float, typer.Option(help="The device's, in this type; 0 measures a product.")] = 0.0,
    repeat: Annotated[int, typer.Option(min=1, help="Readings of each, after one that warms up.")] = 5,
    output: Annotated[Path, typer.Option("--json", help="Where the readings are written.")] = Path("bench/device.json"),
) -> None:
    """Measure the engine by itself on one device."""
    logging.disable_progress_bar()
    model = SHAPES[shape]
    for count in tenants or (1, 16):
        if sequences % count:
            raise typer.BadParameter(
                f"{sequences} sequences cannot be shared by {count} tenants", param_hint="--tenants"
            )
    with tempfile.TemporaryDirectory(prefix="tinkercloud-device-") as folder:
        with out.status(f"making a model of shape {shape} ..."):
            make_model(model, Path(folder), device, dtype)
            engine = EngineAlone(
                folder,
                device=device,
                dtype=dtype,
                token_budget=token_budget,
                max_context=PROMPT + new_tokens + tokens,
                max_decode_batch=samples,
                kv_cache_bytes=2 * samples * (PROMPT + new_tokens) * _token_bytes(model, dtype),
            )
        readings = [_training(engine, model, count, sequences, tokens, repeat) for count in tenants or (1, 16)]
        readings.append(_sampling(engine, model, samples, new_tokens, repeat))
    peak = peak_tflops * 1e12 or _peak(device, dtype)
    rows = [reading.row(peak) for reading in readings]
    settings = {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "dtype": dtype,
        "shape": model.name,
        "parameters": sum(fan_in * fan_out for fan_in, fan_out in model.linears),
        "lora_rank": RANK,
        "peak_tflops": peak / 1e12,
        "peak_is": "given" if peak_tflops else f"measured, a product of {SQUARE}",
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None,
        "torch": torch.__version__,
    }
    output.write_text(json.dumps({"settings": settings, "readings": rows}, indent=2) + "\n")
    out.print(_table(rows, settings))
    out.print(f"all readings: {output}", highlight=False)


def _training(engine: EngineAlone, model: Shape, tenants: int, sequences: int, tokens: int, repeat: int) -> Reading:
    count = sequences * tokens
    seconds = _seconds(lambda: engine.tenants(tenants, sequences // tenants, tokens), repeat)
    what = f"forward_backward, {sequences} x {tokens} tokens, {tenants} tenant{'s' * (tenants > 1)}"
    return Reading(what, count, seconds, model.product_flop(count, RANK))


def _sampling(engine: EngineAlone, model: Shape, samples: int, new_tokens: int, repeat: int) -> Reading:
    seconds = _seconds(lambda: engine.generate(samples, PROMPT, new_tokens), repeat)
    # The unembedding is of drawn tokens alone.
    *layers, unembedding = ((2 * i * o + 2 * RANK * (i + o)) for i, o in model.linears)
    flop = samples * (sum(layers) * (PROMPT + new_tokens - 1) + unembedding * new_tokens)
    return Reading(f"sampling, {samples} x {new_tokens} tokens, 1 adapter", samples * new_tokens, seconds, flop)


def _token_bytes(model: Shape, dtype: str) -> int:
    """What a token takes in the sampler's cache."""
    return model.layers * 2 * (model.hidden // model.groups) * getattr(torch, dtype).itemsize


def _seconds(work: Callable[[], None], repeat: int) -> float:
    """Median time; all of the work ends in numbers on the host, so there is nothing to wait for."""
    readings = []
    for _ in range(1 + repeat):
        started = time.perf_counter()
        work()
        readings.append(time.perf_counter() - started)
    return median(readings[1:])


def _peak(device: str, dtype: str) -> float:
    """Floating point operations a second of a square product, the best of ten."""
    left = torch.randn(SQUARE, SQUARE, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        (left @ left)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * SQUARE**3 / best


def _table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table:
    on = f"{settings['shape']} in {settings['dtype']} on {settings['device']}"
    table = Table(title=f"{on}, peak {settings['peak_tflops']:.2f} TFLOP/s ({settings['peak_is']})")
    for column in ("measurement", "seconds", "tokens/s", "TFLOP/s", "MFU"):
        table.add_column(column, justify="left" if column == "measurement" else "right")
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflops']:.3f}",
            f"{row['mfu']:.0%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
