"""What decides the bits of this engine's numbers, in words: whoever has the same computes the same."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import llvmlite
import numba
import torch
import transformers

from tinkercloud.engine.base_model import Quantization
from tinkercloud.engine.torch.kernels.compiled import kernels_for
from tinkercloud.engine.torch.sources import digest_of

CPU_FACTS = Path("/proc/cpuinfo")


def build_of(device: torch.device, dtype: torch.dtype, logits_bytes: int, quantization: Quantization = "none") -> str:
    """The sources of the engine, its libraries, and the processor with its instruction set and threads.

    `logits_bytes` decides where a datum is cut in the unembedding, and so how its gradient there is rounded.
    """
    parts = [
        f"engine {digest_of(Path(__file__).parent.parent)}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        str(dtype).removeprefix("torch."),
        f"logits_bytes {logits_bytes}",
    ]
    if quantization != "none":
        parts.append(f"{quantization} by bitsandbytes {version('bitsandbytes')}")
    if kernels_for(dtype, device):
        parts += [f"numba {numba.__version__}", f"llvmlite {llvmlite.__version__}"]
    if device.type == "cpu":
        mkl = os.environ.get("MKL_CBWR", "any")
        instructions = f"{torch.backends.cpu.get_cpu_capability()} (MKL {mkl})"
        parts += [_processor(), instructions, f"{torch.get_num_threads()} threads"]
    else:
        parts += [torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"]
    return ", ".join(parts)


def _processor() -> str:
    names = (line.partition(":")[2].strip() for line in _lines(CPU_FACTS) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
