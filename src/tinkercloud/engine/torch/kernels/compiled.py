"""How kernels are compiled: once for each processor, and kept beside the sources or in the user's cache folder.

A `kernel` runs on the thread that calls it. A `shared` one is a task that torch's own OpenMP threads take the parts of,
as many as torch would use: which thread computes what is left to chance, so a part must be the same on any.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from tinkercloud.engine.torch.sources import digest_of

SOURCES = digest_of(Path(__file__).parent)
"""Of all kernels. They inline one another's functions, and numba looks at the file of a kernel alone."""


def kernel(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile a function of addresses (int64) and numbers. Nothing checks what it is given: call it from a function of
    tensors beside it."""

    return lambda function: _kept(njit, function, signature, error_model="numpy", nogil=True)


def shared(task: Callable[..., None]) -> Callable[..., None]:
    """Compile a task to be called with numbers (int64): it is given where they lie, behind a counter of the parts that
    are taken (`next_part`), and takes parts until there are none."""
    compiled = _kept(cfunc, task, "void(int64)", error_model="numpy")

    def run(*numbers: int) -> None:
        data = array("q", (0, *numbers))
        threads = torch.get_num_threads()
        if threads == 1 or _OPENMP is None:
            compiled.ctypes(data.buffer_info()[0])
        else:
            _OPENMP(compiled.address, data.buffer_info()[0], threads, 0)

    return run


def bits_of(number: float) -> int:
    """A float64 as the int64 of the same bits, to be among a task's numbers."""
    return struct.unpack("q", struct.pack("d", number))[0]


@intrinsic
def next_part(context: Any, data: Any) -> Any:
    """The number of a part that nobody has taken, counted from 0."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(data), emit


def _kept(compiler: Callable[..., Any], function: Callable[..., None], signature: str, **options: Any) -> Any:
    function.__qualname__ += f"_{SOURCES}"  # part of the name under which numba keeps it
    try:
        return compiler(signature, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return compiler(signature, **options)(function)  # nowhere to keep it: seconds of each start


def _openmp() -> Any:
    """GOMP_parallel(function, data, threads, flags) of torch's own runtime, None if that is of another kind."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


_OPENMP = _openmp()


def kernels_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for tensors of this kind: float32 in the processor's memory."""
    return dtype == torch.float32 and device.type == "cpu"


def have_kernels(tensor: Tensor) -> bool:
    """Whether kernels take this tensor."""
    return kernels_for(tensor.dtype, tensor.device)
