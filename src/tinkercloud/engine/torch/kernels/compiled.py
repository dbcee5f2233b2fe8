"""How kernels are compiled: once for each processor, and kept beside the sources or in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numba import njit
from torch import Tensor


def kernel(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile a function of addresses (int64) and numbers. Nothing checks what it is given: call it from a function of
    tensors beside it."""

    def compiled(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"error_model": "numpy", "nogil": True}
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(signature, **options)(function)  # nowhere to keep it: seconds of each start

    return compiled


def kernels_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for tensors of this kind: float32 in the processor's memory."""
    return dtype == torch.float32 and device.type == "cpu"


def have_kernels(tensor: Tensor) -> bool:
    """Whether kernels take this tensor."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
