"""Sixteen float32 numbers at a time, in kernels that numba compiles.

A compiler may regroup a sum only if it is told that it may, and these kernels never tell it: they name the lanes and
the order of every sum themselves, so a number has the same bits on any processor and whatever is computed beside it.
Where a processor has narrower vectors, LLVM takes two or four of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16

_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class Vector(types.Type):
    """`LANES` float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Vector")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


VECTOR = Vector()

Emit = Callable[[ir.IRBuilder, Any], ir.Value]


def _pointer(element: types.Type) -> Callable[..., Any]:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        result = types.CPointer(element)
        return result(types.int64), lambda context, builder, signature, args: builder.inttoptr(
            args[0], context.get_value_type(result)
        )

    return pointer


floats, doubles, ints = _pointer(types.float32), _pointer(types.float64), _pointer(types.int64)
"""An address, as `Tensor.data_ptr` gives it, as a pointer to numbers."""


@intrinsic
def load(context, pointer, index):
    """The vector that begins at an index."""

    def emit(context, builder, signature, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        vector = builder.load(place)
        vector.align = 4
        return vector

    return VECTOR(pointer, types.int64), emit


@intrinsic
def store(context, pointer, index, vector):
    """Write the vector that begins at an index."""

    def emit(context, builder, signature, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        builder.store(args[2], place).align = 4
        return context.get_dummy_value()

    return types.void(pointer, types.int64, VECTOR), emit


@intrinsic
def fetch(context, pointer, index):
    """Ask for the memory of an index, so that it is in the cache when it is needed. It need not be one's own."""

    def emit(context, builder, signature, args):
        name, number, place = "llvm.prefetch.p0", ir.IntType(32), builder.gep(args[0], [args[1]])
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [place.type, number, number, number]), name
        )
        builder.call(function, [place, number(0), number(3), number(1)])  # to read, to all caches, data
        return context.get_dummy_value()

    return types.void(pointer, types.int64), emit


@intrinsic
def splat(context, number):
    """A number in all lanes."""

    def emit(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))

    return VECTOR(types.float32), emit


@intrinsic
def total(context, vector):
    """The sum of a vector's lanes, half onto half."""

    def emit(context, builder, signature, args):
        vector, half = args[0], LANES // 2
        while half:
            mask = [lane + half if lane < half else lane for lane in range(LANES)]
            vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, ir.Constant(_INTS, mask)))
            half //= 2
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(VECTOR), emit


@intrinsic
def store_totals(context, pointer, index, a, b, c, d):
    """Write the sums of four vectors from an index on, each added up as `total` does."""
    return _to_totals(pointer, adds=False)


@intrinsic
def add_totals(context, pointer, index, a, b, c, d):
    """Likewise, but add them to what is there."""
    return _to_totals(pointer, adds=True)


def _to_totals(pointer: types.Type, adds: bool) -> tuple[Any, Callable[..., Any]]:
    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer, index, a, b, c, d = args

        def halves(left: ir.Value, right: ir.Value, size: int) -> ir.Value:
            """Of each `2 * size` lanes the first half plus the second, of `left` and then of `right`."""
            firsts = [lane for lane in range(2 * LANES) if lane // size % 2 == 0]
            chosen = (ir.Constant(_INTS, [lane + by for lane in firsts]) for by in (0, size))
            return builder.fadd(*(builder.shuffle_vector(left, right, lanes) for lanes in chosen))

        pairs = halves(halves(a, b, 8), halves(c, d, 8), 4)
        pairs = halves(halves(pairs, pairs, 2), pairs, 1)
        first = ir.Constant(ir.VectorType(ir.IntType(32), 4), list(range(4)))
        place = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(_FLOAT, 4).as_pointer())
        sums = builder.shuffle_vector(pairs, pairs, first)
        if adds:
            before = builder.load(place)
            before.align = 4
            sums = builder.fadd(before, sums)
        builder.store(sums, place).align = 4
        return context.get_dummy_value()

    return types.void(pointer, types.int64, VECTOR, VECTOR, VECTOR, VECTOR), emit


@intrinsic
def largest(context, vector):
    """The largest of a vector's lanes; of none that is NaN, if there are others."""

    def emit(context, builder, signature, args):
        vector, half = args[0], LANES // 2
        while half:
            mask = [lane + half if lane < half else lane for lane in range(LANES)]
            other = builder.shuffle_vector(vector, vector, ir.Constant(_INTS, mask))
            vector = builder.select(builder.fcmp_ordered(">", other, vector), other, vector)
            half //= 2
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(VECTOR), emit


def _elementwise(count: int, emit: Emit) -> Callable[..., Any]:
    """An operation on `count` vectors."""

    def code(context, builder, signature, args):
        return emit(builder, args)

    if count == 1:

        @intrinsic
        def operation(context, a):
            return VECTOR(VECTOR), code

    elif count == 2:

        @intrinsic
        def operation(context, a, b):
            return VECTOR(VECTOR, VECTOR), code

    else:

        @intrinsic
        def operation(context, a, b, c):
            return VECTOR(VECTOR, VECTOR, VECTOR), code

    return operation


def _called(name: str, count: int) -> Emit:
    """LLVM's own function of that name."""

    def emit(builder: ir.IRBuilder, args: Any) -> ir.Value:
        full = f"llvm.{name}.v{LANES}f32"
        function = builder.module.globals.get(full) or ir.Function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * count), full
        )
        return builder.call(function, args)

    return emit


def _power_of_two(builder: ir.IRBuilder, args: Any) -> ir.Value:
    biased = builder.add(builder.fptosi(args[0], _INTS), ir.Constant(_INTS, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(_INTS, [23] * LANES)), _FLOATS)


def _where_less(builder: ir.IRBuilder, args: Any) -> ir.Value:
    left, right, then = args
    return builder.select(builder.fcmp_ordered("<", left, right), then, left)


add = _elementwise(2, lambda builder, args: builder.fadd(*args))
sub = _elementwise(2, lambda builder, args: builder.fsub(*args))
mul = _elementwise(2, lambda builder, args: builder.fmul(*args))
div = _elementwise(2, lambda builder, args: builder.fdiv(*args))
neg = _elementwise(1, lambda builder, args: builder.fneg(args[0]))
fma = _elementwise(3, _called("fma", 3))
"""a * b + c, rounded once."""
nearest = _elementwise(1, _called("rint", 1))
"""To whole numbers, halves to even ones."""
power_of_two = _elementwise(1, _power_of_two)
"""2 ** n of whole numbers from -126 to 127."""
where_less = _elementwise(3, _where_less)
"""a, or c where a < b; NaN stays."""
maximum = _elementwise(2, lambda builder, args: builder.select(builder.fcmp_ordered(">", *args), *args))
"""a where it is larger than b, else b."""

_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST, _LARGEST = np.float32(-87.3), np.float32(88.3)
"""Of arguments whose exponentials are normal numbers."""
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@njit(inline="always")
def exp(x):
    """e ** x within two units in the last place; 0 below -87.3, e ** 88.3 above that. The polynomial is Cephes' expf
    (Moshier, 1992)."""
    bounded = neg(where_less(neg(x), splat(-_LARGEST), splat(-_LARGEST)))
    inside = where_less(bounded, splat(_SMALLEST), splat(_SMALLEST))
    n = nearest(mul(inside, splat(_LOG2_E)))
    r = fma(n, splat(-_LN_2_LOW), fma(n, splat(-_LN_2_HIGH), inside))
    p = fma(splat(_P0), r, splat(_P1))
    p = fma(p, r, splat(_P2))
    p = fma(p, r, splat(_P3))
    p = fma(p, r, splat(_P4))
    p = fma(p, r, splat(_P5))
    y = mul(add(fma(p, mul(r, r), r), splat(np.float32(1))), power_of_two(n))
    return chosen(x, splat(_SMALLEST), splat(np.float32(0)), y)


@intrinsic
def chosen(context, a, b, then, otherwise):
    """`then` in the lanes where a < b, else `otherwise`."""

    def emit(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return VECTOR(VECTOR, VECTOR, VECTOR, VECTOR), emit


@intrinsic
def part_or(context, pointer, index, count, otherwise):
    """The first `count` numbers from an index on as a vector, and another vector's in the lanes behind them."""

    def emit(context, builder, signature, args):
        pointer, index, count, otherwise = args
        mask = _mask(builder, count)
        name = f"llvm.masked.load.v{LANES}f32.p0"
        place = builder.bitcast(builder.gep(pointer, [index]), _FLOATS.as_pointer())
        function = builder.module.globals.get(name) or ir.Function(
            builder.module,
            ir.FunctionType(_FLOATS, [_FLOATS.as_pointer(), ir.IntType(32), mask.type, _FLOATS]),
            name,
        )
        return builder.call(function, [place, ir.Constant(ir.IntType(32), 4), mask, otherwise])

    return VECTOR(pointer, types.int64, types.int64, VECTOR), emit


@njit(inline="always")
def part(pointer, index, count):
    """The first `count` numbers from an index on as a vector, the other lanes 0."""
    return part_or(pointer, index, count, splat(np.float32(0)))


@intrinsic
def store_part(context, pointer, index, vector, count):
    """Write the first `count` lanes from an index on."""

    def emit(context, builder, signature, args):
        pointer, index, vector, count = args
        mask = _mask(builder, count)
        name = f"llvm.masked.store.v{LANES}f32.p0"
        place = builder.bitcast(builder.gep(pointer, [index]), _FLOATS.as_pointer())
        function = builder.module.globals.get(name) or ir.Function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_FLOATS, _FLOATS.as_pointer(), ir.IntType(32), mask.type]),
            name,
        )
        builder.call(function, [vector, place, ir.Constant(ir.IntType(32), 4), mask])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, VECTOR, types.int64), emit


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """Of the first `count` lanes."""
    number = builder.trunc(count, ir.IntType(32))
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    counts = builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), counts)
