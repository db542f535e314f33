# mypy: disable-error-code="no-untyped-def"
"""Vectors of 64 bytes for Numba: what the loops of the CPU kernels are written in.

``Lanes`` is one LLVM vector, 16 float32 or 8 float64 numbers; a processor whose registers are
shorter uses several. The number of lanes is the same everywhere, and with it the order of sums.
16-bit floats, which Numba does not have, are stored as integers (uint16 for bfloat16, int16 for
float16) and widened to float32 where they are loaded.

A vector may reach over the end of what it is loaded from or stored to: ``n`` says how many
elements are left there. Bits, for masks, are the lowest bits of an int64, that of lane 0 first.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

_CONTRACT = ("contract",)  # a product and a sum may become one multiply-add
_I64 = ir.IntType(64)


class Lanes(types.Type):
    """The type of a vector of floating-point numbers."""

    def __init__(self, number: Any) -> None:
        self.number = number
        self.count = 512 // number.bitwidth
        super().__init__(f"Lanes({number}, {self.count})")

    def vector(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.count)


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = ir.DoubleType() if fe_type.count == 8 else ir.FloatType()
        super().__init__(dmm, fe_type, fe_type.vector(element))


def _lanes_of(array) -> Lanes:
    """The lanes that elements of an array are loaded into."""
    return Lanes(array.dtype if isinstance(array.dtype, types.Float) else types.float32)


def _spread(builder, value, lanes):
    one = builder.insert_element(
        ir.Constant(lanes.vector(value.type), ir.Undefined), value, ir.IntType(32)(0)
    )
    order = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), [0] * lanes.count)
    return builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), order)


def _first(builder, n, lanes):
    """Which lanes are among the first ``n``."""
    numbers = ir.Constant(lanes.vector(_I64), list(range(lanes.count)))
    return builder.icmp_signed("<", numbers, _spread(builder, n, lanes))


def _pointer(context, builder, array, value, index, vector):
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _masked(builder, name, result, arguments, pointer, vector):
    kinds = [a.type for a in arguments]
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(result, kinds),
        f"llvm.masked.{name}.v{vector.count}{_suffix(vector.element)}.p0",
    )
    return builder.call(function, arguments)


def _suffix(element) -> str:
    return {"float": "f32", "double": "f64", "i16": "i16"}[str(element)]


def _widen(builder, value, stored, lanes):
    if isinstance(stored, types.Float):
        return value
    if stored == types.uint16:
        kind = lanes.vector(ir.IntType(32))
        wide = builder.shl(builder.zext(value, kind), ir.Constant(kind, [16] * lanes.count))
        return builder.bitcast(wide, lanes.vector(ir.FloatType()))
    half = builder.bitcast(value, lanes.vector(ir.HalfType()))
    return builder.fpext(half, lanes.vector(ir.FloatType()))


def _narrow(builder, value, stored, lanes):
    """Rounded to nearest even."""
    if isinstance(stored, types.Float):
        return value
    short, wide = lanes.vector(ir.IntType(16)), lanes.vector(ir.IntType(32))
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(value, lanes.vector(ir.HalfType())), short)

    def all_lanes(kind, number):
        return ir.Constant(kind, [number] * lanes.count)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, all_lanes(wide, 16)), all_lanes(wide, 1))
    rounded = builder.add(bits, builder.add(odd, all_lanes(wide, 0x7FFF)))
    high = builder.trunc(builder.lshr(rounded, all_lanes(wide, 16)), short)
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, all_lanes(short, 0x7FC0), high)


@intrinsic
def load(typingctx, array, i, n, rest):
    """array[i : i + n], as far as it fits, and ``rest`` in the lanes that are left."""
    lanes = _lanes_of(array)
    size = array.dtype.bitwidth // 8

    def generate(context, builder, signature, arguments):
        value, index, left, other = arguments
        vector = lanes.vector(context.get_value_type(array.dtype))
        pointer = _pointer(context, builder, array, value, index, vector)
        full = builder.icmp_signed(">=", left, _I64(lanes.count))
        result = cgutils.alloca_once(builder, other.type)
        with builder.if_else(full, likely=True) as (then, otherwise):
            with then:
                loaded = builder.load(pointer, align=size)
                builder.store(_widen(builder, loaded, array.dtype, lanes), result)
            with otherwise:
                which = _first(builder, left, lanes)
                zero = ir.Constant(vector, None)
                loaded = _masked(
                    builder, "load", vector, [pointer, ir.IntType(32)(size), which, zero], pointer,
                    vector,
                )  # fmt: skip
                some = _widen(builder, loaded, array.dtype, lanes)
                builder.store(builder.select(which, some, other), result)
        return builder.load(result)

    return lanes(array, types.int64, types.int64, lanes), generate


@intrinsic
def store(typingctx, array, i, n, v):
    """array[i : i + n] = v, as far as it fits."""
    size = array.dtype.bitwidth // 8

    def generate(context, builder, signature, arguments):
        value, index, left, number = arguments
        vector = v.vector(context.get_value_type(array.dtype))
        pointer = _pointer(context, builder, array, value, index, vector)
        narrow = _narrow(builder, number, array.dtype, v)
        full = builder.icmp_signed(">=", left, _I64(v.count))
        with builder.if_else(full, likely=True) as (then, otherwise):
            with then:
                builder.store(narrow, pointer, align=size)
            with otherwise:
                which = _first(builder, left, v)
                _masked(
                    builder, "store", ir.VoidType(),
                    [narrow, pointer, ir.IntType(32)(size), which], pointer, vector,
                )  # fmt: skip
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, v), generate


@intrinsic
def stream(typingctx, array, i, v):
    """array[i : i + lanes] = v past the caches; the address is a multiple of the vector's bytes."""
    size = array.dtype.bitwidth // 8

    def generate(context, builder, signature, arguments):
        value, index, number = arguments
        vector = v.vector(context.get_value_type(array.dtype))
        pointer = _pointer(context, builder, array, value, index, vector)
        stored = builder.store(
            _narrow(builder, number, array.dtype, v), pointer, align=size * v.count
        )
        mark = builder.module.add_metadata([ir.IntType(32)(1)])
        stored.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(array, types.int64, v), generate


def _fetching(locality):
    @intrinsic
    def fetch(typingctx, array, i):
        def generate(context, builder, signature, arguments):
            pointer = _pointer(context, builder, array, *arguments, ir.IntType(8))
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [pointer.type, *[ir.IntType(32)] * 3]),
                "llvm.prefetch.p0",
            )
            how = [ir.IntType(32)(n) for n in (0, locality, 1)]  # to read, data
            builder.call(function, [pointer, *how])
            return context.get_dummy_value()

        return types.void(array, types.int64), generate

    return fetch


# Ask for the cache line of array[i], which may lie beyond the end, into the first or the second
# level.
fetch, fetch_far = _fetching(3), _fetching(2)


@intrinsic
def settle(typingctx):
    """Wait until what was streamed can be seen by other threads."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def load_int32(typingctx, array, i):
    """The four bytes from array[i] on, at any address."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, *arguments, ir.IntType(32))
        return builder.zext(builder.load(pointer, align=1), _I64)

    return types.int64(array, types.int64), generate


@intrinsic
def store_int32(typingctx, array, i, bits):
    """The lowest 32 bits, to the four bytes from array[i] on."""

    def generate(context, builder, signature, arguments):
        value, index, number = arguments
        pointer = _pointer(context, builder, array, value, index, ir.IntType(32))
        builder.store(builder.trunc(number, ir.IntType(32)), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def spread(typingctx, array, number):
    """The number in all lanes, of the precision in which ``array`` is computed with."""
    lanes = _lanes_of(array)

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[1], number, lanes.number)
        return _spread(builder, value, lanes)

    return lanes(array, number), generate


@intrinsic
def total(typingctx, v):
    """The sum over the lanes, in float64 and always in the same order."""

    def generate(context, builder, signature, arguments):
        value, count = arguments[0], v.count
        if v.number == types.float32:
            value = builder.fpext(value, v.vector(ir.DoubleType()))
        while count > 1:
            count //= 2
            halves = [
                builder.shuffle_vector(
                    value, value,
                    ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(k, k + count))),
                )
                for k in (0, count)
            ]  # fmt: skip
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float64(v), generate


@intrinsic
def at_least(typingctx, v, w):
    """The larger of two in every lane; NaN where v is NaN."""

    def generate(context, builder, signature, arguments):
        below = builder.fcmp_ordered("<", *arguments)
        return builder.select(below, arguments[1], arguments[0])

    return v(v, w), generate


@intrinsic
def positive(typingctx, v):
    """The bits of v > 0, or NaN."""

    def generate(context, builder, signature, arguments):
        zero = ir.Constant(arguments[0].type, None)
        which = builder.fcmp_unordered(">", arguments[0], zero)
        return builder.zext(builder.bitcast(which, ir.IntType(v.count)), _I64)

    return types.int64(v), generate


@intrinsic
def keep(typingctx, bits, v):
    """v in the lanes whose bit is set, and 0 in the others."""

    def generate(context, builder, signature, arguments):
        which = builder.trunc(arguments[0], ir.IntType(v.count))
        which = builder.bitcast(which, v.vector(ir.IntType(1)))
        return builder.select(which, arguments[1], ir.Constant(arguments[1].type, None))

    return v(types.int64, v), generate


def _define(operation, name):
    @intrinsic
    def compute(typingctx, v, w):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments, flags=_CONTRACT)

        return v(v, w), generate

    @overload(operation, inline="always")
    def choose(v, w):
        if isinstance(v, Lanes) and v == w:
            return lambda v, w: compute(v, w)
        return None


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


@intrinsic
def lanes_in(typingctx, array):
    """The number of lanes."""
    lanes = _lanes_of(array)
    return types.int64(array), lambda context, builder, signature, arguments: _I64(lanes.count)


@intrinsic
def rounded(typingctx, array, number):
    """A float64 in the precision in which ``array`` is computed with."""
    lanes = _lanes_of(array)

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[1], types.float64, lanes.number)
        return context.cast(builder, value, lanes.number, types.float64)

    return types.float64(array, types.float64), generate


@intrinsic
def as_stored(typingctx, array, v):
    """v as it will be when it has been stored to ``array``."""

    def generate(context, builder, signature, arguments):
        narrow = _narrow(builder, arguments[1], array.dtype, v)
        return _widen(builder, narrow, array.dtype, v)

    return v(array, v), generate
