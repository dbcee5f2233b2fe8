"""How kernels are compiled: once for each processor, and kept beside the sources or in the user's cache folder.

A `kernel` runs on the thread that calls it. A `shared` one is a task that torch's own OpenMP threads take the parts of,
as many as torch would use: which thread computes what is left to chance, so a part must be the same on any.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable
from functools import cache, partial
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


PARTS, NUMBERS, BARRIER, THREADS = 0, 1, -1, -2
"""Where a `shared` task finds the counter of the parts that are taken (`next_part`), behind it the numbers that it was
called with, and before it the address of the barrier (`wait_for_all`) and a counter of threads; all int64."""


def shared(task: Callable[..., None]) -> Callable[..., None]:
    """Compile a task to be called with numbers (int64): every thread runs it, given where they lie, and takes parts of
    the work until there are none."""
    compiled = _kept(cfunc, task, "void(int64)", error_model="numpy")

    def run(*numbers: int) -> None:
        threads = torch.get_num_threads()
        is_alone = threads == 1 or _OPENMP is None
        data = array("q", (0, 0 if is_alone else _BARRIER, 0, *numbers))
        address = data.buffer_info()[0] - THREADS * data.itemsize
        if is_alone:
            compiled.ctypes(address)
        else:
            _OPENMP.GOMP_parallel(compiled.address, address, threads, 0)

    return run


def bits_of(number: float) -> int:
    """A float64 as the int64 of the same bits, to be among a task's numbers."""
    return struct.unpack("q", struct.pack("d", number))[0]


def later(decorate: Callable[[Callable[..., None]], Callable[..., None]]) -> Callable[..., Callable[..., None]]:
    """Compile a `kernel` or a `shared` one when it is first called: one that only some models need."""

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        made = cache(partial(decorate, function))

        def run(*numbers: int | float) -> None:
            made()(*numbers)

        return run

    return decorated


@intrinsic
def take(context: Any, counters: Any, index: Any) -> Any:
    """The next number of a counter: one that no other thread has, from 0 on if that is what it began with."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        counter = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counters, types.int64), emit


@njit(inline="always")
def next_part(data):
    """The number of a part that nobody has taken, counted from 0."""
    return take(data, PARTS)


@njit(inline="always")
def wait_for_all(data):
    """Until every thread of a `shared` task is here: what each has written, all see."""
    if data[BARRIER] != 0:
        _call(data[BARRIER])


@intrinsic
def _call(context: Any, address: Any) -> Any:
    """A C function without arguments."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _kept(compiler: Callable[..., Any], function: Callable[..., None], signature: str, **options: Any) -> Any:
    function.__qualname__ += f"_{SOURCES}"  # part of the name under which numba keeps it
    try:
        return compiler(signature, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return compiler(signature, **options)(function)  # nowhere to keep it: seconds of each start


def _openmp() -> Any:
    """torch's own OpenMP runtime, None if that is of another kind than GNU's."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.GOMP_barrier  # noqa: B018
    except (OSError, AttributeError):
        return None
    return library


_OPENMP = _openmp()
_BARRIER = ctypes.cast(_OPENMP.GOMP_barrier, ctypes.c_void_p).value if _OPENMP else 0


def kernels_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for tensors of this kind: float32 in the processor's memory."""
    return dtype == torch.float32 and device.type == "cpu"


def have_kernels(tensor: Tensor) -> bool:
    """Whether kernels take this tensor."""
    return kernels_for(tensor.dtype, tensor.device)
